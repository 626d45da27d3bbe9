"""Single steps, first steps, waits of the host, and whole runs."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

import ddit
from benchmarks.gpu.models import Loaded, graphs
from ddit.eval import timing
from ddit.handle import Handle
from ddit.util.memory import with_peak

Putting = Callable[[], AbstractContextManager[Any]]
"""Puts a method on a model for as long as the block lasts."""
WARM_STEPS = 6
"""Of the run before one that is timed."""


@torch.no_grad()
def matmul_peak(shape: Any, device: torch.device) -> dict[str, float]:
    """Operations per second of a product of large random matrices, the median of ten."""
    size, dtype = shape.matrix, getattr(torch, shape.dtype)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = timing.by_turns({"product": lambda: a @ b}, device, 10)["product"]
    return {"size": size, "seconds": seconds, "flops_per_second": 2 * size**3 / seconds}


def single_steps(loaded: Loaded, seconds: float, *, adapter: bool) -> dict[str, Any]:
    """What `ddit.eval.timing.step_costs` tells, repeated as often as fits into so many seconds."""
    before, chosen = graphs(), loaded.adapter if adapter else None
    if adapter and loaded.form == "compiled":
        torch._dynamo.reset()  # compiled code does not look for the adapter's hooks
    one = _plain_step(loaded)
    repeats = min(max(int(seconds / (10 * one)), 2), loaded.shape.repeats)
    timing.MATRIX = loaded.shape.matrix
    costs = timing.step_costs(loaded.architecture, loaded.inputs, adapter=chosen, repeats=repeats)
    return {**costs, "graphs": graphs() - before}


@torch.no_grad()
def _plain_step(loaded: Loaded) -> float:
    """Seconds of a step, after one that is not counted."""
    return timing.by_turns({"1": lambda: loaded.transformer(**loaded.inputs)}, loaded.device, 1)["1"]


@torch.no_grad()
def first_steps(loaded: Loaded, repeats: int = 5) -> dict[str, Any]:
    """Seconds of the first step of a run, plain and with what has to be set up in it."""
    forms: dict[str, Any] = {
        "plain": None,
        "patches": {},
        "patches and skipping": {"skip": ddit.SkipSchedule(threshold=0.01)},
    }
    now = timing.clock(loaded.device)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(repeats + 1):
        for name, settings in forms.items():
            with nullcontext() if settings is None else ddit.apply(loaded.sampler, **settings):
                started = now()
                loaded.transformer(**loaded.inputs)
                seconds[name] += [now() - started] * (turn > 0)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {"seconds": medians, "overhead": {name: t / medians["plain"] - 1 for name, t in medians.items()}}


def host_waits(loaded: Loaded, putting: Putting, steps: int = 12) -> dict[str, float] | None:
    """How often a step makes the host wait for the GPU; ``None`` where there is none."""
    if loaded.device.type != "cuda":
        return None
    found = {}
    for name, put in {"plain": nullcontext, "patches": putting}.items():
        with put(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                loaded.sampler(steps)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found[name] = sum("synchroniz" in str(warning.message) for warning in told) / steps
    return found


def whole_run(loaded: Loaded, putting: Putting, steps: int) -> dict[str, Any]:
    """Seconds, work and memory of a run after a short one; one in which code was compiled is run again."""
    now = timing.clock(loaded.device)

    def timed() -> tuple[float, bool, int]:
        before, started = graphs(), now()
        z = loaded.sampler(steps)
        return now() - started, bool(z.isfinite().all()), graphs() - before

    first = graphs()
    with putting() as handle, _computed(loaded) as computed:
        loaded.sampler(min(WARM_STEPS, steps))
        for _ in range(3):
            computed.clear()
            (seconds, finite, new), peak = with_peak(timed, loaded.device)
            if not new:
                break
        told = {"computed_calls": len(computed)} if loaded.form == "eager" else {}
        told |= _told(handle)
    return {
        "seconds": [seconds],
        "finite": finite,
        "peak_memory": peak,
        **told,
        "graphs_before": graphs() - first - new,
        "graphs": new,
    }


def _told(handle: Any) -> dict[str, Any]:
    """What a report says."""
    if not isinstance(handle, Handle):
        return {}
    report = handle.report
    reused = sum(bool(step.reused) for step in report.steps)
    return {"flops_fraction": report.flops_fraction, "counts": report.counts, "reused": reused}


class _computed:
    """Calls in which the last block runs, which caches skip. Not of compiled blocks, which a hook would change."""

    def __init__(self, loaded: Loaded) -> None:
        self.layer = loaded.architecture.feed_forward()[-1][1] if loaded.form == "eager" else None
        self.calls: list[int] = []

    def __enter__(self) -> list[int]:
        if self.layer is not None:
            self.hook = self.layer.register_forward_hook(lambda *_: self.calls.append(1))
        return self.calls

    def __exit__(self, *_: object) -> None:
        if self.layer is not None:
            self.hook.remove()
