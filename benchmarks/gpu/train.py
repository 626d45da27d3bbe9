"""Stage ``train-image``: the yardstick's training within the time, and what it made in files small enough to carry."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import STEM, pack, progress, unpack
from benchmarks.gpu.record import Record

MINUTES = ("pictures=40000", "vae_steps=5000", "low_steps=7000", "high_steps=9000", "distil_steps=1000")
"""Settings for a training of some eight minutes: about half of those that a GPU has by default."""
TINY = (
    *(f"{name}=1" for name in ("vae_steps", "text_steps", "low_steps", "high_steps", "distil_steps", "judge_steps")),
    *("batch=1", "pictures=8", "workers=1", "low_mix=[1,0,0]", "high_mix=[1,0,0]"),
)
MARGIN = 20.0
"""Seconds for what is done after the training has stopped."""
EVERY = 45.0
"""Seconds between two copies of what there is."""


def train_image(
    record: Record,
    *,
    work: Path,
    out: Path,
    device: str,
    tiny: bool = False,
    checkpoint: Path | None = None,
    settings: Sequence[str] = (),
) -> None:
    """Train from the checkpoint on, or from what lies in ``work``.

    Args:
        work: Folder of the run; does not come back.
        out: Gets the parts (`benchmarks.gpu.parts`).
        checkpoint: Folder of parts or of a run; counts only where ``work`` is new.
        settings: ``NAME=NUMBER`` of the yardstick's settings, after `MINUTES` or `TINY`.
    """
    if checkpoint is not None and not (work / "settings.json").exists():
        _start(checkpoint, work)
    work.mkdir(parents=True, exist_ok=True)
    log = work / "train.log"
    changes = dict(pair.split("=", 1) for pair in (*(TINY if tiny else MINUTES), *settings))
    seconds = max(record.budget.left - MARGIN, 1.0)
    command = [sys.executable, "-m", "benchmarks.yardstick", "train-image", "--out", str(work), "--device", device]
    command += ["--seconds", f"{seconds:.0f}", "--set", *(f"{name}={value}" for name, value in changes.items())]
    record.values["settings"] = changes
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=_environment())
    try:
        _watch(process, record, work, out)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        record.values["log"] = log.read_text()[-2000:]
        _keep(record, work, out)
    if process.returncode:
        raise RuntimeError(f"training ended with {process.returncode}: {log.read_text()[-500:]}")
    if not (work / "judge.safetensors").exists():
        record.left_out["rest"] = "out of time; the same command goes on, elsewhere with --checkpoint"


def _start(checkpoint: Path, work: Path) -> None:
    """Fill a run's folder from parts, or from another run by way of parts."""
    if list(checkpoint.glob(f"{STEM}.[0-9]")):
        unpack(checkpoint, work)
        return
    made = work.with_name(work.name + ".start")
    pack(checkpoint, made)
    unpack(made, work)


def _environment() -> dict[str, str]:
    """Progress bars of a log would be all of it."""
    return {**os.environ, "TERM": "dumb", "PYTHONUNBUFFERED": "1"}


def _watch(process: Any, record: Record, work: Path, out: Path) -> None:
    """Until the training ends, put away what there is every so often."""
    kept = time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        if time.monotonic() - kept > EVERY:
            _keep(record, work, out)
            kept = time.monotonic()


def _keep(record: Record, work: Path, out: Path) -> None:
    record.values["files"] = {path.name: path.stat().st_size for path in pack(work, out)}
    record.put("progress", progress(work))
