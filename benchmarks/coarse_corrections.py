"""Would coarse answers that correct forecasts pay? Told along plain runs, where they are at their best.

    python -m benchmarks.coarse_corrections

A forecast follows a line through the answers of the last two called steps. A coarse answer in the same step, less its
own line, tells a part of what that forecast is off by. Told is the share of the squared error that this removes with
the best factor for every noise level, beside the share that the same work removes as more calls.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddit.adapter import PatchAdapter
from ddit.cli.common import environment
from ddit.coarse import coarse_step
from ddit.eval.step_errors import passes
from ddit.eval.suites import subject_of
from ddit.models import architecture_for
from ddit.pipelines.generate import call_settings, recorded, run
from ddit.pipelines.known import cost_ratios
from ddit.pipelines.loading import load_adapter, load_pipeline
from ddit.skip.forecast import Line, Reference, half_log_snr
from ddit.util.files import write_json

COSTS = {"embedded": "flux.1-dev", "embedded-video": "wan2.1-1.3b"}
"""Model -> the one at whose costs work is told."""
SCALES = (2, 4)
GAPS = (2, 3, 4, 5, 6)
"""Steps from one call to the next. The first is there to tell what more calls would remove."""

Moments = dict[tuple[int, int], dict[int, np.ndarray]]
"""Gap and scale -> step -> mean of e², e d and d²: e is what a forecast is off by, d what the coarse answer adds."""


@torch.no_grad()
def moments(pipe: Any, prompts: Sequence[str], settings: dict[str, Any], adapter: PatchAdapter) -> Moments:
    """Of the first guidance pass of plain runs of some prompts."""
    architecture = architecture_for(pipe.transformer)
    with recorded(pipe) as calls:
        run(pipe, list(prompts), [*range(len(prompts))], settings)
    steps = [step[0] for step in passes(architecture, calls)]
    sigmas = [noisy.sigma.float() for _, noisy, _ in steps]
    latents = [noisy.latents.float() for _, noisy, _ in steps]
    full = [answer for _, _, answer in steps]
    forward = pipe.transformer.forward
    variance = {scale: torch.tensor(adapter.detail_variance[scale]) for scale in SCALES}
    levels = [half_log_snr(sigma) for sigma in sigmas]
    found: Moments = defaultdict(dict)
    with adapter.attach(pipe.transformer):
        coarse = {
            scale: [
                coarse_step(
                    architecture,
                    forward,
                    inputs,
                    noisy,
                    scale,
                    adapter.coarse,
                    variance=variance[scale],
                    adapter=adapter,
                )
                for inputs, noisy, _ in steps
            ]
            for scale in SCALES
        }
    for gap in GAPS:
        for i in range(2 * gap, len(steps)):
            parts: dict[int, list[np.ndarray]] = defaultdict(list)
            for last in range(i - gap + 1, i):
                before = last - gap
                line = Reference.after(latents[before], sigmas[before], full[before])
                line = Reference.after(latents[last], sigmas[last], full[last], line)
                off = line.forecast(latents[i], sigmas[i]) - full[i]
                for scale, answers in coarse.items():
                    own = Line.through(answers[before], levels[before])
                    added = answers[i] - Line.through(answers[last], levels[last], own).at(levels[i])
                    products = off * off, off * added, added * added
                    parts[scale].append(np.array([float(product.mean()) for product in products]))
            for scale, values in parts.items():
                found[gap, scale][i] = np.mean(values, axis=0)
    return found


def shares(found: Sequence[Moments], costs: dict[int, float]) -> list[dict[str, Any]]:
    """What corrections remove at the best, and what the same work removes as more calls, for each gap."""
    sums = {
        key: {i: np.sum([batch[key][i] for batch in found], axis=0) for i in steps} for key, steps in found[0].items()
    }
    common = range(2 * max(GAPS), 1 + max(sums[GAPS[0], SCALES[0]]))
    errors = [sum(sums[gap, SCALES[0]][i][0] for i in common) for gap in GAPS]
    told = []
    for gap, error in list(zip(GAPS, errors, strict=True))[1:]:
        row: dict[str, Any] = {"steps from call to call": gap, "times less work": float(gap)}
        for scale in SCALES:
            work = 1 / gap + costs[scale]
            more = np.exp(np.interp(np.log(1 / work), np.log(GAPS), np.log(errors)))
            removed = sum(both**2 / own for _, both, own in (sums[gap, scale][i] for i in common))
            row[f"removed at {scale}p"] = removed / error
            row[f"removed by more calls of the work of {scale}p"] = 1 - more / error
        told.append(row)
    return told


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--prompts", type=int, default=16)
    command.add_argument("--batch", type=int, default=16)
    command.add_argument("--dtype", default="bfloat16")
    command.add_argument("--out", type=Path, default=Path("docs/results/coarse-corrections.json"))
    args = command.parse_args()
    told: dict[str, Any] = {
        "command": f"python -m benchmarks.coarse_corrections --prompts {args.prompts} --dtype {args.dtype}",
        "environment": environment("cpu"),
    }
    for model, real in COSTS.items():
        pipe, preset = load_pipeline(model, dtype=args.dtype)
        adapter = load_adapter(model, dtype=args.dtype)
        prompts = [asked.prompt for asked in subject_of(pipe).prompts("tune", args.prompts, 7)]
        batches = [prompts[i : i + args.batch] for i in range(0, len(prompts), args.batch)]
        found = [moments(pipe, batch, call_settings(preset), adapter) for batch in batches]
        told[model] = {"costs of": real, "gaps": shares(found, dict(cost_ratios(real)))}
    write_json(args.out, told)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
