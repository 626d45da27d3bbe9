"""From a training run to the video model that ships."""

from __future__ import annotations

from pathlib import Path

from ddit.embedded.install import ship
from ddit.embedded.video import CORRECTOR_FOLDER, MODEL_FOLDER
from ddit.embedded.video.clips import FRAMES, SIZE, clips
from ddit.embedded.video.components import TEXT_TOKENS

CALL = {
    "height": SIZE,
    "width": SIZE,
    "num_frames": FRAMES,
    "num_inference_steps": 50,
    "guidance_scale": 3.0,
    "max_sequence_length": TEXT_TOKENS,
}
"""How the embedded video model wants to be called."""


def install(
    folder: Path,
    *,
    to: Path = MODEL_FOLDER,
    corrector: Path = CORRECTOR_FOLDER,
) -> Path:
    """Ship the video model of ``folder``, the run folder of `ddit.embedded.video.training.train`; see `ship`."""
    return ship(folder, to, corrector, CALL, (clip.prompt for clip in clips(7, "tune")))
