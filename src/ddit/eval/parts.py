"""Finished batches of an evaluation on disk, so that one that was killed continues."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from ddit.pipelines.generate import Run
from ddit.pipelines.outputs import eight_bits
from ddit.util.files import replacing, write_json


@dataclass(frozen=True)
class Part:
    """What one method drew of one batch of B prompts."""

    pictures: np.ndarray
    """uint8 ``[B, H, W, 3]`` or ``[B, F, H, W, 3]``."""
    seconds: np.ndarray
    """Wall-clock time of the batch, one number."""
    work: np.ndarray
    """Fractions of tokens and of FLOPs of a run at scale 1, two numbers."""
    scales: np.ndarray
    """``[B, steps]``; no steps for a plain run."""
    flops: np.ndarray
    """Of each sample, as a fraction of those of a run at scale 1, ``[B]``."""
    memory: np.ndarray
    """Bytes at the peak beyond what lay there before, one number; -1 where the device does not tell."""

    @classmethod
    def of(cls, outcome: Run, memory: int | None) -> Part:
        """The part that one call of the pipeline is."""
        report, count = outcome.report, len(outcome.pictures)  # a report has more samples where guidance is stacked
        work = (1.0, 1.0) if report is None else (report.tokens_fraction, report.flops_fraction)
        scales = [[]] * count if report is None else report.scales[:count]
        flops = [1.0] * count if report is None else report.flops_fractions[:count]
        pictures = eight_bits(outcome.pictures)
        return cls(
            pictures,
            np.array(outcome.seconds),
            np.array(work),
            np.array(scales, dtype=int),
            np.array(flops),
            np.array(-1 if memory is None else memory),
        )


class Parts:
    """A folder with a file per batch, all methods together. Opening it with other settings empties it."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        known = folder / "settings.json"
        try:
            same = json.loads(known.read_text()) == json.loads(json.dumps(settings))
        except (OSError, ValueError):
            same = False
        if not same:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(known, settings)

    def load(self, batch: int) -> list[Part] | None:
        """The parts of a batch, ``None`` if it is not finished or its file is damaged."""
        try:
            with np.load(self._path(batch), allow_pickle=False) as file:
                count = len(file.files) // len(fields(Part))
                return [Part(**{f.name: file[f"{i}.{f.name}"] for f in fields(Part)}) for i in range(count)]
        except (OSError, ValueError, KeyError, BadZipFile):
            return None

    def save(self, batch: int, parts: Sequence[Part]) -> None:
        """Keep a finished batch."""
        arrays = {f"{i}.{f.name}": getattr(part, f.name) for i, part in enumerate(parts) for f in fields(Part)}
        with replacing(self._path(batch)) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)

    def _path(self, batch: int) -> Path:
        return self.folder / f"batch-{batch:04}.npz"


def digest(module: torch.nn.Module) -> str:
    """Of a module's weights, and of its settings where it has those of diffusers."""
    found, config = hashlib.sha256(), getattr(module, "config", None)
    if isinstance(config, Mapping):
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        found.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
