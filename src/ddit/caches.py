"""Caches under dynamic patches: what a cache keeps of one grid is never used on another.

A cache keeps what blocks answered some steps ago. diffusers' caches know neither grids nor samples: after a change of
the scale they fail, or silently add the old answer to the wrong tokens. Here each group of samples that runs at one
scale has states of its own, and only for as long as it keeps that scale from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import StateManager
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, MagCacheState, nearest_interp

from ddit import teacache
from ddit.models.base import Architecture
from ddit.teacache import TeaCacheConfig

Config = FirstBlockCacheConfig | TaylorSeerCacheConfig | MagCacheConfig | TeaCacheConfig

NAMES = ("teacache", "first-block", "taylorseer", "magcache")
"""On the command line, each with a number behind a colon: TaylorSeer's interval, for the others a threshold."""


def make_cache(text: str, coefficients: Sequence[float] | None = None) -> Config:
    """Read ``teacache:0.25``, ``first-block:0.1``, ``taylorseer:4`` or ``magcache:0.06``.

    MagCache's ratios are those published for FLUX.1-dev.

    Args:
        coefficients: Of TeaCache's polynomial; see `ddit.TeaCacheConfig`.

    Raises:
        ValueError: For another name, or a number that is none.
    """
    name, _, number = text.partition(":")
    try:
        value = float(number)
        if name == "taylorseer" and (value < 2 or value != int(value)):
            raise ValueError
    except ValueError:
        value = None
    if name not in NAMES or value is None or value <= 0:
        raise ValueError(
            f"cache is {text!r}; it must be teacache:THRESHOLD, first-block:THRESHOLD, magcache:THRESHOLD or "
            "taylorseer:INTERVAL, such as teacache:0.25 or taylorseer:4"
        )
    if name == "teacache":
        return TeaCacheConfig(value, tuple(coefficients) if coefficients else None)
    if name == "first-block":
        return FirstBlockCacheConfig(threshold=value)
    if name == "taylorseer":
        return TaylorSeerCacheConfig(cache_interval=int(value), use_lite_mode=True)
    return MagCacheConfig(threshold=value, num_inference_steps=len(FLUX_MAG_RATIOS), mag_ratios=FLUX_MAG_RATIOS)


@dataclass
class _Group:
    """A guidance pass of samples at one scale, as long as they keep it."""

    name: str
    """Of its states."""
    step: int
    """Last step in which it ran."""


