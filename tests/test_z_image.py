"""Z-Image: prompts of any lengths, sequences that are filled up, a ControlNet, and what is left to full steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import ddit
import tiny_z_image
from ddit import FixedSchedule
from ddit.coarse import coarse_call
from ddit.config import Coarse
from ddit.models import architecture_for
from ddit.models.base import first
from ddit.patches import TokenLayout, pad_to_multiple
from ddit.pipelines.generate import recorded
from families import COARSE, call_of, check_flops, check_landing, check_large_patches
from test_architectures import CASES, draw
from tiny_z_image import CALL, PICTURE, embeds

LONG = {"prompt_embeds": embeds(3, 40)}
"""A prompt that is filled up to 64 tokens, beside a negative one of 32."""


def test_a_model_that_knows_the_picture_draws_it():
    """Time runs from 0 to 1, the answer is x - eps."""

    def answers(known: Callable[..., Tensor], x: list[Tensor], t: Tensor, *_: Any, **__: Any) -> tuple[list[Tensor]]:
        levels = 1 - t
        return ([(known(z[:, 0])[:, None] - z) / level for z, level in zip(x, levels, strict=True)],)

    clean = torch.randn(1, 4, 16, 48, generator=torch.Generator().manual_seed(5))
    check_landing(tiny_z_image.pipeline(), "z-image", clean, answers)


class Alternating:
    scales = (1, 2)

    def choose(self, context: Any) -> list[int]:
        return [1 + i % 2 for i in range(context.batch)]


@pytest.mark.parametrize("controlled", [False, True])
def test_prompts_of_other_lengths_in_steps_of_their_own(controlled):
    """The longest decides on the length of the sequence, which is another where the prompts part."""
    pipe = tiny_z_image.with_controlnet() if controlled else tiny_z_image.pipeline()
    changes = {**LONG, **({"control_image": PICTURE} if controlled else {})}
    with recorded(pipe) as calls:
        draw(pipe, CASES["z-image"], num_inference_steps=1, **changes)
    (inputs, answer), arch = calls[0], architecture_for(pipe.transformer)
    for sample in (0, 1):
        alone = first(pipe.transformer(**arch.rows(inputs, [sample])))
        torch.testing.assert_close(alone[0], answer[sample], rtol=1e-3, atol=1e-4)
    with ddit.apply(pipe, patches=Alternating()) as run:
        assert torch.isfinite(draw(pipe, CASES["z-image"], **changes)).all()
    assert run.report.scales == [[1] * 8, [2] * 8] and run.report.forced is None


def test_residuals_are_pooled_and_those_of_the_prompt_stay():
    """On a grid of 5 x 9, whose 45 tokens are filled up to 64, and those of large patches to 32."""
    pipe = tiny_z_image.with_controlnet()
    arch, inputs, _ = call_of(pipe, "z-image", control_image=PICTURE, height=20, width=36, **LONG)
    (whole,) = inputs["controlnet_block_samples"].values()
    assert whole.shape == (2, 64 + 64, 32) and whole.abs().max() > 0
    for scale, grid in ((2, (3, 5)), (4, (2, 3))):
        small = coarse_call(arch, inputs, arch.read(inputs), scale, Coarse()).inputs
        (given,), count = small["controlnet_block_samples"].values(), grid[0] * grid[1]
        assert given.shape == (2, 32 + 64, 32) and torch.equal(given[:, 32:], whole[:, 64:])
        corner = pad_to_multiple(whole[:, :45].mT.reshape(2, 32, 5, 9), scale)[..., -scale:, -scale:]
        torch.testing.assert_close(given[:, count - 1], corner.mean((2, 3)))
        assert not given[:, count:32].any()
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 2, 4))):
        free, drawn = (
            draw(pipe, CASES["z-image"], control_image=PICTURE, controlnet_conditioning_scale=s) for s in (0, 1)
        )
    assert not torch.allclose(drawn, free, atol=1e-2)


MASKED = {"image": PICTURE, "mask_image": PICTURE.convert("L"), "strength": 0.8}
VARIANTS = {
    "img2img": (diffusers.ZImageImg2ImgPipeline, dict(image=PICTURE, strength=0.8)),
    "inpaint": (diffusers.ZImageInpaintPipeline, MASKED),
    "controlnet": (diffusers.ZImageControlNetPipeline, dict(control_image=PICTURE)),
    "controlnet-inpaint": (
        diffusers.ZImageControlNetInpaintPipeline,
        dict(control_image=PICTURE, image=PICTURE, mask_image=PICTURE.convert("L")),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_pipelines_use_large_patches(name):
    cls, changes = VARIANTS[name]
    parts = {"controlnet": tiny_z_image.controlnet(control_in_dim=9 if "inpaint" in name else 4)}
    pipe = tiny_z_image.pipeline(cls, **(parts if "controlnet" in name else {}))
    call = {**CALL, **changes, "num_inference_steps": 6, "output_type": "latent", "return_dict": False}

    def drawn() -> Tensor:
        return pipe(**call, generator=torch.Generator().manual_seed(0))[0]

    check_large_patches(pipe, drawn)


def test_guidance_that_ends_early_is_one_run():
    """Its call then holds one copy of the latents instead of two."""
    pipe = tiny_z_image.pipeline()
    with ddit.apply(pipe, patches=COARSE) as run:
        truncated = draw(pipe, CASES["z-image"], cfg_truncation=0.3)
        assert run.report.scales == [[1, 2, 4, 2, 1, 1, 1, 1]] * 2
        assert not torch.allclose(truncated, draw(pipe, CASES["z-image"]))
    with ddit.apply(pipe, speedup=1.5) as run:
        draw(pipe, CASES["z-image"], cfg_truncation=0.3, num_inference_steps=20)
    assert 1 / run.report.flops_fraction == pytest.approx(1.5, rel=0.1) and len(run.report.steps) == 20


@pytest.mark.parametrize("size", [{}, dict(height=20, width=36)])
def test_operations_are_those_of_the_calls(size):
    """Also where sequences are filled up at every scale."""
    pipe = tiny_z_image.pipeline()
    _, inputs, _ = call_of(pipe, "z-image-turbo", **size)
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 2, 4))) as run:
        draw(pipe, CASES["z-image-turbo"], **size)
    check_flops(pipe, inputs, run.report)


def test_operations_depend_on_the_length_of_the_prompt():
    pipe = tiny_z_image.pipeline()
    arch, inputs, _ = call_of(pipe, "z-image-turbo")
    assert arch.count_flops(inputs) < arch.count_flops({**inputs, **{"cap_feats": LONG["prompt_embeds"]}})


def test_centres_at_scale_one_are_the_models_own_where_the_image_is_filled_up():
    pipe = tiny_z_image.pipeline()
    arch, inputs, answer = call_of(pipe, "z-image", height=20, width=36)
    with arch.placed(TokenLayout.of(arch.read(inputs).latents, 2, positions="interpolated")):
        torch.testing.assert_close(first(pipe.transformer(**inputs)), answer)


def test_reference_images_of_omni_stay_at_full_steps():
    model = tiny_z_image.transformer()
    latents, prompts = torch.randn(2, 4, 1, 16, 16), embeds(1) + embeds(2)
    call: dict[str, Any] = dict(x=[[*latents]], cap_feats=[prompts], siglip_feats=[None], image_noise_mask=[[0, 1]])
    with torch.no_grad():
        plain = first(model(t=torch.tensor([0.5]), **call))
        with ddit.apply(model, patches=FixedSchedule(steps=(2,))) as run, pytest.warns(UserWarning, match="Omni"):
            assert torch.equal(first(model(t=torch.tensor([0.5]), **call))[0], plain[0])
    assert run.report.scales == [[1]] and "Omni" in str(run.report.forced)


def test_a_call_that_chooses_other_patches_stays_at_full_steps():
    model = tiny_z_image.transformer(all_patch_size=(2, 4), all_f_patch_size=(1, 1))
    call: dict[str, Any] = dict(x=[torch.randn(4, 1, 16, 16)], t=torch.tensor([0.5]), cap_feats=embeds(1))
    with (
        torch.no_grad(),
        ddit.apply(model, patches=FixedSchedule(steps=(2,))) as run,
        pytest.warns(UserWarning, match="chooses patches of 4, not 2"),
    ):
        assert model(**call, patch_size=4).sample[0].shape == (4, 1, 16, 16)
    assert run.report.scales == [[1]]
