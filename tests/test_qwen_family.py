"""Qwen-Image with reference images, layers or a ControlNet: what the model sees in a coarse step."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import ddit
import tiny_qwen
from ddit import FixedSchedule, PatchAdapter
from ddit.coarse import coarse_call, coarse_step
from ddit.config import FULL, Coarse
from ddit.models import architecture_for
from ddit.models.base import first
from ddit.patches import TokenLayout, pool_packed, pool_tokens
from ddit.pipelines.generate import recorded
from ddit.teacache import TeaCacheConfig
from families import COARSE, call_of, check_flops, check_large_patches
from test_architectures import CASES, draw
from tiny_qwen import MASK, PICTURE, SQUARE, TEXT

NAMES = tuple(name for name in tiny_qwen.CASES if name != "qwen-image-2.1")


@pytest.mark.parametrize(
    ("name", "size", "references"),
    [
        ("qwen-image-edit", (8, 12), 1),
        ("qwen-image-edit-plus", (8, 12), 2),
        ("qwen-image-layered", (3, 8, 8), 1),
    ],
)
def test_reference_images_are_pooled(name, size, references):
    arch, inputs, answer = call_of(CASES[name].make(), name)
    noisy = arch.read(inputs)
    assert noisy.latents.shape == (1, 4, *size)
    *layers, rows, columns = size
    small = coarse_call(arch, inputs, noisy, 2, Coarse()).inputs
    assert small["img_shapes"] == [
        [(1, rows // 4, columns // 4)] * (layers[0] if layers else 1) + [(1, 2, 2)] * references
    ]
    one = inputs["hidden_states"][:, -16:]
    assert torch.equal(small["hidden_states"][:, -4:], pool_packed(one, 2, (4, 4), 2))
    velocity = torch.randn(1, 4, *size)
    tokens = arch.output(velocity, inputs)
    assert tokens.shape == answer.shape and torch.equal(arch.velocity(tokens, size), velocity)


def test_layers_are_packed_as_the_pipeline_packs_them():
    """One after the other, each in squares."""
    z = torch.randn(1, 3, 4, 8, 8)
    tokens = diffusers.QwenImageLayeredPipeline._pack_latents(z, 1, 4, 8, 8, 3)
    arch, inputs, _ = call_of(tiny_qwen.layered(), "qwen-image-layered")
    tokens = torch.cat([tokens, inputs["hidden_states"][:, 48:]], dim=1)
    assert torch.equal(arch.read({**inputs, "hidden_states": tokens}).latents, z.transpose(1, 2))


@pytest.mark.parametrize("name", NAMES)
def test_centres_at_scale_one_are_the_models_own(name):
    pipe = CASES[name].make()
    arch, inputs, answer = call_of(pipe, name)
    noisy, forward = arch.read(inputs), pipe.transformer.forward
    with arch.placed(TokenLayout.of(noisy.latents, 2, positions="interpolated")):
        torch.testing.assert_close(first(forward(**inputs)), answer)
    low = [coarse_step(arch, forward, inputs, noisy, 2, Coarse(positions=p)) for p in ("grid", "interpolated")]
    assert (low[0] - low[1]).abs().max() > 1e-4


def test_many_layers_push_the_text_further():
    """Its positions begin behind the largest number that an image uses, be it of a layer."""
    arch = architecture_for(tiny_qwen.layered().transformer)
    rope: Any = arch.transformer.get_submodule("pos_embed")
    shapes = [[(1, 4, 4)] * 8]
    output = rope(shapes, max_txt_seq_len=6, device=torch.device("cpu"))
    moved = arch.rotary(TokenLayout((4, 4), 1, "interpolated"), (shapes,), output)
    for found, own in zip(moved, output, strict=True):
        torch.testing.assert_close(found, own)


def test_residuals_are_pooled():
    arch, inputs, _ = call_of(tiny_qwen.with_controlnet(), "qwen-image-controlnet")
    assert isinstance(inputs["img_shapes"][0], tuple), "ControlNet's pipelines give no list per sample"
    (whole,) = inputs["controlnet_block_samples"]
    assert whole.abs().max() > 0
    for scale in (2, 4):
        small = coarse_call(arch, inputs, arch.read(inputs), scale, Coarse()).inputs
        torch.testing.assert_close(small["controlnet_block_samples"][0], pool_tokens(whole, (4, 6), scale))


INPAINT = dict(mask_image=MASK, strength=0.8)
VARIANTS = {
    "edit-inpaint": (
        lambda: tiny_qwen.edit(diffusers.QwenImageEditInpaintPipeline),
        dict(INPAINT, image=SQUARE, height=1024, width=1024),
    ),
    "controlnet-union": (
        lambda: tiny_qwen.with_controlnet(union=True),
        dict(control_image=[PICTURE, PICTURE], controlnet_conditioning_scale=[0.5, 0.5], height=64, width=96),
    ),
    "two-images-of-a-prompt": (
        tiny_qwen.edit_plus,
        dict(image=[SQUARE], num_images_per_prompt=2, height=1024, width=1024),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_pipelines_use_large_patches(name):
    make, changes = VARIANTS[name]
    pipe = make()
    call = {**TEXT, **changes, "num_inference_steps": 6, "output_type": "latent", "return_dict": False}

    def drawn() -> Tensor:
        return pipe(**call, generator=torch.Generator().manual_seed(0))[0]

    check_large_patches(pipe, drawn)


class Alternating:
    scales = (1, 2)

    def choose(self, context: Any) -> list[int]:
        return [1 + i % 2 for i in range(context.batch)]


@pytest.mark.parametrize("name", ["qwen-image-edit-plus", "qwen-image-layered"])
def test_samples_of_one_prompt_may_have_scales_of_their_own(name):
    """The pipelines tell shapes, and whether pictures are opaque, once for all of them."""
    pipe = CASES[name].make()
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    call = {**CASES[name].call, "num_images_per_prompt": 2, "num_inference_steps": 4, "output_type": "latent"}
    with ddit.apply(pipe, patches=Alternating()) as run:
        both = pipe(**call, generator=seeds, return_dict=False)[0]
    assert len(both) == 2 and torch.isfinite(both).all()
    assert run.report.scales == [[1] * 4, [2] * 4]


@pytest.mark.parametrize("count", [1, 2])
def test_teacache_where_reference_images_have_a_noise_level_of_their_own(count):
    pipe = tiny_qwen.edit_plus()
    call = {**CASES["qwen-image-edit-plus"].call, "num_images_per_prompt": count}
    with ddit.apply(pipe, patches=FULL, cache=TeaCacheConfig(1e9, (0.0, 0.0))) as run:
        pipe(**call, num_inference_steps=4, output_type="latent", generator=torch.Generator().manual_seed(0))
    assert run.report.strip().startswith("1 (1) (1) 1")


@pytest.mark.parametrize("name", NAMES)
def test_operations_are_those_of_the_calls(name):
    pipe = CASES[name].make()
    _, inputs, _ = call_of(pipe, name)
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 2, 4))) as run:
        draw(pipe, CASES[name])
    check_flops(pipe, inputs, run.report)


@pytest.mark.parametrize("name", ["qwen-image-edit", "qwen-image-layered"])
def test_an_adapter_leaves_reference_images_alone(name):
    pipe = CASES[name].make()
    adapter = PatchAdapter.for_model(pipe.transformer, rank=0)
    with ddit.apply(pipe, patches=COARSE):
        free = draw(pipe, CASES[name])
    with ddit.apply(pipe, patches=COARSE, adapter=adapter):
        torch.testing.assert_close(draw(pipe, CASES[name]), free)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        assert not torch.allclose(draw(pipe, CASES[name]), free)


# Qwen-Image 2.1

REFERENCES = {**CASES["qwen-image-2.1"].call, "image": [SQUARE], "output_resolution": 64}


def drawn21(pipe: Any, seed: int = 0, **changes: Any) -> Tensor:
    call = {**REFERENCES, "num_inference_steps": 6, "output_type": "latent", "return_dict": False, **changes}
    seeds = [torch.Generator().manual_seed(seed + i) for i in range(call.get("num_images_per_prompt", 1))]
    return pipe(**call, generator=seeds)[0]


def test_reference_images_come_first_in_2_1():
    pipe = tiny_qwen.version21()
    with recorded(pipe) as calls:
        drawn21(pipe, num_inference_steps=1)
    (inputs, answer), arch = calls[0], architecture_for(pipe.transformer)
    noisy = arch.read(inputs)
    assert noisy.latents.shape == (1, 4, 8, 12) and answer.shape[1] == 2 + 16 + 96
    assert torch.equal(noisy.latents.flatten(2).mT, inputs["hidden_states"][:, 16:])
    small = coarse_call(arch, inputs, noisy, 2, Coarse()).inputs
    assert small["img_shapes"] == [[(1, 4, 4), (1, 4, 6)]] and small["img_mask"].shape[1] == 6 + 24 // 4
    assert torch.equal(small["hidden_states"][:, :16], inputs["hidden_states"][:, :16])
    with arch.placed(TokenLayout.of(noisy.latents, 1, positions="interpolated")):
        torch.testing.assert_close(first(pipe.transformer(**inputs)), answer)


def test_what_the_pipeline_keeps_of_the_prompt_serves_every_grid():
    """With a key-value cache the prompt and reference images are computed once."""
    pipe = tiny_qwen.version21()
    plain = drawn21(pipe, use_kv_cache=True)
    with ddit.apply(pipe, patches=FULL):
        assert torch.equal(drawn21(pipe, use_kv_cache=True), plain)
    for first_scale in (1, 2):
        with ddit.apply(pipe, patches=FixedSchedule(steps=(first_scale, 2, 4, 1, 2, 1))) as run:
            kept, anew = (drawn21(pipe, use_kv_cache=use) for use in (True, False))
        assert run.report.forced is None
        torch.testing.assert_close(kept, anew, rtol=1e-3, atol=1e-4)


def test_samples_of_2_1_may_have_scales_of_their_own():
    class Later(Alternating):
        def choose(self, context: Any) -> list[int]:
            return super().choose(context) if context.step else [1] * context.batch

    pipe = tiny_qwen.version21()
    with ddit.apply(pipe, patches=Later()) as run:
        both = drawn21(pipe, num_images_per_prompt=2, use_kv_cache=True)
    assert run.report.scales == [[1] * 6, [1] + [2] * 5]
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 2))):
        torch.testing.assert_close(both[1:], drawn21(pipe, seed=1, use_kv_cache=True), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [(160, 96), (224, 160)])
def test_grids_of_2_1_hold_places_of_four(size):
    """Also where rows and columns of large patches would be odd."""
    pipe = tiny_qwen.version21()
    with ddit.apply(pipe, patches=COARSE) as run:
        latents = drawn21(pipe, height=size[0], width=size[1])
    assert latents.shape[1] == size[0] * size[1] // 256 and {2, 4} <= set(run.report.scales[0])
    assert all(count % 4 == 0 for count in run.report.tokens.values())


@pytest.mark.parametrize("kept", [False, True])
def test_operations_of_2_1_are_those_of_the_calls(kept):
    """With a key-value cache those of every step but the first, with reference images too."""
    pipe = tiny_qwen.version21()
    changes = dict(use_kv_cache=True) if kept else dict(image=None)
    with recorded(pipe) as calls:
        drawn21(pipe, num_inference_steps=2, **changes)
    inputs = calls[-1][0]
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 2, 4))) as run:
        drawn21(pipe, **changes)
    check_flops(pipe, inputs, run.report)


def test_a_run_keeps_no_key_value_cache():
    pipe = tiny_qwen.version21()
    with ddit.apply(pipe, patches=COARSE) as run:
        drawn21(pipe, use_kv_cache=True)
        kept = [call["kv_cache"] for call in run._latest.examples.values()]
    assert all(layer.k is None for cache in kept for layer in cache.layer_caches)


def test_an_adapter_reads_the_tokens_of_the_image_in_2_1():
    pipe = tiny_qwen.version21()
    adapter = PatchAdapter.for_model(pipe.transformer)
    with ddit.apply(pipe, patches=COARSE):
        free = drawn21(pipe)
    with ddit.apply(pipe, patches=COARSE, adapter=adapter):
        torch.testing.assert_close(drawn21(pipe), free)
    arch = architecture_for(pipe.transformer)
    assert torch.equal(arch.own(torch.arange(10)[None], 4), torch.tensor([[6, 7, 8, 9]]))
