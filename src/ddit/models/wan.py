"""Wan 2.1 and 2.2: `diffusers.WanTransformer3DModel`.

The model itself cuts latents ``[B, C, F, H, W]`` into patches of 1 x 2 x 2, and counts positions from their shape.
Image to video has condition channels behind those of the latents; its output has the latents' channels alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor

from ddit.models.base import Architecture, Inputs, Noisy, UnsupportedCall
from ddit.models.flops import Costs
from ddit.patches import TokenLayout

IMAGE_TOKENS = 257
"""Of the picture that image to video begins with, as its encoder gives them."""


class Wan(Architecture):
    time_scale = 1000.0
    batched = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_image", "timestep")
    embedding = "patch_embedding"
    rope = "rope"
    block_lists = ("blocks",)
    teacache_first = 5
    feed_forward_names = re.compile(r"blocks\.\d+\.ffn\.net\.(0\.proj|2)")
    costs = Costs(
        rows=(
            (r"condition_embedder\.time_.*", "time"),
            (r"condition_embedder\.text_embedder\..*", "text"),
            (r"condition_embedder\.image_embedder\..*", "picture"),
            (r"blocks\.\d+\.attn2\.to_[kv]", "context"),
            (r"blocks\.\d+\.attn2\.add_[kv]_proj", "added"),
            (r"patch_embedding|proj_out|blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ffn\..*)", "image"),
        ),
        attention=(
            (r"blocks\.\d+\.attn1\.to_q", "image", "image"),
            (r"blocks\.\d+\.attn2\.to_q", "image", "context"),
            (r"blocks\.\d+\.attn2\.add_k_proj", "image", "added"),
        ),
    )

    def read(self, inputs: Inputs) -> Noisy:
        own = tuple(self.transformer.config.patch_size)  # type: ignore[union-attr, arg-type]
        if own != (1, self.patch_size, self.patch_size):
            raise UnsupportedCall(f"the model's own patches are {own}, not (1, 2, 2)")
        x = inputs["hidden_states"]
        latents, condition = x[:, : self.channels], x[:, self.channels :]
        if inputs["timestep"].ndim == 2:
            condition = x  # frames that are given have no noise: they are pooled as conditions are
        return Noisy(latents, self.sigma(inputs), condition if condition.shape[1] else None)

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        latents, condition = noisy.latents, noisy.condition
        timestep = noisy.sigma * self.time_scale
        if inputs["timestep"].ndim == 2:
            assert condition is not None, "read() gave one"
            given = self._given_frames(inputs)
            condition, like = condition[:, self.channels :], condition[:, : self.channels]
            latents = torch.where(given[:, None, :, None, None], like.to(latents), latents)
            timestep = (timestep[:, None] * ~given).repeat_interleave(math.prod(layout.grid), dim=1)
        x = latents if condition is None else torch.cat([latents, condition.to(latents)], dim=1)
        return {**inputs, "hidden_states": x, "timestep": timestep, "return_dict": False}

    def sigma(self, inputs: Inputs) -> Tensor:
        timestep = super().sigma(inputs)
        # Wan 2.2 TI2V: a timestep per token, 0 where the frame is given.
        return timestep if timestep.ndim == 1 else timestep.amax(1)

    def _given_frames(self, inputs: Inputs) -> Tensor:
        """Frames that are given rather than drawn ``[B, F]``: their tokens have timestep 0."""
        frames = inputs["hidden_states"].shape[2]
        return (inputs["timestep"].unflatten(1, (frames, -1)) == 0).all(2)

    def velocity(self, output: Tensor, size: Sequence[int]) -> Tensor:
        return output

    def output(self, velocity: Tensor, inputs: Inputs) -> Tensor:
        return velocity

    def rotary(self, layout: TokenLayout, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> Any:
        rope: Any = self.transformer.get_submodule("rope")
        places, frames = layout.places(), args[0].shape[2]
        axes = (torch.arange(frames).repeat_interleave(len(places)), *places.repeat(frames, 1).T)
        waves = [_rotary(dim, axis) for dim, axis in zip((rope.t_dim, rope.h_dim, rope.w_dim), axes, strict=True)]
        pairs = zip(zip(*waves, strict=True), output, strict=True)
        return tuple(torch.cat(parts, dim=1)[None, :, None].to(like) for parts, like in pairs)

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        image = config.image_dim
        return {
            "hidden_states": torch.zeros(1, config.in_channels, frames, height, width),
            "timestep": torch.full((1,), self.time_scale / 2),
            "encoder_hidden_states": torch.zeros(1, text, config.text_dim),
            "encoder_hidden_states_image": torch.zeros(1, IMAGE_TOKENS, image) if image else None,
        }

    def teacache_signal(self, block: Any, argument: Callable[[str], Any]) -> Tensor:
        return argument("temb")  # The authors watch the timestep's embedding alone (their --use_ret_steps).

    def teacache_coefficients(self) -> tuple[float, ...] | None:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        if config.in_channels != config.out_channels:  # Those for 480p and 720p differ, the models' shapes do not.
            return None
        return {
            30: (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),  # 1.3B
            40: (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),  # 14B
        }.get(config.num_layers)


def _rotary(dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[N, dim]`` of positions ``[N]``, as the model computes them for whole numbers."""
    pos: Any = positions  # annotated for arrays only
    cos, sin = get_1d_rotary_pos_embed(dim, pos, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64)
    return cos, sin
