"""What the page draws, without the page: plain and dynamic pictures of a prompt, and the pairs of a study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ddit.app.study import Study
from ddit.config import PatchSchedule
from ddit.pipelines import outputs
from ddit.pipelines.generate import Method, Run, draws_video, run, run_steps, warm_up
from ddit.pipelines.loading import check_prompt, load_adapter
from ddit.pipelines.methods import SKIP, make_method
from ddit.preset import Preset
from ddit.report import Report

KEPT = 16
"""Plain runs that a studio keeps, the latest ones."""
PATCHES = ("rule", "paper", "speed", "schedule", "off")
"""What may decide on patches; ``off`` is every step full."""
SKIPPING = ("off", *SKIP)
"""What may decide on skipped steps, by `ddit.pipelines.methods.WORDS`."""


def words_of(
    *,
    patches: str,
    threshold: float | None,
    speed: float | None,
    schedule: str,
    skip: str,
    amount: float | None,
    adapter: str,
) -> dict[str, Any]:
    """What the knobs say, by `ddit.pipelines.methods.WORDS`.

    Args:
        patches: One of `PATCHES`.
        threshold: Of the rule; by default the model's own.
        speed: Times less work, for large patches that are planned.
        schedule: Scales of the steps, such as ``1 1 4 4 2 1``.
        skip: One of `SKIPPING`.
        amount: Of what ``skip`` names.
        adapter: Folder, hub id or ``none``; empty for the preset's, if any. Of no account where patches are ``off``.

    Raises:
        ValueError: For a schedule that is no list of whole numbers, a plan without a speed, or skipping without an
            amount.
    """
    words: dict[str, Any] = {} if patches == "off" else {"adapter": adapter.strip() or None}
    if patches == "schedule":
        try:
            words["schedule"] = [int(scale) for scale in schedule.replace(",", " ").split()]
        except ValueError:
            raise ValueError(f"the schedule is {schedule!r}; write one scale per step, such as 1 1 4 4 2 1") from None
    elif patches == "rule":
        words["threshold"] = threshold
    elif patches == "speed":
        if speed is None:
            raise ValueError("the speed is empty; say how many times less work the picture shall take")
        words["patch_speedup"] = speed
    else:
        words["patches"] = {"paper": "paper", "off": "full"}[patches]
    if skip != "off":
        if amount is None:
            raise ValueError(f"skip is {skip}, but the amount is empty; give a number, or turn skip off")
        words[skip] = amount
    return {name: value for name, value in words.items() if value is not None}


@dataclass(frozen=True)
class Drawn:
    """One prompt and seed, plain and dynamic."""

    plain: Run
    dynamic: Run
    method: Method

    @property
    def report(self) -> Report:
        """Of the dynamic run."""
        assert self.dynamic.report is not None, "a run by a method has one"
        return self.dynamic.report

    @property
    def figures(self) -> dict[str, str]:
        """Name -> figure, as a reader wants them."""
        return {
            "work saved": f"{1 - self.report.flops_fraction:.0%}",
            "seconds, plain": f"{self.plain.seconds:.2f}",
            "seconds, dynamic": f"{self.dynamic.seconds:.2f}",
            "likeness, PSNR in dB": f"{outputs.psnr(self.plain.pictures, self.dynamic.pictures):.1f}",
            "steps": self.report.strip(),
        }

    def plot(self, path: Path) -> None:
        """The schedule, with the threshold where a rule decided."""
        rule = self.method.patches
        self.report.plot(path, threshold=rule.threshold if isinstance(rule, PatchSchedule) else None)


@dataclass
class Studio:
    """A model at hand. Draws one run at a time: call it from one thread after another."""

    pipe: Any
    preset: Preset
    model: str
    settings: dict[str, Any]
    """Arguments of the pipeline's call."""
    load: dict[str, str] = field(default_factory=dict)
    """``dtype`` and ``device`` of adapters."""
    kept: dict[tuple[str, int, int], Run] = field(default_factory=dict)
    """Plain runs by prompt, seed and steps."""

    @property
    def draws_video(self) -> bool:
        return draws_video(self.pipe)

    @property
    def steps(self) -> int:
        """Denoising steps, where nobody says how many."""
        return run_steps(self.pipe, self.settings)

    def draw(
        self,
        prompt: str,
        seed: int,
        steps: int,
        words: dict[str, Any],
        on_step: Callable[[str, int, int, list[int]], None] = lambda *_: None,
    ) -> Drawn:
        """Draw by a method, and plain unless that is kept from before.

        Args:
            words: What makes it dynamic, by `ddit.pipelines.methods.WORDS`.
            on_step: As `ddit.pipelines.generate.OnStep`, with the name of the run before.

        Raises:
            ValueError: For an empty prompt, no steps, and settings that can't be honoured; before anything is drawn.
        """
        check_prompt(prompt, self.model)
        if steps < 1:
            raise ValueError(f"steps is {steps}; it must be at least 1")
        method = self._method(words)

        settings = {**self.settings, "num_inference_steps": steps}

        def draw(name: str, method: Method | None) -> Run:
            return run(self.pipe, [prompt], [seed], settings, method=method, on_step=partial(on_step, name))

        if not self.kept:
            warm_up(self.pipe, [prompt], [seed], settings, method)
        dynamic = draw("dynamic", method)  # the first, since what a model refuses shows only here
        key = (prompt, seed, steps)
        plain = self.kept.pop(key, None) or draw("plain", None)
        self.kept[key] = plain
        if len(self.kept) > KEPT:
            del self.kept[next(iter(self.kept))]
        return Drawn(plain, dynamic, method)

    def check_adapter(self, name: str | None) -> None:
        """Refuse an adapter, by its name, that is none or belongs to another model."""
        adapter = None if name is None else self._method({"adapter": name}).adapter
        if adapter is not None:
            adapter.check(self.pipe.transformer)

    def _method(self, words: dict[str, Any]) -> Method:
        return make_method(words, self.preset, load_adapter=partial(load_adapter, **self.load))


def draw_pairs(
    study: Study,
    pipe: Any,
    settings: dict[str, Any],
    method: Method,
    *,
    fps: int = 8,
    advance: Callable[[], None] = lambda: None,
) -> int:
    """Draw the pictures of a study that are not there yet.

    Args:
        settings: Arguments of the pipeline's call.
        fps: Frames per second of clips.
        advance: Called after each pair.

    Returns:
        How many pictures or clips were drawn.
    """
    count = 0
    for pair in study.pairs():
        for path, by in ((pair.plain, None), (pair.dynamic, method)):
            if path.is_file():
                continue
            drawn = run(pipe, [pair.prompt], [pair.seed], settings, method=by)
            if drawn.report is not None:
                study.note_work(pair.pair, drawn.report.flops_fraction)
            outputs.save(path, drawn.pictures, fps=fps)
            count += 1
        advance()
    return count
