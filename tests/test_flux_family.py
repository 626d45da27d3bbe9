"""FLUX.1 and Chroma with a condition, reference images, a ControlNet, an image prompt: what a coarse step sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxPriorReduxPipeline
from torch import Tensor, nn
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

import ddit
import tiny
import tiny_flux
from ddit import FixedSchedule, PatchAdapter
from ddit.coarse import coarse_call
from ddit.config import FULL, Coarse
from ddit.models.base import UnsupportedCall
from ddit.patches import pack, pad_to_multiple, pool_packed, pool_tokens, shrink, unpack
from ddit.pipelines.generate import run
from ddit.teacache import TeaCacheConfig
from ddit.train.samples import draw_samples
from families import COARSE, call_of, check_flops, check_large_patches
from test_architectures import CASES, draw
from tiny_flux import EMBEDS as EMBEDS2
from tiny_flux import KONTEXT, LARGE, MASK, PICTURE, SIZE, TEXT

WHERE = ("hidden_states", "img_ids")


def test_reference_tokens_are_pooled_and_lie_where_the_picture_does():
    """As the pipeline would call for the same edit of pictures of half and a quarter of the size."""
    arch, inputs, answer = call_of(tiny_flux.kontext(), "flux-kontext")
    noisy, own = arch.read(inputs), 8 * 12
    assert noisy.latents.shape == (1, 4, 16, 24) and noisy.condition is None
    for scale in (2, 4):
        small = coarse_call(arch, inputs, noisy, scale, Coarse()).inputs
        count = own // scale**2
        pooled = shrink(unpack(inputs["hidden_states"][:, own:], 2, (1, 0, 16, 24)), scale, 2, "noise-consistent")
        torch.testing.assert_close(small["hidden_states"][:, count:], pack(pooled, 2))
        assert len(small["img_ids"]) == 2 * count and torch.equal(*small["img_ids"][:, 1:].split(count))
        assert small["img_ids"][:, 0].tolist() == [0] * count + [1] * count
    places = coarse_call(arch, inputs, noisy, 2, Coarse(positions="interpolated")).inputs["img_ids"]
    assert torch.equal(*places[:, 1:].split(own // 4)) and places[1].tolist() == [0, 0.5, 2.5]
    velocity = torch.randn(1, 4, 16, 24)
    tokens = arch.output(velocity, inputs)
    assert tokens.shape == answer.shape and torch.equal(arch.velocity(tokens, (16, 24)), velocity)


@pytest.mark.parametrize("name", ["flux-fill", "flux-control"])
def test_a_condition_is_pooled_with_the_latents(name):
    pipe = CASES[name].make()
    arch, inputs, _ = call_of(pipe, name)
    noisy = arch.read(inputs)
    assert noisy.condition is not None and noisy.condition.shape[1] == inputs["hidden_states"].shape[2] // 4 - 4
    for scale in (2, 4):
        given = coarse_call(arch, inputs, noisy, scale, Coarse()).inputs["hidden_states"][..., 16:]
        pooled = shrink(unpack(inputs["hidden_states"][..., 16:], 2, (1, 0, 16, 24)), scale, 2, "noise-consistent")
        torch.testing.assert_close(given, pack(pooled, 2))


def test_residuals_are_means_over_large_patches():
    """Also on a grid that does not divide, whose last row and column go on."""
    pipe = tiny_flux.with_controlnet()
    arch, inputs, _ = call_of(pipe, "flux-controlnet", height=36, width=40)
    assert len(inputs["controlnet_block_samples"]) == 1 and inputs["controlnet_block_samples"][0].abs().max() > 0
    for scale, grid in ((2, (5, 5)), (4, (3, 3))):
        small = coarse_call(arch, inputs, arch.read(inputs), scale, Coarse()).inputs
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            (given,), (whole,) = small[name], inputs[name]
            assert given.shape == (1, grid[0] * grid[1], 32)
            corner = pad_to_multiple(whole.mT.reshape(1, 32, 9, 10), scale)[..., -scale:, -scale:]
            torch.testing.assert_close(given[:, -1], corner.mean((2, 3)))
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 2, 4))):
        controlled = draw(pipe, CASES["flux-controlnet"])
        free = draw(pipe, CASES["flux-controlnet"], controlnet_conditioning_scale=0.0)
    assert not torch.allclose(controlled, free, atol=1e-2)


def test_the_mask_of_chroma_ends_with_the_image():
    arch, inputs, _ = call_of(tiny_flux.chroma(), "chroma", prompt="a circle")
    mask = inputs["attention_mask"]
    assert mask.shape == (1, 20 + 96) and 0 < mask[:, :20].sum() < 20 and mask[:, 20:].all()
    for scale in (2, 4):
        small = coarse_call(arch, inputs, arch.read(inputs), scale, Coarse()).inputs
        assert torch.equal(small["attention_mask"], mask[:, : 20 + 96 // scale**2])


def _with_ip_adapter() -> Any:
    from diffusers.models.attention_processor import FluxIPAdapterJointAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection

    pipe = tiny.pipeline(num_layers=2)
    torch.manual_seed(0)
    layers = {}
    for i in range(2):
        weights = FluxIPAdapterJointAttnProcessor2_0(hidden_size=32, cross_attention_dim=32).state_dict()
        layers.update({f"{i}.{name.replace('.0.', '.')}": value for name, value in weights.items()})
    image = ImageProjection(cross_attention_dim=32, image_embed_dim=32, num_image_text_embeds=4).state_dict()
    projection = {name.replace("image_embeds", "proj"): value for name, value in image.items()}
    pipe.transformer._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    return pipe


def _redux() -> dict[str, Any]:
    """Prompts from a picture."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=32, patch_size=16
    )
    parts = {k: v for k, v in tiny.parts().items() if "text" in k or "token" in k}
    prior = FluxPriorReduxPipeline(
        image_encoder=SiglipVisionModel(vision).eval(),
        feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}),
        image_embedder=diffusers.pipelines.flux.ReduxImageEncoder(redux_dim=16, txt_in_features=32),
        **parts,
    )
    return dict(prior(PICTURE, prompt=tiny.PROMPT))


