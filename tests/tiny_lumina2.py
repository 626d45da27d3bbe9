"""A shrunken Lumina 2 without text encoder and autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from tiny import embeds


def transformer(**overrides: Any) -> Lumina2Transformer2DModel:
    """A block of each kind, 2 heads of 16 on one of keys and values."""
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        sample_size=16,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 32, 32),
        cap_feat_dim=16,
    )
    return Lumina2Transformer2DModel(**{**settings, **overrides}).eval()


def pipeline(**overrides: Any):
    """Pictures of 128 x 192 pixels have 8 x 12 tokens."""
    parts: Any = dict(text_encoder=None, tokenizer=None, vae=None)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = Lumina2Pipeline(transformer=transformer(**overrides), scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALL: dict[str, Any] = dict(
    height=128,
    width=192,
    prompt_embeds=embeds(1, 6),
    negative_prompt_embeds=embeds(2, 6),
    prompt_attention_mask=torch.ones(1, 6, dtype=torch.long),
    negative_prompt_attention_mask=torch.ones(1, 6, dtype=torch.long),
)
CASES: dict[str, dict[str, Any]] = {
    "lumina2": dict(make=pipeline, call=CALL, passes=2),
    "lumina2-without-guidance": dict(make=pipeline, call={**CALL, "guidance_scale": 1.0}),
}
