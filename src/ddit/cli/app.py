"""`ddit app`, a page to try a model on, and `ddit study`, blind votes on pairs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ddit.cli.common import (
    add_command,
    call_options,
    check_address,
    check_outputs,
    check_run,
    column_option,
    command_line,
    environment,
    model_options,
    positive,
    seed,
    words_of,
)
from ddit.cli.draw import fps_option, method_options
from ddit.pipelines.methods import patches_of, skip_of
from ddit.preset import Preset
from ddit.util.extras import require
from ddit.util.files import ended, write_json, write_text


def add_app(commands: Any) -> None:
    """The commands with their options."""
    app = add_command(commands, "app", _app, "a page in the browser: turn the knobs, or vote in a blind study")
    model_options(app)
    app.add_argument("--study", type=Path, help="folder that ddit study prepare made, to serve beside")
    app.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    app.add_argument("--port", type=positive, default=7860, help="default: %(default)s")

    study = add_command(commands, "study", None, "a blind study: which of two pictures do people prefer?")
    stages = study.add_subparsers(title="stages", required=True, metavar="STAGE")
    prepare = add_command(stages, "prepare", _prepare, "draw the pairs; goes on where it stopped")
    prepare.add_argument("--prompts", required=True, help="file of prompts, such as one per line")
    prepare.add_argument("--out", type=Path, required=True, help="folder of the study")
    column_option(prepare)
    model_options(prepare)
    method_options(prepare)
    prepare.add_argument("--seed", type=seed, default=0, help="another one adds pairs (default: %(default)s)")
    fps_option(prepare)
    results = add_command(stages, "results", _results, "the table of answers, and all votes as CSV")
    results.add_argument("study", type=Path, help="folder of the study")
    results.add_argument("--out", type=Path, help="stem of .json and .csv (default: results in the study's folder)")


def _app(args: argparse.Namespace) -> None:
    check_run(args, ())
    require("gradio", "ddit app")
    require("matplotlib", "ddit app")
    check_address(args.host, args.port)
    from ddit.app.study import Study

    study = None if args.study is None else Study.open(args.study)
    from ddit.app import page
    from ddit.app.draw import Studio
    from ddit.pipelines import generate as lib
    from ddit.pipelines import loading, outputs
    from ddit.pipelines.sounds import refuse_sound

    load = {"dtype": args.dtype, "device": args.device}
    pipe, preset = loading.load_pipeline(args.model, preset=args.preset, **load)
    refuse_sound(pipe)
    if lib.draws_video(pipe):
        outputs.check_video_writer()
    settings = lib.call_settings(preset, **call_options(args))
    lib.check_call(pipe, settings)
    studio = Studio(pipe, preset, args.model, settings, load)
    studio.check_adapter(args.adapter)
    page.serve(page.build(studio, study, adapter=args.adapter), study, args.host, args.port)


def _prepare(args: argparse.Namespace) -> None:
    given = words_of(args)
    patches_of(given, Preset())
    skip_of(given)
    from ddit.app.study import DATABASE, Study

    check_run(args, [args.out / DATABASE])
    Study.check(args.out)
    from ddit.app.draw import draw_pairs
    from ddit.cli.drawing import Drawing
    from ddit.pipelines import loading
    from ddit.pipelines.prompts import read_prompts
    from ddit.pipelines.sounds import refuse_sound
    from ddit.util.progress import progress

    prompts = read_prompts(args.prompts, args.prompt_column)
    for prompt in prompts:
        loading.check_prompt(prompt, args.model)
    drawing = Drawing.load(args, args.device)
    refuse_sound(drawing.pipe)
    study = Study.prepare(args.out, {**drawing.setup, "fps": drawing.fps, "suffix": drawing.suffix}, prompts, args.seed)
    pairs = study.pairs()
    with progress("pairs", len(pairs)) as advance:
        count = draw_pairs(study, drawing.pipe, drawing.settings, drawing.method, fps=drawing.fps, advance=advance)
    print(f"drew {count} of {2 * len(pairs)} for {args.out}; serve them with 'ddit app --study {args.out}'")


def _results(args: argparse.Namespace) -> None:
    from ddit.app.study import Study, as_csv, markdown

    study = Study.open(args.study)
    files = [ended(args.out or args.study / "results", end) for end in (".json", ".csv")]
    check_outputs(files)
    results = study.results()
    votes = study.votes()
    write_json(files[0], {"command": command_line(), "environment": environment("cpu"), **results, "rows": votes})
    write_text(files[1], as_csv(votes))
    print(markdown(results), end="")
    print(f"wrote {', '.join(map(str, files))}")