EMBEDS = [torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
PROMPTS = dict(ip_adapter_image_embeds=EMBEDS[0], negative_ip_adapter_image_embeds=EMBEDS[1])
NEGATIVE = dict(negative_prompt="", true_cfg_scale=3.0)
INPAINT = dict(image=PICTURE, mask_image=MASK, strength=0.8)
CONTROL = dict(control_image=PICTURE)
VARIANTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "true-cfg": (tiny.pipeline, NEGATIVE),
    "ip-adapter": (_with_ip_adapter, PROMPTS),
    "ip-adapter-true-cfg": (_with_ip_adapter, {**PROMPTS, **NEGATIVE}),
    "redux": (tiny.pipeline, dict(_redux(), prompt=None)),
    "kontext-true-cfg": (tiny_flux.kontext, {**KONTEXT, **NEGATIVE}),
    "kontext-without-image": (tiny_flux.kontext, {**KONTEXT, "image": None}),
    "kontext-inpaint": (
        lambda: tiny_flux.kontext(diffusers.FluxKontextInpaintPipeline),
        {**KONTEXT, **INPAINT},
    ),
    "kontext-inpaint-reference": (
        lambda: tiny_flux.kontext(diffusers.FluxKontextInpaintPipeline),
        {**KONTEXT, **INPAINT, "image_reference": PICTURE},
    ),
    "control-img2img": (
        lambda: tiny_flux.control(diffusers.FluxControlImg2ImgPipeline),
        dict(CONTROL, image=PICTURE, strength=0.8),
    ),
    "control-inpaint": (lambda: tiny_flux.control(diffusers.FluxControlInpaintPipeline), {**CONTROL, **INPAINT}),
    "controlnet-two": (
        lambda: tiny_flux.with_controlnet(nets=2),
        dict(control_image=[PICTURE, PICTURE], controlnet_conditioning_scale=[0.5, 0.7]),
    ),
    "controlnet-true-cfg": (tiny_flux.with_controlnet, {**CONTROL, **NEGATIVE}),
    "controlnet-img2img": (
        lambda: tiny_flux.with_controlnet(diffusers.FluxControlNetImg2ImgPipeline),
        dict(CONTROL, image=PICTURE, strength=0.8),
    ),
    "controlnet-inpaint": (
        lambda: tiny_flux.with_controlnet(diffusers.FluxControlNetInpaintPipeline),
        {**CONTROL, **INPAINT},
    ),
    "chroma-img2img": (
        lambda: tiny_flux.chroma(diffusers.ChromaImg2ImgPipeline),
        dict(image=PICTURE, strength=0.8, negative_prompt=""),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_pipelines_use_large_patches(name):
    make, changes = VARIANTS[name]
    pipe = make()
    call = {**TEXT, **SIZE, **changes, "num_inference_steps": 6, "output_type": "latent", "return_dict": False}

    def drawn() -> Tensor:
        return pipe(**call, generator=torch.Generator().manual_seed(0))[0]

    check_large_patches(pipe, drawn)


def test_an_image_prompt_counts_in_coarse_steps_too():
    pipe = _with_ip_adapter()
    with ddit.apply(pipe, patches=FixedSchedule(steps=(2,))):
        one, other = (tiny.sample(pipe, steps=4, **{**PROMPTS, "ip_adapter_image_embeds": e}) for e in EMBEDS)
    assert not torch.allclose(one, other, atol=1e-3)


def test_residuals_that_repeat_block_by_block():
    """As those of a ControlNet with a hint block do (``controlnet_blocks_repeat``)."""
    arch, inputs, _ = call_of(tiny_flux.with_controlnet(), "flux-controlnet")
    two = [inputs["controlnet_block_samples"][0], torch.randn(1, 96, 32)]
    call = {**inputs, "controlnet_block_samples": two, "controlnet_blocks_repeat": True}
    small = coarse_call(arch, call, arch.read(call), 2, Coarse()).inputs
    assert small["controlnet_blocks_repeat"]
    torch.testing.assert_close(small["controlnet_block_samples"][1], pool_tokens(two[1], (8, 12), 2))


@pytest.mark.parametrize("name", ["flux-control", "flux-kontext"])
def test_a_cache_that_never_answers_changes_nothing(name):
    pipe = CASES[name].make()
    plain = draw(pipe, CASES[name])
    with ddit.apply(pipe, patches=FULL, cache=TeaCacheConfig(1e-9, (0.0, 1.0))) as run:
        assert torch.equal(draw(pipe, CASES[name]), plain)
    assert "(" not in run.report.strip()


def test_a_cache_with_a_controlnet_is_refused():
    case = CASES["flux-controlnet"]
    pipe = case.make()
    with ddit.apply(pipe, cache="first-block:0.1"), pytest.raises(ValueError, match="which would count twice"):
        draw(pipe, case)


def test_an_adapter_leaves_reference_tokens_alone():
    case = CASES["flux-kontext"]
    pipe = case.make()
    adapter = PatchAdapter.for_model(pipe.transformer, rank=0)
    with ddit.apply(pipe, patches=COARSE):
        free = draw(pipe, case)
    with ddit.apply(pipe, patches=COARSE, adapter=adapter):
        torch.testing.assert_close(draw(pipe, case), free)
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.02)
        assert not torch.allclose(draw(pipe, case), free)

    arch, inputs, _ = call_of(pipe, "flux-kontext")
    small, seen = coarse_call(arch, inputs, arch.read(inputs), 2, Coarse()).inputs, []
    with adapter.attach(pipe.transformer), adapter.at(2, torch.randn(1, 24, 64)):
        pipe.transformer.x_embedder.register_forward_hook(lambda layer, args, output: seen.append(output))
        pipe.transformer(**small)
    pipe.transformer(**small)
    assert torch.equal(seen[0][:, 24:], seen[1][:, 24:]) and not torch.allclose(seen[0][:, :24], seen[1][:, :24])


@pytest.mark.parametrize("name", ["flux-kontext", "flux-fill", "flux-controlnet"])
def test_operations_are_those_of_the_calls(name):
    pipe = CASES[name].make()
    _, inputs, _ = call_of(pipe, name)
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 2, 4))) as run:
        draw(pipe, CASES[name])
    check_flops(pipe, inputs, run.report)


