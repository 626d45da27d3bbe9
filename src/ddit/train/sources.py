"""What a run learns from: prompts, for which the base draws its own samples, or pictures with captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from ddit.pipelines.prompts import HUB, UTF8, read_prompts
from ddit.train.config import TrainConfig
from ddit.util.tell import warn

METADATA = "metadata.jsonl"
"""Lines of ``{"file_name": ..., "text": ...}``, as in the image folders of the package datasets."""
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


class Source(NamedTuple):
    """What samples are made of."""

    prompts: list[str]
    pictures: list[Path]
    """One for each prompt; none where the base draws, or where the samples are there."""


def read_source(config: TrainConfig) -> Source:
    """What a run names; what its samples know where they are there, and what they were made of is gone or not named.

    Raises:
        ValueError: When nothing is named that the samples could be made of, or pictures that they were not made of.
    """
    manifest = config.samples_folder / "samples.json"
    begun = manifest.exists()
    source = config.images or config.prompts
    if source is None and not begun:
        raise ValueError(
            "name a file with prompts (--prompts), for which the base draws its own samples, "
            "or a folder of pictures (--images)"
        )
    gone = source is not None and not source.startswith(HUB) and not Path(source).exists()
    if begun and gone:
        if config.images is not None and "pictures" not in json.loads(manifest.read_text()):
            raise ValueError(
                f"there is no folder {source!r}, and the samples in {manifest.parent} were not made of pictures; "
                "name the folder, or other --samples"
            )
        warn(f"there is no {source!r}; the samples in {manifest.parent} are there, and are taken")
    if source is None or (begun and gone):
        return Source(json.loads(manifest.read_text())["prompts"], [])
    if config.images is None:
        return Source(read_prompts(source, config.prompt_column, config.count), [])
    captions = read_captions(source, config.count)
    return Source(list(captions.values()), list(captions))


def read_captions(folder: str | Path, count: int | None = None) -> dict[Path, str]:
    """Pictures of a folder with a caption each: those that ``metadata.jsonl`` lists, or else all. What has no text
    there has it in a text file of the same name.

    Raises:
        ValueError: When there are none, fewer than ``count``, or some without a caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r} with pictures")
    table = folder / METADATA
    found: dict[Path, str] = {}
    pictures = sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS)
    if table.is_file():
        try:
            rows = [json.loads(line) for line in table.read_text(encoding=UTF8).split("\n") if line.strip()]
            found = {folder / row["file_name"]: str(row["text"]).strip() for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{table} can\'t be read ({error!r}); lines are {{"file_name": ..., "text": ...}}'
            ) from error
    else:
        found = dict.fromkeys(pictures, "")
    for path, beside in ((path, path.with_suffix(".txt")) for path, text in found.items() if not text):
        found[path] = beside.read_text(encoding=UTF8).strip() if beside.is_file() else ""
    if unlisted := [path.name for path in pictures if path not in found]:
        warn(f"{table} does not list {len(unlisted)} pictures beside it, {unlisted[0]} first; they are left out")
    missing = [path.name for path, text in found.items() if not path.is_file() or not text]
    if missing:
        raise ValueError(
            f"{len(missing)} pictures in {folder} are missing or have no caption, {missing[0]} first; "
            f"write one into {METADATA}, or into a text file of the same name"
        )
    if not found or (count and len(found) < count):
        raise ValueError(f"{folder} holds {len(found)} pictures, {count or 'at least 1'} were asked for")
    return dict(list(found.items())[:count])
