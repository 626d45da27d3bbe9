"""Stages ``train-...``: the yardstick's trainings within the time; what they made in files small enough to carry."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import pack, progress, stem, unpack
from benchmarks.gpu.record import Record

Chains = Sequence[Sequence[str]]
"""Trainings that go on side by side, each a few that follow each other."""
CHAINS: dict[str, Chains] = {
    "train-image": [["image"]],
    "train-video": [["video"]],
    "train-judge": [["judge"]],
    "train-adapter": [["image-adapter"], ["video-adapter"]],
    "train-together": [["image", "image-adapter"], ["video", "video-adapter"], ["judge"]],
}
"""By stage. The last one fills a card better than one training after the other: small models wait for their kernels."""
DONE = {
    "image": "model",
    "video": "model",
    "judge": "judge.safetensors",
    "image-adapter": "adapter",
    "video-adapter": "adapter",
}
"""What is in the folder of a training that is at its end."""
STEPS = 1_000_000
"""More than the time suffices for: it is the seconds that end a stage."""
SHARES = {
    "image": {"seconds": (0.22, 0.5), "distil_seconds": 0.08},
    "video": {"seconds": (0.2, 0.3, 0.3)},
    "judge": {"judge_seconds": 0.5},
}
"""Shares of a training's time, or of each stage's; what is left draws, and trains autoencoder and text encoders."""
SETTINGS: dict[str, dict[str, Any]] = {
    "image": {
        "pictures": 16_000,
        "batch": [384, 96],
        "vae_steps": 5_000,
        "steps": [STEPS] * 2,
        "distil_steps": STEPS,
    },
    "video": {"clips": 8_000, "vae_steps": 3_000, "steps": [STEPS] * 3, "batch": [384, 96, 64]},
    "judge": {"pictures": 16_000, "clips": 4_000, "batch": 96, "steps": STEPS},
}
"""Of the yardstick, beside its own for a GPU. Compiling would cost a quarter of such a training, and gain less."""
_ADAPTER = {"steps": 4_000, "batch": 64, "count": 1_024, "sample-batch": 128, "validation": 32}
ADAPTERS: dict[str, dict[str, Any]] = {"image-adapter": _ADAPTER, "video-adapter": {**_ADAPTER, "count": 512}}
"""Of ``ddit train``. Its learning rate stays, and what is saved are averages: it may be ended at any time."""


def _tiny(mix: list[list[int]]) -> dict[str, Any]:
    """Settings of a flow whose stages have these shares."""
    ones = [1] * len(mix)
    return {"vae_steps": 1, "text_steps": 1, "workers": 1, "steps": ones, "batch": ones, "mix": mix}


TINY: dict[str, dict[str, Any]] = {
    "image": {**_tiny([[1, 0], [1, 0, 0]]), "distil_steps": 1, "pictures": 8},
    "video": {**_tiny([[1, 0], [1, 0, 0], [1, 0, 0]]), "clips": 8},
    "judge": {"steps": 1, "batch": 4, "pictures": 8, "clips": 8, "workers": 1},
}
_TINY_ADAPTER = {"steps": 1, "batch": 1, "count": 2, "validation": 1, "rank": 2, "sample-steps": 2}
TINY |= dict.fromkeys(ADAPTERS, _TINY_ADAPTER)
MARGIN = 20.0
"""Seconds for what is done after the training has stopped."""
BEFORE_ADAPTER = 0.75
"""Share of the time of a model that an adapter follows."""
JUDGE_WAITS = 0.25
"""Share of the time after which a judge begins beside others: it takes the drawings they have made."""
EVERY = 45.0
"""Seconds between two copies of what there is."""


@dataclass(frozen=True)
class Place:
    """Where trainings run."""

    work: Path
    """Folder of the runs and their drawings; does not come back."""
    out: Path
    """Gets the parts (`benchmarks.gpu.parts`)."""
    device: str
    tiny: bool = False
    settings: Sequence[str] = ()
    """``NAME=NUMBER`` of the yardstick's settings, after `SETTINGS` or `TINY`."""


@dataclass
class Chain:
    """Trainings that follow each other, one process at a time."""

    names: list[str]
    place: Place
    end: float
    """By the monotonic clock."""
    begin: float = 0.0
    beside: int = 1
    """How many chains share the processors."""
    process: subprocess.Popen[bytes] | None = None
    failed: str = ""
    told: dict[str, Any] = field(default_factory=dict)
    """Settings of what was begun."""

    def runs(self) -> bool:
        """Begin what can be begun; whether anything is left to wait for."""
        if self.process is not None:
            if self.process.poll() is None:
                return True
            name, code, self.process = self.names.pop(0), self.process.returncode, None
            if code:
                self.failed = f"{name} ended with {code}: {self.log(name).read_text()[-500:]}"
            if code or not (self.place.work / name / DONE[name]).exists():
                self.names.clear()  # what follows needs it
        while self.names and (self.place.work / self.names[0] / DONE[self.names[0]]).exists():
            self.names.pop(0)
        if self.names and time.monotonic() >= self.begin:
            self._start(self.names[0])
        return bool(self.names)

    def log(self, name: str) -> Path:
        return self.place.work / name / "train.log"

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _start(self, name: str) -> None:
        seconds = max(self.end - time.monotonic(), 1.0)
        make = _adapter if name in ADAPTERS else _yardstick
        command, self.told[name] = make(name, self, seconds)
        self.log(name).parent.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("a") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=_environment())


