"""Caches under dynamic patches: what a cache keeps of one grid is never used on another.

A cache keeps what blocks answered some steps ago. diffusers' caches know neither grids nor samples: after a change of
the scale they fail, or silently add the old answer to the wrong tokens. Here each group of samples that runs at one
scale has states of its own, and only for as long as it keeps that scale from step to step.
"""

from ddit.caches.cache import Cache, answered_share, suits
from ddit.caches.config import CacheDitConfig, Config, make_cache

__all__ = ["Cache", "CacheDitConfig", "Config", "answered_share", "make_cache", "suits"]
