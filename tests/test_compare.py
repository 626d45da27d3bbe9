"""`ddit compare`, `ddit calibrate` and caches on the command line, on a shrunken model."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tiny
import tiny_z_image
from ddit.caches import make_cache
from ddit.cli import main
from ddit.config import FixedSchedule, PatchSchedule
from ddit.eval import calibrate, compare
from ddit.eval.drawings import Drawings
from ddit.eval.drawings import draw as draw_pictures
from ddit.eval.parts import Part
from ddit.eval.prices import Prices
from ddit.eval.quality import Entry, parse_entry
from ddit.models import architecture_for
from ddit.patches import detail_variance
from ddit.pipelines.generate import Method, recorded, run
from ddit.pipelines.methods import make_method
from ddit.preset import Preset
from ddit.report import Report, Step
from ddit.teacache import polynomial
from test_architectures import CASES, draw


def make(values):
    """A method of a model whose TeaCache is calibrated; adapters are their names."""
    return make_method(values, Preset(teacache=(1.0, 0.0)), load_adapter=str)


SETTINGS = {"height": 32, "width": 32, "num_inference_steps": 8, "max_sequence_length": 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A shrunken FLUX that draws pictures of the size the judge knows."""
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline().save_pretrained(folder)
    call = {"height": 128, "width": 128, "num_inference_steps": 6, "max_sequence_length": 20}
    Preset(call=call, patches=PatchSchedule(threshold=1e6, careful=False)).save(folder)
    return str(folder)


# Methods


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("plain", "fewer steps"),
        ("plain:run_steps=10", "fewer steps"),
        ("plain:cache=first-block:0.1,run_steps=25", "cache"),
        ("progressive:fraction=0.3", "progressive resolution"),
        ("ddit", "patches"),
        ("ddit:patches=paper", "patches"),
        ("ddit:threshold=0.003,adapter=none", "patches"),
        ("ddit:threshold=0.003,adapter=some", "patches, adapter"),
        ("ddit:speedup=2,patches=full", "skipping"),
        ("ddit:speedup=2", "patches and skipping"),
        ("ddit:speedup=2,patches=full,cache=teacache:0.1", "with a cache"),
    ],
)
def test_families(method, family):
    assert compare.family(method) == family


def test_the_presets_adapter_counts():
    assert compare.family("ddit", adapter=True) == "patches, adapter"
    assert compare.family("ddit:adapter=some", adapter=False) == "patches"


def every_cache(name):
    return True


@pytest.mark.parametrize("teacache", [False, True])
def test_the_methods_of_a_comparison_can_all_be_read(teacache):
    names = compare.methods((50, 25), suits=lambda name: teacache or "teacache" not in name, adapter="some")
    assert names[0] == "plain" and len(names) == len(set(names))
    read = [parse_entry(name, 50, make) for name in names]
    assert {m.run_steps for m in read} == {50, 33, 25, 17, 12, 10}
    planned = compare.methods((50,), suits=every_cache, adapter="some", planned=True)
    assert {f"ddit:speedup={s},adapter=some" for s in (2, 3, 4, 5)} <= set(planned) and len(planned) <= 30
    once = compare.methods((50,), suits=every_cache, adapter="some")
    assert len(once) <= 30
    families = {compare.family(name) for name in names}
    assert families == set(compare.FAMILIES)
    assert any("teacache" in name for name in names) == teacache
    assert not any("cache" in name for name in compare.methods((50,), suits=lambda name: False, adapter=None))


def test_a_part_has_a_row_for_each_picture_also_where_guidance_is_stacked():
    """Two copies of the latents lie in one call of Z-Image."""
    pipe = tiny_z_image.pipeline()
    given = [tiny_z_image.embeds(seed) for seed in (1, 2)]
    pipe.encode_prompt = lambda **_: (given[0] * 2, given[1] * 2)  # it has no text encoder
    method = Method(patches=FixedSchedule(steps=(1, 2, 4)))
    settings = dict(height=32, width=32, num_inference_steps=4)
    part = Part.of(run(pipe, ["a waltz", "a piano"], [0, 1], settings, method=method), None)
    assert part.scales.tolist() == [[1, 2, 4, 4]] * 2 and part.flops.shape == (2,) and len(part.pictures) == 2


