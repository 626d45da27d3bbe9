"""The command line. Nothing heavy is imported before a command needs it, so that ``ddit --help`` answers at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

from ddit import __version__
from ddit.cli.common import (
    add_command,
    check_run,
    check_writable,
    command_line,
    environment,
    model_options,
    positive,
)
from ddit.cli.embedded import add_embedded
from ddit.cli.measure import add_measure
from ddit.config import Difference, PolicyName, Positions, ScheduleConfig, Start
from ddit.files import write_json
from ddit.train.config import CHOICES, TrainConfig

DEMO_PROMPT = "a large hatched blue star left of a small plain yellow circle on a brick background"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or 2 for bad input."""
    args = parser().parse_args(argv)
    warnings.showwarning = _show_warning
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        args.command(args)
    except (ValueError, OSError, RuntimeError, ArithmeticError, ModuleNotFoundError) as error:
        print(f"ddit: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ddit: interrupted", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="ddit", description="Dynamic patch sizes for diffusion transformers.")
    top.add_argument("--version", action="version", version=f"ddit {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = add_command(commands, "generate", _generate, "draw a prompt, with patches that follow the content")
    generate.add_argument("prompt")
    model_options(generate)
    _schedule_options(generate)
    generate.add_argument("--cache", help="teacache:0.25, first-block:0.1, magcache:0.06 or taylorseer:4")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--num-images", "--batch", type=positive, default=1, help="pictures of seed, seed + 1, ...")
    generate.add_argument("--compare", action="store_true", help="also run plain and report speedup, PSNR, SSIM")
    generate.add_argument("--repeats", type=positive, default=1, help="with --compare: times the median of this many")
    generate.add_argument("--frames", type=positive, help="of a clip: one more than a multiple of 4")
    generate.add_argument("--fps", type=positive, default=8, help="frames per second of a clip (default: %(default)s)")
    generate.add_argument("--out", type=Path, help="PNG, or MP4 of a video model (default: out/ddit.png, .mp4)")
    generate.add_argument("--json", type=Path, help="write a report")
    generate.add_argument("--plot", type=Path, help="plot scale and statistic against the step")

    demo = add_command(commands, "demo", _demo, "watch it work on the embedded model: plain and dynamic side by side")
    demo.add_argument("--out", type=Path, default=Path("out/demo.png"))

    add_measure(commands)

    learn = add_command(commands, "train", _train, "distil an adapter from a frozen model; resumes where it stopped")
    learn.add_argument("--config", type=Path, help="YAML or JSON file of settings; flags override it")
    learn.add_argument("--dry-run", action="store_true", help="only count parameters and memory; needs no weights")
    learn.add_argument("--json", type=Path, help="write the curves of loss and validation; with --dry-run, the figures")
    _train_options(learn)

    add_embedded(commands)
    add_command(commands, "info", _info, "versions, devices and supported models")
    return top


def _schedule_options(command: argparse.ArgumentParser) -> None:
    """One flag for each field of `ScheduleConfig`; unset ones are left to the model's preset."""
    choices = {
        "policy": PolicyName,
        "start": Start,
        "positions": Positions,
        "difference": Difference,
    }
    for field in fields(ScheduleConfig):
        flag = "--schedule" if field.name == "steps" else f"--{field.name.replace('_', '-')}"
        if field.name in ("scales", "steps"):
            text = "scales to choose from" if field.name == "scales" else "scale of each step, for --policy fixed"
            command.add_argument(flag, dest=f"schedule_{field.name}", type=int, nargs="+", help=text)
        elif field.name in choices:
            command.add_argument(flag, dest=f"schedule_{field.name}", choices=get_args(choices[field.name]))
        else:
            assert field.default is not MISSING
            kind: Any = {"action": argparse.BooleanOptionalAction, "default": None}
            if not isinstance(field.default, bool):
                kind = {"type": type(field.default)}
            command.add_argument(flag, dest=f"schedule_{field.name}", **kind)


def _train_options(command: argparse.ArgumentParser) -> None:
    """One flag for each field of `TrainConfig`; unset ones are left to the config file or the default."""
    for field in fields(TrainConfig):
        flag = f"--{field.name.replace('_', '-')}"
        default = "" if field.default is None else f"default: {field.default}"
        if isinstance(field.default, tuple):
            shown = " ".join(map(str, field.default))
            command.add_argument(flag, type=type(field.default[0]), nargs="+", help=f"default: {shown}")
        elif field.name in CHOICES:
            command.add_argument(flag, choices=get_args(CHOICES[field.name]), help=default)
        elif str(field.type).startswith("bool"):
            command.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=default)
        else:
            kind = type(field.default) if field.default is not None else _optional_type(str(field.type))
            command.add_argument(flag, type=kind, help=default)


def _optional_type(annotation: str) -> type:
    return {"int": int, "float": float, "str": str}[annotation.split(" ")[0]]


def _schedule(args: argparse.Namespace, preset: dict[str, Any]) -> ScheduleConfig:
    chosen = {f.name: getattr(args, f"schedule_{f.name}", None) for f in fields(ScheduleConfig)}
    return ScheduleConfig.from_dict({**preset, **{k: v for k, v in chosen.items() if v is not None}})


