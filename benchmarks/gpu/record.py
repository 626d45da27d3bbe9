"""Time budgets, and results that are on disk as soon as they exist."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ddit.util.files import write_json

ROOT = Path(__file__).parents[2]
"""Of the repository; what is told of files is told from there."""


class OutOfTime(BaseException):
    """A stage's time has passed; no ordinary exception, so that nobody between here and the stage catches it."""


class Budget:
    """Seconds that are left until an end."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def part(self, share: float) -> Budget:
        """A budget of a share of what is left."""
        return Budget(self.left * share)

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Raise `OutOfTime` in the block when the time has passed; in the main thread only, elsewhere do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def late(*_: Any) -> None:
            raise OutOfTime("out of time")

        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class Record:
    """The JSON of a stage; what an earlier call of the same code on the same card wrote there is kept.

    Its ``values`` are results by name; ``errors`` and ``left_out`` say of which there are none, and why.
    """

    def __init__(self, path: Path, budget: Budget, about: dict[str, Any] | None = None) -> None:
        self.path, self.budget = path, budget
        found, about = read(path), about or {}
        if any(found.get(name) != about[name] for name in ("card", "code") if name in about):
            found = {}  # figures of two cards, or of two versions of the code, would be compared
        self.values: dict[str, Any] = found.get("values", {})
        first = {"first_environment": found.get("first_environment", found["environment"])} if self.values else {}
        self.about: dict[str, Any] = {**about, **first}
        self.errors: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.done = bool(found.get("done"))

    def write(self) -> None:
        told = {name: getattr(self, name) for name in ("done", "values", "errors", "left_out")}
        write_json(self.path, {**self.about, **told})

    def put(self, name: str, value: Any) -> None:
        self.values[name] = value
        self.write()

    def once(self, name: str, make: Callable[[], Any], need: float = 0.0) -> Any:
        """The result of that name: the one that is there, or a new one if ``need`` seconds are left, or ``None``.

        A failure is written down and ends nothing else.
        """
        if name in self.values:
            return self.values[name]
        if self.budget.left < need:
            self.left_out[name] = f"needs about {need:.0f} s, {max(self.budget.left, 0):.0f} s are left"
            self.write()
            return None
        started = time.monotonic()
        try:
            value = json.loads(json.dumps(make()))
            self.about.setdefault("took", {})[name] = round(time.monotonic() - started, 2)
            self.put(name, value)
        except Exception as error:
            self.fail(name, error)
        return self.values.get(name)

    def fail(self, name: str, error: BaseException) -> None:
        """Write a failure down, with the last lines of where it came from; where time ended is no news."""
        self.errors[name] = f"{type(error).__name__}: {error}"[:2000]
        if isinstance(error, Exception):
            lines = "".join(traceback.format_exception(error)).replace(f"{ROOT}/", "")
            self.about.setdefault("traces", {})[name] = lines[-1200:]
        self.write()


@cache
def digest() -> str:
    """Of the code that is measured and that measures: where it is copied to, there need be no git."""
    files = sorted(path for folder in ("src/ddit", "benchmarks/gpu") for path in (ROOT / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def read(path: Path) -> dict[str, Any]:
    """A stage's JSON, empty where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}
