"""Values of the wrong kind and full disks: one clear sentence, exit code 2, before any work."""

import pytest
import torch
from safetensors import SafetensorError

import tiny
from ddit.cli import main
from ddit.pipelines.generate import check_call
from ddit.train import samples


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scales: 5", "scales is 5; it must be a list"),
        ("min_sigma: 2", "min_sigma is 2; it must be a list"),
        ("sample_steps: [25]", "sample_steps is [25]; it must be a whole number"),
        ("scales: [a]", "scales is ['a']"),
        ("scales: [3]", "powers of two"),
        ("out: 5", "out is 5; it must be a text"),
        ("model: 5", "model is 5"),
        ("prompts: [a, b]", "prompts is ['a', 'b']"),
        ("tracker: 1", "tracker is 1"),
        ("cpu: 'yes please'", "true or false"),
        ("steps: [1]", "steps is [1]"),
        ("lr: 1e-4", "1.0e-4"),
        ("optimizer: [prodigy]", "optimizer is ['prodigy']"),
        ("1: 2", "unknown training settings"),
    ],
)
def test_a_training_file_with_the_wrong_kind(tmp_path, capsys, text, words):
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_sequence_length", 1.5),
        ("guidance_scale", "high"),
        ("guidance_scale", True),
        ("sigmas", 5),
        ("sigmas", ["a"]),
        ("negative_prompt", 3),
        ("latents", [1]),
    ],
)
def test_arguments_of_the_call_are_of_its_kinds(name, value):
    with pytest.raises(ValueError, match=f"{name} is"):
        check_call(tiny.pipeline(), {name: value})


def test_arguments_of_the_right_kind_pass():
    with pytest.raises(ValueError, match="num_frames is 'abc'; it must be a whole number"):
        check_call(tiny.wan_pipeline(), {"num_frames": "abc"})
    check_call(tiny.pipeline(), {"sigmas": [1, 0.5], "guidance_scale": 4, "negative_prompt": "grey", "prompt_2": ["a"]})


def test_a_full_disk_while_samples_are_drawn_is_told(tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(samples, "save_file", full)
    with pytest.raises(OSError, match=r"samples-00000.safetensors can't be written.*No space left.*the same command"):
        samples._save_shard({"a": torch.zeros(1)}, samples.shard_path(tmp_path, 0))
    assert not list(tmp_path.iterdir())
