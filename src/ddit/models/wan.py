"""Wan 2.1 and 2.2: `diffusers.WanTransformer3DModel`.

The model itself cuts latents ``[B, C, F, H, W]`` into patches of 1 x 2 x 2, and counts positions from their shape.
Image to video has condition channels behind those of the latents; its output has the latents' channels alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

from ddit.config import Coarse
from ddit.models.base import Architecture, Inputs
from ddit.models.flops import Costs
from ddit.patches import coarse_positions, pad_to_multiple, shrink

TRAIN_STEPS = 1000
"""Timestep of pure noise."""
IMAGE_TOKENS = 257
"""Of the picture that image to video begins with, as its encoder gives them."""


class Wan(Architecture):
    patch_size = 2
    batched = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_image", "timestep")
    embedding = "patch_embedding"
    head = "proj_out"
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

    def obstacle(self, inputs: Inputs) -> str | None:
        model: Any = self.transformer
        if tuple(model.config.patch_size) != (1, self.patch_size, self.patch_size):
            return f"the model's own patches are {tuple(model.config.patch_size)}, not (1, 2, 2)"
        return None

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        image = config.image_dim
        return {
            "hidden_states": torch.zeros(1, config.in_channels, frames, height, width),
            "timestep": torch.full((1,), TRAIN_STEPS / 2),
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

    def latents(self, inputs: Inputs) -> Tensor:
        return inputs["hidden_states"][:, : self.channels]

    def sigma(self, inputs: Inputs) -> Tensor:
        timestep = inputs["timestep"].float() / TRAIN_STEPS
        # Wan 2.2 TI2V: a timestep per token, 0 where the frame is known.
        return timestep if timestep.ndim == 1 else timestep.amax(1)

    def coarse(self, inputs: Inputs, latents: Tensor, sigma: Tensor, scale: int, coarse: Coarse) -> Inputs:
        padded = pad_to_multiple(inputs["hidden_states"].float(), scale * self.patch_size)
        small = shrink(padded, scale, self.patch_size, coarse.start)
        return self._call(inputs, latents, sigma, small.to(latents.dtype))

    def renoised(self, inputs: Inputs, latents: Tensor, sigma: Tensor) -> Inputs:
        return self._call(inputs, latents, sigma, inputs["hidden_states"])

    def _call(self, inputs: Inputs, latents: Tensor, sigma: Tensor, like: Tensor) -> Inputs:
        """The call with other latents; conditions and known frames are those of ``like``, on the latents' grid."""
        timestep = sigma * TRAIN_STEPS
        given: Tensor = inputs["timestep"]
        if given.ndim == 2:
            known = self._known(inputs)
            latents = torch.where(known[:, None, :, None, None], like[:, : self.channels], latents)
            tokens = latents.shape[-2] * latents.shape[-1] // self.patch_size**2
            timestep = (timestep[:, None] * ~known).repeat_interleave(tokens, dim=1)
        return {
            **inputs,
            "hidden_states": torch.cat([latents, like[:, self.channels :]], dim=1),
            "timestep": timestep,
            "return_dict": False,
        }

    def _known(self, inputs: Inputs) -> Tensor:
        """Frames that are given rather than drawn ``[B, F]``: their tokens have timestep 0."""
        frames = inputs["hidden_states"].shape[2]
        return (inputs["timestep"].unflatten(1, (frames, -1)) == 0).all(2)

    def velocity(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        return output

    def output(self, velocity: Tensor) -> Tensor:
        return velocity

    def tokens(self, inputs: Inputs) -> int:
        return inputs["hidden_states"][0, 0].numel() // self.patch_size**2

    @contextmanager
    def placed(self, grid: tuple[int, int], scale: int, coarse: Coarse) -> Iterator[None]:
        """Counting from the shape is what ``grid`` asks for; other positions take the place of the model's own."""
        if coarse.positions == "grid":
            yield
            return
        rope: Any = self.transformer.get_submodule("rope")
        dims = (rope.t_dim, rope.h_dim, rope.w_dim)
        places = coarse_positions((0.0, 0.0), grid, scale, coarse.positions).flatten(0, 1)

        def replace(_: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            frames = args[0].shape[2]
            axes = (torch.arange(frames).repeat_interleave(len(places)), *places.repeat(frames, 1).T)
            waves = [_rotary(dim, axis) for dim, axis in zip(dims, axes, strict=True)]
            pairs = zip(zip(*waves, strict=True), output, strict=True)
            return tuple(torch.cat(parts, dim=1)[None, :, None].to(like) for parts, like in pairs)

        handle = rope.register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()


def _rotary(dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[N, dim]`` of positions ``[N]``, as the model computes them for whole numbers."""
    pos: Any = positions  # annotated for arrays only
    cos, sin = get_1d_rotary_pos_embed(dim, pos, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64)
    return cos, sin
