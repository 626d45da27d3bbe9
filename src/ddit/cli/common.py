"""What the commands share."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import shlex
import sys
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ddit import __version__
from ddit.pipelines.methods import WORDS


def add_command(commands: Any, name: str, run: Callable[..., None] | None, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    if run is not None:
        command.set_defaults(command=run)
    return command


def model_options(command: argparse.ArgumentParser) -> None:
    """Which model, what it needs beside, and how it is called."""
    command.add_argument("--model", default="embedded", help="folder or hub id (default: the embedded model)")
    command.add_argument(
        "--adapter", help="folder or hub id of an adapter, or none (default: the one that the preset names, if any)"
    )
    command.add_argument(
        "--preset",
        type=Path,
        help="folder with a ddit.json to use instead of the model's own; paper has the paper's values",
    )
    command.add_argument("--steps", type=int, help="denoising steps")
    command.add_argument("--height", type=int)
    command.add_argument("--width", type=int)
    text = "of a clip: one more than a multiple of what its autoencoder joins, of Wan 4 (default: the model's own)"
    command.add_argument("--frames", type=positive, help=text)
    call_option(command)
    command.add_argument("--device", default="cpu")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


def call_option(command: argparse.ArgumentParser) -> None:
    """What no option of its own says of how a pipeline is called."""
    command.add_argument(
        "--call",
        type=call_argument,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="further argument of the pipeline's call, such as guidance_scale=4; may be given several times",
    )


def column_option(command: Any) -> None:
    """Beside an option that names a file of prompts."""
    command.add_argument("--prompt-column", metavar="NAME", help="where prompts are in it (default: the usual names)")


def check_column(column: str | None, source: str | None, flag: str) -> None:
    """Refuse ``--prompt-column`` without the file that ``flag`` names."""
    if column is not None and source is None:
        raise ValueError(f"--prompt-column says where prompts are in {flag} FILE; give that too")


def add_flag(command: Any, record: type, field: str, text: str = "", *, name: str = "") -> None:
    """The flag that sets a field of a dataclass, by the field's annotation; ``None`` where it is not given.

    Args:
        text: Help.
        name: Of the flag, where the command line has another than the field.
    """
    flag = "--" + (name or field).replace("_", "-")
    command.add_argument(flag, default=None, help=text or None, **_parsed(get_type_hints(record)[field]))


def field_docs(record: type) -> dict[str, str]:
    """What stands in the source below each field of a dataclass, for the flags' help: name -> text."""
    body = ast.parse(textwrap.dedent(inspect.getsource(record))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for entry, after in pairwise(body.body):
        text = after.value if isinstance(after, ast.Expr) else None
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name) and isinstance(text, ast.Constant):
            found[entry.target.id] = " ".join(str(text.value).replace("``", "").replace("%", "%%").split())
    return found


def _parsed(hint: Any) -> dict[str, Any]:
    """How argparse reads what an annotation allows."""
    origin, parts = get_origin(hint), [part for part in get_args(hint) if part is not type(None)]
    if origin in (Union, types.UnionType):
        return _parsed(parts[0])
    if origin is Literal:
        return {"choices": parts}
    if origin is tuple:
        return {"type": parts[0], "nargs": "+"}
    return {"action": argparse.BooleanOptionalAction} if hint is bool else {"type": hint}


CALL_FLAGS = {"num_inference_steps": "steps", "height": "height", "width": "width", "num_frames": "frames"}
"""Arguments of a pipeline's call -> the option that sets them, in commands that have it."""


def call_argument(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``; the value is JSON, or else text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if value == "null":
        raise argparse.ArgumentTypeError(f"{name}=null says nothing; leave it out")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def call_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call that the options give."""
    given = {name: getattr(args, option, None) for name, option in CALL_FLAGS.items()}
    return {**{k: v for k, v in given.items() if v is not None}, **dict(args.call)}


def words_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, by `ddit.pipelines.methods.WORDS`."""
    words = {name: getattr(args, name) for name in WORDS}
    return {name: value for name, value in words.items() if value is not None}


def positive(text: str) -> int:
    return _whole(text, 1, None, "a whole number above 0")


def seed(text: str) -> int:
    return _whole(text, 0, SEEDS, "a seed, a whole number from 0 to 2^63 - 1")


def _whole(text: str, least: int, below: int | None, what: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (below is not None and value >= below):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


FPS = 8
"""Frames per second of a clip, where nobody says."""
SEEDS = 2**63
"""Of PyTorch's generators there are so many, from 0 on."""


def check_plot(path: Path) -> None:
    """Refuse a figure of a kind that matplotlib does not write."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.filetypes)
    if path.suffix[1:].lower() not in ("", *kinds):
        raise ValueError(f"{path} must end in one of {', '.join('.' + kind for kind in kinds)}")


def check_address(host: str, port: int) -> None:
    """Refuse one that is taken, or not of this machine."""
    import socket

    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise ValueError(f"{host}:{port} can't be served ({error}); name another with --host and --port") from error


def files_of(out: Path, count: int, *, compared: bool = True) -> list[Path]:
    """All that the two ``save`` of `ddit.pipelines` write: beside a clip lies its contact sheet."""
    from ddit.pipelines import outputs, sounds

    if out.suffix.lower() == ".wav":
        return sounds.names(out, count, compared=compared)
    files = outputs.names(out, count)
    return [*files, *(path.with_suffix(".png") for path in files if path.suffix.lower() == ".mp4")]


def check_writable(path: Path) -> None:
    """Try the nearest folder that exists; permissions alone don't tell (read-only file systems)."""
    import tempfile

    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is not a regular file; name one that is, or one that is not there yet")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ValueError(f"{path} can't be written; name a file in a folder that can") from error


def check_outputs(paths: Sequence[Path | None]) -> None:
    """Refuse outputs that can't be written, and two that are one file."""
    seen: dict[str, Path] = {}
    for path in paths:
        if path is None:
            continue
        check_writable(path)
        real = os.path.realpath(path)
        if real in seen:
            raise ValueError(f"two outputs are one file, {seen[real]} and {path}; give each a name of its own")
        seen[real] = path


def check_run(args: argparse.Namespace, outputs: Sequence[Path | None]) -> None:
    """Refuse what can be refused before anything heavy is loaded or written."""
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"steps is {args.steps}; it must be at least 1")
    for name in ("height", "width"):
        size = getattr(args, name)
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    check_call_option(args, CALL_FLAGS)
    check_outputs(outputs)


def check_call_option(args: argparse.Namespace, flags: Mapping[str, str]) -> None:
    """Refuse ``--call`` with a name that is given twice, or that an option sets.

    Args:
        flags: As `CALL_FLAGS`.
    """
    names = [name for name, _ in args.call]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--call gives {name} several times; give it once")
        if hasattr(args, flags.get(name, "")):
            raise ValueError(f"{name} is set by --{flags[name].replace('_', '-')}; leave it out of --call")


def environment(device: str) -> dict[str, Any]:
    """Date, versions and hardware, as every result carries them."""
    import datetime
    import platform
    from importlib.metadata import version

    packages = ("torch", "diffusers", "transformers")
    return {
        "date": datetime.date.today().isoformat(),
        "ddit": __version__,
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "device": device,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def command_line() -> str:
    return shlex.join(["ddit", *sys.argv[1:]])
