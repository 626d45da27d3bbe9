"""FLUX.1: `diffusers.FluxTransformer2DModel`.

The pipeline packs 2 x 2 latent pixels into a token of 4 C features in the order (c, dy, dx), and tells the grid
through ``img_ids [N, 3] = (0, row, column)`` alone. Fill and Control put features of a condition behind those of the
latents, Kontext puts tokens of reference images behind the image's. All are pooled together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddit.models.base import Inputs, Noisy, UnsupportedCall, check_arguments
from ddit.models.flops import Costs
from ddit.models.packed import PackedArchitecture
from ddit.patches import TokenLayout, coarse_grid

_HARMLESS = {"scale", "ip_adapter_image_embeds", "ip_hidden_states"}
"""Attention arguments that know nothing of picture tokens."""


@dataclass(frozen=True)
class Placed:
    """An image whose tokens ``img_ids`` place."""

    grid: tuple[int, int]
    """Rows and columns"""
    origin: tuple[float, float]
    """Where the first token is."""
    spacing: float
    """From row to row, and from column to column."""


class Images:
    """What ``img_ids`` tell, read by the host once per generation (the tensor stays the same)."""

    def __init__(self) -> None:
        self._ids: Tensor | None = None
        self._found: list[Placed] | None = None

    def __call__(self, ids: Tensor) -> list[Placed] | None:
        if ids is not self._ids:
            self._ids, self._found = ids, images_of(of_one(ids).cpu())
        return self._found


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
        self._images = Images()

    def read(self, inputs: Inputs) -> Noisy:
        check_arguments(inputs.get(self.attention_arguments), _HARMLESS)
        images = self._images(inputs["img_ids"])
        if images is None:
            raise UnsupportedCall("img_ids are not full grids of rows and columns")
        return self.unpacked(inputs["hidden_states"], self.sigma(inputs), images[0].grid)

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        images = self._images(inputs["img_ids"])
        assert images is not None, "read() has refused this call"
        own, *others = (image.grid for image in images)
        behind = self.pooled_references(inputs["hidden_states"][:, math.prod(own) :], others, layout.scale)
        changed = {
            "hidden_states": self.packed(noisy, behind),
            "timestep": noisy.sigma.to(noisy.latents.dtype),
            "return_dict": False,
        }
        if inputs.get(self.attention_arguments) is not None:
            # A copy, as diffusers pops entries of it during the call.
            changed[self.attention_arguments] = dict(inputs[self.attention_arguments])
        if layout.scale > 1:
            # What fills up the last large patches is not told by the image's own grid.
            grids = [layout.grid, *(coarse_grid(grid, layout.scale) for grid in others)]
            changed["img_ids"] = placed(inputs["img_ids"], images, grids, layout)
        return {**inputs, **changed, **self.pooled_residuals(inputs, layout, own)}

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


def of_one(ids: Tensor) -> Tensor:
    """Positions ``[N, 3]``; diffusers used to give them for each sample, and does so for FLUX.2."""
    return ids[0] if ids.ndim == 3 else ids


def placed(ids: Tensor, images: Sequence[Placed], grids: Sequence[tuple[int, ...]], layout: TokenLayout) -> Tensor:
    """Positions of images on other grids, float32 whatever the model's dtype: bfloat16 has no half ones from 128 on.

    Args:
        ids: Their positions on grids of their own.
        grids: Rows and columns for each.
        layout: How positions are told, see `TokenLayout`.
    """
    own, parts, begin = of_one(ids), [], 0
    for image, grid in zip(images, grids, strict=True):
        places = replace(layout, grid=grid).places(image.origin, image.spacing, ids.device)
        part = own[begin : begin + 1].float().repeat(len(places), 1)
        part[:, 1:3] = places
        parts.append(part)
        begin += math.prod(image.grid)
    joined = torch.cat(parts)
    # As many axes as they came with: so diffusers splits them over devices.
    return joined.expand(*ids.shape[:-2], *joined.shape)


def images_of(ids: Tensor) -> list[Placed] | None:
    """The images that positions ``[N, 3]`` are made of, one behind the other, row by row; ``None`` if they are not.

    Reference images have another number in front, or begin again at their first row.
    """
    image, row, column = ids[:, :3].T.double()
    new = (image.diff() != 0) | (row.diff() < 0) | ((row.diff() == 0) & (column.diff() <= 0))
    ends = [*(new.nonzero().flatten() + 1).tolist(), len(ids)]
    found = [_image(ids[begin:end, 1:3]) for begin, end in zip([0, *ends], ends, strict=False)]
    known = [image for image in found if image is not None]
    return known if len(known) == len(found) else None


def _image(places: Tensor) -> Placed | None:
    """The image of rows and columns ``[N, 2]``, if they are one full grid."""
    rows, columns = (len(axis.unique()) for axis in places.T)
    if rows * columns != len(places):
        return None
    table = places.reshape(rows, columns, 2)
    if not (table[..., 0] == table[:, :1, 0]).all() or not (table[..., 1] == table[:1, :, 1]).all():
        return None
    (row, column), *others = places[:2].tolist()
    spacing = max(others[0][0] - row, others[0][1] - column) if others else 1.0
    return Placed((rows, columns), (row, column), spacing)
