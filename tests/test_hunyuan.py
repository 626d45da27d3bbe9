"""HunyuanVideo and 1.5: what a coarse step sees of a video that begins with a picture, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

import ddit
import tiny_hunyuan
from ddit import FixedSchedule
from ddit.coarse import coarse_call, coarse_step
from ddit.config import Coarse
from ddit.models import architecture_for
from ddit.patches import expand, pad_to_multiple, shrink
from ddit.pipelines.generate import Method, run
from ddit.teacache import TeaCacheConfig
from families import call_of, check_flops
from test_architectures import CASES, draw

IMAGES = [name for name in tiny_hunyuan.CASES if "image" in name or "skyreels" in name]
REPLACED = "hunyuan-video-replaced"


def pooled(z: Tensor, scale: int, patch: int) -> Tensor:
    return shrink(pad_to_multiple(z.float(), scale * patch), scale, patch, "noise-consistent")


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("scale", [2, 4])
def test_a_condition_behind_the_latents_is_pooled(name, scale):
    arch, inputs, _ = call_of(CASES[name].make(), name)
    noisy, x = arch.read(inputs), inputs["hidden_states"]
    assert arch.channels == 4 < x.shape[1] and x[:, 4:].abs().max() > 0
    given = coarse_call(arch, inputs, noisy, scale, Coarse()).inputs["hidden_states"]
    torch.testing.assert_close(given[:, 4:], pooled(x[:, 4:], scale, arch.patch_size))


@pytest.mark.parametrize("scale", [2, 4])
def test_the_first_frame_that_is_given_is_pooled_without_noise(scale):
    """The other frames get what a model that knows them would say."""
    arch, inputs, _ = call_of(CASES[REPLACED].make(), REPLACED)
    noisy, x = arch.read(inputs), inputs["hidden_states"]
    clean = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    exact = (x - clean) / expand(noisy.sigma, x)
    seen: list[Tensor] = []

    def knowing(**small: Any) -> tuple[Tensor]:
        asked = arch.read(small)
        seen.append(asked.latents)
        return ((asked.latents - pooled(clean, scale, 2)) / expand(asked.sigma, x),)

    velocity = coarse_step(arch, knowing, inputs, noisy, scale, Coarse())
    torch.testing.assert_close(seen[0][:, :, :1], pooled(x[:, :, :1], scale, 2))
    rows, columns = (n // scale for n in x.shape[-2:])
    found, wanted = (pooled(v[:, :, 1:], scale, 2)[..., :rows, :columns] for v in (velocity, exact))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_the_picture_decides_what_is_drawn():
    pipe, case = CASES[REPLACED].make(), CASES[REPLACED]
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 2, 4))):
        one, other = (draw(pipe, case, image=picture) for picture in tiny_hunyuan.film(2)[:2])
    assert not torch.allclose(one[:, :, 1:], other[:, :, 1:], atol=1e-3)


@pytest.mark.parametrize("name", ["hunyuan-video-image", REPLACED])
def test_operations(name):
    pipe = CASES[name].make()
    _, inputs, _ = call_of(pipe, name)
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 2, 4, 1))) as run:
        draw(pipe, CASES[name])
    check_flops(pipe, inputs, run.report)


def test_a_cache_keeps_what_the_first_block_would_see():
    pipe = CASES["hunyuan-video"].make()
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 1, 2, 2, 1)), cache=TeaCacheConfig(1e9, (0.0, 0.0))) as run:
        draw(pipe, CASES["hunyuan-video"])
    assert run.report.strip() == "1 (1) 2 (2) 1 (1) (1) 1"


def test_published_coefficients_are_those_of_text_to_video():
    with torch.device("meta"):
        told = [
            architecture_for(HunyuanVideoTransformer3DModel(in_channels=n, num_single_layers=1)).teacache_coefficients()
            for n in (16, 33)
        ]
    assert told[0] is not None and told[0][0] == 733.226126 and told[1] is None


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (lambda: tiny_hunyuan.pipeline(patch_size=1), "hunyuan-video", r"own patches are \(1, 1\)"),
        (lambda: tiny_hunyuan.image_to_video_15(use_meanflow=True), "hunyuan-video-1.5-image", "MeanFlow"),
    ],
)
def test_held_at_full_steps(make, name, reason):
    pipe = make()
    plain = draw(pipe, CASES[name])
    with ddit.apply(pipe, patches=FixedSchedule(steps=(2,))) as run, pytest.warns(UserWarning, match=reason):
        assert torch.equal(draw(pipe, CASES[name]), plain)
    assert run.report.forced is not None and set(run.report.scales[0]) == {1}


def test_a_pipeline_that_calls_nobody_back_draws_by_prompt():
    """1.5 has no ``callback_on_step_end``."""
    pipe, steps = tiny_hunyuan.pipeline_15(), []
    given = [tiny_hunyuan.CLIP_15[name] for name in ("prompt_embeds", "prompt_embeds_mask")]
    letters = [tiny_hunyuan.CLIP_15[name] for name in ("prompt_embeds_2", "prompt_embeds_mask_2")]
    pipe.encode_prompt = lambda **_: (*given, *letters)  # it has no text encoder
    settings = dict(height=48, width=96, num_frames=5, num_inference_steps=3)
    method = Method(patches=FixedSchedule(steps=(1, 2, 1)))
    drawn = run(pipe, ["a waltz"], [0], settings, method=method, on_step=lambda *_: steps.append(1))
    assert drawn.report is not None and drawn.report.scales == [[1, 2, 1]]
    assert drawn.pictures.shape == (1, 5, 48, 96, 3) and not steps
