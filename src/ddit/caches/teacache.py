"""TeaCache as hooks of diffusers' blocks; imported where it is asked for, since it builds on insides of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.hooks.first_block_cache import FBCBlockHook, FBCSharedBlockState
from diffusers.hooks.hooks import HookRegistry, ModelHook, StateManager
from torch import Tensor, nn

from ddit.models.base import Architecture
from ddit.teacache import TeaCacheConfig, polynomial, relative_change

HEAD, BLOCK = "ddit_teacache_head", "ddit_teacache_block"


class TeaCacheState(FBCSharedBlockState):
    """Of one guidance pass on one grid."""

    def __init__(self) -> None:
        super().__init__()
        self.signal: Tensor | None = None
        self.expected = 0.0

    def reset(self) -> None:
        super().reset()
        self.signal, self.expected = None, 0.0


class TeaCacheHead(ModelHook):
    """Decides before the first block; the blocks after it follow (diffusers' `FBCBlockHook`)."""

    _is_stateful = True

    def __init__(self, states: StateManager, config: TeaCacheConfig, first: int, signal: Callable[..., Tensor]) -> None:
        super().__init__()
        self.state_manager = states
        self.config = config
        self.first = first
        self.signal = signal

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.metadata = TransformerBlockRegistry.get(type(module))
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.state_manager.reset()
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def argument(name: str) -> Any:
            return self.metadata._get_parameter_from_args_kwargs(name, args, kwargs)

        state: Any = self.state_manager.get_state()
        state.should_compute = self._changed(state, self.signal(module, argument))
        hidden, text = argument("hidden_states"), None
        if self.metadata.return_encoder_hidden_states_index is not None:
            text = argument("encoder_hidden_states")
        if state.should_compute:
            state.head_block_output = hidden if text is None else (hidden, text)
            return self.fn_ref.original_forward(*args, **kwargs)  # type: ignore[misc]
        hidden = hidden + state.tail_block_residuals[0]
        if text is None:
            return hidden
        answer = [hidden, text + state.tail_block_residuals[1]]
        return tuple(answer if self.metadata.return_hidden_states_index == 0 else reversed(answer))

    def _changed(self, state: TeaCacheState, signal: Tensor) -> bool:
        """Whether the blocks have to run: at first, at last, and once the output is expected to have changed."""
        before, state.signal = state.signal, signal
        context = self.state_manager.context
        step, steps = context.step_index, context.num_inference_steps
        edge = step is not None and (step < self.first or (steps is not None and step == steps - 1))
        if before is not None and not edge:
            state.expected += polynomial(self.config.coefficients or (), relative_change(signal, before))
            if state.expected < self.config.threshold:
                return False
        state.expected = 0.0
        return True


def knows(blocks: Sequence[nn.Module]) -> bool:
    """Whether caches that leave blocks out, diffusers' own and this one, know what these blocks give, all the same."""
    try:
        known = [TransformerBlockRegistry.get(type(block)) for block in blocks]
    except ValueError:
        return False
    return len({metadata.return_encoder_hidden_states_index for metadata in known}) == 1


def enable(transformer: nn.Module, architecture: Architecture, config: TeaCacheConfig) -> None:
    """Hook TeaCache, with coefficients, into the blocks of a transformer."""
    states = StateManager(TeaCacheState)  # type: ignore[arg-type]
    first, *others = architecture.blocks()
    head = TeaCacheHead(states, config, architecture.teacache_first, architecture.teacache_signal)
    HookRegistry.check_if_exists_or_initialize(first).register_hook(head, HEAD)
    for block in others:
        hook = FBCBlockHook(states, is_tail=block is others[-1])
        HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, BLOCK)
    HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()


def disable(transformer: nn.Module) -> None:
    """Take TeaCache off."""
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    for name in (HEAD, BLOCK):
        registry.remove_hook(name, recurse=True)
    registry.invalidate_child_registries_cache()
