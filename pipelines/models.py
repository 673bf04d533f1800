"""What there is to know of a transformer class, and its self-attention layers; the classes are in model_table.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from dit_sparse.grid import Grid
from dit_sparse.pipelines.processors import refusal

GridRule = Callable[[Any, Mapping[str, Any]], Grid]
# What attention modules call the projection of queries, and how many tensors of its size it makes.
PROJECTIONS = {"to_q": 1, "to_query": 1, "img_qkv_proj": 3, "img_attn_qkv": 3}
HEADS = ("heads", "num_heads", "n_heads", "num_attention_heads")  # what attention modules call it


@dataclass(frozen=True)
class Model:
    """Describe one transformer class.

    layers: regex (fullmatch) of the module paths of its self-attention over image or video tokens; nothing else is
        touched.
    grid: (config, the bound arguments of `forward`) -> Grid; reads shapes, Python numbers, and the values of the
        tensors that `values` names.
    text: where tokens stand that are in the self-attention beyond those of `grid`: "prefix" or "suffix"; "cross"
        where there are none.
    cfg: how guidance calls the model: "two forwards" (cond, uncond), "doubled batch" ([uncond, cond]), or "one".
    usual: the size that users generate, in words, and the grid that it gives, text left out.
    masks: arguments of `forward` that alone decide which text tokens are padding; a mask made of anything else
        is unknown, and runs dense.
    outer_mask: argument of the processor from which it builds a mask of all queries by all keys.
    values: arguments of `forward` whose values tell the grid; they are read once for each tensor.
    dense: what stays dense although it attends over these tokens, and why; or what else a user should know.
    """

    layers: str
    grid: GridRule
    text: Literal["cross", "prefix", "suffix"]
    cfg: Literal["two forwards", "doubled batch", "one"]
    usual: tuple[str, Grid]
    masks: tuple[str, ...] = ()
    outer_mask: str | None = None
    values: tuple[str, ...] = ()
    dense: str = ""


@dataclass(frozen=True)
class GivenGrid:
    """Be the grid rule of a user who gave a Grid: the same for every forward."""

    grid: Grid

    def __call__(self, config: Any, arguments: Mapping[str, Any]) -> Grid:
        return self.grid


def unknown_model_of(grid: Grid | GridRule, layers: str | None) -> Model:
    """Describe a transformer that the table lacks by what its user knows of it.

    Every module with a processor from which ours can be derived is a layer, unless `layers` (a regex of module paths)
    says which; a call whose tokens are not the grid's runs dense.
    """
    rule = GivenGrid(grid) if isinstance(grid, Grid) else grid
    return Model(layers or ".*", rule, "cross", "two forwards", ("given", Grid(1, 1, 1)))


def layer_names(transformer: nn.Module, model: Model) -> tuple[str, ...]:
    """Return the module paths of the self-attention layers, in the order in which a plan counts them."""
    derivable_only = model.layers == ".*"
    return tuple(
        name
        for name, module in transformer.named_modules()
        if re.fullmatch(model.layers, name)
        and getattr(module, "processor", None) is not None
        and not (derivable_only and (refusal(module.processor) or getattr(module, "is_cross_attention", False)))
    )


def attention_module(transformer: nn.Module, name: str) -> Any:
    """Return an attention module of a transformer; what we use of it is `processor` and the number of heads."""
    return transformer.get_submodule(name)


def head_dim_of(attention: nn.Module) -> int:
    """Return the size of a query head, from the projection's outputs.

    Raises: ValueError where no known projection is there.
    """
    for name, parts in PROJECTIONS.items():
        if isinstance(outputs := getattr(getattr(attention, name, None), "out_features", None), int):
            return outputs // parts // heads_of(attention)
    raise ValueError(f"{type(attention).__name__} has none of {', '.join(PROJECTIONS)}: its head_dim is unknown")


def heads_of(attention: nn.Module) -> int:
    """Return the query heads of an attention module.

    Raises: ValueError where no attribute tells.
    """
    for name in HEADS:
        if isinstance(heads := getattr(attention, name, None), int):
            return heads
    raise ValueError(f"{type(attention).__name__} has none of {', '.join(HEADS)}: its number of heads is unknown")
