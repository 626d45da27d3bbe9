"""What a reader opens to follow FLUX with the paper's method: files, functions, lines and depth of one coarse step.

    python -m benchmarks.reading_path

A step of a tiny FLUX pipeline is traced, by the paper's rule and with an adapter. Lines are those of the functions that
ran, docstrings and all. Sizes of the package are counted as well.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

import ddit
from ddit.models import architecture_for

PACKAGE = Path(ddit.__file__).parent
PARTS = {
    "core": lambda path: path.parent.name == "ddit",
    "models": lambda path: path.parent.name == "models",
    "pipelines and util": lambda path: path.parent.name in ("pipelines", "util"),
    "skip": lambda path: path.parent.name == "skip",
    "train": lambda path: path.parent.name == "train",
    "eval": lambda path: path.parent.name == "eval",
    "cli": lambda path: path.parent.name == "cli",
    "embedded": lambda path: "embedded" in path.parts,
}


class Trace:
    """Functions of the package that run inside the block."""

    def __init__(self) -> None:
        self.functions: dict[tuple[str, str, int], int] = {}
        self.deepest = 0
        self._depth = 0

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(str(PACKAGE)) or code.co_name.startswith("<"):
            return
        if event == "call":
            self._depth += 1
            self.deepest = max(self.deepest, self._depth)
            lines = len(inspect.getsourcelines(code)[0])
            self.functions[code.co_filename, code.co_name, code.co_firstlineno] = lines
        elif event == "return":
            self._depth -= 1

    def __enter__(self) -> Trace:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def figures(self) -> dict[str, int]:
        """What was counted."""
        return {
            "files": len({name for name, _, _ in self.functions}),
            "functions": len(self.functions),
            "lines": sum(self.functions.values()),
            "deepest call": self.deepest,
        }


@torch.no_grad()
def coarse_step() -> tuple[dict[str, int], list[str]]:
    """Figures of one coarse step, and the names of its files."""
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    call = architecture_for(transformer).example(1, 16, 16, 5)
    adapter = ddit.PatchAdapter.for_model(transformer, rank=2)
    with ddit.apply(transformer, patches=ddit.PatchSchedule(threshold=1e9), adapter=adapter):
        for index in range(5):
            call |= {"timestep": torch.full((1,), 1 - index / 10), "hidden_states": torch.randn(1, 64, 16)}
            with Trace() as trace:
                transformer(**call)
    return trace.figures(), sorted({Path(name).relative_to(PACKAGE).as_posix() for name, _, _ in trace.functions})


def sizes() -> dict[str, int]:
    """Lines of each part of the package, and of its longest file."""
    files = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    counted = {name: sum(n for path, n in files.items() if belongs(path)) for name, belongs in PARTS.items()}
    return {**counted, "all": sum(files.values()), "longest file": max(files.values())}


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("--out", type=Path)
    args = command.parse_args()
    step, files = coarse_step()
    figures = {"coarse step": step, "its files": files, "lines": sizes(), "public names": len(ddit.__all__) - 1}
    print(json.dumps(figures, indent=1))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
