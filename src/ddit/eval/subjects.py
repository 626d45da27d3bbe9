"""What is drawn and judged: pictures or clips of the project's own grammars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from ddit.embedded import detector, scenes
from ddit.embedded.autoencoder import to_model
from ddit.embedded.data import drawings
from ddit.embedded.scenes import Scene, Split
from ddit.embedded.video import clips, judge
from ddit.embedded.video.clips import Clip

Verdict = dict[str, float]
"""What was got right of what a prompt asked, by attribute, in [0, 1]."""
BATCH = 100


class Subject(Protocol):
    """A grammar with its judge. ``drawn`` is uint8, ``[N, H, W, 3]`` or ``[N, F, H, W, 3]``."""

    judged: ClassVar[bool]
    """Whether there are verdicts and drawings to compare with."""
    beside: ClassVar[tuple[str, ...]]
    """Names in a verdict that are no part of adherence."""
    size: ClassVar[tuple[int, int] | None]
    """Height and width that the judge knows; ``None`` for any."""

    def prompts(self, split: Split, count: int, seed: int) -> list[Any]:
        """What is asked for; each has a ``prompt``."""
        ...

    def verdicts(self, drawn: np.ndarray, asked: Sequence[Any]) -> list[Verdict]: ...

    def features(self, drawn: np.ndarray) -> Tensor:
        """``[N, D]``, for the Fréchet distance."""
        ...

    def reference(self, count: int, split: Split) -> Tensor:
        """`features` of drawings."""
        ...

    def kinds(self, asked: Any) -> set[str]:
        """What a prompt names that may make a schedule finer."""
        ...


@dataclass(frozen=True)
class Prompted:
    """A prompt of the user's own."""

    prompt: str


@dataclass(frozen=True)
class Own:
    """Prompts of the user's own, for any model: nobody here can judge what it draws, so likeness to plain is all."""

    texts: Sequence[str]
    judged: ClassVar[bool] = False
    beside: ClassVar[tuple[str, ...]] = ()
    size: ClassVar[tuple[int, int] | None] = None

    def prompts(self, split: Split, count: int, seed: int) -> list[Prompted]:
        return [Prompted(text) for text in self.texts[:count]]

    def verdicts(self, drawn: np.ndarray, asked: Sequence[Any]) -> list[Verdict]:
        raise NotImplementedError

    def features(self, drawn: np.ndarray) -> Tensor:
        raise NotImplementedError

    def reference(self, count: int, split: Split) -> Tensor:
        raise NotImplementedError

    def kinds(self, asked: Prompted) -> set[str]:
        return set()


class Pictures:
    """Pictures of 128 x 128."""

    judged: ClassVar[bool] = True
    beside: ClassVar[tuple[str, ...]] = ()
    size: ClassVar[tuple[int, int] | None] = (128, 128)

    @cached_property
    def detector(self) -> detector.Detector:
        return detector.load_detector()

    def prompts(self, split: Split, count: int, seed: int) -> list[Scene]:
        return list(islice(scenes.scenes(1_000 + seed, split), count))

    def verdicts(self, drawn: np.ndarray, asked: Sequence[Scene]) -> list[Verdict]:
        parts = range(0, len(asked), BATCH)
        told = (
            detector.judge(self.detector, to_model(drawn[i : i + BATCH]), list(asked[i : i + BATCH])) for i in parts
        )
        return [verdict for part in told for verdict in part]

    @torch.no_grad()
    def features(self, drawn: np.ndarray) -> Tensor:
        parts = range(0, len(drawn), BATCH)
        return torch.cat([self.detector.features(to_model(drawn[i : i + BATCH])) for i in parts])

    def reference(self, count: int, split: Split) -> Tensor:
        return self.features(np.stack([picture for *_, picture in islice(drawings(99, split), count)]))

    def kinds(self, asked: Scene) -> set[str]:
        textures = {t.texture for t in asked.things if t.texture}
        names = {f"{texture} objects" for texture in textures} | {f"{asked.background} background"}
        if textures == {"plain"} and asked.background == "smooth":
            names.add("nothing textured")
        if textures and "plain" not in textures and asked.background != "smooth":
            names.add("everything textured")
        return names


class Clips:
    """Clips of 9 frames of 64 x 64."""

    judged: ClassVar[bool] = True
    beside: ClassVar[tuple[str, ...]] = ("flicker", "roughness")
    size: ClassVar[tuple[int, int] | None] = (64, 64)

    @cached_property
    def detector(self) -> judge.Detector:
        return judge.load_detector()

    def prompts(self, split: Split, count: int, seed: int) -> list[Clip]:
        return list(islice(clips.clips(1_000 + seed, split), count))

    def verdicts(self, drawn: np.ndarray, asked: Sequence[Clip]) -> list[Verdict]:
        return judge.judge(self.detector, drawn.astype(np.float32) / 255, asked)

    def features(self, drawn: np.ndarray) -> Tensor:
        return judge.features(self.detector, drawn.astype(np.float32) / 255)

    def reference(self, count: int, split: Split) -> Tensor:
        rng = np.random.default_rng([99, 1])
        source = islice(clips.clips(99, split), count // 5)  # A clip takes as long to draw as 9 pictures.
        return self.features(np.stack([clips.film(clips.complete(clip, rng), rng)[0] for clip in source]))

    def kinds(self, asked: Clip) -> set[str]:
        named = {f"{asked.background} background", asked.motion.split()[0]}
        return named | {word for word in (asked.speed, asked.texture and f"{asked.texture} objects") if word}
