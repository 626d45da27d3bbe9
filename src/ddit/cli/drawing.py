"""A model with all that `ddit generate` asks of it. Imports all of ddit, so commands import it when they run."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ddit.cli.common import FPS, call_options, command_line, environment, files_of, words_of
from ddit.config import PatchSchedule
from ddit.eval.metrics import similarity
from ddit.eval.parts import digest
from ddit.pipelines import generate as lib
from ddit.pipelines import loading, outputs, sounds
from ddit.pipelines.methods import make_method
from ddit.util.files import replacing


@dataclass(frozen=True)
class Drawing:
    """A model with all that the command line asks of it."""

    args: argparse.Namespace
    pipe: Any
    method: lib.Method
    words: dict[str, Any]
    """What was asked for, by `ddit.pipelines.methods.WORDS`."""
    settings: dict[str, Any]
    """Arguments of the pipeline's call."""
    suffix: str
    """Of the files: .png, .mp4 of a video model, or .wav of sound."""

    @classmethod
    def load(cls, args: argparse.Namespace, device: str) -> Drawing:
        """Load what is asked for.

        Raises:
            ValueError: For a model, adapter, cache or size that can't be had.
        """
        load = {"dtype": args.dtype, "device": device}
        pipe, preset = loading.load_pipeline(args.model, **load, preset=args.preset)
        suffix = ".wav" if sounds.sample_rate(pipe) else ".mp4" if lib.draws_video(pipe) else ".png"
        if suffix == ".mp4":
            outputs.check_video_writer()
        elif args.fps is not None:
            raise ValueError(f"fps is {args.fps}, but {type(pipe).__name__} makes no clips; leave --fps out")
        words = words_of(args)
        method = make_method(
            words,
            preset,
            load_adapter=partial(loading.load_adapter, **load),
        )
        settings = lib.call_settings(preset, **call_options(args))
        lib.check_call(pipe, settings)
        return cls(args, pipe, method, words, settings, suffix)

    @property
    def fps(self) -> int:
        """Frames per second of a clip."""
        return self.args.fps or FPS

    @property
    def seeds(self) -> list[int]:
        return [self.args.seed + i for i in range(self.args.num_images)]

    def asked(self, prompt: str) -> dict[str, Any]:
        """All that decides what is drawn, and what is written of it."""
        args = self.args
        return {"prompt": prompt, "seeds": self.seeds, "compare": args.compare, "fps": self.fps, **self.setup}

    @cached_property
    def setup(self) -> dict[str, Any]:
        """The model, how it is called, and what makes it faster."""
        method = self.method
        patches: Any = method.patches  # never a policy of one's own
        return {
            "model": self.args.model,
            "dtype": self.args.dtype,
            "call": self.settings,
            "method": self.words,
            "patches": "planned with what is skipped" if patches is None else patches.to_dict(),
            "skip": method.skip and method.skip.to_dict(),
            "adapter": None if method.adapter is None else digest(method.adapter),
            "preset": hashlib.sha256(repr(method.preset).encode()).hexdigest()[:12],
        }

    def draw(
        self, prompt: str, out: Path, on_step: Callable[..., None] | None = None, *, plot: Path | None = None
    ) -> tuple[dict[str, Any], list[Path]]:
        """Draw and save a prompt; gives its report and the files."""
        args, prompts = self.args, [prompt] * self.args.num_images
        asked, plain = (self.pipe, prompts, self.seeds, self.settings), None
        if args.compare:
            methods = {"plain": None, "method": self.method}
            plain, dynamic = lib.by_turns(*asked, methods, repeats=args.repeats or 1, on_step=on_step).values()
        else:
            dynamic = lib.run(*asked, method=self.method, on_step=on_step)
        report: Any = dynamic.report
        result = {"command": command_line(), **self.asked(prompt), **report.to_dict()}
        result.update(seconds=dynamic.seconds, environment=environment(args.device))
        result["strips"] = [report.strip(i) for i in range(len(prompts))]
        if plain is not None:
            result.update(self._likeness(plain.pictures, dynamic.pictures))
            result.update(baseline_seconds=plain.seconds, speedup=plain.seconds / dynamic.seconds)
        written = self._save(out, dynamic.pictures, None if plain is None else plain.pictures)
        if plot is not None:
            plot.parent.mkdir(parents=True, exist_ok=True)
            rule = self.method.patches
            threshold = rule.threshold if isinstance(rule, PatchSchedule) else None
            with replacing(plot) as part:
                named = part.with_name(part.name + (plot.suffix or ".png"))  # the ending tells the format
                report.plot(named, threshold=threshold)
                named.replace(part)
            written.append(plot)
        return result, written

    def _likeness(self, plain: np.ndarray, dynamic: np.ndarray) -> dict[str, float]:
        if self.suffix == ".wav":
            return sounds.likeness(plain, dynamic)
        return similarity(outputs.frames(plain), outputs.frames(dynamic))

    def _save(self, out: Path, dynamic: np.ndarray, plain: np.ndarray | None) -> list[Path]:
        if self.suffix == ".wav":
            return sounds.save(out, dynamic, plain, rate=self.pipe.sample_rate)
        return outputs.save(out, dynamic, plain, fps=self.fps)

    def is_there(self, prompt: str, path: Path) -> bool:
        """Whether an earlier run has drawn a prompt to ``path``, and all its files are still there.

        Raises:
            ValueError: When something else was drawn there.
        """
        report = path.with_suffix(".json")
        if not report.is_file():
            return False
        try:
            before = json.loads(report.read_text())
        except ValueError:
            before = None
        if not isinstance(before, dict):
            return False
        asked = json.loads(json.dumps(self.asked(prompt)))
        differ = [name for name, value in asked.items() if before.get(name) != value]
        if differ:
            raise ValueError(
                f"{report} tells of another run ({', '.join(differ)} differ); name another folder with --out, "
                "or delete it to draw it anew"
            )
        return all(file.is_file() for file in files_of(path, self.args.num_images, compared=self.args.compare))
