"""The paper's table: methods on prompts of the field, judged by the field's judges. Nothing is judged twice."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddit.eval import vbench
from ddit.eval.drawings import Drawings
from ddit.eval.imagereward import ImageReward
from ddit.eval.judges import Clip, Inception, Judge, Lpips, Psnr, Ssim, distance_to
from ddit.eval.metrics import FrechetTo, bootstrap_difference, bootstrap_interval, corrected_difference
from ddit.eval.parts import digest
from ddit.eval.quality import Entry
from ddit.pipelines.outputs import frames
from ddit.util.extras import require
from ddit.util.files import add_lines, read_lines, write_text
from ddit.util.progress import progress
from ddit.util.tables import table
from ddit.util.tell import warn

METHODS = ("plain", "ddit", "ddit:speedup=3")
"""Unless others are named."""
TOGETHER = 16
"""Pictures that a judge sees at once."""
RESAMPLED = 100
"""Draws for an interval of FID: each takes seconds."""
HEADS = {
    "fid": "FID",
    "clip": "CLIP",
    "imagereward": "ImageReward",
    "lpips": "LPIPS",
    "ssim": "SSIM",
    "psnr": "PSNR, dB",
    **{name: name.replace("_", " ") for name in vbench.DIMENSIONS},
}
"""Measure -> its column."""
LIKENESS = ("lpips", "ssim", "psnr")
DIGITS = {"fid": 2, "clip": 4, "psnr": 1}
"""After the point, where they are not 3."""

Said = dict[str, Tensor]
"""Measure -> its figure of every prompt, ``[N]``; of FID features ``[N, D]``."""


JUDGES: dict[str, type[Judge]] = {kind.name: kind for kind in (Inception, Clip, ImageReward, Lpips, Ssim, Psnr)}
"""Name -> kind."""
OF_PICTURES = ("fid", "imagereward")
"""Judges that know no clips."""


@dataclass(frozen=True)
class Jury:
    """All that judge one run."""

    judges: Sequence[Judge]
    fid: FrechetTo | None
    vbench: str | None
    """Its command."""

    def check(self, count: int, *, video: bool) -> None:
        """Refuse judges that can't judge what is drawn; warn of an FID of so few pictures."""
        names = [j.name for j in self.judges]
        strange = [name for name in names if name in OF_PICTURES] if video else [vbench.NAME] if self.vbench else []
        if strange:
            rest = [name for name in (*names, *([vbench.NAME] if video else [])) if name not in strange]
            made = "clips" if video else "pictures"
            raise ValueError(f"{', '.join(strange)} can't judge {made}; name others: --judges {' '.join(rest)}")
        if self.fid is not None and count < 2:
            raise ValueError(
                "FID is a distance of many pictures, and there is one; give more prompts, or other --judges"
            )
        if self.fid is not None and count <= len(self.fid.mean):
            warn(
                f"FID of {count} pictures is far above that of many: compare it within this table alone, or draw more "
                f"than {len(self.fid.mean)}"
            )


def jury(names: Sequence[str], sources: Mapping[str, str], reference: Path | None, *, device: str, kept: Path) -> Jury:
    """Load the judges; without names all those of pictures, FID where there is a reference.

    Args:
        sources: Name -> folder, file, hub id or (VBench) command to use in place of the default.
        reference: As for `distance_to`.
        kept: Folder for what is worked out of the reference.

    Raises:
        ValueError: When packages, weights or the reference are missing.
    """
    names = names or [name for name in JUDGES if name != "fid" or reference is not None]
    idle = sorted(set(sources) - set(names))
    if idle:
        raise ValueError(f"--weights {idle[0]}=... would have no effect; {idle[0]} does not judge here (--judges)")
    if ("fid" in names) != (reference is not None):
        raise ValueError(
            "the judge fid needs --reference, a folder of pictures or a .npz, which serves no other; give both or none"
        )
    if "lpips" in names:
        require("torchmetrics", "the judge lpips")
    command = vbench.command(sources.get(vbench.NAME, vbench.NAME)) if vbench.NAME in names else None
    judges = [_load(kind, sources.get(name, kind.weights)) for name, kind in JUDGES.items() if name in names]
    inception = [j for j in judges if isinstance(j, Inception)]
    fid = distance_to(reference, inception[0], device, kept) if reference is not None else None
    return Jury(judges, fid, command)