# FLUX.2

KLEIN = {**EMBEDS2, "negative_prompt_embeds": -EMBEDS2["prompt_embeds"], "guidance_scale": 4.0}


def test_tokens_of_flux_2_are_latents_of_twice_the_size():
    arch, inputs, _ = call_of(tiny_flux.flux2(), "flux2")
    noisy = arch.read(inputs)
    channels = inputs["hidden_states"].mT.unflatten(2, (8, 12))
    assert torch.equal(noisy.latents, diffusers.Flux2Pipeline._unpatchify_latents(channels))


def test_reference_images_of_flux_2_are_pooled_each():
    arch, inputs, _ = call_of(tiny_flux.flux2(), "flux2-reference")
    small = coarse_call(arch, inputs, arch.read(inputs), 2, Coarse()).inputs
    assert inputs["img_ids"].shape == (1, 96 + 2 * 24, 4) and small["img_ids"].shape == (1, 24 + 2 * 6, 4)
    ids = small["img_ids"][0]
    assert ids.unique(dim=0).shape[0] == 36 and ids[:24, [0, 3]].eq(0).all()
    assert ids[24:30, 0].eq(10).all() and ids[30:, 0].eq(20).all() and torch.equal(ids[24:30, 1:], ids[30:, 1:])
    for i in range(2):
        one = inputs["hidden_states"][:, 96 + 24 * i : 96 + 24 * (i + 1)]
        rows, columns = (int(n) + 1 for n in inputs["img_ids"][0, 96:120, 1:3].max(0).values)
        pooled = pool_packed(one, 2, (rows, columns), 2)
        assert torch.equal(small["hidden_states"][:, 24 + 6 * i : 30 + 6 * i], pooled)


