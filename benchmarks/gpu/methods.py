"""What is put on a model in a whole run: ddit's own means, and those of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

import ddit
from benchmarks.gpu.measure import Putting
from benchmarks.gpu.models import Loaded
from ddit.caches import CacheDitConfig
from ddit.config import FULL, FixedSchedule, PatchSchedule
from ddit.eval import timing
from ddit.teacache import TeaCacheConfig


@dataclass(frozen=True)
class Method:
    """What is put on a model."""

    put: Putting
    share: float
    """Of a plain run's time, about what it takes."""
    changes_blocks: bool = False
    """Whether compiled blocks are compiled anew for it, with caches each block by itself."""


Methods = dict[str, Method]
SKIPS = (2, 3, 5)


def schedule(total: int, flops: Mapping[int, float]) -> list[int]:
    """Scales of a run that are worth the paper's 2.18x."""
    return timing.paper_like(total, flops)


def own(loaded: Loaded, total: int, flops: Mapping[int, float]) -> Methods:
    """ddit's."""
    patches = FixedSchedule(steps=tuple(schedule(total, flops)))
    cache = TeaCacheConfig(0.25, loaded.architecture.teacache_coefficients() or (1.0, 0.0))

    def put(**settings: Any) -> Putting:
        return lambda: ddit.apply(loaded.sampler, **settings)

    return {
        "plain": Method(nullcontext, 1.0),
        "patches": Method(put(patches=patches), 0.5),
        **{f"skip {speedup}": Method(put(patches=FULL, speedup=speedup), 1 / speedup) for speedup in SKIPS},
        "patches, skip 4": Method(put(patches=patches, speedup=4), 0.3),
        "rule, every step full": Method(put(patches=PatchSchedule(threshold=0.0)), 1.0),
        "patches, adapter": Method(put(patches=patches, adapter=loaded.adapter), 0.5, True),
        "patches, TeaCache": Method(put(patches=patches, cache=cache), 0.5, True),
        "TeaCache": Method(put(patches=FULL, cache=cache), 0.8, True),
    }


def others(loaded: Loaded) -> Methods:
    """Caches of other libraries; those of diffusers are put on as its documents say, without ddit."""

    def put(config: Any) -> Putting:
        return lambda: _diffusers(loaded, config)

    made: Methods = {
        "FirstBlockCache 0.1": Method(put(FirstBlockCacheConfig(threshold=0.1)), 0.9, True),
        **{f"TaylorSeer {every}": Method(put(_taylorseer(every)), 0.5, True) for every in (4, 6)},
    }
    if find_spec("cache_dit") is not None:
        config = CacheDitConfig(0.1)  # by ddit, which starts it anew for each run
        made["cache-dit 0.1"] = Method(lambda: ddit.apply(loaded.sampler, patches=FULL, cache=config), 0.9, True)
    return made


def _taylorseer(every: int) -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(cache_interval=every, use_lite_mode=True)


@contextmanager
def _diffusers(loaded: Loaded, config: Any) -> Iterator[None]:
    loaded.transformer.enable_cache(config)
    try:
        yield
    finally:
        loaded.transformer.disable_cache()
