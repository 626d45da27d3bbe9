"""Lumina 2: `diffusers.Lumina2Transformer2DModel`.

Time runs from 0 (noise) to 1, and the model answers ``x - eps``. It cuts latents ``[B, C, H, W]`` into 2 x 2 patches
itself and counts their rows and columns from 0, so that a coarse grid is to it a smaller picture. Its sequence is
``[prompt | image]`` without the prompt's padding, hence an image lies behind a prompt of any length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddit.models.base import Architecture, Inputs, Noisy, UnsupportedCall, centre_waves
from ddit.models.flops import Costs
from ddit.patches import TokenLayout

_BLOCK = r"\.\d+\.(attn\.to_(q|k|v|out\.0)|feed_forward\.linear_[123])"


class Lumina2(Architecture):
    batched = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
    embedding = "x_embedder"
    head = "norm_out.linear_2"
    rope = "rope_embedder"
    block_lists = ("layers",)
    text_tokens = 256
    feed_forward_names = re.compile(r"(noise_refiner|layers)\.\d+\.feed_forward\.linear_[123]")
    costs = Costs(
        rows=(
            (r"time_caption_embed\.timestep_embedder\.linear_\d|norm_out\.linear_1|.*\.norm1\.linear", "sample"),
            (r"x_embedder|noise_refiner" + _BLOCK, "image"),
            (r"time_caption_embed\.caption_embedder\.1|context_refiner" + _BLOCK, "text"),
            (r"norm_out\.linear_2|layers" + _BLOCK, "joint"),
        ),
        attention=(
            (r"noise_refiner\.\d+\.attn\.to_q", "image", "image"),
            (r"context_refiner\.\d+\.attn\.to_q", "text", "text"),
            (r"layers\.\d+\.attn\.to_q", "joint", "joint"),
        ),
    )

    def read(self, inputs: Inputs) -> Noisy:
        self.check_patch_size()
        if len(inputs["encoder_attention_mask"].sum(1).unique()) > 1:
            # An adapter could not tell where in the sequence each image lies.
            raise UnsupportedCall("prompts of several lengths lie in one call; give one at a time (batch 1)")
        return Noisy(inputs["hidden_states"], self.sigma(inputs))

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        changed = {"hidden_states": noisy.latents, "timestep": 1 - noisy.sigma, "return_dict": False}
        return {**_without_padding(inputs), **changed}

    def velocity(self, output: Tensor, size: Sequence[int]) -> Tensor:
        return -output

    def output(self, velocity: Tensor, inputs: Inputs) -> Tensor:
        return -velocity

    def sigma(self, inputs: Inputs) -> Tensor:
        return 1 - super().sigma(inputs)

    @staticmethod
    def own(tokens: Tensor, count: int) -> Tensor:
        return tokens[:, -count:]

    def rows(self, inputs: Inputs, samples: Sequence[int]) -> Inputs:
        return _without_padding(super().rows(inputs, samples))

    def rotary(self, layout: TokenLayout, args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
        """Waves of the image ``[B, N, half a head]``, and the same behind those of the prompt."""
        patches, prompt, image, joint, *lengths = output
        rope: Any = self.transformer.get_submodule("rope_embedder")
        first, *dims = rope.axes_dim
        waves = centre_waves(layout, dims, rope.theta).to(image, non_blocking=True).expand(len(image), -1, -1)
        moved = torch.cat([image[..., : first // 2], waves], dim=2)
        return patches, prompt, moved, torch.cat([joint[:, : -moved.shape[1]], moved], dim=1), *lengths

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        return {
            "hidden_states": torch.zeros(1, config.in_channels, height, width),
            "timestep": torch.full((1,), 0.5),
            "encoder_hidden_states": torch.zeros(1, text, config.cap_feat_dim),
            "encoder_attention_mask": torch.ones(1, text, dtype=torch.long),
        }


def _without_padding(inputs: Inputs) -> Inputs:
    """The same call: what pads prompts is masked where they are read, and left out behind that."""
    length = int(inputs["encoder_attention_mask"].sum(1).max())
    return {**inputs, **{k: inputs[k][:, :length] for k in ("encoder_hidden_states", "encoder_attention_mask")}}
