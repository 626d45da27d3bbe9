"""Large patches on a model that knows small ones: geometry, resizing and the noise-consistent step. Pure tensors.

Letters: B samples, C channels, H and W latent height and width, p the model's own patch size in latent pixels,
s the scale. A patch of size ``s p`` is a patch of size p after resizing it to ``p x p`` latent pixels by a matrix
``M [p p, s p s p]``; its output comes back through ``U [s p s p, p p]``.

Patches span height and width of pictures ``[B, C, H, W]`` and of frames ``[B, C, F, H, W]``; those of audio
``[B, C, T]`` span time alone (`spanned`). What is written here of squares then holds of stretches: ``M [p, s p]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ddit.config import Positions, Start


def spanned(z: Tensor) -> int:
    """How many axes of latents ``[B, C, ...]`` a patch spans, the last ones: time of audio, else height and width."""
    return min(z.ndim - 2, 2)


def cut(z: Tensor, side: int) -> Tensor:
    """Squares of ``side x side`` latents: ``[B, C, ..., H, W] -> [B, C, ..., H/side, W/side, side side]``."""
    if spanned(z) == 1:
        return z.unflatten(-1, (-1, side))
    return rearrange(z, "b c ... (h y) (w x) -> b c ... h w (y x)", y=side, x=side)


def join(patches: Tensor, side: int) -> Tensor:
    """The inverse of `cut`."""
    if patches.ndim == 4:  # of audio
        return patches.flatten(-2)
    return rearrange(patches, "b c ... h w (y x) -> b c ... (h y) (w x)", y=side, x=side)


def pack(z: Tensor, patch: int) -> Tensor:
    """One token for each ``patch x patch`` square: ``[B, C, ..., H, W] -> [B, N, C patch patch]``."""
    if spanned(z) == 1:
        return rearrange(z, "b c (n t) -> b n (c t)", t=patch)
    squares = F.pixel_unshuffle(z.movedim(1, -3), patch)  # a third of the time of rearrange
    return squares.movedim(-3, -1).flatten(1, -2).contiguous()


def unpack(tokens: Tensor, patch: int, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack`; ``shape`` is that of the latents, of which C may differ."""
    if len(shape) == 3:
        return rearrange(tokens, "b n (c t) -> b c (n t)", t=patch)
    *frames, height, width = shape[2:]
    squares = tokens.unflatten(1, (*frames, height // patch, width // patch)).movedim(-1, -3)
    return F.pixel_shuffle(squares, patch).movedim(-3, 1)


def pad_to_multiple(z: Tensor, multiple: int) -> Tensor:
    """Mirror the last rows and columns until H and W are multiples of ``multiple``; `crop` undoes it.

    Their noise is that of several pixels, of which pooling keeps as little as elsewhere; one repeated would stay.
    """
    for axis in range(-spanned(z), 0):
        length = z.shape[axis]
        missing = -length % multiple
        if missing:  # to and fro, again and again where the picture is small
            places = torch.arange(length + missing, device=z.device) % (2 * length)
            z = z.index_select(axis, torch.minimum(places, 2 * length - 1 - places))
    return z


def crop(z: Tensor, *size: int) -> Tensor:
    """The first so many along each of the last axes: rows and columns."""
    return z if z.shape[-len(size) :] == size else z[(..., *map(slice, size))]


@dataclass(frozen=True)
class TokenLayout:
    """Which latent pixels each token covers: squares, ``scale`` times as wide as the model's own patches."""

    grid: tuple[int, ...]
    """Rows and columns of tokens; of audio their number alone."""
    scale: int = 1
    positions: Positions = "grid"
    """``grid`` counts on by one from token to token, as on a smaller image; ``interpolated`` gives centres."""

    @classmethod
    def of(cls, latents: Tensor, patch: int, scale: int = 1, positions: Positions = "grid") -> TokenLayout:
        """Of latents ``[B, C, ..., H, W]`` that are cut into ``patch x patch`` squares, of the coarse grid if s > 1."""
        return cls(tuple(n // patch for n in latents.shape[-spanned(latents) :]), scale, positions)

    def places(self, origin: Sequence[float] = (), spacing: float = 1.0, device: Any = None) -> Tensor:
        """Row and column of each token ``[N, 2]``, of audio its moment ``[N, 1]``; float32.

        Args:
            origin, spacing: Of the model's own patches: where they begin, by default at 0, and how far apart they are.
        """
        step, offset = (self.scale, (self.scale - 1) / 2) if self.positions == "interpolated" else (1, 0.0)
        begins = origin or [0.0] * len(self.grid)
        axes = (
            begin + spacing * (offset + step * torch.arange(n, device=device))
            for begin, n in zip(begins, self.grid, strict=True)
        )
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).float().flatten(0, -2)

    def video_places(self, frames: int, device: Any = None) -> Tensor:
        """Frame, row and column of each token of a video ``[F N, 3]``, float32."""
        places = self.places(device=device)
        frame = torch.arange(frames, device=device).float().repeat_interleave(len(places))
        return torch.cat([frame[:, None], places.repeat(frames, 1)], dim=1)


@cache
@torch.autocast("cpu", enabled=False)
@torch.inference_mode(False)  # Autograd refuses tensors made in inference mode, and these are kept.
def resize_matrices(
    patch_size: int, scale: int, start: Start, axes: int = 2, device: Any = "cpu"
) -> tuple[Tensor, Tensor]:
    """Matrices that shrink a large patch to a small one and grow it back.

    ``noise-consistent``: average pooling and repetition. ``bilinear``: U is bilinear resizing and M its
    pseudo-inverse, so that ``M U = 1``; applied to the latents this equals resizing the embedding's weights
    (PI-resize, FlexiViT, arXiv 2212.08013, section 3.4).

    Args:
        axes: That a patch spans, see `spanned`; with one, resizing is linear.
        device: Where they lie; a copy in each step would make the host wait for the GPU.

    Returns:
        ``M [p p, s p s p]`` and ``U [s p s p, p p]``, float32.
    """
    pixels = patch_size**axes
    basis = torch.eye(pixels, dtype=torch.float32, device="cpu").reshape(pixels, 1, *[patch_size] * axes)
    if start == "noise-consistent":
        up = F.interpolate(basis, scale_factor=float(scale), mode="nearest").reshape(pixels, -1).T
        down = up.T / scale**axes
    else:
        mode = "linear" if axes == 1 else "bilinear"
        up = F.interpolate(basis, scale_factor=float(scale), mode=mode, align_corners=False).reshape(pixels, -1).T
        down = torch.linalg.pinv(up)
    return down.contiguous().to(device), up.contiguous().to(device)


def resize(z: Tensor, matrix: Tensor) -> Tensor:
    """Resize every patch of a latent by a matrix of `resize_matrices`; the grid must divide."""
    out, into = (round(n ** (1 / spanned(z))) for n in matrix.shape)
    with torch.autocast(z.device.type, enabled=False):  # latents need their precision, whatever the model has
        return join(cut(z, into) @ matrix.T.to(z), out)


def shrink(z: Tensor, scale: int, patch_size: int, start: Start) -> Tensor:
    """``[B, C, ..., H, W] -> [B, C, ..., H/s, W/s]``."""
    return resize(z, resize_matrices(patch_size, scale, start, spanned(z), z.device)[0])


def grow(z: Tensor, scale: int, patch_size: int, start: Start) -> Tensor:
    """``[B, C, ..., H/s, W/s] -> [B, C, ..., H, W]``."""
    return resize(z, resize_matrices(patch_size, scale, start, spanned(z), z.device)[1])


def detail(z: Tensor, scale: int) -> Tensor:
    """What average pooling by ``scale`` loses: ``z - U D z``; the grid must divide."""
    # Slices are added and whole rows subtracted: less than half the time of avg_pool2d and of squares of pixels.
    axes, mean = spanned(z), z
    for axis in range(-axes, 0):
        mean = reduce(torch.add, mean.unflatten(axis, (-1, scale)).unbind(axis))
    mean = mean / scale**axes
    for axis in range(1 - axes, 0):
        mean = mean.repeat_interleave(scale, axis)
    return (z.unflatten(-axes, (-1, scale)) - mean.unsqueeze(-axes)).flatten(-1 - axes, -axes)


def detail_variance(clean: Tensor, scale: int, patch_size: int) -> Tensor:
    """Variance per channel ``[C]`` of `detail`, whose mean is zero, in clean latents ``[B, C, ..., H, W]``."""
    lost = detail(pad_to_multiple(clean.float(), scale * patch_size), scale)
    return lost.square().transpose(0, 1).flatten(1).mean(1)


def noise_divisor(z: Tensor, scale: int) -> float:
    """By what pooling latents like ``z`` divides the noise's deviation: the root of how many values are averaged.

    That is ``s`` where patches span height and width, and ``sqrt(s)`` where they span time alone.
    """
    return math.sqrt(scale ** spanned(z))


def consistent_level(sigma: Tensor, divisor: float) -> tuple[Tensor, Tensor]:
    """Factor ``a`` and noise level ``sigma'`` that make pooled latents a noisy latent again.

    Pooling divides the noise's deviation by ``d`` (`noise_divisor`): ``D z = (1 - sigma) D x + (sigma / d) eps``. Times
    ``a = 1 / ((1 - sigma) + sigma / d)`` the weights add up to one again, at ``sigma' = a sigma / d``.
    """
    factor = 1 / ((1 - sigma) + sigma / divisor)
    return factor, factor * sigma / divisor


def coarse_input(z: Tensor, sigma: Tensor, scale: int, patch_size: int, start: Start) -> tuple[Tensor, Tensor]:
    """Latents and noise level that the model is called with on the coarse grid.

    Args:
        z: Noisy latents ``[B, C, ..., H, W]``; H and W are multiples of ``s p``.
        sigma: Noise level ``[B]``.

    Returns:
        Latents ``[B, C, ..., H/s, W/s]`` and noise level ``[B]``.
    """
    small = shrink(z, scale, patch_size, start)
    if start == "bilinear":
        return small, sigma
    factor, level = consistent_level(sigma, noise_divisor(z, scale))
    return small * expand(factor, z), level


def patch_features(z: Tensor, sigma: Tensor, scale: int, start: Start) -> Tensor:
    """What an adapter sees beside the pooled latents, on the fine grid: channels at the size of unit noise or below.

    Args:
        z: Noisy latents ``[B, C, ..., H, W]``; sigma: their noise level ``[B]``.
    """
    return z if start == "bilinear" else z * expand(consistent_level(sigma, noise_divisor(z, scale))[0], z)


def low_velocity(small: Tensor, output: Tensor, sigma: Tensor, scale: int, start: Start) -> Tensor:
    """Velocity of what pooling keeps, from the model's answer on the coarse grid.

    ``bilinear`` takes the answer as it is. ``noise-consistent`` splits it: with ``x_lo = z' - sigma' v'`` and
    ``e_lo = (z' + (1 - sigma') v') / d`` the velocity is ``e_lo - x_lo``.

    Args:
        small, output: The model's input and answer ``[B, C, ..., H/s, W/s]``.
        sigma: Noise level of the latents on the fine grid ``[B]``.

    Returns:
        ``[B, C, ..., H/s, W/s]``, for `grow`.
    """
    if start == "bilinear":
        return output
    divisor = noise_divisor(small, scale)
    level = expand(consistent_level(sigma, divisor)[1], small)
    return (small + (1 - level) * output) / divisor - (small - level * output)


def detail_velocity(z: Tensor, sigma: Tensor, scale: int, variance: Tensor | None) -> Tensor:
    """Velocity of what pooling loses: a Wiener estimate where nothing better is known.

    With ``P = 1 - U D``, ``P z = (1 - sigma) x_d + sigma e_d``. The detail ``x_d`` is taken for Gaussian around zero;
    the velocity is ``(P z - x_d) / sigma``.

    Args:
        z: Noisy latents ``[B, C, ..., H, W]``; sigma: their noise level ``[B]``, above 0.
        variance: Variance of the detail ``[C]``; ``None`` is zero.
    """
    seen, sigma = detail(z, scale), expand(sigma, z)
    if variance is None:
        return seen / sigma
    h = variance.to(z, non_blocking=True).reshape(-1, *[1] * (z.ndim - 2))
    gain = (1 - sigma) * h / ((1 - sigma) ** 2 * h + sigma**2 * (1 - 1 / scale ** spanned(z)))
    return (1 - gain) * seen / sigma


def expand(values: Tensor, like: Tensor) -> Tensor:
    """``[B] -> [B, 1, ..., 1]`` with as many axes as ``like``, in its dtype."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))


def pool_tokens(x: Tensor, grid: Sequence[int], scale: int) -> Tensor:
    """Mean over the tokens of a picture (grid of rows, columns) in each large patch: ``[B, N, D] -> [B, N/s s, D]``."""
    z = pad_to_multiple(rearrange(x, "b (h w) d -> b d h w", h=grid[0]), scale)
    return rearrange(F.avg_pool2d(z, scale), "b d h w -> b (h w) d")


def coarse_grid(grid: Sequence[int], scale: int) -> tuple[int, ...]:
    """Rows and columns of large patches that cover a grid of the model's own."""
    return tuple(-(-n // scale) for n in grid)


def pool_packed(tokens: Tensor, patch: int, grid: Sequence[int], scale: int) -> Tensor:
    """Tokens of a picture ``[B, N, C p p]`` after its latents were pooled: ``[B, N/s s, C p p]``."""
    size = [n * patch for n in grid]
    z = unpack(tokens, patch, (len(tokens), tokens.shape[-1] // patch**2, *size))
    return pack(shrink(pad_to_multiple(z.float(), scale * patch), scale, patch, "noise-consistent").to(tokens), patch)


def where_rows(chosen: Sequence[bool], new: Tensor, old: Tensor) -> Tensor:
    """``new`` for the chosen samples of a batch, ``old`` for the others; both ``[B, ...]``."""
    if all(chosen):
        return new
    return torch.where(expand(torch.tensor(list(chosen)), new).bool(), new, old) if any(chosen) else old


def scatter_rows(part: Tensor, samples: Sequence[int], batch: int, onto: Tensor | None = None) -> Tensor:
    """What is known of some samples ``[len(samples), ...]`` at their places in the batch, on what was there or zero."""
    if len(samples) == batch:
        return part
    under = part.new_zeros(batch, *part.shape[1:]) if onto is None else onto
    return under.index_put((torch.tensor(list(samples), device=part.device),), part)


def period(z: Tensor) -> int:
    """After how many samples a batch ``[B, ...]`` begins again: fewer than B where guidance is stacked in one call."""
    return next(n for n in range(1, len(z) + 1) if len(z) % n == 0 and same(z[n:], z[:-n]))


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; NaN is itself."""
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