def _generate(args: argparse.Namespace) -> None:
    _schedule(args, {})
    check_run(args, (args.out, args.json, args.plot))
    if args.out is not None and args.out.suffix.lower() not in (".png", ".mp4"):
        raise ValueError(f"{args.out} must end in .png, or for a video model in .mp4")
    _draw(args)


def _demo(args: argparse.Namespace) -> None:
    stem = args.out.with_suffix("")
    flags = [
        "--compare",
        "--repeats",
        "3",
        "--out",
        str(args.out),
        "--json",
        f"{stem}.json",
        "--plot",
        f"{stem}-plot.png",
    ]
    print(f"{DEMO_PROMPT!r}, plain and with dynamic patches, by turns", flush=True)
    _draw(parser().parse_args(["generate", DEMO_PROMPT, *flags]))


def _draw(args: argparse.Namespace) -> None:
    from ddit import generate as lib
    from ddit import outputs
    from ddit.caches import make_cache

    lib.check_prompt(args.prompt, args.model)
    pipe, preset = lib.load_pipeline(args.model, dtype=args.dtype, device=args.device, preset=args.preset)
    cache = make_cache(args.cache, preset.teacache) if args.cache is not None else None
    suffix = ".mp4" if lib.draws_video(pipe) else ".png"
    out = args.out or Path("out/ddit").with_suffix(suffix)
    if out.suffix.lower() != suffix:
        raise ValueError(f"{out} must end in {suffix}, which is what {type(pipe).__name__} draws")
    if suffix == ".mp4":
        outputs.check_video_writer()
    named = args.adapter not in (None, "none")
    adapter = lib.load_adapter(args.adapter, dtype=args.dtype, device=args.device) if named else None
    config = _schedule(args, dict(preset.schedule))
    sizes = {"height": args.height, "width": args.width, "num_frames": args.frames}
    settings = lib.call_settings(preset, num_inference_steps=args.steps, **sizes)
    lib.check_size(pipe, settings)
    prompts = [args.prompt] * args.num_images
    seeds = [args.seed + i for i in range(args.num_images)]
    with _step_bar() as on_step:
        same: dict[str, Any] = {"preset": preset, "adapter": adapter, "cache": cache, "on_step": on_step}
        if args.compare:
            plain, dynamic = lib.race(pipe, prompts, seeds, settings, config, repeats=args.repeats, **same)
        else:
            plain, dynamic = None, lib.run(pipe, prompts, seeds, settings, config=config, **same)
    report = dynamic.report
    assert report is not None
    result = {
        "command": command_line(),
        "prompt": args.prompt,
        "seeds": seeds,
        "model": args.model,
        "adapter": args.adapter or "none",
        "cache": args.cache or "none",
        **report.to_dict(),
    }
    result.update(seconds=dynamic.seconds, schedule=config.to_dict(), environment=environment(args.device))
    for i in range(len(prompts)):
        print(f"scales: {report.strip(i)}")
    print(f"tokens {report.tokens_fraction:.1%}, FLOPs {report.flops_fraction:.1%} of a plain run")
    if plain is not None:
        from ddit.eval.metrics import similarity

        result.update(similarity(outputs.frames(plain.pictures), outputs.frames(dynamic.pictures)))
        result.update(baseline_seconds=plain.seconds, speedup=plain.seconds / dynamic.seconds)
        print(f"speed {result['speedup']:.2f}x of plain, PSNR {result['psnr']:.1f} dB, SSIM {result['ssim']:.3f}")
    written = outputs.save(out, dynamic.pictures, None if plain is None else plain.pictures, fps=args.fps)
    if args.json is not None:
        write_json(args.json, result)
        written.append(args.json)
    if args.plot is not None:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        report.plot(args.plot, threshold=config.threshold if config.policy == "dynamic" else None)
        written.append(args.plot)
    print("wrote " + ", ".join(map(str, written)))


class _step_bar:
    """Progress bar of one run after another, with the scale of the current step."""

    def __enter__(self) -> Callable[[int, int, list[int]], None]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("scale {task.fields[scale]}"),
            TimeRemainingColumn(),
            transient=True,
        )
        self.task = self.bar.add_task("", total=None, scale="1")
        self.bar.start()
        return self.advance

    def advance(self, step: int, total: int, scales: list[int]) -> None:
        shown = " ".join(map(str, scales)) if len(scales) <= 8 else f"{min(scales)} to {max(scales)}"
        self.bar.update(self.task, completed=step, total=total, scale=shown)

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()


def _train(args: argparse.Namespace) -> None:
    values: dict[str, Any] = {}
    if args.config is not None:
        import yaml

        try:
            values = yaml.safe_load(args.config.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{args.config} is neither YAML nor JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{args.config} must hold names and values of training settings")
    flags = {f.name: getattr(args, f.name) for f in fields(TrainConfig)}
    config = TrainConfig.from_dict({**values, **{k: v for k, v in flags.items() if v is not None}})
    if args.dry_run:
        _plan(config, args.json)
        return
    out = Path(config.out)
    for path in (out / "train.json", *([args.json] if args.json else [])):
        check_writable(path)
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
    from ddit.known import names
    from ddit.models import supported_models

    for name, value in environment("cpu").items():
        print(f"{name}: {value}")
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPUs: {', '.join(gpus) or 'none'}")
    print(f"supported models: {', '.join(supported_models())}")
    print(f"architectures known by name: {', '.join(names())}")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"ddit: warning: {message}", file=sys.stderr)
