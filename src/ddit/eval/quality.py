"""Methods side by side on held-out prompts: adherence, likeness to drawings and to plain, work and time."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddit.adapter import PatchAdapter
from ddit.config import ScheduleConfig
from ddit.embedded.data import drawings
from ddit.embedded.detector import Detector, judge
from ddit.embedded.scenes import Scene, Split, scenes
from ddit.eval.metrics import bootstrap_difference, bootstrap_interval, frechet_distance, psnr, ssim
from ddit.eval.parts import Part, Parts
from ddit.generate import Run, run
from ddit.preset import Preset
from ddit.progress import progress

Adapters = Callable[[str | None], PatchAdapter | None]


@dataclass(frozen=True)
class Method:
    """A way to draw a prompt, as named on the command line."""

    name: str
    run_steps: int
    config: ScheduleConfig | None
    """``None`` is the untouched pipeline."""
    adapter: PatchAdapter | None = None


def parse_method(text: str, run_steps: int, preset: Preset, adapters: Adapters) -> Method:
    """Read ``POLICY:field=value,...``: ``plain``, ``plain:run_steps=20``, ``dynamic:threshold=0.01,scales=1/2``.

    Fields are those of `ScheduleConfig`, ``run_steps``, the number of denoising steps, and ``adapter``, a folder or
    ``none``. Lists are joined by ``/``.

    Args:
        adapters: Loads an adapter by name; called with ``None`` where the method names no adapter.
    """
    policy, _, rest = text.partition(":")
    values: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r} in method {text!r} is not field=value")
        values[key] = value if key == "adapter" else _value(value)
    run_steps = values.pop("run_steps", run_steps)
    if not isinstance(run_steps, int) or run_steps < 1:
        raise ValueError(f"run_steps is {run_steps!r} in method {text!r}; it must be a whole number above 0")
    if policy == "plain":
        if values:
            raise ValueError(f"method {text!r}: plain takes run_steps only")
        return Method(text, run_steps, None)
    lists = {f.name for f in fields(ScheduleConfig) if f.name in ("scales", "steps")}
    adapter = adapters(values.pop("adapter", None))
    values = {k: [v] if k in lists and isinstance(v, int) else v for k, v in values.items()}
    config = ScheduleConfig.from_dict({**preset.schedule, "policy": policy, **values})
    return Method(text, run_steps, config, adapter)


def _value(text: str) -> Any:
    if "/" in text:
        return [_value(part) for part in text.split("/")]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


Results = list[Part]
"""Everything one method drew, a part per batch."""


def draw_all(
    pipe: Any,
    preset: Preset,
    methods: Sequence[Method],
    asked: Sequence[Scene],
    settings: dict[str, Any],
    *,
    batch: int,
    seed: int,
    parts: Parts | None = None,
) -> list[Results]:
    """Run every method on every prompt; for each batch of prompts the methods take turns in rotating order.

    Args:
        parts: Finished batches are taken from here, and kept here.
    """
    results: list[Results] = [[] for _ in methods]
    prompts = [scene.prompt for scene in asked]
    seeds = [seed * 1_000_003 + i for i in range(len(prompts))]

    def call(method: Method, part: slice, steps: int) -> Run:
        chosen = {**settings, "num_inference_steps": steps}
        return run(
            pipe, prompts[part], seeds[part], chosen, config=method.config, preset=preset, adapter=method.adapter
        )

    warm = False
    starts = range(0, len(prompts), batch)
    with progress("evaluate", len(starts) * len(methods)) as advance:
        for turn, start in enumerate(starts):
            drawn = parts.load(turn) if parts else None
            if drawn is None:
                for method in [] if warm else methods:
                    call(method, slice(0, batch), 5)
                warm, new = True, {}
                for k in range(len(methods)):
                    i = (k + turn) % len(methods)
                    new[i] = Part.of(call(methods[i], slice(start, start + batch), methods[i].run_steps))
                    advance()
                drawn = [new[i] for i in range(len(methods))]
                if parts:
                    parts.save(turn, drawn)
            else:
                for _ in drawn:
                    advance()
            for result, part in zip(results, drawn, strict=True):
                result.append(part)
    return results


def stacked(results: Results) -> Tensor:
    """All pictures ``[N, 3, H, W]`` in [0, 1]."""
    return torch.from_numpy(np.concatenate([part.pictures for part in results])).permute(0, 3, 1, 2).float() / 255


def summarise(
    methods: Sequence[Method],
    results: Sequence[Results],
    asked: Sequence[Scene],
    detector: Detector,
    split: Split,
) -> list[dict[str, Any]]:
    """One row of figures per method; the first method is the one others are compared with.

    Adherence is the mean over a prompt's attributes of what the judge finds right, then over prompts, with bootstrap
    intervals over prompts. The Fréchet distance is to ten drawings per prompt, from the judge's features.
    """
    drawn = torch.cat([_features(detector, x) for x in _drawings(10 * len(asked), split)])
    reference = stacked(results[0])
    base = _verdicts(detector, reference, asked)
    base_features = _features(detector, reference)

    def distance(features: Tensor) -> Tensor:
        return torch.tensor(frechet_distance(features, drawn))

    sizes = [len(part.pictures) for part in results[0]]
    rows = []
    for method, result in zip(methods, results, strict=True):
        pictures = stacked(result)
        verdicts = base if result is results[0] else _verdicts(detector, pictures, asked)
        overall = torch.tensor([statistics.fmean(v.values()) for v in verdicts])
        plain = torch.tensor([statistics.fmean(v.values()) for v in base])
        features = base_features if result is results[0] else _features(detector, pictures)
        ratios = [float(a.seconds / b.seconds) for a, b in zip(results[0], result, strict=True)]
        row: dict[str, Any] = {
            "method": method.name,
            "run_steps": method.run_steps,
            "speedup": statistics.median(ratios),
            "speedup_quartiles": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else None,
            "seconds_per_picture": sum(float(part.seconds) for part in result) / len(asked),
            "adherence": float(overall.mean()),
            "adherence_interval": bootstrap_interval(overall),
            "adherence_change": float((overall - plain).mean()),
            "adherence_change_interval": bootstrap_difference(overall, plain),
            "attributes": _by_attribute(verdicts),
            "frechet": float(distance(features)),
            # The distance of a resampled set is biased; that of the difference on the same prompts is not.
            "frechet_change_interval": bootstrap_difference(features, base_features, distance, samples=200),
            "psnr": float(psnr(pictures, reference).median()),
            "ssim": float(ssim(pictures, reference).mean()),
            "tokens_fraction": float(np.average([part.work[0] for part in result], weights=sizes)),
            "flops_fraction": float(np.average([part.work[1] for part in result], weights=sizes)),
        }
        scales = [sample.tolist() for part in result for sample in part.scales]
        if method.config is not None:
            row["steps_per_scale"] = _steps_per_scale(scales)
            row["fine_steps"] = _fine_steps(scales, asked)
        rows.append(row)
    return rows


def _drawings(count: int, split: Split) -> list[Tensor]:
    """Reference drawings in batches ``[B, 3, H, W]`` in [0, 1]."""
    pictures = np.stack([picture for *_, picture in islice(drawings(99, split), count)])
    return list((torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255).split(100))


@torch.no_grad()
def _features(detector: Detector, pictures: Tensor) -> Tensor:
    return torch.cat([detector.features(part * 2 - 1) for part in pictures.split(100)])


@torch.no_grad()
def _verdicts(detector: Detector, pictures: Tensor, asked: Sequence[Scene]) -> list[dict[str, float]]:
    parts = range(0, len(asked), 100)
    return [v for i in parts for v in judge(detector, pictures[i : i + 100] * 2 - 1, list(asked[i : i + 100]))]


def _by_attribute(verdicts: Sequence[dict[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for verdict in verdicts:
        for name, value in verdict.items():
            values[name].append(value)
    return {name: statistics.fmean(v) for name, v in values.items()}


def _steps_per_scale(samples: Sequence[Sequence[int]]) -> dict[int, float]:
    """Scale -> mean number of steps of a picture."""
    scales = sorted({s for sample in samples for s in sample})
    return {s: statistics.fmean(sample.count(s) for sample in samples) for s in scales}


def _fine_steps(samples: Sequence[Sequence[int]], asked: Sequence[Scene]) -> dict[str, dict[str, Any]]:
    """What a prompt names -> number of steps at scale 1 of such prompts, with its interval."""
    counts: dict[str, list[float]] = defaultdict(list)
    for scene, sample in zip(asked, samples, strict=True):
        textures = {t.texture for t in scene.things if t.texture}
        names = {f"{texture} objects" for texture in textures} | {f"{scene.background} background"}
        if textures == {"plain"} and scene.background == "smooth":
            names.add("nothing textured")
        if textures and "plain" not in textures and scene.background != "smooth":
            names.add("everything textured")
        for name in names:
            counts[name].append(float(sample.count(1)))
    return {
        name: {
            "prompts": len(v),
            "mean": statistics.fmean(v),
            "interval": bootstrap_interval(torch.tensor(v)),
        }
        for name, v in sorted(counts.items())
        if len(v) > 1
    }


def markdown(rows: Sequence[dict[str, Any]], prompts: int) -> str:
    """The rows as a table."""
    lines = [
        f"{prompts} held-out prompts. Speed is wall-clock, relative to the first row, in the same run.",
        "",
        "| method | steps | speed | FLOPs | adherence (95 %) | change, points | Fréchet (change) | PSNR dB | SSIM |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["adherence_interval"]
        worse, better = row["adherence_change_interval"]
        nearer, farther = row["frechet_change_interval"]
        steps = row["run_steps"] / rows[0]["run_steps"]
        lines.append(
            f"| {row['method']} | {row['run_steps']} | {row['speedup']:.2f}x | {row['flops_fraction'] * steps:.0%} "
            f"| {row['adherence']:.1%} ({low:.1%} to {high:.1%}) "
            f"| {100 * row['adherence_change']:+.1f} ({100 * worse:+.1f} to {100 * better:+.1f}) "
            f"| {row['frechet']:.2f} ({nearer:+.2f} to {farther:+.2f}) | {row['psnr']:.1f} | {row['ssim']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def save_grid(path: Path, methods: Sequence[Method], results: Sequence[Results], count: int = 8) -> None:
    """PNG: a row of pictures per method, a column per prompt."""
    from matplotlib.figure import Figure

    columns = min(count, sum(len(part.pictures) for part in results[0]))
    figure = Figure(figsize=(1.4 * columns + 2.4, 1.4 * len(methods)), layout="constrained")
    axes = figure.subplots(len(methods), columns, squeeze=False)
    for row, method, result in zip(axes, methods, results, strict=True):
        for axis, picture in zip(row, np.concatenate([part.pictures for part in result]), strict=False):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(method.name.replace(":", "\n").replace(",", "\n"), fontsize=6, rotation=0, ha="right")
    figure.savefig(path, dpi=110)


def held_out(split: Split, count: int, seed: int = 0) -> list[Scene]:
    """The prompts that methods are tuned or judged on."""
    return list(islice(scenes(1_000 + seed, split), count))
