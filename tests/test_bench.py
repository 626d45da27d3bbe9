"""Counts on the meta device, and timings of shrunken models."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch

import tiny
import tiny_audio
from ddit import PatchAdapter
from ddit.cli import main
from ddit.eval import timing
from ddit.eval.bench import Bench, count, counts_table, parse_schedule
from ddit.models import REGISTRY
from ddit.pipelines import known
from ddit.pipelines.known import meta_transformer, names


def test_known_architectures_are_the_real_ones():
    """Parameters in billions."""
    expected = {
        **{"flux.1-dev": 11.9, "flux.1-schnell": 11.9, "flux.2-dev": 32.2, "flux.3-klein-base": 5.5, "chroma1-hd": 8.9},
        **{"ace-step-1.5": 1.6, "krea-2": 12.8, "ovis-image": 7.4},
        **{"sd3.5-large": 8.1, "qwen-image": 20.4, "qwen-image-2.1": 7.1, "z-image": 6.2, "lumina-image-2.0": 2.6},
        **{"wan2.1-1.3b": 1.4, "wan2.1-14b": 14.3, "wan2.1-vace-14b": 17.3},
        **{"hunyuan-video": 12.8, "hunyuan-video-1.5": 8.3, "ltx-video": 1.9},
    }
    assert set(expected) == set(names())
    for name, billions in expected.items():
        if name == "flux.3-klein-base" and not hasattr(diffusers, "Flux3Transformer2DModel"):
            continue
        parameters = sum(p.numel() for p in meta_transformer(name).parameters())
        assert parameters / 1e9 == pytest.approx(billions, abs=0.06), name


def test_an_older_diffusers_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(REGISTRY, "LaterTransformer2DModel", REGISTRY["FluxTransformer2DModel"])
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "LaterTransformer2DModel"}')
    assert main(["bench", "--arch", str(tmp_path)]) == 2
    assert f"diffusers {diffusers.__version__} has no LaterTransformer2DModel" in capsys.readouterr().err


def test_flux_at_1024():
    """A token costs two operations per parameter it meets, and attention on top."""
    result = count("flux.1-dev", height=1024, width=1024)
    assert {s: row["tokens"] for s, row in result["scales"].items()} == {1: 4096, 2: 1024, 4: 256}
    assert result["scales"][1]["flops"] / 1e12 == pytest.approx(74.4, abs=0.1)
    assert result["scales"][2]["ratio"] == pytest.approx(3.46, abs=0.01)
    assert result["scales"][4]["ratio"] == pytest.approx(7.19, abs=0.01)


def test_grids_of_wan_are_padded():
    """480 x 832 are 30 x 52 tokens: at 4p 8 x 13 large patches, the last row half empty."""
    result = count("wan2.1-1.3b", height=480, width=832, frames=81)
    assert {s: row["tokens"] for s, row in result["scales"].items()} == {1: 32760, 2: 8190, 4: 21 * 8 * 13}
    assert result["scales"][1]["flops"] / 1e12 == pytest.approx(283, abs=1)


def test_sound_is_as_long_as_it_is_said(tmp_path, capsys):
    """25 latents a second, two of which make a token; an autoencoder of one's own tells another rate."""
    assert main(["bench", "--arch", "ace-step-1.5", "--size", "60s"]) == 0
    assert "| ace-step-1.5 | 60 s | 750, 2.4 | 375, 1.2 | 188, 0.7 |" in capsys.readouterr().out
    pipe = tiny_audio.pipeline()
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    for rate, tokens in ((tiny_audio.RATE, 50), (2 * tiny_audio.RATE, 100)):
        pipe.vae.register_to_config(sampling_rate=rate)
        pipe.vae.save_config(tmp_path / "vae")
        assert count(str(tmp_path), seconds=4)["scales"][1]["tokens"] == tokens


