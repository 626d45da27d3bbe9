"""The commands that measure: `ddit evaluate`, `compare`, `bench` and `calibrate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ddit.cli.common import (
    add_command,
    call_options,
    check_column,
    check_outputs,
    check_run,
    column_option,
    command_line,
    environment,
    model_options,
    positive,
    seed,
)
from ddit.config import PatchSchedule
from ddit.util.extras import require
from ddit.util.files import ended, write_json, write_text

PAPER = "paper"
EMBEDDED_SUITES = ("embedded", "embedded-video")
JUDGES = ("fid", "clip", "imagereward", "lpips", "ssim", "psnr", "vbench")
PROMPTS, CALIBRATION = 200, 8
"""How many are drawn to judge and to calibrate, where nobody says."""
TIMED: dict[str, Any] = {"batch": [1], "schedule": PAPER, "steps": [50], "repeats": 15}
"""Options of `ddit bench` that only timing has, with their defaults."""


def add_measure(commands: Any) -> None:
    """The commands with their options."""
    _add_evaluate(commands)
    _add_bench(commands)
    calibrate = add_command(commands, "calibrate", _calibrate, "measure a model's preset on plain runs of its own")
    model_options(calibrate)
    calibrate.add_argument(
        "--prompts", help="file of prompts, such as one per line (default: those of the embedded model)"
    )
    column_option(calibrate)
    text = f"prompts to run (default: {CALIBRATION}, or as many as the file has)"
    calibrate.add_argument("--count", type=positive, help=text)
    calibrate.add_argument("--batch", type=positive, default=1, help="prompts that are run together")
    calibrate.add_argument("--seed", type=seed, default=0)
    calibrate.add_argument("--out", type=Path, help="folder of the preset (default: the model's own)")


def _add_evaluate(commands: Any) -> None:
    """`ddit evaluate` and `compare`, which share most options."""
    evaluate = add_command(commands, "evaluate", _evaluate, "judge methods on held-out prompts of the embedded model")
    model_options(evaluate)
    evaluate.add_argument(
        "--suite",
        choices=("quality", "paper", "proxy", *EMBEDDED_SUITES),
        default="quality",
        help="paper has the field's judges on prompts of a file, for any model; proxy is the proxy card, how far "
        f"a small model behaves like the real ones; {' and '.join(EMBEDDED_SUITES)} are quality on that model",
    )
    evaluate.add_argument(
        "--methods", nargs="+", help="such as plain plain:run_steps=20 ddit:threshold=0.01 ddit:speedup=3,patches=full"
    )
    _judging_options(evaluate)
    _paper_options(evaluate)
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


def _add_bench(commands: Any) -> None:
    bench = add_command(commands, "bench", _bench, "count or time a step at every scale; needs no weights")
    bench.add_argument("--arch", nargs="+", default=["flux.1-dev"], help="names (see ddit info), folders or hub ids")
    bench.add_argument(
        "--size", nargs="+", default=["1024x1024"], help="HEIGHTxWIDTH, HEIGHTxWIDTHxFRAMES, or of sound 60s"
    )
    bench.add_argument("--scales", type=positive, nargs="+", default=[1, 2, 4])
    bench.add_argument("--blocks", type=positive, nargs="+", default=[], help="keep only so many of each kind")
    bench.add_argument("--adapter-rank", type=int, help="an adapter of this rank along")
    bench.add_argument("--device", default="meta", help="where to time; meta, the default, counts only")
    text = "default: bfloat16, on a CPU float32, since many CPUs emulate the other"
    bench.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=text)
    bench.add_argument("--batch", type=positive, nargs="+")
    bench.add_argument("--random-weights", action="store_true", help="don't read those of a folder or hub id")
    bench.add_argument("--compile", action="store_true", help="compile the repeated blocks")
    bench.add_argument("--attention", help="one of diffusers' attention backends, such as native or flash")
    bench.add_argument(
        "--schedule",
        help="scales such as 1,1,1,4,4,2,1 (the last one holds), a JSON file that ddit generate wrote, or "
        f"{PAPER} (the default): coarsest first, as much work as makes the paper's 2.18x",
    )
    bench.add_argument("--steps", type=positive, nargs="+", help="lengths of the schedule")
    bench.add_argument("--runs", action="store_true", help="time whole runs, and do not only predict them")
    bench.add_argument("--repeats", type=positive, help=f"medians of this many (default: {TIMED['repeats']})")
    bench.add_argument("--trace", type=Path, help="write a trace of a step at each scale for ui.perfetto.dev")
    bench.add_argument("--out", "--json", type=Path, help="stem of .json and .md")


def _judging_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prompts", type=_count, help=f"how many (default: {PROMPTS}, of suite paper all)")
    text = (
        "prompts of your own for any model, whose likeness to plain is judged: a file (text with one per line, .json, "
    )
    text += ".jsonl, .csv, .tsv, .parquet), or dataset:OWNER/NAME on the hub"
    command.add_argument("--prompt-file", metavar="FILE", help=text)
    column_option(command)
    text = "which of the project's own prompts: those that judge (the default), or those that tune"
    command.add_argument("--split", choices=("judge", "tune"), help=text)
    text = "plan and tell work at the costs of this model, such as flux.1-dev or wan2.1-1.3b (see ddit info)"
    command.add_argument("--costs", metavar="NAME", help=text)
    command.add_argument("--batch", type=positive, default=8)
    command.add_argument("--seed", type=seed, default=0)


def _count(text: str) -> int:
    try:
        return positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; a file of prompts is given with --prompt-file") from None


def _paper_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("suite paper")
    text = "who judges (default: all but vbench, which is for clips; fid with --reference)"
    group.add_argument("--judges", nargs="+", choices=JUDGES, default=[], help=text)
    text = "what FID compares with: a folder of pictures, or statistics as .npz of clean-fid"
    group.add_argument("--reference", type=Path, metavar="PATH", help=text)
    text = "a judge's weights on this machine or the hub instead of the default ones; may be given several times"
    group.add_argument("--weights", type=_weights, action="append", default=[], metavar="JUDGE=PATH", help=text)


def _weights(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or name not in JUDGES:
        raise argparse.ArgumentTypeError(f"{text!r} is not JUDGE=PATH with one of {', '.join(JUDGES)}")
    return name, path


def _evaluate(args: argparse.Namespace) -> None:
    if args.suite in EMBEDDED_SUITES:
        if args.model not in ("embedded", args.suite):
            raise ValueError(f"suite {args.suite} is of another model than {args.model}; leave one of them out")
        args.model, args.suite = args.suite, "quality"
    paper = args.suite == "paper"
    endings = (".json", ".md", ".jsonl") if paper else (".json", ".md", ".png")
    inside = [ended(args.out, ".pictures") / "any"] if paper else []
    check_run(args, [*(ended(args.out, end) for end in endings), *inside])
    if not paper:
        require("matplotlib", "the figure of a measurement")
        _refuse_paper_options(args)
    texts = _texts(args)
    if not texts and args.prompts == 1:
        raise ValueError("prompts is 1; a Fréchet distance is one of many pictures: draw at least 2")
    from ddit.eval.suites import SuiteConfig, run_suite

    at = tuple(getattr(args, "at", ()))
    if at and args.methods:
        raise ValueError(
            "--at chooses among the default methods; with --methods give each its steps: plain:run_steps=25"
        )
    if at and args.steps is not None:
        raise ValueError("--at names the numbers of steps; leave --steps out")
    same = ("model", "adapter", "batch", "seed", "device", "dtype", "out", "preset", "costs")
    config = SuiteConfig(
        **{name: getattr(args, name) for name in same},
        split=args.split or "judge",
        prompts=args.prompts or PROMPTS,
        methods=tuple(args.methods or ()),
        settings=call_options(args),
        run_steps=at,
        texts=tuple(texts),
        judges=tuple(getattr(args, "judges", ())),
        weights=dict(getattr(args, "weights", ())),
        reference=getattr(args, "reference", None),
    )
    run_suite(args.suite, config, {"command": command_line(), "environment": environment(args.device)})
    print(f"wrote {ended(args.out, '.json')}")


def _refuse_paper_options(args: argparse.Namespace) -> None:
    given = [name for name in ("judges", "reference", "weights") if getattr(args, name, None)]
    if given:
        raise ValueError(f"--{given[0]} belongs to --suite paper; add that, or leave it out")


def _texts(args: argparse.Namespace) -> list[str]:
    """Prompts of the user's own, if there are any."""
    from ddit.pipelines.loading import EMBEDDED

    if args.prompt_file is not None:
        if args.split is not None:
            raise ValueError("--split chooses among the project's own prompts; leave it or --prompt-file out")
        from ddit.pipelines.prompts import read_prompts

        return read_prompts(args.prompt_file, args.prompt_column, args.prompts)
    check_column(args.prompt_column, args.prompt_file, "--prompt-file")
    if args.suite == "paper":
        raise ValueError("suite paper needs prompts, such as COCO's captions or DrawBench: --prompt-file FILE")
    if args.model not in EMBEDDED and not Path(args.model).is_dir():
        raise ValueError(
            "without --prompt-file only what the project's own grammars ask for can be judged; give the file, "
            f"or name {' or '.join(EMBEDDED)}, or a folder with a model that knows their words"
        )
    return []


