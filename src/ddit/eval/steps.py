"""Single steps: how far a coarse step is from the plain one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ddit.adapter import PatchAdapter
from ddit.anchor import Anchor
from ddit.config import ScheduleConfig
from ddit.generate import recorded, run
from ddit.models import architecture_for
from ddit.models.base import Inputs, held
from ddit.patches import detail, half_log_snr, pad_to_multiple
from ddit.preset import Preset

STARTS: dict[str, ScheduleConfig] = {
    "bilinear, interpolated positions": ScheduleConfig(start="bilinear", positions="interpolated", anchored=False),
    "bilinear, grid positions": ScheduleConfig(start="bilinear", positions="grid", anchored=False),
    "noise-consistent, interpolated positions": ScheduleConfig(positions="interpolated", anchored=False),
    "noise-consistent, grid positions": ScheduleConfig(positions="grid", anchored=False),
    "anchored": ScheduleConfig(gain=0.5),
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
        Rows with sigma, scale, form, error, the share of the error that pooling keeps and large patches could therefore
        see, and the variance of the plain velocity.
    """
    architecture = architecture_for(pipe.transformer)
    calls = record_calls(pipe, prompts, range(len(prompts)), settings)
    forms: dict[str, tuple[ScheduleConfig, PatchAdapter | None]] = {k: (v, None) for k, v in STARTS.items()}
    if adapter is not None:
        forms["adapter"] = (ScheduleConfig(**adapter.form), adapter)
    anchors: list[Anchor] = []
    rows: list[dict[str, Any]] = []
    forward = pipe.transformer.forward
    with nullcontext() if adapter is None else adapter.attach(pipe.transformer):
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
                    if config.anchored and config.gain > 0:
                        low = architecture.low_line(forward, inputs, scale, config, earlier)
                        low = architecture.low_line(forward, inputs, scale, config, anchor, low)
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
                    error = pad_to_multiple(answer.float() - plain.float(), scale * architecture.patch_size)
                    rows.append(
                        {
                            "sigma": float(sigma[0]),
                            "scale": scale,
                            "form": name,
                            "error": float((answer - plain).square().mean()),
                            "visible": 1 - float(detail(error, scale).square().sum() / error.square().sum()),
                            "velocity_variance": float(plain.var()),
                        }
                    )
    return rows


def velocity_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `velocity_errors` as Markdown: a line per scale and noise level, a column per form."""
    forms = list(dict.fromkeys(row["form"] for row in rows))
    lines = [
        "Mean squared error of a coarse step's velocity to the plain one. Visible: share of the forecast's error that "
        "pooling keeps, all that a call on large patches could mend.",
        "",
        "| scale | sigma | " + " | ".join(forms) + " | visible | variance of the plain velocity |",
        "|---" * (len(forms) + 4) + "|",
    ]
    for scale in sorted({row["scale"] for row in rows}):
        for sigma in sorted({row["sigma"] for row in rows}, reverse=True):
            cells = {r["form"]: r for r in rows if r["scale"] == scale and r["sigma"] == sigma}
            errors = " | ".join(f"{cells[name]['error']:.3f}" if name in cells else "" for name in forms)
            variance = next(iter(cells.values()))["velocity_variance"]
            visible = f"{cells['forecast']['visible']:.0%}"
            lines.append(f"| {scale} | {sigma:.2f} | {errors} | {visible} | {variance:.2f} |")
    return "\n".join(lines) + "\n"
