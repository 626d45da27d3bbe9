"""What a step and a whole run of a transformer take in seconds: forms by turns after a warm-up, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile, record_function

from ddit.adapter import PatchAdapter
from ddit.api import apply
from ddit.coarse import call_at, coarse_call, coarse_step
from ddit.config import Coarse, FixedSchedule, PatchSchedule
from ddit.models.base import Architecture, Inputs, first, to_meta
from ddit.run import RunState
from ddit.sampler import Sampler
from ddit.schedule import Rule
from ddit.skip.policy import SkipPlan
from ddit.skip.skipper import Skipper
from ddit.util.memory import with_peak

WARM_UP = 3
"""Turns that are not counted: the first ones load, allocate and, with ``torch.compile``, compile."""
MATRIX = 4096
"""Rows and columns of the matrices whose product tells what the machine can do."""

Forms = dict[str, Callable[[], Any]]
"""What is timed, by name."""


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, read when the device has done all it was given."""
    if device.type == "cpu":
        return time.perf_counter

    def finished() -> float:
        torch.get_device_module(device).synchronize(device)
        return time.perf_counter()

    return finished


def by_turns(forms: Forms, device: torch.device, repeats: int, warm_up: int = WARM_UP) -> dict[str, float]:
    """Median seconds of each form; in every turn each has one go."""
    now = clock(device)
    times: dict[str, list[float]] = {name: [] for name in forms}
    warm_up = min(warm_up, repeats)
    for turn in range(repeats + warm_up):
        for name, form in forms.items():
            started = now()
            form()
            if turn >= warm_up:
                times[name].append(now() - started)
    return {name: statistics.median(t) for name, t in times.items()}


def step_forms(
    architecture: Architecture, inputs: Inputs, scales: Sequence[int], adapter: PatchAdapter | None = None
) -> Forms:
    """One step at each scale as ``"1"``, ``"2"``, ...; the call of the model inside it alone as ``"2, model"``; with an
    adapter, which must be attached, also ``"2, adapter"``.
    """
    forward, free, noisy = architecture.transformer.forward, Coarse(), architecture.read(inputs)

    def step(scale: int, coarse: Coarse, adapter: PatchAdapter | None = None) -> Callable[[], Tensor]:
        return lambda: coarse_step(architecture, forward, inputs, noisy, scale, coarse, adapter=adapter)

    def model(scale: int) -> Callable[[], Any]:
        call = coarse_call(architecture, inputs, noisy, scale, free)

        def alone() -> Any:
            with architecture.placed(call.layout):
                return forward(**call.inputs)

        return alone

    forms: Forms = {"1": lambda: forward(**inputs)}
    for scale in scales:
        forms[f"{scale}"] = step(scale, free)
        forms[f"{scale}, model"] = model(scale)
    if adapter is not None:
        for scale in adapter.scales:
            forms[f"{scale}, adapter"] = step(scale, adapter.coarse, adapter)
    return forms