def _calibrate(args: argparse.Namespace) -> None:
    from ddit.api import check_adapter
    from ddit.eval.calibrate import calibrate
    from ddit.eval.suites import subject_of
    from ddit.pipelines import generate as lib
    from ddit.pipelines import loading
    from ddit.pipelines.prompts import read_prompts
    from ddit.pipelines.sounds import refuse_sound
    from ddit.preset import FILE

    check_column(args.prompt_column, args.prompts, "--prompts")
    if args.prompts is None and args.model not in loading.EMBEDDED:
        raise ValueError("name a file with prompts: --prompts FILE, one per line")
    folder = args.out or loading.model_folder(args.model)
    if args.out is None and not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r} to write {FILE} into; name one with --out")
    check_run(args, (folder / FILE,))
    count, prompts = args.count or CALIBRATION, []
    if args.prompts is not None:
        prompts = read_prompts(args.prompts, args.prompt_column, count, least=args.count or 1)
    pipe, preset = loading.load_pipeline(args.model, dtype=args.dtype, device=args.device, preset=args.preset)
    refuse_sound(pipe)
    if args.prompts is None:
        prompts = [asked.prompt for asked in subject_of(pipe).prompts("tune", count, args.seed)]
    settings = lib.call_settings(preset, **call_options(args))
    lib.check_call(pipe, settings)
    adapter = None
    if args.adapter == "":
        raise ValueError("adapter is empty; name its folder or hub id, or say none")
    if (name := args.adapter or preset.adapter) not in ("", "none"):
        adapter = loading.load_adapter(name, dtype=args.dtype, device=args.device)
        adapter.check(pipe.transformer)
        check_adapter(adapter, preset.patches)
    calibrate(pipe, preset, prompts, settings, batch=args.batch, seed=args.seed, folder=folder, adapter=adapter)
    print(f"wrote {folder / FILE}")


