"""Who calls the transformer: the pipeline among the callers, and what its scheduler tells."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch


def pipeline_calls(transformer: Any, thread: int | None = None) -> Iterator[tuple[Any, int]]:
    """Calls under way of pipelines that have a transformer, the innermost first.

    Several pipelines may share a transformer (``from_pipe``), each with a scheduler and a thread of its own, and a
    callback of one may call another; the transformer is told of none. So they are looked for among the callers.

    Args:
        thread: Whose; by default this one's.

    Yields:
        The pipeline, and a number that tells its call from others under way.
    """
    for caller, frame in _methods("__call__", thread):
        if hasattr(caller, "scheduler") and held_by(caller, transformer) is not None:
            yield caller, frame


def calling_pipeline(transformer: Any) -> Any:
    """The pipeline whose call this is, ``None`` for a bare transformer."""
    return next((caller for caller, _ in pipeline_calls(transformer)), None)


def freeing_pipeline() -> Any:
    """The pipeline that frees its models, as each does when its call ends; ``None`` outside of that."""
    return next((caller for caller, _ in _methods("maybe_free_model_hooks")), None)


def _methods(name: str, thread: int | None = None) -> Iterator[tuple[Any, int]]:
    """Methods of that name under way, the innermost first: whose, and the identity of the frame."""
    frame = sys._getframe() if thread is None else sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name == name and frame.f_code.co_varnames[:1] == ("self",):
            yield frame.f_locals["self"], id(frame)
        frame = frame.f_back


def held_by(pipe: Any, transformer: Any) -> Any:
    """What a pipeline calls for a transformer: itself or ``torch.compile``'s wrapper; ``None`` if it has neither."""
    held = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    return next((x for x in held if x is not None and getattr(x, "_orig_mod", x) is transformer), None)


def place(scheduler: Any) -> int | None:
    """Number of the step that a scheduler is at, or will begin with; ``None`` where nobody told it yet."""
    step = getattr(scheduler, "step_index", None)
    return step if step is not None else getattr(scheduler, "begin_index", None)


def run_of(scheduler: Any, told: int | None = None) -> tuple[int | None, list[float]]:
    """Number of steps of a scheduler's run from where it is, and their noise levels, if known.

    It need not be at its beginning: image to image begins later, and so does the second of two transformers.

    Args:
        told: The pipeline's own number of steps, for one that does not tell the scheduler where it begins (Wan V2V).
    """
    timesteps, sigmas = getattr(scheduler, "timesteps", None), getattr(scheduler, "sigmas", None)
    if timesteps is None:
        return None, []
    begin = place(scheduler)
    left = len(timesteps) - (begin or 0)
    total = min(left, told or left) if begin is None else left
    if total <= 0:  # the scheduler is at the end of another run
        return None, []
    if sigmas is None or len(sigmas) <= total:
        return total, []
    return total, torch.as_tensor(sigmas[:-1][-total:]).tolist()  # the last one is where the run ends


def remembered(scheduler: Any) -> int:
    """Of how many steps a sampler of diffusers takes the model's answers into its next move: 1 for Euler's method.

    A multistep sampler's order is how many it predicts from; UniPC corrects that by the answer it gets.
    """
    order = getattr(scheduler, "config", {}).get("solver_order", 1)
    return 1 if order == 1 else order + 1


def adds_noise(scheduler: Any) -> bool:
    """Whether a sampler of diffusers adds noise of its own in each step."""
    config = getattr(scheduler, "config", {})
    name = type(scheduler).__name__
    return bool(
        config.get("stochastic_sampling") or "sde" in str(config.get("algorithm_type", "")) or "LCM" in name
    ) or any(word in name for word in ("Ancestral", "SDE", "SASolver"))