def test_an_adapter_is_counted_along():
    plain = count("wan2.1-1.3b", height=256, width=256, frames=5, scales=(1, 2))
    adapted = count("wan2.1-1.3b", height=256, width=256, frames=5, scales=(1, 2), rank=32)
    assert adapted["scales"][1] == plain["scales"][1]
    share = adapted["scales"][2]["flops"] / plain["scales"][2]["flops"] - 1
    assert 0 < share < 0.05


def test_the_command_writes_a_table(tmp_path, capsys):
    out = tmp_path / "flops"
    sizes = ["--size", "256x256", "--arch", "flux.1-schnell", "wan2.1-1.3b"]
    assert main(["bench", *sizes, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    saved = json.loads(out.with_suffix(".json").read_text())
    assert counts_table(saved["counts"]) == out.with_suffix(".md").read_text() and "wan2.1-1.3b" in shown
    assert len(saved["counts"]) == 2 and saved["command"].startswith("ddit")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--size", "1000x1024"], "multiple of 16"),
        (["--size", "large"], "HEIGHTxWIDTH"),
        (["--size", "480x832x80", "--arch", "wan2.1-1.3b"], "multiple of 4"),
        (["--arch", "flux.2"], "flux.1-dev"),
        (["--arch", "ace-step-1.5"], "such as 60s"),
        (["--arch", "ace-step-1.5", "--size", "0s"], "such as 60s"),
        (["--size", "60s"], "HEIGHTxWIDTH"),
        (["--scales", "3"], "power"),
        (["--arch", "z-image", "--size", "8208x1024"], "positions for 512"),
        (["--blocks", "20"], "19 and 38"),
        (["--blocks", "1", "1", "1"], "19 and 38"),
        (["--compile", "--trace", "x.json"], "--compile, --trace need a device"),
        (["--device", "cpu", "--batch", "1", "2", "--trace", "x.json"], "one of each"),
        (["--device", "cuda:7"], "this machine has"),
    ],
)
def test_nonsense_is_refused(flags, word, capsys):
    assert main(["bench", *flags]) == 2
    assert word in capsys.readouterr().err


