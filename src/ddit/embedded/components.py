"""The parts of the embedded model: real diffusers and transformers classes, small enough for a repository.

The layout is FLUX.1-dev's (`FluxPipeline`), so everything that works on it takes the code path FLUX.1-dev takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ddit.embedded.scenes import vocabulary

TEXT_TOKENS = 20
"""Length that prompts are padded to; the longest prompt of the grammar has 19 words and an end mark."""
SPECIAL = ("<pad>", "<eos>", "<unk>")


def make_vae() -> AutoencoderKL:
    """Autoencoder with 16 latent channels at a quarter of the picture's height and width."""
    stages = 3
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * stages,  # type: ignore[arg-type]
        block_out_channels=(16, 32, 64),  # type: ignore[arg-type]
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=128,
    )


def make_transformer() -> FluxTransformer2DModel:
    """FLUX with 2 double and 4 single blocks of width 192: 5.1 million parameters."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=False,
        axes_dims_rope=(8, 28, 28),
    )


def make_tokenizer(words: Sequence[str] = (), length: int = TEXT_TOKENS) -> PreTrainedTokenizerFast:
    """Word-level tokenizer; by default over the vocabulary of the pictures' grammar."""
    vocab = {word: i for i, word in enumerate([*SPECIAL, *(words or vocabulary())])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", vocab["<eos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=length,
    )


def make_text_encoders(width: int = 128) -> tuple[CLIPTextModel, T5EncoderModel]:
    """A CLIP text model for the pooled vector and a T5 encoder for the token vectors, both trained here."""
    words = len(SPECIAL) + len(vocabulary())
    clip = CLIPTextModel(
        CLIPTextConfig(
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
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=words,
            d_model=width,
            d_kv=32,
            d_ff=2 * width,
            num_layers=3,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=20,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )
    return clip, t5


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's scheduler, unchanged."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
