"""Write the diffusers folder of the bundled model from the files that training left.

python -m dit_sparse.assets.train.export --trained OUT --bundled assets/bundled
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dit_sparse.assets.train.parts import COUNTERS, pipeline, read_trained
from dit_sparse.assets.train.words import groups


def export(trained: Path, bundled: Path) -> None:
    """Save bf16 weights, shards under 15 MB, configs, tokenizer and words.json in `bundled`."""
    pipe = pipeline(read_trained(trained).to(torch.bfloat16))
    pipe.save_pretrained(bundled, max_shard_size="14MB")
    _spell_for_transformers_4(bundled)
    (bundled / "words.json").write_text(json.dumps({"words": groups()}, indent=1) + "\n")
    shutil.copy(trained / COUNTERS, bundled / COUNTERS)  # training goes on from here: train.py --start-from


def _spell_for_transformers_4(bundled: Path) -> None:
    """Rename what only transformers 5 knows; version 5 reads the older names too."""
    weights = bundled / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    prefix = "text_model."
    save_file({prefix + name.removeprefix(prefix): value for name, value in state.items()}, weights, {"format": "pt"})
    for path, key in (("tokenizer/tokenizer_config.json", "tokenizer_class"), ("model_index.json", "tokenizer")):
        config = json.loads((bundled / path).read_text())
        name = "PreTrainedTokenizerFast"
        config[key] = ["transformers", name] if key == "tokenizer" else name
        (bundled / path).write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trained", type=Path, required=True, help="folder with weights-*.safetensors")
    parser.add_argument("--bundled", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    export(options.trained, options.bundled)


if __name__ == "__main__":
    main()
