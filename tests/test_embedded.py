"""The grammar, the drawings, and the training of the embedded model (a few steps of the real thing)."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddit.embedded import flow, optim, text, training
from ddit.embedded.components import TEXT_TOKENS, make_tokenizer
from ddit.embedded.config import TrainingConfig
from ddit.embedded.data import drawings
from ddit.embedded.scenes import (
    PLACES,
    Scene,
    Thing,
    complete,
    draw,
    draw_with_masks,
    named_places,
    random_scene,
    scenes,
    vocabulary,
)


def test_prompts_of_the_splits_never_meet():
    prompts = {split: {s.prompt for s in islice(scenes(0, split), 300)} for split in ("train", "tune", "judge")}
    assert not prompts["train"] & prompts["tune"] | prompts["train"] & prompts["judge"]
    assert not prompts["tune"] & prompts["judge"]


def test_every_prompt_fits_the_tokenizer():
    tokenizer, rng, words = make_tokenizer(), np.random.default_rng(0), set(vocabulary())
    for _ in range(500):
        prompt = random_scene(rng).prompt
        assert set(prompt.split()) <= words
        ids = tokenizer(prompt).input_ids
        assert len(ids) <= TEXT_TOKENS and tokenizer.unk_token_id not in ids


def test_prompts_read_as_written():
    red = Thing("circle", "red", "small", "striped", "left")
    blue = Thing("star", "blue", None, "hatched", "right")
    assert Scene((red,), "brick").prompt == "a small striped red circle on the left on a brick background"
    assert Scene((red, blue), "wavy").prompt == (
        "a small striped red circle left of a hatched blue star on a wavy background"
    )


def test_drawings_follow_from_the_seed_and_leave_room():
    scene = complete(next(scenes(1, "train")), np.random.default_rng(0))
    one, again, other = (draw(scene, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one.shape == (128, 128, 3) and one.dtype == np.uint8
    assert (one == again).all() and (one != other).any()


def test_an_object_is_where_and_what_it_should_be():
    thing = Thing("circle", "red", "large", "plain", "left")
    picture = draw(Scene((thing,), "smooth"), np.random.default_rng(0)).astype(float)
    red, green, _ = picture[64, 34]
    assert red > 2 * green
    assert abs(picture[64, 100, 0] - picture[64, 100, 1]) < 60


def test_drawings_repeat():
    first, second = (list(islice(drawings(5, "tune"), 3)) for _ in range(2))
    assert [a[0] for a in first] == [b[0] for b in second]
    assert all((a[2] == b[2]).all() for a, b in zip(first, second, strict=True))


def test_masks_cover_the_things_in_the_prompts_order():
    scene = Scene(
        (Thing("square", "red", "large", "plain", "top"), Thing("circle", "blue", "small", "plain", "bottom")), "smooth"
    )
    picture, masks = draw_with_masks(scene, np.random.default_rng(0))
    assert (picture == draw(scene, np.random.default_rng(0))).all()
    red, blue = (picture[mask > 0.99].mean(0) for mask in masks)
    assert red[0] > 2 * red[2] and blue[2] > 2 * blue[0]
    rows = np.arange(len(picture)) + 0.5
    centres = [(mask.sum(1) * rows).sum() / mask.sum() for mask in masks]
    assert centres[0] < 50 < 78 < centres[1] and masks[0].sum() > 1.5 * masks[1].sum()
    _, one = draw_with_masks(Scene(scene.things[:1], "smooth"), np.random.default_rng(0))
    assert one[0].any() and not one[1].any()


@pytest.mark.parametrize("side", [4, 8, 16])
def test_the_mask_head_reads_the_token_of_the_place(side):
    """Features that carry the answer at the right token cost less than those that carry it elsewhere."""
    head = flow.MaskHead(width=32, things=2)
    with torch.no_grad():
        head.logits.weight.copy_(10 * torch.eye(32))
        head.logits.bias.fill_(-5.0)
    head.norm = torch.nn.Identity()
    covers = torch.zeros(1, 2, 64, 64)
    covers[0, 1, 32:48, 16:32] = 1.0  # of 4 x 4 squares: row 2, column 1
    right = torch.zeros(1, side, side, 32)
    right[0, side // 2 : 3 * side // 4, side // 4 : side // 2, 16:] = 1.0
    wrong = right.transpose(1, 2)
    covers = covers[:, :, None]
    assert head(right.flatten(1, 2), covers) < 0.05 < head(wrong.flatten(1, 2), covers)


SMALL = TrainingConfig(
    pictures=6,
    vae_steps=2,
    text_steps=2,
    flow_steps=4,
    checkpoint_every=2,
    batch={128: 2, 64: 2, 32: 2},
    bf16=False,  # which CPUs without AMX compute a hundred times slower
)


@pytest.mark.slow
def test_a_killed_training_continues_to_the_same_weights(tmp_path, monkeypatch):
    """Stopped right after every checkpoint, of each stage: bit-equal to a run that was never stopped."""
    whole = training.train(tmp_path / "whole", SMALL)

    save, stops = optim._save, 0

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(optim, "_save", save_and_stop)
    while True:
        try:
            resumed = training.train(tmp_path / "stopped", SMALL)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == 4, "the autoencoder's, the text encoders', and two of the flow"

    for part in ("vae", "transformer", "text_encoder", "text_encoder_2"):
        one, two = (next((folder / part).glob("*.safetensors")).read_bytes() for folder in (whole, resumed))
        assert one == two


def test_a_crop_holds_the_place_it_is_made_for():
    """What covers a place is inside the crop, and positions say where the crop lies."""
    for place, (_, (x, y)) in PLACES.items():
        rng = np.random.default_rng(0)
        scene = Scene((Thing("circle", "red", "large", "plain", place),), "smooth")
        masks = torch.from_numpy(draw_with_masks(scene, rng)[1])[None, :, ::2, ::2]
        tokens = torch.arange(256.0).reshape(1, 256, 1)
        cut, covers, positions = flow.crop(tokens, masks, flow.grid_ids(16), place, rng)
        assert cut.shape == (1, 64, 1) and covers.shape == (1, 2, 32, 32) and positions.shape == (64, 3)
        assert covers.sum() == masks.sum()
        assert torch.equal(cut[0, :, 0], 16 * positions[:, 1] + positions[:, 2])
        assert any(torch.equal(p, torch.tensor([0.0, y // 8, x // 8])) for p in positions)


def test_places_are_read_off_the_prompt():
    for scene in islice(scenes(3, "train"), 200):
        asked = tuple(thing.place for thing in scene.things if thing.place)
        assert named_places(scene.prompt) == asked


@pytest.mark.slow
def test_training_starts_from_a_finished_model(tmp_path):
    """No step taken: what comes out is what went in."""
    first = training.train(tmp_path / "first", SMALL)
    on = replace(SMALL, flow_steps=1, start_from=str(first), lr=0.0)
    second = training.train(tmp_path / "second", on)
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        one, two = (load_file(next((folder / part).glob("*.safetensors"))) for folder in (first, second))
        assert one.keys() == two.keys()
        assert all(torch.allclose(one[k], two[k], atol=1e-3) for k in one)


def test_parse_loss_sees_the_binding():
    """The right answers at the nouns cost less than the two objects' answers swapped."""
    scene = Scene(
        (Thing("circle", "red", "small", "plain", "left"), Thing("star", "blue", "large", "striped", "right")),
        "brick",
    )
    words = scene.prompt.split()
    width = sum(map(len, text.ATTRIBUTES.values()))

    def logits(things):
        nouns, whole = torch.zeros(1, len(words), width), torch.zeros(1, 2 * width + 4)
        for i, (asked, told) in enumerate(zip(scene.things, things, strict=True)):
            start = 0
            for name, options in text.ATTRIBUTES.items():
                column = start + options.index(getattr(told, name))
                nouns[0, words.index(asked.shape), column] = 9.0
                whole[0, i * width + column] = 9.0
                start += len(options)
        whole[0, 2 * width + 1] = 9.0
        return nouns, whole

    right = text.parse_loss([scene], *logits(scene.things))
    wrong = text.parse_loss([scene], *logits(scene.things[::-1]))
    assert right < 0.01 < wrong
