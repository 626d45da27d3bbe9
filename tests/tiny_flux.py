"""Shrunken pipelines around FLUX.1: those with a condition, reference images, a ControlNet or pictures as prompts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxMultiControlNetModel,
)
from PIL import Image
from torch import Tensor, nn

import tiny

SIZE = dict(height=32, width=48)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))
MASK = Image.fromarray(np.pad(np.full((16, 24), 255, dtype=np.uint8), ((8, 8), (12, 12))))
TEXT = dict(prompt=tiny.PROMPT, max_sequence_length=20)
KONTEXT = dict(image=PICTURE, max_area=32 * 48, _auto_resize=False)
"""Of these sizes, as Kontext otherwise chooses its own around a megapixel."""

CONDITION = {"control": 32, "fill": 48}
"""Features of a token of 16 with those of a condition: latents, for Fill also a mask of 2 x 2 pixels to one."""


def control(cls: type = FluxControlPipeline):
    return tiny.pipeline(cls, in_channels=CONDITION["control"], out_channels=16)


def fill():
    return tiny.pipeline(FluxFillPipeline, in_channels=CONDITION["fill"], out_channels=16)


def kontext(cls: type = FluxKontextPipeline):
    return tiny.pipeline(cls)


def controlnet(seed: int = 0) -> FluxControlNetModel:
    """One block of each kind, whose zero layers are none."""
    torch.manual_seed(seed)
    settings = {k: v for k, v in tiny.transformer().config.items() if not k.startswith("_") and k != "out_channels"}
    net = FluxControlNetModel(**settings)
    for layer in (net.controlnet_x_embedder, *net.controlnet_blocks, *net.controlnet_single_blocks):
        nn.init.normal_(layer.weight, std=0.2)
    return net.eval()


def with_controlnet(cls: type = FluxControlNetPipeline, *, nets: int = 1, **overrides: Any):
    """A transformer of 2 + 3 blocks, for which residuals of one block each are repeated."""
    made = [controlnet(seed) for seed in range(nets)]
    net = made[0] if nets == 1 else FluxMultiControlNetModel(made)
    pipe = cls(**tiny.parts(num_layers=2, num_single_layers=3, **overrides), controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def chroma(cls: type = ChromaPipeline):
    """As the FLUX above, but 2 + 2 blocks: of one, a cache of each kind alone would find nothing to leave out."""
    torch.manual_seed(0)
    same = ("patch_size", "in_channels", "num_layers", "num_single_layers", "attention_head_dim")
    same = (*same, "num_attention_heads", "joint_attention_dim", "axes_dims_rope")
    config: Any = tiny.transformer(num_layers=2, num_single_layers=2).config
    transformer = ChromaTransformer2DModel(
        **{name: config[name] for name in same},
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
    ).eval()
    parts = tiny.parts()
    names = {"text_encoder": "text_encoder_2", "tokenizer": "tokenizer_2", "scheduler": "scheduler", "vae": "vae"}
    pipe = cls(**{name: parts[theirs] for name, theirs in names.items()}, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Means(nn.Module):
    """Stands for FLUX.2's autoencoder: a latent pixel is the mean of 8 x 8 pixels."""

    dtype, device = torch.float32, torch.device("cpu")
    config = SimpleNamespace(block_out_channels=(1,) * 4, batch_norm_eps=0.0, latent_channels=4)
    bn = SimpleNamespace(running_mean=torch.zeros(16), running_var=torch.ones(16))

    def encode(self, image: Tensor) -> SimpleNamespace:
        means = F.avg_pool2d(image, 8)
        return SimpleNamespace(latents=torch.cat([means, means[:, :1]], dim=1))


def flux2(cls: type = Flux2Pipeline, **overrides: Any):
    """2 + 2 blocks, as Chroma; pictures of 128 x 192 pixels have 8 x 12 tokens."""
    torch.manual_seed(0)
    settings = dict(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=cls is Flux2Pipeline,
    )
    transformer = Flux2Transformer2DModel(**{**settings, **overrides}).eval()
    parts: Any = dict(scheduler=tiny.scheduler(), vae=Means(), text_encoder=None, tokenizer=None)
    pipe = cls(transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


EMBEDS = dict(prompt_embeds=tiny.embeds(1), height=128, width=192)
LARGE = PICTURE.resize((64, 96))

CASES: dict[str, dict[str, Any]] = {
    "chroma": dict(make=chroma, call={**TEXT, **SIZE, "guidance_scale": 3.0}, passes=2),
    "flux2": dict(make=flux2, call=EMBEDS),
    "flux2-reference": dict(make=flux2, call={**EMBEDS, "image": [LARGE, LARGE]}),
    "flux-kontext": dict(make=kontext, call={**TEXT, **SIZE, **KONTEXT}),
    "flux-fill": dict(make=fill, call={**TEXT, **SIZE, "image": PICTURE, "mask_image": MASK}),
    "flux-control": dict(make=control, call={**TEXT, **SIZE, "control_image": PICTURE}),
    "flux-controlnet": dict(make=with_controlnet, call={**TEXT, **SIZE, "control_image": PICTURE}),
}
"""For test_architectures."""