def test_drawings_have_a_record_for_each_picture_also_where_guidance_is_stacked(tmp_path):
    pipe = tiny_z_image.pipeline()
    given = [tiny_z_image.embeds(seed) for seed in (1, 2)]
    pipe.encode_prompt = lambda prompt, **_: (given[0] * len(prompt), given[1] * len(prompt))
    entry = Entry("ddit", 4, Method(patches=FixedSchedule(steps=(1, 2, 4))))
    kept = Drawings(tmp_path, "ddit", {}, ["a waltz", "a piano", "a fox"])
    draw_pictures(pipe, [entry], [kept], dict(height=32, width=32), batch=2, seed=0)
    assert [record["call"] for record in kept.records] == [0, 0, 2]
    assert all(0 < record["flops_fraction"] < 1 for record in kept.records)


def test_work_at_other_costs_has_the_blocks_of_that_model():
    """First-block's one block is a fifth of the embedded model and a fifty-seventh of FLUX.1-dev."""
    steps = tuple(Step(0.5, (scale,), ({},), 0.0, reused=reused) for scale, reused in ((1, {}), (1, {0: 1.0}), (2, {})))
    report = Report(steps, {1: 64, 2: 16}, {1: 8.0, 2: 2.0}, reused_share=1 / 5)
    assert report.flops_fraction == pytest.approx((1 + 0.2 + 0.25) / 3)
    costs = Prices("flux.1-dev")
    coarse = costs.ratios[2]
    for name, share in (("first-block:0.1", 1 / 57), ("teacache:0.1", 0.0), ("cache-dit:0.08", 16 / 57)):
        told = costs.price(report, make_cache(name, (1.0,))).flops_fraction
        assert told == pytest.approx((1 + share + coarse) / 3)
    with pytest.raises(ValueError, match="none of"):
        Prices("flux.9")


def test_patch_sizes_of_all_methods_have_costs(tmp_path, capsys):
    flags = ["--model", "embedded", "--prompts", "2", "--steps", "6", "--costs", "flux.1-dev"]
    methods = ["--methods", "plain", "ddit:schedule=1/8,adapter=none"]
    assert main(["evaluate", *flags, *methods, "--out", str(tmp_path / "a")]) == 0
    row = json.loads((tmp_path / "a.json").read_text())["methods"][1]
    assert row["flops_fraction"] == pytest.approx((1 + 5 * Prices("flux.1-dev", (1, 8)).ratios[8]) / 6)


def test_winners_are_the_best_among_those_as_fast():
    rows = [
        {"method": method, "speedup": speed, "frechet": frechet, "adherence": adherence}
        for method, speed, frechet, adherence in [
            ("plain", 1.0, 1.0, 0.9),
            ("plain:run_steps=25", 2.1, 3.0, 0.8),
            ("plain:run_steps=10", 5.2, 2.5, 0.7),
            ("ddit", 2.5, 2.0, 0.6),
            ("ddit:threshold=0.1", 4.5, 4.0, 0.95),
        ]
    ]
    told = {speed: [row["method"] for row in best] for speed, best in compare.winners(rows, "frechet").items()}
    assert told == {
        1.5: ["ddit", "plain:run_steps=10"],
        2: ["ddit", "plain:run_steps=10"],
        3: ["plain:run_steps=10", "ddit:threshold=0.1"],
        4: ["plain:run_steps=10", "ddit:threshold=0.1"],
        5: ["plain:run_steps=10"],
    }
    told = {speed: [row["method"] for row in best] for speed, best in compare.winners(rows, "adherence").items()}
    assert told[2] == ["ddit:threshold=0.1", "plain:run_steps=25"]


