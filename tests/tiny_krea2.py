"""A shrunken Krea 2 without text encoder and autoencoder, also as a modular pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from diffusers.modular_pipelines.krea2.modular_blocks_krea2 import Krea2CoreDenoiseStep

from tiny_modular import called_as_others


def transformer(**overrides: Any) -> Krea2Transformer2DModel:
    """2 blocks, 2 heads of 16 on one of keys and values; prompts are states of 3 layers."""
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=24,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    return Krea2Transformer2DModel(**{**settings, **overrides}).eval()


def pipeline() -> Any:
    """Pictures of 128 x 192 pixels have 8 x 12 tokens."""
    parts: Any = dict(text_encoder=None, tokenizer=None, vae=None)
    pipe = Krea2Pipeline(transformer=transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modular() -> Any:
    pipe = Krea2CoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    return called_as_others(pipe)


def _states(seed: int) -> torch.Tensor:
    return torch.randn(1, 6, 3, 16, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[True, True, True, False, False, True]])
"""A prompt is padded in its middle."""
CALL: dict[str, Any] = dict(
    height=128,
    width=192,
    prompt_embeds=_states(1),
    prompt_embeds_mask=MASK,
    negative_prompt_embeds=_states(2),
    negative_prompt_embeds_mask=MASK,
)
CASES: dict[str, dict[str, Any]] = {
    "krea-2": dict(make=pipeline, call=CALL, passes=2),
    "krea-2-without-guidance": dict(make=pipeline, call={**CALL, "guidance_scale": 0.0}),
    "krea-2-modular": dict(make=modular, call=CALL, passes=2),
}
"""For test_architectures."""