def _bench(args: argparse.Namespace) -> None:
    named = [ended(args.out, end) for end in (".json", ".md")] if args.out is not None else []
    check_outputs([*named, args.trace])
    from ddit.eval import bench

    scales = sorted({1, *args.scales})
    PatchSchedule(scales=tuple(scales))
    sizes = [_size(text) for text in args.size]
    if args.device == "meta":
        _refuse_timing(args)
    for name, usual in TIMED.items():
        setattr(args, name, getattr(args, name) or usual)
    bench.parse_schedule(args.schedule, 1, dict.fromkeys(scales, 1.0))
    if args.trace is not None and len(args.arch) * len(args.size) * len(args.batch) > 1:
        raise ValueError("--trace writes one model at one size and batch; name one of each")
    kept: dict[str, Any] = {"blocks": args.blocks, "rank": args.adapter_rank, "scales": scales}
    results = [bench.count(arch, **size, **kept) for arch in args.arch for size in sizes]
    tables = [bench.counts_table(results)]
    print(tables[0])
    if args.device != "meta":
        results = _timed(args, results, kept)
        tables.append(bench.times_table(results))
        print(tables[1])
    if args.out is not None:
        about = {"command": command_line(), "environment": environment(args.device)}
        write_json(ended(args.out, ".json"), {**about, "counts": results})
        write_text(ended(args.out, ".md"), "\n".join(tables))
        print(f"wrote {ended(args.out, '.json')}")


def _refuse_timing(args: argparse.Namespace) -> None:
    """Refuse options that only timing has."""
    flags = ("compile", "attention", "runs", "trace", "random_weights")
    given = [f for f in flags if getattr(args, f)] + [f for f in ("dtype", *TIMED) if getattr(args, f) is not None]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{flags} need a device to time on; add --device cpu or cuda")


def _timed(args: argparse.Namespace, counted: list[dict[str, Any]], kept: dict[str, Any]) -> list[dict[str, Any]]:
    from ddit.eval import bench
    from ddit.util.progress import progress

    how = {name: getattr(args, name) for name in ("device", "random_weights", "compile", "attention")}
    how["dtype"] = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    results, loaded = [], None
    with progress("timings", len(counted) * len(args.batch) * (1 + args.runs * len(args.steps))) as advance:
        for row in counted:
            if loaded is None or loaded.model != row["model"]:
                loaded = None  # two of them may be more than the device holds
                loaded = bench.Bench(row["model"], **how, **kept)
            for batch in args.batch:
                size = {name: row[name] for name in ("height", "width", "frames", "seconds")}
                inputs = loaded.inputs(**size, batch=batch)
                figures = loaded.measure(
                    inputs,
                    schedule=args.schedule,
                    lengths=args.steps,
                    runs=args.runs,
                    repeats=args.repeats,
                    advance=advance,
                )
                results.append({**row, **how, **figures})
                if args.trace is not None:
                    loaded.trace(inputs, args.trace)
    return results


def _size(text: str) -> dict[str, int]:
    if text.endswith("s") and text[:-1].isdecimal():
        return {"seconds": int(text[:-1])}
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdecimal() for part in parts):
        raise ValueError(
            f"size is {text!r}; it must be HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES, such as 480x832x81, or 60s"
        )
    return dict(zip(("height", "width", "frames"), map(int, parts), strict=False))