def _load(kind: type[Judge], source: str) -> Judge:
    """A judge on the CPU."""
    try:
        judge = kind.load(source).eval().requires_grad_(False)
    except Exception as error:  # Missing files, no network, other weights: libraries raise what they meet.
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(
            f"weights of the judge {kind.name} can't be loaded from {source} ({reason}); name what holds them with "
            f"--weights {kind.name}=PATH, or leave it out of --judges"
        ) from error
    judge.mark = digest(judge)[:8] if kind.weights else ""
    return judge


@torch.no_grad()
def judge(jury: Jury, drawings: Sequence[Drawings], batch: int, device: str) -> None:
    """Let every judge say of every picture what it has not said yet: a line each in ``NAME-....jsonl`` beside it.

    Of a clip it is the mean over frames. The first drawings are what likeness is to.
    """
    first = drawings[0]

    @lru_cache(maxsize=2 * batch)
    def picture(drawn: Drawings, number: int) -> np.ndarray:
        return drawn.picture(number)

    count = len(first.prompts)
    starts = range(0, count, batch)
    judges = [j.to(device) for j in jury.judges]
    with progress("judge", len(drawings) * len(starts)) as advance:
        for drawn in drawings:
            todo = {said_path(j, drawn, first): j for j in judges if not _itself(j, drawn, first)}
            said = {path: len(read_lines(path)) for path in todo}
            for start in starts:
                for path, j in todo.items():
                    part = range(max(start, said[path]), min(start + batch, count))
                    if part:
                        shown, plain = (np.stack([picture(d, i) for i in part]) for d in (drawn, first))
                        values = _values(j, shown, [first.prompts[i] for i in part], plain).tolist()
                        add_lines(path, [{"number": i, j.name: v} for i, v in zip(part, values, strict=True)])
                advance()
            if jury.vbench is not None:
                vbench.judge(jury.vbench, drawn)


def said_path(judge: Judge, drawn: Drawings, first: Drawings) -> Path:
    """Where a judge's word on drawings is kept: other weights, or something else to be like, have another file."""
    parts = [judge.name, judge.mark, f"to-{first.folder.name}" if judge.likeness else ""]
    return drawn.folder / f"{'-'.join(filter(None, parts))}.jsonl"


def _itself(judge: Judge, drawn: Drawings, first: Drawings) -> bool:
    return judge.likeness and drawn is first


def _values(judge: Judge, drawn: np.ndarray, prompts: Sequence[str], plain: np.ndarray) -> Tensor:
    """``[B]`` or ``[B, D]``."""
    shown, like = frames(drawn), frames(plain)
    each = len(shown) // len(drawn)
    texts = [prompt for prompt in prompts for _ in range(each)]
    parts = [slice(i, i + TOGETHER) for i in range(0, len(shown), TOGETHER)]
    values = torch.cat([judge(shown[part], texts[part], like[part]) for part in parts]).float().cpu()
    return values.reshape(len(drawn), each, *values.shape[1:]).mean(1)


def collect(jury: Jury, drawn: Drawings, first: Drawings) -> Said:
    """All that the jury said of a method's drawings."""
    count = len(drawn.prompts)
    said = {}
    for j in jury.judges:
        if not _itself(j, drawn, first):
            said[j.name] = torch.tensor([line[j.name] for line in read_lines(said_path(j, drawn, first))[:count]])
    if jury.vbench is not None:
        lines = vbench.said(drawn)[:count]
        said |= {name: torch.tensor([line[name] for line in lines]) for name in vbench.DIMENSIONS}
    return said


def summarise(
    methods: Sequence[Entry], drawings: Sequence[Drawings], said: Sequence[Said], distance: FrechetTo | None
) -> list[dict[str, Any]]:
    """A row of figures per method, with 95 % intervals over prompts; the first is what others are compared with."""
    count = len(drawings[0].prompts)
    times = [torch.tensor([record["seconds"] for record in d.records[:count]]) for d in drawings]
    rows = []
    for entry, drawn, own, words in zip(methods, drawings, times, said, strict=True):
        both = _by_call(drawn.records[:count], torch.stack([times[0], own], 1))
        row: dict[str, Any] = {
            "method": entry.name,
            "run_steps": entry.run_steps,
            "seconds": float(own.mean()),
            "speedup": float(_ratio(both)),
            "speedup_interval": bootstrap_interval(both, _ratio) if len(both) > 1 else None,
            "flops_fraction": statistics.fmean(record["flops_fraction"] for record in drawn.records[:count]),
        }
        for name, values in words.items():
            base = None if name in LIKENESS or drawn is drawings[0] else said[0][name]
            row |= _figures(name, values, base, distance)
        rows.append(row)
    return rows


