"""A shrunken ACE-Step: real classes, random weights, a tokenizer that knows a few words."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AceStepPipeline, AceStepTransformer1DModel, AutoencoderOobleck, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

PROMPT = "a slow waltz on a piano"
RATE, SPAN = 400, 16
"""Samples of sound in a second, and to one latent: 25 latents a second, as in the real model."""
BLOCKS: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=8
)


def transformer(**overrides: Any) -> AceStepTransformer1DModel:
    """2 blocks, the first with a window of 8 tokens; latents of 4 channels, conditions of 5 features."""
    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=2, in_channels=12, audio_acoustic_hidden_dim=4)
    return AceStepTransformer1DModel(**{**BLOCKS, **sizes, **overrides}).eval()


def conditions() -> AceStepConditionEncoder:
    torch.manual_seed(0)
    layers = dict(num_lyric_encoder_hidden_layers=1, num_timbre_encoder_hidden_layers=1)
    return AceStepConditionEncoder(**BLOCKS, **layers, text_hidden_dim=16, timbre_hidden_dim=4).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", *PROMPT.split(), "la", "duration"])}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")


def text_encoder() -> Qwen3Model:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    return Qwen3Model(Qwen3Config(**sizes, num_key_value_heads=1, vocab_size=32)).eval()


def vae() -> AutoencoderOobleck:
    """Stereo, 16 samples to a latent."""
    torch.manual_seed(0)
    return AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[4, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
        sampling_rate=RATE,
    ).eval()


def pipeline(**overrides: Any) -> AceStepPipeline:
    pipe = AceStepPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        transformer=transformer(**overrides),
        condition_encoder=conditions(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


SONG: dict[str, Any] = dict(prompt=PROMPT, lyrics="la la", audio_duration=1.6)
"""40 latents, 20 tokens."""
SOUND = torch.randn(2, 37 * SPAN, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
"""37 latents: the last token is half empty."""
REPAINT: dict[str, Any] = dict(
    task_type="repaint",
    src_audio=SOUND,
    audio_duration=None,
    repainting_start=0.4,
    repainting_end=1.2,
    guidance_scale=3.0,
)
CASES: dict[str, dict[str, Any]] = {
    "ace-step": dict(make=pipeline, call=SONG, rows=2),
    "ace-step-turbo": dict(make=lambda: pipeline(is_turbo=True), call={**SONG, "guidance_scale": 1.0}),
    "ace-step-repaint": dict(make=pipeline, call={**SONG, **REPAINT}, rows=2),
    "ace-step-cover": dict(
        make=pipeline, call={**SONG, "task_type": "cover", "audio_cover_strength": 0.5}, passes=2, rows=2
    ),
}
"""As arguments of `test_architectures.Case`."""
