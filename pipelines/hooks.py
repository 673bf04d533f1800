"""Before each forward of a transformer: tell its Schedule the grid, the step, the branch and the run."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_sparse.grid import Grid
from dit_sparse.padding import TensorSources
from dit_sparse.pipelines import compat
from dit_sparse.pipelines.models import Model, attention_module, layer_names
from dit_sparse.pipelines.processors import SparseProcessor

if TYPE_CHECKING:
    from dit_sparse.schedule import Schedule

TIMESTEP = ("timestep", "timesteps", "t")  # what forward may call it
CALLS_PER_STEP = 4  # unnamed ones: conditional, unconditional, perturbed; more are no denoising loop that we know
GRIDS_KEPT = 8  # a run needs one for each branch


class ForwardHook:
    """Be the native forward pre-hook of one transformer; an object, so that deepcopy and pickle carry it.

    It owns no Schedule but starts those whose processors are in place, and is inert while there are none. It sees the
    arguments before any context-parallel split. Values are read from the device only where the model table says so,
    once for each tensor.
    """

    def __init__(self, model: Model, layers: tuple[str, ...]) -> None:
        self.model, self.layers = model, layers
        self.sources = TensorSources()
        self.grids: dict[object, Grid] = {}  # read from values
        self.receiver = compat.ContextReceiver()
        self.pipe: weakref.ref[Any] | None = None
        self.expected = 0  # processors that enable() put in place; fewer later means that someone replaced them
        self._begin_run(None)

    def _begin_run(self, timesteps: Tensor | None) -> None:
        self.run = object()
        self.timesteps = None if timesteps is None else weakref.ref(timesteps)
        self.told: int | None = None  # the last step that anyone told; `ahead` is what was counted beyond it
        self.ahead = 0
        self.calls_of_step: dict[str | None, int] = {}
        self.calls_of_run: dict[object, int] = {}
        self.prompts = TensorSources()
        self.receiver.ended = False

    def __getstate__(self) -> dict[str, Any]:
        # weak references do not pickle, nor follow a deepcopy; the copy's PipelineLink sets `pipe` again
        return {**vars(self), "pipe": None, "timesteps": None}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it runs before the compiled forward; as a compiled frame of its own it would recompile
    def __call__(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        schedules = self.schedules(transformer)
        if not schedules:
            return
        arguments, reason = _bound(transformer, args, kwargs)
        grid = None
        if reason is None:
            grid, reason = self._grid(transformer, arguments)
        step, total_steps, branch = self._position(self.model, arguments)
        for schedule in schedules:
            schedule.start_forward(
                grid, text=self.model.text, mask_source=self._mask_source(arguments), step=step,
                total_steps=total_steps, branch=branch, run=self.run, reason=reason,
            )  # fmt: skip

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

    def _mask_source(self, arguments: Mapping[str, Any]) -> object | None:
        """Return what stands for the arguments that make the mask; None where the model table names none."""
        if not self.model.masks:
            return None
        given = [arguments.get(name) for name in self.model.masks]
        return self.sources.source(_tensors(given)), repr(_without_tensors(given))

    def _grid(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> tuple[Grid | None, str | None]:
        """Return the grid by the model's rule, or None and the reason."""
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in transformer.parameters()):
            return None, "gradients wanted (inference only; call under torch.no_grad())"
        key = None
        if self.model.values:
            source = self.sources.source(_tensors([arguments.get(name) for name in self.model.values]))
            key = (source, tuple(tuple(one.shape) for one in _tensors(list(arguments.values()))))
        try:
            grid = self.grids[key] if key in self.grids else self.model.grid(_config(transformer), arguments)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return None, f"no grid from the arguments of forward: {error!r}"
        if key is not None:
            self.grids = dict([*self.grids.items(), (key, grid)][-GRIDS_KEPT:])
        return grid, None

    def _position(self, model: Model, arguments: Mapping[str, Any]) -> tuple[int | None, int | None, str]:
        """Return (step, total steps, branch) of this forward, and begin a new run where one is seen.

        Where nobody tells whose forward this is, it is a run of its own: what patterns remember of one prompt must
        never serve another.
        """
        pipe = None if self.pipe is None else self.pipe()
        timesteps, name = compat.timesteps_of(pipe), self.receiver.name
        # set_timesteps() makes a new tensor: the one sign of a new run after a run that raised
        set_again = timesteps is not None and (self.timesteps is None or self.timesteps() is not timesteps)
        if self.receiver.ended or set_again:
            self._begin_run(timesteps)
        told = compat.told_step(pipe, next((arguments[key] for key in TIMESTEP if key in arguments), None))
        if self.receiver.step_index is not None:
            total = self.receiver.num_inference_steps or told.total
            told = compat.ToldStep(self.receiver.step_index, total, by_counter=False)
        if told.step is not None and self.told is not None and told.step < self.told:
            self._begin_run(timesteps)
        if told.step is None:
            # a counter that tells nothing has passed the last step: this is no denoising loop
            step, branch = self._by_run(model, name, None if told.by_counter else told.total, arguments)
        else:
            step, branch = self._by_step(model, name, told.step, told.by_counter)
        if branch is None:
            self.run = object()
        return step, told.total, branch or "unknown"

    def _by_step(self, model: Model, name: str | None, told: int, by_counter: bool) -> tuple[int | None, str | None]:
        """Return (step, branch) where the step is told; unnamed branches go by the order of calls within it."""
        if told != self.told:
            self.told, self.ahead, self.calls_of_step = told, 0, {}
        if by_counter and name is not None and name in self.calls_of_step:
            self.ahead, self.calls_of_step = self.ahead + 1, {}  # the counter stands still: count on from it
        number = self.calls_of_step.get(name, 0)
        self.calls_of_step[name] = number + 1
        if name is None and number >= CALLS_PER_STEP:
            return (None if by_counter else told), None
        return told + self.ahead, name or _branch(model, number)

    def _by_run(
        self, model: Model, name: str | None, total: int | None, arguments: Mapping[str, Any]
    ) -> tuple[int | None, str | None]:
        """Return (step, branch) where only the calls can be counted: of each name, or of each prompt in a run."""
        who = name if name is not None or total is None else self._prompt(arguments)
        number = self.calls_of_run.get(who, 0)
        known = who in self.calls_of_run or len(self.calls_of_run) < CALLS_PER_STEP
        if who is None or (name is None and (not known or number >= (total or 0))):
            return None, None
        self.calls_of_run[who] = number + 1
        return number, name or _branch(model, list(self.calls_of_run).index(who))

    def _prompt(self, arguments: Mapping[str, Any]) -> object | None:
        """Return what stands for the prompt of this forward, None where that cannot be told."""
        text = [arguments[key] for key in arguments if key.startswith("encoder_hidden_states")]
        tensors = [one for one in text if isinstance(one, Tensor)]
        if not tensors or any(tensor.is_inference() for tensor in tensors):
            return None
        return self.prompts.source(tensors)