def test_positions_that_are_no_grids_keep_full_steps():
    """As those of a condition that another pipeline puts behind the picture, thinned out."""
    arch, inputs, _ = call_of(tiny_flux.kontext(), "flux-kontext")
    few = {name: torch.cat([x[..., :96, :], x[..., 96:111, :]], -2) for name, x in inputs.items() if name in WHERE}
    with pytest.raises(UnsupportedCall, match="full grids"):
        arch.read({**inputs, **few})


@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        (diffusers.Flux2KleinPipeline, {}),
        (diffusers.Flux2KleinPipeline, dict(image=LARGE)),
        (diffusers.Flux2KleinInpaintPipeline, dict(image=LARGE, mask_image=MASK, strength=0.8)),
        (diffusers.Flux2KleinInpaintPipeline, dict(image=LARGE, mask_image=MASK, image_reference=LARGE)),
    ],
)
def test_klein_uses_large_patches(cls, changes):
    pipe = tiny_flux.flux2(cls)
    call = {**KLEIN, **changes, "num_inference_steps": 8, "output_type": "latent", "return_dict": False}

    def drawn() -> Tensor:
        return pipe(**call, generator=torch.Generator().manual_seed(0))[0]

    check_large_patches(pipe, drawn)


class PictureFirst(diffusers.FluxPipeline):
    """As the pipelines of FLUX.2, Kontext and others."""

    def __call__(self, image=None, prompt=None, **settings):
        assert image is None
        return super().__call__(prompt, **settings)


def test_commands_draw_with_pipelines_that_take_a_picture_first(tmp_path):
    pipe = tiny.pipeline()
    pipe.__class__ = PictureFirst
    settings = dict(height=32, width=32, num_inference_steps=2, max_sequence_length=20)
    assert run(pipe, ["a red circle"], [0], settings).pictures.shape[0] == 1
    assert len(draw_samples(tmp_path, pipe, settings, ["a red circle"], batch=1, seed=0)) == 1


def test_klein_kv_runs_in_full_where_it_keeps_reference_images():
    pipe = tiny_flux.flux2(diffusers.Flux2KleinKVPipeline)
    call = {**EMBEDS2, "num_inference_steps": 4, "output_type": "latent", "return_dict": False}
    plain = pipe(**call, image=LARGE, generator=torch.Generator().manual_seed(0))[0]
    with ddit.apply(pipe, patches=COARSE) as run:
        with pytest.warns(UserWarning, match="Klein KV"):
            assert torch.equal(pipe(**call, image=LARGE, generator=torch.Generator().manual_seed(0))[0], plain)
        pipe(**call, generator=torch.Generator().manual_seed(0))
        assert run.report.scales == [[1, 2, 4, 2]]
