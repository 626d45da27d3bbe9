"""The commands that draw: `ddit generate` and `demo`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddit.cli.common import (
    FPS,
    add_command,
    add_flag,
    check_column,
    check_outputs,
    check_plot,
    check_run,
    column_option,
    command_line,
    environment,
    files_of,
    model_options,
    positive,
    seed,
    words_of,
)
from ddit.config import Coarse, PatchSchedule, PlannedSchedule, SkipSchedule
from ddit.pipelines.methods import KINDS, SKIP, make_method, patches_of, skip_of
from ddit.preset import Preset
from ddit.util.extras import require
from ddit.util.files import write_json

ENDINGS = (".png", ".mp4", ".wav")
"""Of what is drawn."""
DEMO_SIDE = 384
"""Height and width in pixels that its pictures are shown at."""
DEMO_PROMPT = "a plain blue heart left of a checkered yellow star on a brick background"


def add_draw(commands: Any) -> None:
    """The commands with their options."""
    generate = add_command(commands, "generate", _generate, "draw a prompt, with patches that follow the content")
    generate.add_argument("prompt", nargs="?")
    generate.add_argument(
        "--prompts", help="file of prompts, such as one per line, instead of one; --out is a folder then"
    )
    column_option(generate)
    model_options(generate)
    method_options(generate)
    generate.add_argument("--seed", type=seed, default=0)
    generate.add_argument("--num-images", "--batch", type=positive, default=1, help="pictures of seed, seed + 1, ...")
    generate.add_argument("--compare", action="store_true", help="also run plain and report speedup and likeness")
    generate.add_argument("--repeats", type=positive, help="with --compare: times the median of this many (default: 1)")
    fps_option(generate)
    generate.add_argument("--out", type=Path, help="PNG, MP4 of clips, or WAV of sound (default: out/ddit.png, ...)")
    generate.add_argument("--json", type=Path, help="write a report")
    generate.add_argument("--plot", type=Path, help="plot scale and statistic against the step")

    demo = add_command(commands, "demo", _demo, "watch it work on the embedded model: plain and dynamic side by side")
    demo.add_argument("--out", type=Path, default=Path("out/demo.png"))


def fps_option(command: argparse.ArgumentParser) -> None:
    """How fast a clip is."""
    command.add_argument("--fps", type=positive, help=f"frames per second of a clip (default: {FPS})")


def method_options(command: argparse.ArgumentParser) -> None:
    """A flag for each of `ddit.pipelines.methods.WORDS`; what is not given is the model's preset's."""
    patches = command.add_argument_group(
        "patches", "which patches the model sees in a step (default: the paper's rule)"
    )
    patches.add_argument("--patches", choices=KINDS, help="paper is the rule to the letter")
    add_flag(patches, PlannedSchedule, "speedup", PLANNED_HELP, name="patch_speedup")
    patches.add_argument("--schedule", type=int, nargs="+", metavar="SCALE", help="scale of each step, no rule")
    for field, text in RULE_HELP.items():
        add_flag(patches, PatchSchedule, field, text)
    add_flag(patches, Coarse, "start", "how a coarse step is computed without an adapter")
    add_flag(patches, Coarse, "positions", "of large patches")
    skip = command.add_argument_group("skip", "in which steps the model is not called (default: in none)")
    for word, text in SKIP_HELP.items():
        add_flag(skip, SkipSchedule, SKIP[word], text, name=word)
    command.add_argument(
        "--cache", help="teacache:0.25, first-block:0.1, magcache:0.06, cache-dit:0.08 or taylorseer:4"
    )


PLANNED_HELP = "so many times less work by large patches alone, in steps that are planned, no rule"
RULE_HELP = {
    "threshold": "tau: larger uses larger patches",
    "percentile": "rho of the paper",
    "order": "of the difference of the latents, 1 to 3",
    "scales": "to choose from, such as 1 2 4",
    "warmup": "full steps at the beginning",
    "settle": "keep a patch size until the difference spans steps of that size alone",
    "careful": "large patches only where the adapter has learnt them, or what they drop lies below the noise",
}
SKIP_HELP = {
    "speedup": "call the model so rarely that a run takes so many times less work",
    "quality": "so little work as keeps this PSNR in dB to the plain run",
    "skip_threshold": "while forecasts change the picture by less than this",
}


def _generate(args: argparse.Namespace) -> None:
    given = words_of(args)
    patches_of(given, Preset())
    skip_of(given)
    out = args.out
    if args.prompts is not None:
        out = (out or Path("out/ddit")) / "00001.json"
    check_run(args, [*files_of(out or Path("out/ddit.png"), args.num_images), args.json, args.plot])
    if args.repeats is not None and not args.compare:
        raise ValueError("--repeats says how often --compare takes times; give that too, or leave it out")
    if args.plot is not None:
        require("matplotlib", "--plot")
        check_plot(args.plot)
    if args.prompt is not None and args.prompts is not None:
        raise ValueError("a prompt and --prompts were given; leave one of them out")
    check_column(args.prompt_column, args.prompts, "--prompts")
    if args.prompts is not None:
        _draw_many(args)
        return
    if args.prompt is None:
        raise ValueError("give a prompt to draw, or --prompts FILE with one per line")
    if args.out is not None and args.out.suffix.lower() not in ENDINGS:
        raise ValueError(f"{args.out} must end in .png, for a video model in .mp4, or for sound in .wav")
    from ddit.cli.drawing import Drawing
    from ddit.pipelines import loading

    loading.check_prompt(args.prompt, args.model)
    drawing = Drawing.load(args, args.device)
    out = args.out or Path("out/ddit").with_suffix(drawing.suffix)
    if out.suffix.lower() != drawing.suffix:
        raise ValueError(f"{out} must end in {drawing.suffix}, which is what {type(drawing.pipe).__name__} makes")
    check_outputs([*files_of(out, args.num_images), args.json, args.plot])
    with _step_bar() as on_step:
        result, written = drawing.draw(args.prompt, out, on_step, plot=args.plot)
    for row in result["strips"]:
        print(f"steps: {row}")
    print(f"tokens {result['tokens_fraction']:.1%}, FLOPs {result['flops_fraction']:.1%} of a plain run")
    if args.compare:
        units = {"psnr": "PSNR {:.1f} dB", "ssim": "SSIM {:.3f}", "snr": "signal to noise {:.1f} dB"}
        likeness = [shown.format(result[name]) for name, shown in units.items() if name in result]
        print(f"speed {result['speedup']:.2f}x of plain, {', '.join(likeness)}")
    if args.json is not None:
        write_json(args.json, result)
        written.append(args.json)
    print("wrote " + ", ".join(map(str, written)))


def _demo(args: argparse.Namespace) -> None:
    """Plain, patches, and patches with skipping: one prompt, one seed, by turns."""
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"{args.out} must end in .png")
    check_outputs([args.out, args.out.with_suffix(".json")])
    from ddit.pipelines import generate as lib
    from ddit.pipelines import loading, outputs

    pipe, preset = loading.load_pipeline("embedded")
    methods = {
        "plain": None,
        "patches": make_method({}, preset, load_adapter=loading.load_adapter),
        "patches + skip": make_method({"patches": "rule", "speedup": 3}, preset, load_adapter=loading.load_adapter),
    }
    print(f"{DEMO_PROMPT!r}: {', '.join(methods)}, by turns", flush=True)
    drawn = lib.by_turns(pipe, [DEMO_PROMPT], [0], lib.call_settings(preset), methods, repeats=3)
    plain = drawn["plain"]
    figures = {}
    for name, run in drawn.items():
        row: dict[str, Any] = {"seconds": run.seconds, "speedup": plain.seconds / run.seconds}
        if run.report is not None:
            row |= {"psnr": outputs.psnr(plain.pictures, run.pictures), **run.report.to_dict()}
            row["strip"] = run.report.strip()
            print(
                f"{name}: {row['speedup']:.2f}x as fast, {row['flops_fraction']:.0%} of the work, "
                f"PSNR to plain {row['psnr']:.1f} dB\n  {row['strip']}"
            )
        figures[name] = row
    outputs.save_row(args.out, {name: run.pictures[0] for name, run in drawn.items()}, DEMO_SIDE)
    print("a small model stands in for a large one here; docs/embedded.md tells how far that goes")
    about = {"command": command_line(), "prompt": DEMO_PROMPT, "environment": environment("cpu")}
    report = args.out.with_suffix(".json")
    write_json(report, {**about, "methods": figures})
    print(f"wrote {args.out}, {report}")


def _draw_many(args: argparse.Namespace) -> None:
    """A picture or clip and its report for each line of a file; those that are there already stay.

    Under ``accelerate launch`` each process draws its share.
    """
    from accelerate import PartialState

    from ddit.cli.drawing import Drawing
    from ddit.pipelines import loading
    from ddit.pipelines.prompts import read_prompts
    from ddit.util.progress import progress

    if args.json is not None or args.plot is not None:
        raise ValueError("with --prompts each output has its report beside it; leave --json and --plot out")
    folder = args.out or Path("out/ddit")
    if folder.suffix.lower() in ENDINGS:
        raise ValueError(
            f"{folder} must be a folder with --prompts; its files are numbered by the lines of {args.prompts}"
        )
    prompts = read_prompts(args.prompts, args.prompt_column)
    for prompt in prompts:
        loading.check_prompt(prompt, args.model)
    state = PartialState(cpu=args.device == "cpu")
    several = state.num_processes > 1 and args.device == "cuda"
    drawing = Drawing.load(args, f"cuda:{state.local_process_index}" if several else args.device)
    names = {i: folder / f"{i:05d}{drawing.suffix}" for i in range(1, len(prompts) + 1)}
    missing = [i for i, path in names.items() if not drawing.is_there(prompts[i - 1], path)]
    state.wait_for_everyone()  # before the first of them adds to the folder, so that all see the same missing
    mine = missing[state.process_index :: state.num_processes]
    with progress("prompts", len(mine), hidden=not state.is_main_process) as advance:
        for i in mine:
            result, _ = drawing.draw(prompts[i - 1], names[i])
            write_json(names[i].with_suffix(".json"), result)
            advance()
    print(f"wrote {len(mine)} of {len(prompts)} to {folder}; {len(prompts) - len(missing)} were there")


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
