"""Muon (https://kellerjordan.github.io/posts/muon), matrices of one shape at a time.

`torch.optim.Muon` goes through the matrices one by one and always computes in bfloat16, which some CPUs emulate.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal; steps as large as AdamW's (https://arxiv.org/abs/2502.16982)."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, params in shapes.items():
                for p in params:
                    self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                # Nesterov: the gradient counts once more.
                ahead = [torch.lerp(p.grad, self.state[p]["momentum"], group["momentum"]) for p in params]
                scale = 0.2 * max(shape) ** 0.5
                for p, update in zip(params, orthogonal(torch.stack(ahead)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly the closest orthogonal matrices to ``[K, m, n]``, by five Newton-Schulz steps."""
    x = matrices.bfloat16() if multiplies_bfloat16(matrices.device.type) else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)


def multiplies_bfloat16(device: str) -> bool:
    """Whether a device has instructions for it: GPUs, and CPUs with tile registers (AMX) or AVX-512's (Zen 4 on)."""
    has = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
    return device != "cpu" or any(answer is not None and answer() for answer in has)
