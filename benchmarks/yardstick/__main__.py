"""Make the yardstick, its models and their judge: ``python -m benchmarks.yardstick --help``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import sdpa_kernel

from benchmarks.yardstick.config import JudgeSettings, Settings, gpu
from benchmarks.yardstick.data import cached_clips, cached_drawings, sheet
from benchmarks.yardstick.fit import Deadline, OutOfTime
from benchmarks.yardstick.image import ImageKind
from benchmarks.yardstick.kind import Kind, train, unfinished
from benchmarks.yardstick.train_judge import train_judge
from benchmarks.yardstick.video import VideoKind
from ddit.embedded import MODEL_FOLDER, VIDEO_MODEL_FOLDER
from ddit.embedded.judge import JUDGE
from ddit.eval.subjects import Clips, Pictures
from ddit.preset import Preset
from ddit.train.parts import attention_backends
from ddit.util.files import read_lines, replacing_folder, write_json, write_text

KINDS: dict[str, Kind] = {kind.name: kind for kind in (ImageKind(), VideoKind())}


def main() -> None:
    args = _parser().parse_args()
    torch.set_num_threads(args.threads)
    with sdpa_kernel(attention_backends(args.device)):
        args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.yardstick", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def add(name: str, run: Any, **defaults: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run, **defaults)
        command.add_argument("--out", type=Path, default=Path("runs/yardstick"), help="folder of everything")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
        command.add_argument("--seed", type=int, default=0)
        return command

    def add_training(name: str, run: Any, settings: type[Any], **defaults: Any) -> argparse.ArgumentParser:
        command = add(name, run, **defaults)
        command.add_argument("--seconds", type=float, help="stop after so long; the same command goes on")
        names = ", ".join(field.name for field in fields(settings))
        change = {"nargs": "*", "default": [], "type": lambda pair: _change(pair, settings), "metavar": "NAME=VALUE"}
        command.add_argument("--set", help=f"change settings: {names}", **change)
        return command

    for kind in KINDS.values():
        command = add_training(f"train-{kind.name}", _train, kind.settings, kind=kind)
        command.add_argument("--only", choices=("vae", "text"), help="end after this stage")
    add_training("train-judge", _train_judge, JudgeSettings)
    for name, run in (("draw", draw), ("sample", sample)):
        show = add(name, run, kind=KINDS["image"])
        show.add_argument("--video", action="store_const", dest="kind", const=KINDS["video"], help="of the video model")
        show.add_argument("--count", type=int, default=16, help="number of pictures or clips")
    show.add_argument("--size", type=int, help="height and width (default: what it was trained for)")
    show.add_argument("--steps", type=int, default=50)
    show.add_argument("--checkpoint", help="take the averages in this checkpoint of the flow")
    check = add("check-judge", check_judge)
    check.add_argument("--count", type=int, default=1000, help="number of pictures; a fifth as many clips")
    check.add_argument("--json", type=Path, default=Path("docs/results/judge.json"))
    shipping = add("ship", ship)
    shipping.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the trainings' logs")
    return parser


def _change(pair: str, kind: type[Any]) -> tuple[str, Any]:
    """``NAME=VALUE`` of ``--set``, the value in JSON."""
    name, _, value = pair.partition("=")
    if name not in {field.name for field in fields(kind)}:
        raise argparse.ArgumentTypeError(f"there is no setting {name!r}; see --help")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        raise argparse.ArgumentTypeError(f"{pair!r}: the value is no number, true, false or [list]") from None


def _settings(args: argparse.Namespace, kind: type[Any]) -> Any:
    fast = gpu(kind) if args.device != "cpu" and issubclass(kind, Settings) else {}
    try:
        return kind(**{**fast, "seed": args.seed, **dict(args.set)})
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def draw(args: argparse.Namespace) -> None:
    """Draw a contact sheet of what is learnt from, sheet.png."""
    rng = np.random.default_rng([args.seed, 1])
    asked = list(islice(args.kind.asked(args.seed, "tune"), args.count))
    _write_sheet(args.out / "sheet.png", asked, np.stack([args.kind.draw(one, rng) for one in asked]))


def _train(args: argparse.Namespace) -> None:
    """Train the model, and write the pipeline."""
    kind, deadline = args.kind, Deadline(args.seconds)
    settings, folder = _settings(args, kind.settings), args.out / kind.name
    drawn = kind.drawn(args.out / "drawings", settings)
    write_json(folder / "settings.json", asdict(settings))
    try:
        pipe = train(kind, folder, settings, args.device, deadline, drawn, args.only)
    except OutOfTime as stop:
        print(f"{stop}; the same command goes on from there")
        return
    if pipe is not None:
        with replacing_folder(folder / "model") as partial:
            pipe.to(dtype=torch.float16).save_pretrained(partial)
            Preset(call={**kind.call, "num_inference_steps": 50}).save(partial)


def _train_judge(args: argparse.Namespace) -> None:
    """Train the judge of pictures and clips, judge.safetensors."""
    settings = _settings(args, JudgeSettings)
    folder, seed, workers, deadline = args.out / "drawings", settings.seed, settings.workers, Deadline(args.seconds)
    drawn = cached_drawings(folder, settings.pictures, seed, workers)
    filmed = cached_clips(folder, settings.clips, seed, workers)
    try:
        train_judge(args.out / "judge", drawn, filmed, settings, args.device, deadline)
    except OutOfTime as stop:
        print(f"{stop}; the same command goes on from there")


def sample(args: argparse.Namespace) -> None:
    """Draw a grid of pictures or clips with a model, sample.png."""
    asked = list(islice(args.kind.asked(args.seed, "tune"), args.count))
    _write_sheet(args.out / "sample.png", asked, generate([one.prompt for one in asked], args))


def check_judge(args: argparse.Namespace) -> None:
    """Write how much the shipped judge gets right of drawings it never saw: what no model can surpass."""
    told: dict[str, Any] = {"command": f"python -m benchmarks.yardstick check-judge --count {args.count}"}
    for name, subject, count in (("image", Pictures(), args.count), ("video", Clips(), args.count // 5)):
        rng = np.random.default_rng([args.seed, 2])
        asked = subject.prompts("judge", count, 50 + args.seed)
        verdicts = subject.verdicts(np.stack([KINDS[name].draw(one, rng) for one in asked]), asked)
        attributes = dict.fromkeys(key for verdict in verdicts for key in verdict)
        told[name] = {
            "drawings": count,
            **{key: float(np.mean([v[key] for v in verdicts if key in v])) for key in attributes},
        }
    write_json(args.json, told)
    print(json.dumps(told, indent=1))


def ship(args: argparse.Namespace) -> None:
    """Put the models and the judge that are finished into the package."""
    for kind, to in {"image": MODEL_FOLDER, "video": VIDEO_MODEL_FOLDER}.items():
        made = args.out / kind / "model"
        if made.exists():
            with replacing_folder(to) as partial:
                shutil.copytree(made, partial, dirs_exist_ok=True)
            log = args.results / f"training-{kind}.jsonl"
            write_text(log, "".join(_thinned(path) for path in sorted(made.parent.glob("*.jsonl"))))
            print(f"wrote {to} and {log}; 'ddit calibrate' measures its preset")
    judge = args.out / "judge" / "judge.safetensors"
    if judge.exists():
        JUDGE.parent.mkdir(parents=True, exist_ok=True)
        weights = {k: v.half() if v.is_floating_point() else v for k, v in load_file(judge).items()}
        save_file(weights, JUDGE)
        print(f"wrote {JUDGE}")


def _thinned(log: Path) -> str:
    """Every hundredth step of a stage's log, and its last, each with the stage's name."""
    steps = read_lines(log)
    kept = [step for step in steps if step["step"] % 100 == 0 or step is steps[-1]]
    return "".join(json.dumps({"stage": log.stem, **step}) + "\n" for step in kept)


def load(args: argparse.Namespace) -> Any:
    """The finished pipeline, or one with the averages of a checkpoint of the flow."""
    folder = args.out / args.kind.name
    if args.checkpoint:
        pipe = unfinished(args.kind, folder, args.checkpoint)
    elif (folder / "model").exists():
        pipe = DiffusionPipeline.from_pretrained(folder / "model", dtype=torch.float32)
    else:
        print(f"no model in {folder}; make one with train-{args.kind.name}, or name a --checkpoint", file=sys.stderr)
        raise SystemExit(2)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(args.device)


def generate(prompts: list[str], args: argparse.Namespace) -> np.ndarray:
    """Pictures ``[N, H, W, 3]`` or clips ``[N, F, H, W, 3]``, uint8, 16 at a time."""
    pipe, batches = load(args), []
    size = {"height": args.size, "width": args.size} if args.size else {}
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        settings = {**args.kind.call_of(args.checkpoint, len(part)), **size, "num_inference_steps": args.steps}
        generator = torch.Generator().manual_seed(args.seed + start)
        made = pipe(part, generator=generator, output_type="np", return_dict=False, **settings)[0]
        batches.append((np.asarray(made) * 255).round().astype(np.uint8))
    return np.concatenate(batches)


def _write_sheet(path: Path, asked: list[Any], made: np.ndarray) -> None:
    """Pictures side by side; of a clip every frame in a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if made.ndim == 5:
        made = made.transpose(0, 2, 1, 3, 4).reshape(len(made), made.shape[2], -1, 3)
    columns = next(k for k in (8, 6, 5, 4, 3, 2, 1) if len(made) % k == 0) if made.shape[2] < 300 else 1
    Image.fromarray(sheet(made, columns)).save(path)
    path.with_suffix(".txt").write_text("\n".join(scene.prompt for scene in asked) + "\n")


if __name__ == "__main__":
    main()
