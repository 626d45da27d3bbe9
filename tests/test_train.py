"""`ddit train` on a shrunken model: samples, resuming, damage, and that it learns."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import FlowMatchHeunDiscreteScheduler, FluxImg2ImgPipeline, UniPCMultistepScheduler
from PIL import Image
from safetensors.torch import load_file

import ddit
import tiny
from ddit import FixedSchedule, PatchAdapter
from ddit.cli import main
from ddit.eval.bench import count
from ddit.models import architecture_for
from ddit.pipelines.generate import guidance_scale
from ddit.pipelines.loading import load_pipeline
from ddit.pipelines.prompts import read_prompts
from ddit.preset import Preset
from ddit.pretrained import config_hash, fingerprint
from ddit.train.config import TrainConfig
from ddit.train.disk import checkpoints, result_folder
from ddit.train.distill import Draw, draw, losses, make_batch
from ddit.train.distill import weights as noise_weights
from ddit.train.pictures import check_encodes, encoded
from ddit.train.plan import plan
from ddit.train.samples import Samples, draw_samples, shard_path
from ddit.train.sources import read_captions
from ddit.train.trainer import Run, train
from ddit.train.validation import places

PROMPTS = [
    f"a {size} {colour} {shape} on the left on a sea background"
    for size in ("small", "large")
    for colour in ("red", "blue", "green")
    for shape in ("circle", "square")
]
CALL = dict(height=32, width=32, num_inference_steps=8, max_sequence_length=20)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A pipeline on disk, 12 prompts, and their samples."""
    folder = tmp_path_factory.mktemp("base")
    pipe = tiny.pipeline()
    pipe.save_pretrained(folder / "model")
    Preset(call=CALL).save(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    draw_samples(folder / "samples", pipe, CALL, PROMPTS, batch=5, seed=0)
    return folder


def settings(base: Path, out: Path, **changes) -> TrainConfig:
    values = dict(
        model=str(base / "model"),
        prompts=str(base / "prompts.txt"),
        samples=str(base / "samples"),
        out=str(out),
        sample_batch=5,
        rank=2,
        steps=6,
        batch=3,
        optimizer="adamw",
        lr=1e-3,
        checkpoint_every=2,
        validate_every=100,
        validation=2,
        pictures=0,
        cpu=True,
    )
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


# Samples


def stored(base: Path) -> Samples:
    return Samples(base / "samples", json.loads((base / "samples" / "samples.json").read_text()))


def test_samples_are_plain_runs_with_the_models_own_velocity(base):
    """Latents moved by that velocity from step to step, and the model answers it again."""
    pipe, samples = tiny.pipeline(), stored(base)
    architecture = architecture_for(pipe.transformer)
    assert len(samples) == len(PROMPTS) and samples.passes == 1 and samples.prompts == PROMPTS
    assert len(samples.sigmas) == 8 and samples.sigmas == sorted(samples.sigmas, reverse=True)
    levels = torch.tensor([*samples.sigmas, 0.0])
    for record in (7, 0):
        latents, velocity, call = samples.load([record], [range(8)])
        path = torch.cat([latents[0], samples.clean(record)])
        moved = (path[1:] - path[:-1]) / levels.diff().reshape(-1, 1, 1, 1)
        off = (moved - velocity[0]).square().flatten(1).mean(1)
        assert (off < 1e-8).all()
        for step in range(8):
            inputs = architecture.renoised(call, latents[:, step], levels[step : step + 1])
            answer = architecture.velocity(pipe.transformer(**inputs)[0], (16, 16))
            torch.testing.assert_close(answer, velocity[:, step], rtol=1e-4, atol=1e-5)
    embeds, pooled, _ = pipe.encode_prompt(PROMPTS[0], PROMPTS[0], max_sequence_length=20)
    torch.testing.assert_close(call["encoder_hidden_states"], embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(call["pooled_projections"], pooled, rtol=1e-4, atol=1e-5)
    assert call["img_ids"].shape == (64, 3)


def test_missing_shards_alone_are_drawn_again(base, tmp_path):
    pipe = tiny.pipeline()
    first = draw_samples(tmp_path, pipe, CALL, PROMPTS, batch=5, seed=0)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")}
    assert len(before) == 3
    middle, expected = shard_path(tmp_path, 1), load_file(shard_path(tmp_path, 1))
    middle.unlink()
    draw_samples(tmp_path, pipe, CALL, PROMPTS, batch=3, seed=0)
    for name, tensor in load_file(middle).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)
    changed = {p.name for p in tmp_path.glob("*.safetensors") if before[p.name] != p.stat().st_mtime_ns}
    assert changed == {middle.name} and len(first) == 12


def test_two_processes_share_the_work(base, tmp_path):
    pipe = tiny.pipeline()
    draw_samples(tmp_path, pipe, CALL, PROMPTS, batch=5, seed=0, rank=0, processes=2)
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {shard_path(tmp_path, n).name for n in (0, 2)}
    draw_samples(tmp_path, pipe, CALL, PROMPTS, batch=5, seed=0, rank=1, processes=2)
    for number in range(3):
        ours, theirs = load_file(shard_path(tmp_path, number)), load_file(shard_path(base / "samples", number))
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("change", ["prompts", "settings", "seed", "base_hash"])
def test_samples_of_something_else_are_refused(base, change):
    pipe = tiny.pipeline(num_layers=2) if change == "base_hash" else tiny.pipeline()
    call = {**CALL, "num_inference_steps": 5} if change == "settings" else CALL
    prompts = PROMPTS[::-1] if change == "prompts" else PROMPTS
    with pytest.raises(ValueError, match=change):
        draw_samples(base / "samples", pipe, call, prompts, batch=5, seed=int(change == "seed"))


def test_true_guidance_gives_a_record_per_pass(tmp_path):
    pipe = tiny.pipeline()
    call = {**CALL, "true_cfg_scale": 2.0, "negative_prompt": "a red circle"}
    samples = draw_samples(tmp_path, pipe, call, PROMPTS[:2], batch=2, seed=0)
    assert samples.passes == 2 and len(samples) == 4
    latents, velocity, inputs = samples.load([0, 1], [[2, 5], [2, 5]])
    assert latents.shape[:2] == (2, 2) and torch.equal(latents[0], latents[1])
    assert not torch.equal(velocity[0], velocity[1])
    assert not torch.equal(inputs["encoder_hidden_states"][0], inputs["encoder_hidden_states"][1])


def test_prompts_are_read(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("one\n\n  two \nthree\n", encoding="utf-8")
    assert read_prompts(str(path)) == ["one", "two", "three"]
    assert read_prompts(str(path), count=2) == ["one", "two"]
    with pytest.raises(ValueError, match="holds 3 prompts, 4"):
        read_prompts(str(path), count=4)
    with pytest.raises(ValueError, match="no file"):
        read_prompts(str(tmp_path / "none.txt"))


# Chance


def test_prompts_come_without_the_mark_of_windows(tmp_path):
    for name, text in (("p.txt", "a cat\n"), ("p.jsonl", '{"text": "a cat"}\n'), ("p.json", '["a cat"]')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read_prompts(str(tmp_path / name)) == ["a cat"]
    (tmp_path / "coco.json").write_text('{"annotations": ["a", "b"]}')
    with pytest.raises(ValueError, match="must be objects, as COCO has them; one is 'a'"):
        read_prompts(str(tmp_path / "coco.json"))


@pytest.fixture
def shown(tmp_path):
    """A folder of pictures with captions in text files."""
    folder = tmp_path / "shown"
    folder.mkdir()
    for i in range(5):
        colours = np.random.default_rng(i).integers(0, 256, (3, 4, 3), np.uint8)
        Image.fromarray(colours).resize((80, 60)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {'red' if i % 2 else 'blue'} circle\n")
    return folder


def test_pictures_are_noised_along_the_samplers_levels(shown, tmp_path):
    pipe, found = tiny.pipeline(), read_captions(shown)
    call = {**CALL, "negative_prompt": "", "true_cfg_scale": 2.0}
    paths = list(found)
    samples = draw_samples(tmp_path / "s", pipe, call, list(found.values()), batch=3, seed=0, pictures=paths)
    assert samples.passes == 2 and len(samples) == 10 and samples.prompts[1] == "a red circle"
    assert "step" not in vars(pipe.scheduler)
    architecture, levels = architecture_for(pipe.transformer), torch.tensor(samples.sigmas)
    for record, path in ((2, paths[1]), (9, paths[4])):
        clean = encoded(pipe.vae, [path], CALL["height"], CALL["width"])
        torch.testing.assert_close(samples.clean(record), clean, rtol=1e-4, atol=1e-5)
        latents, velocity, call = samples.load([record], [range(len(levels))])
        noise = latents[0, 0]
        assert 0.8 < noise.std() < 1.2 and levels[0] == 1
        for step, sigma in enumerate(levels):
            torch.testing.assert_close(latents[0, step], torch.lerp(clean[0], noise, sigma), rtol=1e-4, atol=1e-5)
            inputs = architecture.renoised(call, latents[:, step], levels[step : step + 1])
            answer = architecture.velocity(pipe.transformer(**inputs)[0], clean.shape[2:])
            torch.testing.assert_close(answer, velocity[:, step], rtol=1e-4, atol=1e-5)


def test_an_adapter_learns_from_pictures(base, shown, tmp_path):
    changes = {"prompts": None, "samples": None, "images": str(shown), "steps": 2}
    train(settings(base, tmp_path / "run", **changes))
    assert json.loads((tmp_path / "run" / "samples" / "samples.json").read_text())["pictures"] == [
        f"{i}.png" for i in range(5)
    ]
    shutil.rmtree(shown)  # the samples are there
    train(settings(base, tmp_path / "run", **{**changes, "steps": 3}))
    shard_path(tmp_path / "run" / "samples", 0).unlink()
    with pytest.raises(ValueError, match=r"samples of pictures, and 1 of its files are missing; .*--images"):
        train(settings(base, tmp_path / "run", **{**changes, "images": None, "steps": 4}))
    assert PatchAdapter.from_pretrained(tmp_path / "run" / "adapter").config["steps_trained"] == 3


def test_pictures_need_captions_and_a_known_autoencoder(base, shown, tmp_path):
    table = shown / "metadata.jsonl"
    table.write_text('{"file_name": "1.png", "text": "one"}\n{"file_name": "0.png", "text": ""}\n')
    with pytest.warns(UserWarning, match=r"does not list 3 pictures beside it, 2\.png first"):
        found = read_captions(shown)
    assert found == {shown / "1.png": "one", shown / "0.png": (shown / "0.txt").read_text().strip()}
    table.write_text('{"file_name": "1.png", "text": "one\u2028line"}\n', encoding="utf-8")
    assert read_captions(shown) == {shown / "1.png": "one\u2028line"}
    table.write_text('{"file_name": "1.png", "text": "one"}\n{"file_name": "0.png", "text": "two"}\n')
    with pytest.raises(ValueError, match="holds 2 pictures, 3 were asked for"):
        read_captions(shown, 3)
    table.write_text('{"file_name": "9.png", "text": "one"}\n')
    with pytest.raises(ValueError, match=r"1 pictures .* have no caption, 9.png first"):
        read_captions(shown)
    table.write_text("1.png one\n")
    with pytest.raises(ValueError, match="can't be read"):
        read_captions(shown)
    table.unlink()
    (shown / "3.txt").unlink()
    with pytest.raises(ValueError, match=r"3\.png first"):
        read_captions(shown)
    with pytest.raises(ValueError, match="no folder"):
        read_captions(tmp_path / "none")
    (shown / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"2\.png can't be read as a picture"):
        encoded(tiny.pipeline().vae, [shown / "2.png"], 64, 64)
    damaged = bytearray((shown / "4.png").read_bytes())
    damaged[damaged.index(b"IDAT") + 6] ^= 255
    (shown / "4.png").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"4\.png can't be read as a picture"):
        encoded(tiny.pipeline().vae, [shown / "4.png"], 64, 64)
    with pytest.raises(ValueError, match="leave prompts"):
        settings(base, tmp_path, images=str(shown))
    with pytest.raises(ValueError, match="give prompts instead"):
        check_encodes(SimpleNamespace(vae=torch.nn.Linear(1, 1)))


def test_pictures_stand_upright(tmp_path):
    """As cameras tell in EXIF, where 6 is a picture that lies on its side."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 32, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "upright.png")
    upright.rotate(90, expand=True).save(tmp_path / "lying.png", exif=exif)
    one, other = (encoded(tiny.pipeline().vae, [tmp_path / name], 64, 32) for name in ("upright.png", "lying.png"))
    assert torch.equal(one, other)


def test_draws_depend_on_seed_step_and_number_alone(base):
    samples, config = stored(base), settings(base, base)
    table = [draw(config, samples, 10, step, number) for step in range(30) for number in range(10)]
    assert table == [draw(config, samples, 10, step, number) for step in range(30) for number in range(10)]
    assert {d.run for d in table} == set(range(10)) and {d.scale for d in table} == {2, 4}
    below = {scale: sum(sigma < low for sigma in samples.sigmas) for scale, low in config.lowest.items()}
    assert config.lowest == {2: 0.3, 4: 0.6} and below[4] > below[2] > 0
    for scale in (2, 4):
        assert {d.step for d in table if d.scale == scale} == set(range(8 - below[scale]))
    everywhere = settings(base, base, min_sigma=(0, 0))
    assert {draw(everywhere, samples, 10, 0, number).step for number in range(100)} == set(range(8))


def test_bounded_weights_are_those_of_the_clean_latents_below_a_quarter():
    sigma = torch.tensor([0.05, 0.125, 0.25, 0.9])
    torch.testing.assert_close(noise_weights("bounded", sigma), torch.tensor([0.04, 0.25, 1.0, 1.0]))
    torch.testing.assert_close(noise_weights("none", sigma), torch.ones(4))


def test_guidance_makes_more_of_what_passes_err_apart():
    """On average over which pass is which, the loss is the error of the guided answer."""
    a, b = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    own, guided = losses([a, b], 3.0)
    both = [(3 * x - 2 * y).square().flatten(1).mean(1) for x, y in ((a, b), (b, a))]
    torch.testing.assert_close(guided, sum(both) / 2)
    torch.testing.assert_close(own, (a.square() + b.square()).flatten(1).mean(1) / 2)
    assert torch.equal(*losses([a, b], 1.0)) and torch.equal(*losses([a, b, a], 3.0))
    assert torch.equal(*losses([a], 3.0))


def test_scales_of_guidance_are_those_of_two_passes():
    flux, wan = tiny.pipeline(), tiny.wan_pipeline()
    assert guidance_scale(flux, {"guidance_scale": 3.5}) == 1
    assert guidance_scale(flux, {"guidance_scale": 3.5, "true_cfg_scale": 2.0}) == 2
    assert guidance_scale(wan, {}) == 5 and guidance_scale(wan, {"guidance_scale": 3}) == 3


def test_batches_hold_steps_of_plain_runs(base):
    samples, architecture = stored(base), architecture_for(tiny.transformer())
    batch = make_batch(architecture, samples, [Draw(3, 2, 5)] * 2, 0, "cpu", torch.float32)
    latents, velocity, _ = samples.load([3], [[5]])
    assert torch.equal(architecture.read(batch.inputs).latents[0], latents[0, 0])
    assert torch.equal(batch.target[1], velocity[0, 0]) and batch.scales == [2, 2]
    assert batch.sigma.tolist() == pytest.approx([samples.sigmas[5]] * 2)


# Training


@pytest.mark.parametrize("start", ["noise-consistent", "bilinear"])
def test_it_learns(base, tmp_path, start):
    changes = {"steps": 60, "lr": 3e-3, "ema": 0.0, "validate_every": 60, "batch": 4}
    config = settings(base, tmp_path, start=start, **changes)
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    levels = stored(base).sigmas
    known = {s: {levels[i] for i in places(levels, lowest)} for s, lowest in ((2, 0.3), (4, 0.6))}
    assert {(r["scale"], r["sigma"]) for r in rows} == {(s, x) for s, found in known.items() for x in found}
    learnt, free = np.mean([r["error"] for r in rows]), np.mean([r["training_free"] for r in rows])
    assert learnt < 0.9 * free
    adapter = PatchAdapter.from_pretrained(tmp_path / "adapter")
    assert adapter.config["steps_trained"] == 60 and set(adapter.detail_variance) == {2, 4}
    assert adapter.serves(4, 0.6) and not adapter.serves(4, 0.59) and adapter.serves(2, 0.3) and adapter.serves(1, 0)
    pipe = tiny.pipeline()
    with ddit.apply(pipe, adapter=adapter, patches=FixedSchedule(steps=(1, 2, 4))):
        assert torch.isfinite(tiny.sample(pipe)).all()


def test_samples_of_another_sampler_are_refused(base):
    pipe = tiny.pipeline()
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(ValueError, match="with other sampler, sampler_hash"):
        draw_samples(base / "samples", pipe, CALL, PROMPTS, batch=5, seed=0)


def test_samples_of_other_weights_are_refused(base):
    pipe = tiny.pipeline()
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn.to_q.weight.mul_(1.01)
    with pytest.raises(ValueError, match="with other base_weights"):
        draw_samples(base / "samples", pipe, CALL, PROMPTS, batch=5, seed=0)


def test_fingerprints_forget_precision_and_configurations_their_defaults():
    one, other = tiny.transformer(), tiny.transformer(seed=1)
    assert fingerprint(one) != fingerprint(other) and config_hash(one) == config_hash(other)
    assert fingerprint(one) == fingerprint(tiny.transformer().bfloat16())
    known = config_hash(one)
    one.register_to_config(out_channels=None)  # the default, written out
    assert config_hash(one) == known
    one.register_to_config(out_channels=8)
    assert config_hash(one) != known


def test_samplers_with_several_calls_a_step_are_refused(tmp_path):
    pipe = tiny.pipeline()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler calls the model 2 times in a step"):
        draw_samples(tmp_path, pipe, CALL, PROMPTS, batch=5, seed=0)


def test_a_pipeline_with_two_transformers_is_refused(base, tmp_path, monkeypatch):
    pipe, preset = load_pipeline(str(base / "model"))
    pipe.transformer_2 = pipe.transformer
    monkeypatch.setattr("ddit.train.trainer.load_pipeline", lambda *_, **__: (pipe, preset))
    with pytest.raises(ValueError, match="has two transformers, and an adapter serves one"):
        train(settings(base, tmp_path / "run", samples=None))
    assert not (tmp_path / "run" / "samples").exists()


def test_samples_for_validation_are_kept_apart_with_all_their_passes(base, tmp_path, monkeypatch):
    pipe, preset = load_pipeline(str(base / "model"))
    guided = replace(preset, call={**CALL, "true_cfg_scale": 2.0, "negative_prompt": "a red circle"})
    monkeypatch.setattr("ddit.train.trainer.load_pipeline", lambda *_, **__: (pipe, guided))
    drawn: dict[str, set[str]] = {"train": set(), "validation": set()}
    load = Samples.load

    def spy(self, indices, steps):
        kind = "validation" if len(indices) == 3 else "train"
        drawn[kind] |= {self.prompts[i // self.passes] for i in indices}
        return load(self, indices, steps)

    monkeypatch.setattr(Samples, "load", spy)
    train(settings(base, tmp_path, samples=None, count=5, validation=3, batch=7, steps=4))
    assert drawn["validation"] == set(PROMPTS[2:5]) and drawn["train"] == set(PROMPTS[:2])
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").open()]
    assert all(row["guided_error"] > row["error"] > 0 for row in rows)


def test_prodigy_checkpointing_and_pictures(base, tmp_path):
    config = settings(
        base, tmp_path, optimizer="prodigy", lr=None, gradient_checkpointing=True, pictures=2, steps=3, tracker=None
    )
    train(config)
    assert (tmp_path / "pictures" / "step-000003.png").is_file()


def test_what_is_named_and_missing_is_refused(base, tmp_path):
    """Also where the samples are there already, and where a tracker would only be silent."""
    train(settings(base, tmp_path / "one", steps=1))
    for changes, told in (
        ({"images": str(tmp_path / "none"), "prompts": None}, "were not made of pictures"),
        ({"tracker": "comet_ml"}, "tracker is 'comet_ml'; installed here are"),
    ):
        with pytest.raises(ValueError, match=told):
            train(settings(base, tmp_path / "two", **changes))
    train(settings(base, tmp_path / "one", steps=2, prompts=None))  # what made the samples may be gone


def test_gradient_checkpointing_changes_nothing(base, tmp_path):
    for name, checkpointing in (("a", False), ("b", True)):
        train(settings(base, tmp_path / name, gradient_checkpointing=checkpointing))
    a, b = (weights(next((tmp_path / x).glob("*/*.safetensors")).parent) for x in "ab")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6)


def test_a_killed_run_ends_bit_equal(base, tmp_path):
    """kill -9 in the middle, then the same command."""
    whole = settings(base, tmp_path / "whole", steps=24, optimizer="prodigy", lr=1.0)
    train(whole)
    config = replace(whole, out=str(tmp_path / "killed"))
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-m", "ddit.cli", "train", "--config", str(tmp_path / "c.json")]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: sums depend on it in their last digit
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=threads)
    deadline = time.monotonic() + 120
    while len(checkpoints(tmp_path / "killed")) < 1 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    log = (tmp_path / "killed" / "train.jsonl").read_text().splitlines()
    assert 0 < len(log) < 24
    assert subprocess.run(command, capture_output=True, env=threads).returncode == 0
    a, b = (weights(result_folder(run)) for run in (whole, config))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_what_a_kill_in_the_last_save_left_out_is_settings(base, tmp_path):
    import shutil

    config = settings(base, tmp_path, steps=2)
    train(config)
    kept = weights(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter")
    (tmp_path / "validation.jsonl").unlink()
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1}\n{"st')
    train(config)
    now = weights(tmp_path / "adapter")
    assert all(torch.equal(kept[k], now[k]) for k in kept) and (tmp_path / "validation.jsonl").is_file()
    assert [json.loads(line)["step"] for line in (tmp_path / "train.jsonl").open()] == [1, 2]


def test_checkpoints_rotate_and_steps_may_grow(base, tmp_path):
    train(settings(base, tmp_path))
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000004.pt", "checkpoint-000006.pt"]
    train(settings(base, tmp_path, steps=8))
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000006.pt", "checkpoint-000008.pt"]
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.old"))


def test_an_adapter_is_trained_on_from(base, tmp_path):
    train(settings(base, tmp_path / "a", lr=1e-2))
    earlier = str(tmp_path / "a" / "adapter")
    further = settings(base, tmp_path / "b", adapter=earlier, steps=1, lr=1e-6, ema=0.0)
    train(further)
    assert PatchAdapter.from_pretrained(tmp_path / "b" / "adapter").config["steps_trained"] == 7
    train(further)  # is there already
    assert not (tmp_path / "b" / "validation.jsonl").read_text().count('"step": 2')
    a, b = weights(tmp_path / "a" / "adapter"), weights(tmp_path / "b" / "adapter")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=2e-6)
    new = tmp_path / "not drawn"
    with pytest.raises(ValueError, match="rank 2 where 4 is asked for"):
        train(settings(base, tmp_path / "c", adapter=earlier, rank=4, samples=str(new)))
    assert not new.exists()


def test_an_adapter_trained_on_keeps_its_noise_levels(base, tmp_path):
    train(settings(base, tmp_path / "first", steps=1, scales=(2, 4), min_sigma=(0.45, 0.85)))
    changes = {"steps": 1, "scales": (2, 4), "adapter": str(tmp_path / "first" / "adapter")}
    for name, min_sigma, expected in (("on", None, (0.45, 0.85)), ("other", (0.2, 0.5), (0.2, 0.5))):
        train(settings(base, tmp_path / name, min_sigma=min_sigma, **changes))
        learnt = PatchAdapter.from_pretrained(tmp_path / name / "adapter")
        assert learnt.config["min_sigma"] == dict(zip(("2", "4"), expected, strict=True))
    PatchAdapter.for_model(tiny.transformer(), rank=2, scales=(2, 4)).save_pretrained(tmp_path / "everywhere")
    train(settings(base, tmp_path / "last", **{**changes, "adapter": str(tmp_path / "everywhere")}))
    learnt = PatchAdapter.from_pretrained(tmp_path / "last" / "adapter")
    assert learnt.serves(2, 0.0) and learnt.serves(4, 0.0)


def test_errors_are_told_at_the_levels_they_were_measured_at():
    sigmas = [1.0, 0.9, 0.7, 0.35]
    assert places(sigmas, 0.3) == [1, 2, 3] and places(sigmas, 0.6) == [1, 2] and places(sigmas, 0.95) == [0]
    assert places([0.5], 0.6) == []


def test_a_run_says_how_samples_are_drawn(base, tmp_path, capsys):
    """As the command line and a file of settings have it, whose names may have hyphens."""
    (tmp_path / "settings.yaml").write_text("sample-steps: 4\nrank: 0\ncall: {max_sequence_length: 20}\n")
    flags = ["train", "--model", str(base / "model"), "--prompts", str(base / "prompts.txt"), "--count", "3"]
    flags += ["--out", str(tmp_path / "run"), "--config", str(tmp_path / "settings.yaml"), "--optimizer", "adamw"]
    flags += ["--steps", "1", "--validation", "1", "--pictures", "0"]
    assert main([*flags, "--frames", "5"]) == 2 and "makes no clips" in capsys.readouterr().err
    assert main([*flags, "--call", "num_inference_steps=3"]) == 2 and "--sample-steps" in capsys.readouterr().err
    assert main([*flags, "--call", "seed=1", "--call", "seed=2"]) == 2 and "several times" in capsys.readouterr().err
    assert main([*flags, "--call", "true_cfg_scale=2", "--call", "negative_prompt="]) == 0
    samples = stored(tmp_path / "run")
    told = samples.manifest["settings"]
    assert samples.passes == 2 and len(samples.sigmas) == 4
    assert told["true_cfg_scale"] == 2 and told["max_sequence_length"] == 20


def test_a_pipeline_that_starts_from_pictures_is_refused(tmp_path):
    pipe = tiny.pipeline(FluxImg2ImgPipeline)
    with pytest.raises(
        ValueError,
        match=r"FluxImg2ImgPipeline was called with prompts alone. If it can't do without image, .*text pipeline",
    ):
        draw_samples(tmp_path / "s", pipe, CALL, PROMPTS[:2], batch=2, seed=0)


def test_another_precision_in_one_process_is_refused(base, tmp_path):
    precision = Accelerator().mixed_precision
    with pytest.raises(ValueError, match="begin a new process"):
        train(settings(base, tmp_path / "run", mixed_precision="bf16" if precision == "no" else "no"))


def test_accumulation_equals_a_larger_batch(base, tmp_path):
    train(settings(base, tmp_path / "a", batch=4))
    train(settings(base, tmp_path / "b", batch=2, accumulation=2))
    a, b = (weights(next((tmp_path / x).glob("*/*.safetensors")).parent) for x in "ab")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)


# What goes wrong


def test_other_settings_are_refused(base, tmp_path):
    train(settings(base, tmp_path, steps=2))
    with pytest.raises(ValueError, match=r"rank \(2 then, 4 now\)"):
        train(settings(base, tmp_path, steps=4, rank=4))


def test_settings_may_change_until_there_is_a_checkpoint(base, tmp_path):
    """A slip, or too large a batch, does not make a folder useless."""
    with pytest.raises(ValueError, match="can't be loaded"):
        train(settings(base, tmp_path, adapter=str(tmp_path / "typo")))
    train(settings(base, tmp_path, batch=2, steps=2))


def test_an_adapter_keeps_its_errors_when_its_run_goes_on(base, tmp_path):
    train(settings(base, tmp_path, steps=2))
    errors = PatchAdapter.from_pretrained(tmp_path / "adapter").errors
    assert set(errors) == {2, 4}
    config = settings(base, tmp_path, steps=50, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddit.train.trainer.Run.advance", stopping_at(3))
        train(config)
    resumed = PatchAdapter.from_pretrained(tmp_path / "adapter")
    assert resumed.config["steps_trained"] == 3 and resumed.errors == errors


def stopping_at(step: int):
    """`Run.advance`, which is broken off once so many steps are done."""
    advance = Run.advance

    def stop(run):
        if run.step == step:
            raise KeyboardInterrupt
        return advance(run)

    return stop


def test_vanished_prompts_do_not_stop_a_run_that_has_its_samples(base, tmp_path):
    with pytest.warns(UserWarning, match=r"there is no '.*gone.txt'; the samples in .* are taken"):
        train(settings(base, tmp_path, prompts=str(tmp_path / "gone.txt"), steps=2))
    with pytest.raises(ValueError, match="no file"):
        train(settings(base, tmp_path / "b", prompts=str(tmp_path / "gone.txt"), samples=str(tmp_path / "new")))


def test_a_shard_cut_short_is_named(base, tmp_path):
    import shutil

    shutil.copytree(base / "samples", tmp_path / "samples")
    path = shard_path(tmp_path / "samples", 1)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"samples-00001.safetensors can't be read.*delete it"):
        train(settings(base, tmp_path / "run", samples=str(tmp_path / "samples")))
    path.unlink()
    train(settings(base, tmp_path / "run", samples=str(tmp_path / "samples"), steps=1))


def test_a_loss_that_is_not_finite_saves_nothing(base, tmp_path):
    with pytest.raises(FloatingPointError, match="at step"):
        train(settings(base, tmp_path, lr=1e30, steps=50, checkpoint_every=1000, clip=0.0))
    assert not checkpoints(tmp_path) and not (tmp_path / "adapter").exists()


def test_a_full_disk_keeps_what_was_there(base, tmp_path, monkeypatch):
    train(settings(base, tmp_path, steps=2))
    kept = weights(tmp_path / "adapter")

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"step 4 can't be written.*No space left.*earlier ones are kept"):
            train(settings(base, tmp_path, steps=6))
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000002.pt"]
    assert not list(tmp_path.glob("*.partial"))
    now = weights(tmp_path / "adapter")
    assert all(torch.equal(kept[k], now[k]) for k in kept)
    train(settings(base, tmp_path, steps=6))


def test_a_damaged_checkpoint_is_named(base, tmp_path):
    train(settings(base, tmp_path, steps=4))
    last = checkpoints(tmp_path)[-1]
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint-000004.pt can't be read.*the one before"):
        train(settings(base, tmp_path, steps=6))
    last.unlink()
    train(settings(base, tmp_path, steps=6))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"optimizer": "sgd"}, "prodigy, adamw"),
        ({"ema": 2.0}, "from 0 to 1"),
        ({"lr": -1.0}, "above 0"),
        ({"scales": (3,)}, "powers of two"),
        ({"rank": -1}, "rank is -1"),
        ({"dtype": "float16"}, "float32, bfloat16"),
        ({"min_sigma": (0.3,)}, "from 0 to below 1 for each of"),
        ({"min_sigma": (0.3, 1.0)}, "min_sigma is"),
        ({"validation": 12}, "not more than validation"),
        ({"height": 33}, "multiples of"),
    ],
)
def test_bad_settings_are_refused(base, tmp_path, change, word):
    with pytest.raises(ValueError, match=word):
        train(settings(base, tmp_path, **change))


def test_command_line(base, tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "run")]) == 2
    assert "--prompts" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("stepz: 3\n")
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "stepz" in capsys.readouterr().err
    values = {**settings(base, tmp_path / "run").to_dict(), "steps": 9}
    (tmp_path / "c.yaml").write_text(json.dumps(values))
    curves = tmp_path / "curves.json"
    flags = ["--steps", "1", "--no-residual", "--json", str(curves)]
    assert main(["train", "--config", str(tmp_path / "c.yaml"), *flags]) == 0
    told = json.loads(curves.read_text())
    assert told["peak_memory_bytes"] > 2**20 and told["train"][0]["seconds"] > 0
    assert len(told["train"]) == 1 and {r["step"] for r in told["validation"]} == {1}
    assert told["settings"]["steps"] == 1 and told["processes"] == 1 and told["command"].startswith("ddit")
    saved = json.loads((tmp_path / "run" / "train.json").read_text())
    assert saved["steps"] == 1 and saved["residual"] is False
    assert PatchAdapter.from_pretrained(tmp_path / "run" / "adapter").config["residual"] is False


def test_prompts_of_the_grammar(tmp_path):
    assert main(["prompts", "--count", "20", "--out", str(tmp_path / "p.txt")]) == 0
    assert len(read_prompts(str(tmp_path / "p.txt"))) == 20


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(base, tmp_path):
    """`accelerate launch` with gloo: the same global batch, the same losses and weights."""
    one = settings(base, tmp_path / "one", batch=4)
    two = settings(base, tmp_path / "two", batch=2)
    for config, processes in ((one, 1), (two, 2)):
        path = tmp_path / f"{processes}.json"
        path.write_text(json.dumps(config.to_dict()))
        launch = ["-m", "accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--multi_gpu"] * (processes > 1)  # accelerate's name for torch.distributed, CPU or not
        command = [*launch, "-m", "ddit.cli", "train", "--config", str(path)]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    a, b = (weights(next((tmp_path / x).glob("*/*.safetensors")).parent) for x in ("one", "two"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-2, atol=1e-4)


def test_tensorboard(base, tmp_path):
    pytest.importorskip("tensorboard")
    train(settings(base, tmp_path, steps=2, validate_every=2, tracker="tensorboard"))
    assert list((tmp_path / "ddit").glob("**/events*"))


def test_dry_run_counts_what_training_holds(base, tmp_path, capsys):
    """Against the real thing: parameters, optimizer state and average of a run on this base."""
    command = ["train", "--dry-run", "--model", str(base / "model"), "--json", str(tmp_path / "p.json")]
    assert main([*command, "--rank", "2"]) == 0
    figures = json.loads((tmp_path / "p.json").read_text())
    assert f"{figures['trains']}: " in capsys.readouterr().out
    assert figures["trains"] == "adapter"
    train(settings(base, tmp_path / "run", steps=1, optimizer="prodigy", lr=None))
    count = sum(t.numel() for t in weights(result_folder(settings(base, tmp_path / "run"))).values())
    assert figures["adapter_parameters"] == count
    state = torch.load(checkpoints(tmp_path / "run")[0], weights_only=True)
    held = [v for s in state["optimizer"]["state"].values() for v in s.values() if torch.is_tensor(v) and v.numel() > 1]
    assert figures["bytes"]["optimizer"] == 4 * sum(v.numel() for v in held)
    assert figures["bytes"]["base"] == 4 * sum(p.numel() for p in tiny.transformer().parameters())
    assert main(["train", "--dry-run", "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_dry_run_counts_the_work_of_a_size(base, capsys):
    """A forward and a backward as long for each row of a batch, on average over the scales."""
    model = str(base / "model")
    sized = TrainConfig(model=model, height=32, width=48, batch=3)
    work, counted = plan(sized)["work"], count(model, height=32, width=48, rank=32)["scales"]
    assert work["full_call"] == counted[1]["flops"]
    assert work["optimizer_step"] == 2 * 3 * (counted[2]["flops"] + counted[4]["flops"]) / 2
    assert plan(replace(sized, gradient_checkpointing=True))["work"]["optimizer_step"] == 1.5 * work["optimizer_step"]
    assert "work" not in plan(replace(sized, height=None))
    command = ["train", "--dry-run", "--model", model, "--height", "32", "--width"]
    assert main([*command, "46"]) == 2
    assert "must be a multiple of" in capsys.readouterr().err
    assert main([*command, "48"]) == 0
    assert "TFLOP/s" in capsys.readouterr().out


def test_the_example_is_flux_dev():
    from ddit.pipelines.known import meta_transformer

    assert sum(p.numel() for p in meta_transformer("flux.1-dev").parameters()) == 11_901_408_320
