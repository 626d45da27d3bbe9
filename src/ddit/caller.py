"""Who calls the transformer: the pipeline among the callers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any


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
