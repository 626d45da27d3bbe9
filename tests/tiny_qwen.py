"""Shrunken pipelines around Qwen-Image: those with reference images, layers or a ControlNet."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageLayeredPipeline,
    QwenImageMultiControlNetModel,
    QwenImageTransformer2DModel,
)
from PIL import Image
from torch import Tensor, nn

import tiny

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
SQUARE = PICTURE.resize((64, 64))
MASK = Image.fromarray(np.pad(np.full((32, 48), 255, dtype=np.uint8), ((16, 16), (24, 24))))


TEXT = dict(
    prompt_embeds=tiny.embeds(1),
    prompt_embeds_mask=torch.ones(1, 6, dtype=torch.long),
    negative_prompt_embeds=tiny.embeds(2),
    negative_prompt_embeds_mask=torch.ones(1, 6, dtype=torch.long),
    true_cfg_scale=3.0,
)


class Means:
    """Stands for an autoencoder: a latent pixel is the mean of a square."""

    dtype = torch.float32
    config = SimpleNamespace(z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    temperal_downsample = (False,) * 3

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def encode(self, image: Tensor) -> SimpleNamespace:
        """Latents ``[B, 4, 1, H, W]`` of a picture ``[B, 3 or 4, 1, H, W]``."""
        means = F.avg_pool2d(image[:, :, 0], self.factor)
        return SimpleNamespace(latents=torch.cat([means, means], dim=1)[:, :4, None])

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (latents,)


class Layered(QwenImageLayeredPipeline):
    """With latents as output, at which that of diffusers fails."""

    def __call__(self, **settings: Any) -> tuple[Tensor]:
        seen: dict[str, Tensor] = {}
        settings.update(output_type="pt", callback_on_step_end=lambda pipe, i, t, given: seen.update(given) or {})
        super().__call__(**settings)
        return (seen["latents"],)


def made(cls: type, factor: int, transformer: Any = None, **parts: Any):
    """A pipeline that takes ``factor`` pixels for one of its latents: some choose their own, large sizes."""
    transformer = transformer or tiny.qwen_pipeline().transformer
    given = dict(scheduler=tiny.scheduler(), vae=Means(factor), text_encoder=None, tokenizer=None)
    pipe = cls(transformer=transformer, **{**given, **parts})
    pipe.vae_scale_factor = factor
    pipe.set_progress_bar_config(disable=True)
    return pipe


def transformer(**overrides: Any) -> QwenImageTransformer2DModel:
    """That of `tiny.qwen_pipeline` with other settings."""
    config: Any = tiny.qwen_pipeline().transformer.config
    torch.manual_seed(0)
    return QwenImageTransformer2DModel.from_config(config, **overrides).eval()


class Spoken:
    """Stands for a processor: the system's prompt has three tokens."""

    tokenizer = SimpleNamespace(encode=lambda text: [7])

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0, 1, 2]]


class Seen(QwenImage21Pipeline):
    """Reads prompts of 6 tokens; a reference image has 4 x 4 latents, hence a place of 4 among them."""

    def encode_prompt(self, prompt: Any, image: Any = None, prompt_embeds: Any = None, **settings: Any) -> Any:
        mask = torch.zeros(1, 6, dtype=torch.bool)
        mask[0, 1:5] = image is not None
        prompt_embeds = prompt_embeds.repeat_interleave(settings["num_images_per_prompt"], dim=0)
        return prompt_embeds, None, mask


def version21(**overrides: Any):
    """Pictures of 128 x 192 pixels have 8 x 12 tokens."""
    torch.manual_seed(0)
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
        **overrides,
    ).eval()
    parts: Any = dict(scheduler=tiny.scheduler(), vae=Means(16), text_encoder=None, processor=Spoken())
    pipe = Seen(transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit(cls: type = QwenImageEditPipeline):
    """A megapixel has 8 x 8 latents."""
    return made(cls, 128, processor=None)


def edit_plus():
    """As the newer checkpoints: tokens of reference images have a noise level of their own, zero."""
    return made(QwenImageEditPlusPipeline, 128, transformer(zero_cond_t=True), processor=None)


def layered():
    """Pictures of 640 x 640 have 8 x 8 latents."""
    model = transformer(use_layer3d_rope=True, use_additional_t_cond=True)
    return made(Layered, 80, model, processor=None, text_encoder=Means(1))  # asked for its dtype alone


def controlnet(seed: int = 0) -> QwenImageControlNetModel:
    """One block, whose zero layers are none."""
    known = inspect.signature(QwenImageControlNetModel).parameters
    config = {k: v for k, v in transformer(num_layers=1).config.items() if k in known}
    torch.manual_seed(seed)
    net = QwenImageControlNetModel.from_config(config)
    for layer in (net.controlnet_x_embedder, *net.controlnet_blocks):
        nn.init.normal_(layer.weight, std=0.2)
    return net.eval()


def with_controlnet(union: bool = False):
    net = controlnet()
    return made(QwenImageControlNetPipeline, 8, controlnet=QwenImageMultiControlNetModel([net]) if union else net)


EMBEDS = {k: v for k, v in TEXT.items() if not k.endswith("mask")}
CASES: dict[str, dict[str, Any]] = {
    "qwen-image-2.1": dict(make=version21, call=dict(EMBEDS, height=128, width=192, use_kv_cache=False), passes=2),
    "qwen-image-edit": dict(make=edit, call=dict(TEXT, image=SQUARE, height=1024, width=1536), passes=2),
    "qwen-image-edit-plus": dict(
        make=edit_plus, call=dict(TEXT, image=[SQUARE, SQUARE], height=1024, width=1536), passes=2
    ),
    "qwen-image-layered": dict(make=layered, call=dict(TEXT, prompt="a", image=SQUARE, layers=2), passes=2),
    "qwen-image-controlnet": dict(
        make=with_controlnet, call=dict(TEXT, control_image=PICTURE, height=64, width=96), passes=2
    ),
}
"""For test_architectures."""
