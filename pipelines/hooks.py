"""Before each forward of a transformer: tell its Schedule the grid, the step, the branch and the run."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_sparse.grid import Grid
from dit_sparse.pipelines import compat
from dit_sparse.pipelines.models import Model, attention_module, layer_names, model_of
from dit_sparse.pipelines.processors import SparseProcessor

if TYPE_CHECKING:
    from dit_sparse.schedule import Schedule


class ForwardHook:
    """Be the native forward pre-hook of one transformer; an object, so that deepcopy and pickle carry it.

    It owns no Schedule but starts those whose processors are in place, and is inert while there are none. It sees the
    arguments before any context-parallel split. Nothing here reads a value from the device.
    """

    def __init__(self, layers: tuple[str, ...]) -> None:
        self.layers = layers
        self.receiver = compat.ContextReceiver()
        self.pipe: weakref.ref[Any] | None = None
        self.expected = 0  # processors that enable() put in place; fewer later means that someone replaced them
        self._begin_run(None)

    def _begin_run(self, timesteps: Tensor | None) -> None:
        self.run = object()
        self.timesteps = None if timesteps is None else weakref.ref(timesteps)
        self.step: int | None = None
        self.calls_of_step = 0
        self.calls_of_branch: dict[str | None, int] = {}
        self.receiver.ended = False

    def __getstate__(self) -> dict[str, Any]:
        # weak references do not pickle, nor follow a deepcopy; the copy's PipelineLink sets `pipe` again
        return {**vars(self), "pipe": None, "timesteps": None}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it runs before the compiled forward; as a compiled frame of its own it would recompile
    def __call__(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        schedules = self.schedules(transformer)
        model = model_of(transformer)
        if not schedules or model is None:
            return
        arguments, reason = _bound(transformer, args, kwargs)
        grid = None
        if reason is None:
            grid, reason = _grid(model, transformer, arguments)
        step, total_steps, branch = self._position(model, arguments.get("timestep"))
        for schedule in schedules:
            schedule.start_forward(grid, step=step, total_steps=total_steps, branch=branch, run=self.run, reason=reason)

    def schedules(self, transformer: nn.Module) -> list[Schedule]:
        """Return each Schedule whose processors are in place, once; warn once where enable()'s were replaced."""
        processors = {name: attention_module(transformer, name).processor for name in self.layers}
        ours = [processor for processor in processors.values() if isinstance(processor, SparseProcessor)]
        if len(ours) < self.expected:
            replaced = [name for name, processor in processors.items() if not isinstance(processor, SparseProcessor)]
            warnings.warn(
                f"{self.expected - len(ours)} of {self.expected} sparse processors of {type(transformer).__name__} "
                f"were replaced after enable() ({replaced[0]}, ...); those layers run dense. Fusing projections and "
                "loading some adapters do that: do it first, then call enable() again",
                stacklevel=2,
            )
            self.expected = len(ours)
        return list({id(one.sparse_layer.schedule): one.sparse_layer.schedule for one in ours}.values())

    def _position(self, model: Model, timestep: object) -> tuple[int, int | None, str]:
        """Return (step, total steps, branch) of this forward, and begin a new run where one is seen."""
        pipe = None if self.pipe is None else self.pipe()
        scheduler = getattr(pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        timesteps = timesteps if isinstance(timesteps, Tensor) else None
        step = self.receiver.step_index
        if step is None and scheduler is not None:
            step = compat.schedule_index(scheduler, timestep)
        # set_timesteps() makes a new tensor: the one sign of a new run after a run that raised
        set_again = timesteps is not None and (self.timesteps is None or self.timesteps() is not timesteps)
        went_back = step is not None and self.step is not None and step < self.step
        if self.receiver.ended or set_again or went_back:
            self._begin_run(timesteps)
        if step != self.step:
            self.step, self.calls_of_step = step, 0
        name = self.receiver.name
        branch = name or _branch(model, self.calls_of_step)
        calls = self.calls_of_branch.get(name, 0)
        self.calls_of_branch[name] = calls + 1
        self.calls_of_step += 1
        total_steps = self.receiver.num_inference_steps
        if total_steps is None and timesteps is not None:
            total_steps = len(timesteps)
        return calls if step is None else step, total_steps, branch


def find_hook(transformer: nn.Module) -> ForwardHook | None:
    """Return the hook of a transformer, or None."""
    hook: ForwardHook | None = compat.find_forward_hook(transformer, ForwardHook)
    return hook


def install_hooks(transformer: nn.Module, model: Model) -> ForwardHook:
    """Return the transformer's hook; install it and its context receiver where they are missing."""
    hook = find_hook(transformer)
    if hook is None:
        hook = ForwardHook(layer_names(transformer, model))
        transformer.register_forward_pre_hook(hook, with_kwargs=True)
        compat.add_context_receiver(transformer, hook.receiver, _run_ended)
    return hook


def remove_hooks(transformer: nn.Module) -> None:
    """Remove both hooks of a transformer; does nothing where there are none."""
    compat.remove_forward_hook(transformer, ForwardHook)
    compat.remove_context_receiver(transformer)


def _run_ended(transformer: nn.Module) -> None:
    hook = find_hook(transformer)
    for schedule in hook.schedules(transformer) if hook is not None else ():
        schedule.end_run()


def _bound(
    transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Mapping[str, Any], str | None]:
    try:
        return inspect.signature(type(transformer).forward).bind(transformer, *args, **kwargs).arguments, None
    except TypeError as error:  # forward itself is about to raise, with the better message
        return {}, f"arguments of forward: {error}"


def _grid(model: Model, transformer: nn.Module, arguments: Mapping[str, Any]) -> tuple[Grid | None, str | None]:
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in transformer.parameters()):
        return None, "gradients wanted (inference only; call under torch.no_grad())"
    try:
        return model.grid(transformer.config, arguments), None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return None, f"no grid from the arguments of forward: {error!r}"


def _branch(model: Model, calls_of_step: int) -> str:
    """Name the branch where the pipeline does not: by the order of the calls within one step."""
    match model.cfg:
        case "two forwards":
            return f"call {calls_of_step}"
        case "doubled batch":
            return "cond_uncond"
        case "one":
            return "cond"