class Cache:
    """The cache of one transformer, put on by us or by the user with ``transformer.enable_cache``."""

    def __init__(self, architecture: Architecture, config: Config | None) -> None:
        self.architecture = architecture
        self.transformer: Any = architecture.transformer
        self._config = config
        self._groups: dict[tuple[int, int, tuple[int, ...]], _Group] = {}
        self._computed = False
        self._ratios: Any = None
        self._last: Any = None
        self._found: tuple[Any, list[StateManager]] | None = None
        _check(config)
        if config is not None:
            self._enable(config)
        _check(self._theirs)

    def _enable(self, config: Config) -> None:
        there = self._theirs
        if there is not None:
            raise ValueError(
                f"the transformer has a cache already ({type(there).__name__}); call its disable_cache() first, "
                "or leave cache= out to keep it"
            )
        if not isinstance(config, TeaCacheConfig):
            self.transformer.enable_cache(config)
            return
        if config.coefficients is None:
            config = replace(config, coefficients=self.architecture.teacache_coefficients())
        if config.coefficients is None:
            raise ValueError(
                "nobody has published TeaCache's coefficients for this model; fit them with 'ddit calibrate', or "
                "choose another cache (first-block, taylorseer)"
            )
        teacache.enable(
            self.architecture.blocks(), config, self.architecture.teacache_first, self.architecture.teacache_signal
        )
        self._invalidate()

    def _invalidate(self) -> None:
        HookRegistry.check_if_exists_or_initialize(self.transformer).invalidate_child_registries_cache()

    def _tell(self, steps: int | None) -> None:
        """Give MagCache the number of steps, which it has to know, and ratios for as many."""
        config = self._config
        if isinstance(config, MagCacheConfig) and steps and steps != config.num_inference_steps:
            if self._ratios is None:
                self._ratios = config.mag_ratios
            config.num_inference_steps, config.mag_ratios = steps, nearest_interp(self._ratios, steps)

    @property
    def _theirs(self) -> Any:
        """Settings of the cache that diffusers has put on the transformer, or ``None``."""
        return getattr(self.transformer, "_cache_config", None)

    @property
    def active(self) -> bool:
        """Whether there is a cache at this moment."""
        return isinstance(self._config, TeaCacheConfig) or self._theirs is not None

    @property
    def share(self) -> float:
        """Of the blocks, what a call computes in which the cache answers."""
        first = isinstance(self._theirs, FirstBlockCacheConfig)
        return 1 / len(self.architecture.blocks()) if first else 0.0

    def call(
        self,
        forward: Callable[..., Any],
        *,
        step: int,
        steps: int | None,
        guidance: int,
        scale: int,
        samples: Sequence[int],
        reused: Callable[[Sequence[int]], None],
        aside: bool = False,
    ) -> Callable[..., Any]:
        """The transformer's forward for some samples of a step, with states of their own.

        Args:
            step: Number of the step, from 0.
            steps: Number of steps, where known.
            guidance: Number of the guidance pass in the step, from 0.
            reused: Called with the samples where the cache did not run the blocks.
            aside: A call at another noise level than the step's; nothing is kept of it.
        """
        if not self.active:
            self._found = None
            return forward
        _check(self._theirs)
        self._tell(steps)

        def cached(*args: Any, **kwargs: Any) -> Any:
            name = f"aside {scale} {list(samples)}" if aside else self._name(step, guidance, scale, samples)
            with self.transformer.cache_context(name, step_index=step, num_inference_steps=steps):
                for manager in self._managers():
                    state = manager.get_state()
                    if isinstance(state, MagCacheState):  # which counts its own calls, from 0
                        state.step_index = step
                with self._watched():
                    answer = forward(*args, **kwargs)
            if aside:
                self._drop({name})
            elif not self._computed:
                reused(samples)
            return answer

        return cached

    def _name(self, step: int, guidance: int, scale: int, samples: Sequence[int]) -> str:
        """Name of the states, a new one unless the same samples ran at this scale in the step before."""
        stale = {key for key, group in self._groups.items() if group.step < step - 1}
        self._drop({self._groups.pop(key).name for key in stale})
        key = (guidance, scale, tuple(samples))
        group = self._groups.setdefault(key, _Group(f"{guidance} {scale} {list(samples)} from {step}", step))
        group.step = step
        return group.name

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Note whether the last block runs, which every cache that skips blocks skips."""
        self._computed = False

        def note(*_: Any) -> None:
            self._computed = True

        if self._last is None:
            _, self._last = self.architecture.feed_forward()[-1]
        probe = self._last.register_forward_hook(note)
        try:
            yield
        finally:
            probe.remove()

    def _managers(self) -> list[StateManager]:
        """Of the cache's hooks, looked up once: a large model has thousands of modules."""
        if self._found is not None and self._found[0] is self._theirs:
            return self._found[1]
        hooks = [
            hook
            for module in self.transformer.modules()
            if hasattr(module, "_diffusers_hook")
            for hook in module._diffusers_hook.hooks.values()
        ]
        found = [value for hook in hooks for value in vars(hook).values() if isinstance(value, StateManager)]
        self._found = self._theirs, list({id(manager): manager for manager in found}.values())
        return self._found[1]

    def _drop(self, names: set[str]) -> None:
        for manager in self._managers() if names else ():
            for name in names:
                manager._state_cache.pop(name, None)

    def start_over(self) -> None:
        """Forget everything, before a new generation."""
        self._drop({group.name for group in self._groups.values()})
        self._groups = {}

    def remove(self) -> None:
        """Take off what this class put on."""
        if isinstance(self._config, TeaCacheConfig):
            teacache.disable(self.transformer)
            self._invalidate()
        elif self._config is not None:
            self.transformer.disable_cache()
        self._config = None


def _check(config: Any) -> None:
    """Refuse caches whose states can't be kept apart."""
    if config is not None and not isinstance(config, Config):
        raise ValueError(
            f"{type(config).__name__} does not work with dynamic patches; "
            "ddit supports FirstBlockCache, TaylorSeer, MagCache and its own TeaCache"
        )
