"""Pictures of methods on disk, and the loop that draws them: a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ddit.eval.prices import Prices
from ddit.eval.quality import Entry
from ddit.pipelines.generate import run
from ddit.pipelines.outputs import eight_bits, save_png
from ddit.util.files import add_lines, read_lines, write_json
from ddit.util.progress import progress
from ddit.util.tell import warn


class Drawings:
    """What one method drew of a list of prompts: a folder with a PNG and a line of ``drawn.jsonl`` per prompt.

    Of a clip the PNG has the frames one below another. A line is written after its picture.

    Args:
        parent: The folder is made inside, and named for the method.
        settings: All that pictures depend on beside the prompt.
        prompts: In order.

    Raises:
        ValueError: When the folder holds what was drawn otherwise.
    """

    def __init__(self, parent: Path, method: str, settings: Mapping[str, Any], prompts: Sequence[str]) -> None:
        self.folder = parent / re.sub(r"[^\w.=-]+", "-", method)
        self.prompts = prompts
        known, settings = self.folder / "settings.json", json.loads(json.dumps(settings))
        if known.exists():
            there = json.loads(known.read_text())
            self._refuse([name for name in settings if there.get(name) != settings[name]])
        else:
            write_json(known, settings)
        self.records = read_lines(self.folder / "drawn.jsonl")
        asked = [record["prompt"] for record in self.records]
        self._refuse(["prompts"] if asked[: len(prompts)] != list(prompts[: len(asked)]) else [])

    def _refuse(self, differing: Sequence[str]) -> None:
        if differing:
            raise ValueError(
                f"{self.folder} holds pictures of another run ({', '.join(differing)} differ); "
                "name another --out, or remove that folder"
            )

    def add(self, drawn: np.ndarray, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep the next pictures, ``[B, H, W, 3]`` or ``[B, F, H, W, 3]``, with what is to be said of each."""
        first = len(self.records)
        lines = []
        for i, (picture, record) in enumerate(zip(eight_bits(drawn), records, strict=True), start=first):
            save_png(self._path(i), picture.reshape(-1, *picture.shape[-2:]))
            frames = len(picture) if picture.ndim == 4 else None
            lines.append({"number": i, "prompt": self.prompts[i], "frames": frames, **record})
        add_lines(self.folder / "drawn.jsonl", lines)
        self.records += lines

    def picture(self, number: int) -> np.ndarray:
        """uint8 ``[H, W, 3]`` or ``[F, H, W, 3]``."""
        with Image.open(self._path(number)) as file:
            picture = np.asarray(file)
        frames = self.records[number]["frames"]
        return picture if frames is None else picture.reshape(frames, -1, *picture.shape[1:])

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05}.png"


def draw(
    pipe: Any,
    methods: Sequence[Entry],
    drawings: Sequence[Drawings],
    settings: dict[str, Any],
    *,
    batch: int,
    seed: int,
    costs: Prices | None = None,
) -> None:
    """Every method on every prompt that it has not drawn yet; for each batch methods take turns in rotating order.

    Args:
        drawings: Of each method.
        settings: Arguments of the pipeline's call, without ``num_inference_steps``.
        costs: At which work is told; by default the model's own.
    """
    prompts = drawings[0].prompts
    starts = range(0, len(prompts), batch)
    device = torch.device(pipe.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    warm: set[str] = set()

    def call(entry: Entry, part: range, steps: int) -> Any:
        seeds = [seed * 1_000_003 + i for i in part]
        chosen = {**settings, "num_inference_steps": steps}
        return run(pipe, [prompts[i] for i in part], seeds, chosen, method=entry.method)

    with progress("draw", len(starts) * len(methods)) as advance:
        for turn, start in enumerate(starts):
            for k in range(len(methods)):
                which = (k + turn) % len(methods)
                entry, kept = methods[which], drawings[which]
                part = range(max(start, len(kept.records)), min(start + batch, len(prompts)))
                if part and entry.name not in warm:
                    warm.add(entry.name)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # so few steps are not what anyone asked for
                        call(entry, part, 5)
                if part:
                    outcome = entry.priced(call(entry, part, entry.run_steps), costs)
                    report = outcome.report
                    # A report has more samples where guidance is stacked.
                    work = [1.0] * len(part) if report is None else report.flops_fractions[: len(part)]
                    each = {"seconds": outcome.seconds / len(part), "device": name, "call": part.start}
                    kept.add(outcome.pictures, [{"flops_fraction": share, **each} for share in work])
                advance()
    devices = {record["device"] for drawn in drawings for record in drawn.records[: len(prompts)]}
    if len(devices) > 1:
        warn(f"pictures were drawn on several devices ({', '.join(sorted(devices))}); mind that in speeds")
