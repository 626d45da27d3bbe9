"""A shrunken Z-Image without text encoder, with and without guidance, and with a ControlNet."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from torch import Tensor, nn

import tiny

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 96, 3), dtype=np.uint8))


def transformer(**overrides: Any) -> ZImageTransformer2DModel:
    """A block of each kind, 2 heads of 16; what fills up sequences is not zero."""
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 64, 64],
    )
    model: Any = ZImageTransformer2DModel(**{**settings, **overrides})
    for token in (model.x_pad_token, model.cap_pad_token):
        nn.init.normal_(token)
    return model.eval()


def pipeline(cls: type = ZImagePipeline, **parts: Any):
    """Pictures have twice as many pixels in a row as latents."""
    given: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "vae": tiny.vae(), "transformer": transformer()}
    pipe = cls(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **{**given, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def controlnet(**overrides: Any) -> ZImageControlNetModel:
    """A control block, whose zero layers are none."""
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=4)
    sizes: dict[str, Any] = dict(dim=32, n_refiner_layers=1, n_heads=2, n_kv_heads=2)
    net: Any = ZImageControlNetModel(**{**settings, **sizes, **overrides})
    for layer in (net.control_layers[0].before_proj, *(block.after_proj for block in net.control_layers)):
        nn.init.normal_(layer.weight, std=0.2)
    return net.eval()


def with_controlnet(cls: type = ZImageControlNetPipeline, **overrides: Any):
    return pipeline(cls, controlnet=controlnet(**overrides))


def embeds(seed: int, tokens: int = 6) -> list[Tensor]:
    return [torch.randn(tokens, 16, generator=torch.Generator().manual_seed(seed))]


CALL: dict[str, Any] = dict(height=32, width=96, prompt_embeds=embeds(1), negative_prompt_embeds=embeds(2))
"""192 tokens; the 48 at 2p and the 12 at 4p are filled up to 64 and 32."""
CASES: dict[str, dict[str, Any]] = {
    "z-image": dict(make=pipeline, call=CALL, rows=2, fill=32),
    "z-image-turbo": dict(make=pipeline, call={**CALL, "guidance_scale": 0.0}, fill=32),
}
