"""Qwen-Image: `diffusers.QwenImageTransformer2DModel`.

The pipeline packs 2 x 2 latent pixels into a token as FLUX.1's does, but tells the grid as ``img_shapes``, a list of
(frames, rows, columns) per sample. The model counts positions from the middle of that grid, and those of the text on
from its edge: a coarse grid is to it a smaller picture. Tokens of reference images (Edit) come behind and stay.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddit.models.base import Inputs, Noisy, PackedArchitecture, UnsupportedCall
from ddit.models.flops import Costs
from ddit.patches import TokenLayout, pool_tokens


class QwenImage(PackedArchitecture):
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "encoder_hidden_states_mask",
        "timestep",
        "guidance",
        "controlnet_block_samples",
    )
    embedding = "img_in"
    rope = "pos_embed"
    feed_forward_names = re.compile(r"transformer_blocks\.\d+\.img_mlp\.net\.(0\.proj|2)")
    costs = Costs(
        rows=(
            (r"time_text_embed\..*|transformer_blocks\.\d+\.img_mod\.1", "time"),
            (r"transformer_blocks\.\d+\.txt_mod\.1|norm_out\.linear", "sample"),
            (r"img_in|proj_out|transformer_blocks\.\d+\.(attn\.to_(q|k|v|out\.0)|img_mlp\..*)", "image"),
            (r"txt_in|transformer_blocks\.\d+\.(attn\.(add_._proj|to_add_out)|txt_mlp\..*)", "text"),
        ),
        attention=((r"transformer_blocks\.\d+\.attn\.to_q", "joint", "joint"),),
    )

    def read(self, inputs: Inputs) -> Noisy:
        model: Any = self.transformer
        if model.config.use_layer3d_rope or inputs.get("additional_t_cond") is not None:
            raise UnsupportedCall("the model draws layers (Layered), whose positions ddit does not know")
        frames, rows, columns = inputs["img_shapes"][0][0]
        if frames != 1:
            raise UnsupportedCall(f"the image has {frames} frames; one is supported")
        return self.unpacked(inputs["hidden_states"], self.sigma(inputs), (rows, columns))

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        (_, *own), *references = inputs["img_shapes"][0]
        grid = (own[0], own[1])
        changed = {
            "hidden_states": self.packed(noisy, inputs["hidden_states"][:, math.prod(grid) :]),
            "timestep": noisy.sigma.to(noisy.latents.dtype),
            "img_shapes": [[(1, *layout.grid), *references]] * len(noisy.latents),
            "return_dict": False,
        }
        residuals = inputs.get("controlnet_block_samples")
        if residuals is not None and layout.grid != grid:
            changed["controlnet_block_samples"] = [pool_tokens(x, grid, layout.scale) for x in residuals]
        return {**inputs, **changed}

    def rows(self, inputs: Inputs, samples: Sequence[int]) -> Inputs:
        return {**super().rows(inputs, samples), "img_shapes": [inputs["img_shapes"][i] for i in samples]}

    def rotary(self, layout: TokenLayout, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> Any:
        """Positions count from the middle of the image, those of the text on from its edge."""
        rope: Any = self.transformer.get_submodule("pos_embed")
        rows, columns = (n * layout.scale for n in layout.grid)
        places = layout.places((float(rows // 2 - rows), float(columns // 2 - columns)))
        axes = (torch.zeros(len(places)), *places.T)
        waves = torch.cat([rope.rope_params(axis, dim) for axis, dim in zip(axes, rope.axes_dim, strict=True)], dim=1)
        image = torch.cat([waves.to(output[0]), output[0][len(places) :]])
        begin = max(rows, columns, *(n for _, *size in args[0][0][1:] for n in size)) // 2
        return image, rope.pos_freqs[begin : begin + len(output[1])].to(output[1])

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        rows, columns = height // self.patch_size, width // self.patch_size
        return {
            "hidden_states": torch.zeros(1, rows * columns, config.in_channels),
            "encoder_hidden_states": torch.zeros(1, text, config.joint_attention_dim),
            "encoder_hidden_states_mask": torch.ones(1, text, dtype=torch.long),
            "timestep": torch.full((1,), 0.5),
            "img_shapes": [[(1, rows, columns)]],
        }

    def teacache_signal(self, block: Any, argument: Callable[[str], Any]) -> Tensor:
        shift, scale, _ = block.img_mod(argument("temb")).chunk(2, dim=-1)[0].unsqueeze(1).chunk(3, dim=-1)
        return block.img_norm1(argument("hidden_states")) * (1 + scale) + shift
