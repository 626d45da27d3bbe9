"""The one training of both models; a `Kind` is what they differ in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.yardstick.autoencoder import encode, train_vae
from benchmarks.yardstick.config import Settings
from benchmarks.yardstick.data import Drawn
from benchmarks.yardstick.fit import Deadline
from benchmarks.yardstick.flow import Flow, Source, train_flow
from ddit.embedded.scenes import Split


class Kind(ABC):
    """A model of the yardstick: its parts, what it learns from, and how it wants to be called."""

    name: ClassVar[str]
    settings: ClassVar[type[Settings]]
    crop: ClassVar[int]
    """Side in pixels of what its autoencoder is trained on."""
    call: ClassVar[dict[str, Any]]
    """Arguments of the pipeline."""
    make_vae: ClassVar[Callable[[], Any]]
    """An untrained autoencoder."""
    make_flow: ClassVar[Callable[[], Flow]]
    """An untrained transformer, ready to be trained."""
    train_text: ClassVar[Callable[[Path, Any, str, Deadline], Any]]
    """Text encoders that parse prompts, frozen; called with folder, settings, device and deadline."""
    make_pipeline: ClassVar[Callable[[Any, Any, Any], Any]]
    """Autoencoder, text encoders and transformer as a pipeline of diffusers."""

    @abstractmethod
    def drawn(self, folder: Path, settings: Any) -> Drawn:
        """What it learns from, drawn once."""

    @abstractmethod
    def asked(self, seed: int, split: Split) -> Iterator[Any]:
        """Endless scenes or clips of one split."""

    @abstractmethod
    def draw(self, asked: Any, rng: np.random.Generator) -> np.ndarray:
        """A picture ``[H, W, 3]`` or clip ``[F, H, W, 3]`` of one of them, uint8."""

    @abstractmethod
    def vectors(self, text: Any, prompts: list[str], device: str) -> tuple[Tensor, ...]:
        """What the transformer is told of prompts and, last, of the empty one."""

    def centres(self, drawn: Drawn) -> np.ndarray | None:
        """Where half of the autoencoder's crops lie, ``[N, 2]`` (x, y) in pixels; None is anywhere."""
        return None

    def distil(self, folder: Path, flow: Flow, source: Source, deadline: Deadline) -> None:
        """What comes after flow matching; nothing by default."""
        return

    def call_of(self, checkpoint: str | None, count: int) -> dict[str, Any]:
        """Arguments of the pipeline, for ``count`` prompts; a checkpoint of the flow may want other ones."""
        return self.call


def train(
    kind: Kind, folder: Path, settings: Settings, device: str, deadline: Deadline, drawn: Drawn, only: str | None = None
) -> Any:
    """Train all stages that are not done, and return the pipeline; ``only`` ends after that stage, with None."""
    vae = train_vae(
        folder, kind.make_vae, drawn.samples, settings, device, deadline, side=kind.crop, spots=kind.centres(drawn)
    )
    if only == "vae":
        return None
    text = kind.train_text(folder, settings, device, deadline)
    if only == "text":
        return None
    latents = {size: encode(folder, vae, drawn.samples, size, device) for size in settings.all_sizes}
    source = Source.made(latents, drawn, kind.vectors(text, drawn.prompts, device), settings, device)
    torch.manual_seed(settings.seed + 2)
    flow = kind.make_flow().to(device)
    if settings.compile:
        flow.compile_blocks()
    train_flow(folder, flow, source, deadline)
    kind.distil(folder, flow, source, deadline)
    return kind.make_pipeline(vae, text, flow.transformer)


def unfinished(kind: Kind, folder: Path, checkpoint: str) -> Any:
    """A pipeline with the averages of a checkpoint of the flow."""
    flow = kind.make_flow()
    flow.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["average"], strict=False)
    settings = kind.settings()
    vae = train_vae(folder, kind.make_vae, np.empty(0), settings, "cpu", Deadline(), side=kind.crop)
    text = kind.train_text(folder, settings, "cpu", Deadline())
    return kind.make_pipeline(vae, text, flow.transformer.eval())
