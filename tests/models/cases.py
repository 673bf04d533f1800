"""All tiny models, family by family."""

from __future__ import annotations

from tests.models import (
    image_flux,
    image_packed,
    image_rows,
    image_sized,
    video_cosmos,
    video_history,
    video_hunyuan,
    video_kandinsky,
    video_ltx,
    video_wan,
)
from tests.models.case import Case

FAMILIES = (
    video_wan, video_hunyuan, video_history, video_ltx, video_cosmos, video_kandinsky,
    image_flux, image_sized, image_rows, image_packed,
)  # fmt: skip
CASES: list[Case] = [case for family in FAMILIES for case in family.CASES]

# The first diffusers that has a class, where that is later than the oldest one we support.
SINCE = {
    "BriaFibo2Transformer2DModel": "0.42",
    "Flux3Transformer2DModel": "0.42",
    "Kandinsky6Transformer3DModel": "0.42",
}

# Transformer classes of diffusers that this project is not about: they have no tokens on a grid of images.
OUTSIDE = {
    "AceStepTransformer1DModel": "audio",
    "LongCatAudioDiTTransformer": "audio",
    "MiniMaxMusic3RVQDepthDecoder": "audio",
    "MiniMaxMusic3Transformer1DModel": "audio",
    "PriorTransformer": "embeddings",
    "RFD4ProteinaTransformer": "proteins",
    "StableAudio3DiTModel": "audio",
    "StableAudioDiTModel": "audio",
    "T5FilmDecoder": "audio",
    "TransformerTemporalModel": "one column of frames at a time, in U-Nets",
}
