"""FLUX.1: `diffusers.FluxTransformer2DModel`.

The pipeline packs 2 x 2 latent pixels into a token of 4 C features in the order (c, dy, dx), and tells the grid
through ``img_ids [N, 3] = (0, row, column)`` alone. Fill and Control put features of a condition behind those of the
latents, Kontext puts tokens of reference images behind the image's: the former are pooled with them, the latter stay.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddit.models.base import Inputs, Noisy, UnsupportedCall, check_arguments
from ddit.models.flops import Costs
from ddit.models.packed import PackedArchitecture
from ddit.patches import TokenLayout

_HARMLESS = {"scale", "ip_adapter_image_embeds", "ip_hidden_states"}
"""Attention arguments that know nothing of picture tokens."""


class Flux(PackedArchitecture):
    residuals = ("controlnet_block_samples", "controlnet_single_block_samples")
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "guidance",
        "joint_attention_kwargs",
        *residuals,
    )
    attention_arguments = "joint_attention_kwargs"
    """Name of the input with arguments of the attention layers."""

    embedding = "x_embedder"
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    block_counts = ("num_layers", "num_single_layers")
    feed_forward_names = re.compile(
        r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)|single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
    )
    costs = Costs(
        rows=(
            (r"time_text_embed\..*|norm_out\.linear|(single_)?transformer_blocks\.\d+\.norm\w*\.linear", "sample"),
            (r"x_embedder|proj_out|transformer_blocks\.\d+\.(attn\.to_(q|k|v|out\.0)|ff\..*)", "image"),
            (r"context_embedder|transformer_blocks\.\d+\.(attn\.(add_._proj|to_add_out)|ff_context\..*)", "text"),
            (r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)", "joint"),
        ),
        attention=((r"(single_)?transformer_blocks\.\d+\.attn\.to_q", "joint", "joint"),),
    )

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        self._ids: Tensor | None = None
        self._grid: tuple[int, int] | None = None
        self._origin = (0.0, 0.0)
        self._spacing = 1.0

    def read(self, inputs: Inputs) -> Noisy:
        check_arguments(inputs.get(self.attention_arguments), _HARMLESS)
        grid = self._read_grid(inputs)
        if grid is None:
            raise UnsupportedCall("img_ids do not begin with one full grid of rows and columns")
        return self.unpacked(inputs["hidden_states"], self.sigma(inputs), grid)

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        grid = self._read_grid(inputs)
        assert grid is not None, "read() has refused this call"
        count, ids = math.prod(grid), _of_one(inputs["img_ids"])
        changed = {
            "hidden_states": self.packed(noisy, inputs["hidden_states"][:, count:]),
            "timestep": noisy.sigma.to(noisy.latents.dtype),
            "return_dict": False,
        }
        if inputs.get(self.attention_arguments) is not None:
            # A copy, as diffusers pops entries of it during the call.
            changed[self.attention_arguments] = dict(inputs[self.attention_arguments])
        if layout.grid != grid:
            places = layout.places(self._origin, self._spacing, ids.device)
            # float32 whatever the model's dtype: bfloat16 holds no half positions from 128 on.
            own = ids[:1].float().repeat(len(places), 1)
            own[:, 1:3] = places
            placed = torch.cat([own, ids[count:].float()])
            # As many axes as they came with: so diffusers splits them over devices.
            changed["img_ids"] = placed.expand(*inputs["img_ids"].shape[:-2], *placed.shape)
        return {**inputs, **changed, **self.pooled_residuals(inputs, layout, grid)}

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        return {
            **self.image_and_text(height, width, text),
            "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
            "guidance": torch.full((1,), 3.5) if config.guidance_embeds else None,
        }

    def image_and_text(self, height: int, width: int, text: int) -> Inputs:
        """What relatives of FLUX.1 have in common of an `example`."""
        config: Any = self.transformer.config  # type: ignore[union-attr]
        rows, columns = height // self.patch_size, width // self.patch_size
        return {
            "hidden_states": torch.zeros(1, rows * columns, config.in_channels),
            "encoder_hidden_states": torch.zeros(1, text, config.joint_attention_dim),
            "timestep": torch.full((1,), 0.5),
            "img_ids": F.pad(TokenLayout((rows, columns)).places(), (1, 0)),
            "txt_ids": torch.zeros(text, 3),
        }

    def teacache_signal(self, block: Any, argument: Callable[[str], Any]) -> Tensor:
        return block.norm1(argument("hidden_states"), emb=argument("temb"))[0]

    def teacache_coefficients(self) -> tuple[float, ...] | None:
        model: Any = self.transformer
        if model.config.num_layers != 19:
            return None
        return (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)

    def _read_grid(self, inputs: Inputs) -> tuple[int, int] | None:
        """Rows and columns from ``img_ids``, read by the host once per generation (the tensor stays the same)."""
        ids = inputs["img_ids"]
        if ids is not self._ids:
            self._ids, own = ids, _of_one(ids).cpu()
            self._grid = _grid(own)
            (row, column), *others = own[:2, 1:3].tolist()
            self._origin = (row, column)
            self._spacing = max(others[0][0] - row, others[0][1] - column) if others else 1.0
        return self._grid


def _of_one(ids: Tensor) -> Tensor:
    """Positions ``[N, 3]``; diffusers used to give them for each sample, and does so for FLUX.2."""
    return ids[0] if ids.ndim == 3 else ids


def _grid(ids: Tensor) -> tuple[int, int] | None:
    """(rows, columns) if the positions ``[N, 3]`` begin with those of one grid, row by row, else ``None``.

    Tokens of reference images (Kontext) come behind, with another number in front.
    """
    own = ids[ids[:, 0] == ids[0, 0]]
    rows, columns = (len(own[:, axis].unique()) for axis in (1, 2))
    if rows * columns != len(own) or not torch.equal(own, ids[: len(own)]):
        return None
    table = own[:, 1:3].reshape(rows, columns, 2)
    even = (table[..., 0] == table[:, :1, 0]).all() and (table[..., 1] == table[:1, :, 1]).all()
    return (rows, columns) if bool(even) else None
