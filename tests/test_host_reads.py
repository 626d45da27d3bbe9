"""What makes the host wait for a GPU: numbers read from tensors, and tensors made of numbers, in each step."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ddit
import tiny
from ddit import FixedSchedule

WAITS = ("aten._local_scalar_dense", "aten.lift_fresh", "aten.equal", "aten._unique2", "aten.nonzero")


class Waits(TorchDispatchMode):
    """Counts operations that wait for a GPU, or copy to one."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).rsplit(".", 1)[0]
        if name in WAITS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def flux(pipe, steps):
    tiny.sample(pipe, steps=steps)


def wan(pipe, steps):
    embeds = {f"{name}prompt_embeds": torch.zeros(1, 6, 16) for name in ("", "negative_")}
    size = {"height": 64, "width": 96, "num_frames": 5}
    pipe(**embeds, **size, num_inference_steps=steps, guidance_scale=4.0, output_type="latent")


@pytest.mark.parametrize(("make", "sample", "passes"), [(tiny.pipeline, flux, 1), (tiny.wan_pipeline, wan, 2)])
def test_a_coarse_step_waits_once_and_twice_for_a_further_guidance_pass(make, sample, passes):
    pipe = make()

    def waits(steps, *schedule):
        with Waits() as mode, ddit.apply(pipe, patches=FixedSchedule(steps=schedule)):
            sample(pipe, steps)
        with Waits() as plain:
            sample(pipe, steps)
        return mode.found.total() - plain.found.total()

    few, more = (waits(n, 1, 1, 1, 2, 2, *[4] * (n - 5)) for n in (8, 12))
    assert more - few == 4 * (passes + passes - 1)  # a noise level each, and whether latents are those of the step
