"""Everything that wants a GPU: ``python -m benchmarks.gpu --seconds 540 --out results flux peers``."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.parts import pack
from benchmarks.gpu.stages import STAGES, Session, run
from benchmarks.gpu.table import PAGE, write_table

COMMANDS = {"table": "write the figures into docs/benchmarks.md", "pack": "cut a run of the yardstick into small files"}


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 even where stages are not done, since what was measured is there."""
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] == ["table"]:
        args = _parser("table").parse_args(words[1:])
        write_table(args.results, args.page)
        return 0
    if words[:1] == ["pack"]:
        args = _parser("pack").parse_args(words[1:])
        print("\n".join(f"{path} {path.stat().st_size}" for path in pack(args.run, args.out)))
        return 0
    return _measure(_stages_parser().parse_args(words))


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.gpu {command}", description=COMMANDS[command])
    if command == "table":
        parser.add_argument("--results", type=Path, required=True, help="folder with the stages' JSON files")
        parser.add_argument("--page", type=Path, default=PAGE)
    else:
        parser.add_argument("--run", type=Path, default=Path("runs/yardstick/image"))
        parser.add_argument("--out", type=Path, required=True)
    return parser


def _stages_parser() -> argparse.ArgumentParser:
    told = "; ".join(f"{name} ... {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, epilog=f"Also: {told}.")
    parser.add_argument(
        "stages", nargs="+", choices=[*STAGES, "all"], metavar="STAGE", help=", ".join([*STAGES, "all"])
    )
    parser.add_argument("--seconds", type=float, required=True, help="time for all of them together")
    parser.add_argument("--out", type=Path, required=True, help="folder of STAGE.json; what is there is not done again")
    parser.add_argument("--earlier", type=Path, help="folder with results of an earlier call to go on from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="folder of what does not come back")
    parser.add_argument(
        "--checkpoint", type=Path, help="folder of a run of the yardstick, or of its parts, to train on"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="settings of the training")
    parser.add_argument("--tiny", action="store_true", help="models that a CPU runs in milliseconds, to try it all")
    return parser


def _measure(args: argparse.Namespace) -> int:
    if not args.device.startswith("cuda") and not args.tiny:
        print("there is no GPU; add --tiny to try everything on the CPU", file=sys.stderr)
        return 2
    names = list(STAGES)[:-1] if "all" in args.stages else list(dict.fromkeys(args.stages))
    args.out.mkdir(parents=True, exist_ok=True)
    for name in STAGES:
        earlier = args.earlier / f"{name}.json" if args.earlier else None
        if earlier is not None and earlier.exists() and not (args.out / earlier.name).exists():
            shutil.copy(earlier, args.out)
    session = Session(args.out, args.device, args.work, args.tiny, args.checkpoint, args.set)
    unfinished = run(names, session, args.seconds)
    if unfinished:
        print(f"not done: {', '.join(unfinished)}; the same command goes on")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
