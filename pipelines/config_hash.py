"""A short name for a transformer's config, by which a plan knows the network that it was made for."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

NOT_THE_NETWORK = {"quantization_config"}  # how the weights are held


def config_hash(transformer: nn.Module) -> str | None:
    """Return the first 16 hex digits of the sha256 of a transformer's diffusers config, None for one without.

    What is private (`_name_or_path`, `_diffusers_version`) or equals the default of the class does not count, so that
    neither a copy of the folder nor a later diffusers with one more option changes the hash. Weights do not count
    either: a fine-tune has the hash of its base.
    """
    config = getattr(transformer, "config", None)
    if not isinstance(config, Mapping):
        return None
    parameters = inspect.signature(type(transformer).__init__).parameters
    told = {
        name: value
        for name, value in config.items()
        if not name.startswith("_")
        and name not in NOT_THE_NETWORK
        and not (name in parameters and _text(parameters[name].default) == _text(value))
    }
    return hashlib.sha256(_text(told).encode()).hexdigest()[:16]


def _text(value: Any) -> str:
    """Return canonical JSON: keys sorted, tuples as lists; what JSON lacks by its repr."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=repr)
