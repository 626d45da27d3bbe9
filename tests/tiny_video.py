"""Shrunken video models and their pipelines: real classes, random weights, no text encoders."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import tiny


def film(seed: int, count: int = 9, size: tuple[int, int] = (64, 96)) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 255, (count, *size, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


def pipeline(cls: Any, transformer: Any, **parts: Any) -> Any:
    """A pipeline of Wan's parts without text encoder."""
    pipe = cls(
        **{**dict(tokenizer=None, text_encoder=None, vae=tiny.wan_vae(), scheduler=tiny.unipc()), **parts},
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip() -> dict[str, Any]:
    """An image encoder: 5 tokens of 16 features."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    encoder = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8)).eval()  # type: ignore[arg-type]
    square = {"height": 16, "width": 16}
    return dict(image_encoder=encoder, image_processor=CLIPImageProcessor(size=square, crop_size=square))


def vace(seed: int = 0) -> WanVACETransformer3DModel:
    """Control latents have 2 x 4 channels and a mask of 8 x 8."""
    torch.manual_seed(seed)
    return WanVACETransformer3DModel(**tiny.WAN, vace_layers=[0], vace_in_channels=8 + 64).eval()  # type: ignore[arg-type]


def animate(**overrides: Any) -> WanAnimateTransformer3DModel:
    torch.manual_seed(0)
    face = dict(
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    settings: Any = {**tiny.WAN, **face, "in_channels": 12, "latent_channels": 4, "image_dim": 16, **overrides}
    return WanAnimateTransformer3DModel(**settings).eval()


def skyreels(**overrides: Any) -> SkyReelsV2Transformer3DModel:
    torch.manual_seed(0)
    settings: Any = {**tiny.WAN, **overrides}
    return SkyReelsV2Transformer3DModel(**settings).eval()


CLIP = dict(height=64, width=96, num_frames=9, prompt_embeds=tiny.embeds(1), negative_prompt_embeds=tiny.embeds(2))
MASK = [Image.fromarray(np.full((64, 96), value, dtype=np.uint8)) for value in [0] * 4 + [255] * 5]
POSED = {name: value for name, value in CLIP.items() if name != "num_frames"}

CASES: dict[str, dict[str, Any]] = {
    "wan-vace": dict(
        make=lambda: pipeline(WanVACEPipeline, vace()),
        call={**CLIP, "video": film(1), "mask": MASK, "reference_images": [film(2, 1)[0]]},
        passes=2,
    ),
    "wan-first-last-frame": dict(
        make=lambda: tiny.wan_pipeline(WanImageToVideoPipeline),
        call={**CLIP, "image": film(1)[0], "last_image": film(2)[0]},
        passes=2,
    ),
    "wan-animate": dict(
        make=lambda: pipeline(WanAnimatePipeline, animate(), **clip()),
        call={
            **POSED,
            "image": film(1)[0],
            "pose_video": film(2),
            "face_video": film(3, size=(16, 16)),
            "segment_frame_length": 9,
            "guidance_scale": 3.0,
        },
        passes=2,
    ),
    "skyreels-v2": dict(make=lambda: pipeline(SkyReelsV2Pipeline, skyreels()), call=CLIP, passes=2),
    "skyreels-v2-image": dict(
        make=lambda: pipeline(SkyReelsV2ImageToVideoPipeline, skyreels(in_channels=12, image_dim=16), **clip()),
        call={**CLIP, "image": film(1)[0]},
        passes=2,
    ),
    "skyreels-v2-forcing": dict(
        make=lambda: pipeline(SkyReelsV2DiffusionForcingPipeline, skyreels(inject_sample_info=True)),
        call={**CLIP, "prompt": None},
        passes=2,
    ),
}
"""As arguments of `test_architectures.Case`."""
