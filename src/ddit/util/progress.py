"""A progress bar with figures beside it."""

from __future__ import annotations

from collections.abc import Callable

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class progress:
    """Progress bar with the last figures: ``with progress(name, steps) as advance: advance(loss=...)``."""

    def __init__(self, name: str, total: int, done: int = 0, *, hidden: bool = False) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        self.bar = Progress(*columns, *times, disable=hidden)
        self.task = self.bar.add_task(name, total=total, completed=done, note="")

    def __enter__(self) -> Callable[..., None]:
        self.bar.start()
        return self.advance

    def advance(self, **figures: float) -> None:
        note = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
        self.bar.update(self.task, advance=1, note=note)

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()
