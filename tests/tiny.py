"""Shrunken models and their pipelines: real classes, random weights, milliseconds on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor

from benchmarks.yardstick import components

PROMPT = "a small striped red circle on the left on a sea background"


def embeds(seed: int, tokens: int = 6) -> Tensor:
    """A prompt as told to a pipeline without text encoders ``[1, tokens, 16]``."""
    return torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(seed))


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's, unchanged."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def transformer(seed: int = 0, **overrides) -> FluxTransformer2DModel:
    """1 + 1 blocks, 2 heads of 16; the output layer is scaled so that velocities are of order one."""
    torch.manual_seed(seed)
    settings = dict(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxTransformer2DModel(**{**settings, **overrides}).eval()  # type: ignore[arg-type]


def vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
        block_out_channels=(8, 8),  # type: ignore[arg-type]
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    ).eval()


def parts(seed: int = 0, **overrides) -> dict:
    """Components of any FLUX pipeline."""
    clip, t5 = components.make_text_encoders(width=32)
    tokenizer = components.make_tokenizer()
    return dict(
        scheduler=scheduler(),
        vae=vae(seed),
        text_encoder=clip.eval(),
        tokenizer=tokenizer,
        text_encoder_2=t5.eval(),
        tokenizer_2=tokenizer,
        transformer=transformer(seed, **overrides),
    )


def pipeline(cls: type = FluxPipeline, seed: int = 0, **overrides):
    """A FLUX pipeline of any class; pictures of 32 x 32 have 8 x 8 tokens."""
    torch.manual_seed(seed)
    pipe = cls(**parts(seed, **overrides))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, *, seed: int = 0, steps: int = 8, size=(32, 32), prompt: str | list[str] = PROMPT, **kwargs):
    """Latents (packed) of one run from a seeded generator."""
    generator = torch.Generator().manual_seed(seed)
    settings = dict(height=size[0], width=size[1], num_inference_steps=steps, max_sequence_length=20)
    return pipe(prompt, generator=generator, **{"output_type": "latent", **settings, **kwargs}).images


class Table:
    """A policy from a list of scales per sample."""

    def __init__(self, *samples: list[int]):
        self.samples = samples
        self.scales = tuple(sorted({1, *(scale for sample in samples for scale in sample)}))

    def choose(self, context):
        return [sample[min(context.step, len(sample) - 1)] for sample in self.samples]


WAN = dict(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
    rope_max_seq_len=64,
)
"""2 blocks, 2 heads of 12: settings of Wan's transformer and its relatives."""


def wan_transformer(seed: int = 0, **overrides) -> WanTransformer3DModel:
    """The output layer is scaled as that of the FLUX above."""
    torch.manual_seed(seed)
    return WanTransformer3DModel(**{**WAN, **overrides}).eval()  # type: ignore[arg-type]


def wan_vae(seed: int = 0) -> AutoencoderKLWan:
    """Latents of 4 channels: an eighth of the height and width, a quarter of the frames but for the first."""
    torch.manual_seed(seed)
    settings = dict(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scaling = dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return AutoencoderKLWan(**settings, **scaling).eval()  # type: ignore[arg-type]


def unipc() -> UniPCMultistepScheduler:
    """Wan's sampler."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def wan_pipeline(cls: type = WanPipeline, scheduler: type = UniPCMultistepScheduler, *, two: bool = False, **overrides):
    """A pipeline of Wan without text encoder; with ``two`` as Wan 2.2 A14B, of two transformers."""
    conditioned = cls is WanImageToVideoPipeline and not overrides.get("expand_timesteps")
    channels = {"in_channels": 4 + 4 + 4} if conditioned else {}
    made: Any = scheduler
    parts = dict(
        scheduler=unipc() if scheduler is UniPCMultistepScheduler else made(shift=3.0),
        vae=wan_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=wan_transformer(**channels),
    )
    if two:
        parts.update(transformer_2=wan_transformer(1, **channels), boundary_ratio=0.7)
    if cls is WanImageToVideoPipeline:
        parts.update(image_encoder=None, image_processor=None)
    pipe = cls(**{**parts, **overrides})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def qwen_pipeline():
    """Qwen-Image without text encoder; its autoencoder is not made either."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    parts: Any = dict(scheduler=scheduler(), vae=None, text_encoder=None, tokenizer=None)
    pipe = QwenImagePipeline(transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
