"""Stable Diffusion 3 and 3.5: `diffusers.SD3Transformer2DModel`.

The model itself cuts latents ``[B, C, H, W]`` into 2 x 2 patches and adds the middle of one table of positions, as
large as the grid: a coarse grid is to it a smaller picture. Inpainting has a mask and the masked picture behind the
latents' channels. Guidance is stacked in one call; skip-layer guidance calls again about one copy of the latents.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ddit.models.base import Architecture, Inputs, Noisy, check_arguments
from ddit.models.flops import Costs
from ddit.patches import TokenLayout

_HARMLESS = {"scale", "ip_adapter_image_embeds"}
"""Attention arguments that know nothing of picture tokens."""


class StableDiffusion3(Architecture):
    time_scale = 1000.0
    residuals = ("block_controlnet_hidden_states",)
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        *residuals,
        "joint_attention_kwargs",
    )
    embedding = "pos_embed.proj"
    rope = "pos_embed"
    text_tokens = 333  # 77 of CLIP and 256 of T5
    feed_forward_names = re.compile(r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)")
    costs = Costs(
        rows=(
            (r"time_text_embed\..*|norm_out\.linear|transformer_blocks\.\d+\.norm\w*\.linear", "sample"),
            (r"pos_embed\.proj|proj_out|transformer_blocks\.\d+\.(attn2?\.to_(q|k|v|out\.0)|ff\..*)", "image"),
            (r"context_embedder|transformer_blocks\.\d+\.(attn\.(add_._proj|to_add_out)|ff_context\..*)", "text"),
        ),
        attention=(
            (r"transformer_blocks\.\d+\.attn\.to_q", "joint", "joint"),
            (r"transformer_blocks\.\d+\.attn2\.to_q", "image", "image"),
        ),
    )

    def read(self, inputs: Inputs) -> Noisy:
        check_arguments(inputs.get("joint_attention_kwargs"), _HARMLESS)
        self.check_patch_size()
        x = inputs["hidden_states"]
        condition = x[:, self.channels :]
        return Noisy(x[:, : self.channels], self.sigma(inputs), condition if condition.shape[1] else None)

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        x, condition = noisy.latents, noisy.condition
        changed = {
            "hidden_states": x if condition is None else torch.cat([x, condition.to(x)], dim=1),
            "timestep": noisy.sigma * self.time_scale,
            "return_dict": False,
        }
        grid = TokenLayout.of(inputs["hidden_states"], self.patch_size).grid
        return {**inputs, **changed, **self.pooled_residuals(inputs, layout, grid)}

    def velocity(self, output: Tensor, size: Sequence[int]) -> Tensor:
        return output

    def output(self, velocity: Tensor, inputs: Inputs) -> Tensor:
        return velocity

    def rotary(self, layout: TokenLayout, args: tuple[Any, ...], output: Any) -> Any:
        """Tokens with positions added: those of the centres instead of those counted on, out of the same table."""
        module: Any = self.transformer.get_submodule("pos_embed")
        rows, columns = (n * layout.scale for n in layout.grid)
        table = module.cropped_pos_embed(rows * self.patch_size, columns * self.patch_size)
        picture = rearrange(table, "1 (h w) d -> 1 d h w", h=rows)
        centres = F.interpolate(picture, size=layout.grid, mode="bilinear", align_corners=False)
        own = module.cropped_pos_embed(*args[0].shape[-2:])
        return output + (rearrange(centres, "1 d h w -> 1 (h w) d") - own).to(output, non_blocking=True)

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        return {
            "hidden_states": torch.zeros(1, config.in_channels, height, width),
            "encoder_hidden_states": torch.zeros(1, text, config.joint_attention_dim),
            "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
            "timestep": torch.full((1,), self.time_scale / 2),
        }
