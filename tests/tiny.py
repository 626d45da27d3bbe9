"""A shrunken FLUX and its pipeline: real classes, random weights, milliseconds on a CPU."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

from ddit.embedded import components

PROMPT = "a small striped red circle on the left on a smooth background"


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
        scheduler=components.make_scheduler(),
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