def test_a_slice_is_as_wide_as_the_whole():
    whole, part = meta_transformer("flux.1-dev"), meta_transformer("flux.1-dev", [1, 2])
    assert (len(part.transformer_blocks), len(part.single_transformer_blocks)) == (1, 2)
    assert part.x_embedder.weight.shape == whole.x_embedder.weight.shape
    assert len(meta_transformer("wan2.1-1.3b", [2]).blocks) == 2
    assert count("flux.1-dev", height=256, width=256, blocks=[1])["blocks"] == [1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Shrunken pipelines of pictures and of clips."""
    made = {"flux": tiny.pipeline(seed=1), "wan": tiny.wan_pipeline()}
    there = {name: tmp_path_factory.mktemp(name) for name in made}
    for name, pipe in made.items():
        pipe.save_pretrained(there[name])
    return {name: str(folder) for name, folder in there.items()}


def test_weights_are_read_unless_random_ones_are_asked_for(folders):
    there = tiny.pipeline(seed=1).transformer.state_dict()
    read = known.transformer(folders["flux"]).state_dict()
    assert all(torch.equal(read[k], v) for k, v in there.items())
    other = known.transformer(folders["flux"], random_weights=True).state_dict()
    assert not all(torch.equal(other[k], v) for k, v in there.items())
    with pytest.raises(ValueError, match="--random-weights"):
        known.transformer(folders["flux"], blocks=[1])


def test_random_weights_have_the_types_of_loaded_ones(folders):
    read, made = (known.transformer(folders["wan"], dtype="bfloat16", random_weights=r) for r in (False, True))
    types = [{name: p.dtype for name, p in model.named_parameters()} for model in (read, made)]
    assert types[0] == types[1] and torch.float32 in types[0].values() and torch.bfloat16 in types[0].values()


@pytest.mark.parametrize(("name", "size"), [("flux", "32x32"), ("wan", "64x64x5")])
def test_steps_and_runs_are_timed(folders, name, size, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "MATRIX", 64)
    out, trace = tmp_path / "bench", tmp_path / "trace.json"
    flags = ["--arch", folders[name], "--size", size, "--device", "cpu", "--dtype", "float32"]
    more = ["--adapter-rank", "4", "--runs", "--steps", "6", "--repeats", "2", "--schedule", "1,1,4,2"]
    assert main(["bench", *flags, *more, "--batch", "1", "2", "--out", str(out)]) == 0
    assert "efficiency" in capsys.readouterr().out
    assert main(["bench", *flags, "--adapter-rank", "4", "--repeats", "1", "--trace", str(trace)]) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["counts"]
    assert [row["steps"]["batch"] for row in rows] == [1, 2]
    steps, run = rows[0]["steps"], rows[0]["runs"][0]
    assert set(steps["time_ratio"]) == {"1", "2", "4"} and all(t > 0 for t in steps["seconds"].values())
    assert set(steps["adapter_share"]) == {"2", "4"} and steps["scheduler_share_of_a_plain_step"] > 0
    assert steps["scheduler_share_with_skipping"] > 0
    assert run["schedule"] == [1, 1, 4, 2, 2, 2] and run["speedup"] > 0 and run["flops_fraction"] > 0
    named = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"ddit, scale 1", "ddit, scale 4", "ddit, scale 4, adapter"} <= named


def test_what_a_run_costs_is_predicted_as_it_is_counted(folders):
    """The same calls are counted in a run: with the costs of calls as times, the prediction is the run's."""
    bench = Bench(folders["flux"], dtype="float32", random_weights=True)
    inputs = bench.inputs(32, 32)
    schedule = [1, 1, 1, 4, 4, 2, 1, 4, 2, 2, 1, 1, 4, 1]
    run = timing.run_costs(bench.architecture, inputs, schedule, repeats=1)
    flops = {int(s): row["flops"] for s, row in count(folders["flux"], height=32, width=32)["scales"].items()}
    assert 1 / run["flops_fraction"] == pytest.approx(timing.predicted(schedule, flops))


def test_an_adapter_is_attached_once_for_all_runs(folders, monkeypatch):
    """Each time compiled blocks would be compiled anew; plain runs are the model's own all the same."""
    attached, attach = [], PatchAdapter.attach
    monkeypatch.setattr(PatchAdapter, "attach", lambda self, model: [attached.append(model), attach(self, model)][1])
    bench = Bench(folders["flux"], dtype="float32", random_weights=True, rank=2)
    inputs, own = bench.inputs(32, 32), bench.transformer.forward
    alone = timing.euler(bench.architecture, inputs, 4, own)
    seen = []

    def noted(architecture, inputs, steps, call):
        seen.append((call == own, euler(architecture, inputs, steps, call)))
        return seen[-1][1]

    euler = timing.euler
    monkeypatch.setattr(timing, "euler", noted)
    with torch.no_grad():
        timing.run_costs(bench.architecture, inputs, [1, 1, 4, 4], adapter=bench.adapter, repeats=2)
    assert attached.count(bench.transformer) == 1 and len(seen) >= 2 * (1 + 2)
    assert all(torch.equal(z, alone) == plain for plain, z in seen)
    assert bench.transformer.forward == own


def test_schedules(tmp_path):
    costs = {1: 1.0, 2: 0.3, 4: 0.15}
    paper = parse_schedule("paper", 50, costs)
    assert len(paper) == 50 and paper[:3] == [1, 1, 1] and paper[-1] == 1 and set(paper) == {1, 2, 4}
    assert timing.predicted(paper, costs) == pytest.approx(2.18, abs=0.06)
    assert parse_schedule("1,2,4", 5, costs) == [1, 2, 4, 4, 4]
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"scales": [[1, 4], [1, 2]]}))
    assert parse_schedule(str(file), 3, costs) == [1, 4, 4]
    for wrong in ("fast", "1,8", "", str(tmp_path / "none.json")):
        with pytest.raises(ValueError, match="schedule"):
            parse_schedule(wrong, 3, costs)
