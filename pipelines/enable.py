"""Switch sparse attention on and off: on a pipeline, on a transformer, for a `with` block, the diffusers way."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from dit_sparse.attention import Layer
from dit_sparse.options import Guard, Options
from dit_sparse.patterns import Pattern
from dit_sparse.pipelines import compat
from dit_sparse.pipelines.hooks import ForwardHook, find_hook, install_hooks, remove_hooks
from dit_sparse.pipelines.models import Model, attention_module, layer_names, model_of, unknown_model
from dit_sparse.pipelines.processors import SparseProcessor, dense_call, refusal, sparse_processor, stock
from dit_sparse.plan import Plan
from dit_sparse.record import Summary
from dit_sparse.schedule import Schedule
from dit_sparse.spec import parse_spec

Spec = str | Path | Pattern | Plan
PipeT = TypeVar("PipeT")
_LINK = "_dit_sparse"  # attribute of a pipeline


def enable(
    pipe: Any,
    spec: Spec,
    *,
    dense_steps: Guard = None,
    dense_layers: str | None = None,
    min_tokens: int | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> None:
    """Make the self-attention of a pipeline's transformers, or of one transformer, sparse; options as in `Options`.

    Enable after fusing projections; `.to()`, offloading, adapters and compiling may come before or after. A processor
    of unknown form is left alone, and `summary` lists it. Enabling again replaces the plan, with a warning.

    Raises: ValueError for a model without known layers, a plan that does not fit it, an unknown spec or an option out
        of range; FileNotFoundError for a plan that is not there. Nothing was changed then.
    """
    options = Options(dense_steps, dense_layers, min_tokens, backend, strict)
    targets = _targets(pipe)
    made = _derive(targets, spec, options)
    if any(target.enabled for target in targets):
        warnings.warn("sparse attention was enabled here already; the new plan replaces the old one", stacklevel=2)
    _switch_on(pipe, targets, made)


def disable(pipe: Any) -> None:
    """Put the very same processor objects back and remove our hooks; only warn where nothing is enabled.

    Raises: ValueError for a model without known layers.
    """
    targets = _targets(pipe)
    if not any(target.enabled for target in targets):
        warnings.warn("sparse attention is not enabled here: nothing to disable", stacklevel=2)
    _switch_off(pipe, targets)


@contextmanager
def sparse(
    pipe: PipeT,
    spec: Spec,
    *,
    dense_steps: Guard = None,
    dense_layers: str | None = None,
    min_tokens: int | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> Iterator[PipeT]:
    """Enable within a `with` block; on leaving it, put back what was there before, an earlier plan too.

    Raises: as `enable`.
    """
    options = Options(dense_steps, dense_layers, min_tokens, backend, strict)
    targets = _targets(pipe)
    made = _derive(targets, spec, options)
    before = [target.processors() for target in targets]
    was_enabled = any(target.enabled for target in targets)
    _switch_on(pipe, targets, made)
    try:
        yield pipe
    finally:
        if was_enabled:
            for target, processors in zip(targets, before, strict=True):
                target.put_back(processors)
                install_hooks(target.transformer, target.model).expected = target.count()
        else:
            _switch_off(pipe, targets)


def processors(
    transformer: nn.Module,
    spec: Spec,
    *,
    dense_steps: Guard = None,
    dense_layers: str | None = None,
    min_tokens: int | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> dict[str, Any]:
    """Return a dict for `transformer.set_attn_processor(...)`: its own processors, sparse ones for the target layers.

    It also installs our two hooks, inert while none of these processors is set. Note that `set_attn_processor` empties
    the dict that it gets. Where the pipeline does not tell the step through `cache_context`, plans with step windows
    need `attach(pipe)` first.

    Raises: as `enable`.
    """
    options = Options(dense_steps, dense_layers, min_tokens, backend, strict)
    if not isinstance(transformer, nn.Module):
        raise ValueError(
            f"processors() takes one transformer, got {type(transformer).__name__}; pass pipe.transformer, or use "
            "enable(pipe, ...) or attach(pipe)"
        )
    targets = _targets(transformer)
    (target,), (made,) = targets, _derive(targets, spec, options)
    install_hooks(target.transformer, target.model)
    found = getattr(target.transformer, "attn_processors", None) or {
        f"{name}.processor": module.processor
        for name, module in target.transformer.named_modules()
        if hasattr(module, "processor")
    }
    return {**found, **{f"{name}.processor": processor for name, processor in made.items()}}


def attach(pipe: PipeT) -> PipeT:
    """Give this one pipeline the method `set_attn_processor(spec, **options of enable)`, and return the pipeline.

    Raises: ValueError for a pipeline without known layers.
    """
    targets = _targets(pipe)
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
    for target in _targets(pipe):
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
        dense_steps: Guard = None,
        dense_layers: str | None = None,
        min_tokens: int | None = None,
        backend: str = "auto",
        strict: bool = False,
    ) -> None:
        """Enable a plan on the pipeline, in place of an earlier one; raises as `enable`."""
        options = Options(dense_steps, dense_layers, min_tokens, backend, strict)
        targets = _targets(self.pipe())
        _switch_on(self.pipe(), targets, _derive(targets, spec, options))

    def __getstate__(self) -> dict[str, Any]:
        return {"pipe": self.pipe(), "hooks": self.hooks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.pipe, self.hooks = weakref.ref(state["pipe"]), state["hooks"]
        for hook in self.hooks:
            hook.pipe = self.pipe


@dataclass(frozen=True)
class _Target:
    """Name one transformer, what we know of it, and its self-attention modules."""

    name: str
    transformer: nn.Module
    model: Model
    layers: tuple[str, ...]

    def processors(self) -> dict[str, Any]:
        return {name: attention_module(self.transformer, name).processor for name in self.layers}

    def count(self) -> int:
        return sum(isinstance(processor, SparseProcessor) for processor in self.processors().values())

    @property
    def enabled(self) -> bool:
        return self.count() > 0

    def put_back(self, earlier: Mapping[str, Any]) -> None:
        """Exchange our processors for earlier ones, with diffusers' settings of the meantime; leave others' alone."""
        for name, processor in self.processors().items():
            if isinstance(processor, SparseProcessor):
                compat.carry_settings(processor, earlier[name])
                attention_module(self.transformer, name).processor = earlier[name]


def _targets(pipe: Any) -> list[_Target]:
    one = compat.unwrapped(pipe)
    if not isinstance(one, nn.Module) and not hasattr(one, "components"):
        raise ValueError(f"pipe must be a diffusers pipeline or a transformer, got {type(pipe).__name__}")
    modules = [("transformer", one)] if isinstance(one, nn.Module) else list(compat.modules_of(one))
    known = [(name, module, model) for name, module in modules if (model := model_of(module)) is not None]
    targets = [_Target(name, module, model, layer_names(module, model)) for name, module, model in known]
    targets = [target for target in targets if target.layers]
    if not targets:
        raise unknown_model([type(module).__name__ for _, module in modules])
    return targets


def _derive(targets: list[_Target], spec: Spec, options: Options) -> list[dict[str, SparseProcessor]]:
    """Return the sparse processors of each target by module path; changes nothing."""
    plan, made = parse_spec(spec), []
    for target in targets:
        class_name, heads = (
            type(target.transformer).__name__,
            attention_module(target.transformer, target.layers[0]).heads,
        )
        plan.check(class_name, len(target.layers), heads)
        found = target.processors()
        refusals = {name: refusal(processor) for name, processor in found.items()}
        if None not in refusals.values():
            raise ValueError(f"no layer of {class_name} can be made sparse: {next(iter(refusals.values()))}")
        schedule = Schedule(plan, transformer=target.name, layer_names=target.layers, heads=heads, options=options)
        layers = [Layer(name, index, schedule, dense_call(found[name])) for index, name in enumerate(target.layers)]
        made.append({one.name: sparse_processor(found[one.name], one) for one in layers if refusals[one.name] is None})
    return made


def _switch_on(pipe: Any, targets: list[_Target], made: list[dict[str, SparseProcessor]]) -> None:
    for target, of_target in zip(targets, made, strict=True):
        for name, processor in of_target.items():
            attention_module(target.transformer, name).processor = processor
        hook = install_hooks(target.transformer, target.model)
        hook.expected = target.count()
        if not isinstance(pipe, nn.Module):
            _link(pipe).add(hook)


def _switch_off(pipe: Any, targets: list[_Target]) -> None:
    for target in targets:
        target.put_back({name: stock(processor) for name, processor in target.processors().items()})
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
