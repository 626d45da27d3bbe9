"""A shrunken Stable Diffusion 3.5 without text encoders and autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from tiny import embeds


def transformer(**overrides) -> SD3Transformer2DModel:
    """2 blocks, the first with a second attention, 2 heads of 16; the table of positions has 16 x 16."""
    torch.manual_seed(0)
    settings = dict(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return SD3Transformer2DModel(**{**settings, **overrides}).eval()  # type: ignore[arg-type]


def pipeline(cls: type = StableDiffusion3Pipeline, **parts):
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3", "vae")
    settings: dict[str, Any] = {**dict.fromkeys(names), "transformer": transformer(), **parts}
    pipe = cls(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALL: dict[str, Any] = dict(
    height=128,
    width=192,
    prompt_embeds=embeds(1),
    negative_prompt_embeds=embeds(2),
    pooled_prompt_embeds=embeds(3, 1)[:, 0],
    negative_pooled_prompt_embeds=embeds(4, 1)[:, 0],
)
CASES: dict[str, dict[str, Any]] = {
    "sd3": dict(make=pipeline, call=CALL, rows=2),
    "sd3-without-guidance": dict(make=pipeline, call={**CALL, "guidance_scale": 1.0}),
    "sd3-skip-layers": dict(
        make=pipeline,
        call={**CALL, "skip_guidance_layers": [0], "skip_layer_guidance_start": -1, "skip_layer_guidance_stop": 1},
        passes=2,
        rows=2,
    ),
}
