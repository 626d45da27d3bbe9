"""Floating-point operations of one call of a transformer from the sizes of its layers; nothing is run.

A linear layer with m inputs and n outputs takes 2 m n operations per row that it sees, attention of width w takes
4 N_q N_k w for N_q queries and N_k keys; all else is small beside them. These are the operations that
`torch.utils.flop_counter.FlopCounterMode` counts. Sizes of layers come from the transformer, numbers of rows from the
inputs of the call; which layer sees which rows is what an architecture declares, a `Costs`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

Kind = str
"""What the rows are that a layer sees, see `lengths`; a family may have further ones."""

_ENCODED_TEXT = 512
"""Of the context of Wan, the last rows that are text to a layer with keys of their own for the picture."""


class Costs(NamedTuple):
    """Which rows the layers of an architecture see. A layer that no pattern matches in full is not counted."""

    rows: tuple[tuple[str, Kind], ...]
    """Patterns of names of linear layers and patch convolutions, the first match counts -> what they see."""
    attention: tuple[tuple[str, Kind, Kind], ...]
    """Patterns of names of layers as wide as the attention they serve, one per attention -> its queries, its keys."""


class Counted(Protocol):
    """What counting needs of `ddit.models.base.Architecture`."""

    transformer: nn.Module
    batched: ClassVar[tuple[str, ...]]
    timestep: ClassVar[str]
    costs: ClassVar[Costs]

    def tokens(self, inputs: dict[str, Any]) -> int: ...

    def further_rows(self, inputs: dict[str, Any]) -> dict[Kind, int]: ...


def count(
    architecture: Counted, inputs: dict[str, Any], adapter_config: Mapping[str, Any] | None = None, scale: int = 1
) -> int:
    """Floating-point operations of one call.

    Args:
        inputs: Arguments of the call by name, at this scale; of the tensors only the shapes are read. Those of more
            samples than one cost as many times as much.
        adapter_config: Configuration of a `ddit.adapter.PatchAdapter`, counted along at scales above 1.
    """
    costs, length, total = architecture.costs, lengths(architecture, inputs), 0
    for name, layer in layers(architecture.transformer):
        kind = _kind(costs, name)
        if kind is not None:
            total += 2 * _size(layer) * length[kind]
        for pattern, queries, keys in costs.attention:
            if re.fullmatch(pattern, name):
                total += 4 * length[queries] * length[keys] * layer.out_features
    if adapter_config is not None and scale > 1:
        total += _count_adapter(costs, length, adapter_config, scale)
    return total * len(inputs[architecture.batched[0]])


def lengths(architecture: Counted, inputs: dict[str, Any]) -> dict[Kind, int]:
    """Rows per sample of each kind in a call.

    ``image`` are the tokens of what is drawn, ``text`` those of the prompt, ``joint`` both; ``sample`` is one row,
    ``time`` one for each noise level. ``picture`` are the tokens of a picture given beside the prompt; Wan's blocks get
    them and the text as one context, which they cut into ``added`` (rows with keys of their own) and ``context``.
    """
    config: Any = architecture.transformer.config
    samples = len(inputs[architecture.batched[0]])
    image, text = architecture.tokens(inputs), _rows(inputs.get("encoder_hidden_states")) // samples
    picture = _rows(inputs.get("encoder_hidden_states_image")) // samples
    levels = inputs[architecture.timestep].numel() // samples * (2 if getattr(config, "zero_cond_t", False) else 1)
    added = 0
    if getattr(config, "added_kv_proj_dim", None) is not None:
        added = len(range(text + picture)[: text + picture - _ENCODED_TEXT])  # from the end, where the text is shorter
    return {
        "image": image,
        "text": text,
        "joint": image + text,
        "sample": 1,
        "time": levels,
        "picture": picture,
        "context": text + picture - added,
        "added": added,
        **architecture.further_rows(inputs),
    }


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and layers of all linear layers and convolutions, without the wrappers that peft puts around them."""
    left: list[tuple[str, Any]] = [("", model)]
    while left:
        name, module = left.pop()
        parts = module._modules
        if "base_layer" in parts:
            left.append((name, parts["base_layer"]))
        elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            yield name, module
        else:
            left += [(f"{name}.{key}" if name else key, part) for key, part in parts.items() if part is not None]


def _count_adapter(costs: Costs, length: Mapping[Kind, int], config: Mapping[str, Any], scale: int) -> int:
    """Operations of an adapter's parts at a scale: those per large patch, and LoRA per row of its layer.

    Tokens of reference images count as large patches here, though only LoRA sees them.
    """
    features, width = config["features"] * scale ** config["axes"], config["width"]
    total = 2 * length["image"] * (2 * features * width + (features**2 if config["residual"] else 0))
    for name, sizes in config["layers"].items():
        kind = _kind(costs, name)
        assert kind is not None, "feed-forward layers of an architecture are among those it declares"
        total += 2 * length[kind] * config["rank"] * sum(sizes)
    return total


def _kind(costs: Costs, name: str) -> Kind | None:
    return next((kind for pattern, kind in costs.rows if re.fullmatch(pattern, name)), None)


def _size(layer: Any) -> int:
    """Multiplications per row. A quantised weight may have another shape than its layer says."""
    return layer.in_features * layer.out_features if isinstance(layer, nn.Linear) else layer.weight.numel()


def _rows(x: Tensor | None) -> int:
    """Rows of ``[..., features]``."""
    return 0 if x is None else x.shape[:-1].numel()
