"""What the first step of a run costs beside a plain one, on a FLUX of FLUX.1-dev's depth (19 + 38 blocks) made narrow.

    python -m benchmarks.first_step --out docs/results/first-step.json

Forms by turns, medians; the machine must be idle. Time in which nothing runs in the model shows most on a narrow model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

import ddit
from ddit.cli.common import environment
from ddit.handle import Handle
from ddit.models import architecture_for


def narrow_flux() -> FluxTransformer2DModel:
    """57 blocks of width 128."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    ).eval()


@torch.no_grad()
def first_steps(repeats: int) -> dict[str, Any]:
    """Seconds of the first call of a run: plain, by the rule, and with skipping as well; report included."""
    transformer = narrow_flux()
    call = architecture_for(transformer).example(1, 64, 64, 128)
    forms = {"plain": None, "patches": {}, "patches and skipping": {"skip": ddit.SkipSchedule(threshold=0.01)}}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(repeats + 2):
        for name, settings in forms.items():
            handle: Handle | None = None if settings is None else ddit.apply(transformer, **settings)
            started = time.perf_counter()
            transformer(**call)
            if handle is not None:
                _ = handle.report
            spent = time.perf_counter() - started
            if handle is not None:
                handle.remove()
            if turn > 1:
                seconds[name].append(spent)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": medians, "ratio": {name: value / medians["plain"] for name, value in medians.items()}}


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("--repeats", type=int, default=15)
    command.add_argument("--out", type=Path)
    args = command.parse_args()
    figures = {"environment": environment("cpu"), "repeats": args.repeats, **first_steps(args.repeats)}
    print(json.dumps(figures, indent=1))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