@torch.no_grad()
def step_costs(
    architecture: Architecture,
    inputs: Inputs,
    *,
    scales: Sequence[int] = (2, 4),
    adapter: PatchAdapter | None = None,
    repeats: int = 30,
) -> dict[str, Any]:
    """Time of a step at each scale next to its FLOPs, and of all that is not the model's.

    Args:
        inputs: A call of the transformer, on its device and in its dtype.
        adapter: Not attached yet; what it adds is told as a share of the step without.

    Returns:
        By scale: ``flops`` of one sample, ``flop_ratio`` and ``time_ratio`` to a full step, ``efficiency`` (the latter
        by the former), ``seconds``, ``adapter_seconds`` (of a step with it), ``seam_share`` (what a step adds to the
        model's own call on the coarse grid, as a share of that call), ``adapter_share``, ``switch_share`` (what it
        costs that the step before had another scale, as a share of a full step), ``peak_memory`` in bytes beyond what
        lay there (where the device tells), ``utilisation`` (of the speed at which the machine multiplies large
        matrices). And what
        deciding and recording take of a full step, by the rule, and with skipping.
    """
    z = architecture.read(inputs).latents
    device, batch = z.device, len(z)
    one = architecture.rows(inputs, [0])
    flops = {s: architecture.count_flops(to_meta(call_at(architecture, one, s, Coarse()))) for s in (1, *scales)}
    with _attached(adapter, architecture.transformer):
        forms = step_forms(architecture, inputs, scales, adapter)
        seconds = by_turns({**forms, "matrix": matrix(z.dtype, device)}, device, repeats)
        memory = peak_memory(forms, device)
        switches = _switches({s: forms[str(s)] for s in (1, *scales)}, device, repeats)
    peak, plain = 2 * MATRIX**3 / seconds["matrix"], seconds["1"]
    time_ratio = {s: plain / seconds[str(s)] for s in flops}
    learnt = adapter.scales if adapter is not None else ()
    return {
        "batch": batch,
        "flops": flops,
        "flop_ratio": {s: flops[1] / flops[s] for s in flops},
        "time_ratio": time_ratio,
        "efficiency": {s: time_ratio[s] / (flops[1] / flops[s]) for s in flops},
        "seconds": {s: seconds[str(s)] for s in flops},
        "seam_share": {s: seconds[str(s)] / seconds[f"{s}, model"] - 1 for s in scales},
        "adapter_seconds": {s: seconds[f"{s}, adapter"] for s in learnt},
        "adapter_share": {s: seconds[f"{s}, adapter"] / seconds[str(s)] - 1 for s in learnt},
        "switch_share": {s: switch / plain for s, switch in switches.items()},
        "peak_memory": memory,
        "utilisation": {s: batch * flops[s] / seconds[str(s)] / peak for s in flops},
        "scheduler_share_of_a_plain_step": scheduler_seconds(z, PatchSchedule(threshold=0.0)) / plain,
        "scheduler_share_with_skipping": scheduler_seconds(z, PatchSchedule(threshold=0.0), skip=True) / plain,
        "repeats": repeats,
    }


