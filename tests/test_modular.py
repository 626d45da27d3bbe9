"""Modular pipelines, and FLUX.3, which has no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ddit
import tiny
import tiny_modular
from ddit import FixedSchedule, PatchAdapter, SkipSchedule
from ddit.cli import main
from ddit.coarse import coarse_call
from ddit.config import FULL, Coarse
from ddit.models import architecture_for
from ddit.patches import pool_packed
from ddit.pipelines.generate import run
from ddit.pipelines.loading import load_pipeline
from ddit.pipelines.outputs import eight_bits
from ddit.teacache import TeaCacheConfig
from families import COARSE, call_of, check_flops
from test_architectures import CASES, draw

flux3 = pytest.mark.skipif(not tiny_modular.HAS_FLUX3, reason="this diffusers has no FLUX.3")


@flux3
def test_reference_images_are_pooled_and_positions_are_half_a_unit_apart():
    arch, inputs, _ = call_of(tiny_modular.flux3(), "flux3-reference")
    assert inputs["image_cond_hidden_states"].shape == (1, 4 * 4 + 4 * 6, 16)
    for scale, first in ((2, 0.25), (4, 0.75)):
        for coarse in (Coarse(), Coarse(positions="interpolated")):
            small = coarse_call(arch, inputs, arch.read(inputs), scale, coarse).inputs
            assert torch.equal(small["txt_ids"], inputs["txt_ids"])
            given, images = inputs["image_cond_hidden_states"], [(4, 4), (4, 6)]
            parts = zip(given.split([16, 24], 1), images, strict=True)
            pooled = torch.cat([pool_packed(x, 2, size, scale) for x, size in parts], 1)
            assert torch.equal(small["image_cond_hidden_states"], pooled)
            assert len(small["image_cond_ids"]) == pooled.shape[1]
            assert torch.equal(small["image_cond_ids"][0, 1:3], small["img_ids"].view(-1, 4)[0, 1:3])
            grid = small["img_ids"].reshape(8 // scale, 12 // scale, 4)
            step, begin = (0.5, 0.0) if coarse.positions == "grid" else (0.5 * scale, first)
            assert grid[1, 2].tolist() == [0, begin + step, begin + 2 * step, 0]


@flux3
def test_operations_with_reference_images():
    pipe = tiny_modular.flux3()
    _, inputs, _ = call_of(pipe, "flux3-reference")
    with ddit.apply(pipe, patches=COARSE) as run:
        draw(pipe, CASES["flux3-reference"])
    check_flops(pipe, inputs, run.report)


@flux3
def test_blocks_of_text_alone_are_not_adapted():
    """They see neither the picture nor the noise level."""
    adapter = PatchAdapter.for_model(tiny_modular.flux3_transformer(), rank=2)
    blocks = {layer.rsplit(".", 2)[0] for layer in adapter.config["layers"]}
    assert blocks == {f"{name}.{i}" for name in ("mode_blocks.image", "single_transformer_blocks") for i in (0, 1)}


@flux3
def test_a_step_distilled_model_keeps_full_steps():
    model = tiny_modular.flux3_transformer(flow_map=True)
    call: dict[str, Any] = architecture_for(model).example(1, 16, 24, 5) | {"target_timestep": torch.full((1,), 0.4)}
    plain = model(**call)[0]
    with ddit.apply(model, patches=FixedSchedule(steps=(2,))) as run, pytest.warns(UserWarning, match="step-distilled"):
        assert torch.equal(model(**call)[0], plain)
        assert run.report.forced is not None


@flux3
def test_no_cache_where_diffusers_has_none():
    with pytest.raises(ValueError, match="no caches for Flux3Transformer2DModel"):
        ddit.apply(tiny_modular.flux3(), cache=TeaCacheConfig(threshold=0.1, coefficients=(1.0, 0.0)))


@pytest.mark.parametrize("name", ["flux-modular", pytest.param("flux3", marks=flux3)])
def test_steps_are_skipped(name):
    pipe = CASES[name].make()
    with ddit.apply(pipe, patches=FULL, skip=SkipSchedule(speedup=2.0)) as run:
        drawn: Tensor = draw(pipe, CASES[name], num_inference_steps=20)
    assert 1 / run.report.flops_fraction == pytest.approx(2, rel=0.05) and torch.isfinite(drawn).all()


def test_the_command_line_draws_what_python_does(tmp_path, capsys):
    """Two prompts' worth in one call, and one by itself."""
    tiny_modular.flux(called=False).save_pretrained(str(tmp_path / "m"))
    call = dict(num_inference_steps=4, height=32, width=32, max_sequence_length=20)
    pipe, _ = load_pipeline(str(tmp_path / "m"))
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 2, 4, 1))):
        drawn = run(pipe, [tiny.PROMPT], [3], call).pictures
    flags = ["--model", str(tmp_path / "m"), "--steps", "4", "--height", "32", "--width", "32", "--schedule"]
    flags = [*flags, "1", "2", "4", "1", "--call", "max_sequence_length=20", "--out", str(tmp_path / "a.png")]
    assert main(["generate", tiny.PROMPT, *flags, "--seed", "3"]) == 0
    with Image.open(tmp_path / "a.png") as file:
        assert np.array_equal(np.asarray(file), eight_bits(drawn)[0])
    assert run(pipe, [tiny.PROMPT] * 2, [3, 4], call).pictures.shape == (2, 32, 32, 3)
    assert main(["generate", tiny.PROMPT, *flags, "--call", "zzz=1"]) == 2
    assert "it takes" in capsys.readouterr().err
    (tmp_path / "p.txt").write_text("\n".join([tiny.PROMPT] * 9))
    paths = ["--model", str(tmp_path / "m"), "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "run")]
    assert main(["train", *paths, "--cpu"]) == 2
    assert "is a modular pipeline" in capsys.readouterr().err


def test_a_run_after_a_broken_one_begins_anew():
    """Modular pipelines don't say when a run ends."""
    pipe, case = tiny_modular.flux(), CASES["flux-modular"]
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1, 1, 2, 4))) as run:
        drawn = draw(pipe, case)
        handle = pipe.transformer.norm_out.register_forward_pre_hook(_third_call_fails())
        with pytest.raises(RuntimeError, match="stop"):
            draw(pipe, case)
        handle.remove()
        assert torch.equal(draw(pipe, case), drawn)
        assert len(run.report.steps) == 8


def _third_call_fails():
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("stop")

    return hook
