"""FLUX.1: `diffusers.FluxTransformer2DModel`.

The pipeline packs 2 x 2 latent pixels into a token of 4 C features in the order (c, dy, dx), and tells the grid
through ``img_ids [N, 3] = (0, row, column)`` alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddit.config import Coarse
from ddit.models.base import Inputs, PackedArchitecture
from ddit.models.flops import Costs
from ddit.patches import coarse_positions

_HARMLESS = {"scale", "ip_adapter_image_embeds", "ip_hidden_states"}
"""Attention arguments that know nothing of picture tokens."""


class Flux(PackedArchitecture):
    patch_size = 2
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "guidance",
        "joint_attention_kwargs",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
    )

    embedding = "x_embedder"
    head = "proj_out"
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

    def obstacle(self, inputs: Inputs) -> str | None:
        if any(inputs.get(f"controlnet_{kind}samples") is not None for kind in ("block_", "single_block_")):
            return "ControlNet residuals are made for the model's own tokens"
        model: Any = self.transformer
        if model.config.in_channels != inputs["hidden_states"].shape[-1] or model.x_embedder.in_features != (
            model.proj_out.out_features
        ):
            return "the model takes condition channels beside the latents (Fill, Control)"
        unknown = sorted(set(inputs.get("joint_attention_kwargs") or {}) - _HARMLESS)
        if unknown:
            return f"the attention arguments {unknown} may depend on the model's own tokens"
        if self._read_grid(inputs) is None:
            return "img_ids are not one full grid of rows and columns (reference tokens, as in Kontext)"
        return None

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        rows, columns = height // self.patch_size, width // self.patch_size
        grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
        return {
            "hidden_states": torch.zeros(1, rows * columns, config.in_channels),
            "encoder_hidden_states": torch.zeros(1, text, config.joint_attention_dim),
            "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
            "timestep": torch.full((1,), 0.5),
            "img_ids": torch.cat([torch.zeros(rows * columns, 1), grid.flatten(0, 1)], dim=1),
            "txt_ids": torch.zeros(text, 3),
            "guidance": torch.full((1,), 3.5) if config.guidance_embeds else None,
        }

    def teacache_signal(self, block: Any, argument: Callable[[str], Any]) -> Tensor:
        return block.norm1(argument("hidden_states"), emb=argument("temb"))[0]

    def teacache_coefficients(self) -> tuple[float, ...] | None:
        model: Any = self.transformer
        if model.config.num_layers != 19:
            return None
        return (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)

    def latents(self, inputs: Inputs) -> Tensor:
        grid = self._read_grid(inputs)
        assert grid is not None, "obstacle() has refused this call"
        return self.velocity(inputs["hidden_states"], (grid[0] * self.patch_size, grid[1] * self.patch_size))

    def sigma(self, inputs: Inputs) -> Tensor:
        return inputs["timestep"].float()

    def coarse(self, inputs: Inputs, latents: Tensor, sigma: Tensor, scale: int, coarse: Coarse) -> Inputs:
        rows, columns = (n // self.patch_size for n in latents.shape[-2:])
        ids = inputs["img_ids"]
        ids = ids[0] if ids.ndim == 3 else ids
        self._read_grid(inputs)
        positions = coarse_positions(self._origin, (rows, columns), scale, coarse.positions).flatten(0, 1)
        # float32 whatever the model's dtype: bfloat16 holds no half positions from 128 on.
        coarse_ids = torch.cat([ids[:1, :1].float().expand(rows * columns, 1), positions.to(ids.device)], dim=1)
        return {**self.renoised(inputs, latents, sigma), "img_ids": coarse_ids}

    def renoised(self, inputs: Inputs, latents: Tensor, sigma: Tensor) -> Inputs:
        return {
            **inputs,
            "hidden_states": self.output(latents),
            "timestep": sigma.to(latents.dtype),
            "joint_attention_kwargs": _copy(inputs.get("joint_attention_kwargs")),
            "return_dict": False,
        }

    def _read_grid(self, inputs: Inputs) -> tuple[int, int] | None:
        """Rows and columns from ``img_ids``, read by the host once per generation (the tensor stays the same)."""
        ids = inputs["img_ids"]
        if ids is not self._ids:
            self._ids, self._grid = ids, _grid(ids)
            row, column = (ids[0] if ids.ndim == 3 else ids)[0, 1:].tolist()
            self._origin = (row, column)
        return self._grid


def _grid(ids: Tensor) -> tuple[int, int] | None:
    """(rows, columns) if the positions ``[N, 3]`` count through one grid row by row, else ``None``."""
    ids = ids[0] if ids.ndim == 3 else ids
    rows, columns = (len(ids[:, axis].unique()) for axis in (1, 2))
    if rows * columns != len(ids) or len(ids[:, 0].unique()) != 1:
        return None
    table = ids[:, 1:].reshape(rows, columns, 2)
    even = (table[..., 0] == table[:, :1, 0]).all() and (table[..., 1] == table[:1, :, 1]).all()
    return (rows, columns) if bool(even) else None


def _copy(kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    """diffusers pops entries from this dictionary during the call."""
    return None if kwargs is None else dict(kwargs)
