"""The parts of the yardstick: real diffusers and transformers classes in the layout of FLUX.1-dev, but small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ddit.embedded.scenes import vocabulary

TEXT_TOKENS = 24
"""Length that prompts are padded to; the longest of the grammar has 21 words and an end mark."""
TEXT_WIDTH = 128
WIDTH = 256
"""Width of an image token."""
LATENTS = 4
"""Latent channels, so that a packed 2 x 2 patch has 16 numbers."""
SPECIAL = ("<pad>", "<eos>", "<unk>")


def make_vae() -> AutoencoderKL:
    """Autoencoder with 4 latent channels at a quarter of the picture's height and width."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 3,  # type: ignore[arg-type]
        block_out_channels=(16, 32, 64),  # type: ignore[arg-type]
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        sample_size=128,
    )


def make_transformer() -> FluxTransformer2DModel:
    """FLUX with one double and four single blocks of width 256."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENTS,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=WIDTH // 64,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )


def make_tokenizer(words: Sequence[str] = (), length: int = TEXT_TOKENS) -> PreTrainedTokenizerFast:
    """Word-level tokenizer; by default over the vocabulary of pictures."""
    vocab = {word: i for i, word in enumerate([*SPECIAL, *(words or vocabulary())])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    marks = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **marks)


def make_text_encoders(width: int = TEXT_WIDTH) -> tuple[CLIPTextModel, T5EncoderModel]:
    """A CLIP text model for the pooled vector and a T5 encoder for the token vectors."""
    words = len(SPECIAL) + len(vocabulary())
    clip = CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=width,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    t5 = T5Config(
        vocab_size=words,
        d_model=width,
        d_kv=32,
        d_ff=2 * width,
        num_layers=3,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=24,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return CLIPTextModel(clip), T5EncoderModel(t5)


class TextEncoders(nn.Module):
    """CLIP and T5 under one roof, called as `FluxPipeline.encode_prompt` calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = make_tokenizer()
        self.clip, self.t5 = make_text_encoders()

    def ids(self, prompts: list[str]) -> Tensor:
        """``[B, 24]``"""
        settings: dict[str, Any] = {"padding": "max_length", "max_length": TEXT_TOKENS, "truncation": True}
        return self.tokenizer(prompts, return_tensors="pt", **settings).input_ids

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids ``[B, T]`` -> pooled ``[B, 128]``, tokens ``[B, T, 128]``."""
        return self.clip(ids).pooler_output, self.t5(ids)[0]


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's, with the shift it has at 1024 x 1024 at every size."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=1.15,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def make_pipeline(vae: AutoencoderKL, text: TextEncoders, transformer: FluxTransformer2DModel) -> FluxPipeline:
    """The parts as a `FluxPipeline`; they are shared, not copied."""
    return FluxPipeline(
        scheduler=make_scheduler(),
        vae=vae,
        text_encoder=text.clip,
        tokenizer=text.tokenizer,  # type: ignore[arg-type]
        text_encoder_2=text.t5,
        tokenizer_2=text.tokenizer,  # type: ignore[arg-type]
        transformer=transformer,
    )


def grid_ids(side: int, device: str | torch.device = "cpu") -> Tensor:
    """``[side * side, 3]`` positions (0, row, column), as `FluxPipeline` makes them."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float().to(device)
