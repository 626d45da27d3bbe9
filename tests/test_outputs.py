"""Files that `ddit generate` writes, and what it refuses before it draws."""

from __future__ import annotations

import json
from itertools import islice

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

import tiny
import tiny_audio
import tiny_hunyuan
import tiny_ltx
from benchmarks.yardstick import wan as yardstick
from ddit.cli import main
from ddit.embedded import VIDEO_MODEL_FOLDER
from ddit.embedded.clip_judge import verdict
from ddit.embedded.clips import CLIP_SIZE, clips, parse_clip
from ddit.embedded.judge import load_judge
from ddit.pipelines.generate import check_call, draws_video
from ddit.pipelines.loading import EMBEDDED
from ddit.pipelines.outputs import frames, save
from ddit.preset import Preset


def ramp(*shape: int) -> np.ndarray:
    return np.linspace(0, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def test_pictures_side_by_side(tmp_path):
    plain, dynamic = ramp(2, 16, 16, 3), 1 - ramp(2, 16, 16, 3)
    paths = save(tmp_path / "new" / "a.png", dynamic, plain)
    assert [p.name for p in paths] == ["a-0.png", "a-1.png"]
    shown = np.asarray(Image.open(paths[1]), dtype=np.float32) / 255
    assert shown.shape == (16, 32, 3)
    np.testing.assert_allclose(shown[:, :16], plain[1], atol=0.003)
    np.testing.assert_allclose(shown[:, 16:], dynamic[1], atol=0.003)


def test_a_clip_and_its_contact_sheet(tmp_path):
    """Small clips are enlarged by a whole factor; frames keep their order and, but for the codec, their colours."""
    plain = np.repeat(np.linspace(0.1, 0.9, 5, dtype=np.float32), 64 * 64 * 3).reshape(1, 5, 64, 64, 3)
    dynamic = plain[:, ::-1]
    video, sheet = save(tmp_path / "a.mp4", dynamic, plain, fps=5)
    assert (video.name, sheet.name) == ("a.mp4", "a.png")
    written = iio.imread(video)
    assert written.shape == (5, 256, 512, 3)
    np.testing.assert_allclose(written[:, :, :256].mean((1, 2, 3)) / 255, plain[0, :, 0, 0, 0], atol=0.03)
    np.testing.assert_allclose(written[:, :, 256:].mean((1, 2, 3)) / 255, dynamic[0, :, 0, 0, 0], atol=0.03)
    rows = np.asarray(Image.open(sheet), dtype=np.float32) / 255
    assert rows.shape == (128, 320, 3)
    np.testing.assert_allclose(rows[0, ::64, 0], plain[0, :, 0, 0, 0], atol=0.003)
    np.testing.assert_allclose(rows[64, ::64, 0], dynamic[0, :, 0, 0, 0], atol=0.003)
    assert not list(tmp_path.glob("*partial*"))


def test_frames_of_clips_and_pictures():
    assert frames(ramp(2, 3, 8, 8, 3)).shape == (6, 8, 8, 3) and frames(ramp(2, 8, 8, 3)).shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"num_frames": 8}, "such as 9"), ({"num_frames": 16}, "such as 17"), ({"height": 40}, "such as 32")],
)
def test_sizes_that_a_video_pipeline_would_round_are_refused(settings, word):
    pipe = tiny.wan_pipeline()
    assert draws_video(pipe)
    check_call(pipe, {"num_frames": 9, "height": 64, "width": 96})
    with pytest.raises(ValueError, match=word):
        check_call(pipe, settings)


@pytest.mark.parametrize(
    ("make", "taken", "rounded"),
    [
        (tiny_ltx.pipeline, {"height": 96, "num_frames": 17}, [{"height": 80}, {"num_frames": 13}]),
        (tiny_hunyuan.pipeline, {"height": 48, "num_frames": 5}, [{"height": 40}, {"num_frames": 8}]),
        (tiny_hunyuan.pipeline_15, {"height": 720, "num_frames": 5}, [{"height": 40}, {"num_frames": 8}]),
    ],
)
def test_every_video_pipeline_is_one_whatever_it_calls_its_autoencoders_factors(make, taken, rounded):
    pipe = make()
    assert draws_video(pipe)
    check_call(pipe, taken)
    for settings in rounded:
        with pytest.raises(ValueError, match="this model takes"):
            check_call(pipe, settings)


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> str:
    """A shrunken Wan on disk with the text encoder of the embedded video model."""
    folder = tmp_path_factory.mktemp("wan")
    text = yardstick.TextEncoder()
    parts = dict(tokenizer=text.tokenizer, text_encoder=text.umt5)
    tiny.wan_pipeline(transformer=tiny.wan_transformer(text_dim=yardstick.TEXT_WIDTH), **parts).save_pretrained(folder)
    call = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 6, "max_sequence_length": 16}
    Preset(call=call).save(folder)
    return str(folder)


