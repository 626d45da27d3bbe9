"""What caches do where the scale changes, alone and under ddit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from torch import Tensor

from ddit.caches import Cache, Config
from ddit.config import ScheduleConfig
from ddit.generate import run
from ddit.models import architecture_for
from ddit.models.base import first
from ddit.teacache import TeaCacheConfig

SCHEDULE = (1, 1, 1, 2, 2, 1, 1)
EAGER: dict[str, Callable[[], Config]] = {
    "TeaCache": lambda: TeaCacheConfig(1e9, (0.0,)),
    "FirstBlockCache": lambda: FirstBlockCacheConfig(1e9),
    "MagCache": lambda: MagCacheConfig(
        1e9, max_skip_steps=99, retention_ratio=0.0, num_inference_steps=len(SCHEDULE), mag_ratios=[1.0] * len(SCHEDULE)
    ),
    "TaylorSeer": lambda: TaylorSeerCacheConfig(cache_interval=99, disable_cache_before_step=1, use_lite_mode=True),
}
"""Caches that answer whenever they may."""


def at_changes_of_scale(pipe: Any, prompt: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Each cache on the calls that dynamic patches make, with one state for all of them and with ddit's own.

    Returns:
        For each cache and each change of scale the error of the answer, as a fraction of its norm, against that of
        the model without a cache; or what was raised.
    """
    transformer = pipe.transformer
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
    forward = transformer.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        answer = forward(*args, **kwargs)
        calls.append((args, kwargs, first(answer)))
        return answer

    config = ScheduleConfig(policy="fixed", steps=SCHEDULE, anchored=False)
    settings = {**settings, "num_inference_steps": len(SCHEDULE)}
    changes = {"to large patches": SCHEDULE.index(2), "back": len(SCHEDULE) - SCHEDULE[::-1].index(2)}
    rows = []
    for name, make in EAGER.items():
        twin = copy.deepcopy(transformer)
        transformer.forward = spy
        try:
            calls.clear()
            run(pipe, [prompt], [0], settings, config=config, cache=make())
        finally:
            del transformer.forward
        under = [_error(first(_bare(twin, call)), call[2]) for call in calls]
        alone = _alone(twin, make(), calls)
        rows += [
            {"cache": name, "change": change, "alone": alone[step], "under ddit": under[step]}
            for change, step in changes.items()
        ]
    return rows


def _alone(twin: Any, config: Config, calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]) -> list[Any]:
    """Errors of the calls in turn, with one state for all; what is raised stands in place of a number."""
    exact = [first(_bare(twin, call)) for call in calls]
    cache = Cache(architecture_for(twin), config)
    found: list[Any] = []
    for call, true in zip(calls, exact, strict=True):
        try:
            with twin.cache_context("cond"):
                found.append(_error(true, first(_bare(twin, call))))
        except Exception as error:  # Whatever a cache raises is the finding.
            found.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    cache.remove()
    return found


@torch.no_grad()
def _bare(transformer: Any, call: tuple[tuple[Any, ...], dict[str, Any], Tensor]) -> Any:
    return transformer(*call[0], **call[1])


def _error(true: Tensor, answer: Tensor) -> float:
    return float((answer - true).norm() / true.norm())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""

    def shown(value: Any) -> str:
        return value if isinstance(value, str) else f"{value:.2g}"

    lines = ["| cache | change of scale | alone | under ddit |", "|---|---|---|---|"]
    lines += [f"| {r['cache']} | {r['change']} | {shown(r['alone'])} | {shown(r['under ddit'])} |" for r in rows]
    return "\n".join(lines) + "\n"