def test_compare(model, tmp_path, capsys):
    out = tmp_path / "race-1.5"  # a dot in a name is no ending
    methods = ["plain", "plain:run_steps=3", "plain:cache=first-block:9", "progressive:fraction=0.5", "ddit"]
    flags = ["--model", model, "--methods", *methods, "--prompts", "3", "--batch", "2", "--out", str(out)]
    assert main(["compare", *flags]) == 0
    result = json.loads((tmp_path / "race-1.5.json").read_text())
    plain, fewer, cached, small, dynamic = result["methods"]
    assert result["suite"] == "compare" and plain["flops_fraction"] == fewer["flops_fraction"] == 1
    blocks = 2
    assert cached["flops_fraction"] == pytest.approx((1 + 5 / blocks) / 6)
    assert small["tokens_fraction"] == pytest.approx(1 - 0.75 * 0.5) and small["flops_fraction"] < 1
    assert dynamic["tokens_fraction"] < 1
    assert set(result["best_at_least_as_fast"]) == {"adherence", "frechet", "psnr"}
    assert (tmp_path / "race-1.5-2x.png").stat().st_size > 1000 and plain["peak_memory"] is not None
    assert "### 2x or faster" in (tmp_path / "race-1.5.md").read_text()
    assert all((tmp_path / f"race-1.5-pareto{e}").stat().st_size > 1000 for e in (".png", ".svg"))


def test_any_model_is_compared_on_prompts_of_ones_own(tmp_path, capsys):
    """Nobody can judge what it draws: likeness to plain alone. It has no preset either."""
    model, prompts, out = tmp_path / "model", tmp_path / "prompts.txt", tmp_path / "race"
    tiny.pipeline().save_pretrained(model)
    prompts.write_text("a fox\na house\n\na cat\n")
    flags = ["--model", str(model), "--height", "32", "--width", "32", "--steps", "8", "--out", str(out)]
    methods = ["--methods", "plain", "plain:run_steps=4", "ddit:speedup=2,patches=full"]
    assert main(["compare", *flags, *methods]) == 2
    assert "--prompt-file" in capsys.readouterr().err
    assert main(["compare", *flags, *methods, "--prompt-file", str(prompts), "--prompts", "2", "--batch", "2"]) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    assert result["prompts"] == 2 and result["split"] == "own" and "adherence" not in result["methods"][0]
    assert set(result["best_at_least_as_fast"]) == {"psnr"} and len(result["methods"][2]["psnr_of_each"]) == 2
    table = out.with_suffix(".md").read_text()
    assert "Fréchet" not in table and "### 2x or faster" in table
    assert main(["compare", *flags, *methods, "--prompt-file", str(tmp_path / "none.txt")]) == 2
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.slow
def test_compare_with_its_own_methods(model, tmp_path, capsys):
    flags = ["--model", model, "--prompts", "2", "--batch", "2", "--at", "10", "6", "--out", str(tmp_path / "race")]
    assert main(["compare", *flags]) == 0
    rows = json.loads((tmp_path / "race.json").read_text())["methods"]
    there = compare.methods((10, 6), suits=lambda name: "teacache" not in name, adapter=None)
    assert [row["method"] for row in rows] == there


@pytest.mark.parametrize(
    "text", ["plain:cache=other:1", "progressive:fraction=x", "progressive:threshold=1", "progressive:cache=magcache:1"]
)
def test_methods_that_make_no_sense(text):
    with pytest.raises(ValueError, match=r"cache is|progressive takes"):
        parse_entry(text, 50, make)


