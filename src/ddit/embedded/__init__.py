"""The models that ship with ddit: a small, honestly trained FLUX and Wan, the grammars they know, and their judge.

They are trained by ``benchmarks/yardstick`` of the repository.
"""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
MODEL_FOLDER = ASSETS / "model"
"""A `FluxPipeline` in diffusers' format."""
VIDEO_MODEL_FOLDER = ASSETS / "video-model"
"""A `WanPipeline` in diffusers' format."""
ADAPTER_FOLDER = ASSETS / "adapter"
"""A `ddit.PatchAdapter` of the first."""
VIDEO_ADAPTER_FOLDER = ASSETS / "video-adapter"
"""A `ddit.PatchAdapter` of the second."""
