"""Lumina 2: reversed time, prompts whose padding is left out, and guidance that ends early."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ddit
import tiny_lumina2
from ddit import FixedSchedule
from ddit.coarse import coarse_call
from ddit.config import FULL, Coarse
from ddit.models.base import first
from ddit.patches import TokenLayout
from families import COARSE, call_of, check_flops, check_landing
from test_architectures import CASES, draw
from tiny import embeds
from tiny_lumina2 import CALL

PADDED = {
    "prompt_embeds": embeds(1, 9),
    "negative_prompt_embeds": embeds(2, 9),
    "prompt_attention_mask": (torch.arange(9) < 6).long()[None],
    "negative_prompt_attention_mask": (torch.arange(9) < 2).long()[None],
}
"""Prompts of 6 and of 2 tokens, padded to 9."""


def test_a_model_that_knows_the_picture_draws_it():
    """Time runs from 0 to 1, the answer is x - eps."""

    def answers(known: Callable[..., Tensor], hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        return ((known(hidden_states)[None] - hidden_states) / (1 - timestep.reshape(-1, 1, 1, 1)),)

    clean = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(5))
    check_landing(tiny_lumina2.pipeline(), "lumina2", clean, answers)


def test_the_padding_of_a_prompt_is_cut_off_and_changes_nothing():
    pipe = tiny_lumina2.pipeline()
    arch, inputs, answer = call_of(pipe, "lumina2", **PADDED)
    small = coarse_call(arch, inputs, arch.read(inputs), 2, Coarse()).inputs
    assert small["encoder_hidden_states"].shape[1] == small["encoder_attention_mask"].shape[1] == 6
    one = arch.rows(inputs, [0])
    assert one["encoder_hidden_states"].shape[1] == 6
    torch.testing.assert_close(first(pipe.transformer(**one)), answer)
    whole = {**small, **{name: inputs[name] for name in ("encoder_hidden_states", "encoder_attention_mask")}}
    torch.testing.assert_close(first(pipe.transformer(**small)), first(pipe.transformer(**whole)))


def test_operations_are_those_of_calls_without_padding():
    pipe = tiny_lumina2.pipeline()
    arch, inputs, _ = call_of(pipe, "lumina2", **PADDED)
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 2, 4))) as run:
        draw(pipe, CASES["lumina2"], **PADDED)
    check_flops(pipe, arch.rows(inputs, [0]), run.report)


def test_centres_at_scale_one_are_the_models_own_behind_a_padded_prompt():
    pipe = tiny_lumina2.pipeline()
    arch, inputs, answer = call_of(pipe, "lumina2", **PADDED)
    with arch.placed(TokenLayout.of(arch.read(inputs).latents, 2, positions="interpolated")):
        torch.testing.assert_close(first(pipe.transformer(**inputs)), answer)


def test_guidance_that_ends_early():
    pipe = tiny_lumina2.pipeline()
    with ddit.apply(pipe, patches=COARSE) as run:
        truncated = draw(pipe, CASES["lumina2"], cfg_trunc_ratio=0.5)
        assert run.report.scales == [[1, 2, 4, 2, 1, 1, 1, 1]]
    assert torch.isfinite(truncated).all() and not torch.allclose(truncated, draw(pipe, CASES["lumina2"]))


def test_several_images_of_a_prompt_run_and_prompts_of_several_lengths_stay_at_full_steps():
    pipe = tiny_lumina2.pipeline()
    call = {**CALL, "guidance_scale": 1.0, "num_inference_steps": 6, "output_type": "latent", "return_dict": False}
    with ddit.apply(pipe, patches=COARSE) as run:
        assert len(pipe(**call, num_images_per_prompt=2)[0]) == 2
        assert run.report.scales == [[1, 2, 4, 2, 1, 1]] * 2
    parted = {name: torch.cat([PADDED[name], PADDED[f"negative_{name}"]]) for name in PADDED if "neg" not in name}
    call.update(parted, **{f"negative_{name}": value for name, value in parted.items()})
    plain = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    with (
        ddit.apply(pipe, patches=COARSE) as run,
        pytest.warns(UserWarning, match="prompts of several lengths lie in one call; give one at a time"),
    ):
        assert torch.equal(pipe(**call, generator=torch.Generator().manual_seed(0))[0], plain)
    assert run.report.scales == [[1] * 6] * 2


def test_patches_of_another_size_stay_at_full_steps():
    pipe = tiny_lumina2.pipeline(patch_size=4)
    with ddit.apply(pipe, patches=FULL), pytest.warns(UserWarning, match="patches are 4 wide, not 2"):
        draw(pipe, CASES["lumina2"])


def test_a_step_of_which_one_pass_alone_is_unsupported():
    """Prompts of several lengths, and negative ones of one: every step counts as a whole full one."""
    pipe = tiny_lumina2.pipeline()
    parted = {name: torch.cat([PADDED[name], PADDED[f"negative_{name}"]]) for name in PADDED if "neg" not in name}
    alike = {name: torch.cat([PADDED[name]] * 2) for name in PADDED if "neg" in name}
    call = {**CALL, **parted, **alike, "num_inference_steps": 6, "output_type": "latent", "return_dict": False}
    plain = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    with ddit.apply(pipe, patches=COARSE, speedup=2) as run, pytest.warns(UserWarning, match="several lengths"):
        assert torch.equal(pipe(**call, generator=torch.Generator().manual_seed(0))[0], plain)
    assert run.report.scales == [[1] * 6] * 2 and run.report.flops_fraction == 1