def test_progressive_resolution_is_a_run_on_the_small_picture():
    """What is pooled of its latents follows Euler's steps of the model on the small grid, at that grid's own levels."""
    pipe = tiny.pipeline()
    method = parse_entry("progressive:fraction=0.5,run_steps=8", 8, make).method
    assert method is not None and not method.preset.detail_variance
    architecture, seen = architecture_for(pipe.transformer), []
    with recorded(pipe) as calls:  # below ddit: what the model itself is asked
        with method.apply(pipe), recorded(pipe) as outer:
            pipe(tiny.PROMPT, generator=torch.Generator().manual_seed(0), output_type="latent", **SETTINGS)
        seen = [(architecture.read(inputs).latents, float(inputs["timestep"][0])) for inputs, _ in outer]
    small = [inputs for inputs, _ in calls if inputs["hidden_states"].shape[1] == 16]
    assert len(small) == 4 and len(calls) == len(seen) == 8
    for (z, sigma), inputs in zip(seen[:4], small, strict=True):
        factor = 1 / ((1 - sigma) + sigma / 2)
        told = architecture.velocity(inputs["hidden_states"], (8, 8))
        torch.testing.assert_close(told, factor * F.avg_pool2d(z, 2), rtol=1e-4, atol=1e-5)
        assert float(inputs["timestep"][0]) == pytest.approx(factor * sigma / 2, rel=1e-4)
    levels = [float(inputs["timestep"][0]) for inputs in small]
    latents = [architecture.velocity(inputs["hidden_states"], (8, 8)) for inputs in small]
    for k in range(3):
        with torch.no_grad():
            velocity = architecture.velocity(pipe.transformer(**small[k])[0], (8, 8))
        stepped = latents[k] + (levels[k + 1] - levels[k]) * velocity
        torch.testing.assert_close(stepped, latents[k + 1], rtol=1e-3, atol=1e-3)


# Calibration


def test_the_fit_finds_a_polynomial_again():
    coefficients = (3.0, -2.0, 0.5, 1.0, 0.1)
    pairs = [(x, polynomial(coefficients, x)) for x in np.linspace(0, 1, 12)]
    assert calibrate.fit(pairs) == pytest.approx(coefficients, abs=1e-6)
    with pytest.raises(ValueError, match="too few"):
        calibrate.fit(pairs[:4])


def test_changes_are_those_between_steps_of_one_guidance_pass():
    pipe = tiny.pipeline()
    plain = calibrate.plain_runs(pipe, [tiny.PROMPT], [0], SETTINGS, [2]).changes
    guided = {**SETTINGS, "negative_prompt": tiny.PROMPT, "true_cfg_scale": 1.5}
    both = calibrate.plain_runs(pipe, [tiny.PROMPT] * 2, [0, 1], guided, [2]).changes
    assert len(plain) == 7 and len(both) == 2 * 2 * 7
    # The negative prompt is the prompt: both passes change alike, and as the plain run.
    assert np.allclose(both[:14], both[14:]) and np.allclose(both[:7], plain, atol=1e-4)
    assert not pipe.transformer.transformer_blocks[0]._forward_pre_hooks and "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("name", ["chroma", "flux2", "flux3", "krea-2", "lumina2", "qwen-image-2.1", "sd3", "z-image"])
def test_models_that_teacache_does_not_know_are_measured_without_it(name, monkeypatch):
    case = CASES[name]

    def drawn(pipe, *_):
        return SimpleNamespace(pictures=draw(pipe, case, num_inference_steps=3))  # the small ones have no encoders

    monkeypatch.setattr(calibrate, "run", drawn)
    plain = calibrate.plain_runs(case.make(), ["a cat"], [0], {}, [2])
    assert plain.changes is None and plain.detail[2]
    figures = calibrate.Figures(1, plain.changes, plain.detail, [], [], plain.errors)
    assert calibrate.told([figures], Preset()).teacache == ()


def test_the_detail_is_that_of_finished_latents():
    """Guided, so that no single answer of the model leads there."""
    pipe, settings = tiny.pipeline(), {**SETTINGS, "negative_prompt": "", "true_cfg_scale": 2.0}
    measured = calibrate.plain_runs(pipe, [tiny.PROMPT], [0], settings, [2, 4]).detail
    latents = pipe(tiny.PROMPT, generator=torch.Generator().manual_seed(0), output_type="latent", **settings).images
    grid = pipe._unpack_latents(latents, settings["height"], settings["width"], pipe.vae_scale_factor)
    for scale in (2, 4):
        assert measured[scale] == pytest.approx(detail_variance(grid, scale, 1).tolist(), rel=1e-4)


