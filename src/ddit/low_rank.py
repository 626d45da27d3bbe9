"""LoRA on single layers of a frozen model, one for each scale, of which the current scale's takes part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class LowRank(nn.Module):
    """LoRA (arXiv 2106.09685): ``x -> y + up(down(x))`` beside a layer ``x -> y``; nothing is added at first."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """``[..., outputs]``, in the dtype of y.

        Two kernels, and no calls of modules: in a coarse step of a large model the GPU waits for the host.
        """
        hidden = F.linear(x.to(y.dtype), self.down.weight.to(y.dtype))
        up = self.up.weight.T.to(y.dtype)
        rows, added = (z.reshape(-1, z.shape[-1]) for z in (y, hidden))
        return torch.addmm(rows, added, up).view_as(y).to(y.dtype)


@dataclass
class CurrentScale:
    """The scale whose LoRA takes part; 1 is none."""

    scale: int = 1


@dataclass
class LayerParts:
    """What a layer of the base knows of an adapter on it."""

    state: CurrentScale
    scales: dict[int, Any]
    """Scale -> `LowRank`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the layer has no adapter on it."""


class Hook:
    """A forward hook that a copy of its layer does not have."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        return self.run(layer, args, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _nothing


def _nothing(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """What a copied layer has in the place of a `Hook`."""


def put_on(layer: nn.Module, parts: LayerParts) -> RemovableHandle:
    """Let a layer add what belongs to the current scale."""
    # Past nn.Module's setattr: no submodule of the base, no weights in its state_dict.
    vars(layer)[_PARTS] = parts
    return layer.register_forward_hook(_ADDS)


def take_off(layer: nn.Module) -> None:
    """The inverse of `put_on`, beside the hook's own ``remove``."""
    vars(layer).pop(_PARTS, None)


def has_parts(layer: nn.Module) -> bool:
    """Whether an adapter is on a layer."""
    return vars(layer).get(_PARTS) is not None


def key(name: str) -> str:
    """A layer's name as one of a module, which holds no dots."""
    return name.replace(".", "/")


def _add(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Adds LoRA to a layer's output.

    One function for all layers, which finds its weights through the layer: compiled code of one block then serves
    all blocks of its class, where a closure per layer would be compiled anew for each.
    """
    parts: LayerParts = vars(layer)[_PARTS]
    if parts.state.scale == 1:
        return None
    return parts.scales[parts.state.scale].added(args[0], output)


_ADDS = Hook(_add)
"""The same for all layers, see `_add`."""

_PARTS = "_ddit_low_rank"
