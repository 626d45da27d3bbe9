"""Shrunken modular pipelines of diffusers, called as others are."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.modular_pipelines import FluxAutoBlocks
from torch import Tensor

import tiny
import tiny_z_image


def called_as_others(pipe: Any) -> Any:
    """It gives its latents in a tuple, whatever is asked for (`ddit.pipelines.modular` has one that gives pictures)."""

    class Called(type(pipe)):
        def __call__(self, *, output_type: str = "", return_dict: bool = False, **call: Any) -> tuple[Tensor]:
            return (super().__call__(output="latents", **call),)

    pipe.__class__ = Called
    return pipe


def flux(*, called: bool = True):
    pipe = FluxAutoBlocks().init_pipeline()
    pipe.update_components(**tiny.parts())
    return called_as_others(pipe) if called else pipe


def z_image():
    from diffusers.modular_pipelines.z_image.modular_blocks_z_image import ZImageCoreDenoiseStep

    pipe = ZImageCoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=tiny_z_image.transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    return called_as_others(pipe)


def flux3_transformer(**overrides: Any):
    """2 blocks of each mode, then 2 joint ones."""
    from diffusers import Flux3Transformer2DModel

    torch.manual_seed(0)
    settings = dict(
        in_channels=16,
        cond_in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return Flux3Transformer2DModel(**{**settings, **overrides}).eval()


def flux3():
    from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3AutoCoreDenoiseStep

    pipe = Flux3AutoCoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=flux3_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    return called_as_others(pipe)


EMBEDS = dict(prompt_embeds=tiny.embeds(1), negative_prompt_embeds=tiny.embeds(2, 5), height=128, width=192)
"""Pictures of 8 x 12 tokens; the two prompts differ in length."""
REFERENCES = [torch.randn(1, 16, 4, size, generator=torch.Generator().manual_seed(3)) for size in (4, 6)]

CASES: dict[str, dict[str, Any]] = {
    "flux-modular": dict(make=flux, call=dict(prompt=tiny.PROMPT, height=32, width=48, max_sequence_length=20)),
    "z-image-modular": dict(
        make=z_image, call=dict(height=128, width=192, prompt_embeds=tiny_z_image.embeds(1)), fill=32
    ),
}
"""For test_architectures."""
HAS_FLUX3 = hasattr(diffusers, "Flux3Transformer2DModel")  # from diffusers 0.42 on
if HAS_FLUX3:
    CASES["flux3"] = dict(make=flux3, call=EMBEDS, passes=2)
    CASES["flux3-reference"] = dict(make=flux3, call={**EMBEDS, "image_cond_latents": REFERENCES}, passes=2)
