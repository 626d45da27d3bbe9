"""The commands that measure: `ddit evaluate`, `compare`, `bench` and `calibrate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ddit.cli.common import (
    add_command,
    check_run,
    check_writable,
    command_line,
    environment,
    model_options,
    positive,
)
from ddit.config import ScheduleConfig
from ddit.files import write_json


def add_measure(commands: Any) -> None:
    """The commands with their options."""
    evaluate = add_command(commands, "evaluate", _evaluate, "judge policies on held-out prompts of the embedded model")
    model_options(evaluate)
    evaluate.add_argument("--suite", choices=("quality", "velocity", "cost", "caches"), default="quality")
    evaluate.add_argument("--methods", nargs="+", help="such as plain plain:run_steps=20 dynamic:threshold=0.01")
    _judging_options(evaluate)
    evaluate.add_argument(
        "--repeats", type=positive, default=30, help="of --suite cost: it takes the median of this many"
    )
    evaluate.add_argument("--out", type=Path, default=Path("out/evaluate"), help="stem of .json, .md and .png")

    text = "race dynamic patches against fewer steps, caches and progressive resolution"
    compare = add_command(commands, "compare", _evaluate, text)
    model_options(compare)
    _judging_options(compare)
    compare.add_argument("--methods", nargs="+", help="as for evaluate (default: all that suit the model)")
    compare.add_argument(
        "--at", type=positive, nargs="+", default=[], help="numbers of steps to compare at, the first also for plain"
    )
    compare.add_argument("--out", type=Path, default=Path("out/compare"), help="stem of .json, .md, .png and .svg")
    compare.set_defaults(suite="compare")

    bench = add_command(commands, "bench", _bench, "count the work of a forward at every scale; needs no weights")
    bench.add_argument("--arch", nargs="+", default=["flux.1-dev"], help="names (see ddit info), folders or hub ids")
    bench.add_argument("--size", nargs="+", default=["1024x1024"], help="HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES")
    bench.add_argument("--scales", type=positive, nargs="+", default=[1, 2, 4])
    bench.add_argument("--adapter-rank", type=int, help="count an adapter along")
    bench.add_argument("--out", type=Path, help="stem of .json and .md")

    calibrate = add_command(commands, "calibrate", _calibrate, "measure a model's preset on plain runs of its own")
    model_options(calibrate, adapter=False)
    calibrate.add_argument("--prompts", help="file with a prompt per line (default: those of the embedded model)")
    calibrate.add_argument("--count", type=positive, default=8, help="prompts to run (default: %(default)s)")
    calibrate.add_argument("--batch", type=positive, default=1, help="prompts that are run together")
    calibrate.add_argument("--seed", type=int, default=0)
    calibrate.add_argument("--out", type=Path, help="folder of the preset (default: the model's own)")


def _judging_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prompts", type=positive, default=200)
    command.add_argument("--split", choices=("judge", "tune"), default="judge")
    command.add_argument("--batch", type=positive, default=8)
    command.add_argument("--seed", type=int, default=0)


def _evaluate(args: argparse.Namespace) -> None:
    check_run(args, (args.out.with_suffix(".json"),))
    from ddit.eval.suites import SuiteConfig, run_suite
    from ddit.generate import EMBEDDED

    if args.model not in EMBEDDED and not Path(args.model).is_dir():
        raise ValueError(
            "evaluate judges what the project's own grammars ask for; "
            f"name {' or '.join(EMBEDDED)}, or a folder with a model that knows their words"
        )

    chosen = {"num_inference_steps": args.steps, "height": args.height, "width": args.width}
    config = SuiteConfig(
        model=args.model,
        methods=tuple(args.methods or ()),
        prompts=args.prompts,
        adapter=args.adapter,
        split=args.split,
        batch=args.batch,
        seed=args.seed,
        settings={k: v for k, v in chosen.items() if v is not None},
        device=args.device,
        dtype=args.dtype,
        out=args.out,
        preset=args.preset,
        run_steps=tuple(getattr(args, "at", ())),
        repeats=getattr(args, "repeats", 1),
    )
    run_suite(args.suite, config, {"command": command_line(), "environment": environment(args.device)})
    print(f"wrote {args.out.with_suffix('.json')}")


def _calibrate(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from ddit import generate as lib
    from ddit.eval import calibrate
    from ddit.eval.suites import subject_of
    from ddit.preset import FILE
    from ddit.progress import progress
    from ddit.train.samples import read_prompts

    if args.prompts is None and args.model not in lib.EMBEDDED:
        raise ValueError("name a file with prompts: --prompts FILE, one per line")
    folder = args.out or lib.model_folder(args.model)
    if args.out is None and not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r} to write {FILE} into; name one with --out")
    check_run(args, (folder / FILE,))
    pipe, preset = lib.load_pipeline(args.model, dtype=args.dtype, device=args.device, preset=args.preset)
    if args.prompts is not None:
        prompts = read_prompts(args.prompts, args.count)
    else:
        prompts = [asked.prompt for asked in subject_of(pipe).prompts("tune", args.count, args.seed)]
    settings = lib.call_settings(preset, num_inference_steps=args.steps, height=args.height, width=args.width)
    lib.check_size(pipe, settings)
    with progress("TeaCache", len(prompts)) as advance:
        pairs = calibrate.teacache_changes(pipe, prompts, settings, seed=args.seed, advance=advance)
    turns = -(-len(prompts) // args.batch) * (1 + len(calibrate.THRESHOLDS))
    with progress("thresholds", turns) as advance:
        dial = calibrate.measure_dial(
            pipe, prompts, settings, preset, batch=args.batch, seed=args.seed, advance=advance
        )
    folder.mkdir(parents=True, exist_ok=True)
    replace(preset, teacache=calibrate.fit(pairs), dial=dial).save(folder)
    print(f"wrote {folder / FILE}")


def _bench(args: argparse.Namespace) -> None:
    if args.out is not None:
        check_writable(args.out.with_suffix(".json"))
    from ddit.eval.bench import count, table

    scales = sorted({1, *args.scales})
    ScheduleConfig(scales=tuple(scales))
    results = []
    for arch in args.arch:
        for size in map(_size, args.size):
            results.append(count(arch, **size, scales=scales, rank=args.adapter_rank))
    print(table(results), end="")
    if args.out is not None:
        write_json(
            args.out.with_suffix(".json"),
            {"command": command_line(), "environment": environment("meta"), "counts": results},
        )
        args.out.with_suffix(".md").write_text(table(results))
        print(f"wrote {args.out.with_suffix('.json')}")


def _size(text: str) -> dict[str, int]:
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdigit() for part in parts):
        raise ValueError(f"size is {text!r}; it must be HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES, such as 480x832x81")
    return dict(zip(("height", "width", "frames"), map(int, parts), strict=False))
