"""Which transformers of a pipeline, and which of their attention modules, a plan is for; and their processors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dit_sparse.attention import Layer
from dit_sparse.grid import Grid
from dit_sparse.options import Options
from dit_sparse.pipelines import compat
from dit_sparse.pipelines.config_hash import config_hash
from dit_sparse.pipelines.hooks import find_hook
from dit_sparse.pipelines.model_table import model_of, no_known_model
from dit_sparse.pipelines.models import (
    GivenGrid,
    GridRule,
    Model,
    attention_module,
    heads_of,
    layer_names,
    unknown_model_of,
)
from dit_sparse.pipelines.presets import for_model
from dit_sparse.pipelines.processors import SparseProcessor, carry_settings, dense_call, refusal, sparse_processor
from dit_sparse.plan import ModelBinding, Plan
from dit_sparse.schedule import Schedule


@dataclass(frozen=True)
class Target:
    """Name one transformer, what we know of it, and its self-attention modules."""

    name: str
    transformer: nn.Module
    model: Model
    layers: tuple[str, ...]

    def processors(self) -> dict[str, Any]:
        return {name: attention_module(self.transformer, name).processor for name in self.layers}

    def binding(self) -> ModelBinding:
        """Return what a plan made on this transformer is bound to, its config included."""
        heads = heads_of(attention_module(self.transformer, self.layers[0]))
        return ModelBinding(type(self.transformer).__name__, len(self.layers), heads, config_hash(self.transformer))

    def sparse(self) -> dict[str, SparseProcessor]:
        """Return the sparse processors in place, also those of an earlier plan that meant other layers."""
        found = ((name, getattr(module, "processor", None)) for name, module in self.transformer.named_modules())
        return {name: processor for name, processor in found if isinstance(processor, SparseProcessor)}

    @property
    def enabled(self) -> bool:
        return bool(self.sparse())

    def told_model(self) -> Model | None:
        """Return the model that an earlier plan goes by, or None without one."""
        hook = find_hook(self.transformer)
        return None if hook is None else hook.model

    def put_back(self, earlier: Mapping[str, SparseProcessor]) -> None:
        """Exchange our processors for the stock ones, and these for earlier ones of ours; leave others' alone.

        What diffusers set on a processor in the meantime goes along.
        """
        for name, processor in self.sparse().items():
            self._exchange(name, processor, processor.stock_processor)
        for name, processor in earlier.items():
            if (now := attention_module(self.transformer, name).processor) is processor.stock_processor:
                self._exchange(name, now, processor)

    def put_in_place(self, made: Mapping[str, SparseProcessor]) -> None:
        """Set a plan's processors; where an earlier plan had some and this one has none, the stock ones come back."""
        for name, processor in self.sparse().items():
            if name not in made:
                self._exchange(name, processor, processor.stock_processor)
        for name, processor in made.items():
            attention_module(self.transformer, name).processor = processor

    def _exchange(self, name: str, now: Any, wanted: Any) -> None:
        carry_settings(now, wanted)
        attention_module(self.transformer, name).processor = wanted


def find_targets(pipe: Any, grid: Grid | GridRule | None = None, layers: str | None = None) -> list[Target]:
    """Return the transformers of a pipeline, or one transformer, that have layers to make sparse.

    A model is known by what an earlier enable() was told, by the table, or by `grid` and `layers` given here, which
    count more than both.

    Raises: ValueError where none is known, or none of its modules fits `layers`.
    """
    one = compat.unwrapped(pipe)
    if not isinstance(one, nn.Module) and not hasattr(one, "components"):
        raise ValueError(f"pipe must be a diffusers pipeline or a transformer, got {type(pipe).__name__}")
    modules = [("transformer", one)] if isinstance(one, nn.Module) else list(compat.modules_of(one))
    described = [(name, module, _model(name, module, grid, layers)) for name, module in modules]
    targets = [
        Target(name, module, model, layer_names(module, model))
        for name, module, model in described
        if model is not None
    ]
    targets = [target for target in targets if target.layers]
    if not targets:
        if layers is not None and any(model is not None for _, _, model in described):
            raise ValueError(f"layers must match module paths with an attention processor, got {layers!r}: none does")
        raise no_known_model([type(module).__name__ for _, module in modules])
    return targets


def find_schedules(pipe: Any) -> list[tuple[nn.Module, Schedule]]:
    """Return the transformers that have sparse processors in place, each with the Schedule behind them.

    Raises: ValueError for a model without known layers.
    """
    found = []
    for target in find_targets(pipe):
        hook = find_hook(target.transformer)
        schedules = [] if hook is None else hook.schedules(target.transformer)
        found += [(target.transformer, schedule) for schedule in schedules]
    return found


def derive(targets: list[Target], plan: Plan, options: Options) -> list[dict[str, SparseProcessor]]:
    """Return the sparse processors of each target by module path; changes nothing. A preset may mean a shipped plan.

    Raises: ValueError for a plan that does not fit a target, or a target none of whose processors can be derived.
    """
    made, models = [], [target.binding() for target in targets]
    plan = for_model(plan, models)
    for target, model in zip(targets, models, strict=True):
        class_name, heads = model.transformer_class, model.heads
        plan.check(class_name, model.layers, heads, model.config)
        found, outer = target.processors(), target.model.outer_mask
        refusals = {name: refusal(processor) for name, processor in found.items()}
        if None not in refusals.values():
            raise ValueError(f"no layer of {class_name} can be made sparse: {next(iter(refusals.values()))}")
        schedule = Schedule(plan, transformer=target.name, layer_names=target.layers, heads=heads, options=options)
        made.append(
            {
                name: sparse_processor(found[name], Layer(name, index, schedule, dense_call(found[name], outer)), outer)
                for index, name in enumerate(target.layers)
                if refusals[name] is None
            }
        )
    return made


def _model(name: str, module: nn.Module, grid: Grid | GridRule | None, layers: str | None) -> Model | None:
    hook = find_hook(module)
    model = model_of(module) if hook is None else hook.model
    if grid is None:
        return model if model is None or layers is None else replace(model, layers=layers)
    if model is None:  # a text encoder may have attention processors too, but no grid
        return unknown_model_of(grid, layers) if name.startswith("transformer") else None
    model = replace(model, layers=model.layers if layers is None else layers, values=())
    if isinstance(grid, Grid):  # it says all: what it leaves over is a mistake, not text
        return replace(model, grid=GivenGrid(grid), text="cross")
    return replace(model, grid=grid)
