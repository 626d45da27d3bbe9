"""Caches under dynamic patches: what a cache keeps of one grid is never used on another.

A cache keeps what blocks answered some steps ago. diffusers' caches know neither grids nor samples: after a change of
the scale they fail, or silently add the old answer to the wrong tokens. Here each group of samples that runs at one
scale has states of its own, and only for as long as it keeps that scale from step to step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import StateManager
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, MagCacheState, nearest_interp

from ddit import teacache
from ddit.models.base import Architecture
from ddit.teacache import TeaCacheConfig


@dataclass(frozen=True)
class CacheDitConfig:
    """DBCache of cache-dit (https://github.com/vipshop/cache-dit), put on by its own ``enable_cache``."""

    threshold: float = 0.08
    """``residual_diff_threshold``: largest relative change of what the first blocks add at which the rest is reused."""
    settings: dict[str, Any] | None = None
    """Other fields of ``cache_dit.DBCacheConfig``; by default a quarter of the blocks is computed always, 8 at most."""


Config = FirstBlockCacheConfig | TaylorSeerCacheConfig | MagCacheConfig | TeaCacheConfig | CacheDitConfig

NAMES = ("teacache", "first-block", "taylorseer", "magcache", "cache-dit")
"""On the command line, each with a number behind a colon: TaylorSeer's interval, for the others a threshold."""


def make_cache(text: str, coefficients: Sequence[float] | None = None) -> Config:
    """Read ``teacache:0.25``, ``first-block:0.1``, ``taylorseer:4``, ``magcache:0.06`` or ``cache-dit:0.08``.

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
            f"cache is {text!r}; it must be teacache:THRESHOLD, first-block:THRESHOLD, magcache:THRESHOLD, "
            "cache-dit:THRESHOLD or taylorseer:INTERVAL, such as teacache:0.25 or taylorseer:4"
        )
    if name == "teacache":
        return TeaCacheConfig(value, tuple(coefficients) if coefficients else None)
    if name == "first-block":
        return FirstBlockCacheConfig(threshold=value)
    if name == "cache-dit":
        return CacheDitConfig(value)
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
        self._groups: dict[tuple[int, int, int, tuple[int, ...]], _Group] = {}
        self._computed = False
        self._ratios: Any = None
        self._last: Any = None
        self._found: tuple[Any, list[StateManager]] | None = None
        self._dit = DitContexts(self.transformer)
        _check(config)
        if config is not None:
            self._enable(config)
        _check(self._theirs)

    def _enable(self, config: Config) -> None:
        there = "cache-dit" if self._dit.active else type(self._theirs).__name__
        if self._dit.active or self._theirs is not None:
            raise ValueError(
                f"the transformer has a cache already ({there}); call its disable_cache() first, "
                "or leave cache= out to keep it"
            )
        if isinstance(config, CacheDitConfig):
            self._dit.enable(config, len(self.architecture.blocks()))
            return
        if not isinstance(config, TaylorSeerCacheConfig) and not teacache.knows(self.architecture.blocks()):
            raise _unknown(config, self.transformer)
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
        return isinstance(self._config, TeaCacheConfig) or self._theirs is not None or self._dit.active

    @property
    def share(self) -> float:
        """Of the blocks, what a call computes in which the cache answers."""
        if self._dit.active:
            return self._dit.computed / len(self.architecture.blocks())
        return 1 / len(self.architecture.blocks()) if isinstance(self._theirs, FirstBlockCacheConfig) else 0.0

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
        run: int = 0,
    ) -> Callable[..., Any]:
        """The transformer's forward for some samples of a step, with states of their own.

        Args:
            step: Number of the step, from 0.
            steps: Number of steps, where known.
            guidance: Number of the guidance pass in the step, from 0.
            reused: Called with the samples where the cache did not run the blocks.
            run: Tells runs apart that take turns.
        """
        if not self.active:
            self._found = None
            return forward
        _check(self._theirs)
        self._tell(steps)

        def cached(*args: Any, **kwargs: Any) -> Any:
            if any("controlnet" in key and kwargs[key] for key in kwargs):
                raise ValueError(
                    "caches skip blocks, but not what a ControlNet adds between them, which would count twice: "
                    "leave the cache out, or call the transformer's disable_cache()"
                )
            name = self._name(run, step, guidance, scale, samples)
            with self.transformer.cache_context(name, step_index=step, num_inference_steps=steps):
                for manager in self._managers():
                    state = manager.get_state()
                    if isinstance(state, MagCacheState):  # which counts its own calls, from 0
                        state.step_index = step
                with self._watched(), self._dit.at(name, step):
                    answer = forward(*args, **kwargs)
            if not self._computed:
                reused(samples)
            return answer

        return cached

    def _name(self, run: int, step: int, guidance: int, scale: int, samples: Sequence[int]) -> str:
        """Name of the states, a new one unless the same samples ran at this scale in the step before."""
        stale = {key for key, group in self._groups.items() if key[0] == run and group.step < step - 1}
        self._drop({self._groups.pop(key).name for key in stale})
        key = (run, guidance, scale, tuple(samples))
        group = self._groups.setdefault(key, _Group(f"{run} {guidance} {scale} {list(samples)} from {step}", step))
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
        self._dit.drop(names)
        for manager in self._managers() if names else ():
            for name in names:
                manager._state_cache.pop(name, None)

    def start_over(self, run: int = 0) -> None:
        """Forget everything of a run."""
        mine = {key for key in self._groups if key[0] == run}
        self._drop({self._groups.pop(key).name for key in mine})

    def remove(self) -> None:
        """Take off what this class put on."""
        if isinstance(self._config, TeaCacheConfig):
            teacache.disable(self.transformer)
            self._invalidate()
        elif isinstance(self._config, CacheDitConfig):
            self._dit.disable()
        elif self._config is not None:
            self.transformer.disable_cache()
        self._config = None


class DitContexts:
    """cache-dit's states on a transformer: it has one set for a run, each of our groups gets its own."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self._sets: dict[str, dict[str, Any]] = {}
        self._forwards: dict[Any, Any] = {}
        self._order: list[str] = []

    @property
    def _manager(self) -> Any:
        return getattr(self.transformer, "_context_manager", None)

    @property
    def active(self) -> bool:
        """Whether cache-dit is on the transformer at this moment."""
        return self._manager is not None

    @property
    def computed(self) -> int:
        """Blocks that are computed in every call."""
        config = self.transformer._context_kwargs["cache_config"]
        return config.Fn_compute_blocks + config.Bn_compute_blocks

    def enable(self, config: CacheDitConfig, blocks: int) -> None:
        """Put cache-dit on the transformer.

        Raises:
            ModuleNotFoundError: Where cache-dit is not installed.
            ValueError: Where it does not know the transformer.
        """
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "warning")  # it logs every call otherwise
        try:
            import cache_dit  # type: ignore[import-not-found]
        except ModuleNotFoundError:
            raise ModuleNotFoundError("this cache needs the package cache-dit: pip install 'ddit[cache-dit]'") from None
        settings = {"Fn_compute_blocks": min(8, max(1, blocks // 4)), **(config.settings or {})}
        chosen = cache_dit.DBCacheConfig(residual_diff_threshold=config.threshold, **settings)
        self._forwards = {module: vars(module).get("forward") for module in self.transformer.modules()}
        self._order = list(self.transformer._modules)
        try:
            cache_dit.enable_cache(self.transformer, cache_config=chosen)
        except (AssertionError, ValueError) as error:
            raise _unknown(config, self.transformer) from error

    def disable(self) -> None:
        """Take it off, with all that it leaves: forwards, and the lists of blocks in another order.

        diffusers' caches take the first block of the first list for the one that runs first.
        """
        import cache_dit  # type: ignore[import-not-found]

        cache_dit.disable_cache(self.transformer)
        for module, forward in self._forwards.items():
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward
        vars(self.transformer).pop("_is_patched", None)
        children = self.transformer._modules
        for name in self._order:
            children[name] = children.pop(name)

    @contextmanager
    def at(self, name: str, step: int) -> Iterator[None]:
        """The call inside the block has the states of that name, empty ones at first."""
        manager = self._manager
        if manager is None:
            yield
            return
        theirs, current = manager._cached_context_manager, manager._current_context
        new = name not in self._sets
        manager._cached_context_manager = self._sets.setdefault(name, {})
        try:
            for context in self.transformer._context_names if new else ():
                settings = deepcopy(self.transformer._context_kwargs)
                config = settings["cache_config"]
                config.enable_separate_cfg = False  # each guidance pass has states of its own
                config.max_warmup_steps = max(1, config.max_warmup_steps - step)  # of the run, not of the group
                manager.reset_context(context, **{**settings, "name": context})
            yield
        finally:
            manager._cached_context_manager, manager._current_context = theirs, current

    def drop(self, names: set[str]) -> None:
        """Forget the states of these names."""
        for name in names:
            self._sets.pop(name, None)


def _unknown(config: Any, transformer: Any) -> ValueError:
    return ValueError(
        f"{type(config).__name__} does not know the blocks of {type(transformer).__name__}; "
        "choose another cache, such as taylorseer"
    )


def _check(config: Any) -> None:
    """Refuse caches whose states can't be kept apart."""
    if config is not None and not isinstance(config, Config):
        raise ValueError(
            f"{type(config).__name__} does not work with dynamic patches; "
            "ddit supports FirstBlockCache, TaylorSeer, MagCache and its own TeaCache"
        )
