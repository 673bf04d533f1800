"""Every private access to diffusers, probed by feature; the only file to mend when its internals move.

Checked against diffusers 0.41 and 0.42.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import HookFunctionReference, StateManager
from diffusers.models.attention_dispatch import dispatch_attention_fn as dispatch_attention_fn
from torch import Tensor, nn

DISPATCHER = "dispatch_attention_fn"  # the global name by which processors call the dispatcher
_HOOK = "dit_sparse"


class ContextReceiver(StateManager):  # type: ignore[misc]
    """Receive what a pipeline tells through `transformer.cache_context(name, step_index=..., ...)`.

    name, step_index and num_inference_steps are None outside such a context or where the pipeline does not tell.
    ended: the pipeline said that its run is over (`maybe_free_model_hooks`); whoever acts on it clears it.
    """

    def __init__(self) -> None:
        super().__init__(dict)
        self.ended = False

    def set_context(self, context: Any) -> None:
        """Keep the context of the call that comes next; diffusers calls this outside any compiled graph."""
        self._context = context

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Note that the run is over. The arguments are diffusers' own and carry nothing for us."""
        self._context = None
        self.ended = True

    @property
    def name(self) -> str | None:
        # older snapshots pass the plain name, newer ones a CacheContext
        return self._context if isinstance(self._context, str) else getattr(self._context, "name", None)

    @property
    def step_index(self) -> int | None:
        return _python_int(getattr(self._context, "step_index", None))

    @property
    def num_inference_steps(self) -> int | None:
        return _python_int(getattr(self._context, "num_inference_steps", None))


