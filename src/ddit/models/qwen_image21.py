"""Qwen-Image 2.1: `diffusers.QwenImage21Transformer2DModel`.

A token is one pixel of latents at a sixteenth of the picture's size. The model puts text, reference images and the
image that is drawn, the last, into one sequence, in which every part sees itself and what comes before. So what the
pipeline keeps of the others in the first step (``kv_cache``) serves every grid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddit.models.base import Inputs, Noisy
from ddit.models.flops import Costs
from ddit.models.packed import PackedArchitecture
from ddit.patches import TokenLayout, pack

_SLOT = 4
"""Tokens of an image that one place of ``img_mask`` stands for."""


class QwenImage21(PackedArchitecture):
    patch_size = 1
    grid_multiple = 2
    compression = (16, 4)
    batched = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep")
    embedding = "img_in"
    rope = "pos_embed"
    feed_forward_names = re.compile(r"transformer_blocks\.\d+\.img_mlp\.(proj|out)")
    costs = Costs(
        rows=(
            (r"time_text_embed\..*|modulation\.1|norm_out\.linear", "time"),
            (r"txt_in\..*", "text"),
            (r"img_in", "image"),
            (r"proj_out|transformer_blocks\.\d+\.(attn\.to_(q|k|v|out\.0)|img_mlp\..*)", "computed"),
        ),
        attention=(
            (r"transformer_blocks\.\d+\.attn\.to_q", "before", "before"),
            (r"transformer_blocks\.\d+\.attn\.to_k", "drawn", "joint"),
        ),
    )

    def read(self, inputs: Inputs) -> Noisy:
        return self.unpacked(inputs["hidden_states"], self.sigma(inputs), inputs["img_shapes"][0][-1][1:])

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        *references, (_, *grid) = inputs["img_shapes"][0]
        mask, text = inputs["img_mask"], inputs["encoder_hidden_states"].shape[1]
        slots = mask.new_ones(len(mask), math.prod(layout.grid) // _SLOT)
        before = inputs["hidden_states"][:, : -math.prod(grid)]
        return {
            **inputs,
            "hidden_states": torch.cat([before.to(noisy.latents), pack(noisy.latents, 1)], dim=1),
            "timestep": noisy.sigma.to(noisy.latents.dtype),
            "img_shapes": [[*references, (1, *layout.grid)]] * len(noisy.latents),
            "img_mask": torch.cat([mask[:, :text], slots], dim=1),
            "return_dict": False,
        }

    @staticmethod
    def own(tokens: Tensor, count: int) -> Tensor:
        return tokens[:, -count:]

    def output(self, velocity: Tensor, inputs: Inputs) -> Tensor:
        """Of the sequence, which the model answers in full, the part that pipelines take."""
        return pack(velocity, 1)

    def rows(self, inputs: Inputs, samples: Sequence[int]) -> Inputs:
        kept = inputs.get("kv_cache")
        return {
            **super().rows(inputs, samples),
            "img_shapes": inputs["img_shapes"][:1] * len(samples),
            "kv_cache": None if kept is None else _some(kept, list(samples)),
        }

    def rotary(self, layout: TokenLayout, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Rows and columns count from the middle of the image; its place in the sequence stays."""
        rope: Any = self.transformer.get_submodule("pos_embed")
        rows, columns = (n * layout.scale for n in layout.grid)
        places = layout.places((float(rows // 2 - rows), float(columns // 2 - columns)))
        place, *dims = rope.axes_dim
        waves = [
            rope.rope_params(axis, dim).to(output, non_blocking=True) for axis, dim in zip(places.T, dims, strict=True)
        ]
        before, own = output.split([len(output) - len(places), len(places)])
        return torch.cat([before, torch.cat([own[:, : place // 2], *waves], dim=1)])

    def further_rows(self, inputs: Inputs) -> dict[str, int]:
        """In the sequence a reference image takes four tokens for each of its places among the text's.

        With a ``kv_cache`` these are the rows of every step but the first.
        """
        image, drawn = inputs["hidden_states"].shape[1], math.prod(inputs["img_shapes"][0][-1])
        before = inputs["encoder_hidden_states"].shape[1] + (image - drawn) * (_SLOT - 1) // _SLOT
        computed = 0 if inputs.get("kv_cache_mode") else before
        levels = 2 if self.transformer.config.causal_condition else 1  # type: ignore[union-attr]
        return {
            "computed": computed + drawn,
            "before": computed,
            "drawn": drawn,
            "joint": before + drawn,
            "time": levels,
        }

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        mask = torch.arange(text + height * width // _SLOT) >= text
        return {
            "hidden_states": torch.zeros(1, height * width, config.in_channels),
            "encoder_hidden_states": torch.zeros(1, text, config.context_in_dim),
            "timestep": torch.full((1,), 0.5),
            "img_shapes": [[(1, height, width)]],
            "img_mask": mask[None],
        }


def _some(cache: Any, samples: list[int]) -> Any:
    """What a `QwenImage21KVCache` keeps of some samples."""
    part = type(cache)(len(cache.layer_caches))
    for layer, whole in zip(part.layer_caches, cache.layer_caches, strict=True):
        if whole.k is not None:
            layer.store(whole.k[samples], whole.v[samples])
    return part
