"""Which run a call of the transformer belongs to: one for each pipeline in each thread."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ddit.caller import place
from ddit.run import RunState

CLOSE = 2**-8
"""How far a timestep in bfloat16 may lie from the scheduler's own noise level."""


@dataclass
class Current:
    """What a pipeline draws in one thread, or what calls without a pipeline do there."""

    state: RunState
    begun: bool = False
    """Whether ``state`` belongs to a run."""
    finished: RunState | None = None
    """The last run."""
    told: int | None = None
    """The calling pipeline's own number of steps, see `run_of`."""
    at: tuple[int | None, float] | None = None
    """The scheduler's step and the noise level of the last call that was not a further guidance pass."""
    _pipe: weakref.ref[Any] | None = None
    _timesteps: Any = None
    _sigmas: Any = None
    _levels: list[float] = field(default_factory=list)
    """``_sigmas`` of the scheduler, read by the host once per run: on a GPU each read waits for it."""

    @property
    def scheduler(self) -> Any:
        pipe = None if self._pipe is None else self._pipe()
        return getattr(pipe, "scheduler", None)

    def sigma(self, told: Tensor) -> float:
        """Noise level of a call: the scheduler's own where there is one, since timesteps may be rounded.

        Args:
            told: What the transformer is told ``[B]``.
        """
        rounded = float(told[0])
        sigmas = getattr(self.scheduler, "sigmas", None)
        if sigmas is None:
            return rounded
        index = place(self.scheduler) or 0
        if sigmas is not self._sigmas:
            self._sigmas, self._levels = sigmas, torch.as_tensor(sigmas).tolist()
        exact = self._levels[min(index, len(self._levels) - 1)]
        return exact if abs(exact - rounded) <= CLOSE else rounded

    def stands(self, sigma: float) -> bool:
        """Whether a call that is no further guidance pass is about the same step of the sampler as the one before."""
        before, self.at = self.at, (place(self.scheduler) or 0, sigma)
        return self.scheduler is not None and self.at == before and self.begun

    def follow(self, pipe: Any, calls: bool, start_over: Callable[[], None]) -> None:
        """Note who calls. A pipeline that has set its timesteps anew begins a new run, even if the last one broke.

        Args:
            pipe: Whose scheduler is in use, if there is one.
            calls: Whether it calls the transformer itself, in which case its own number of steps is this run's.
        """
        timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
        if timesteps is not self._timesteps:
            start_over()
        self.told = getattr(pipe, "_num_timesteps", None) if calls else None
        self._pipe, self._timesteps = None if pipe is None else weakref.ref(pipe), timesteps


class Runs(threading.local):
    """The runs of one transformer in one thread: each thread that looks sees its own.

    Args:
        fresh: Makes the state before a run.
    """

    def __init__(self, fresh: Callable[[], RunState]) -> None:
        self._fresh = fresh
        self._bare = Current(fresh())
        self._piped: MutableMapping[Any, Current] = weakref.WeakKeyDictionary()
        self.current = self._bare
        """The one that was last called for."""

    def turn_to(self, pipe: Any) -> None:
        """Go on with that of a pipeline, or of nobody's: callbacks may draw with another pipeline."""
        if pipe is not None and pipe not in self._piped:
            self._piped[pipe] = Current(self._fresh())
        self.current = self._bare if pipe is None else self._piped[pipe]
