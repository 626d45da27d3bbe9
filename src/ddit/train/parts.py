"""What is trained, by which optimizer, and its gradients over several processes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ddit.adapter import PatchAdapter
from ddit.train.config import TrainConfig
from ddit.util.extras import require

KEPT = ("base_hash", "scales", "rank", "start", "positions", "residual", "size_vector", "layers")
"""What an adapter keeps when it is trained on."""


def attention_backends(device: str) -> list[SDPBackend]:
    """By which attention goes backwards on a type of device.

    Not cuDNN's, which failed or gave NaN on sequences of 40 and 88 tokens (H200, PyTorch 2.11). A CPU's flash attention
    takes up to four times as long as plain products on sequences that short, and trains on no longer ones.
    """
    if device == "cpu":
        return [SDPBackend.MATH]
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def earlier_adapter(transformer: Any, config: TrainConfig) -> PatchAdapter | None:
    """The adapter to train on from, if any.

    Raises:
        ValueError: When it can't be loaded, or is of another kind than is asked for.
    """
    if config.adapter is None:
        return None
    earlier = PatchAdapter.from_pretrained(config.adapter)
    new = PatchAdapter.for_model(transformer, **config.adapter_settings)
    has, asked = (json.loads(json.dumps({name: part.config[name] for name in KEPT})) for part in (earlier, new))
    other = [f"{name} {has[name]} where {asked[name]} is asked for" for name in KEPT if has[name] != asked[name]]
    if other:
        raise ValueError(f"adapter {config.adapter} has {', '.join(other)}; ask for what it has, or train a new one")
    return earlier


def as_learnt(config: TrainConfig, earlier: PatchAdapter | None) -> TrainConfig:
    """With the noise levels of the adapter that training goes on from, where nobody asks for others."""
    if config.min_sigma is not None or earlier is None:
        return config
    known = earlier.config["min_sigma"] or {}  # a scale without an entry was learnt at all of them
    return replace(config, min_sigma=tuple(known.get(str(scale), 0.0) for scale in config.scales))


def new_adapter(
    transformer: Any,
    config: TrainConfig,
    *,
    detail_variance: Mapping[int, Sequence[float]] | None = None,
    earlier: PatchAdapter | None = None,
) -> PatchAdapter:
    """What is to be trained, for a transformer; an earlier adapter lends its weights."""
    adapter = PatchAdapter.for_model(transformer, **config.adapter_settings, detail_variance=detail_variance)
    if earlier is not None:
        adapter.load_state_dict(earlier.state_dict())
    return adapter


def make_optimizer(part: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Prodigy (arXiv 2306.06101) or AdamW over all weights."""
    parameters = list(part.parameters())
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    require("prodigyopt", "the optimizer Prodigy")
    from prodigyopt import Prodigy

    make: Any = Prodigy  # its annotations take whole numbers only
    return make(
        parameters,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        use_bias_correction=True,
        safeguard_warmup=True,
    )


def make_lr(optimizer: torch.optim.Optimizer, config: TrainConfig) -> Any:
    """The schedule of the learning rate."""
    kind = f"{config.lr_schedule}_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
    return get_scheduler(kind, optimizer, num_warmup_steps=config.lr_warmup, num_training_steps=config.steps)


def sum_over_processes(accelerator: Accelerator, part: nn.Module, loss: Tensor) -> None:
    """Sum gradients and loss in place. What no sample drew has a gradient of zero."""
    for p in part.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if accelerator.num_processes > 1:
        sums: list[Any] = [loss, *(p.grad for p in part.parameters())]
        reduced: Any = accelerator.reduce(parameters_to_vector(sums), reduction="sum")
        vector_to_parameters(reduced, sums)
