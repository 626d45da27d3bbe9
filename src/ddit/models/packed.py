"""What models have in common whose pipelines pack latents into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ddit.models.base import Architecture, Inputs, Noisy
from ddit.patches import pack, pool_packed, unpack


class PackedArchitecture(Architecture):
    """One whose pipeline packs squares of latent pixels into tokens ``[B, N, C p p]`` for the transformer.

    Further features of a token are a condition. Tokens behind those of the grid are reference images'. Models are
    trained to find what belongs together at the same positions, so references are pooled with the image.
    """

    def unpacked(self, tokens: Tensor, sigma: Tensor, grid: Sequence[int]) -> Noisy:
        """What tokens ``[B, N + references, (C + K) p p]`` say about a grid of (..., rows, columns)."""
        *frames, rows, columns = grid
        size = (*frames, rows * self.patch_size, columns * self.patch_size)
        channels = tokens.shape[-1] // self.patch_size**2
        z = unpack(self.own(tokens, prod(grid)), self.patch_size, (len(tokens), channels, *size))
        return Noisy(z[:, : self.channels], sigma, z[:, self.channels :] if channels > self.channels else None)

    def packed(self, noisy: Noisy, references: Tensor) -> Tensor:
        """The inverse, with the tokens ``[B, references, (C + K) p p]`` behind."""
        parts = [noisy.latents] if noisy.condition is None else [noisy.latents, noisy.condition.to(noisy.latents)]
        tokens = pack(torch.cat(parts, dim=1), self.patch_size)
        return torch.cat([tokens, references.to(tokens)], dim=1) if references.shape[1] else tokens

    def pooled_references(self, tokens: Tensor, grids: Sequence[Sequence[int]], scale: int) -> Tensor:
        """Tokens of images of so many rows and columns, one behind the other, as they go with a coarse grid."""
        if scale == 1 or not grids:
            return tokens
        images = tokens.split([prod(grid) for grid in grids], dim=1)
        pooled = (pool_packed(x, self.patch_size, grid, scale) for x, grid in zip(images, grids, strict=True))
        return torch.cat(list(pooled), dim=1)

    def velocity(self, output: Tensor, size: Sequence[int]) -> Tensor:
        tokens = self.own(output, prod(size) // self.patch_size**2)
        return unpack(tokens, self.patch_size, (len(output), self.channels, *size))

    def output(self, velocity: Tensor, inputs: Inputs) -> Tensor:
        tokens = pack(velocity, self.patch_size)
        others = inputs[self.batched[0]].shape[1] - tokens.shape[1]
        return torch.cat([tokens, tokens.new_zeros(len(tokens), others, tokens.shape[2])], dim=1) if others else tokens
