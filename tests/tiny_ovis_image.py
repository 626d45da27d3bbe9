"""A shrunken Ovis-Image without text encoder and autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, OvisImagePipeline, OvisImageTransformer2DModel

from tiny import embeds


def transformer(**overrides: Any) -> OvisImageTransformer2DModel:
    """2 blocks of each kind, 2 heads of 16."""
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    return OvisImageTransformer2DModel(**{**settings, **overrides}).eval()


def pipeline() -> Any:
    """Pictures of 128 x 192 pixels have 8 x 12 tokens."""
    parts: Any = dict(text_encoder=None, tokenizer=None, vae=None)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = OvisImagePipeline(transformer=transformer(), scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALL: dict[str, Any] = dict(
    height=128,
    width=192,
    prompt_embeds=embeds(1, 6),
    negative_prompt=None,
    negative_prompt_embeds=embeds(2, 6),
)
CASES: dict[str, dict[str, Any]] = {"ovis-image": dict(make=pipeline, call=CALL, passes=2)}
"""For test_architectures."""