def matrix(dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """The product of two large random matrices: about the most work in a second that the machine gives."""
    factor = torch.randn(MATRIX, MATRIX, dtype=dtype, device=device)  # of ones the product takes less power
    return lambda: factor @ factor


def peak_memory(forms: Forms, device: torch.device) -> dict[str, int] | None:
    """Bytes of each form at its peak, beyond what lay there; ``None`` where the device does not tell."""
    peaks = {name: with_peak(form, device)[1] for name, form in forms.items()}
    known = {name: peak for name, peak in peaks.items() if peak is not None}
    return known if len(known) == len(peaks) else None


def _switches(forms: Mapping[int, Callable[[], Any]], device: torch.device, repeats: int) -> dict[int, float]:
    """Per scale, seconds that the first of two steps at it takes longer than the second."""
    now = clock(device)
    longer: dict[int, list[float]] = {scale: [] for scale in forms}
    for _ in range(repeats):
        for scale, form in forms.items():
            marks = [now()]
            for _ in range(2):
                form()
                marks.append(now())
            longer[scale].append(2 * marks[1] - marks[0] - marks[2])
    return {scale: statistics.median(t) for scale, t in longer.items()}


def scheduler_seconds(
    z: Tensor, schedule: PatchSchedule, *, skip: bool = False, steps: int = 8, repeats: int = 9
) -> float:
    """Seconds that deciding and recording take per step, past the warm-up.

    Args:
        z: Latents ``[B, C, ..., H, W]``.
        schedule: One that keeps full steps, after which there is most to do.
        skip: A plan that skips nothing, which keeps what forecasts would need.
    """
    now = clock(z.device)
    latents, sigmas = [z + i for i in range(steps)], [1 - index / steps for index in range(steps)]
    spent = []
    for _ in range(repeats):
        skipper = Skipper(SkipPlan(1.0)) if skip else None
        run, marks = RunState(Rule(schedule), schedule, skipper, Sampler(steps, sigmas)), []
        for here, sigma in zip(latents, sigmas, strict=True):
            marks.append(now())
            run.repeats(here, sigma)
            run.decide(here, sigma, 2)
            run.record(z, run.pass_scales(len(z)), 0.0)
        marks.append(now())
        spent.append(statistics.median(b - a for a, b in list(pairwise(marks))[schedule.order :]))
    return statistics.median(spent)


@torch.no_grad()
def run_costs(
    architecture: Architecture,
    inputs: Inputs,
    schedule: Sequence[int],
    *,
    adapter: PatchAdapter | None = None,
    repeats: int = 3,
) -> dict[str, Any]:
    """A whole run of the transformer by Euler's method, plain and with the scales of a schedule, by turns.

    Args:
        inputs: As for `step_costs`.
        schedule: Scale of every step.
    """
    transformer, device = architecture.transformer, architecture.read(inputs).latents.device
    plain = transformer.forward
    # Applied once: compiled blocks would be compiled anew each time that an adapter is attached.
    with apply(transformer, patches=FixedSchedule(steps=tuple(schedule)), adapter=adapter) as handle:
        forms: Forms = {
            "plain": lambda: euler(architecture, inputs, len(schedule), plain),
            "dynamic": lambda: euler(architecture, inputs, len(schedule), transformer),
        }
        seconds = by_turns(forms, device, repeats, warm_up=1)
        return {
            "steps": len(schedule),
            "schedule": list(schedule),
            "flops_fraction": handle.report.flops_fraction,
            "speedup": seconds["plain"] / seconds["dynamic"],
            "seconds": seconds,
            "peak_memory": peak_memory(forms, device),
            "repeats": repeats,
        }


def euler(architecture: Architecture, inputs: Inputs, steps: int, call: Callable[..., Any]) -> Tensor:
    """Latents ``[B, C, ..., H, W]`` after a run from those of a call, noise levels evenly from 1 to 0.

    Args:
        call: The transformer, or its own forward.
    """
    z = architecture.read(inputs).latents
    for now, after in pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        there = architecture.renoised(inputs, z, torch.full((len(z),), now, device=z.device))
        velocity = architecture.velocity(first(call(**there)), z.shape[2:])
        z = z + (after - now) * velocity
    return z


def predicted(schedule: Sequence[int], costs: Mapping[int, float]) -> float:
    """How many times faster than plain a schedule is, from the cost of a step at each scale."""
    return len(schedule) * costs[1] / sum(costs[scale] for scale in schedule)


def paper_like(total: int, costs: Mapping[int, float], speedup: float = 2.18) -> list[int]:
    """A schedule of the speed that the paper reports for FLUX.1-dev: coarsest first, full steps at both ends.

    Args:
        total: Number of steps.
        costs: Scale -> work of a step.
    """
    warm, scales = min(3, total), sorted(costs)
    if len(scales) == 1:
        return scales * total

    def of(coarse: int) -> list[int]:
        large = [scales[-1]] * (coarse // 2) + [scales[1]] * (coarse - coarse // 2)
        return [1] * warm + large + [1] * (total - warm - coarse)

    return min(map(of, range(total - warm + 1)), key=lambda schedule: abs(predicted(schedule, costs) - speedup))


@torch.no_grad()
def trace(
    architecture: Architecture, inputs: Inputs, scales: Sequence[int], adapter: PatchAdapter | None, path: Path
) -> None:
    """A step at each scale in a trace for https://ui.perfetto.dev; arguments as for `step_costs`."""
    now = clock(architecture.read(inputs).latents.device)
    with _attached(adapter, architecture.transformer):
        forms = step_forms(architecture, inputs, scales, adapter)
        for form in forms.values():
            form()
        with profile() as profiler:
            for name, form in forms.items():
                with record_function(f"ddit, scale {name}"):
                    form()
                    now()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


def _attached(adapter: PatchAdapter | None, transformer: Any) -> AbstractContextManager[Any]:
    return nullcontext() if adapter is None else adapter.attach(transformer)
