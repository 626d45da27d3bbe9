"""The parts of the video model: real diffusers and transformers classes in the layout of Wan 2.1, but small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from benchmarks.yardstick.components import SPECIAL, make_tokenizer
from ddit.embedded.clips import vocabulary

TEXT_TOKENS = 16
"""Length that prompts are padded to; the longest of the grammar has 12 words and an end mark."""
TEXT_WIDTH = 128
WIDTH = 256
"""Width of a token."""
CHANNELS = 5
"""Of the latents, so that a patch of 2 x 2 has 20 numbers."""


def make_vae() -> AutoencoderKLWan:
    """Latents of 5 channels: a quarter of the height and width, half of the frames but for the first.

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
    for convolution in (m for m in vae.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)):
        # PyTorch's own start shrinks what passes, and learning takes longer.
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="linear")
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    with torch.no_grad():  # Else the posterior starts with as much noise as latents, and layout alone is learnt.
        vae.quant_conv.bias[CHANNELS:] = -4.0  # type: ignore[index]
        vae.quant_conv.weight[CHANNELS:] *= 0.1
    return vae


def make_transformer() -> WanTransformer3DModel:
    """Wan with five blocks of width 256."""
    return WanTransformer3DModel(
        num_attention_heads=WIDTH // 64,
        attention_head_dim=64,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=3 * WIDTH,
        num_layers=5,
    )


def make_wan_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the clips' vocabulary."""
    return make_tokenizer(vocabulary(), TEXT_TOKENS)


class TextEncoder(nn.Module):
    """UMT5 called as `WanPipeline.encode_prompt` calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = make_wan_tokenizer()
        self.umt5 = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(SPECIAL) + len(vocabulary()),
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

    def ids(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, ``[B, 16]`` each."""
        settings: dict[str, Any] = {"padding": "max_length", "max_length": TEXT_TOKENS, "truncation": True}
        told = self.tokenizer(list(prompts), return_tensors="pt", **settings)
        return told.input_ids, told.attention_mask

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``[B, 16, 128]``, zero where the prompt has ended."""
        return self.umt5(ids, mask).last_hidden_state * mask[..., None]


def make_pipeline(vae: AutoencoderKLWan, text: TextEncoder, transformer: WanTransformer3DModel) -> WanPipeline:
    """The parts as a `WanPipeline` with Wan 2.1's scheduler, shifted as at 480p; they are shared, not copied."""
    return WanPipeline(
        tokenizer=text.tokenizer,  # type: ignore[arg-type]
        text_encoder=text.umt5,
        vae=vae,
        scheduler=UniPCMultistepScheduler(  # type: ignore[arg-type]
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer,
    )
