"""What tests of `ddit.apply` share: schedules, calls of a bare transformer, and what they look at."""

import inspect
import itertools
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ddit
from ddit import FixedSchedule, PatchAdapter, PatchSchedule, SkipSchedule
from ddit.config import FULL
from ddit.skip.skipper import Skipper

PLAIN = PatchSchedule(threshold=0.0)
COARSE = PatchSchedule(threshold=1e9, careful=False)
"""Large patches as soon as the rule may."""
STEPS = 8
GUIDED: dict[str, Any] = dict(negative_prompt="", true_cfg_scale=2.0)


def fixed(*steps: int) -> FixedSchedule:
    return FixedSchedule(steps=steps)


class Record:
    """Stands before a transformer's own forward and keeps the arguments of every call, and its FLOPs."""

    def __init__(self, transformer, count_flops=False):
        self.calls, self.flops, self.raises = [], [], False
        original = transformer.forward

        def forward(*args, **kwargs):
            self.calls.append(inspect.signature(original).bind(*args, **kwargs).arguments)
            if self.raises:
                raise RuntimeError("broken")
            if not count_flops:
                return original(*args, **kwargs)
            # The counter does not know the CPU's fused attention.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                result = original(*args, **kwargs)
            self.flops.append(counter.get_total_flops())
            return result

        transformer.forward = forward

    @property
    def tokens(self) -> list[int]:
        return [call["hidden_states"].shape[1] for call in self.calls]


def call_inputs(batch=1, grid=(4, 4), sigma=0.5, seed=0, features=16, origin=(0, 0), **kwargs):
    """Arguments of a direct call of the tiny transformer."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(*(torch.arange(n) + o for n, o in zip(grid, origin, strict=True)), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    return dict(
        hidden_states=torch.randn(batch, len(ids), features, generator=g),
        encoder_hidden_states=torch.randn(batch, 5, 32, generator=g),
        pooled_projections=torch.randn(batch, 32, generator=g),
        timestep=torch.full((batch,), sigma),
        img_ids=ids,
        txt_ids=torch.zeros(5, 3),
        **kwargs,
    )


@torch.no_grad()
def denoise(transformer, steps=STEPS, sigma=1.0, **kwargs):
    """Euler steps on a bare transformer."""
    inputs = call_inputs(**kwargs)
    z, level = inputs["hidden_states"], torch.linspace(sigma, 0, steps + 1)
    for now, then in itertools.pairwise(level):
        inputs |= dict(hidden_states=z, timestep=now.expand(len(z)))
        z = z + (then - now) * transformer(**inputs).sample
    return z


def noise(batch, tokens=64, seed=0):
    return torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(seed))


def facts(pipe):
    """Every attribute of a pipeline and of all modules of its transformer, by identity."""
    own = {"_num_timesteps", "_joint_attention_kwargs"}  # made anew in every call
    result = {("pipe", name): name in own or id(value) for name, value in vars(pipe).items()}
    for path, module in pipe.transformer.named_modules():
        for name, value in vars(module).items():
            result[path, name] = id(value)
            if isinstance(value, dict):
                result |= {(path, name, k): id(v) for k, v in value.items()}
    return result


def kept(handle) -> int:
    """Numbers in the tensors that a handle holds beside the model, shared ones counted once."""
    numbers: dict[int, int] = {}
    looked: dict[int, Any] = {}

    def look(value: Any) -> None:
        if isinstance(value, torch.nn.Module | DiffusionPipeline | type) or callable(value) or id(value) in looked:
            return
        if isinstance(value, torch.Tensor):
            if value.device.type != "meta":
                numbers[value.data_ptr()] = value.numel()
            return
        looked[id(value)] = value
        if isinstance(value, dict):
            members = list(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            members = list(value)
        else:
            members = list(getattr(value, "__dict__", {}).values())
        for member in members:
            look(member)

    look(handle)
    return sum(numbers.values())


def random_adapter(model) -> PatchAdapter:
    """An adapter that changes something."""
    torch.manual_seed(0)
    adapter = PatchAdapter.for_model(model, rank=2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return adapter


class Listed:
    """Skips where the sample's list says 0."""

    watches = False

    def __init__(self, *samples):
        self.samples = samples

    def choose(self, context, moved, called):
        return [sample[context.step] == 0 for sample in self.samples]


def skipping(pipe, *samples):
    """Full steps and skipped ones, listed for each sample."""
    handle = ddit.apply(pipe, patches=FULL, skip=SkipSchedule(threshold=0.01))
    handle.plan = replace(handle.plan, make_skipper=lambda: Skipper(Listed(*samples)))
    return handle
