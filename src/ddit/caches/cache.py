"""The cache of one transformer: its states by run, guidance pass, scale and samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ddit.caches.config import CacheDitConfig, Config, check_config, has_ratios_of_flux, insides, unknown_blocks
from ddit.caches.dbcache import DitContexts, dbcache_settings
from ddit.models.base import Architecture
from ddit.teacache import TeaCacheConfig
from ddit.util.tell import warn

if TYPE_CHECKING:
    from diffusers.hooks.hooks import StateManager


@dataclass
class _Group:
    """A guidance pass of samples at one scale, as long as they keep it."""

    name: str
    """Of its states."""
    step: int
    """Last step in which it ran."""


def _is(config: Any, name: str) -> bool:
    """Whether settings are of a class of diffusers, which need not be imported to be told apart."""
    return type(config).__name__ == name


def _answered(state: Any) -> bool:
    """Whether a cache answered in the call just made, by its own state: a hook would go unseen by compiled code."""
    if hasattr(state, "should_compute"):
        return not state.should_compute
    return state.current_step > (-1 if state.last_update_step is None else state.last_update_step)  # TaylorSeer's


def _state_manager() -> type[StateManager]:
    """What holds the states of diffusers' caches."""
    with insides():
        from diffusers.hooks.hooks import StateManager
    return StateManager


def answered_share(config: Any, blocks: Sequence[int]) -> float:
    """Of a model with lists of so many blocks, what a call computes in which a cache with these settings answers."""
    if isinstance(config, CacheDitConfig):
        settings = dbcache_settings(config, blocks)
        always = settings["Fn_compute_blocks"] + settings.get("Bn_compute_blocks", 0)
        return min(1.0, len(blocks) * always / sum(blocks))
    if _is(config, "TaylorSeerCacheConfig") and not config.use_lite_mode:
        return 1.0  # it leaves out parts of blocks: nobody counted which
    return 1 / sum(blocks) if _is(config, "FirstBlockCacheConfig") else 0.0


def suits(architecture: Architecture, config: Config) -> bool:
    """Whether a transformer without a cache can have this one; it is put on and taken off."""
    try:
        Cache(architecture, config).remove()
    except ValueError:
        return False
    return True


