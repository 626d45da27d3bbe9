"""`Handle`: carries out decisions, call by call, on a transformer or on two that take turns."""

from __future__ import annotations

import pickle
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ddit.adapter import Attachment, PatchAdapter
from ddit.caches import Cache
from ddit.caller import freeing_pipeline, held_by, pipeline_calls
from ddit.coarse import coarse_step
from ddit.current import Current, Runs
from ddit.log import Log
from ddit.models.base import Architecture, Inputs, Noisy, UnsupportedCall, first
from ddit.plan import Plan
from ddit.report import Report
from ddit.run import RunState
from ddit.seat import Seat, is_compiled
from ddit.util.tell import warn

_LOCKS: weakref.WeakKeyDictionary[PatchAdapter, Any] = weakref.WeakKeyDictionary()
"""One for each adapter, which knows of one call at a time, on however many transformers it is."""


def lock_of(adapter: PatchAdapter | None) -> Any:
    """What is held during a call of a transformer with this adapter."""
    return threading.RLock() if adapter is None else _LOCKS.setdefault(adapter, threading.RLock())


class Handle:
    """Dynamic patches on a transformer, or two that take turns, until `remove`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._runs = Runs(self._fresh)
        self._lock = lock_of(plan.adapter)
        """Held during a call: threads take turns step by step, each with a run of its own."""
        self._drawing: set[Current] = set()
        """Runs under way, of all threads."""
        self._latest: Log | None = None
        self._warned: set[str] = set()
        self._active = False
        self._seats: list[Seat] = []
        self._attachment: Attachment | None = None
        self.put_on()

    def put_on(self) -> None:
        """Change the transformers. Where that fails, they are as before."""
        with self._lock:
            try:
                self._attach()
            except BaseException:
                self._take_off()
                raise
            self._active = True

    def _attach(self) -> None:
        plan = self.plan
        if plan.adapter is not None:
            self._attachment = plan.adapter.attach(plan.architectures[0].transformer)
            if any(map(is_compiled, plan.called)):
                # Compiled code does not look for later hooks (torch._dynamo.config.skip_nnmodule_hook_guards).
                torch._dynamo.reset()
        for architecture, called in zip(plan.architectures, plan.called, strict=True):
            alone = len(plan.architectures) == 1
            cache = Cache(architecture, plan.cache, learnt=plan.adapter is not None, published=alone)
            self._seats.append(Seat(architecture, called, cache, self._call, self._end, self))

    def _take_off(self) -> None:
        for part in (self._attachment, *self._seats):
            if part is not None:
                part.remove()
        self._attachment, self._seats = None, []

    @property
    def adapter(self) -> PatchAdapter | None:
        """The adapter in use."""
        return self.plan.adapter

    @property
    def scales(self) -> list[int]:
        """Scale of each sample in the current step, 0 where it is skipped; empty before a run, and after the end of one
        whose model hears of it (those with caches in diffusers).
        """
        return list(self._asked_for.state.scales)

    @property
    def report(self) -> Report:
        """What ran in this thread's current run, or its last one; in a thread without any, the last run of all.

        Raises:
            RuntimeError: Before any run.
        """
        here = self._asked_for
        log = here.state.log if here.state.log.steps else here.finished or self._latest
        if log is None:
            raise RuntimeError("there is no report before a run; call the pipeline first")
        return self.plan.report(log)

    @property
    def _asked_for(self) -> Current:
        """The run of the pipeline that calls who asks, or else the last one of this thread."""
        _, call = next(self._calls(), (None, None))
        return self._runs.of(call)

    def remove(self) -> None:
        """Give the transformer back as it was. Safe to call twice."""
        with self._lock:
            if self._active:
                self._active = False
                try:
                    self._start_over()
                finally:
                    self._take_off()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the transformer has no ddit on it."""

    def __reduce__(self) -> str:
        raise pickle.PicklingError(
            "ddit is on this transformer: call remove() before pickling, and ddit.apply after it"
        )

    def __repr__(self) -> str:
        state = "active" if self._active else "removed"
        names = " and ".join(type(a.transformer).__name__ for a in self.plan.architectures)
        asked = ", ".join(f"{name}={value}" for name, value in self.plan.settings.items() if value is not None)
        return f"<ddit on {names}, {state}, {asked}>"

    # One call of the transformer

    def _call(self, seat: Seat, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            if self._active:
                hooks = seat.hooks
                try:
                    answer = self._step(seat, args, kwargs)
                except BaseException:
                    self._forget()
                    raise
                if self._active:  # it may have been taken off from inside the call
                    self._latest = self._state.log
                    seat.stay(hooks)
                return answer
        return seat.forward(*args, **kwargs)

    @property
    def _state(self) -> RunState:
        return self._runs.current.state

    def _step(self, seat: Seat, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        started = time.perf_counter()
        arch = seat.architecture
        inputs = arch.bind(args, kwargs)
        caller, call = next(pipeline_calls(arch.transformer), (None, None))
        pipe = self.plan.pipe() if caller is None else caller
        lost = seat.check(held_by(pipe, arch.transformer))
        if lost is not None:
            self._warn(lost)
        for over in self._runs.turn_to(call, self._under_way):
            self._start_over(over)
        self._runs.current.follow(pipe, caller is not None, self._start_over)
        try:
            noisy = arch.read(inputs)
        except UnsupportedCall as reason:
            return self._plain_step(seat, inputs, str(reason), args, kwargs)
        z, sigma = noisy.latents, self._runs.current.sigma(noisy.sigma)
        if not self._state.repeats(z, sigma):
            if self._runs.current.stands(sigma) and caller is not None:
                self._warn(
                    "the transformer is called about several latents in one step of the sampler, tiles perhaps, and "
                    "ddit takes each for a step: its schedule and its report are wrong. Draw without tiles, or "
                    "without ddit"
                )
            self._begin(arch, inputs, noisy, self._state.continues(z, sigma))
            self._state.hand_over(arch)
            with torch.no_grad():
                self._state.decide(z, sigma, arch.patch_size)
            if self._state.broken:
                self._warn(
                    "the latents hold NaN or infinity: every step is full from here on, as broken as it is without ddit"
                )
        scales = self._state.pass_scales(len(z))
        if set(scales) == {1}:
            answer = self._forward(seat, 1, range(len(z)))(*args, **kwargs)
            velocity = arch.velocity(first(answer), z.shape[2:])
        else:
            velocity = self._grouped_step(seat, inputs, noisy, scales)
            answer = arch.answer(velocity.to(z.dtype), inputs)
        if self._active:  # it may have been taken off from inside the call
            self._state.record(velocity.detach(), scales, time.perf_counter() - started)
        return answer

    def _grouped_step(self, seat: Seat, inputs: Inputs, noisy: Noisy, scales: Sequence[int]) -> Tensor:
        """One call with a scale for each sample: samples of one scale run together. ``[B, C, ..., H, W]``, float32."""
        groups: dict[int, list[int]] = defaultdict(list)
        for sample, scale in enumerate(scales):
            groups[scale].append(sample)
        parts = [self._group(seat, inputs, noisy, scale, samples) for scale, samples in groups.items()]
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([sample for samples in groups.values() for sample in samples])
        return torch.cat(parts)[order.argsort()]

    def _group(self, seat: Seat, inputs: Inputs, noisy: Noisy, scale: int, samples: list[int]) -> Tensor:
        """Velocity of samples of one scale."""
        arch = seat.architecture
        if len(samples) < len(noisy.latents):
            inputs, noisy = arch.rows(inputs, samples), noisy.rows(samples)
        if scale == 0:
            return self._state.forecast(samples, noisy.latents, noisy.sigma)
        if scale == 1:
            return arch.velocity(first(self._forward(seat, 1, samples)(**inputs)), noisy.latents.shape[2:]).float()
        return coarse_step(
            arch,
            self._forward(seat, scale, samples),
            inputs,
            noisy,
            scale,
            self.plan.coarse,
            variance=self.plan.variance.get(scale),
            adapter=self.adapter,
        )

    def _forward(self, seat: Seat, scale: int, samples: Sequence[int]) -> Callable[..., Any]:
        """The transformer's own forward for some samples of the current step, through the cache where there is one."""
        if not seat.cache.active:
            return seat.forward
        self._state.log.reused_share = seat.cache.share
        return seat.cache.call(
            seat.forward,
            step=len(self._state.log.steps) - 1,
            steps=self._state.log.total,
            guidance=self._state.passes,
            scale=scale,
            samples=samples,
            reused=self._state.reused,
            run=self._runs.current.number,
        )

    def _plain_step(
        self, seat: Seat, inputs: Inputs, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call that can't run with large patches: say so once, and record it."""
        started = time.perf_counter()
        tokens, sigma = inputs[seat.architecture.batched[0]], self._runs.current.sigma(seat.architecture.sigma(inputs))
        if not self._state.repeats(tokens, sigma):
            self._begin(seat.architecture, inputs, None, self._state.continues(tokens, sigma))
            self._state.force(tokens, sigma)
        self._state.log.forced = reason
        self._warn(f"ddit keeps every step full: {reason}")
        answer = self._forward(seat, 1, range(len(tokens)))(*args, **kwargs)
        if self._active:
            self._state.record_full(time.perf_counter() - started)
        return answer

    def _warn(self, message: str) -> None:
        """Say something once."""
        if message not in self._warned:
            self._warned.add(message)
            warn(message)

    # Runs

    def _begin(self, arch: Architecture, inputs: Inputs, noisy: Noisy | None, continues: bool) -> None:
        """Start over if a call does not continue the run under way.

        Args:
            noisy: What the call is about; ``None`` where it can't run with large patches.
        """
        if not continues:
            self._start_over()
        run = self._runs.current
        if not run.begun:
            self._refuse_cache()
            self._drawing.add(run)
            run.state, run.begun = self.plan.new_run(arch, inputs, noisy, run.scheduler, run.told), True
            if run.state.blind:
                kept = "skips no step; take a deterministic sampler"
                if run.state.blind_policy:
                    kept = "keeps full steps; take a deterministic sampler, or a fixed or planned schedule"
                self._warn(
                    f"{type(run.scheduler).__name__} adds noise of its own, so that latents do not tell what comes "
                    f"next: ddit {kept}"
                )
        elif noisy is not None and len(run.state.log.examples) < len(self.plan.policy.scales):  # those of a forced step
            run.state.log.examples = self.plan.examples(arch, inputs, noisy)
            run.state.costs = self.plan.work(arch, run.state.log.examples)

    def _refuse_cache(self) -> None:
        """Refuse a cache that can't work in this run.

        Caches of other libraries reset all their states when a run ends, those of other threads too.
        """
        if not any(seat.cache.active for seat in self._seats):
            return
        for run in list(self._drawing):
            if self._is_over(run):
                self._forget(run)
                continue
            who = "the call around this one" if run.thread == threading.get_ident() else "another thread"
            raise RuntimeError(
                f"a cache serves one run at a time, and {who} draws with this transformer: "
                "put a lock around the pipeline's call, or leave the cache out"
            )

    def _calls(self, thread: int | None = None) -> Iterator[tuple[Any, int]]:
        """Calls under way of pipelines that have one of the transformers, see `ddit.caller.pipeline_calls`."""
        for architecture in self.plan.architectures:
            yield from pipeline_calls(architecture.transformer, thread)

    def _under_way(self, thread: int | None = None) -> set[int]:
        """The numbers of these."""
        return {call for _, call in self._calls(thread)}

    def _is_over(self, run: Current) -> bool:
        """Whether a run is over, even if nobody said so: its thread died, or its pipeline's call was broken off."""
        if run.thread not in {thread.ident for thread in threading.enumerate()}:
            return True
        if run.call is None:
            return run.thread == threading.get_ident()
        return run.call not in self._under_way(run.thread)

    def _end(self, reset: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Pipelines call this when a run ends, and their user may at any time."""
        caller, call = next(self._calls(), (None, None))
        if caller is None:
            self._start_over()
        elif freeing_pipeline() in (None, caller):  # else a callback frees another one
            run = self._runs.of(call)
            if run.call == call and run.state.log.steps:
                self._start_over(run)
            elif self._active and len(self._seats) == 1:
                self._warn(
                    "a run ended in which ddit was never asked: a hook that was there before ddit.apply has been "
                    "removed, and diffusers took ddit off with it. Call ddit.apply again"
                )
        return reset(*args, **kwargs)

    def _start_over(self, run: Current | None = None) -> None:
        """End a run, by default the current one."""
        run = run or self._runs.current
        if run.state.log.steps:
            self._latest = run.finished = log = run.state.log
            said = self.plan.remark(log) if log.whole else None  # one that was broken off says nothing of its settings
            if said is not None and not self._warned:
                self._warn(said)
        self._forget(run)

    def _fresh(self) -> RunState:
        """The state before a run."""
        return RunState(self.plan.policy, self.plan.measure)

    def _forget(self, run: Current | None = None) -> None:
        """Forget what is under way in a run."""
        run = run or self._runs.current
        run.state, run.begun = self._fresh(), False
        self._drawing.discard(run)
        for seat in self._seats:
            seat.cache.start_over(run.number)
