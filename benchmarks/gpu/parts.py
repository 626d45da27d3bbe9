"""A training run of the yardstick in a few files of limited size, to carry between machines.

What training needs to go on goes into one archive, cut into parts: the autoencoder, the text encoders, and of the flow
the averaged weights of the newest checkpoint in float16. The optimizers begin anew from there.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import torch

from ddit.util.files import replacing

PART = 14 * 2**20
"""Bytes of a part."""
SMALL = "flows.pt"
"""In the archive, in place of the flow's checkpoints."""
TEXT = "text.pt"
ENDED = 1e9
"""Seconds after which any stage is at its end: of those that another followed."""
FINISHED = ("settings.json", "vae", "judge.safetensors", "model", "adapter")


def stem(run: Path) -> str:
    """First words of the parts' names; a run's folder has its model's name."""
    return f"train-{run.name}.tar"


def pack(run: Path, out: Path) -> list[Path]:
    """Write the parts; those of an earlier call are replaced. Returns them, none for a run that has nothing yet."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        names = [name for name in FINISHED if (run / name).exists()]
        if "vae" not in names and (run / "vae.pt").exists():
            names.append("vae.pt")
        for path in [*(run / name for name in names), *sorted(run.glob("*.jsonl"))]:
            archive.add(path, path.name)
        if "model" not in names:
            if (run / TEXT).exists():
                _add(archive, TEXT, _without_momenta(run / TEXT))
            if _flows(run):
                _add(archive, SMALL, _small_flows(run))
    data = stream.getvalue() if set(names) - {"settings.json"} else b""  # what was drawn and no more is drawn again
    pieces = [data[start : start + PART] for start in range(0, len(data), PART)]
    paths = [out / f"{stem(run)}.{number}" for number in range(len(pieces))]
    out.mkdir(parents=True, exist_ok=True)
    for path, piece in zip(paths, pieces, strict=True):
        with replacing(path) as partial:
            partial.write_bytes(piece)
    for stale in set(out.glob(f"{stem(run)}.[0-9]")) - set(paths):
        stale.unlink()
    return paths


def _add(archive: tarfile.TarFile, name: str, state: Any) -> None:
    stream = io.BytesIO()
    torch.save(state, stream)
    about = tarfile.TarInfo(name)
    about.size = stream.tell()
    stream.seek(0)
    archive.addfile(about, stream)


def unpack(parts: Path, run: Path) -> None:
    """Make a run's folder from the parts.

    Raises:
        FileNotFoundError: When there are none.
    """
    paths = sorted(parts.glob(f"{stem(run)}.[0-9]"))
    if not paths:
        raise FileNotFoundError(f"no {stem(run)}.0 in {parts}")
    run.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(b"".join(path.read_bytes() for path in paths))) as archive:
        archive.extractall(run, filter="data")
    if (run / SMALL).exists():
        _large_flows(run)
        (run / SMALL).unlink()


def _without_momenta(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint whose optimizers begin anew; it averages nothing."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return {
        "model": state["model"],
        "average": {},
        "optimizers": [{"state": {}, "param_groups": o["param_groups"]} for o in state["optimizers"]],
        "step": state["step"],
    }


def _flows(run: Path) -> list[Path]:
    """The flow's checkpoints in the order they are made: sizes rise, guidance comes last."""

    def size(path: Path) -> float:
        name = path.stem.removeprefix("flow-")
        return int(name) if name.isdigit() else math.inf

    return sorted(run.glob("flow-*.pt"), key=size)


def _small_flows(run: Path) -> dict[str, Any]:
    """Weights of the newest checkpoint, averaged where they are, and what else each checkpoint needs."""
    stages: dict[str, Any] = {}
    weights: dict[str, torch.Tensor] = {}
    for path in _flows(run):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        groups = [optimizer["param_groups"] for optimizer in state["optimizers"]]
        stages[path.stem] = {"step": state["step"], "groups": groups, "averaged": list(state["average"])}
        weights = {**state["model"], **state["average"]}
    return {"stages": stages, "weights": {name: value.half().clone() for name, value in weights.items()}}


def _large_flows(run: Path) -> None:
    """Checkpoints as the training writes them."""
    small = torch.load(run / SMALL, map_location="cpu", weights_only=True)
    newest = next(reversed(small["stages"]))
    weights = {name: value.float() for name, value in small["weights"].items()}
    for name, stage in small["stages"].items():
        state = {
            "model": weights,
            "average": {key: weights[key] for key in stage["averaged"]},
            "optimizers": [{"state": {}, "param_groups": groups} for groups in stage["groups"]],
            "step": stage["step"],
            "elapsed": 0.0 if name == newest else ENDED,
        }
        with replacing(run / f"{name}.pt") as partial:
            torch.save(state, partial)


def progress(run: Path) -> dict[str, Any]:
    """The last line of each log, by stage."""
    found = {}
    for log in sorted(run.glob("*.jsonl")):
        lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
        if lines:
            found[log.stem] = json.loads(lines[-1])
    return found
