"""FLUX.2: `diffusers.Flux2Transformer2DModel`.

The pipeline cuts 2 x 2 latent pixels into 4 C channels before it packs them one by one, which gives tokens in FLUX.1's
order (c, dy, dx): here they are latents of C channels again, so that a coarse grid is a smaller picture. Positions are
``img_ids [N, 4] = (image, row, column, 0)``, those of reference images behind.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F

from ddit.models.base import Inputs, Noisy, UnsupportedCall
from ddit.models.flops import Costs
from ddit.models.flux import Flux


class Flux2(Flux):
    feed_forward_names = re.compile(
        r"transformer_blocks\.\d+\.ff\.linear_(in|out)|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )
    costs = Costs(
        rows=(
            (r"time_guidance_embed\..*|(double|single)_stream_modulation.*|norm_out\.linear", "sample"),
            (r"x_embedder|proj_out|transformer_blocks\.\d+\.(attn\.to_(q|k|v|out\.0)|ff\..*)", "image"),
            (r"context_embedder|transformer_blocks\.\d+\.(attn\.(add_._proj|to_add_out)|ff_context\..*)", "text"),
            (r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)", "joint"),
        ),
        attention=(
            (r"transformer_blocks\.\d+\.attn\.to_q|single_transformer_blocks\.\d+\.attn\.to_out", "joint", "joint"),
        ),
    )

    def read(self, inputs: Inputs) -> Noisy:
        if inputs.get("kv_cache_mode") is not None:
            raise UnsupportedCall("the keys and values of reference images are kept from step to step (Klein KV)")
        return super().read(inputs)

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        call = self.image_and_text(height, width, text)
        return {
            **call,
            **{name: F.pad(call[name], (0, 1)) for name in ("img_ids", "txt_ids")},
            "guidance": torch.full((1,), 3.5) if config.guidance_embeds else None,
        }
