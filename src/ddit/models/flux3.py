"""FLUX.3: `diffusers.Flux3Transformer2DModel`, which diffusers calls from modular pipelines only.

Tokens are those of FLUX.2. Their positions ``img_ids [N, 4] = (0, row, column, 0)`` are half a unit apart. Reference
images come beside the image's tokens, and are pooled with them.
"""

from __future__ import annotations

import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ddit.models.base import Inputs, Noisy, UnsupportedCall
from ddit.models.flops import Costs
from ddit.models.flux import Flux, Images, placed
from ddit.patches import TokenLayout, coarse_grid


class Flux3(Flux):
    residuals = ()
    batched = ("hidden_states", "encoder_hidden_states", "timestep", "image_cond_hidden_states", "attention_kwargs")
    attention_arguments = "attention_kwargs"
    embedding = "x_embedders.image"
    block_lists = ("txt_mode_blocks", "mode_blocks.image", "single_transformer_blocks")
    block_counts = ("num_layers", "num_single_layers")
    feed_forward_names = re.compile(r"(mode_blocks\.image|single_transformer_blocks)\.\d+\.ff\.linear_(in|out)")
    costs = Costs(
        rows=(
            (r"timestep_embedder\..*", "levels"),
            (r"(x_embedders|\w+_modulations|mode_blocks)\.image(\..*)?|norm_out\.linear|proj_out", "image"),
            (r"(x_embedders|\w+_modulations|mode_blocks)\.image_cond(\..*)?", "reference"),
            (r"context_embedder|\w+_modulations\.txt\..*|txt_mode_blocks\..*", "text"),
            (r"single_transformer_blocks\..*", "joint"),
        ),
        attention=(
            (r"mode_blocks\.image\.\d+\.attn\.to_q", "image", "image"),
            (r"mode_blocks\.image_cond\.\d+\.attn\.to_q", "reference", "reference"),
            (r"txt_mode_blocks\.\d+\.attn\.to_q", "text", "text"),
            (r"single_transformer_blocks\.\d+\.attn\.to_q", "joint", "joint"),
        ),
    )

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        self._references = Images()

    def read(self, inputs: Inputs) -> Noisy:
        if inputs.get("target_timestep") is not None:
            raise UnsupportedCall(
                "a step-distilled model is told the noise level it jumps to, and has few steps to save"
            )
        return super().read(inputs)

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        changed, given = super().write(inputs, noisy, layout), inputs.get("image_cond_hidden_states")
        if given is None or layout.scale == 1:
            return changed
        ids = inputs["image_cond_ids"]
        images = self._references(ids)
        if images is None:
            raise UnsupportedCall("image_cond_ids are not full grids of rows and columns")
        grids = [image.grid for image in images]
        tokens = self.pooled_references(given, grids, layout.scale)
        places = placed(ids, images, [coarse_grid(grid, layout.scale) for grid in grids], layout)
        return {**changed, "image_cond_hidden_states": tokens, "image_cond_ids": places}

    def further_rows(self, inputs: Inputs) -> dict[str, int]:
        """Text and reference images have the noise level 0."""
        given: Tensor | None = inputs.get("image_cond_hidden_states")
        reference = 0 if given is None else given.shape[1]
        joint = self.tokens(inputs) + inputs["encoder_hidden_states"].shape[1] + reference
        return {"levels": 2, "reference": reference, "joint": joint}

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        call = self.image_and_text(height, width, text)
        names = ("hidden_states", "encoder_hidden_states", "timestep")
        image, words = (F.pad(call[name], (0, 1)) for name in ("img_ids", "txt_ids"))
        return {**{name: call[name] for name in names}, "img_ids": image / 2, "txt_ids": words}
