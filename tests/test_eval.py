"""`ddit evaluate` on a shrunken model: the whole path, and the pieces with values known by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from ddit import PatchAdapter
from ddit.cli import main
from ddit.config import FixedSchedule, PatchSchedule, SkipSchedule
from ddit.eval import quality
from ddit.eval.grid import fewest_and_most
from ddit.eval.parts import Part, Parts, digest
from ddit.eval.quality import parse_entry
from ddit.eval.subjects import Clips, Pictures, Prompted
from ddit.eval.suites import _check_size
from ddit.pipelines.generate import recorded, run
from ddit.pipelines.methods import make_method
from ddit.preset import Preset, QualityCurve
from ddit.profile import ErrorProfile

PRESET = Preset(patches=PatchSchedule(threshold=0.5))


def make(values):
    return make_method(values, PRESET, load_adapter=str)


def test_methods_are_read():
    assert parse_entry("plain", 50, make).method is None
    assert parse_entry("plain:run_steps=20", 50, make).run_steps == 20
    entry = parse_entry("ddit:scales=1/2,percentile=0.8,adapter=some", 50, make)
    assert entry.method is not None and entry.run_steps == 50 and entry.method.adapter == "some"
    assert entry.method.patches == PatchSchedule(threshold=0.5, percentile=0.8, scales=(1, 2))
    fixed = parse_entry("ddit:schedule=2,speedup=3", 50, make).method
    assert fixed is not None and fixed.patches == FixedSchedule(steps=(2,)) and fixed.skip == SkipSchedule(speedup=3)
    assert parse_entry("ddit:patches=paper", 50, make).method.patches == PatchSchedule.paper()


@pytest.mark.parametrize(
    "text",
    [
        "plain:threshold=1",
        "ddit:thresold=1",
        "ddit:threshold",
        "magic",
        "plain:run_steps=0",
        "ddit:schedule=2,threshold=1",
        "ddit:patches=full,scales=1/2",
        "ddit:speedup=2,quality=30",
    ],
)
def test_bad_methods_are_refused(text):
    with pytest.raises(ValueError):
        parse_entry(text, 50, make)


def test_held_out_prompts_are_fixed_and_of_their_split():
    judged = Pictures().prompts("judge", 20, 0)
    assert judged == Pictures().prompts("judge", 20, 0) and all(s.split == "judge" for s in judged)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A shrunken FLUX that draws pictures of the size the judge knows."""
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline().save_pretrained(folder)
    call = {"height": 128, "width": 128, "num_inference_steps": 5, "max_sequence_length": 20}
    Preset(call=call, patches=PatchSchedule(threshold=1e6, careful=False)).save(folder)
    return str(folder)


def test_quality_suite(model, tmp_path, capsys):
    out = tmp_path / "race"
    methods = ["plain", "ddit", "ddit:threshold=0", "plain:run_steps=2"]
    flags = ["--model", model, "--methods", *methods, "--prompts", "3", "--batch", "2", "--out", str(out)]
    assert main(["evaluate", *flags]) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["methods"]
    plain, dynamic, exact, fewer = rows
    assert [r["method"] for r in rows] == methods
    assert plain["flops_fraction"] == exact["flops_fraction"] == 1 and dynamic["flops_fraction"] < 1
    assert dynamic["steps_per_scale"] == {"1": 3, "4": 2}
    assert exact["ssim"] == pytest.approx(1) and exact["adherence_change"] == 0
    assert fewer["run_steps"] == 2 and fewer["speedup"] > 0
    assert all(0 <= r["adherence"] <= 1 and r["frechet"] >= 0 for r in rows)
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "| plain:run_steps=2 | 2 |" in out.with_suffix(".md").read_text()


def test_work_is_told_at_the_costs_of_a_large_model(model, tmp_path, capsys):
    out = tmp_path / "race"
    flags = ["--model", model, "--methods", "plain", "ddit", "plain:run_steps=2", "--prompts", "2", "--batch", "2"]
    assert main(["evaluate", *flags, "--costs", "wan2.1-1.3b", "--out", str(out)]) == 0
    written = json.loads(out.with_suffix(".json").read_text())
    scales, (_, dynamic, fewer) = written["costs"]["scales"], written["methods"]
    assert written["costs"]["model"] == "wan2.1-1.3b"
    assert dynamic["flops_fraction"] == pytest.approx((3 + 2 * scales["4"]) / 5)
    assert dynamic["times_less_work"] == pytest.approx(1 / dynamic["flops_fraction"])
    assert fewer["times_less_work"] == pytest.approx(2.5)
    assert "Work is that of wan2.1-1.3b" in out.with_suffix(".md").read_text()
    assert main(["evaluate", *flags, "--costs", "flux.9", "--out", str(out)]) == 2
    assert "flux.9" in capsys.readouterr().err


