"""`ddit embedded`: train the models that ship, and their judges."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddit.cli.common import add_command, check_writable, command_line, environment, positive
from ddit.config import SkipSchedule
from ddit.files import write_json


def add_embedded(commands: Any) -> None:
    """The command with its stages."""
    embedded = add_command(commands, "embedded", None, "train the models that ship, and their judges")
    stages = embedded.add_subparsers(title="stages", required=True, metavar="STAGE")

    def stage(name: str, run: Callable[..., None], text: str, folder: str | None = None) -> argparse.ArgumentParser:
        command = add_command(stages, name, run, text)
        if folder is not None:
            command.add_argument("--video", action="store_true", help="of the video model")
            command.add_argument("--folder", type=Path, help=f"default: {folder}, of the video model {folder}-video")
            command.set_defaults(default_folder=folder)
        return command

    train = stage("train", _train_embedded, "autoencoder, text and flow; resumes where it stopped", "runs/embedded")
    train.add_argument("--flow-steps", type=positive)
    train.add_argument("--start-from", help="folder of a finished model to train on, instead of from nothing")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default="cpu")
    stage(
        "install", _install_embedded, "measure a trained model's preset and ship it with the package", "runs/embedded"
    )
    distilled = stage("install-corrector", _install_corrector, "ship a corrector with the package")
    distilled.add_argument("--video", action="store_true", help="of the video model")
    distilled.add_argument("--folder", type=Path, default=Path("runs/corrector"))
    tune = stage("threshold", _choose_threshold, "choose the skip threshold to ship, on the prompts kept for tuning")
    tune.add_argument("--model", default="embedded", help="folder of a model (default: the embedded one)")
    tune.add_argument("--thresholds", type=float, nargs="+", default=[2e-3, 4e-3, 6e-3, 8e-3, 16e-3])
    tune.add_argument("--margin", type=float, default=0.01, help="adherence it may cost (default: %(default)s)")
    tune.add_argument("--prompts", type=positive, default=100)
    tune.add_argument("--batch", type=positive, default=8)
    tune.add_argument("--out", type=Path, default=Path("docs/results/threshold"), help="stem of .json, .md and .png")
    words = stage("prompts", _write_prompts, "prompts of a grammar that no evaluation uses, for ddit train")
    words.add_argument("--video", action="store_true", help="of the video model")
    words.add_argument("--count", type=positive, default=1000)
    words.add_argument("--out", type=Path, default=Path("runs/prompts.txt"))
    stage("detector", _train_detector, "train the judge on drawings", "runs/detector")
    check = stage("check-detector", _check_detector, "the judge's accuracy on held-out drawings")
    check.add_argument("--video", action="store_true", help="of the video model")
    check.add_argument("--count", type=positive, default=2000)
    check.add_argument("--out", type=Path, default=Path("docs/results/detector.json"))


def _folder(args: argparse.Namespace) -> Path:
    return args.folder or Path(args.default_folder + "-video" * args.video)


def _write_prompts(args: argparse.Namespace) -> None:
    from itertools import islice

    from ddit.embedded.scenes import scenes
    from ddit.embedded.video.clips import clips

    check_writable(args.out)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # A seed of its own: training and adapters see the same split of the grammar, but not the same prompts.
    source = (clips if args.video else scenes)(77, "train")
    args.out.write_text("".join(f"{asked.prompt}\n" for asked in islice(source, args.count)))
    print(f"wrote {args.out}")


def _train_embedded(args: argparse.Namespace) -> None:
    chosen = {"flow_steps": args.flow_steps} if args.flow_steps else {}
    if args.video:
        from ddit.embedded.video import training

        if args.start_from or args.device != "cpu":
            raise ValueError("the video model is trained from nothing on the CPU; leave --start-from and --device out")
        training.train(_folder(args), training.TrainingConfig(seed=args.seed, **chosen))
        return
    from ddit.embedded.config import TrainingConfig
    from ddit.embedded.training import train

    if args.start_from and not (Path(args.start_from) / "model_index.json").is_file():
        raise ValueError(f"{args.start_from} holds no pipeline; name the folder of a trained embedded model")
    config = TrainingConfig(seed=args.seed, start_from=args.start_from, **chosen)
    train(_folder(args), config, args.device)


def _install_embedded(args: argparse.Namespace) -> None:
    from ddit.embedded import install
    from ddit.embedded.video import install as video_install

    ship = video_install.install if args.video else install.install
    print(f"wrote {ship(_folder(args))}")


def _install_corrector(args: argparse.Namespace) -> None:
    from ddit.embedded.install import install_corrector
    from ddit.loading import EMBEDDED

    model, to = EMBEDDED["embedded-video" if args.video else "embedded"]
    print(f"wrote {install_corrector(args.folder, model=model, to=to)}")


def _choose_threshold(args: argparse.Namespace) -> None:
    for threshold in args.thresholds:
        SkipSchedule(threshold=threshold)
    if not 0 <= args.margin <= 1:
        raise ValueError(f"margin is {args.margin}; it must lie between 0 and 1")
    from ddit.eval.suites import SuiteConfig, choose_threshold
    from ddit.loading import model_folder
    from ddit.preset import FILE, Preset

    folder = model_folder(args.model)
    for path in (args.out.with_suffix(".json"), folder / FILE):
        check_writable(path)
    config = SuiteConfig(model=args.model, prompts=args.prompts, batch=args.batch, out=args.out)
    about = {"command": command_line(), "environment": environment("cpu")}
    chosen = choose_threshold(config, args.thresholds, args.margin, about)["chosen"]
    preset = Preset.load(folder)
    replace(preset, skip=SkipSchedule(threshold=chosen)).save(folder)
    print(f"skip threshold {chosen:g} written into {folder}")


def _train_detector(args: argparse.Namespace) -> None:
    from ddit.embedded import detector
    from ddit.embedded.video import judge

    (judge if args.video else detector).train_detector(_folder(args))


def _check_detector(args: argparse.Namespace) -> None:
    check_writable(args.out)
    if args.video:
        from diffusers import AutoencoderKLWan

        from ddit.embedded.video import MODEL_FOLDER as VIDEO_FOLDER
        from ddit.embedded.video import judge

        wan = AutoencoderKLWan.from_pretrained(VIDEO_FOLDER / "vae") if VIDEO_FOLDER.exists() else None
        figures: dict[str, Any] = judge.check(judge.load_detector(), args.count, vae=wan)
    else:
        from diffusers import AutoencoderKL

        from ddit.embedded import MODEL_FOLDER
        from ddit.embedded.detector import evaluate_detector, load_detector

        vae: Any = AutoencoderKL.from_pretrained(MODEL_FOLDER / "vae")
        figures = evaluate_detector(load_detector(), args.count, seed=500, vae=vae)
    write_json(args.out, {"command": command_line(), "environment": environment("cpu"), **figures})
    print(json.dumps(figures))
