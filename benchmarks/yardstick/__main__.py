"""Make the yardstick, its models and their judge: ``python -m benchmarks.yardstick --help``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks.yardstick.clip_judge import clip_features, verdict
from benchmarks.yardstick.clips import FRAMES, Clip, clips, film
from benchmarks.yardstick.config import ImageSettings, JudgeSettings, Settings, VideoSettings, gpu
from benchmarks.yardstick.data import cached_clips, cached_drawings, drawings, sheet, to_model
from benchmarks.yardstick.fit import Deadline, OutOfTime
from benchmarks.yardstick.flow import Flow
from benchmarks.yardstick.image import FluxFlow, train_image
from benchmarks.yardstick.judge import adherence, features, frechet, load_judge, train_judge, verdicts
from benchmarks.yardstick.scenes import Scene, Split, scenes
from benchmarks.yardstick.video import WanFlow, train_video
from ddit.files import replacing_folder, write_json

FLOWS: dict[str, type[Flow]] = {"image": FluxFlow, "video": WanFlow}
CALLS: dict[str, dict[str, Any]] = {
    "image": {"height": 128, "width": 128, "guidance_scale": 3.0, "max_sequence_length": 24},
    "video": {
        "height": 64,
        "width": 64,
        "num_frames": FRAMES,
        "guidance_scale": 4.0,
        "max_sequence_length": 16,
    },
}
"""How each model wants to be called."""


def main() -> None:
    args = _parser().parse_args()
    torch.set_num_threads(args.threads)
    args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.yardstick", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def add(name: str, run: Callable[[argparse.Namespace], None], **defaults: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run, **defaults)
        command.add_argument("--out", type=Path, default=Path("runs/yardstick"), help="folder of everything")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
        command.add_argument("--seed", type=int, default=0)
        return command

    for name, run in {"train-image": _train_image, "train-video": _train_video, "train-judge": _train_judge}.items():
        train = add(name, run)
        train.add_argument("--seconds", type=float, help="stop after so long; the same command goes on")
        train.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="change settings")
        if name != "train-judge":
            train.add_argument("--only", choices=("vae", "text"), help="end after this stage")
    for name, run, count in (("draw", draw, 16), ("sample", sample, 16), ("judge", judge, 200)):
        show = add(name, run)
        show.add_argument("--video", action="store_true", help="of the video model")
        show.add_argument("--count", type=int, default=count, help="number of pictures or clips")
        if name != "draw":
            show.add_argument("--size", type=int, help="height and width (default: what it was trained for)")
            show.add_argument("--steps", type=int, default=50)
            show.add_argument("--guidance", type=float)
            show.add_argument("--checkpoint", help="take the averages in this checkpoint of the flow")
    return parser


def draw(args: argparse.Namespace) -> None:
    """Draw a contact sheet of what is learnt from, sheet.png."""
    drawn = list(islice(_drawn(args.video, args.seed, "tune"), args.count))
    _write_sheet(args.out / "sheet.png", [asked for asked, _ in drawn], np.stack([made for _, made in drawn]))


def _drawn(video: bool, seed: int, split: Split) -> Iterator[tuple[Any, np.ndarray]]:
    """Endless prompts with their drawings."""
    if not video:
        yield from ((scene, picture) for scene, picture, *_ in drawings(seed, split))
    rng = np.random.default_rng([seed, 1])
    for clip in clips(seed, split):
        yield clip, film(clip, rng)[0]


def _train_image(args: argparse.Namespace) -> None:
    """Train the image model, and write the pipeline."""
    settings = _settings(args, ImageSettings)
    drawn = cached_drawings(args.out / "drawings", settings.pictures, settings.seed, settings.workers)
    _train(args, settings, lambda *rest: train_image(args.out / "image", drawn, settings, args.device, *rest))


def _train_video(args: argparse.Namespace) -> None:
    """Train the video model, and write the pipeline."""
    settings = _settings(args, VideoSettings)
    drawn = cached_clips(args.out / "drawings", settings.clips, settings.seed, settings.workers)
    _train(args, settings, lambda *rest: train_video(args.out / "video", drawn, settings, args.device, *rest))


def _settings(args: argparse.Namespace, kind: type[Any]) -> Any:
    changes = {name: json.loads(value) for name, value in (pair.split("=") for pair in args.set)}
    fast = gpu(kind) if args.device != "cpu" and issubclass(kind, Settings) else {}
    return kind(**{**fast, "seed": args.seed, **changes})


def _train(args: argparse.Namespace, settings: Settings, train: Callable[..., Any]) -> None:
    folder = args.out / ("video" if isinstance(settings, VideoSettings) else "image")
    write_json(folder / "settings.json", asdict(settings))
    try:
        pipe = train(Deadline(args.seconds), args.only)
    except OutOfTime as stop:
        print(f"{stop}; the same command goes on from there")
        return
    if pipe is not None:
        with replacing_folder(folder / "model") as partial:
            pipe.to(dtype=torch.float16).save_pretrained(partial)


def _train_judge(args: argparse.Namespace) -> None:
    """Train the judge of pictures and clips, judge.safetensors."""
    settings = _settings(args, JudgeSettings)
    folder, seed, workers = args.out / "drawings", settings.seed, settings.workers
    drawn, filmed = (
        cached_drawings(folder, settings.pictures, seed, workers),
        cached_clips(folder, settings.clips, seed, workers),
    )
    try:
        train_judge(args.out / "judge", drawn, filmed, settings, args.device, Deadline(args.seconds))
    except OutOfTime as stop:
        print(f"{stop}; the same command goes on from there")


def sample(args: argparse.Namespace) -> None:
    """Draw a grid of pictures or clips with a model, sample.png."""
    asked = list(islice((clips if args.video else scenes)(args.seed, "tune"), args.count))
    _write_sheet(args.out / "sample.png", asked, generate(asked, args))


def judge(args: argparse.Namespace) -> None:
    """Judge pictures or clips of held-out prompts, judged.json or judged-video.json."""
    asked: list[Any] = list(islice((clips if args.video else scenes)(args.seed, "judge"), args.count))
    network = load_judge(args.out / "judge")
    reference = list(islice(_drawn(args.video, args.seed + 1, "judge"), 200 if args.video else 500))

    def look(made: np.ndarray, scenes: list[Any]) -> tuple[dict[str, object], torch.Tensor]:
        if args.video:
            rows = [verdict(network, frames, clip) for frames, clip in zip(made, scenes, strict=True)]
            return adherence(rows), clip_features(network, list(made))
        return adherence(verdicts(network, to_model(made), scenes)), features(network, to_model(made))

    of_model, own = look(generate(asked, args), asked)
    of_drawings, drawn = look(np.stack([made for _, made in reference]), [scene for scene, _ in reference])
    figures = {"adherence": of_model, "frechet": frechet(own, drawn), "drawings": of_drawings}
    write_json(args.out / ("judged-video.json" if args.video else "judged.json"), figures)
    print(json.dumps(figures, indent=1))


def load(args: argparse.Namespace) -> Any:
    """The finished pipeline, or one with the averages of a checkpoint of the flow."""
    kind = "video" if args.video else "image"
    folder = args.out / kind
    if args.checkpoint:
        pipe: Any = _unfinished(folder, kind, args.checkpoint)
    elif (folder / "model").exists():
        pipe = DiffusionPipeline.from_pretrained(folder / "model", dtype=torch.float32)
    else:
        raise SystemExit(f"no model in {folder}; make one with train-{kind}, or name a --checkpoint")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(args.device)


def _unfinished(folder: Path, kind: str, checkpoint: str) -> Any:
    from benchmarks.yardstick import components, image, video, wan
    from benchmarks.yardstick.autoencoder import train_vae

    flow = FLOWS[kind]()
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    flow.load_state_dict(state["average"], strict=False)
    settings: Any = ImageSettings() if kind == "image" else VideoSettings()
    parts: Any = components if kind == "image" else wan
    vae = train_vae(folder, parts.make_vae, np.empty(0), settings, "cpu", Deadline(), side=0)
    text = (image if kind == "image" else video).train_text(folder, settings, "cpu", Deadline())
    return parts.make_pipeline(vae, text, flow.transformer.eval())


def generate(asked: list[Scene] | list[Clip], args: argparse.Namespace) -> np.ndarray:
    """Pictures ``[N, H, W, 3]`` or clips ``[N, F, H, W, 3]``, uint8, 16 at a time."""
    pipe = load(args)
    own = CALLS["video" if args.video else "image"]
    chosen = {"height": args.size, "width": args.size, "guidance_scale": args.guidance}
    settings = {**own, **{k: v for k, v in chosen.items() if v is not None}, "num_inference_steps": args.steps}
    undistilled = args.checkpoint and not args.video and "guided" not in Path(args.checkpoint).name
    batches = []
    for start in range(0, len(asked), 16):
        prompts = [scene.prompt for scene in asked[start : start + 16]]
        if undistilled:  # it knows guidance 1 alone, and is asked twice
            twice = {"true_cfg_scale": args.guidance or own["guidance_scale"], "negative_prompt": [""] * len(prompts)}
            settings = {**settings, **twice, "guidance_scale": 1.0}
        generator = torch.Generator().manual_seed(args.seed + start)
        made = pipe(prompts, generator=generator, output_type="np", return_dict=False, **settings)[0]
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
