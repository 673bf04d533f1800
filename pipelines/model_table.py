"""The models we know, found by class name: where their self-attention is, and which grid their tokens form."""

from __future__ import annotations

from torch import nn

from dit_sparse.pipelines.models import Model
from dit_sparse.pipelines.table_image import IMAGE_MODELS, IMAGE_REFUSED
from dit_sparse.pipelines.table_video import VIDEO_MODELS, VIDEO_REFUSED

MODELS: dict[str, Model] = {**VIDEO_MODELS, **IMAGE_MODELS}

# Transformers that have tokens on a grid, but no self-attention that a pattern could make sparse.
REFUSED: dict[str, str] = {**VIDEO_REFUSED, **IMAGE_REFUSED}


def model_of(transformer: nn.Module) -> Model | None:
    """Return what we know of a transformer, found by its class name or that of a base class; None if nothing."""
    known = (MODELS[cls.__name__] for cls in type(transformer).__mro__ if cls.__name__ in MODELS)
    return next(known, None)


def no_known_model(class_names: list[str]) -> ValueError:
    """Build the error for a pipeline or model without known layers."""
    refused = [f"{name}: {REFUSED[name]}" for name in class_names if name in REFUSED]
    if refused:
        return ValueError(f"nothing to make sparse in {'; '.join(refused)}")
    found = ", ".join(class_names) or "nothing"
    return ValueError(
        f"model without known layers: found {found}; known are the {len(MODELS)} classes of docs/models.md. For "
        "another one give its token grid: enable(transformer, spec, grid=Grid(frames, height, width, prefix, suffix))"
    )
