"""VBench's dimensions of clips (Huang et al. 2024). VBench pins old packages, so it is run as a command of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ddit.eval.drawings import Drawings
from ddit.pipelines.outputs import check_video_writer
from ddit.util.files import read_lines, write_json, write_text

NAME = "vbench"
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
"""Those that VBench offers for prompts of one's own; its others, and its totals, go with its own 946 prompts."""
FPS = 16
SAID = "vbench.jsonl"


def command(source: str) -> str:
    """The path of VBench's command.

    Raises:
        ValueError: When it, or what writes clips, is not there.
    """
    check_video_writer()
    found = shutil.which(source)
    if found is None:
        raise ValueError(
            f"there is no command {source!r}; VBench needs an environment of its own: python -m venv vbench && "
            f"vbench/bin/pip install vbench, then name its command with --weights {NAME}=vbench/bin/vbench"
        )
    return os.path.abspath(found)


def judge(command: str, drawn: Drawings) -> None:
    """Let VBench judge all clips of a method, unless it has: a line each in ``vbench.jsonl``.

    Raises:
        ValueError: When VBench ends without results; what it wrote is on standard error.
    """
    if len(said(drawn)) >= len(drawn.prompts):
        return
    clips, results = drawn.folder / "clips", drawn.folder / NAME
    for folder in (clips, results):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    _write(drawn, clips)
    write_json(drawn.folder / "prompts.json", {f"{i:05}.mp4": text for i, text in enumerate(drawn.prompts)})
    # It quotes no paths but that of the clips, and starts "python": names without spaces, its own one first.
    flags = ["--videos_path", clips.name, "--prompt_file", "prompts.json", "--output_path", results.name]
    path = os.pathsep.join([str(Path(command).parent), os.environ.get("PATH", "")])
    subprocess.run(
        [command, "evaluate", *flags, "--mode", "custom_input", "--dimension", " ".join(DIMENSIONS)],
        cwd=drawn.folder,
        env={**os.environ, "PATH": path},
    )
    found = sorted(results.glob("*_eval_results.json"))
    if not found:
        raise ValueError(f"{command} wrote no results of {clips}; what it said stands above")
    lines = _by_clip(json.loads(found[-1].read_text()), len(drawn.prompts))
    write_text(drawn.folder / SAID, "".join(json.dumps(line) + "\n" for line in lines))


def said(drawn: Drawings) -> list[dict[str, Any]]:
    """What VBench said of each clip, if it has."""
    return read_lines(drawn.folder / SAID)


def _write(drawn: Drawings, folder: Path) -> None:
    """Clips as MP4."""
    from diffusers.utils import export_to_video

    for i in range(len(drawn.prompts)):
        export_to_video([frame / 255 for frame in drawn.picture(i)], str(folder / f"{i:05}.mp4"), fps=FPS, quality=8)


def _by_clip(results: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """A record for each clip from ``{dimension: [mean, [{"video_path": ..., "video_results": ...}]]}``."""
    records: list[dict[str, Any]] = [{"number": i} for i in range(count)]
    for name, (_, clips) in results.items():
        percent = 100 if name == "imaging_quality" else 1  # alone, one of a clip is not a fraction
        for clip in clips:
            records[int(Path(clip["video_path"]).stem)][name] = float(clip["video_results"]) / percent
    return records
