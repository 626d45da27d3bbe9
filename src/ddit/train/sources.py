"""What a run learns from: prompts, for which the base draws its own samples, or pictures with captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from ddit.train.config import TrainConfig

METADATA = "metadata.jsonl"
"""Lines of ``{"file_name": ..., "text": ...}``, as in the image folders of the package datasets."""
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


class Source(NamedTuple):
    """What samples are made of."""

    prompts: list[str] | None
    """``None`` takes those of samples that are there."""
    pictures: list[Path]
    """One for each prompt, or none where the base draws."""


def read_source(config: TrainConfig) -> Source:
    """What a run names; nothing where its samples are there already.

    Raises:
        ValueError: When nothing is named that the samples could be made of.
    """
    begun = (config.samples_folder / "samples.json").exists()
    source = config.images or config.prompts
    if source is None and not begun:
        raise ValueError(
            "name a file with prompts (--prompts), for which the base draws its own samples, "
            "or a folder of pictures (--images)"
        )
    if source is None or (begun and not Path(source).exists()):
        return Source(None, [])
    if config.images is None:
        return Source(read_prompts(source, config.count), [])
    captions = read_captions(source, config.count)
    return Source(list(captions.values()), list(captions))


def read_prompts(source: str, count: int | None = None) -> list[str]:
    """Prompts from a text file, one per line, or from ``dataset:NAME:COLUMN``.

    Raises:
        ValueError: When there are none, or fewer than ``count``.
    """
    if source.startswith("dataset:"):
        _, name, column = [*source.split(":"), ""][:3]
        try:
            from datasets import load_dataset  # type: ignore[import-not-found]
        except ModuleNotFoundError:
            raise ValueError("prompts from a dataset need the package datasets: pip install datasets") from None
        prompts = [str(text) for text in load_dataset(name, split="train")[column]]
    else:
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"there is no file {source!r} with prompts; write one prompt per line")
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [text for text in prompts if text][:count]
    if not prompts or (count and len(prompts) < count):
        raise ValueError(f"{source} holds {len(prompts)} prompts, {count or 'at least 1'} were asked for")
    return prompts


def read_captions(folder: str | Path, count: int | None = None) -> dict[Path, str]:
    """Pictures of a folder with a caption each: from ``metadata.jsonl``, or from a text file of the same name.

    Raises:
        ValueError: When there are none, fewer than ``count``, or some without a caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r} with pictures")
    table = folder / METADATA
    found: dict[Path, str] = {}
    if table.is_file():
        try:
            rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
            found = {folder / row["file_name"]: str(row["text"]).strip() for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{table} can\'t be read ({error!r}); lines are {{"file_name": ..., "text": ...}}'
            ) from error
    else:
        for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS):
            beside = path.with_suffix(".txt")
            found[path] = beside.read_text(encoding="utf-8").strip() if beside.is_file() else ""
    missing = [path.name for path, text in found.items() if not path.is_file() or not text]
    if missing:
        raise ValueError(
            f"{len(missing)} pictures in {folder} are missing or have no caption, {missing[0]} first; "
            f"write one into {METADATA}, or into a text file of the same name"
        )
    if not found or (count and len(found) < count):
        raise ValueError(f"{folder} holds {len(found)} pictures, {count or 'at least 1'} were asked for")
    return dict(list(found.items())[:count])
