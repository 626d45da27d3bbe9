"""The video model that ships with ddit: a small, honestly trained Wan, the clips it learnt from, and their judge."""

from ddit.embedded import ASSETS

MODEL_FOLDER = ASSETS / "video-model"
"""A `WanPipeline` in diffusers' format."""
CORRECTOR_FOLDER = ASSETS / "video-corrector"
"""A `ddit.ForecastCorrector` for it."""
