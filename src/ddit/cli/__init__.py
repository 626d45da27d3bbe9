"""The command line. Nothing heavy is imported before a command needs it, so that ``ddit --help`` answers at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ddit import __version__
from ddit.cli.app import add_app
from ddit.cli.common import (
    CALL_FLAGS,
    add_command,
    add_flag,
    call_option,
    check_call_option,
    check_outputs,
    check_writable,
    command_line,
    environment,
    field_docs,
    positive,
)
from ddit.cli.draw import add_draw
from ddit.cli.measure import add_measure
from ddit.train.config import TrainConfig
from ddit.util.files import write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or 2 for bad input."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever called, as with >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until Python ends)
    try:
        return _run(argv)
    finally:
        _let_go_of_stdout()


def _run(argv: Sequence[str] | None) -> int:
    args = parser().parse_args(argv)
    warnings.showwarning = _show_warning
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        args.command(args)
        sys.stdout.flush()
    except BrokenPipeError as error:
        if _nobody_reads():
            return 0
        print(f"ddit: error: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError, ArithmeticError, ModuleNotFoundError) as error:
        print(f"ddit: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ddit: interrupted", file=sys.stderr)
        return 130
    return 0


def _let_go_of_stdout() -> None:
    """What can't be printed any more goes nowhere, quietly, and not into a traceback while Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _nobody_reads() -> bool:
    """Whether the other end of standard output was closed, as ``| head`` does."""
    import select

    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="ddit", description="Dynamic patch sizes for diffusion transformers.")
    top.add_argument("--version", action="version", version=f"ddit {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    add_draw(commands)
    add_app(commands)
    add_measure(commands)

    learn = add_command(commands, "train", _train, "distil an adapter from a frozen model; resumes where it stopped")
    learn.add_argument("--config", type=Path, help="YAML or JSON file of settings; flags override it")
    learn.add_argument("--dry-run", action="store_true", help="only count parameters and memory; needs no weights")
    learn.add_argument("--json", type=Path, help="write the curves of loss and validation; with --dry-run, the figures")
    told = field_docs(TrainConfig)
    for field in fields(TrainConfig):  # what is not given is left to the config file or the default
        if field.name == "call":
            call_option(learn)
            continue
        shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        default = "" if shown is None else f" (default: {shown})"
        add_flag(learn, TrainConfig, field.name, told.get(field.name, "") + default)

    words = add_command(commands, "prompts", _prompts, "write prompts of the embedded models that no evaluation uses")
    words.add_argument("--video", action="store_true", help="of the video model")
    words.add_argument("--count", type=positive, default=1000)
    words.add_argument("--out", type=Path, default=Path("runs/prompts.txt"))
    add_command(commands, "info", _info, "versions, devices and supported models")
    return top


def _prompts(args: argparse.Namespace) -> None:
    from itertools import islice

    from ddit.embedded.clips import clips
    from ddit.embedded.scenes import scenes

    check_writable(args.out)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # A seed of its own: the models and adapters see the same split of the grammar, but not the same prompts.
    source = (clips if args.video else scenes)(77, "train")
    args.out.write_text("".join(f"{asked.prompt}\n" for asked in islice(source, args.count)))
    print(f"wrote {args.out}")


def _train(args: argparse.Namespace) -> None:
    values: dict[str, Any] = {}
    if args.config is not None:
        values = _read_settings(args.config)
        if not isinstance(values, dict):
            raise ValueError(f"{args.config} must hold names and values of training settings")
        renamed = {str(name).replace("-", "_"): value for name, value in values.items()}
        if len(renamed) < len(values):
            raise ValueError(f"{args.config} spells a setting in two ways, with - and with _; leave one of them out")
        values = renamed
    check_call_option(args, {**CALL_FLAGS, "num_inference_steps": "sample_steps"})
    call = values.get("call", {})
    if args.call and isinstance(call, dict):  # what is no dictionary is refused with the other settings
        call = {**call, **dict(args.call)}
    flags = {**{f.name: getattr(args, f.name) for f in fields(TrainConfig)}, "call": call}
    config = TrainConfig.from_dict({**values, **{k: v for k, v in flags.items() if v is not None}})
    if args.dry_run:
        _plan(config, args.json)
        return
    out = Path(config.out)
    check_outputs([*(out / name for name in ("train.json", "train.jsonl", "validation.jsonl")), args.json])
    from accelerate import PartialState

    from ddit.train.trainer import train

    print(f"wrote {train(config)}")
    if args.json is not None and PartialState().is_main_process:
        curves = {
            name: [json.loads(line) for line in (out / f"{name}.jsonl").open()] for name in ("train", "validation")
        }
        state = PartialState()
        assert state.device is not None, "accelerate sets it with the state"
        about = {"command": command_line(), "environment": environment(state.device.type)}
        about |= {"processes": state.num_processes, "peak_memory_bytes": _peak_memory(state.device.type)}
        write_json(args.json, {**about, "settings": config.to_dict(), **curves})
        print(f"wrote {args.json}")


def _read_settings(path: Path) -> Any:
    """What a YAML or JSON file holds."""
    import yaml

    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error


def _peak_memory(device: str) -> int | None:
    """Of this process: what PyTorch took of a GPU's memory, elsewhere all that it held of the machine's."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _plan(config: TrainConfig, path: Path | None) -> None:
    if path is not None:
        check_writable(path)
    from ddit.train.plan import plan, table

    figures = plan(config)
    print(table(figures))
    if path is not None:
        result = {"command": command_line(), "environment": environment("meta"), **figures}
        write_json(path, result)
        print(f"wrote {path}")


def _info(args: argparse.Namespace) -> None:
    from ddit.models import supported_models
    from ddit.pipelines.known import names

    for name, value in environment("cpu").items():
        print(f"{name}: {value}")
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPUs: {', '.join(gpus) or 'none'}")
    print(f"supported models: {', '.join(supported_models())}")
    print(f"architectures known by name: {', '.join(names())}")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"ddit: warning: {message}", file=sys.stderr)