def test_a_clip_from_the_command_line(wan, tmp_path, capsys):
    """Guided by default, as `WanPipeline` is; plain beside dynamic."""
    out, report = tmp_path / "clip.mp4", tmp_path / "r.json"
    flags = [
        "--model",
        wan,
        "--threshold",
        "1e9",
        "--no-careful",
        "--compare",
        "--out",
        str(out),
        "--json",
        str(report),
    ]
    assert main(["generate", "a plain red star moving left on a brick background", *flags]) == 0
    shown = capsys.readouterr().out
    assert "steps: 1 1 1 4 4 4" in shown and "PSNR" in shown
    assert iio.imread(out).shape == (9, 256, 512, 3) and out.with_suffix(".png").is_file()
    told = json.loads(report.read_text())
    assert told["scales"] == [[1, 1, 1, 4, 4, 4]] and told["ssim"] < 1
    assert main(["generate", "a ball", "--model", wan, "--frames", "8"]) == 2
    assert "such as 9" in capsys.readouterr().err
    assert main(["generate", "a ball", "--model", wan, "--out", str(tmp_path / "a.png")]) == 2
    assert "must end in .mp4" in capsys.readouterr().err


def test_an_adapter_for_wan_from_the_command_line(wan, tmp_path):
    """Train, use, and its pictures: the frames of each clip in a row."""
    (tmp_path / "p.txt").write_text("".join(f"{clip.prompt}\n" for clip in islice(clips(0, "train"), 6)))
    run = tmp_path / "run"
    flags = ["--prompts", str(tmp_path / "p.txt"), "--out", str(run), "--steps", "2", "--batch", "2"]
    flags += ["--rank", "2", "--optimizer", "adamw", "--validation", "2", "--pictures", "1", "--cpu"]
    assert main(["train", "--model", wan, *flags]) == 0
    assert np.asarray(Image.open(run / "pictures" / "step-000002.png")).shape == (3 * 64, 9 * 64, 3)
    out = tmp_path / "clip.mp4"
    prompt = "a plain red star moving left on a brick background"
    used = ["--adapter", str(run / "adapter")]
    assert main(["generate", prompt, "--model", wan, *used, "--out", str(out)]) == 0
    assert out.is_file()


def test_an_embedded_model_that_is_missing_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(EMBEDDED, "embedded-video", tmp_path / "none")
    assert main(["generate", "a plain red star moving left on a brick background", "--model", "embedded-video"]) == 2
    assert "benchmarks/yardstick" in capsys.readouterr().err


@pytest.mark.skipif(not VIDEO_MODEL_FOLDER.exists(), reason="no video model ships")
@pytest.mark.parametrize("direction", ["left", "up"])
def test_the_embedded_video_model_moves_things_as_asked(direction, tmp_path):
    out, report = tmp_path / "clip.mp4", tmp_path / "r.json"
    prompt = f"a plain red star moving {direction} quickly on a sky background"
    flags = ["--model", "embedded-video", "--steps", "12", "--speedup", "1.5", "--patches", "full"]
    assert main(["generate", prompt, *flags, "--out", str(out), "--json", str(report)]) == 0
    assert json.loads(report.read_text())["flops_fraction"] < 0.9
    clip = np.stack(np.split(np.asarray(Image.open(out.with_suffix(".png"))), 9, axis=1))
    told = verdict(load_judge(), clip, parse_clip(prompt))
    assert told["motion"] == 1 and told["colour"] == 1


@pytest.mark.slow
def test_the_quality_suite_judges_clips(wan, tmp_path):
    flags = ["--prompts", "4", "--batch", "2", "--split", "tune", "--out", str(tmp_path / "q")]
    flags += ["--height", str(CLIP_SIZE), "--width", str(CLIP_SIZE)]
    methods = ["plain", "plain:run_steps=3", "ddit:threshold=1e9,careful=false"]
    assert main(["evaluate", "--model", wan, *flags, "--methods", *methods]) == 0
    rows = json.loads((tmp_path / "q.json").read_text())["methods"]
    assert [row["method"] for row in rows] == methods and rows[0]["psnr"] is None
    assert {"shape", "colour", "background", "flicker"} <= set(rows[2]["attributes"])
    assert rows[2]["flops_fraction"] < 1 and 0 <= rows[2]["adherence"] <= 1 and rows[2]["frechet"] > 0
    assert any(name.endswith("background") for name in rows[2]["full_steps"])
    assert (tmp_path / "q.png").is_file()


@pytest.mark.parametrize("make", [tiny.pipeline, tiny_audio.pipeline])
def test_frames_are_refused_for_pictures_and_sound(make):
    pipe = make()
    assert not draws_video(pipe)
    with pytest.raises(ValueError, match="makes no clips"):
        check_call(pipe, {"num_frames": 9})


def test_the_ending_must_fit_the_model(tmp_path, capsys):
    assert main(["generate", "a red circle on a sea background", "--out", str(tmp_path / "a.mp4")]) == 2
    assert "must end in .png" in capsys.readouterr().err
    assert main(["generate", "a red circle", "--out", str(tmp_path / "a.gif")]) == 2
    assert ".mp4" in capsys.readouterr().err


@pytest.mark.slow
def test_a_suite_of_an_embedded_model(tmp_path, capsys):
    flags = ["evaluate", "--suite", "embedded-video", "--prompts", "2", "--batch", "2", "--steps", "4"]
    methods = ["--methods", "plain", "ddit:schedule=1/1/1/4"]
    assert main([*flags, *methods, "--out", str(tmp_path / "e")]) == 0
    rows = json.loads((tmp_path / "e.json").read_text())["methods"]
    assert {"motion", "flicker", "roughness"} <= set(rows[1]["attributes"]) and rows[1]["flops_fraction"] < 1
    assert main([*flags, "--model", str(tmp_path)]) == 2
    assert "of another model" in capsys.readouterr().err
