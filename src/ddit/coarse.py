"""A coarse step: one call of the model with large patches (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

from torch import Tensor

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


def coarse_call(arch: Architecture, inputs: Inputs, noisy: Noisy, scale: int, coarse: Coarse) -> CoarseCall:
    """The call ``inputs``, which is about ``noisy``, with patches ``scale`` times as large."""
    patch, dtype, condition = arch.patch_size, noisy.latents.dtype, noisy.condition
    padded = _padded(arch, noisy.latents, scale)
    small, level = coarse_input(padded, noisy.sigma, scale, patch, coarse.start)
    if condition is not None:
        condition = shrink(_padded(arch, condition, scale), scale, patch, coarse.start).to(dtype)
    layout = TokenLayout.of(small, patch, scale, coarse.positions)
    return CoarseCall(arch.write(inputs, Noisy(small.to(dtype), level, condition), layout), small, layout, padded)


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
) -> Tensor:
    """The model's answer to a call, computed with patches ``scale`` times as large.

    Args:
        forward: The transformer's own forward.
        inputs, noisy: The call, and what `Architecture.read` makes of it.
        coarse: How; an adapter's own form where there is one.
        variance: Variance of the detail inside large patches ``[C]``, measured on the model's samples.
        adapter: Adds what it learnt, attached to the transformer.

    Returns:
        Velocity ``[B, C, ..., H, W]``, float32.
    """
    sigma, patch = noisy.sigma, arch.patch_size
    call = coarse_call(arch, inputs, noisy, scale, coarse)
    padded = call.padded
    hears: AbstractContextManager[Any] = nullcontext()
    if adapter is not None:
        hears = adapter.at(scale, pack(patch_features(padded, sigma, scale, coarse.start), scale * patch))
    with arch.placed(call.layout), hears as learnt:
        output = arch.velocity(first(forward(**call.inputs)), call.latents.shape[2:]).float()
    velocity = grow(low_velocity(call.latents, output, sigma, scale, coarse.start), scale, patch, coarse.start)
    if coarse.start == "noise-consistent":
        velocity = velocity + detail_velocity(padded, sigma, scale, variance)
    if learnt is not None:
        velocity = velocity + unpack(learnt.correction.float(), scale * patch, padded.shape)
    return crop(velocity, *noisy.latents.shape[2:])


def _padded(arch: Architecture, z: Tensor, scale: int) -> Tensor:
    """As many latents as large patches fill, on a grid that the model takes; float32."""
    return pad_to_multiple(z.float(), scale * arch.patch_size * arch.grid_multiple)
