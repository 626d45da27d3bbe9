"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path to write to instead of ``path``; takes its place when the block ends, and is removed if it fails.

    A kill at any moment leaves the old file or the new one, never half of one. A link stays: what it names is replaced.

    Args:
        shared: Whether several processes may write it at once, each the same.

    Raises:
        OSError: For a folder, a pipe or a device.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file; name one that is, or one that is not there yet")
    partial = path.with_name(path.name + (f".{os.getpid()}" if shared else "") + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """As `replacing`, for a folder; while the two change places the old one is called ``path.old``."""
    path = Path(os.path.realpath(path))
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    for folder in (partial, old):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def ended(stem: Path, ending: str) -> Path:
    """The file of a stem, such as ``out/flux.1-dev``: dots in its name stay, but for the ending of a table."""
    return stem.with_name((stem.stem if stem.suffix in (".json", ".md", ".csv") else stem.name) + ending)


def write_json(path: Path, values: Any) -> None:
    """Write JSON through `replacing`; makes the folder. Numbers that are not finite become null: JSON has none."""
    write_text(path, json.dumps(_finite(values), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write text through `replacing`; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file, if there is one; a last line that a kill cut short is taken off it."""
    if not path.exists():
        return []
    written = path.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    if len(whole) < len(written):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def add_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records to a JSONL file."""
    with path.open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
