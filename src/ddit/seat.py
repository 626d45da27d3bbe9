"""The place of ddit on one transformer: around the ``forward`` of this instance, and off again without a trace."""

from __future__ import annotations

import functools
import inspect
import pickle
import types
from collections.abc import Callable
from typing import Any

import torch

from ddit.caches import Cache
from ddit.models.base import Architecture

MARK = "_ddit_handle"
_FORWARDS = ("forward", "_old_forward")
"""Where a forward may lie: accelerate moves it to ``_old_forward`` and back when its hooks come and go."""


def parallel_config(transformer: Any) -> Any:
    """How `enable_parallelism` of diffusers spreads a transformer over devices; ``None`` where it does not."""
    return getattr(transformer, "_parallel_config", None)


def compiled_around(called: Any) -> bool:
    """Whether what a pipeline calls is ``torch.compile``'s wrapper around a transformer."""
    return hasattr(called, "_orig_mod")


def is_compiled(called: Any) -> bool:
    """Whether a transformer or any of its modules is compiled."""
    return compiled_around(called) or any(getattr(m, "_compiled_call_impl", None) is not None for m in called.modules())


class Seat:
    """One transformer with a replacement around its forward, until `remove`.

    Args:
        called: What the pipeline calls: the transformer, or ``torch.compile``'s wrapper around it.
        call: Takes this seat and the arguments of the forward.
        end: Takes diffusers' own reset, which pipelines call on every component when a run ends.
        mark: Left on the transformer, so that applying again finds it.
    """

    def __init__(
        self,
        architecture: Architecture,
        called: Any,
        cache: Cache,
        call: Callable[..., Any],
        end: Callable[..., Any],
        mark: Any,
    ) -> None:
        transformer: Any = architecture.transformer
        self.architecture = architecture
        self.cache = cache
        self.transformer = transformer
        self._parallel = parallel_config(transformer)
        # Around compiled code, so that decisions stay out of it; inside accelerate's hook, which model offloading takes
        # off and on again after every run.
        owner = called if compiled_around(called) else transformer
        places = [p for p in ("_compiled_call_impl", "_old_forward") if vars(owner).get(p) is not None]
        self._place = [*places, "forward"][0]
        self._owner = owner
        self.forward: Callable[..., Any] = getattr(owner, self._place)
        self._wrapped = Wrapped(owner, "forward", self.forward, functools.partial(call, self))
        self._patched: list[tuple[Any, str, Any]] = [(transformer, MARK, mark), (owner, self._place, self._wrapped)]
        reset = getattr(transformer, "_reset_stateful_cache", None)
        if reset is not None:
            ending = Wrapped(transformer, "_reset_stateful_cache", reset, functools.partial(end, reset))
            self._patched.append((transformer, "_reset_stateful_cache", ending))
        # Straight into the instance's dictionary: torch.compile's wrapper forwards setattr to the module inside.
        self._saved = {name: vars(module)[name] for module, name, _ in self._patched if name in vars(module)}
        for module, name, value in self._patched:
            vars(module)[name] = value

    def check(self, called: Any) -> str | None:
        """Look whether ddit is where it has to be; tells what would be lost.

        Args:
            called: What the pipeline has for a transformer, where there is one.

        Raises:
            ValueError: Where tokens are split before they come here: no latents could be made of them.
        """
        if parallel_config(self.transformer) is not self._parallel:
            raise ValueError(
                "enable_parallelism was called after ddit.apply, whose place is around it: "
                "call remove(), then ddit.apply again"
            )
        inside = compiled_around(called) and self._owner is not called
        later = self._place != "_compiled_call_impl" and vars(self._owner).get("_compiled_call_impl") is not None
        if inside or later:
            return "the transformer was compiled as a whole after ddit.apply, and is not compiled now: apply ddit again"
        return None

    @property
    def hooks(self) -> int:
        """How many hooks of diffusers lie on the transformer."""
        registry = getattr(self.transformer, "_diffusers_hook", None)
        return 0 if registry is None else len(registry.hooks)

    def stay(self, hooks: int) -> None:
        """Put ddit back on, where one of so many hooks below it took itself off in the call just made.

        Streamed group offloading does so in its first call; diffusers then puts what lay below the hook into our place.
        """
        attributes = vars(self._owner)
        below = attributes.get(self._place)
        if self.hooks < hooks and below is not None and below is not self._wrapped:
            self.forward = self._saved[self._place] = below
            attributes[self._place] = self._wrapped

    def remove(self) -> None:
        """Give the transformer back as it was."""
        for module, name, value in self._patched:
            attributes = vars(module)
            for place in _FORWARDS if name in _FORWARDS else (name,):
                if attributes.get(place) is not value:
                    continue  # Somebody wrapped it after us; what is left of ours passes calls through.
                if name in self._saved:
                    attributes[place] = self._saved[name]
                elif place == "_old_forward":
                    attributes[place] = self.forward
                else:
                    del attributes[place]
        self.cache.remove()


class Wrapped:
    """A replacement under the original's name and signature, which pipelines inspect.

    A copy of the transformer gets the method of its own class instead, so that it works alone, without ddit.

    Args:
        owner: The transformer.
        name: Of the method of its class.
        original: What stood there.
        replacement: Takes its arguments.
    """

    def __init__(self, owner: Any, name: str, original: Callable[..., Any], replacement: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.__signature__ = inspect.signature(original)
        self._owner = owner
        self._name = name
        # For those who compile the whole transformer after `apply`.
        self._replacement = torch.compiler.disable(replacement)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._replacement(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._owner))
        return None if copied is None else types.MethodType(getattr(type(copied), self._name), copied)

    def __reduce__(self) -> str:
        raise pickle.PicklingError(
            "ddit is on this transformer: call remove() before pickling, and ddit.apply after it"
        )
