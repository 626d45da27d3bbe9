"""The parts of the embedded video model: real diffusers and transformers classes in the layout of Wan 2.1."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from ddit.embedded import components
from ddit.embedded.video.clips import vocabulary

TEXT_TOKENS = 16
"""Length that prompts are padded to; the longest prompt of the grammar has 12 words and an end mark."""
TEXT_WIDTH = 128
CHANNELS = 16
"""Of the latents."""


def make_vae() -> AutoencoderKLWan:
    """Latents of 16 channels: a quarter of the height and width, half of the frames but for the first.

    Pixels in patches and shortcuts around the resampling, as in Wan 2.2's autoencoder: it learns in half the time that
    one like Wan 2.1's takes.
    """
    vae = AutoencoderKLWan(
        base_dim=32,
        z_dim=CHANNELS,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=4,
        scale_factor_temporal=2,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    convolutions = [m for m in vae.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    for convolution in convolutions:  # PyTorch's own start shrinks what passes, and learning takes longer.
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="linear")
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    with torch.no_grad():  # Else the posterior starts with as much noise as latents, and layout alone is learnt.
        vae.quant_conv.bias[CHANNELS:] = -4.0  # type: ignore[index]
        vae.quant_conv.weight[CHANNELS:] *= 0.1
    return vae


def make_transformer() -> WanTransformer3DModel:
    """Wan with 6 blocks of width 192: 3.3 million parameters."""
    return WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=512,
        num_layers=6,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the grammar's vocabulary."""
    return components.make_tokenizer(vocabulary(), TEXT_TOKENS)


def make_text_encoder() -> UMT5EncoderModel:
    """UMT5 of 2 layers, trained here."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(components.SPECIAL) + len(vocabulary()),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=TEXT_TOKENS,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def make_scheduler() -> UniPCMultistepScheduler:
    """Wan 2.1's scheduler; the shift is that for 480p."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
