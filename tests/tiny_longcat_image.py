"""A shrunken LongCat-Image without text encoder; prompts are told apart by their lengths."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
)
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from PIL import Image
from torch import Tensor

import tiny
from tiny import embeds


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


class Told:
    """The pipelines take no embeddings in place of a prompt."""

    transformer: Any

    def _encode_prompt(self, prompt: list[str], image: Any = None) -> Tensor:
        return torch.cat([embeds(len(words), 6) for words in prompt]).to(self.transformer.dtype)


class ToldText(Told, LongCatImagePipeline):
    pass


class ToldEdit(Told, LongCatImageEditPipeline):
    """Edit chooses sizes of a megapixel: here of 128 x 192 pixels."""

    def __call__(self, **call: Any) -> Any:
        with patch.object(pipeline_longcat_image_edit, "calculate_dimensions", lambda *_: (192, 128)):
            return super().__call__(**call)


class Processor:
    image_processor = None


def vae() -> AutoencoderKL:
    """Latents of 16 channels, an eighth of the height and width."""
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    return AutoencoderKL(**settings).eval()


def pipeline(cls: Any = ToldText) -> Any:
    """Pictures of 128 x 192 pixels have 8 x 12 tokens."""
    parts: Any = dict(text_encoder=None, tokenizer=None, text_processor=Processor(), vae=vae())
    pipe = cls(transformer=transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 192, 3), dtype=np.uint8))
CALL: dict[str, Any] = dict(prompt=tiny.PROMPT, height=128, width=192, enable_prompt_rewrite=False)
CASES: dict[str, dict[str, Any]] = {
    "longcat-image": dict(make=pipeline, call={**CALL, "enable_cfg_renorm": False}, passes=2),
    "longcat-image-renormed": dict(make=pipeline, call=CALL, passes=2),
    "longcat-image-edit": dict(
        make=lambda: pipeline(ToldEdit), call=dict(prompt=tiny.PROMPT, negative_prompt="", image=PICTURE), passes=2
    ),
}
"""For test_architectures."""