def _by_call(records: Sequence[Mapping[str, Any]], times: Tensor) -> Tensor:
    """Sums ``[calls, ...]`` of times ``[N, ...]``: pictures of one call share its time, and say nothing each."""
    starts = [i for i, record in enumerate(records) if record.get("call", i) == i]
    sizes = [after - before for before, after in pairwise([*starts, len(records)])]
    return torch.stack([part.sum(0) for part in times.split(sizes)])


def _ratio(times: Tensor) -> Tensor:
    return times[:, 0].sum() / times[:, 1].sum()


def _figures(name: str, values: Tensor, base: Tensor | None, distance: FrechetTo | None) -> dict[str, Any]:
    """A measure, and its change against ``base``."""
    if values.ndim == 2:
        assert distance is not None, "features are judged by it"

        def apart(features: Tensor) -> Tensor:
            return distance(features.to(distance.mean.device)).cpu()

        row: dict[str, Any] = {name: float(apart(values))}
        if base is not None:
            change, interval = corrected_difference(values, base, apart, samples=RESAMPLED)
            row |= {f"{name}_change": change, f"{name}_change_interval": interval}
        return row
    several = len(values) > 1  # one alone tells nothing of how far others lie
    row = {name: float(values.mean()), f"{name}_interval": bootstrap_interval(values) if several else None}
    if base is not None:
        row[f"{name}_change"] = float((values - base).mean())
        row[f"{name}_change_interval"] = bootstrap_difference(values, base) if several else None
    return row


def markdown(rows: Sequence[dict[str, Any]], prompts: int, sources: Mapping[str, str], costs: str | None = None) -> str:
    """The rows as the paper's table, and below it what each judge was loaded from.

    Args:
        costs: Name of the model at whose costs work is told; by default the model's own.
    """
    shown = [name for name in HEADS if any(name in row for row in rows)]
    text = (
        f"{prompts} prompts. Speed is wall-clock, relative to the first row. In brackets are 95 % intervals: with a "
        "sign, of the change against the first row on the same prompts (a change is measured where they leave out 0)."
    )
    text += f" Work is that of {costs} in as many steps of each kind.\n\n" if costs else "\n\n"
    lines = []
    for row in rows:
        work = row["flops_fraction"] * row["run_steps"] / rows[0]["run_steps"]
        speed, within = f"{row['speedup']:.2f}x", row["speedup_interval"]
        if within is not None and row is not rows[0]:
            speed += f" ({within[0]:.2f} to {within[1]:.2f})"
        cells = [row["method"], row["run_steps"], f"{row['seconds']:.2f}", speed, f"{work:.0%}"]
        lines.append([*cells, *(_cell(row, name) for name in shown)])
    loaded = ", ".join(f"{HEADS[name]} {source}" for name, source in sources.items())
    told = table(
        ["method", "steps", "s", "speed", "work" if costs else "FLOPs", *(HEADS[name] for name in shown)], lines
    )
    return text + told + (f"\nWeights of the judges: {loaded}.\n" if loaded else "")


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    digits, sign = DIGITS.get(name, 3), "+" if f"{name}_change_interval" in row else ""
    interval = row.get(f"{name}_change_interval", row.get(f"{name}_interval"))
    within = "" if interval is None else f" ({interval[0]:{sign}.{digits}f} to {interval[1]:{sign}.{digits}f})"
    return f"{row[name]:.{digits}f}{within}"


def write_each(path: Path, methods: Sequence[Entry], drawings: Sequence[Drawings], said: Sequence[Said]) -> None:
    """JSONL: a line per method and prompt with all that was measured of it."""
    lines = []
    for entry, drawn, words in zip(methods, drawings, said, strict=True):
        single = {name: values.tolist() for name, values in words.items() if values.ndim == 1}
        for i in range(len(drawn.prompts)):
            figures = {name: values[i] for name, values in single.items()}
            lines.append(json.dumps({"method": entry.name, **drawn.records[i], **figures}))
    write_text(path, "\n".join(lines) + "\n")
