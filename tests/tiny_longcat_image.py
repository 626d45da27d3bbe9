"""A shrunken LongCat-Image without autoencoder; prompts are told apart by their lengths."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImagePipeline, LongCatImageTransformer2DModel
from torch import Tensor

import tiny
from tiny_sd3 import embeds


def transformer(**overrides: Any) -> LongCatImageTransformer2DModel:
    """2 blocks of each kind, 2 heads of 16; the pipeline makes latents of 16 channels."""
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    return LongCatImageTransformer2DModel(**{**settings, **overrides}).eval()


class Told(LongCatImagePipeline):
    """The pipeline takes no embeddings in place of a prompt."""

    def _encode_prompt(self, prompt: list[str]) -> Tensor:
        return torch.cat([embeds(len(words), 6) for words in prompt]).to(self.transformer.dtype)


def pipeline() -> Any:
    """Pictures of 128 x 192 pixels have 8 x 12 tokens."""
    parts: Any = dict(text_encoder=None, tokenizer=None, text_processor=None, vae=None)
    pipe = Told(transformer=transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALL: dict[str, Any] = dict(prompt=tiny.PROMPT, height=128, width=192, enable_prompt_rewrite=False)
CASES: dict[str, dict[str, Any]] = {
    "longcat-image": dict(make=pipeline, call={**CALL, "enable_cfg_renorm": False}, passes=2),
    "longcat-image-renormed": dict(make=pipeline, call=CALL, passes=2),
}
"""For test_architectures."""
