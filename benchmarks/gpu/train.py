"""Stages ``train-...``: the yardstick's training within the time, and what it made in files small enough to carry."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import pack, progress, stem, unpack
from benchmarks.gpu.record import Record

MINUTES = {
    "image": ("pictures=40000", "vae_steps=5000", "low_steps=7000", "high_steps=9000", "distil_steps=1000"),
    "video": ("clips=10000", "vae_steps=4000", "low_steps=7000", "high_steps=9000"),
    "judge": ("pictures=20000", "clips=4000"),
}
"""Settings for a training of some eight minutes: about half of those that a GPU has by default."""
_FLOW = ("vae_steps=1", "text_steps=1", "low_steps=1", "high_steps=1", "batch=1", "low_mix=[1,0,0]", "high_mix=[1,0,0]")
TINY = {
    "image": (*_FLOW, "distil_steps=1", "pictures=8", "workers=1"),
    "video": (*_FLOW, "clips=8", "workers=1"),
    "judge": ("steps=1", "batch=4", "pictures=8", "clips=8", "workers=1"),
}
DONE = {"image": "model", "video": "model", "judge": "judge.safetensors"}
"""What is there when a training is at its end."""
MARGIN = 20.0
"""Seconds for what is done after the training has stopped."""
EVERY = 45.0
"""Seconds between two copies of what there is."""


def train(
    kind: str,
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
        kind: What is trained: image, video or judge.
        work: Folder of the runs and their drawings; does not come back.
        out: Gets the parts (`benchmarks.gpu.parts`).
        checkpoint: Folder of parts or of a run; counts only where ``work`` is new.
        settings: ``NAME=NUMBER`` of the yardstick's settings, after `MINUTES` or `TINY`.
    """
    run = work / kind
    if checkpoint is not None and not (run / "settings.json").exists():
        _start(checkpoint, run)
    run.mkdir(parents=True, exist_ok=True)
    log = run / "train.log"
    changes = dict(pair.split("=", 1) for pair in (*(TINY if tiny else MINUTES)[kind], *settings))
    seconds = max(record.budget.left - MARGIN, 1.0)
    command = [sys.executable, "-m", "benchmarks.yardstick", f"train-{kind}", "--out", str(work), "--device", device]
    command += ["--seconds", f"{seconds:.0f}", "--set", *(f"{name}={value}" for name, value in changes.items())]
    record.values["settings"] = changes
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=_environment())
    try:
        _watch(process, record, run, out)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        record.values["log"] = log.read_text()[-2000:]
        _keep(record, run, out)
    if process.returncode:
        raise RuntimeError(f"training ended with {process.returncode}: {log.read_text()[-500:]}")
    if not (run / DONE[kind]).exists():
        record.left_out["rest"] = "out of time; the same command goes on, elsewhere with --checkpoint"


def _start(checkpoint: Path, run: Path) -> None:
    """Fill a run's folder from its parts, or from the run of its name by way of parts; what has neither begins anew."""
    kinds = [kind for kind in DONE if (checkpoint / kind).is_dir() or list(checkpoint.glob(f"train-{kind}.tar.[0-9]"))]
    if not kinds:
        raise FileNotFoundError(f"{checkpoint} has neither a run of {', '.join(DONE)} nor parts of one")
    made = checkpoint
    if (checkpoint / run.name).is_dir():
        made = run.with_name(f"{run.name}.start")
        pack(checkpoint / run.name, made)
    if list(made.glob(f"{stem(run)}.[0-9]")):
        unpack(made, run)


def _environment() -> dict[str, str]:
    """Progress bars of a log would be all of it."""
    return {**os.environ, "TERM": "dumb", "PYTHONUNBUFFERED": "1"}


def _watch(process: Any, record: Record, run: Path, out: Path) -> None:
    """Until the training ends, put away what there is every so often."""
    kept = time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        if time.monotonic() - kept > EVERY:
            _keep(record, run, out)
            kept = time.monotonic()


def _keep(record: Record, run: Path, out: Path) -> None:
    record.values["files"] = {path.name: path.stat().st_size for path in pack(run, out)}
    record.put("progress", progress(run))
