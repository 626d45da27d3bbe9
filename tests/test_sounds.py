"""Sound on disk and on the command line."""

from __future__ import annotations

import json
import shutil
import wave

import numpy as np
import pytest

import tiny_audio
from ddit.cli import main
from ddit.pipelines import sounds
from ddit.preset import Preset


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("ace-step")
    tiny_audio.pipeline().save_pretrained(folder)
    return str(folder)


def read(path) -> tuple[np.ndarray, int]:
    with wave.open(str(path)) as file:
        frames = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
        return frames.reshape(-1, file.getnchannels()).T, file.getframerate()


def test_what_is_saved_is_what_was_made(tmp_path):
    sound = np.random.default_rng(0).uniform(-1, 1, (2, 2, 50)).astype(np.float32)
    loud = np.full((2, 2, 50), 1.5)
    files = sounds.save(tmp_path / "a" / "b.wav", sound, loud, rate=44100)
    assert [file.name for file in files] == ["b-0.wav", "b-1.wav", "b-0-plain.wav", "b-1-plain.wav"]
    for file, made in zip(files, [*sound, *loud.clip(-1, 1)], strict=True):
        found, rate = read(file)
        assert rate == 44100 and np.abs(found / 32767 - made).max() < 1e-4
    assert sounds.save(tmp_path / "c.wav", sound[:1], rate=8000) == [tmp_path / "c.wav"]


def test_likeness_by_hand():
    """Half as loud leaves half of it as error, a quarter of the power: 6 dB."""
    sound = np.random.default_rng(0).uniform(-1, 1, (1, 2, 5000))
    assert sounds.likeness(sound, 0.5 * sound)["snr"] == pytest.approx(6.02, abs=0.01)
    assert sounds.likeness(sound, sound)["snr"] == float("inf")


def test_generate_makes_sound_and_compares_it_with_plain(model, tmp_path, capsys):
    out, report = tmp_path / "waltz.wav", tmp_path / "waltz.json"
    length = ["--call", "audio_duration=1.6", "--steps", "6", "--num-images", "2"]
    flags = ["--schedule", "1", "1", "2", "--compare", "--out", str(out), "--json", str(report)]
    assert main(["generate", "a waltz", "--model", model, *length, *flags]) == 0
    assert "signal to noise" in capsys.readouterr().out
    values = json.loads(report.read_text())
    assert values["scales"] == [[1, 1, 2, 2, 2, 2]] * 4 and np.isfinite(values["snr"])  # guidance has rows of its own
    made = [read(tmp_path / name) for name in ("waltz-0.wav", "waltz-1.wav", "waltz-0-plain.wav")]
    assert all(rate == tiny_audio.RATE and sound.shape == (2, 640) for sound, rate in made)
    assert not np.array_equal(made[0][0], made[1][0]) and not np.array_equal(made[0][0], made[2][0])


def test_training_lets_hear_what_it_has_learnt(model, tmp_path):
    """Plain, then each scale, one after the other in a file for each prompt."""
    folder, prompts = tmp_path / "model", tmp_path / "prompts.txt"
    shutil.copytree(model, folder)
    Preset(call={"audio_duration": 1.6}).save(folder)
    prompts.write_text("a slow waltz\na slow piano\n")
    told = ["--model", str(folder), "--prompts", str(prompts), "--out", str(tmp_path / "out"), "--cpu"]
    few = ["--steps", "1", "--batch", "1", "--sample-steps", "3", "--rank", "2", "--pictures", "1", "--validation", "1"]
    assert main(["train", *told, *few]) == 0
    (heard,) = (tmp_path / "out" / "pictures").iterdir()
    sound, rate = read(heard)
    assert heard.name == "step-000001.wav" and rate == tiny_audio.RATE and sound.shape == (2, 3 * 640)


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (["generate", "a waltz", "--out", "a.png"], "must end in .wav"),
        (["generate", "a waltz", "--height", "64"], "can't be called with height"),
        (["calibrate", "--prompts", "PROMPTS", "--out", "OUT"], "makes sound"),
        (["compare", "--prompt-file", "PROMPTS", "--out", "OUT"], "makes sound"),
        (["study", "prepare", "--prompts", "PROMPTS", "--out", "OUT"], "makes sound"),
    ],
)
def test_what_is_for_pictures_is_refused(model, command, word, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a waltz\n")
    named = {"PROMPTS": str(tmp_path / "prompts.txt"), "OUT": str(tmp_path / "out")}
    assert main([*(named.get(part, part) for part in command), "--model", model]) == 2
    assert word in capsys.readouterr().err
