"""A coarse step: one call of the model with large patches (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ddit.cells import Cells, inner_variance, liveliest
from ddit.config import Coarse
from ddit.models.base import Architecture, Inputs, Noisy, first
from ddit.patches import (
    TokenLayout,
    coarse_input,
    crop,
    detail_velocity,
    grow,
    low_velocity,
    pack,
    pad_to_multiple,
    patch_features,
    shrink,
    unpack,
)


class Adapter(Protocol):
    """What a coarse step needs of `ddit.adapter.PatchAdapter`."""

    def at(self, scale: int, patches: Tensor) -> AbstractContextManager[Any]: ...


class CoarseCall(NamedTuple):
    """A call on the grid of large patches."""

    inputs: Inputs
    latents: Tensor
    """``[B, C, ..., H/s, W/s]``, float32"""
    layout: TokenLayout
    padded: Tensor
    """The latents of which they are made ``[B, C, ..., H, W]``, float32: as many as large patches fill."""
    cells: Cells | None
    """Which tokens a mixed step has."""


def coarse_call(
    arch: Architecture,
    inputs: Inputs,
    noisy: Noisy,
    scale: int,
    coarse: Coarse,
    clean: Tensor | None = None,
    seed: int = 0,
) -> CoarseCall:
    """The call ``inputs``, which is about ``noisy``, with patches ``scale`` times as large; arguments of `coarse_step`.

    A mixed one is about one sample.
    """
    patch, dtype, condition, cells = arch.patch_size, noisy.latents.dtype, noisy.condition, None
    padded = _padded(arch, noisy.latents, scale)
    small, level = coarse_input(padded, noisy.sigma, scale, patch, coarse.start, seed)
    shrunk = condition
    if condition is not None:
        condition = _padded(arch, condition, scale)
        shrunk = shrink(condition, scale, patch, coarse.start).to(dtype)
    layout = TokenLayout.of(small, patch, scale, coarse.positions)
    call = arch.write(inputs, Noisy(small.to(dtype), level, shrunk), layout)
    if coarse.fine:
        seen = padded if clean is None else _padded(arch, clean, scale)
        cells = liveliest(inner_variance(seen, scale * patch)[0], layout.grid, scale, coarse.fine)
        own = arch.write(inputs, Noisy(padded.to(dtype), level, condition), TokenLayout.of(padded, patch))
        call = arch.mixed(call, own, cells)
    return CoarseCall(call, small, layout, padded, cells)


def call_at(arch: Architecture, inputs: Inputs, scale: int, coarse: Coarse) -> Inputs:
    """The call of the transformer in a step at a scale, without an adapter: at 1 the pipeline's own."""
    return inputs if scale == 1 else coarse_call(arch, inputs, arch.read(inputs), scale, coarse).inputs


def coarse_step(
    arch: Architecture,
    forward: Callable[..., Any],
    inputs: Inputs,
    noisy: Noisy,
    scale: int,
    coarse: Coarse,
    *,
    variance: Tensor | None = None,
    adapter: Adapter | None = None,
    clean: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """The model's answer to a call, computed with patches ``scale`` times as large.

    Args:
        forward: The transformer's own forward.
        inputs, noisy: The call, and what `Architecture.read` makes of it.
        coarse: How; an adapter's own form where there is one.
        variance: Variance of the detail inside large patches ``[C]``, measured on the model's samples.
        adapter: Adds what it learnt, attached to the transformer.
        clean: What the model last took the clean latents for ``[B, C, ..., H, W]``: a mixed step keeps small patches
            where these vary most. Without it, where the noisy ones do.
        seed: Of noise that is added, see `ddit.patches.coarse_input`.

    Returns:
        Velocity ``[B, C, ..., H, W]``, float32.
    """
    sigma, patch, batch = noisy.sigma, arch.patch_size, len(noisy.latents)
    if coarse.fine and batch > 1:  # each sample has its own small patches, and positions are told for all at once
        parts = [
            coarse_step(
                arch,
                forward,
                arch.rows(inputs, [i]),
                noisy.rows([i]),
                scale,
                coarse,
                variance=variance,
                adapter=adapter,
                clean=None if clean is None else clean[i : i + 1],
                seed=seed,
            )
            for i in range(batch)
        ]
        return torch.cat(parts)
    call = coarse_call(arch, inputs, noisy, scale, coarse, clean, seed)
    padded, cells = call.padded, call.cells
    hears: AbstractContextManager[Any] = nullcontext()
    if adapter is not None:
        patches = pack(patch_features(padded, sigma, scale, coarse.start), scale * patch)
        hears = adapter.at(scale, patches if cells is None else patches[:, cells.large])
    with arch.placed(call.layout), hears as learnt:
        answer = first(forward(**call.inputs))
    large = answer if cells is None else cells.scatter_large(answer)
    output = arch.velocity(large, call.latents.shape[2:]).float()
    pooled = shrink(padded, scale, patch, coarse.start) if coarse.start == "renoised" else None
    low = low_velocity(call.latents, output, sigma, scale, coarse.start, pooled)
    velocity = grow(low, scale, patch, coarse.start)
    if coarse.start != "bilinear":
        velocity = velocity + detail_velocity(padded, sigma, scale, variance)
    if learnt is not None:
        correction = learnt.correction.float()
        if cells is not None:
            correction = cells.scatter_large(correction)
        velocity = velocity + unpack(correction, scale * patch, padded.shape)
    if cells is not None:
        own = arch.velocity(cells.scatter_small(answer), padded.shape[2:]).float()
        velocity = torch.where(cells.covered(patch, padded.shape), own, velocity)
    return crop(velocity, *noisy.latents.shape[2:])


def _padded(arch: Architecture, z: Tensor, scale: int) -> Tensor:
    """As many latents as large patches fill, on a grid that the model takes; float32."""
    return pad_to_multiple(z.float(), scale * arch.patch_size * arch.grid_multiple)
