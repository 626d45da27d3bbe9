"""Qwen-Image: `diffusers.QwenImageTransformer2DModel`.

The pipeline packs 2 x 2 latent pixels into a token as FLUX.1's does, but tells the grid as ``img_shapes``, a list of
(frames, rows, columns) per sample. The model counts positions from the middle of that grid, and those of the text on
from its edge: a coarse grid is to it a smaller picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ddit.config import Coarse
from ddit.models.base import Inputs, PackedArchitecture
from ddit.models.flops import Costs
from ddit.patches import coarse_positions


class QwenImage(PackedArchitecture):
    patch_size = 2
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "encoder_hidden_states_mask",
        "timestep",
        "guidance",
    )
    embedding = "img_in"
    head = "proj_out"
    block_lists = ("transformer_blocks",)
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

    def obstacle(self, inputs: Inputs) -> str | None:
        model: Any = self.transformer
        if inputs.get("controlnet_block_samples") is not None:
            return "ControlNet residuals are made for the model's own tokens"
        if model.config.use_layer3d_rope or inputs.get("additional_t_cond") is not None:
            return "the model draws layers (Layered), whose positions ddit does not know"
        if any(len(sample) != 1 or sample[0][0] != 1 for sample in inputs["img_shapes"]):
            return "there are reference pictures beside the latents (Edit)"
        return None

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

    def latents(self, inputs: Inputs) -> Tensor:
        rows, columns = inputs["img_shapes"][0][0][1:]
        return self.velocity(inputs["hidden_states"], (rows * self.patch_size, columns * self.patch_size))

    def sigma(self, inputs: Inputs) -> Tensor:
        return inputs["timestep"].float()

    def coarse(self, inputs: Inputs, latents: Tensor, sigma: Tensor, scale: int, coarse: Coarse) -> Inputs:
        rows, columns = (n // self.patch_size for n in latents.shape[-2:])
        return {**self.renoised(inputs, latents, sigma), "img_shapes": [[(1, rows, columns)]] * len(latents)}

    def renoised(self, inputs: Inputs, latents: Tensor, sigma: Tensor) -> Inputs:
        return {
            **inputs,
            "hidden_states": self.output(latents),
            "timestep": sigma.to(latents.dtype),
            "return_dict": False,
        }

    @contextmanager
    def placed(self, grid: tuple[int, int], scale: int, coarse: Coarse) -> Iterator[None]:
        """Other positions than those of a smaller picture take the place of the model's own, the text's too."""
        if coarse.positions == "grid":
            yield
            return
        rope: Any = self.transformer.get_submodule("pos_embed")
        rows, columns = (n * scale for n in grid)
        origin = (float(rows // 2 - rows), float(columns // 2 - columns))
        places = coarse_positions(origin, grid, scale, coarse.positions).flatten(0, 1)

        def replace(_: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            axes = (torch.zeros(len(places)), *places.T)
            waves = [rope.rope_params(axis, dim) for axis, dim in zip(axes, rope.axes_dim, strict=True)]
            begin = max(rows, columns) // 2
            text = rope.pos_freqs[begin : begin + len(output[1])]
            return torch.cat(waves, dim=1).to(output[0]), text.to(output[1])

        handle = rope.register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()