def test_a_quality_shows_prompts_of_few_and_of_many_steps(model, tmp_path, capsys):
    folder, out = tmp_path / "model", tmp_path / "race"
    shutil.copytree(model, folder)
    profile = ErrorProfile(sigmas=(0.5,), coarse={2: (0.1,), 4: (0.2,)}, bend=(0.5,))
    quality = QualityCurve(errors=(1e-9, 1e6), psnr=(60, 20))
    replace(Preset.load(model), profile=profile, quality=quality).save(folder)
    flags = ["--model", str(folder), "--methods", "plain", "ddit:quality=30", "--prompts", "3", "--batch", "2"]
    assert main(["evaluate", *flags, "--out", str(out)]) == 0
    assert (tmp_path / "race-30dB.png").stat().st_size > 1000


def test_prompts_of_fewest_and_most_full_steps():
    scales = [np.array([[1, 1, 4], [1, 4, 4]]), np.array([[1, 1, 1], [1, 1, 4], [1, 1, 4]])]
    result = [Part(*np.zeros((3, 1)), scales=part, flops=np.zeros(1), memory=np.zeros(1)) for part in scales]
    asked = [Prompted(f"prompt {n}") for n in range(5)]
    assert fewest_and_most(result, asked, 1) == {1: "prompt 1\n1 full steps", 2: "prompt 2\n3 full steps"}
    assert list(fewest_and_most(result, asked, 4)) == [1, 0, 3, 4, 2]


def test_a_killed_evaluation_continues(model, tmp_path, monkeypatch, capsys):
    """Finished batches are not drawn again; other settings, or a damaged file, draw anew."""
    flags = ["--model", model, "--methods", "plain", "ddit", "--prompts", "3", "--batch", "1"]
    whole = tmp_path / "whole"
    assert main(["evaluate", *flags, "--out", str(whole)]) == 0
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == dies:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    monkeypatch.setattr(quality, "run", counted)
    out, dies = tmp_path / "race", 7  # two to warm up, two batches of two, the third half way
    assert main(["evaluate", *flags, "--out", str(out)]) == 130
    folder = out.with_suffix(".parts")
    assert sorted(p.name for p in folder.glob("*.npz")) == ["batch-0000.npz", "batch-0001.npz"]
    (folder / "batch-0001.npz").write_bytes((folder / "batch-0001.npz").read_bytes()[:100])
    calls.clear()
    dies = 0
    assert main(["evaluate", *flags, "--out", str(out)]) == 0
    assert len(calls) == 2 + 2 * 2 and not folder.exists()
    ours, theirs = (json.loads(p.with_suffix(".json").read_text())["methods"] for p in (out, whole))
    for a, b in zip(ours, theirs, strict=True):
        drawn = {key for key in a if not key.startswith(("seconds", "speedup", "peak_memory"))}
        assert {key: a[key] for key in drawn} == {key: b[key] for key in drawn} and a.keys() == b.keys()
    Parts(folder, {"seed": 1}).save(0, [Part(*np.zeros((6, 1)))])
    assert Parts(folder, {"seed": 1}).load(0) is not None
    assert Parts(folder, {"seed": 2}).load(0) is None


def test_one_negative_prompt_serves_a_batch():
    pipe = tiny.pipeline()
    settings = {"height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 20, "true_cfg_scale": 2.0}
    alone = run(pipe, [tiny.PROMPT], [1], {**settings, "negative_prompt": "a red circle"}).pictures
    both = run(pipe, ["a blue star", tiny.PROMPT], [0, 1], {**settings, "negative_prompt": "a red circle"}).pictures
    assert abs(both[1] - alone[0]).max() < 1e-5
    assert abs(both[1] - run(pipe, [tiny.PROMPT], [1], settings).pictures[0]).max() > 1e-3


def test_recorded_calls_leave_the_pipeline_alone():
    pipe = tiny.pipeline()
    settings = {"height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 20}
    with recorded(pipe) as calls:
        run(pipe, [tiny.PROMPT], [0], settings)
    assert len(calls) == 3 and "forward" not in vars(pipe.transformer)
    inputs, answer = calls[0]
    with torch.no_grad():
        assert torch.equal(pipe.transformer(**{**inputs, "return_dict": False})[0], answer)


def test_a_modules_digest_knows_its_settings():
    model = tiny.transformer()
    one, other = (PatchAdapter.for_model(model, rank=0, min_sigma={2: level}, scales=(2,)) for level in (0.3, 0.5))
    assert digest(one) == digest(PatchAdapter.for_model(model, rank=0, min_sigma={2: 0.3}, scales=(2,)))
    assert digest(one) != digest(other) and digest(torch.nn.Linear(2, 2)) != digest(one)


def test_clips_of_another_length_are_refused():
    with pytest.raises(ValueError, match="judged at 9 alone"):
        _check_size(Clips(), {"height": 96, "width": 96, "num_frames": 5})
    _check_size(Clips(), {"height": 96, "width": 96, "num_frames": 9})
