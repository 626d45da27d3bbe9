"""A shrunken LTX-Video and its pipelines: real classes, random weights, no text encoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from tiny import embeds
from tiny_video import film


def transformer(**overrides: Any) -> LTXVideoTransformer3DModel:
    """2 blocks, 2 heads of 16, latents of 4 channels."""
    torch.manual_seed(0)
    settings: Any = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    )
    return LTXVideoTransformer3DModel(**{**settings, **overrides}).eval()


def vae() -> AutoencoderKLLTXVideo:
    """A thirty-second of the height and width, an eighth of the frames but for the first."""
    torch.manual_seed(0)
    channels, layers = (8,) * 4, (1,) * 5
    settings: Any = dict(
        latent_channels=4,
        block_out_channels=channels,
        decoder_block_out_channels=channels,
        layers_per_block=layers,
        decoder_layers_per_block=layers,
    )
    return AutoencoderKLLTXVideo(**settings).eval()


def pipeline(cls: Any = LTXPipeline, *, shifting: bool = True) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shifting, base_shift=0.95, max_shift=2.05)
    pipe = cls(scheduler=scheduler, vae=vae(), text_encoder=None, tokenizer=None, transformer=transformer())
    pipe.set_progress_bar_config(disable=True)
    return pipe


CLIP: dict[str, Any] = dict(
    height=256,
    width=384,
    num_frames=17,
    prompt_embeds=embeds(1),
    prompt_attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]),
    negative_prompt_embeds=embeds(2),
    negative_prompt_attention_mask=torch.tensor([[1, 0, 0, 0, 0, 0]]),
)
IMAGE = {**CLIP, "image": film(1)[0]}

CASES: dict[str, dict[str, Any]] = {
    "ltx": dict(make=pipeline, call=CLIP, rows=2),
    "ltx-image": dict(make=lambda: pipeline(LTXImageToVideoPipeline), call=IMAGE, rows=2),
    "ltx-image-without-guidance": dict(
        make=lambda: pipeline(LTXImageToVideoPipeline), call={**IMAGE, "guidance_scale": 1.0}
    ),
}
"""As arguments of `test_architectures.Case`."""
