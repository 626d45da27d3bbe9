"""What the judges of pictures and of clips share: layers, what they see in training, their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Net = TypeVar("Net", bound=nn.Module)


def halve(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    """``[B, inputs, H, W]`` -> ``[B, outputs, H/2, W/2]``"""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.inner(x))


def disturb(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Do to pictures ``[B, 3, H, W]`` a little of what generating them might: shift, blur, tone, noise."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(pictures), 1, 1, 1, generator=generator)

    height, width = pictures.shape[2:]
    dx, dy = torch.randint(0, 5, (2,), generator=generator).tolist()
    x = F.pad(pictures, (2, 2, 2, 2), mode="reflect")[..., dy : dy + height, dx : dx + width]
    blur = uniform(0, 0.25)
    for dim in (2, 3):
        x = (1 - 2 * blur) * x + blur * (x.roll(1, dim) + x.roll(-1, dim))
    x = x * uniform(0.88, 1.1) + uniform(-0.08, 0.08)
    return x + uniform(0, 0.06) * torch.randn(x.shape, generator=generator)


@torch.no_grad()
def through(vae: Any, pictures: Tensor) -> Tensor:
    """Encode, decode and round to 8 bits ``[B, 3, ..., H, W]`` in [-1, 1], as what is generated would be."""
    decoded = vae.decode(vae.encode(pictures).latent_dist.mean).sample
    return (decoded.clamp(-1, 1) * 127.5).round() / 127.5


def load_judge(net: Net, folder: Path, knows: Callable[[Any], bool]) -> Net:
    """Weights from a folder, if its ``config.json`` tells of the grammar's words.

    Raises:
        ValueError: If not.
    """
    if not knows(json.loads((folder / "config.json").read_text())):
        raise ValueError(f"the detector in {folder} knows other words than the grammar has; train it again")
    net.load_state_dict(load_file(folder / "model.safetensors"))
    return net.eval()


def save_judge(net: nn.Module, folder: Path, config: dict[str, Any]) -> None:
    """Write float16 weights, and what is to be known of them."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
