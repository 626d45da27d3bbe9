"""ACE-Step: patches along time, and what its calls have of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ddit
import tiny_audio
from ddit import FixedSchedule, PatchSchedule, SkipSchedule
from ddit.coarse import coarse_call
from ddit.config import Coarse
from ddit.models.base import UnsupportedCall
from families import call_of, check_flops, check_large_patches
from test_architectures import CASES, draw


@pytest.fixture(scope="module")
def pipe():
    return tiny_audio.pipeline()


def test_an_odd_number_of_latents(pipe):
    """37 latents are 19 tokens, the last one half empty; large patches are 10 and 5."""
    case = CASES["ace-step-repaint"]
    check_large_patches(pipe, lambda: draw(pipe, case))
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 2, 4, 1))) as run:
        assert draw(pipe, case).shape == (1, 37, 4)
    assert run.report.tokens == {1: 19, 2: 10, 4: 5}
    arch, inputs, _ = call_of(pipe, "ace-step-repaint")
    check_flops(pipe, arch.rows(inputs, [0]), run.report)


@pytest.mark.parametrize("scale", [2, 4])
def test_the_noise_level_that_the_model_is_told_falls_by_the_root_of_the_scale(pipe, scale):
    arch, inputs, _ = call_of(pipe, "ace-step")
    half = arch.renoised(inputs, arch.read(inputs).latents, torch.full((2,), 0.5))
    call = coarse_call(arch, half, arch.read(half), scale, Coarse())
    small = 0.5 / scale**0.5
    for name in ("timestep", "timestep_r"):
        torch.testing.assert_close(call.inputs[name], torch.full((2,), small / (0.5 + small)))


def test_source_and_mask_are_pooled(pipe):
    """The latents of a source, and the mask of what to make anew, lie on the latents' grid."""
    arch, inputs, _ = call_of(pipe, "ace-step-repaint")
    noisy = arch.read(inputs)
    assert noisy.condition is not None and noisy.condition.shape == (2, 8, 37)
    assert set(noisy.condition[:, 4:].unique().tolist()) == {0.0, 1.0}
    small = coarse_call(arch, inputs, noisy, 2, Coarse()).inputs["context_latents"].mT
    mirrored = torch.cat([noisy.condition, noisy.condition[..., -3:].flip(-1)], -1)
    torch.testing.assert_close(small, F.avg_pool1d(mirrored, 2))


@pytest.mark.parametrize("name", ["ace-step", "ace-step-turbo"])
def test_steps_are_skipped_beside_large_patches(pipe, name):
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 1, 1, 2)), skip=SkipSchedule(speedup=3)) as run:
        assert torch.isfinite(draw(pipe, CASES[name], num_inference_steps=12)).all()
    assert {0, 2} <= set(run.report.scales[0])


def test_the_guard_knows_that_nobody_has_measured_sound(pipe):
    """Large patches only near pure noise; less so with the variance that was measured."""
    used = []
    for detail in (None, {2: [0.02] * 4, 4: [0.05] * 4}):
        with ddit.apply(pipe, patches=PatchSchedule(threshold=1e9), detail_variance=detail) as run:
            draw(pipe, CASES["ace-step"], num_inference_steps=30)
        used.append(sum(scale > 1 for scale in run.report.scales[0]))
        assert run.report.scales[0][-1] == 1
    assert 0 < used[0] < used[1]


def test_a_mean_velocity_is_held_at_full_steps(pipe):
    arch, inputs, _ = call_of(pipe, "ace-step")
    with pytest.raises(UnsupportedCall, match="mean velocity"):
        arch.read({**inputs, "timestep_r": inputs["timestep_r"] / 2})


def test_patches_of_another_size_are_held_at_full_steps():
    pipe = tiny_audio.pipeline(patch_size=4)
    with ddit.apply(pipe, patches=FixedSchedule(steps=(2,))) as run, pytest.warns(UserWarning, match="are 4 long"):
        draw(pipe, CASES["ace-step"])
    assert set(run.report.scales[0]) == {1}


def test_positions_reach_checkpointed_blocks(pipe):
    """Those are called without names of arguments."""
    arch, inputs, _ = call_of(pipe, "ace-step")
    coarse = Coarse(positions="interpolated")
    model = tiny_audio.transformer()
    arch = type(arch)(model)
    call = coarse_call(arch, inputs, arch.read(inputs), 2, coarse)
    answers = []
    for on in (False, True):
        model.gradient_checkpointing = on
        model._gradient_checkpointing_func = lambda block, *args: block(*args)
        with arch.placed(call.layout):
            answers.append(model(**call.inputs)[0])
    assert torch.equal(*answers) and not torch.allclose(answers[0], model(**call.inputs)[0])
