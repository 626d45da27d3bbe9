"""The judge's training: on drawings and frames of clips alone, so that it favours no model or method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.yardstick.config import JudgeSettings
from benchmarks.yardstick.data import Drawn
from benchmarks.yardstick.fit import Deadline, Figures, Stage, cosine, fit, noise_from
from ddit.embedded.clips import parse_clip
from ddit.embedded.judge import ANSWERS, CELL, RADIUS, WIDTHS, Judge, enlarged, to_model
from ddit.embedded.scenes import BACKGROUNDS, IMAGE_SIZE, MOST, Scene, parse


def train_judge(
    folder: Path, drawn: Drawn, filmed: Drawn, settings: JudgeSettings, device: str, deadline: Deadline
) -> Judge:
    """Train on drawings and frames of clips, disturbed a little; the weights go to ``judge.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed + 3)
    judge = Judge().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    scenes = [parse(prompt) for prompt in drawn.prompts]
    scenes += [Scene((clip.thing,), clip.background) for clip in map(parse_clip, filmed.prompts)]
    answers, grounds = labels(scenes)
    few = settings.batch // 4

    def loss(step: int, rng: np.random.Generator) -> tuple[Tensor, Figures]:
        rows, more = (
            rng.integers(len(drawn.prompts), size=settings.batch - few),
            rng.integers(len(filmed.prompts), size=few),
        )
        times = rng.integers(filmed.samples.shape[1], size=few)
        x = torch.cat([to_model(drawn.samples[rows], device), enlarged(to_model(filmed.samples[more, times], device))])
        places = np.zeros((few, MOST, 3), np.float32)
        places[:, 0] = filmed.spots[more, times]
        where = torch.from_numpy(np.concatenate([drawn.spots[rows], places])).to(device)
        both = np.concatenate([rows, len(drawn.prompts) + more])
        found = judge(disturb(x, noise_from(rng, device)))
        return judge_loss(*found, where, answers[both].to(device), grounds[both].to(device)), {}

    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    length = {"steps": settings.steps, "seconds": settings.judge_seconds}
    fit(Stage("judge", folder / "judge.pt", judge, [optimizer], loss, schedule=cosine, seed=30, **length), deadline)
    save_file({k: v.contiguous() for k, v in judge.state_dict().items()}, folder / "judge.safetensors")
    return judge


def labels(asked: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Index of each answer ``[N, 3 objects, 3]``, -1 where there is no object, and of the background ``[N]``."""
    answers = torch.full((len(asked), MOST, len(ANSWERS)), -1)
    for i, scene in enumerate(asked):
        for j, thing in enumerate(scene.things):
            told = [options.index(getattr(thing, name)) for name, options in ANSWERS.items()]
            answers[i, j] = torch.tensor(told)
    return answers, torch.tensor([BACKGROUNDS.index(scene.background) for scene in asked])


def judge_loss(maps: Tensor, ground: Tensor, spots: Tensor, answers: Tensor, grounds: Tensor) -> Tensor:
    """Focal loss of the centres (CenterNet's), radius and answers at the centres, background."""
    grid = CELL * (torch.arange(IMAGE_SIZE // CELL, device=maps.device) + 0.5)
    x, y, r = spots[..., None, None].unbind(2)
    there = answers[..., 0] >= 0
    spread = (grid - x).square() + (grid[:, None] - y).square()
    heat = (torch.exp(-spread / (2 * (0.2 * r + 1).square())) * there[..., None, None]).amax(1)
    rows, slots = there.nonzero(as_tuple=True)
    column, row = ((spots[rows, slots, k] / CELL).long().clamp(0, 31) for k in (0, 1))
    heat[rows, row, column] = 1.0
    _, radius, *told = maps[rows, :, row, column].split(WIDTHS, dim=-1)
    p = torch.sigmoid(maps[:, 0]).clamp(1e-4, 1 - 1e-4)
    hit = (heat == 1).float()
    focal = hit * (1 - p).square() * p.log() + (1 - hit) * (1 - heat) ** 4 * p.square() * (1 - p).log()
    losses = [-focal.sum() / len(rows), F.smooth_l1_loss(radius[:, 0], spots[rows, slots, 2] / RADIUS)]
    losses += [F.cross_entropy(part, answers[rows, slots, k]) for k, part in enumerate(told)]
    return torch.stack([*losses, F.cross_entropy(ground, grounds)]).sum()


def disturb(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Do to pictures ``[B, 3, H, W]`` a little of what generating them might: blur, tone, noise."""

    def uniform(low: float, high: float) -> Tensor:
        shape = (len(pictures), 1, 1, 1)
        return low + (high - low) * torch.rand(shape, generator=generator, device=pictures.device)

    blur, x = uniform(0, 0.25), pictures
    for dim in (2, 3):
        x = (1 - 2 * blur) * x + blur * (x.roll(1, dim) + x.roll(-1, dim))
    x = x * uniform(0.92, 1.08) + uniform(-0.06, 0.06)
    return x + uniform(0, 0.06) * torch.randn(x.shape, generator=generator, device=x.device)
