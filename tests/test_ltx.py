"""LTX-Video: tokens that the pipeline packs, a first frame that is given, and what is refused; LTX-2 among it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    HunyuanVideoFramepackTransformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXConditionPipeline,
    LTXPipeline,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ddit
import tiny_ltx
from ddit import FixedSchedule
from ddit.coarse import coarse_call
from ddit.config import Coarse
from ddit.models import architecture_for
from ddit.models.base import UnsupportedCall
from ddit.models.ltx import LTX
from ddit.patches import TokenLayout, pack, shrink, unpack
from ddit.pipelines.known import compression
from ddit.teacache import TeaCacheConfig
from families import call_of, check_flops
from test_architectures import CASES, draw

IMAGE = "ltx-image"


def test_latents_are_packed_as_the_pipeline_packs_them():
    z = torch.randn(1, 4, 3, 8, 12)
    tokens = LTXPipeline._pack_latents(z)
    arch, inputs, _ = call_of(CASES["ltx"].make(), "ltx")
    assert torch.equal(arch.read({**inputs, "hidden_states": tokens}).latents, z) and torch.equal(pack(z, 1), tokens)


@pytest.mark.parametrize("scale", [2, 4])
def test_the_first_frame_that_is_given_is_pooled_without_noise(scale):
    arch, inputs, _ = call_of(CASES[IMAGE].make(), IMAGE)
    noisy = arch.read(inputs)
    small = coarse_call(arch, inputs, noisy, scale, Coarse()).inputs
    rows, columns = small["height"], small["width"]
    assert (rows, columns) == (8 // scale, 12 // scale)
    seen = unpack(small["hidden_states"], 1, (2, 4, 3, rows, columns))
    torch.testing.assert_close(seen[:, :, :1], shrink(noisy.latents[:, :, :1], scale, 1, "noise-consistent"))
    levels = small["timestep"].unflatten(1, (3, rows * columns))
    assert (levels[:, 0] == 0).all() and (levels[:, 1:] == levels[0, -1, -1]).all() and levels[0, -1, -1] > 0


@pytest.mark.parametrize("spread", [(8 / 25, 32, 32), None])
def test_places_are_pixels_and_seconds(spread):
    """Those that the model counts itself, told one by one, give the same waves."""
    arch, inputs, _ = call_of(CASES["ltx"].make(), "ltx")
    rope: Any = arch.transformer.get_submodule("rope")
    args = (inputs["hidden_states"], 3, 8, 12, spread, None)
    own = rope(*args)
    for found, wanted in zip(arch.rotary(TokenLayout((8, 12), 1, "interpolated"), args, own), own, strict=True):
        torch.testing.assert_close(found, wanted)


def test_operations_with_a_noise_level_for_each_token():
    pipe = CASES[IMAGE].make()
    case = CASES["ltx-image-without-guidance"]
    _, inputs, _ = call_of(pipe, IMAGE, guidance_scale=1.0)
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 2, 4, 1))) as run:
        draw(pipe, case)
    check_flops(pipe, inputs, run.report)


def test_a_cache_watches_what_the_first_block_attends_to():
    pipe = CASES["ltx"].make()
    arch = architecture_for(pipe.transformer)
    block = arch.blocks()[0]
    signals: list[Tensor] = []
    attended: list[Tensor] = []

    def argument_of(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        signals.append(arch.teacache_signal(block, given.__getitem__))

    block.register_forward_pre_hook(argument_of, with_kwargs=True)
    attention = block.get_submodule("attn1")
    attention.register_forward_pre_hook(
        lambda _, args, given: attended.append(given["hidden_states"]), with_kwargs=True
    )
    draw(pipe, CASES["ltx"], num_inference_steps=1)
    torch.testing.assert_close(signals, attended)
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 1, 2, 2, 1)), cache=TeaCacheConfig(1e9, (0.0, 0.0))) as run:
        draw(pipe, CASES["ltx"])
    assert run.report.strip() == "1 (1) 2 (2) 1 (1) (1) 1"


def test_frames_at_any_place_and_level_are_held_at_full_steps():
    pipe, call = tiny_ltx.pipeline(LTXConditionPipeline, shifting=False), {**tiny_ltx.IMAGE, "num_inference_steps": 4}

    def drawn() -> Tensor:
        return pipe(generator=torch.Generator().manual_seed(0), output_type="latent", **call).frames

    plain = drawn()
    with ddit.apply(pipe, patches=FixedSchedule(steps=(2,))) as run, pytest.warns(UserWarning, match="video_coords"):
        assert torch.equal(drawn(), plain)
    assert set(run.report.scales[0]) == {1}
    arch, inputs, _ = call_of(CASES[IMAGE].make(), IMAGE)
    levels = inputs["timestep"].clone()
    levels[:, -1] /= 2
    for other in (levels, levels.flip(1)):
        with pytest.raises(UnsupportedCall, match="noise levels of their own"):
            arch.read({**inputs, "timestep": other})


@pytest.mark.parametrize(
    ("cls", "reason"), [(LTX2VideoTransformer3DModel, "sound"), (HunyuanVideoFramepackTransformer3DModel, "history")]
)
def test_classes_that_large_patches_do_not_serve(cls, reason):
    with torch.device("meta"):
        model = cls(num_layers=1)
    with pytest.raises(ValueError, match=rf"{cls.__name__} is not supported: .*{reason}.*; supported are .*LTXVideo"):
        ddit.apply(model)


def test_published_coefficients_are_those_of_the_small_model():
    told = [architecture_for(tiny_ltx.transformer(num_layers=n)).teacache_coefficients() for n in (28, 48)]
    assert told[0] is not None and told[0][-1] == 0.00969274326 and told[1] is None


def test_a_folder_says_how_much_its_autoencoder_compresses(tmp_path):
    pipe = tiny_ltx.pipeline()
    pipe.vae.save_pretrained(tmp_path / "vae")
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    assert compression(str(tmp_path), architecture_for(pipe.transformer)) == (32, 8) == LTX.compression


@pytest.mark.slow
def test_what_a_call_of_ltx_2_would_cost():
    """Tera-operations at 768 x 512 x 121, full and at 2p, were it supported; blocks are alike."""

    def tera(blocks: int, height: int, width: int) -> float:
        with torch.device("meta"):
            model = LTX2VideoTransformer3DModel(num_layers=blocks)
            text = {
                name: torch.zeros(1, 1024, 3840) for name in ("encoder_hidden_states", "audio_encoder_hidden_states")
            }
            video, sound = torch.zeros(1, 16 * height * width, 128), torch.zeros(1, 126, 128)
            call = dict(hidden_states=video, audio_hidden_states=sound, timestep=torch.zeros(1), **text)
            size = dict(num_frames=16, height=height, width=width, audio_num_frames=126)
            with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                model(**call, **size)
        return counter.get_total_flops() / 1e12

    counted = [tera(1, *grid) + 47 * (tera(2, *grid) - tera(1, *grid)) for grid in ((16, 24), (8, 12))]
    assert [round(n) for n in counted] == [199, 48]
