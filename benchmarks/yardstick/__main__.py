"""Make the image yardstick: ``python -m benchmarks.yardstick --help``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from benchmarks.yardstick.autoencoder import encode, train_vae
from benchmarks.yardstick.components import make_pipeline
from benchmarks.yardstick.config import SIZES, Settings, gpu
from benchmarks.yardstick.data import cached_drawings, drawings, sheet, to_model
from benchmarks.yardstick.fit import Deadline, OutOfTime
from benchmarks.yardstick.flow import Flow, Source, train_flow
from benchmarks.yardstick.judge import Judge, adherence, frechet, load_judge, train_judge
from benchmarks.yardstick.scenes import Scene, scenes
from benchmarks.yardstick.text import train_text
from ddit.files import replacing_folder, write_json


def main() -> None:
    args = _parser().parse_args()
    torch.set_num_threads(args.threads)
    args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.yardstick", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, run in {"draw": draw, "train-image": train_image, "sample": sample, "judge": judge}.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--out", type=Path, default=Path("runs/yardstick"), help="folder of the run")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
        command.add_argument("--count", type=int, default={"judge": 200}.get(name, 16), help="number of pictures")
        command.add_argument("--seed", type=int, default=0)
        if name == "train-image":
            command.add_argument("--seconds", type=float, help="stop after so long; the same command goes on")
            command.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="change settings")
            command.add_argument(
                "--only", choices=("vae", "text", "flow", "judge"), help="train this stage and those it needs"
            )
        if name in ("sample", "judge"):
            command.add_argument("--size", type=int, default=128)
            command.add_argument("--steps", type=int, default=50)
            command.add_argument("--guidance", type=float, default=3.0)
            command.add_argument(
                "--checkpoint", help="take the averages in this checkpoint of the flow, with guidance 1"
            )
    return parser


def draw(args: argparse.Namespace) -> None:
    """Draw a contact sheet, sheet.png."""
    drawn = list(islice(drawings(args.seed, "tune"), args.count))
    _write_sheet(args.out / "sheet.png", [d[0] for d in drawn], np.stack([d[1] for d in drawn]))


def train_image(args: argparse.Namespace) -> None:
    """Train all stages that are not done, and write the pipeline."""
    changes = {name: json.loads(value) for name, value in (pair.split("=") for pair in args.set)}
    settings = (Settings if args.device == "cpu" else gpu)(seed=args.seed, **changes)
    write_json(args.out / "settings.json", asdict(settings))
    try:
        _train(args.out, settings, args.device, Deadline(args.seconds), args.only)
    except OutOfTime as stop:
        print(f"{stop}; the same command goes on from there")


def _train(out: Path, settings: Settings, device: str, deadline: Deadline, only: str | None) -> None:
    drawn = cached_drawings(out / "drawings", settings.pictures, settings.seed, settings.workers)
    if only != "judge":
        vae = train_vae(out, drawn.pictures, settings, device, deadline)
    if only in ("text", "flow", None):
        encoders = train_text(out, settings, device, deadline)
    if only in ("flow", None):
        latents = {size: encode(out, vae, drawn.pictures, size, device) for size in SIZES}
        source = Source.made(latents, drawn, encoders, settings, device)
        flow, _ = train_flow(out, source, device, deadline)
        pipe = make_pipeline(vae, encoders, flow.transformer).to(dtype=torch.float16)
        with replacing_folder(out / "model") as partial:
            pipe.save_pretrained(partial)
    if only in ("judge", None):
        train_judge(out, drawn, settings, device, deadline)


def sample(args: argparse.Namespace) -> None:
    """Draw a grid of pictures with the model, sample.png."""
    asked = list(islice(scenes(args.seed, "tune"), args.count))
    _write_sheet(args.out / "sample.png", asked, generate(load(args), asked, args))


def judge(args: argparse.Namespace) -> None:
    """Judge pictures of held-out prompts, judged.json."""
    asked = list(islice(scenes(args.seed, "judge"), args.count))
    network: Judge = load_judge(args.out).to(args.device)
    pictures = to_model(generate(load(args), asked, args)).to(args.device)
    drawn = list(islice(drawings(args.seed + 1, "judge"), max(args.count, 500)))
    reference = to_model(np.stack([d[1] for d in drawn])).to(args.device)
    figures = {"adherence": adherence(network, pictures, asked), "frechet": frechet(network, pictures, reference)}
    figures["drawings"] = adherence(network, reference, [d[0] for d in drawn])
    write_json(args.out / "judged.json", figures)
    print(json.dumps(figures, indent=1))


def load(args: argparse.Namespace) -> FluxPipeline:
    """The finished pipeline, or one with the averages of a checkpoint of the flow."""
    if not args.checkpoint:
        if not (args.out / "model").exists():
            raise SystemExit(f"no model in {args.out}; make one with train-image, or name a --checkpoint")
        pipe = FluxPipeline.from_pretrained(args.out / "model", dtype=torch.float32)
    else:
        settings = Settings(**json.loads((args.out / "settings.json").read_text()))
        flow = Flow()
        flow.load_state_dict(
            torch.load(args.checkpoint, map_location="cpu", weights_only=True)["average"], strict=False
        )
        vae = train_vae(args.out, np.empty(0), settings, "cpu", Deadline())
        encoders = train_text(args.out, settings, "cpu", Deadline())
        pipe = make_pipeline(vae, encoders, flow.transformer.eval())
        args.guidance = 1.0
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(args.device)


def generate(pipe: FluxPipeline, asked: list[Scene], args: argparse.Namespace) -> np.ndarray:
    """Pictures ``[N, size, size, 3]`` uint8 of scenes, 16 at a time."""
    batches = []
    for start in range(0, len(asked), 16):
        prompts = [scene.prompt for scene in asked[start : start + 16]]
        result: Any = pipe(
            prompts,
            height=args.size,
            width=args.size,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            max_sequence_length=24,
            generator=torch.Generator().manual_seed(args.seed + start),
            output_type="np",
        )
        batches.append((result.images * 255).round().astype(np.uint8))
    return np.concatenate(batches)


def _write_sheet(path: Path, asked: list[Scene], pictures: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = next(k for k in (8, 6, 5, 4, 3, 2, 1) if len(pictures) % k == 0)
    Image.fromarray(sheet(pictures, columns)).save(path)
    path.with_suffix(".txt").write_text("\n".join(scene.prompt for scene in asked) + "\n")


if __name__ == "__main__":
    main()