class _RegistryEntry(ModelHook):  # type: ignore[misc]
    """Be the stateful entry whose StateManager attribute diffusers finds by itself."""

    _is_stateful = True

    def __init__(self, receiver: ContextReceiver, run_ended: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.receiver, self.run_ended = receiver, run_ended

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.receiver.reset()
        self.run_ended(module)
        return module


def add_context_receiver(module: nn.Module, receiver: ContextReceiver, run_ended: Callable[[nn.Module], None]) -> None:
    """Put the receiver into the module's hook registry, without `register_hook`: that one wraps `forward`.

    run_ended, an importable function, is called with the module when a pipeline says that its run is over.

    A wrapped `forward` is bound to the original module, so a deepcopy would run the original. The entry goes first: on
    removal diffusers hands a hook's `forward` to its right neighbour, and an entry that wraps nothing has none.
    """
    registry = HookRegistry.check_if_exists_or_initialize(module)
    remove_context_receiver(module)
    registry.hooks[_HOOK] = _RegistryEntry(receiver, run_ended)
    registry._hook_order.insert(0, _HOOK)
    registry._fn_refs.insert(0, HookFunctionReference())


def remove_context_receiver(module: nn.Module) -> None:
    """Take the receiver out again; the module's other hooks are not touched."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None and _HOOK in registry.hooks:
        position = registry._hook_order.index(_HOOK)
        del registry.hooks[_HOOK], registry._hook_order[position], registry._fn_refs[position]


def find_forward_hook(module: nn.Module, kind: type) -> Any | None:
    """Return the module's forward pre-hook of this type, or None."""
    return next((hook for hook in module._forward_pre_hooks.values() if type(hook) is kind), None)


def remove_forward_hook(module: nn.Module, kind: type) -> None:
    """Remove the forward pre-hooks of this type. A torch handle would not follow the module through a deepcopy."""
    for key in [key for key, hook in module._forward_pre_hooks.items() if type(hook) is kind]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def unwrapped(module: Any) -> Any:
    """Return the module inside `torch.compile(module)`, or the module itself."""
    return getattr(module, "_orig_mod", module)


def modules_of(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield (component name, module) of a DiffusionPipeline or ModularPipeline, compiled ones unwrapped."""
    seen: set[int] = set()
    for name, component in pipe.components.items():
        module = unwrapped(component)
        if isinstance(module, nn.Module) and id(module) not in seen:
            seen.add(id(module))
            yield name, module


@dataclass(frozen=True)
class ToldStep:
    """What a pipeline tells of the current step, None where it does not.

    by_counter: it comes from the scheduler's own counter, which not every scheduler keeps up.
    """

    step: int | None
    total: int | None
    by_counter: bool


def timesteps_of(pipe: Any) -> Tensor | None:
    """Return the full schedule of a pipeline; `set_timesteps()` makes a new tensor each time."""
    timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    return timesteps if isinstance(timesteps, Tensor) else None


def told_step(pipe: Any, timestep: object) -> ToldStep:
    """Return where a pipeline stands in its full schedule, without reading a device value.

    Asked in this order: `timestep`, the argument of the transformer; the timestep that the pipeline notes for its
    callbacks; what that one was iterated from, where it is not the schedule; the scheduler's counter.
    """
    scheduler, timesteps = getattr(pipe, "scheduler", None), timesteps_of(pipe)
    total, noted = None if timesteps is None else len(timesteps), getattr(pipe, "_current_timestep", None)
    for given in (timestep, noted):
        if timesteps is not None and _is_entry(given, timesteps):
            return ToldStep(schedule_index(scheduler, given), total, by_counter=False)
    if isinstance(noted, Tensor) and (place := _row(noted)) and place[1] in (total, getattr(pipe, "_num_timesteps", 0)):
        return ToldStep(*place, by_counter=False)
    return ToldStep(schedule_index(scheduler, None), total, by_counter=hasattr(scheduler, "step_index"))


def schedule_index(scheduler: Any, timestep: object) -> int | None:
    """Return the index of a run's current step in the scheduler's full schedule, without reading a device value.

    Most pipelines hand `scheduler.timesteps[i].expand(batch)` on: a view, whose storage offset is the index, right for
    image-to-video as well. Where the value was converted on its way, the scheduler's own counter is asked. None where
    neither tells, or the counter has passed the last step.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if isinstance(timestep, Tensor) and isinstance(timesteps, Tensor) and _is_entry(timestep, timesteps):
        return int(timestep.storage_offset() - timesteps.storage_offset())
    if not hasattr(scheduler, "step_index"):
        return None
    index = scheduler.step_index
    if index is None:  # before the first step; image-to-video begins later than 0
        index = getattr(scheduler, "begin_index", None) or 0
    index = _python_int(index)
    over = index is not None and isinstance(timesteps, Tensor) and index >= len(timesteps)
    return None if over else index


def _is_entry(timestep: object, timesteps: Tensor) -> bool:
    """Say whether `timestep` is a view of one entry of `timesteps`, perhaps expanded."""
    if not isinstance(timestep, Tensor) or timestep.device != timesteps.device or timestep.dtype != timesteps.dtype:
        return False
    if timestep.device.type == "meta" or not timesteps.is_contiguous():
        return False
    # the stride of a dimension of size 1 means nothing
    one_entry = all(stride == 0 or size == 1 for size, stride in zip(timestep.shape, timestep.stride(), strict=True))
    pointer = timestep.untyped_storage().data_ptr()
    return one_entry and pointer != 0 and pointer == timesteps.untyped_storage().data_ptr()


def _row(noted: Tensor) -> tuple[int, int] | None:
    """Return (index, number of rows) of a tensor that iterating over a whole contiguous one gave; None if it did not.

    Diffusion forcing iterates over a matrix, one timestep a frame; some pipelines over a schedule since replaced.
    """
    size, entries = noted.numel(), noted.untyped_storage().nbytes() // noted.element_size()
    if not size or not noted.is_contiguous() or entries % size or noted.storage_offset() % size:
        return None
    return int(noted.storage_offset() // size), entries // size


def _python_int(value: object) -> int | None:
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return None  # reading it would wait for the device
    return int(value) if isinstance(value, (int, Tensor)) else None


def wants_gradients(*tensors: Tensor) -> bool:
    """Say whether the call is to be differentiated."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
