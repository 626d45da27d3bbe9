"""LongCat-Image: `diffusers.LongCatImageTransformer2DModel`, FLUX.1 without pooled text and guidance embedding.

Edit puts tokens of its picture behind those of the image, as Kontext does.
"""

from __future__ import annotations

from ddit.models.base import Inputs
from ddit.models.flops import Costs
from ddit.models.flux import Flux


class LongCatImage(Flux):
    costs = Costs(((r"time_embed\..*", "sample"), *Flux.costs.rows), Flux.costs.attention)

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        return self.image_and_text(height, width, text)
