"""Training on prompts that differ in length, as real ones do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tiny
import tiny_lumina2
from ddit.models import architecture_for
from ddit.train.arguments import padded
from ddit.train.distill import Draw, make_batch
from ddit.train.samples import draw_samples

PROMPTS = ["a cat", "a large red cat on a mat", "one cat"]


def encode(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Vectors ``[B, L, 16]`` and mask, a token for each word, padded to the longest of the batch."""
    lengths = [len(prompt.split()) for prompt in prompts]
    vectors = torch.zeros(len(prompts), max(lengths), 16)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        vectors[row, :length] = torch.randn(length, 16, generator=torch.Generator().manual_seed(len(prompt)))
    return vectors, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def qwen():
    """A pipeline that leaves the mask out where nothing is padded, as diffusers' encoding does."""
    pipe = tiny.qwen_pipeline()

    def encode_prompt(prompt, **_):
        vectors, mask = encode([prompt] if isinstance(prompt, str) else prompt)
        return vectors, None if mask.all() else mask.long()

    pipe.encode_prompt = encode_prompt
    return pipe, dict(height=64, width=96, true_cfg_scale=3.0, negative_prompt="nothing at all")


def lumina2():
    pipe = tiny_lumina2.pipeline()

    def encode_prompt(prompt, *_, **__):
        vectors, mask = encode([prompt] if isinstance(prompt, str) else prompt)
        none, told = encode(["nothing at all"] * len(vectors))
        return vectors, mask.long(), none, told.long()

    pipe.encode_prompt = encode_prompt
    return pipe, dict(height=128, width=192)


def ask(pipe, samples, runs: list[int], which: int) -> tuple[Tensor, Tensor]:
    """What the model answers to a pass of runs in the second step, and what it answered when they were drawn."""
    architecture = architecture_for(pipe.transformer)
    draws = [Draw(run, 1, 2) for run in runs]
    batch = make_batch(architecture, samples, draws, which, "cpu", torch.float32)
    with torch.no_grad():
        answer = pipe.transformer(**{**batch.inputs, "return_dict": False})[0]
    return architecture.velocity(answer, batch.target.shape[2:]), batch.target


# Lumina 2 reads prompts of several lengths one at a time only.
@pytest.mark.parametrize(("make", "batch"), [(qwen, 1), (qwen, 2), (qwen, 3), (lumina2, 1)])
def test_the_model_says_of_a_record_what_it_said_in_the_run(tmp_path, make, batch):
    pipe, call = make()
    samples = draw_samples(tmp_path, pipe, {"num_inference_steps": 3, **call}, PROMPTS, batch=batch, seed=0)
    together = [[0, 1, 2]] if make is qwen else []
    assert len(samples) == 6  # two guidance passes each
    for runs in [[0], [1], [2], *together]:
        for which in range(2):
            torch.testing.assert_close(*ask(pipe, samples, runs, which), rtol=1e-4, atol=1e-5)


def test_prompts_of_one_length_bring_no_mask(tmp_path):
    pipe, call = qwen()
    settings = {"num_inference_steps": 2, **call, "negative_prompt": "none here"}
    samples = draw_samples(tmp_path, pipe, settings, ["a cat", "one dog"], batch=1, seed=0)
    _, _, inputs = samples.load([0, 1, 2, 3], [[0]] * 4)
    assert inputs["encoder_hidden_states"].shape == (4, 2, 16)
    assert inputs.get("encoder_hidden_states_mask") is None


def test_a_model_without_a_mask_is_told_of():
    parts = {"row/encoder_hidden_states": [torch.zeros(1, 2, 4), torch.zeros(1, 5, 4)]}
    with pytest.raises(ValueError, match="takes no mask"):
        padded(parts)
    mask = {"row/encoder_hidden_states_mask": [torch.ones(1, 2), torch.ones(1, 5)]}
    both = padded({**parts, **mask})
    assert both["row/encoder_hidden_states_mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5]
