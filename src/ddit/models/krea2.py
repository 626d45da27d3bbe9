"""Krea 2: `diffusers.Krea2Transformer2DModel`.

Tokens are those of FLUX.1. Their positions stand behind the prompt's in one list, ``position_ids [text + N, 3]``. The
prompt comes as the states of several layers of its encoder ``[B, text, layers, width]``, which the model fuses first.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddit.models.base import Inputs, Noisy
from ddit.models.flops import Costs
from ddit.models.flux import Flux
from ddit.patches import TokenLayout


class Krea2(Flux):
    residuals = ()
    guidance_off = 0.0
    batched = ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask")
    attention_arguments = "attention_kwargs"
    embedding = "img_in"
    head = "final_layer.linear"
    block_lists = ("transformer_blocks",)
    block_counts = ("num_layers",)
    feed_forward_names = re.compile(r"transformer_blocks\.\d+\.ff\.(gate|up|down)")
    costs = Costs(
        rows=(
            (r"time_embed\..*|time_mod_proj", "sample"),
            (r"img_in|final_layer\.linear", "image"),
            (r"text_fusion\.layerwise_blocks\..*", "states"),
            (r"text_fusion\.projector", "features"),
            (r"text_fusion\.refiner_blocks\..*|txt_in\..*", "text"),
            (r"transformer_blocks\..*", "joint"),
        ),
        attention=(
            (r"text_fusion\.layerwise_blocks\.\d+\.attn\.to_q", "states", "layers"),
            (r"text_fusion\.refiner_blocks\.\d+\.attn\.to_q", "text", "text"),
            (r"transformer_blocks\.\d+\.attn\.to_q", "joint", "joint"),
        ),
    )

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        self._positions: Tensor | None = None
        self._image_positions: Tensor | None = None

    def read(self, inputs: Inputs) -> Noisy:
        return super().read(self._as_flux(inputs))

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        changed = super().write(self._as_flux(inputs), noisy, layout)
        text, image = inputs["position_ids"][: inputs["encoder_hidden_states"].shape[1]], changed.pop("img_ids")
        return {**changed, "position_ids": torch.cat([text, image])}

    def _as_flux(self, inputs: Inputs) -> Inputs:
        """The call with the image's positions as FLUX.1 has them: one tensor as long as theirs is one."""
        positions = inputs["position_ids"]
        if positions is not self._positions:
            self._positions, self._image_positions = positions, positions[inputs["encoder_hidden_states"].shape[1] :]
        return {**inputs, "img_ids": self._image_positions}

    def further_rows(self, inputs: Inputs) -> dict[str, int]:
        """All states, those of one token, and the features of all tokens that are fused each on its own."""
        _, text, layers, width = inputs["encoder_hidden_states"].shape
        joint = text + self.tokens(inputs)
        return {"text": text, "joint": joint, "states": text * layers, "layers": layers, "features": text * width}

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        rows, columns = height // self.patch_size, width // self.patch_size
        places = torch.cat([torch.zeros(text, 2), TokenLayout((rows, columns)).places()])
        return {
            "hidden_states": torch.zeros(1, rows * columns, config.in_channels),
            "encoder_hidden_states": torch.zeros(1, text, config.num_text_layers, config.text_hidden_dim),
            "timestep": torch.full((1,), 0.5),
            "position_ids": F.pad(places, (1, 0)),
            "encoder_attention_mask": torch.ones(1, text, dtype=torch.bool),
        }