class Cache:
    """The cache of one transformer, put on by us or by the user with ``transformer.enable_cache``.

    Args:
        learnt: Whether large patches have an adapter.
        published: Whether the architecture's published coefficients of TeaCache may serve.
    """

    def __init__(
        self, architecture: Architecture, config: Config | None, *, learnt: bool = False, published: bool = True
    ) -> None:
        self.architecture = architecture
        self.transformer: Any = architecture.transformer
        self._learnt, self._published = learnt, published
        self._config: Any = copy.copy(config)  # MagCache's is changed with the number of steps
        self._groups: dict[tuple[int, int, int, tuple[int, ...]], _Group] = {}
        self._ratios: Any = None
        self._found: tuple[Any, list[StateManager]] | None = None
        self._dit = DitContexts(self.transformer)
        self._dit.check()
        check_config(config, learnt=learnt)
        if self._config is not None:
            self._enable(self._config)
        check_config(self._theirs, learnt=learnt)

    def _enable(self, config: Config) -> None:
        there = "cache-dit" if self._dit.active else type(self._theirs).__name__
        if self._dit.active or self._theirs is not None:
            raise ValueError(
                f"the transformer has a cache already ({there}); call its disable_cache() first, "
                "or leave cache= out to keep it"
            )
        if not hasattr(self.transformer, "cache_context"):
            raise ValueError(f"diffusers has no caches for {type(self.transformer).__name__}; leave cache= out")
        if isinstance(config, CacheDitConfig):
            lists = [len(self.transformer.get_submodule(name)) for name in self.architecture.block_lists]
            self._dit.enable(config, lists)
            return
        with insides():
            from ddit.caches import teacache
        if not _is(config, "TaylorSeerCacheConfig") and not teacache.knows(self.architecture.blocks()):
            raise unknown_blocks(config, self.transformer)
        if len(self.architecture.blocks()) < 2:
            raise ValueError(
                f"{type(config).__name__} leaves out blocks behind the first, and this model has one; leave cache= out"
            )
        if not isinstance(config, TeaCacheConfig):
            if has_ratios_of_flux(config) and type(self.transformer).__name__ != "FluxTransformer2DModel":
                warn(
                    "MagCache goes by the ratios of FLUX.1-dev, and this is another model: give a MagCacheConfig with "
                    "its own (calibrate=True prints them in a run without ddit), or choose another cache"
                )
            self.transformer.enable_cache(config)
            if not self._managers():  # TaylorSeer goes by the names of layers
                self.transformer.disable_cache()
                raise unknown_blocks(config, self.transformer)
            return
        if config.coefficients is None and self._published:
            config = replace(config, coefficients=self.architecture.teacache_coefficients())
        if config.coefficients is None:
            raise ValueError(
                "nobody has published TeaCache's coefficients for this model; fit them with 'ddit calibrate', or "
                "choose another cache (first-block, taylorseer)"
            )
        teacache.enable(self.transformer, self.architecture, config)

    def _tell(self, steps: int | None) -> None:
        """Give MagCache the number of steps, which it has to know, and ratios for as many."""
        config = self._config
        if _is(config, "MagCacheConfig") and steps and steps != config.num_inference_steps:
            with insides():
                from diffusers.hooks.mag_cache import nearest_interp
            if self._ratios is None:
                self._ratios = config.mag_ratios
            config.num_inference_steps, config.mag_ratios = steps, nearest_interp(self._ratios, steps)

    @property
    def _theirs(self) -> Any:
        """Settings of the cache that diffusers has put on the transformer, or ``None``."""
        return getattr(self.transformer, "_cache_config", None)

    @property
    def active(self) -> bool:
        """Whether there is a cache at this moment: TeaCache, one of diffusers, or cache-dit."""
        marks = (getattr(self.transformer, name, None) for name in ("_cache_config", "_context_manager"))
        return isinstance(self._config, TeaCacheConfig) or any(mark is not None for mark in marks)

    @property
    def share(self) -> float:
        """Of the blocks, what a call computes in which the cache answers."""
        if self._dit.active:
            return min(1.0, self._dit.computed / len(self.architecture.blocks()))
        return answered_share(self._theirs, [len(self.architecture.blocks())])

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
        check_config(self._theirs, learnt=self._learnt)
        self._tell(steps)

        def cached(*args: Any, **kwargs: Any) -> Any:
            residuals = self.architecture.residuals
            inputs = self.architecture.bind(args, kwargs) if residuals else {}
            if any(inputs.get(name) for name in residuals):
                raise ValueError(
                    "caches skip blocks, but not what a ControlNet adds between them, which would count twice: "
                    "leave the cache out, or call the transformer's disable_cache()"
                )
            name = self._name(run, step, guidance, scale, samples)
            # A model that diffusers has no caches for may still have cache-dit.
            context = getattr(self.transformer, "cache_context", lambda *_, **__: nullcontext())
            with context(name, step_index=step, num_inference_steps=steps), self._dit.at(name, step):
                for manager in self._managers() if _is(self._theirs, "MagCacheConfig") else ():
                    manager.get_state().step_index = step  # it counts its own calls, from 0
                before = self._dit.answers
                answer = forward(*args, **kwargs)
                answered = self._dit.answers > before or any(_answered(m.get_state()) for m in self._managers())
            if answered:
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

    def _managers(self) -> list[StateManager]:
        """Of the cache's hooks, looked up once a run: a large model has thousands of modules."""
        if self._found is not None and self._found[0] is self._theirs:
            return self._found[1]
        kind = _state_manager()
        registries = [m._diffusers_hook for m in self.transformer.modules() if hasattr(m, "_diffusers_hook")]
        values = [value for registry in registries for hook in registry.hooks.values() for value in vars(hook).values()]
        found = {id(value): value for value in values if isinstance(value, kind)}
        self._found = self._theirs, list(found.values())
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
        self._found = None  # the next run may have a new cache under the same settings

    def remove(self) -> None:
        """Take off what this class put on."""
        if isinstance(self._config, TeaCacheConfig):
            from ddit.caches import teacache

            teacache.disable(self.transformer)
        elif isinstance(self._config, CacheDitConfig):
            self._dit.disable()
        elif self._config is not None:
            self.transformer.disable_cache()
        self._config = None