@pytest.mark.slow
def test_a_calibration_that_was_killed_continues(model, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\na green square\n")
    size = ["--height", "64", "--width", "64"]
    flags = ["calibrate", "--model", model, "--prompts", str(prompts), "--count", "3", *size]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*flags, "--out", str(whole)]) == 0
    assert {path.name for path in whole.iterdir()} == {"ddit.json"}
    measured, measure = [], calibrate.measure

    def dies(*args):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(args[1])
        return measure(*args)

    monkeypatch.setattr(calibrate, "measure", dies)
    assert main([*flags, "--out", str(cut)]) == 130
    assert {path.name for path in cut.iterdir()} == {"ddit.json.part"}
    measured.clear()
    assert main([*flags, "--out", str(cut)]) == 0
    assert measured == [["a green square"]]
    assert (cut / "ddit.json").read_bytes() == (whole / "ddit.json").read_bytes()
    assert {path.name for path in cut.iterdir()} == {"ddit.json"}
    assert main([*flags, "--out", str(cut), "--seed", "1"]) == 130  # other runs: from the beginning
    assert len(measured) == 2


def test_calibrate_writes_what_teacache_needs(model, tmp_path, capsys):
    folder, prompts = tmp_path / "preset", tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\n")
    flags = ["--model", model, "--prompts", str(prompts), "--count", "2", "--height", "64", "--width", "64"]
    assert main(["calibrate", *flags, "--out", str(folder)]) == 0
    preset = Preset.load(folder)
    assert len(preset.teacache) == 5 and preset.patches == PatchSchedule(threshold=1e6, careful=False)
    out = ["--out", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")]
    flags = ["generate", "a red circle", "--model", model, "--height", "64", "--width", "64", *out]
    assert main([*flags, "--cache", "teacache:0.3"]) == 2
    assert "ddit calibrate" in capsys.readouterr().err
    assert main([*flags, "--cache", "teacache:99999", "--preset", str(folder)]) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["method"]["cache"] == "teacache:99999" and any(result["reused"])
    assert "(1)" in capsys.readouterr().out


def test_bad_calibrations_are_refused(model, tmp_path, capsys, monkeypatch):
    """Before anything is drawn; a file of fewer prompts than usual is taken as it is."""
    monkeypatch.delattr(calibrate, "measure")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    for flags, told in (
        (["--model", model], "--prompts FILE"),
        (["--model", "some/model", "--prompts", "x"], "--out"),
        (["--model", model, "--prompts", str(tmp_path / "none"), "--out", str(tmp_path)], "no file"),
        (["--model", model, "--prompts", str(prompts), "--count", "2", "--out", str(tmp_path)], "holds 1 prompts, 2"),
        (["--model", model, "--prompts", str(prompts), "--steps", "5", "--out", str(tmp_path)], "has 4 changes"),
    ):
        assert main(["calibrate", *flags]) == 2
        assert told in capsys.readouterr().err


def test_generate_with_a_cache_and_with_a_bad_one(model, tmp_path, capsys):
    flags = ["generate", "a red circle", "--model", model, "--out", str(tmp_path / "a.png")]
    assert main([*flags, "--cache", "first-block:9"]) == 0
    assert main([*flags, "--cache", "first-block"]) == 2
    assert "such as teacache:0.25" in capsys.readouterr().err


def test_a_run_with_a_cache_alone_is_plain_but_for_what_it_reuses():
    pipe = tiny.pipeline()
    plain = run(pipe, [tiny.PROMPT], [1], SETTINGS)
    method = parse_entry("plain:cache=first-block:1e-9", 8, make).method
    cached = run(pipe, [tiny.PROMPT], [1], SETTINGS, method=method)
    assert torch.equal(torch.from_numpy(cached.pictures), torch.from_numpy(plain.pictures))
    assert cached.report is not None and cached.report.flops_fraction == 1


def test_steps_are_given_once(tmp_path, capsys):
    """What `--at` says would go unheard beside a list of methods."""
    flags = ["--at", "10", "--out", str(tmp_path / "race")]
    assert main(["compare", *flags, "--methods", "plain"]) == 2
    assert "run_steps" in capsys.readouterr().err
    assert main(["compare", *flags, "--steps", "8"]) == 2
    assert "leave --steps out" in capsys.readouterr().err
