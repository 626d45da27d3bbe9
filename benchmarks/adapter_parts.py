"""What each part of an adapter is worth: trainings that differ in one part alone, on the same samples.

    python -m benchmarks.adapter_parts --samples runs/adapter/samples

The samples are those that an earlier ``ddit train --out runs/adapter`` drew. Every training begins anew. Told is its
error on samples kept apart, the mean over noise levels, for each scale. A training that is done is not done again.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from ddit.cli.common import environment
from ddit.train.config import TrainConfig
from ddit.train.trainer import train
from ddit.util.files import write_json

PARTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "without LoRA": {"rank": 0},
    "without the residual path": {"residual": False},
    "without the patch-size vector": {"size_vector": False},
    "the paper's start": {"start": "bilinear"},
}
"""Name -> what differs from the defaults of `TrainConfig`."""


def errors(folder: Path) -> dict[str, dict[str, float]]:
    """Scale -> its last validation's errors, ``error`` of the adapter and ``training_free`` without: mean squares."""
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    by_scale: dict[str, list[dict[str, float]]] = defaultdict(list)
    for row in rows:
        if row["step"] == rows[-1]["step"]:
            by_scale[f"{row['scale']}p"].append(row)
    return {
        scale: {name: mean(row[name] for row in rows) for name in ("error", "training_free")}
        for scale, rows in by_scale.items()
    }


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--samples", required=True)
    command.add_argument("--model", default="embedded")
    command.add_argument("--steps", type=int, default=600)
    command.add_argument("--batch", type=int, default=64)
    command.add_argument("--runs", type=Path, default=Path("runs/adapter-parts"))
    command.add_argument("--out", type=Path, default=Path("docs/results/adapter-parts.json"))
    args = command.parse_args()
    told: dict[str, Any] = {
        "command": f"python -m benchmarks.adapter_parts --steps {args.steps} --batch {args.batch}",
        "environment": environment("cpu"),
    }
    for name, change in PARTS.items():
        folder = args.runs / name.replace(" ", "-").replace("'", "")
        settings = {"steps": args.steps, "batch": args.batch, "validation": 32, "pictures": 0, **change}
        settings |= {"dtype": "bfloat16", "mixed_precision": "bf16", "lr_schedule": "cosine", "lr_warmup": 50}
        settings |= {"checkpoint_every": args.steps, "validate_every": args.steps, "min_sigma": (0.4, 0.7)}
        train(TrainConfig(model=args.model, samples=args.samples, out=str(folder), **settings))
        told[name] = errors(folder)
        write_json(args.out, told)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
