"""ACE-Step 1.5: `diffusers.AceStepTransformer1DModel`, music from words.

The model itself cuts latents ``[B, T, C]`` into stretches of 2; beside them lie those of a source and a mask. Patches
span time alone. Positions are made inside the model's forward and handed to each block. Its sliding window counts
tokens, so that on a coarse grid it is ``s`` times as long. Guidance is stacked in one call.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor

from ddit.models.base import Architecture, Inputs, Noisy, UnsupportedCall
from ddit.models.flops import Costs
from ddit.patches import TokenLayout

_TIMES = ("timestep", "timestep_r")


class AceStep(Architecture):
    axes = 1
    batched = ("hidden_states", "encoder_hidden_states", "context_latents", *_TIMES)
    embedding = "proj_in_conv"
    head = "proj_out_conv"
    block_lists = ("layers",)
    block_counts = ("num_hidden_layers",)
    feed_forward_names = re.compile(r"layers\.\d+\.mlp\.(gate|up|down)_proj")
    costs = Costs(
        rows=(
            (r"time_embed(_r)?\..*", "sample"),
            (r"condition_embedder|layers\.\d+\.cross_attn\.to_[kv]", "text"),
            (r"proj_(in|out)_conv|layers\.\d+\.(mlp\..*|(self|cross)_attn\.to_(q|k|v|out\.0))", "image"),
        ),
        attention=(
            (r"layers\.\d+\.self_attn\.to_q", "image", "image"),
            (r"layers\.\d+\.cross_attn\.to_q", "image", "text"),
        ),
    )

    def read(self, inputs: Inputs) -> Noisy:
        self.check_patch_size()
        if not torch.equal(*(inputs[name] for name in _TIMES)):
            raise UnsupportedCall("the call asks for the mean velocity between two noise levels")
        return Noisy(inputs["hidden_states"].mT, self.sigma(inputs), inputs["context_latents"].mT)

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        assert noisy.condition is not None, "read() gave one"
        return {
            **inputs,
            "hidden_states": noisy.latents.mT,
            "context_latents": noisy.condition.mT,
            # The model computes in the timestep's dtype.
            **{name: noisy.sigma.to(inputs["timestep"].dtype) for name in _TIMES},
            "return_dict": False,
        }

    def velocity(self, output: Tensor, size: Sequence[int]) -> Tensor:
        return output.mT

    def output(self, velocity: Tensor, inputs: Inputs) -> Tensor:
        return velocity.mT

    @contextmanager
    def placed(self, layout: TokenLayout) -> Iterator[None]:
        """As in `Architecture`, through the arguments of each block: no module makes the positions."""
        with ExitStack() as hooks:
            if layout.positions == "interpolated":
                moved = self._moved(layout)
                for block in self.blocks():
                    hooks.callback(block.register_forward_pre_hook(moved, with_kwargs=True).remove)
            yield

    def _moved(self, layout: TokenLayout) -> Callable[..., Any]:
        """Before a block: hand it the cosines and sines of the layout's places instead of the model's own."""
        config: Any = self.transformer.config  # type: ignore[union-attr]
        places: Any = layout.places()[:, 0]  # annotated for arrays only
        waves = get_1d_rotary_pos_embed(
            config.head_dim, places, theta=config.rope_theta, use_real=True, repeat_interleave_real=False
        )

        def hook(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            given = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
            own = given["position_embeddings"]
            given["position_embeddings"] = tuple(wave.to(like) for wave, like in zip(waves, own, strict=True))
            return (), {name: value for name, value in given.items() if name != "self"}

        return hook

    def tokens(self, inputs: Inputs) -> int:
        return -(-inputs["hidden_states"].shape[1] // self.patch_size)  # The model itself fills up the last one.

    @property
    def features(self) -> int:
        return self.layer(self.head).out_channels * self.patch_size

    @property
    def width(self) -> int:
        return self.layer(self.head).in_channels

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        level = torch.full((1,), self.time_scale / 2)
        return {
            "hidden_states": torch.zeros(1, width, self.channels),
            "encoder_hidden_states": torch.zeros(1, text, config.encoder_hidden_size or config.hidden_size),
            "context_latents": torch.zeros(1, width, config.in_channels - self.channels),
            **dict.fromkeys(_TIMES, level),
        }
