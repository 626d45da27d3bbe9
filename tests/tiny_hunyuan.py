"""HunyuanVideo and 1.5, shrunken, and their pipelines: real classes, random weights, no text encoders."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from torch import Tensor
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from tiny import embeds
from tiny_video import film


def transformer(**overrides: Any) -> HunyuanVideoTransformer3DModel:
    """1 + 2 blocks, 2 heads of 16, latents of 4 channels."""
    torch.manual_seed(0)
    settings: Any = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    return HunyuanVideoTransformer3DModel(**{**settings, **overrides}).eval()


def vae() -> AutoencoderKLHunyuanVideo:
    """An eighth of the height and width, a quarter of the frames but for the first."""
    torch.manual_seed(0)
    settings: Any = dict(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    return AutoencoderKLHunyuanVideo(**settings).eval()


def pipeline(cls: Any = HunyuanVideoPipeline, *, parts: tuple[str, ...] = (), **overrides: Any) -> Any:
    """A pipeline with a transformer of these settings; ``parts`` are those that it has beside the usual ones."""
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", *parts)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = cls(**dict.fromkeys(names), vae=vae(), scheduler=scheduler, transformer=transformer(**overrides))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_to_video(**overrides: Any) -> Any:
    return pipeline(HunyuanVideoImageToVideoPipeline, parts=("image_processor",), **overrides)


def transformer_15(**overrides: Any) -> HunyuanVideo15Transformer3DModel:
    """2 blocks, 2 heads of 16, latents of 4 channels, 4 more of a picture and a mask."""
    torch.manual_seed(0)
    settings: Any = dict(
        in_channels=4 + 4 + 1,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        target_size=128,
    )
    return HunyuanVideo15Transformer3DModel(**{**settings, **overrides}).eval()


def vae_15() -> AutoencoderKLHunyuanVideo15:
    """A sixteenth of the height and width, a quarter of the frames but for the first."""
    torch.manual_seed(0)
    return AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1).eval()  # type: ignore[arg-type]


def pipeline_15(cls: Any = HunyuanVideo15Pipeline, **parts: Any) -> Any:
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    models = dict(vae=vae_15(), transformer=transformer_15(), scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0))
    guider = ClassifierFreeGuidance(guidance_scale=3.0)
    pipe = cls(**{**dict.fromkeys(names), **models, "guider": guider, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_to_video_15(**overrides: Any) -> Any:
    """The picture has 4 features."""
    torch.manual_seed(0)
    sizes: Any = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    encoder = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=8)).eval()
    features = SiglipImageProcessor(size={"height": 16, "width": 16})
    parts: Any = dict(image_encoder=encoder, feature_extractor=features, transformer=transformer_15(**overrides))
    return pipeline_15(HunyuanVideo15ImageToVideoPipeline, **parts)


def pooled(seed: int) -> Tensor:
    return embeds(seed)[:, 0]


CLIP: dict[str, Any] = dict(
    height=64,
    width=96,
    num_frames=9,
    prompt_embeds=embeds(1),
    pooled_prompt_embeds=pooled(3),
    prompt_attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]),
)
NEGATIVE: dict[str, Any] = dict(
    negative_prompt_embeds=embeds(2),
    negative_pooled_prompt_embeds=pooled(4),
    negative_prompt_attention_mask=torch.ones(1, 6, dtype=torch.long),
    true_cfg_scale=3.0,
)
PICTURE = film(1)[0]
CLIP_15: dict[str, Any] = dict(
    num_frames=9,
    prompt_embeds=embeds(1),
    prompt_embeds_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]),
    prompt_embeds_2=embeds(3, 4),
    prompt_embeds_mask_2=torch.tensor([[1, 1, 0, 0]]),
    negative_prompt_embeds=embeds(2),
    negative_prompt_embeds_mask=torch.tensor([[1, 0, 0, 0, 0, 0]]),
    negative_prompt_embeds_2=embeds(4, 4),
    negative_prompt_embeds_mask_2=torch.zeros(1, 4, dtype=torch.long),
)
IMAGE = {**CLIP, "image": PICTURE}

CASES: dict[str, dict[str, Any]] = {
    "hunyuan-video": dict(make=pipeline, call=CLIP),
    "hunyuan-video-true-cfg": dict(make=pipeline, call={**CLIP, **NEGATIVE}, passes=2),
    "hunyuan-video-image": dict(
        make=lambda: image_to_video(in_channels=9, image_condition_type="latent_concat", guidance_embeds=False),
        call=IMAGE,
    ),
    "hunyuan-video-replaced": dict(
        make=lambda: image_to_video(image_condition_type="token_replace"), call={**IMAGE, **NEGATIVE}, passes=2
    ),
    "hunyuan-video-skyreels": dict(
        make=lambda: pipeline(HunyuanSkyreelsImageToVideoPipeline, in_channels=8), call=IMAGE
    ),
    "hunyuan-video-1.5": dict(make=pipeline_15, call={**CLIP_15, "height": 128, "width": 192}, passes=2),
    "hunyuan-video-1.5-image": dict(make=image_to_video_15, call={**CLIP_15, "image": PICTURE}, passes=2),
}
"""As arguments of `test_architectures.Case`."""
