"""The model that ships with ddit: a small, honestly trained FLUX, the pictures it learnt from, and a judge."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
MODEL_FOLDER = ASSETS / "model"
"""A `FluxPipeline` in diffusers' format."""
CORRECTOR_FOLDER = ASSETS / "corrector"
"""A `ddit.ForecastCorrector` for it."""
