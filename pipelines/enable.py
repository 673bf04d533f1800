"""Switch sparse attention on and off: on a pipeline, on a transformer, for a `with` block, the diffusers way."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from dit_sparse.grid import Grid
from dit_sparse.options import Guard, Options
from dit_sparse.patterns import Pattern
from dit_sparse.pipelines.hooks import ForwardHook, find_hook, install_hooks, remove_hooks
from dit_sparse.pipelines.models import GridRule
from dit_sparse.pipelines.processors import SparseProcessor
from dit_sparse.pipelines.targets import Target, derive, find_targets
from dit_sparse.plan import Plan
from dit_sparse.record import Summary
from dit_sparse.spec import parse_spec

Spec = str | Path | Pattern | Plan
PipeT = TypeVar("PipeT")
_LINK = "_dit_sparse"  # attribute of a pipeline


def enable(
    pipe: Any,
    spec: Spec,
    *,
    grid: Grid | GridRule | None = None,
    layers: str | None = None,
    dense_steps: Guard = None,
    dense_layers: str | None = None,
    min_tokens: int | None = None,
    backend: str = "auto",
    strict: bool = False,
    monitor: bool = False,
) -> None:
    """Make the self-attention of a pipeline's transformers, or of one transformer, sparse; options as in `Options`.

    A transformer that docs/models.md does not list needs its token grid: `grid`, a Grid, which must count all tokens of
    the sequence, text before and after it too, or a function (config, bound arguments of forward) -> Grid, importable
    if the model is to be pickled. `layers`, a regex of module paths, says which attention is meant: give it where
    cross-attention may have as many keys as the grid has tokens. Both also override what is known of a listed one,
    whose text a function need not count.

    Enable after fusing projections; `.to()`, offloading, adapters and compiling may come before or after. A processor
    of unknown form is left alone, and `summary` lists it. Enabling again replaces the plan, with a warning.

    Raises: ValueError for a model without known layers, a plan that does not fit it, an unknown spec or an option out
        of range; FileNotFoundError for a plan that is not there; OSError where the hub cannot be reached. Nothing was
        changed then.
    """
    options = Options(dense_steps, dense_layers, min_tokens, backend, strict, monitor)
    targets = find_targets(pipe, grid, layers)
    made = derive(targets, parse_spec(spec), options)
    if any(target.enabled for target in targets):
        warnings.warn("sparse attention was enabled here already; the new plan replaces the old one", stacklevel=2)
    _switch_on(pipe, targets, made)


def disable(pipe: Any) -> None:
    """Put the very same processor objects back and remove our hooks; only warn where nothing is enabled.

    Raises: ValueError for a model without known layers.
    """
    targets = find_targets(pipe)
    if not any(target.enabled for target in targets):
        warnings.warn("sparse attention is not enabled here: nothing to disable", stacklevel=2)
    _switch_off(pipe, targets)


@contextmanager
def sparse(
    pipe: PipeT,
    spec: Spec,
    *,
    grid: Grid | GridRule | None = None,
    layers: str | None = None,
    dense_steps: Guard = None,
    dense_layers: str | None = None,
    min_tokens: int | None = None,
    backend: str = "auto",
    strict: bool = False,
    monitor: bool = False,
) -> Iterator[PipeT]:
    """Enable within a `with` block; on leaving it, put back what was there before, an earlier plan too.

    Raises: as `enable`.
    """
    options = Options(dense_steps, dense_layers, min_tokens, backend, strict, monitor)
    targets = find_targets(pipe, grid, layers)
    made = derive(targets, parse_spec(spec), options)
    before = [(target.sparse(), target.told_model()) for target in targets]
    _switch_on(pipe, targets, made)
    try:
        yield pipe
    finally:
        if not any(processors for processors, _ in before):
            _switch_off(pipe, targets)
        for target, (processors, model) in zip(targets, before, strict=True):
            if processors and model is not None:
                target.put_back(processors)
                install_hooks(target.transformer, model).expected = len(target.sparse())


def processors(
    transformer: nn.Module,
    spec: Spec,
    *,
    grid: Grid | GridRule | None = None,
    layers: str | None = None,
    dense_steps: Guard = None,
    dense_layers: str | None = None,
    min_tokens: int | None = None,
    backend: str = "auto",
    strict: bool = False,
    monitor: bool = False,
) -> dict[str, Any]:
    """Return a dict for `transformer.set_attn_processor(...)`: its own processors, sparse ones for the target layers.

    It also installs our two hooks, inert while none of these processors is set. Note that `set_attn_processor` empties
    the dict that it gets. Where the pipeline does not tell the step through `cache_context`, plans with step windows
    need `attach(pipe)` first.

    Raises: as `enable`.
    """
    options = Options(dense_steps, dense_layers, min_tokens, backend, strict, monitor)
    if not isinstance(transformer, nn.Module):
        raise ValueError(
            f"processors() takes one transformer, got {type(transformer).__name__}; pass pipe.transformer, or use "
            "enable(pipe, ...) or attach(pipe)"
        )
    targets = find_targets(transformer, grid, layers)
    (target,), (made,) = targets, derive(targets, parse_spec(spec), options)
    install_hooks(target.transformer, target.model)
    found = getattr(target.transformer, "attn_processors", None) or {
        f"{name}.processor": module.processor
        for name, module in target.transformer.named_modules()
        if hasattr(module, "processor")
    }
    return {**found, **{f"{name}.processor": processor for name, processor in made.items()}}


def attach(pipe: PipeT, *, grid: Grid | GridRule | None = None, layers: str | None = None) -> PipeT:
    """Give this one pipeline the method `set_attn_processor(spec, **options of enable)`, and return the pipeline.

    grid, layers: as in `enable`, for a transformer that docs/models.md does not list.

    Raises: ValueError for a pipeline without known layers.
    """
    targets = find_targets(pipe, grid, layers)
    link = _link(pipe)
    for target in targets:
        link.add(install_hooks(target.transformer, target.model))
    pipe.set_attn_processor = link.set_attn_processor  # type: ignore[attr-defined]
    return pipe


def summary(pipe: Any) -> Summary:
    """Return what ran sparse and what dense, and why, in the last run of a pipeline or transformer.

    Raises: ValueError where nothing is enabled, or for a model without known layers.
    """
    parts: list[tuple[str, Summary]] = []
    for target in find_targets(pipe):
        hook = find_hook(target.transformer)
        unknown = tuple(
            f"{name} ({type(processor).__name__})"
            for name, processor in target.processors().items()
            if not isinstance(processor, SparseProcessor)
        )
        for schedule in hook.schedules(target.transformer) if hook is not None else ():
            parts.append((target.name, schedule.summary(unknown)))
    if not parts:
        raise ValueError("sparse attention is not enabled here; call dit_sparse.enable(pipe, 'balanced') and run first")
    first = parts[0][1]
    if len(parts) == 1:
        return first
    layers = [replace(layer, name=f"{name}.{layer.name}") for name, part in parts for layer in part.layers]
    unknown = tuple(f"{name}.{left}" for name, part in parts for left in part.unknown)
    return replace(first, layers=tuple(layers), unknown=unknown)


class PipelineLink:
    """Lie on a pipeline and let the hooks of its transformers find it, in copies and unpickled ones too.

    The references back are weak; they are made anew wherever the link is rebuilt.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = weakref.ref(pipe)
        self.hooks: list[ForwardHook] = []

    def add(self, hook: ForwardHook) -> None:
        hook.pipe = self.pipe
        if not any(known is hook for known in self.hooks):
            self.hooks.append(hook)

    def set_attn_processor(
        self,
        spec: Spec,
        *,
        grid: Grid | GridRule | None = None,
        layers: str | None = None,
        dense_steps: Guard = None,
        dense_layers: str | None = None,
        min_tokens: int | None = None,
        backend: str = "auto",
        strict: bool = False,
        monitor: bool = False,
    ) -> None:
        """Enable a plan on the pipeline, in place of an earlier one; raises as `enable`."""
        options = Options(dense_steps, dense_layers, min_tokens, backend, strict, monitor)
        targets = find_targets(self.pipe(), grid, layers)
        _switch_on(self.pipe(), targets, derive(targets, parse_spec(spec), options))

    def __getstate__(self) -> dict[str, Any]:
        return {"pipe": self.pipe(), "hooks": self.hooks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.pipe, self.hooks = weakref.ref(state["pipe"]), state["hooks"]
        for hook in self.hooks:
            hook.pipe = self.pipe


def _switch_on(pipe: Any, targets: list[Target], made: list[dict[str, SparseProcessor]]) -> None:
    for target, of_target in zip(targets, made, strict=True):
        target.put_in_place(of_target)
        hook = install_hooks(target.transformer, target.model)
        hook.expected = len(of_target)
        if not isinstance(pipe, nn.Module):
            _link(pipe).add(hook)


def _switch_off(pipe: Any, targets: list[Target]) -> None:
    for target in targets:
        target.put_back({})
        remove_hooks(target.transformer)
    if isinstance(link := vars(pipe).get(_LINK), PipelineLink):
        link.hooks.clear()
        if "set_attn_processor" not in vars(pipe):
            delattr(pipe, _LINK)


def _link(pipe: Any) -> PipelineLink:
    if not isinstance(vars(pipe).get(_LINK), PipelineLink):
        setattr(pipe, _LINK, PipelineLink(pipe))
    link: PipelineLink = vars(pipe)[_LINK]
    return link