def find_hook(transformer: nn.Module) -> ForwardHook | None:
    """Return the hook of a transformer, or None."""
    hook: ForwardHook | None = compat.find_forward_hook(transformer, ForwardHook)
    return hook


def install_hooks(transformer: nn.Module, model: Model) -> ForwardHook:
    """Return the transformer's hook, told of this model; install it and its context receiver where they are missing."""
    hook = find_hook(transformer)
    if hook is not None:
        placed = (name for name in hook.layers if _is_sparse(transformer, name))  # of another plan, perhaps
        hook.model, hook.grids = model, {}
        hook.layers = tuple(dict.fromkeys((*layer_names(transformer, model), *placed)))
    else:
        hook = ForwardHook(model, layer_names(transformer, model))
        transformer.register_forward_pre_hook(hook, with_kwargs=True)
        compat.add_context_receiver(transformer, hook.receiver, _run_ended)
    return hook


def _is_sparse(transformer: nn.Module, name: str) -> bool:
    return isinstance(attention_module(transformer, name).processor, SparseProcessor)


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


def _config(transformer: nn.Module) -> Any:
    return getattr(transformer, "config", None)  # a user's own grid rule may need none


def _without_tensors(values: object) -> object:
    """Return nested lists, tuples and dicts as tuples, with None for each tensor."""
    if isinstance(values, Mapping):
        values = list(values.items())
    if isinstance(values, (list, tuple)):
        return tuple(map(_without_tensors, values))
    return None if isinstance(values, Tensor) else values


def _tensors(values: object) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _branch(model: Model, number: int) -> str:
    """Name the branch where the pipeline does not: by the order of the calls within one step.

    Only the first call may be what the table says; a further one is another prompt, or a perturbed forward.
    """
    if number or model.cfg == "two forwards":
        return f"call {number}"
    return "cond_uncond" if model.cfg == "doubled batch" else "cond"
