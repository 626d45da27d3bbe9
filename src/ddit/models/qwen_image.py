"""Qwen-Image: `diffusers.QwenImageTransformer2DModel`.

The pipeline packs 2 x 2 latent pixels into a token as FLUX.1's does, but tells the grid as ``img_shapes``, a list of
(frames, rows, columns) per sample. The model counts positions from the middle of that grid, and those of the text on
from its edge: a coarse grid is to it a smaller picture. Shapes and tokens of reference images (Edit) come behind, and
are pooled too. Layered draws several images at once, here the frames of the latents; its reference is the last one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddit.models.base import Inputs, Noisy, UnsupportedCall
from ddit.models.flops import Costs
from ddit.models.packed import PackedArchitecture
from ddit.patches import TokenLayout, coarse_grid


class QwenImage(PackedArchitecture):
    residuals = ("controlnet_block_samples",)
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "encoder_hidden_states_mask",
        "timestep",
        "guidance",
        *residuals,
        "additional_t_cond",
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
        own, _ = self._shapes(inputs)
        if own[0][0] != 1:
            raise UnsupportedCall(f"the image has {own[0][0]} frames; one is supported")
        grid = own[0][1:] if len(own) == 1 else (len(own), *own[0][1:])
        return self.unpacked(inputs["hidden_states"], self.sigma(inputs), grid)

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        own, references = self._shapes(inputs)
        grid, count = own[0][1:], sum(math.prod(shape) for shape in own)
        grids, scale = [shape[1:] for shape in references], layout.scale
        pooled = [(1, *coarse_grid(size, scale)) for size in grids]
        changed = {
            "hidden_states": self.packed(
                noisy, self.pooled_references(inputs["hidden_states"][:, count:], grids, scale)
            ),
            "timestep": noisy.sigma.to(noisy.latents.dtype),
            "img_shapes": [[(1, *layout.grid)] * len(own) + pooled] * len(noisy.latents),
            "return_dict": False,
        }
        return {**inputs, **changed, **self.pooled_residuals(inputs, layout, grid)}

    def _shapes(self, inputs: Inputs) -> tuple[list[Any], list[Any]]:
        """(frames, rows, columns) of what is drawn, and of reference images, in every sample the same."""
        shapes = inputs["img_shapes"][0]
        shapes = shapes if isinstance(shapes, list) else [shapes]  # of ControlNet's pipelines
        config: Any = self.transformer.config  # type: ignore[union-attr]
        count = len(shapes) - 1 if config.use_layer3d_rope else 1
        return shapes[:count], shapes[count:]

    def rows(self, inputs: Inputs, samples: Sequence[int]) -> Inputs:
        return {**super().rows(inputs, samples), "img_shapes": inputs["img_shapes"][:1] * len(samples)}

    def rotary(self, layout: TokenLayout, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> Any:
        """Positions count from the middle of every image, those of the text on from its edge."""
        rope: Any = self.transformer.get_submodule("pos_embed")
        own, references = self._shapes({"img_shapes": args[0]})
        sizes = [[n * layout.scale for n in size] for _, *size in own + references]
        places = torch.cat(
            [
                replace(layout, grid=tuple(grid)).places([float(n // 2 - n) for n in size])
                for (_, *grid), size in zip(own + references, sizes, strict=True)
            ]
        )
        frame, *dims = rope.axes_dim
        waves = torch.cat([rope.rope_params(axis, dim) for axis, dim in zip(places.T, dims, strict=True)], dim=1)
        image = torch.cat([output[0][:, : frame // 2], waves.to(output[0], non_blocking=True)], dim=1)
        begin = max(n for size in sizes for n in size) // 2
        begin = max(begin, len(own)) if len(own) > 1 else begin  # as many images are drawn as positions go by
        return image, rope.pos_freqs[begin : begin + len(output[1])].to(output[1])

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        shape = (1, height // self.patch_size, width // self.patch_size)
        images = frames + 1 if config.use_layer3d_rope else 1
        return {
            "hidden_states": torch.zeros(1, images * math.prod(shape), config.in_channels),
            "encoder_hidden_states": torch.zeros(1, text, config.joint_attention_dim),
            "encoder_hidden_states_mask": torch.ones(1, text, dtype=torch.long),
            "timestep": torch.full((1,), 0.5),
            "img_shapes": [[shape] * images],
            "additional_t_cond": torch.zeros(1, dtype=torch.long) if config.use_additional_t_cond else None,
        }

    def teacache_signal(self, block: Any, argument: Callable[[str], Any]) -> Tensor:
        modulation = block.img_mod(argument("temb")).chunk(2, dim=-1)[0]
        return block._modulate(block.img_norm1(argument("hidden_states")), modulation, argument("modulate_index"))[0]
