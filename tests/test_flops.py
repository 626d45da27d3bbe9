"""Operations in closed form against those that PyTorch counts in a run on the meta device."""

from __future__ import annotations

import time
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel, Lumina2Transformer2DModel
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tiny
import tiny_audio
import tiny_flux
import tiny_hunyuan
import tiny_krea2
import tiny_longcat_image
import tiny_ltx
import tiny_lumina2
import tiny_modular
import tiny_ovis_image
import tiny_sd3
import tiny_video
import tiny_z_image
from ddit import PatchAdapter
from ddit.coarse import call_at
from ddit.config import Coarse
from ddit.models import architecture_for
from ddit.models.base import to_meta
from ddit.models.flops import count
from ddit.pipelines.known import meta_transformer

PICTURE = dict(image_dim=16, added_kv_proj_dim=24)

MODELS = {
    "ace-step": tiny_audio.transformer,
    "chroma": lambda: tiny_flux.chroma().transformer,
    "flux": lambda: tiny.transformer(num_layers=2, num_single_layers=3),
    "flux-guidance": lambda: tiny.transformer(guidance_embeds=True),
    "flux-fill": lambda: tiny.transformer(in_channels=48, out_channels=16),
    "flux2": lambda: tiny_flux.flux2(num_layers=2, num_single_layers=3).transformer,
    "flux2-klein": lambda: tiny_flux.flux2(guidance_embeds=False).transformer,
    **({"flux3": tiny_modular.flux3_transformer} if tiny_modular.HAS_FLUX3 else {}),
    "hunyuan-video": tiny_hunyuan.transformer,
    "hunyuan-video-1.5": tiny_hunyuan.transformer_15,
    "hunyuan-video-replaced": lambda: tiny_hunyuan.transformer(image_condition_type="token_replace"),
    "krea-2": tiny_krea2.transformer,
    "longcat-image": tiny_longcat_image.transformer,
    "ltx": tiny_ltx.transformer,
    "lumina2": tiny_lumina2.transformer,
    "ovis-image": tiny_ovis_image.transformer,
    "qwen-image": lambda: tiny.qwen_pipeline().transformer,
    "sd3": tiny_sd3.transformer,
    "wan": tiny.wan_transformer,
    "wan-i2v": lambda: tiny.wan_transformer(in_channels=12, **PICTURE),
    "wan-vace": tiny_video.vace,
    "skyreels-v2": tiny_video.skyreels,
    "z-image": tiny_z_image.transformer,
}


READING = (HunyuanVideo15Transformer3DModel, Lumina2Transformer2DModel)


def call_of(model: Any, scale: int = 1, text: int = 20, **changes: Any) -> dict[str, Any]:
    """A call for one sample at a scale, of 8 x 12 tokens in up to two frames at scale 1."""
    architecture = architecture_for(model)
    call = {**architecture.example(2, 16, 24, text), **changes}
    return call_at(architecture, call, scale, Coarse())


def counted_in_a_run(model: Any, call: dict[str, Any], adapter: PatchAdapter | None = None, scale: int = 1) -> int:
    """On the meta device, but where a model reads values of what it is given: masks of the text."""
    device, within = "cpu" if isinstance(model, READING) else "meta", nullcontext()
    model, call = model.to(device), to_meta(call) if device == "meta" else call
    if adapter is not None:
        adapter.to(device).attach(model)
        tokens = architecture_for(model).tokens(call)
        within = adapter.at(scale, torch.zeros(1, tokens, adapter.inputs[scale], device=device))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), within, sdpa_kernel(SDPBackend.MATH):
        model(**call)
    return counter.get_total_flops()


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_exactly_those_of_a_run(name, scale):
    model = MODELS[name]()
    call = call_of(model, scale)
    assert count(architecture_for(model), call) == counted_in_a_run(model, call)


ADAPTERS: dict[str, dict[str, Any]] = {
    "all": dict(rank=2),
    "no-lora": dict(rank=0),
    "paper": dict(rank=3, start="bilinear"),
    "no-residual": dict(rank=2, residual=False, size_vector=False),
}
ADAPTED = [
    case
    if case[1:] == (2, "all") or case[0] in ("ace-step", "flux", "wan")
    else pytest.param(*case, marks=pytest.mark.slow)
    for case in product(MODELS, (2, 4), ADAPTERS)
]


