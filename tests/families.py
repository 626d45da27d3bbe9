"""What the tests of single families share."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ddit
from ddit import FixedSchedule
from ddit.coarse import call_at
from ddit.config import FULL, Coarse
from ddit.models import architecture_for
from ddit.pipelines.generate import recorded
from ddit.report import Report
from test_architectures import CASES, draw

COARSE = FixedSchedule(steps=(1, 2, 4, 2, 1))


def call_of(pipe: Any, name: str, **changes: Any) -> tuple[Any, dict[str, Any], Tensor]:
    """Architecture, arguments and answer of a pipeline's first call."""
    with recorded(pipe) as calls:
        draw(pipe, CASES[name], num_inference_steps=1, **changes)
    return architecture_for(pipe.transformer), *calls[0]


def check_large_patches(pipe: Any, drawn: Callable[[], Tensor]) -> None:
    """Off is bit-equal, before and after; large patches run in full, and another picture of the same shape comes."""
    plain = drawn()
    with ddit.apply(pipe, patches=FULL):
        assert torch.equal(drawn(), plain)
    with ddit.apply(pipe, patches=COARSE) as run:
        coarse = drawn()
    assert run.report.forced is None and {2, 4} <= set(run.report.scales[0])
    assert coarse.shape == plain.shape and torch.isfinite(coarse).all() and not torch.equal(coarse, plain)
    assert torch.equal(drawn(), plain)


def check_landing(pipe: Any, name: str, clean: Tensor, answers: Callable[..., Any]) -> None:
    """A model that knows the picture draws it as far as large patches show it, by its pipeline's signs and times.

    Args:
        clean: The picture ``[1, C, H, W]``.
        answers: Called in place of the model's forward with a function that gives the picture at the size of given
            latents, and with the arguments; independent of what ddit makes of them.
    """

    def known(z: Tensor) -> Tensor:
        return F.avg_pool2d(clean, clean.shape[-1] // z.shape[-1]).reshape(z.shape[-len(clean.shape) + 1 :])

    pipe.transformer.forward = lambda *args, **kwargs: answers(known, *args, **kwargs)
    for scale in (1, 2, 4):
        with ddit.apply(pipe, patches=FixedSchedule(steps=(scale,))):
            drawn = draw(pipe, CASES[name])
        shown = F.interpolate(F.avg_pool2d(clean, scale), scale_factor=float(scale))
        torch.testing.assert_close(drawn, shown, rtol=1e-3, atol=1e-3)


def check_flops(pipe: Any, inputs: dict[str, Any], report: Report) -> None:
    """Those of a report are PyTorch's count of the same call at each scale."""
    arch = architecture_for(pipe.transformer)
    for scale in (1, 2, 4):
        call = call_at(arch, inputs, scale, Coarse())
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            pipe.transformer(**call)
        assert report.flops[scale] == counter.get_total_flops()
