"""Which run a call of the transformer belongs to: one for each call of a pipeline under way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ddit.log import Log
from ddit.run import RunState
from ddit.sampler import place

CLOSE = 2**-8
"""How far a timestep in bfloat16 may lie from the scheduler's own noise level."""


_NUMBERS = count()


@dataclass(eq=False)
class Current:
    """What a call of a pipeline draws, or what one thread draws without a pipeline."""

    state: RunState
    call: int | None = None
    """See `ddit.caller.pipeline_calls`; ``None`` without a pipeline."""
    thread: int = field(default_factory=threading.get_ident)
    number: int = field(default_factory=_NUMBERS.__next__)
    """Its own."""
    begun: bool = False
    """Whether ``state`` belongs to a run."""
    finished: Log | None = None
    """The last run."""
    told: int | None = None
    """The calling pipeline's own number of steps, see `ddit.sampler.run_of`."""
    at: tuple[int | None, float] | None = None
    """The scheduler's step and the noise level of the last call that was not a further guidance pass."""
    scheduler: Any = None
    """The sampler, where one is known."""
    _timesteps: Any = None
    _sigmas: Any = None
    _levels: list[float] = field(default_factory=list)
    """``_sigmas`` of the scheduler, read by the host once per run: on a GPU each read waits for it."""

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
        before, self.at = self.at, (place(self.scheduler), sigma)
        return self.begun and self.at == before and self.at[0] is not None and sigma > 0

    def follow(self, pipe: Any, calls: bool, start_over: Callable[[], None]) -> None:
        """Note who calls. A pipeline that has set its timesteps anew begins a new run, even if the last one broke.

        Args:
            pipe: Whose scheduler is in use, if there is one.
            calls: Whether it calls the transformer itself, in which case its own number of steps is this run's.
        """
        self.scheduler = getattr(pipe, "scheduler", None)
        timesteps = getattr(self.scheduler, "timesteps", None)
        if timesteps is not self._timesteps:
            start_over()
        self.told = getattr(pipe, "_num_timesteps", None) if calls else None
        self._timesteps = timesteps


class Runs(threading.local):
    """The runs of one transformer in one thread: each thread that looks sees its own.

    Args:
        fresh: Makes the state before a run.
    """

    def __init__(self, fresh: Callable[[], RunState]) -> None:
        self._fresh = fresh
        self.current = Current(fresh())
        """The one that was last called for."""
        self._all: dict[int | None, Current] = {None: self.current}

    def of(self, call: int | None) -> Current:
        """That of a call of a pipeline, the last one where there is none."""
        return self._all.get(call, self.current) if call is not None else self.current

    def turn_to(self, call: int | None, under_way: Callable[[], Collection[int]]) -> list[Current]:
        """Go on with that of a call of a pipeline, or of nobody's.

        Args:
            under_way: Tells the calls of pipelines in this thread.

        Returns:
            The runs of calls that are over, which are forgotten.
        """
        over: list[Current] = []
        if call not in self._all:
            kept = {None, *under_way()}
            over = [self._all.pop(key) for key in list(self._all) if key not in kept]
            self._all[call] = Current(self._fresh(), call)
        self.current = self._all[call]
        return over
