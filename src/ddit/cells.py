"""Which tokens a mixed step has: small patches where a picture is liveliest, large ones elsewhere. Pure tensors.

Letters as in `ddit.patches`; N tokens of the model's own grid, of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddit.patches import cut, unpack


class Cells(NamedTuple):
    """Which tokens a mixed step has: large patches, and of the others the model's own patches inside them."""

    large: Tensor
    """``[n]``, places of tokens on the coarse grid"""
    small: Tensor
    """``[m]``, places of tokens on the model's own grid"""
    inside: int
    """Small patches in a large one."""

    @property
    def all_large(self) -> int:
        """Number of tokens of the coarse grid."""
        return len(self.large) + len(self.small) // self.inside

    def gather(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Tokens of both grids ``[B, N/s s + others, D]`` and ``[B, N, D]`` in a mixed step; ``others`` stay behind."""
        return torch.cat([coarse[:, self.large], fine[:, self.small], coarse[:, self.all_large :]], dim=1)

    def scatter_large(self, tokens: Tensor) -> Tensor:
        """The first ``n`` of tokens in `gather`'s order, on the coarse grid ``[B, N/s s, D]``, zero elsewhere."""
        grid = tokens.new_zeros(len(tokens), self.all_large, tokens.shape[2])
        return grid.index_copy(1, self.large, tokens[:, : len(self.large)])

    def scatter_small(self, tokens: Tensor) -> Tensor:
        """The ``m`` behind these, on the model's own grid ``[B, N, D]``, zero elsewhere."""
        grid = tokens.new_zeros(len(tokens), self.all_large * self.inside, tokens.shape[2])
        return grid.index_copy(1, self.small, tokens[:, len(self.large) :][:, : len(self.small)])

    def covered(self, patch: int, shape: Sequence[int]) -> Tensor:
        """Where small patches lie ``[1, 1, H, W]``, in latents of this shape."""
        tokens = torch.zeros(1, self.all_large * self.inside, patch**2, dtype=torch.bool, device=self.small.device)
        return unpack(tokens.index_fill(1, self.small, True), patch, (1, 1, *shape[2:]))


def inner_variance(z: Tensor, side: int) -> Tensor:
    """Variance inside each ``side x side`` square of latents ``[B, C, ..., H, W]``, mean over channels, ``[B, N]``."""
    return cut(z, side).var(-1, correction=0).mean(1).flatten(1)


def liveliest(variance: Tensor, grid: Sequence[int], scale: int, share: float) -> Cells:
    """The share of large patches with the largest variance ``[N]`` is cut into small ones; the host waits for nothing.

    Args:
        grid: Rows and columns of large patches.
    """
    order = variance.argsort(descending=True)
    count = round(share * len(order))
    own = torch.arange(len(order) * scale**2, device=order.device).reshape(1, 1, *(n * scale for n in grid))
    inside = cut(own, scale).reshape(len(order), -1)  # small patches of each large one
    return Cells(order[count:], inside[order[:count]].flatten(), scale**2)
