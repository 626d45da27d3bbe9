"""Single steps: how far a coarse step is from the plain one, and what it costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ddit.adapter import PatchAdapter
from ddit.config import ScheduleConfig
from ddit.generate import recorded, run
from ddit.models import architecture_for
from ddit.models.base import Anchor, Inputs, held, to_meta
from ddit.patches import half_log_snr
from ddit.preset import Preset
from ddit.schedule import make_policy
from ddit.state import Generation

STARTS: dict[str, ScheduleConfig] = {
    "bilinear, interpolated positions": ScheduleConfig(start="bilinear", positions="interpolated", anchored=False),
    "bilinear, grid positions": ScheduleConfig(start="bilinear", positions="grid", anchored=False),
    "noise-consistent, interpolated positions": ScheduleConfig(positions="interpolated", anchored=False),
    "noise-consistent, grid positions": ScheduleConfig(positions="grid", anchored=False),
    "anchored": ScheduleConfig(),
}
"""The forms of a coarse step that are compared."""
AGE = 4
"""How many steps lie between the last anchors and the step in `velocity_errors`, about as many as in use."""


def record_calls(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], settings: dict[str, Any]
) -> list[tuple[Inputs, Tensor]]:
    """Inputs of the transformer at every step of a plain run without guidance, and its answers."""
    unguided = {k: v for k, v in settings.items() if not k.startswith("negative_prompt")}
    with recorded(pipe) as calls:
        run(pipe, list(prompts), list(seeds), unguided)
    return calls


@torch.no_grad()
def velocity_errors(
    pipe: Any,
    preset: Preset,
    prompts: Sequence[str],
    settings: dict[str, Any],
    *,
    adapter: PatchAdapter | None = None,
    every: int = 4,
) -> list[dict[str, Any]]:
    """Mean squared error of coarse velocities to the plain one, along plain trajectories.

    Anchors are plain steps of the same run, `AGE` and twice as many steps earlier. Two more forms take no call at all,
    as a cache would: the last velocity again, and the forecast by a line through both.

    Args:
        adapter: Compared as one more form, at the scales it has.

    Returns:
        Rows with sigma, scale, form, error, and the variance of the plain velocity.
    """
    architecture = architecture_for(pipe.transformer)
    calls = record_calls(pipe, prompts, range(len(prompts)), settings)
    forms: dict[str, tuple[ScheduleConfig, PatchAdapter | None]] = {k: (v, None) for k, v in STARTS.items()}
    if adapter is not None:
        forms["adapter"] = (ScheduleConfig(**adapter.form), adapter)
    anchors: list[Anchor] = []
    rows: list[dict[str, Any]] = []
    forward = pipe.transformer.forward
    with _attached(adapter, pipe.transformer):
        for index, (inputs, tokens) in enumerate(calls):
            z, sigma = architecture.latents(inputs), architecture.sigma(inputs)
            height, width = z.shape[-2:]
            plain, level = architecture.velocity(tokens, (height, width)), half_log_snr(sigma)
            anchors.append(Anchor.after(z, sigma, plain, anchors[index - AGE] if index >= AGE else None))
            if index < 2 * AGE or index % every:
                continue
            earlier, anchor = anchors[index - 2 * AGE], anchors[index - AGE]
            for scale in (2, 4):
                answers = {"last velocity again": anchor.velocity.value, "forecast": anchor.velocity.at(level)}
                for name, (config, learnt) in forms.items():
                    if learnt is not None and scale not in learnt.scales:
                        continue
                    low = None
                    if config.anchored:
                        low = architecture.low_line(forward, inputs, scale, config, earlier, None, learnt)
                        low = architecture.low_line(forward, inputs, scale, config, anchor, low, learnt)
                    variance = (learnt or preset).detail_variance.get(scale)
                    answers[name] = architecture.coarse_step(
                        forward,
                        inputs,
                        scale,
                        config,
                        anchor=anchor if config.anchored else None,
                        low=held(low) if low else None,
                        variance=None if variance is None else torch.tensor(variance),
                        adapter=learnt,
                    )
                for name, answer in answers.items():
                    rows.append(
                        {
                            "sigma": float(sigma[0]),
                            "scale": scale,
                            "form": name,
                            "error": float((answer - plain).square().mean()),
                            "velocity_variance": float(plain.var()),
                        }
                    )
    return rows


@torch.no_grad()
def step_costs(
    pipe: Any,
    prompt: str,
    settings: dict[str, Any],
    *,
    batch: int,
    adapter: PatchAdapter | None = None,
    repeats: int = 30,
) -> dict[str, Any]:
    """Time of a step at each scale next to its FLOPs, and of the scheduler alone; scales by turns, medians.

    With an adapter, also what it adds to a coarse step, as a share of that step without it.
    """
    architecture = architecture_for(pipe.transformer)
    config = ScheduleConfig()
    calls = record_calls(pipe, [prompt] * batch, range(batch), {**settings, "num_inference_steps": 8})
    inputs, tokens = calls[-1]
    forward = pipe.transformer.forward
    one = architecture.rows(inputs, [0])
    forms: dict[int | str, Callable[[], Any]] = {1: lambda: forward(**inputs)}
    flops = {1: architecture.count_flops(to_meta(one))}
    z, sigma = architecture.latents(inputs), architecture.sigma(inputs)
    zero = torch.zeros_like(z)
    anchor = Anchor.after(z, sigma, zero, Anchor.after(z, (sigma + 1) / 2, zero))
    low = {s: architecture.low_line(forward, inputs, s, config, anchor) for s in (2, 4)}

    def coarse(scale: int, config: ScheduleConfig, adapter: PatchAdapter | None = None) -> Tensor:
        used = {"anchor": anchor, "low": held(low[scale])} if config.anchored else {}
        return architecture.coarse_step(forward, inputs, scale, config, adapter=adapter, **used)

    for scale in (2, 4):
        forms[scale] = lambda s=scale: coarse(s, config)
        flops[scale] = architecture.count_flops(to_meta(architecture.coarse_inputs(one, scale, config)[0]))
    if adapter is not None:
        trained = ScheduleConfig(**adapter.form)
        for scale in adapter.scales:
            forms[f"adapter at {scale}"] = lambda s=scale: coarse(s, trained, adapter)
    times: dict[int | str, list[float]] = {s: [] for s in forms}
    with _attached(adapter, pipe.transformer):
        for turn in range(repeats + 3):
            for scale, form in forms.items():
                started = time.perf_counter()
                form()
                if turn >= 3:
                    times[scale].append(time.perf_counter() - started)
    medians = {s: statistics.median(t) for s, t in times.items()}
    latents = [architecture.latents(c) for c, _ in calls]
    height, width = latents[0].shape[-2:]
    velocity = architecture.velocity(tokens, (height, width))
    spent = [_scheduler_time(latents, [float(architecture.sigma(c)[0]) for c, _ in calls], velocity) for _ in range(9)]
    return {
        "batch": batch,
        "flop_ratio": {s: flops[1] / flops[s] for s in flops},
        "time_ratio": {s: medians[1] / medians[s] for s in flops},
        "efficiency": {s: medians[1] / medians[s] / (flops[1] / flops[s]) for s in flops},
        "adapter_share": {
            s: medians[f"adapter at {s}"] / medians[s] - 1 for s in (adapter.scales if adapter is not None else ())
        },
        "scheduler_share_of_a_plain_step": statistics.median(spent) / medians[1],
        "repeats": repeats,
    }


@contextmanager
def _attached(adapter: PatchAdapter | None, transformer: Any) -> Iterator[None]:
    attachment = None if adapter is None else adapter.attach(transformer)
    try:
        yield
    finally:
        if attachment is not None:
            attachment.remove()


def _scheduler_time(latents: Sequence[Tensor], sigmas: Sequence[float], velocity: Tensor) -> float:
    """Seconds that deciding and recording take per step at scale 1, past the warm-up; the rule measures at each."""
    config = ScheduleConfig(threshold=0.0)
    generation, policy = Generation(config), make_policy(config)
    marks = []
    for z, sigma in zip(latents, sigmas, strict=True):
        marks.append(time.perf_counter())
        generation.repeats(z, sigma)
        generation.decide(z, sigma, policy, 2, None)
        generation.record(velocity, 0.0)
    marks.append(time.perf_counter())
    return statistics.median(b - a for a, b in list(pairwise(marks))[config.order :])


def velocity_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `velocity_errors` as Markdown: a line per scale and noise level, a column per form."""
    forms = list(dict.fromkeys(row["form"] for row in rows))
    lines = [
        "Mean squared error of a coarse step's velocity to the plain one.",
        "",
        "| scale | sigma | " + " | ".join(forms) + " | variance of the plain velocity |",
        "|---" * (len(forms) + 3) + "|",
    ]
    for scale in sorted({row["scale"] for row in rows}):
        for sigma in sorted({row["sigma"] for row in rows}, reverse=True):
            cells = {r["form"]: r for r in rows if r["scale"] == scale and r["sigma"] == sigma}
            errors = " | ".join(f"{cells[name]['error']:.3f}" if name in cells else "" for name in forms)
            variance = next(iter(cells.values()))["velocity_variance"]
            lines.append(f"| {scale} | {sigma:.2f} | {errors} | {variance:.2f} |")
    return "\n".join(lines) + "\n"