@pytest.mark.parametrize(("name", "scale", "settings"), ADAPTED)
def test_with_an_adapter(name, scale, settings):
    model = MODELS[name]()
    adapter, call = PatchAdapter.for_model(model, **ADAPTERS[settings]), call_of(model, scale)
    alone, architecture = count(architecture_for(model), call, scale=scale), architecture_for(model)
    together = count(architecture, call, adapter.config, scale)
    assert together == counted_in_a_run(model, call, adapter, scale) > alone
    assert count(architecture, call, adapter.config) == alone  # at scale 1 it is silent


@pytest.mark.parametrize("text", [20, 512, 600])
def test_wan_cuts_its_context_512_rows_from_the_end(text):
    model = tiny.wan_transformer(**PICTURE)
    call = call_of(model, text=text)
    assert count(architecture_for(model), call) == counted_in_a_run(model, call)


def test_wan_with_two_pictures_and_with_a_picture_in_the_common_keys():
    model = tiny.wan_transformer(**PICTURE, pos_embed_seq_len=2 * 9)
    call = call_of(model, text=512, encoder_hidden_states_image=torch.zeros(2, 9, 16))
    assert count(architecture_for(model), call) == counted_in_a_run(model, call)
    model = tiny.wan_transformer(image_dim=16)
    call = call_of(model)
    assert count(architecture_for(model), call) == counted_in_a_run(model, call)


@pytest.mark.parametrize("scale", [1, 2])
def test_wan_with_a_noise_level_per_token(scale):
    model = tiny.wan_transformer()
    levels = torch.full((1, 2, 96), 500.0)
    levels[:, 0] = 0
    call = call_of(model, scale, timestep=levels.flatten(1))
    assert call["timestep"].shape == (1, 2 * 96 // scale**2)
    assert count(architecture_for(model), call) == counted_in_a_run(model, call)


def test_qwen_image_with_a_second_noise_level():
    model = tiny.qwen_pipeline().transformer
    model = type(model).from_config(model.config, zero_cond_t=True)
    call = call_of(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**call)  # not on the meta device: it makes an index of tokens as it runs
    assert count(architecture_for(model), call) == counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_two_samples_cost_twice_as_much(name):
    model = MODELS[name]()
    one, architecture = call_of(model), architecture_for(model)
    two = architecture.rows(one, [0, 0])
    assert count(architecture, two) == 2 * count(architecture, one) == counted_in_a_run(model, two)


@pytest.mark.parametrize("name", MODELS)
def test_a_users_lora_is_not_counted(name):
    model = MODELS[name]()
    call, architecture = call_of(model), architecture_for(model)
    before = count(architecture, call)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "proj_out", architecture.embedding]))
    assert any("lora_A" in name for name, _ in model.named_parameters())
    assert count(architecture, call) == before


@pytest.mark.parametrize("name", ["flux", "wan", "wan-i2v"])
def test_fused_projections_are_counted_once(name):
    model = MODELS[name]()
    call, architecture = call_of(model), architecture_for(model)
    before = count(architecture, call)
    for module in list(model.modules()):
        if hasattr(module, "fuse_projections"):
            module.fuse_projections()
    assert any(hasattr(module, "to_qkv") for module in model.modules())
    assert count(architecture, call) == before


def test_shapes_are_enough():
    model = meta_transformer("flux.1-dev", (1,))
    call = call_of(model)
    assert count(architecture_for(model), to_meta(call)) == count(architecture_for(model), call)


@pytest.mark.parametrize("name", ["flux.1-dev", "flux.1-schnell", "qwen-image", "wan2.1-1.3b", "wan2.1-14b"])
def test_layers_of_known_models(name):
    model = meta_transformer(name, (2,))
    for scale in (1, 2, 4):
        call = call_of(model, scale)
        assert count(architecture_for(model), call) == counted_in_a_run(model, call)


@pytest.mark.parametrize(
    ("name", "size", "tera"),
    [("flux.1-dev", (1, 128, 128), (74.4, 21.5, 10.3)), ("wan2.1-1.3b", (21, 60, 104), (283.0, 33.8, 6.7))],
)
def test_known_models_in_full(name, size, tera):
    """1024 x 1024 pixels, and 480 x 832 of 81 frames, with 512 tokens of text."""
    architecture = architecture_for(meta_transformer(name))
    call = architecture.example(*size, 512)
    calls = {s: call_at(architecture, call, s, Coarse()) for s in (1, 2, 4)}
    assert [round(count(architecture, calls[s]) / 1e12, 1) for s in (1, 2, 4)] == list(tera)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        count(architecture, call)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.1
