"""How the arguments of a transformer's call lie in a file of samples.

A tensor with an axis of samples is ``row{record}/name``, a list with a tensor for each sample ``list{record}/name``,
any other tensor ``shared/name``. Prompts of several lengths are padded and masked.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddit.models.base import Inputs


def arguments(
    own: Inputs, record: int, batched: Sequence[str], optional: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of a call with a row or a list item for each sample, and those without, by their names in files.

    An optional mask that is not there is written too: other batches may have longer prompts.
    """
    rows: dict[str, Any] = {}
    shared: dict[str, Tensor] = {}
    for name, value in own.items():
        if is_list_of_tensors(value):
            rows[f"list{record}/{name}"] = value
        elif isinstance(value, Tensor) and name in batched:
            # One that serves all samples of a call (LongCat-Image's negative prompt) becomes theirs.
            rows[f"row{record}/{name}"] = value.expand(len(own[batched[0]]), *value.shape[1:])
        elif isinstance(value, Tensor):
            shared[f"shared/{name}"] = value
    for name in optional:
        if own.get(name) is None:
            prompts = own["encoder_hidden_states"]
            rows[f"row{record}/{name}"] = torch.ones(prompts.shape[:2], dtype=torch.bool)
    return rows, shared


def is_list_of_tensors(value: Any) -> bool:
    """Whether there is a tensor ``[length, features]`` for each sample: prompts of any lengths."""
    return isinstance(value, list) and value != [] and all(isinstance(x, Tensor) and x.ndim == 2 for x in value)


def optional_masks(transformer: Any, batched: Sequence[str]) -> list[str]:
    """Masks of prompts that a pipeline leaves out where no prompt of a batch is padded."""
    known = inspect.signature(transformer.forward).parameters
    masks = [name for name in batched if name.startswith("encoder_") and name.endswith("mask") and name in known]
    return [name for name in masks if known[name].default is None]


def padded(parts: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """What several batches or samples hold, along the axis of samples.

    Prompts of fewer tokens get zeros behind them, and so does their mask, by which the model leaves them out.

    Raises:
        ValueError: When the prompts of a model that takes no mask differ in length.
    """
    longest = {name: max(value.shape[1] for value in values) for name, values in parts.items() if values[0].ndim > 1}
    short = {name for name, length in longest.items() if any(value.shape[1] < length for value in parts[name])}
    if short and not any(name.endswith("mask") for name in short):
        raise ValueError(
            f"the prompts have different lengths ({', '.join(sorted(short))}) and this model takes no mask to tell "
            "them apart; take prompts of one length, or one at a time (sample_batch and batch 1)"
        )

    def whole(name: str, value: Tensor) -> Tensor:
        missing = longest[name] - value.shape[1]
        return F.pad(value, (*(0, 0) * (value.ndim - 2), 0, missing))

    return {
        name: torch.cat([whole(name, value) if name in short else value for value in values])
        for name, values in parts.items()
    }
