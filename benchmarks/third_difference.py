"""Does the rule's statistic know which pictures lose by large patches? Rank correlations over prompts.

    python -m benchmarks.third_difference

Prompts of the tuning split are drawn plain, and with large patches wherever the adapter serves them. A picture's loss
is its squared distance to the plain one. Told is how its rank among the pictures goes with that of the statistic, in
parts of the plain run (what deciding from full steps would see) and of the run with large patches (what the rule sees).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from ddit.cli.common import environment
from ddit.config import PatchSchedule
from ddit.eval.subjects import Pictures
from ddit.pipelines.generate import Method, call_settings, run
from ddit.pipelines.loading import load_adapter, load_pipeline
from ddit.util.files import write_json

PARTS = 4
"""Of a run, its steps in order."""


def ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each of N numbers."""
    return np.argsort(np.argsort(values))


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, of numbers that all differ."""
    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def interval(one: np.ndarray, other: np.ndarray, draws: int = 2000) -> list[float]:
    """Of 95 %, by the bootstrap."""
    rng = np.random.default_rng(0)
    picks = rng.integers(len(one), size=(draws, len(one)))
    return np.percentile([np.corrcoef(ranks(one[p]), ranks(other[p]))[0, 1] for p in picks], [2.5, 97.5]).tolist()


def settled(scales: list[list[int]], order: int) -> np.ndarray:
    """Steps before which all steps in the difference were of one size for every sample ``[steps]``."""
    rows = np.array(scales).T
    return np.array([i > order and bool((rows[i - order : i] == rows[i - 1]).all()) for i in range(len(rows))])


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--prompts", type=int, default=128)
    command.add_argument("--batch", type=int, default=32)
    command.add_argument("--dtype", default="bfloat16")
    command.add_argument("--out", type=Path, default=Path("docs/results/third-difference.json"))
    args = command.parse_args()
    pipe, preset = load_pipeline("embedded", dtype=args.dtype)
    prompts = [asked.prompt for asked in Pictures().prompts("tune", args.prompts, 7)]
    watching = PatchSchedule(threshold=0.0)
    methods = {
        "plain": Method(patches=watching),
        "large patches": Method(patches=PatchSchedule(threshold=1e9), adapter=load_adapter("embedded")),
    }
    pictures: dict[str, np.ndarray] = {}
    seen: dict[str, np.ndarray] = {}
    told: dict[str, Any] = {
        "command": f"python -m benchmarks.third_difference --prompts {args.prompts} --dtype {args.dtype}",
        "environment": environment("cpu"),
    }
    usable = None
    for name, method in methods.items():
        drawn = [
            run(pipe, prompts[i : i + args.batch], [*range(i, i + args.batch)], call_settings(preset), method=method)
            for i in range(0, len(prompts), args.batch)
        ]
        pictures[name] = np.concatenate([part.pictures for part in drawn])
        reports = [part.report for part in drawn if part.report is not None]
        rows = [[[sample.get(2, np.nan) for sample in step.statistics] for step in report.steps] for report in reports]
        seen[name] = np.concatenate([np.array(part).T for part in rows])
        usable = settled([scales for report in reports for scales in report.scales], watching.order)
        loss = np.square(pictures[name] - pictures["plain"]).mean((1, 2, 3))
        told[name] = {"steps": usable.tolist()}
    for name, statistics in seen.items():
        parts = []
        for steps in np.array_split(np.arange(statistics.shape[1]), PARTS):
            chosen = [i for i in steps if told[name]["steps"][i]]
            values = np.log(statistics[:, chosen]).mean(1)
            parts.append(
                {
                    "steps": [int(chosen[0]), int(chosen[-1])],
                    "rank correlation": rank_correlation(values, loss),
                    "interval": interval(values, loss),
                }
            )
        told[name] = parts
    write_json(args.out, told)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
