"""What training an adapter takes, counted on the meta device from the configuration of the base."""

from __future__ import annotations

import re
import statistics
from typing import Any

import torch
from torch import nn

from ddit.coarse import call_at
from ddit.models import architecture_for
from ddit.pipelines.known import example, meta_transformer
from ddit.train.config import TrainConfig
from ddit.train.parts import make_optimizer, new_adapter


def plan(config: TrainConfig) -> dict[str, Any]:
    """Parameters, and bytes that stay on the device throughout (activations come on top).

    For a size, also operations: of one call of the base, and of one optimiser step. That is a forward of
    the coarse call, a backward as long (the base's weights get no gradients), and one more forward with gradient
    checkpointing.

    Raises:
        ValueError: When the base's configuration can't be read, or for a size that it does not take.
    """
    transformer = meta_transformer(config.model)
    with torch.device("meta"):
        trainee = new_adapter(transformer, config)
    parts: dict[str, int] = {}
    for name, p in trainee.named_parameters():
        part = name.split(".")[2]
        parts[part] = parts.get(part, 0) + p.numel()
    trained = sum(parts.values())
    started = sum(p.numel() for name, p in trainee.named_parameters() if _STARTED.search(name))
    # Prodigy keeps the first weights, but for those that are all zero.
    state = started * _state_per_parameter(config, 1.0) + (trained - started) * _state_per_parameter(config, 0.0)
    base = sum(p.numel() for p in transformer.parameters())
    bytes_used = {
        "base": base * WIDTH[config.dtype],
        "adapter": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": round(4 * state),
        "ema": 4 * trained if config.ema else 0,
    }
    sized = config.height is not None and config.width is not None
    return {
        **({"work": _work(config, transformer, trainee)} if sized else {}),
        "base": type(transformer).__name__,
        "base_parameters": base,
        "trains": trainee.noun,
        "adapter_parameters": trained,
        "adapter_parameters_by_part": parts,
        "adapter_file_bytes": {"float32": 4 * trained, "bfloat16": 2 * trained},
        "bytes": {**bytes_used, "total": sum(bytes_used.values())},
    }


RATE = 400e12
"""Operations in a second that the hours are told for: about two fifths of what an H100 can do in bfloat16."""
CALLS = 50
"""Of a sample. Latents and answers of each are kept, and where it ended."""
WIDTH = {"float32": 4, "bfloat16": 2}
"""Bytes of a number."""
FRAMES = 81
"""Of a clip, where nobody says; pictures have one whatever is asked for."""


def _work(config: TrainConfig, transformer: nn.Module, adapter: Any) -> dict[str, float]:
    assert config.height is not None and config.width is not None
    architecture = architecture_for(transformer)
    call = example(architecture, config.model, config.height, config.width, config.frames or FRAMES)
    coarse = {s: call_at(architecture, call, s, adapter.coarse) for s in config.scales}
    forward = statistics.mean(architecture.count_flops(c, s, adapter) for s, c in coarse.items())
    step = forward * config.batch * config.accumulation * (3 if config.gradient_checkpointing else 2)
    full = architecture.count_flops(call)
    hours = {"training_hours": config.steps * step / RATE / 3600, "drawing_hours": 1000 * CALLS * full / RATE / 3600}
    drawn = 1000 * (2 * CALLS + 1) * architecture.read(call).latents.numel() * WIDTH[config.dtype]
    return {"full_call": full, "optimizer_step": step, "steps": config.steps, **hours, "samples_bytes": drawn}


_STARTED = re.compile(r"down\.weight")
"""Names of parameters that are not zero at first."""


def _state_per_parameter(config: TrainConfig, value: float) -> float:
    """Numbers that the optimiser keeps for each parameter, seen on a small one that starts at ``value``."""
    probe: Any = nn.Linear(64, 64, bias=False)
    nn.init.constant_(probe.weight, value)
    optimizer = make_optimizer(probe, config)
    probe.weight.grad = torch.ones_like(probe.weight)
    optimizer.step()
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.numel() > 1]
    return sum(v.numel() for v in state) / probe.weight.numel()


def table(figures: dict[str, Any]) -> str:
    """The figures of `plan` for the screen."""
    lines = [
        f"{figures['base']}: {figures['base_parameters'] / 1e9:.2f} billion parameters, frozen",
        f"{figures['trains']}: {figures['adapter_parameters'] / 1e6:.1f} million parameters ("
        + ", ".join(f"{k} {v / 1e6:.1f}" for k, v in figures["adapter_parameters_by_part"].items())
        + ")",
    ]
    lines += [f"  {name:10} {value / 2**30:7.2f} GiB" for name, value in figures["bytes"].items()]
    if "work" in figures:
        work = figures["work"]
        rate = f"at {RATE / 1e12:.0f} TFLOP/s"
        lines += [
            f"  a step     {work['optimizer_step'] / 1e15:7.2f} PFLOP",
            f"  {work['steps']:,} steps take {work['training_hours']:.1f} h {rate}",
            f"  drawing 1,000 samples of {CALLS} calls first takes {work['drawing_hours']:.1f} h, "
            f"and {work['samples_bytes'] / 1e9:,.0f} GB of disk",
        ]
    else:
        lines.append("  --height and --width tell work, hours and disk as well")
    return "\n".join(lines)
