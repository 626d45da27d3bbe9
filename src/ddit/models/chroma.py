"""Chroma: `diffusers.ChromaTransformer2DModel`, a relative of FLUX.1 without pooled text and guidance embedding.

All blocks are modulated by vectors that one small net makes from the timestep. The prompt's padding is masked, by an
``attention_mask [B, text + image]``, which ends where the image's tokens do.
"""

from __future__ import annotations

from typing import Any

import torch

from ddit.models.base import Inputs, Noisy
from ddit.models.flops import Costs
from ddit.models.flux import Flux
from ddit.patches import TokenLayout


class Chroma(Flux):
    batched = (*Flux.batched, "attention_mask")
    costs = Costs(((r"distilled_guidance_layer\..*", "modulation"), *Flux.costs.rows), Flux.costs.attention)

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        changed = super().write(inputs, noisy, layout)
        mask = inputs.get("attention_mask")
        if mask is None:
            return changed
        # Of the image no token is masked, so that the mask's end may go.
        tokens = inputs["encoder_hidden_states"].shape[1] + changed["hidden_states"].shape[1]
        return {**changed, "attention_mask": mask[:, :tokens]}

    def further_rows(self, inputs: Inputs) -> dict[str, int]:
        embedding: Any = self.transformer.get_submodule("time_text_embed")
        return {"modulation": len(embedding.mod_proj)}

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        call = self.image_and_text(height, width, text)
        tokens = text + call["hidden_states"].shape[1]
        return {**call, "attention_mask": torch.ones(1, tokens)}
