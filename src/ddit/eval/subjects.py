"""What is drawn and judged: pictures or clips of the project's own grammars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from ddit.embedded import clip_judge, judge
from ddit.embedded.clips import CLIP_SIZE, FRAMES, Clip, clips, film
from ddit.embedded.drawing import drawings
from ddit.embedded.scenes import IMAGE_SIZE, Scene, Split, scenes

Verdict = dict[str, float]
"""What was got right of what a prompt asked, by attribute, in [0, 1]."""


class Subject(Protocol):
    """A grammar with its judge. ``drawn`` is uint8, ``[N, H, W, 3]`` or ``[N, F, H, W, 3]``."""

    judged: ClassVar[bool]
    """Whether there are verdicts and drawings to compare with."""
    beside: ClassVar[tuple[str, ...]]
    """Names in a verdict that are no part of adherence."""
    size: ClassVar[tuple[int, int] | None]
    """Height and width that the judge knows; ``None`` for any."""
    frames: ClassVar[int | None]
    """Number of frames, likewise."""

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

    def distance(self, drawn: np.ndarray, plain: np.ndarray) -> Tensor:
        """Perceptual distance of each to its plain one ``[N]``, 0 where they are alike."""
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
    frames: ClassVar[int | None] = None

    def prompts(self, split: Split, count: int, seed: int) -> list[Prompted]:
        return [Prompted(text) for text in self.texts[:count]]

    def verdicts(self, drawn: np.ndarray, asked: Sequence[Any]) -> list[Verdict]:
        raise NotImplementedError

    def features(self, drawn: np.ndarray) -> Tensor:
        raise NotImplementedError

    def reference(self, count: int, split: Split) -> Tensor:
        raise NotImplementedError

    def distance(self, drawn: np.ndarray, plain: np.ndarray) -> Tensor:
        raise NotImplementedError

    def kinds(self, asked: Prompted) -> set[str]:
        return set()


class Pictures:
    """Pictures of 128 x 128."""

    judged: ClassVar[bool] = True
    beside: ClassVar[tuple[str, ...]] = ()
    size: ClassVar[tuple[int, int] | None] = (IMAGE_SIZE, IMAGE_SIZE)
    frames: ClassVar[int | None] = None

    @cached_property
    def judge(self) -> judge.Judge:
        return judge.load_judge()

    def prompts(self, split: Split, count: int, seed: int) -> list[Scene]:
        return list(islice(scenes(1_000 + seed, split), count))

    def verdicts(self, drawn: np.ndarray, asked: Sequence[Scene]) -> list[Verdict]:
        return judge.verdicts(self.judge, judge.to_model(drawn), asked)

    def features(self, drawn: np.ndarray) -> Tensor:
        return judge.features(self.judge, judge.to_model(drawn))

    def reference(self, count: int, split: Split) -> Tensor:
        return self.features(np.stack([picture for _, picture, *_ in islice(drawings(99, split), count)]))

    def distance(self, drawn: np.ndarray, plain: np.ndarray) -> Tensor:
        return judge.distances(self.judge, judge.to_model(drawn), judge.to_model(plain))

    def kinds(self, asked: Scene) -> set[str]:
        textures = {thing.texture for thing in asked.things}
        return {f"{texture} objects" for texture in textures} | {f"{asked.background} background"}


class Clips:
    """Clips of 9 frames of 96 x 96."""

    judged: ClassVar[bool] = True
    beside: ClassVar[tuple[str, ...]] = clip_judge.BESIDE
    size: ClassVar[tuple[int, int] | None] = (CLIP_SIZE, CLIP_SIZE)
    frames: ClassVar[int | None] = FRAMES

    @cached_property
    def judge(self) -> judge.Judge:
        return judge.load_judge()

    def prompts(self, split: Split, count: int, seed: int) -> list[Clip]:
        return list(islice(clips(1_000 + seed, split), count))

    def verdicts(self, drawn: np.ndarray, asked: Sequence[Clip]) -> list[Verdict]:
        return [clip_judge.verdict(self.judge, frames, clip) for frames, clip in zip(drawn, asked, strict=True)]

    def features(self, drawn: np.ndarray) -> Tensor:
        return clip_judge.clip_features(self.judge, list(drawn))

    def reference(self, count: int, split: Split) -> Tensor:
        rng = np.random.default_rng([99, 1])
        source = islice(clips(99, split), count)
        return self.features(np.stack([film(clip, rng)[0] for clip in source]))

    def distance(self, drawn: np.ndarray, plain: np.ndarray) -> Tensor:
        return clip_judge.clip_distances(self.judge, drawn, plain)

    def kinds(self, asked: Clip) -> set[str]:
        named = {f"{asked.background} background", asked.motion.split()[0], f"{asked.thing.texture} objects"}
        return named | ({asked.speed} if asked.speed else set())
