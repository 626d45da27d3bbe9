"""Prompts from files as benchmarks come in, and from data sets of the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ddit.util.extras import require

HUB = "dataset:"
UTF8 = "utf-8-sig"
"""Without the mark that Windows begins files with."""
USUAL = ("prompt", "prompts", "caption", "captions", "text")
"""Names of columns that are taken without asking, in any case of letters."""
CONVERTED = "refs/convert/parquet"
"""Branch of a data set where the hub keeps it as ``config/split/0000.parquet``."""


def read_prompts(
    source: str, column: str | None = None, count: int | None = None, *, least: int | None = None
) -> list[str]:
    """Prompts of a file or data set, in its order.

    Text (a prompt per line), ``.json`` (a list of texts or objects, or captions as COCO has them: the first of each
    picture), ``.jsonl``, ``.csv``, ``.tsv``, ``.parquet``, or ``dataset:OWNER/NAME`` on the hub, with ``:CONFIG/SPLIT``
    behind it where there are several.

    Args:
        column: Of tables and objects; without it, one of `USUAL`.
        count: Take no more.
        least: Refuse fewer (default: ``count``).

    Raises:
        ValueError: When there is no such file, data set or column, or too few prompts in it.
    """
    if source.startswith(HUB):
        rows: Iterable[Any] = _hub(source.removeprefix(HUB), column)
    else:
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"there is no file {source!r} with prompts; name one, or a data set as {HUB}OWNER/NAME")
        rows = _file(path, column)
    prompts = []
    for row in rows:
        text = _text(row, column, source)
        if text:
            prompts.append(text)
        if len(prompts) == count:
            break
    least = least or count
    if len(prompts) < (least or 1):
        raise ValueError(f"{source} holds {len(prompts)} prompts, {least or 'one at least'} asked for")
    return prompts


def _file(path: Path, column: str | None) -> Iterable[Any]:
    """Texts or rows."""
    try:
        return READERS.get(path.suffix.lower(), _lines)(path, column)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path} can't be read as {path.suffix[1:] or 'text'}: {error}") from error


def _lines(path: Path, column: str | None) -> list[str]:
    if column is not None:
        raise ValueError(f"{path} has no columns, it is read as a prompt per line; leave --prompt-column out")
    return path.read_text(encoding=UTF8).split("\n")  # not at U+2028 and the like, as splitlines does


def _json(path: Path, column: str | None) -> list[Any]:
    values = json.loads(path.read_text(encoding=UTF8))
    if isinstance(values, dict) and isinstance(values.get("annotations"), list):
        first: dict[Any, Any] = {}
        for row in values["annotations"]:
            if not isinstance(row, dict):
                raise ValueError(f"annotations of {path} must be objects, as COCO has them; one is {str(row)[:40]!r}")
            first.setdefault(row.get("image_id"), row)
        return list(first.values())
    if not isinstance(values, list):
        raise ValueError(f"{path} must hold a list of prompts, of objects, or COCO's captions")
    return values


def _json_lines(path: Path, column: str | None) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding=UTF8).split("\n") if line.strip()]


def _table(path: Path, column: str | None) -> list[dict[str, Any]]:
    with path.open(encoding=UTF8, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))


def _parquet(path: Path, column: str | None) -> list[dict[str, Any]]:
    """Only the column that is asked for: data sets of captions may hold the pictures too."""
    require("pyarrow", "prompts from parquet files")
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
        names = file.schema_arrow.names
        chosen = _column(names, column, str(path))
        return file.read([chosen]).to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path} can't be read as parquet: {error}") from error


READERS: dict[str, Callable[[Path, str | None], Iterable[Any]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}
"""Ending -> reader; files of other endings have a prompt per line."""


def _hub(name: str, column: str | None) -> Iterable[Any]:
    """Rows of a data set of the hub, file after file: later ones are not fetched unless they are needed."""
    require("pyarrow", "prompts from the hub")
    from huggingface_hub import HfApi, hf_hub_download

    name, _, part = name.partition(":")
    where: dict[str, Any] = {"repo_id": name, "repo_type": "dataset", "revision": CONVERTED}
    try:
        files = [file for file in HfApi().list_repo_files(**where) if file.endswith(".parquet")]
        parts = sorted({file.rpartition("/")[0] for file in files})
        if part not in parts and (part or len(parts) != 1):
            raise ValueError(f"name one of its parts, {', '.join(parts)}, as {HUB}{name}:CONFIG/SPLIT")
        for file in sorted(files):
            if file.rpartition("/")[0] == (part or parts[0]):
                yield from _parquet(Path(hf_hub_download(filename=file, **where)), column)
    except Exception as error:  # No network, no such data set, not converted: the hub's client raises what it meets.
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"the data set {name!r} can't be read: {reason}") from error


def _text(row: Any, column: str | None, source: str) -> str:
    """The prompt in a row, or an empty text."""
    if isinstance(row, Mapping):
        row = row[_column(list(row), column, source)]
    if isinstance(row, list) and row:  # several captions of one picture
        row = row[0]
    if row is not None and not isinstance(row, str):
        raise ValueError(f"a prompt in {source} is {str(row)[:40]!r}, which is no text; name another --prompt-column")
    return (row or "").strip()


def _column(names: list[Any], column: str | None, source: str) -> str:
    if column is not None and column in names:
        return column
    usual = [name for name in names if str(name).lower() in USUAL]
    if column is None and usual:
        return usual[0]
    asked = "no column of a usual name" if column is None else f"no column {column!r}"
    shown = ", ".join(str(name) for name in names if name is not None)
    raise ValueError(f"{source} has {asked}; name one of {shown} with --prompt-column")
