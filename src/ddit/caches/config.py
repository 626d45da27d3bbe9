"""Which caches there are, in Python and in words. Nothing of diffusers is imported before a cache is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeAlias

from ddit.teacache import TeaCacheConfig

if TYPE_CHECKING:
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig


@dataclass(frozen=True)
class CacheDitConfig:
    """DBCache of cache-dit (https://github.com/vipshop/cache-dit), put on by its own ``enable_cache``."""

    threshold: float = 0.08
    """``residual_diff_threshold``: largest relative change of what the first blocks add at which the rest is reused."""
    settings: dict[str, Any] | None = None
    """Other fields of ``cache_dit.DBCacheConfig``; by default a quarter of the blocks is computed always, 8 at
    most; where it keeps several lists of blocks, so many of each."""


Config: TypeAlias = "FirstBlockCacheConfig | TaylorSeerCacheConfig | MagCacheConfig | TeaCacheConfig | CacheDitConfig"
SUPPORTED = {"FirstBlockCacheConfig", "TaylorSeerCacheConfig", "MagCacheConfig", "TeaCacheConfig", "CacheDitConfig"}
NAMES = ("teacache", "first-block", "taylorseer", "magcache", "cache-dit")
"""On the command line, each with a number behind a colon: TaylorSeer's interval, for the others a threshold."""


@contextmanager
def insides() -> Iterator[None]:
    """For imports of names that diffusers does not promise to keep from one release to the next.

    Raises:
        ValueError: Where the installed version lacks one, naming it.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"caches rest on insides of diffusers that version {version('diffusers')} lacks "
            f"({str(error).split(' (')[0]}); patches and skipping work without a cache: leave it out, "
            "or install diffusers 0.42"
        ) from error


def make_cache(text: str, coefficients: Sequence[float] | None = None) -> Config:
    """Read ``teacache:0.25``, ``first-block:0.1``, ``taylorseer:4``, ``magcache:0.06`` or ``cache-dit:0.08``.

    MagCache's ratios are those published for FLUX.1-dev; other models are warned about when it is put on.

    Args:
        coefficients: Of TeaCache's polynomial; see `ddit.TeaCacheConfig`.

    Raises:
        ValueError: For another name, a number that is none, or where diffusers has no such cache.
    """
    name, _, number = text.partition(":")
    try:
        value = float(number)
        if not math.isfinite(value) or (name == "taylorseer" and (value < 2 or value != int(value))):
            raise ValueError
    except ValueError:
        value = None
    if name not in NAMES or value is None or value <= 0:
        raise ValueError(
            f"cache is {text!r}; it must be teacache:THRESHOLD, first-block:THRESHOLD, magcache:THRESHOLD, "
            "cache-dit:THRESHOLD or taylorseer:INTERVAL, such as teacache:0.25 or taylorseer:4"
        )
    if name == "teacache":
        return TeaCacheConfig(value, tuple(coefficients) if coefficients else None)
    if name == "cache-dit":
        return CacheDitConfig(value)
    with insides():
        from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
    if name == "first-block":
        return FirstBlockCacheConfig(threshold=value)
    if name == "taylorseer":
        return TaylorSeerCacheConfig(cache_interval=int(value), use_lite_mode=True)
    with insides():
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS as RATIOS
    return MagCacheConfig(threshold=value, num_inference_steps=len(RATIOS), mag_ratios=RATIOS)


def has_ratios_of_flux(config: Any) -> bool:
    """Whether MagCache goes by what diffusers ships for FLUX.1-dev."""
    if type(config).__name__ != "MagCacheConfig":
        return False
    with insides():
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS as RATIOS
    return list(map(float, config.mag_ratios)) == list(map(float, RATIOS))


def check_config(config: Any, *, learnt: bool) -> None:
    """Refuse caches whose states can't be kept apart, and one that leaves out what an adapter reads.

    Args:
        learnt: Whether large patches have an adapter.
    """
    if learnt and type(config).__name__ == "TaylorSeerCacheConfig" and config.use_lite_mode:
        raise ValueError(
            "TaylorSeer in lite mode continues the model's last layer alone, and an adapter reads what comes before: "
            "choose another cache, use_lite_mode=False, or leave the adapter out (--adapter none)"
        )
    if type(config).__name__ == "MagCacheConfig" and config.calibrate:
        raise ValueError(
            "MagCache calibrates on plain runs: do that without ddit, then give its mag_ratios and calibrate=False"
        )
    if config is not None and not SUPPORTED & {kind.__name__ for kind in type(config).__mro__}:
        raise ValueError(
            f"{type(config).__name__} does not work with dynamic patches; "
            "ddit supports FirstBlockCache, TaylorSeer, MagCache, cache-dit and its own TeaCache"
        )


def unknown_blocks(config: Any, transformer: Any) -> ValueError:
    """For a cache that can't tell what a transformer's blocks take and give."""
    return ValueError(
        f"{type(config).__name__} does not know the blocks of {type(transformer).__name__}; "
        "choose another cache (docs/caches.md), or leave it out"
    )