def _yardstick(name: str, chain: Chain, seconds: float) -> tuple[list[str], dict[str, Any]]:
    """A training of the yardstick, and its settings."""
    place = chain.place
    if len(chain.names) > 1:
        seconds *= BEFORE_ADAPTER
    if place.tiny:
        chosen = TINY[name]
    else:
        timed = {key: _of(seconds, share) for key, share in SHARES[name].items()}
        workers = max((os.cpu_count() or 2) // chain.beside - (chain.beside > 1), 1)
        chosen = {**SETTINGS[name], **timed, "workers": workers, **({} if name == "judge" else {"compile": "false"})}
    chosen = {**chosen, **dict(pair.split("=", 1) for pair in place.settings)}
    command = [sys.executable, "-m", "benchmarks.yardstick", f"train-{name}", "--out", str(place.work)]
    command += ["--device", place.device, "--threads", "2", "--seconds", f"{seconds:.0f}"]
    return [*command, "--set", *(f"{key}={value}" for key, value in chosen.items())], chosen


def _of(seconds: float, share: float | tuple[float, ...]) -> Any:
    """A share of the seconds, or each of them."""
    return [_of(seconds, part) for part in share] if isinstance(share, tuple) else round(share * seconds)


def _adapter(name: str, chain: Chain, seconds: float) -> tuple[list[str], dict[str, Any]]:
    """The training of an adapter on the model that was made beside it, or else on the one that ships."""
    place, kind = chain.place, name.removesuffix("-adapter")
    made, run = place.work / kind / "model", place.work / name
    prompts = place.work / f"{kind}-prompts.txt"
    of = ["--video"] if kind == "video" else []
    subprocess.run(
        [sys.executable, "-m", "ddit.cli", "prompts", *of, "--count", "1024", "--out", str(prompts)], check=True
    )
    model = str(made) if made.exists() else {"image": "embedded", "video": "embedded-video"}[kind]
    chosen = {**(TINY if place.tiny else ADAPTERS)[name], "model": model, "prompts": prompts, "pictures": 0, "out": run}
    command = [sys.executable, "-m", "ddit.cli", "train", *(["--cpu"] if place.device == "cpu" else [])]
    return [*command, *(word for key, value in chosen.items() for word in (f"--{key}", str(value)))], {
        key: str(value) for key, value in chosen.items()
    }


def train(
    stage: str, record: Record, place: Place, checkpoint: Path | None = None, chains: Mapping[str, Chains] = CHAINS
) -> None:
    """Train from the checkpoint on, or from what lies in the folder of work.

    Args:
        checkpoint: Folder of parts or of runs; counts only where the folder of work has no such run.
    """
    asked = chains[stage]
    _take_over(checkpoint, place.work, [name for names in asked for name in names])
    now = time.monotonic()
    left = max(record.budget.left - MARGIN, 1.0)
    running = [Chain(list(names), place, now + left, beside=len(asked)) for names in asked]
    for chain in running:
        if len(asked) > 1 and chain.names == ["judge"] and not place.tiny:
            chain.begin = now + JUDGE_WAITS * left
    names = [name for chain in running for name in chain.names]
    keep = _keeper(record, place, names, running)
    try:
        kept = time.monotonic()
        while any([chain.runs() for chain in running]) and record.budget.left > 0:
            time.sleep(0.5)
            if time.monotonic() > kept + EVERY:
                keep()
                kept = time.monotonic()
    finally:
        for chain in running:
            chain.stop()
        keep()
    failed = [chain.failed for chain in running if chain.failed]
    if failed:
        raise RuntimeError("; ".join(failed))
    rest = [name for name in names if not (place.work / name / DONE[name]).exists()]
    if rest:
        record.left_out[", ".join(rest)] = "out of time; the same command goes on, elsewhere with --checkpoint"


def _take_over(checkpoint: Path | None, work: Path, names: Sequence[str]) -> None:
    """Fill the folders of runs from their parts, or from the runs of their names by way of parts.

    What has neither begins anew. An adapter needs its model.
    """
    wanted = {name.removesuffix("-adapter") for name in names}
    if checkpoint is None or all((work / name).exists() for name in wanted):
        return
    found = [
        name for name in DONE if (checkpoint / name).is_dir() or list(checkpoint.glob(f"{stem(Path(name))}.[0-9]"))
    ]
    if not found:
        raise FileNotFoundError(f"{checkpoint} has neither a run of {', '.join(DONE)} nor parts of one")
    for name in wanted & set(found):
        run, made = work / name, checkpoint
        if run.exists():
            continue
        if (checkpoint / name).is_dir():
            made = work / f"{name}.start"
            pack(checkpoint / name, made)
        if list(made.glob(f"{stem(run)}.[0-9]")):
            unpack(made, run)


def _environment() -> dict[str, str]:
    """Progress bars of a log would be all of it."""
    return {**os.environ, "TERM": "dumb", "PYTHONUNBUFFERED": "1"}


def _keeper(record: Record, place: Place, names: Sequence[str], running: Sequence[Chain]) -> Callable[[], None]:
    """What puts away all there is."""

    def keep() -> None:
        runs = [place.work / name for name in names if (place.work / name).exists()]
        files = {path.name: path.stat().st_size for run in runs for path in pack(run, place.out)}
        logs = {run.name: run / "train.log" for run in runs if (run / "train.log").exists()}
        record.values.update(
            settings={name: told for chain in running for name, told in chain.told.items()},
            files=files,
            logs={name: log.read_text()[-2000:] for name, log in logs.items()},
        )
        record.put("progress", {run.name: progress(run) for run in runs})

    return keep
