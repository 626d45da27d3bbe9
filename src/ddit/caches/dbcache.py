"""The states of cache-dit's DBCache on a transformer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from ddit.caches.config import CacheDitConfig, unknown_blocks
from ddit.util.extras import require


@contextmanager
def _unhooked(transformer: Any) -> Iterator[None]:
    """accelerate's hook, which offloading takes off and on again after every run, is set aside inside the block.

    After it, it calls what the transformer's forward is then.
    """
    own = vars(transformer)
    if own.get("_old_forward") is None:
        yield
        return
    names = ("_hf_hook", "forward", "_old_forward")
    hook, hooked, own["forward"] = (own.pop(name) for name in names)
    try:
        yield
    finally:
        own.update(dict(zip(names, (hook, hooked, transformer.forward), strict=True)))


def dbcache_settings(config: CacheDitConfig, blocks: Sequence[int]) -> dict[str, Any]:
    """Fields of ``cache_dit.DBCacheConfig`` on a model with lists of so many blocks."""
    return {"Fn_compute_blocks": min(8, max(1, sum(blocks) // 4), *blocks), **(config.settings or {})}


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
        """Blocks that are computed in every call: so many of each list."""
        config = self.transformer._context_kwargs["cache_config"]
        return len(self.transformer._context_names) * (config.Fn_compute_blocks + config.Bn_compute_blocks)

    @property
    def answers(self) -> int:
        """Calls that it answered with the states in use."""
        manager = self._manager
        contexts = () if manager is None else manager._cached_context_manager.values()
        return sum(len(context.cached_steps) for context in contexts)

    def check(self) -> None:
        """Refuse cache-dit where the user put it on over accelerate's hook.

        It then calls what lay below the hook before ddit came, and the hook drops it when it goes after a run.
        """
        own = vars(self.transformer)
        if self.active and own.get("_old_forward") is not None and own.get("_original_forward") == own["_old_forward"]:
            raise ValueError(
                "cache-dit was put on after offloading, which drops it after a run: call cache_dit.disable_cache, and "
                "put it on before enable_model_cpu_offload, or let ddit do it (cache='cache-dit:0.08')"
            )

    def enable(self, config: CacheDitConfig, blocks: Sequence[int]) -> None:
        """Put cache-dit on the transformer, below accelerate's hook if there is one.

        Args:
            blocks: Number in each list.

        Raises:
            ValueError: Where cache-dit is not installed, or does not know the transformer.
        """
        require("cache_dit", "this cache")
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "warning")  # it logs every call otherwise
        import cache_dit  # type: ignore[import-not-found]

        chosen = cache_dit.DBCacheConfig(residual_diff_threshold=config.threshold, **dbcache_settings(config, blocks))
        with _unhooked(self.transformer):
            self._forwards = {module: vars(module).get("forward") for module in self.transformer.modules()}
            self._order = list(self.transformer._modules)
            try:
                cache_dit.enable_cache(self.transformer, cache_config=chosen)
            except (AssertionError, ValueError) as error:
                raise unknown_blocks(config, self.transformer) from error

    def disable(self) -> None:
        """Take it off, with all that it leaves: forwards, and the lists of blocks in another order.

        diffusers' caches take the first block of the first list for the one that runs first.
        """
        import cache_dit  # type: ignore[import-not-found]

        with _unhooked(self.transformer):
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
