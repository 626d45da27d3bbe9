"""HunyuanVideo and HunyuanVideo 1.5.

The model itself cuts latents ``[B, C, F, H, W]`` into patches, and counts positions from their shape: a coarse grid is
to it a smaller video. Image to video has condition channels behind those of the latents, or, where tokens are replaced
(``token_replace``), the picture in place of the first frame: that frame has no noise, the model tells itself timestep 0
about it, and the pipeline does not ask what became of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor

from ddit.models.base import Architecture, Inputs, Noisy, UnsupportedCall
from ddit.models.flops import Costs
from ddit.patches import TokenLayout

LETTERS, PICTURE = 256, 729
"""Tokens of the letters to be drawn and of a picture's features, as the encoders of 1.5 give them."""

_REFINER = r"context_embedder\.token_refiner\.refiner_blocks\.\d+"


class HunyuanVideo(Architecture):
    """`diffusers.HunyuanVideoTransformer3DModel`."""

    time_scale = 1000.0
    batched = (
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "pooled_projections",
        "guidance",
    )
    embedding = "x_embedder.proj"
    rope = "rope"
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    block_counts = ("num_layers", "num_single_layers")
    text_tokens = 256
    feed_forward_names = re.compile(
        r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)|single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
    )
    costs = Costs(
        rows=(
            (r"time_text_embed\.timestep_embedder\..*", "time"),
            (r"transformer_blocks\.\d+\.norm1\.linear|single_transformer_blocks\.\d+\.norm\.linear", "time"),
            (r"(context_embedder\.)?time_text_embed\..*|.*\.norm1_context\.linear|(.*\.)?norm_out\.linear", "sample"),
            (r"context_embedder\..*", "text"),
            (r"transformer_blocks\.\d+\.(attn\.(add_._proj|to_add_out)|ff_context\..*)", "text"),
            (r"x_embedder\.proj|proj_out|transformer_blocks\.\d+\.(attn\.to_(q|k|v|out\.0)|ff\..*)", "image"),
            (r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)", "joint"),
        ),
        attention=(
            (_REFINER + r"\.attn\.to_q", "text", "text"),
            (r"(single_)?transformer_blocks\.\d+\.attn\.to_q", "joint", "joint"),
        ),
    )

    @property
    def given(self) -> bool:
        """Whether the first frame is given rather than drawn."""
        return getattr(self.transformer.config, "image_condition_type", None) == "token_replace"

    def read(self, inputs: Inputs) -> Noisy:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        own, wanted = (config.patch_size_t, config.patch_size), (1, self.patch_size)
        if own != wanted:
            raise UnsupportedCall(f"the model's own patches are {own} in time and width, not {wanted}")
        x = inputs["hidden_states"]
        condition = x[:, :, :1] if self.given else x[:, self.channels :]
        return Noisy(x[:, : self.channels], self.sigma(inputs), condition if condition.shape[1] else None)

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        x = noisy.latents
        if noisy.condition is not None:
            condition = noisy.condition.to(x)
            x = torch.cat([condition, x[:, :, 1:]], dim=2) if self.given else torch.cat([x, condition], dim=1)
        timestep = (noisy.sigma * self.time_scale).to(inputs["timestep"].dtype)
        return {**inputs, "hidden_states": x, "timestep": timestep, "return_dict": False}

    def velocity(self, output: Tensor, size: Sequence[int]) -> Tensor:
        return output

    def output(self, velocity: Tensor, inputs: Inputs) -> Tensor:
        return velocity

    def rotary(self, layout: TokenLayout, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> Any:
        rope: Any = self.transformer.get_submodule("rope")
        axes: Any = layout.video_places(args[0].shape[2], output[0].device).T  # annotated for arrays only
        pairs = zip(rope.rope_dim, axes, strict=True)
        waves = [get_1d_rotary_pos_embed(dim, axis, rope.theta, use_real=True) for dim, axis in pairs]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*waves, strict=True))

    def further_rows(self, inputs: Inputs) -> dict[str, int]:
        return {"time": 2 if self.given else 1}

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        return {
            "hidden_states": torch.zeros(1, config.in_channels, frames, height, width),
            "timestep": torch.full((1,), self.time_scale / 2),
            "encoder_hidden_states": torch.zeros(1, text, config.text_embed_dim),
            "encoder_attention_mask": torch.ones(1, text),
            "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
            "guidance": torch.full((1,), 6000.0) if config.guidance_embeds else None,
        }

    def teacache_signal(self, block: Any, argument: Callable[[str], Any]) -> Tensor:
        hidden, temb = argument("hidden_states"), argument("temb")
        if self.given:
            return block.norm1(hidden, temb, argument("token_replace_emb"), argument("num_tokens"))[0]
        return block.norm1(hidden, emb=temb)[0]

    def teacache_coefficients(self) -> tuple[float, ...] | None:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        if config.num_layers != 20 or config.in_channels != self.channels or self.given:
            return None  # They are text to video's.
        return (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896)


class HunyuanVideo15(HunyuanVideo):
    """`diffusers.HunyuanVideo15Transformer3DModel`: latents at a sixteenth of the size, each a token.

    Behind their channels lie those of a picture and of a mask that says which frame it is; text to video has zeros
    there. Two texts (the second is that of letters to be drawn) and the picture's features make up one context.
    """

    patch_size = 1
    compression = (16, 4)
    batched = (
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_hidden_states_2",
        "encoder_attention_mask_2",
        "image_embeds",
    )
    block_lists = ("transformer_blocks",)
    block_counts = ("num_layers",)
    text_tokens = 1000
    feed_forward_names = re.compile(r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)")
    costs = Costs(
        rows=(
            (r"time_embed\..*|context_embedder\.time_text_embed\..*", "sample"),
            (r"transformer_blocks\.\d+\.norm1(_context)?\.linear|(.*\.)?norm_out\.linear", "sample"),
            (r"context_embedder\..*", "text"),
            (r"context_embedder_2\..*", "letters"),
            (r"image_embedder\..*", "picture"),
            (r"transformer_blocks\.\d+\.(attn\.(add_._proj|to_add_out)|ff_context\..*)", "context"),
            (r"x_embedder\.proj|proj_out|transformer_blocks\.\d+\.(attn\.to_(q|k|v|out\.0)|ff\..*)", "image"),
        ),
        attention=(
            (_REFINER + r"\.attn\.to_q", "text", "text"),
            (r"transformer_blocks\.\d+\.attn\.to_q", "joint", "joint"),
        ),
    )

    def read(self, inputs: Inputs) -> Noisy:
        if inputs.get("timestep_r") is not None:
            raise UnsupportedCall("the model predicts a mean velocity between two noise levels (MeanFlow)")
        return super().read(inputs)

    def further_rows(self, inputs: Inputs) -> dict[str, int]:
        given = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
        text, letters, picture = (inputs[name].shape[1] for name in given)
        context = text + letters + picture
        joint = context + self.tokens(inputs)
        return {"letters": letters, "picture": picture, "context": context, "joint": joint}

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        return {
            "hidden_states": torch.zeros(1, config.in_channels, frames, height, width),
            "timestep": torch.full((1,), self.time_scale / 2),
            "encoder_hidden_states": torch.zeros(1, text, config.text_embed_dim),
            "encoder_attention_mask": torch.ones(1, text),
            "encoder_hidden_states_2": torch.zeros(1, LETTERS, config.text_embed_2_dim),
            "encoder_attention_mask_2": torch.zeros(1, LETTERS),
            "image_embeds": torch.zeros(1, PICTURE, config.image_embed_dim),
        }
