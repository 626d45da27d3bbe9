"""What a run keeps beside its samples: checkpoints, the result and logs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from ddit.pipelines.loading import model_folder
from ddit.pretrained import TrainedPart, model_card
from ddit.train.config import TrainConfig
from ddit.util.files import read_lines, replacing, write_text

SETTINGS = "train.json"
"""What a run was asked for."""


def check_settings(config: TrainConfig) -> None:
    """Refuse settings other than those of the run's checkpoints, where there are any."""
    saved = Path(config.out) / SETTINGS
    if not checkpoints(saved.parent) or not saved.exists():
        return
    try:
        changed = config.differences(TrainConfig.from_dict(json.loads(saved.read_text())))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{saved} is not the configuration of a run ({error}); name another folder") from error
    if changed:
        told = ", ".join(f"{k} ({there!r} then, {here!r} now)" for k, (here, there) in changed.items())
        raise ValueError(
            f"the run in {saved.parent} began with other settings: {told}; use the same, or another --out "
            f"(with --samples {config.samples_folder} nothing is drawn again)"
        )


def result_folder(config: TrainConfig) -> Path:
    """Where the result of a run lies."""
    return Path(config.out) / "adapter"


def saved_step(folder: Path) -> int | None:
    """Steps of the result in a folder; ``None`` where there is no whole one."""
    try:
        found = json.loads((folder / "config.json").read_text())["steps_trained"]
    except (OSError, ValueError, KeyError):
        return None
    return found if (folder / "diffusion_pytorch_model.safetensors").is_file() else None


def keep_until(path: Path, step: int) -> None:
    """Drop the rows of a log that come after a step, since they are made again."""
    if path.is_file():
        rows = [row for row in read_lines(path) if row["step"] <= step]
        with replacing(path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows))


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(folder.glob("checkpoint-*.pt"))


def last_validation(folder: Path, step: float = math.inf) -> list[dict[str, Any]]:
    """Rows of a run's last validation, no later than a step; none before the first."""
    rows = [row for row in read_lines(folder / "validation.jsonl") if row["step"] <= step]
    return [row for row in rows if row["step"] == rows[-1]["step"]]


def write_card(folder: Path, config: TrainConfig, part: TrainedPart) -> None:
    """The model card of a result, with the last validation."""
    base = None if model_folder(config.model).exists() else config.model
    write_text(folder / "README.md", str(model_card(part, base, last_validation(Path(config.out)))))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `Run.save` wrote.

    Raises:
        ValueError: When the file is damaged.
    """
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # pickle, zip and torch each raise their own
        raise ValueError(
            f"{path} can't be read ({(str(error) or repr(error)).splitlines()[0]}); "
            "delete it to continue from the one before"
        ) from error
