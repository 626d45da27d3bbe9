"""LTX-Video: `diffusers.LTXVideoTransformer3DModel`.

A token is one latent of 128 channels, 32 x 32 pixels of 8 frames. A call tells frames, rows and columns, and how far
apart they lie: a coarse grid is to the model a smaller video. Image to video gives the first frame, which has no noise,
and a timestep for each token, 0 for those of that frame; the pipeline does not ask what became of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddit.models.base import Inputs, Noisy, UnsupportedCall
from ddit.models.flops import Costs
from ddit.models.packed import PackedArchitecture
from ddit.patches import TokenLayout, pack

_SPREAD = (8 / 25, 32.0, 32.0)
"""Seconds of a frame of latents and pixels of a row and a column, by the pipeline's defaults."""


class LTX(PackedArchitecture):
    patch_size = 1
    compression = (32, 8)
    time_scale = 1000.0
    batched = ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask")
    embedding = "proj_in"
    rope = "rope"
    text_tokens = 128
    feed_forward_names = re.compile(r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)")
    costs = Costs(
        rows=(
            (r"time_embed\..*", "time"),
            (r"caption_projection\..*|transformer_blocks\.\d+\.attn2\.to_[kv]", "text"),
            (r"proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\..*)", "image"),
        ),
        attention=(
            (r"transformer_blocks\.\d+\.attn1\.to_q", "image", "image"),
            (r"transformer_blocks\.\d+\.attn2\.to_q", "image", "text"),
        ),
    )

    def read(self, inputs: Inputs) -> Noisy:
        if inputs.get("video_coords") is not None:
            raise UnsupportedCall("tokens have places of their own (video_coords), which need not be those of one grid")
        grid = tuple(inputs[name] for name in ("num_frames", "height", "width"))
        noisy, timestep = self.unpacked(inputs["hidden_states"], self.sigma(inputs), grid), inputs["timestep"]
        if timestep.ndim == 1:
            return noisy
        first, others = timestep.split([len(timestep[0]) // grid[0] * n for n in (1, grid[0] - 1)], dim=1)
        if first.any() or (others != timestep.amax(1, keepdim=True)).any():
            raise UnsupportedCall("frames have noise levels of their own, which one patch size can't serve")
        return Noisy(noisy.latents, noisy.sigma, noisy.latents[:, :, :1])

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        x, timestep, (rows, columns) = noisy.latents, noisy.sigma * self.time_scale, layout.grid
        if noisy.condition is not None:
            x = torch.cat([noisy.condition.to(x), x[:, :, 1:]], dim=2)
            timestep = timestep[:, None].repeat(1, x[0, 0].numel())
            timestep[:, : rows * columns] = 0
        changed = {"hidden_states": pack(x, self.patch_size), "timestep": timestep, "height": rows, "width": columns}
        return {**inputs, **changed, "return_dict": False}

    def sigma(self, inputs: Inputs) -> Tensor:
        level = super().sigma(inputs)
        return level if level.ndim == 1 else level.amax(1)

    def rotary(self, layout: TokenLayout, args: tuple[Any, ...], output: Any) -> Any:
        rope: Any = self.transformer.get_submodule("rope")
        hidden, frames, _, _, spread = args[:5]
        if spread is None:  # Then places are counted in parts of the largest video.
            spread = (rope.base_num_frames, rope.base_height, rope.base_width)
        places = layout.video_places(frames, hidden.device).T
        spaced = torch.stack([axis * float(step) for axis, step in zip(places, spread, strict=True)])
        return rope.forward(hidden, video_coords=spaced.expand(len(hidden), -1, -1))

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        return {
            "hidden_states": torch.zeros(1, frames * height * width, config.in_channels),
            "encoder_hidden_states": torch.zeros(1, text, config.caption_channels),
            "timestep": torch.full((1,), self.time_scale / 2),
            "encoder_attention_mask": torch.ones(1, text),
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": _SPREAD,
        }

    def teacache_signal(self, block: Any, argument: Callable[[str], Any]) -> Tensor:
        hidden, temb, table = argument("hidden_states"), argument("temb"), block.scale_shift_table
        shift, scale = (table + temb.unflatten(2, table.shape)).unbind(2)[:2]
        return block.norm1(hidden) * (1 + scale) + shift

    def teacache_coefficients(self) -> tuple[float, ...] | None:
        model: Any = self.transformer
        if model.config.num_layers != 28:
            return None
        return (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326)
