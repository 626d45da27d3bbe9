"""The clips' grammar, what is drawn for it, and the judge's arithmetic."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from ddit.embedded.video.clips import (
    BACKGROUNDS,
    FRAMES,
    MOTIONS,
    SHAPES,
    SIZE,
    SPEEDS,
    TEXTURES,
    Clip,
    clips,
    complete,
    film,
    vocabulary,
)
from ddit.embedded.video.judge import centres, flicker, motion, roughness


def drawn(clip: Clip, seed: int = 0) -> np.ndarray:
    return film(clip, np.random.default_rng(seed))[0].astype(np.float32) / 255


def test_prompts_use_the_vocabulary_and_splits_do_not_meet():
    words = set(vocabulary())
    sets = {split: {c.prompt for c in islice(clips(0, split), 300)} for split in ("train", "tune", "judge")}
    assert all(set(prompt.split()) <= words for prompts in sets.values() for prompt in prompts)
    assert not sets["train"] & sets["judge"] and not sets["tune"] & sets["judge"]
    assert [c.prompt for c in islice(clips(3, "tune"), 5)] == [c.prompt for c in islice(clips(3, "tune"), 5)]
    clip = Clip("ball", "red", None, "bouncing off the top", "slowly", "brick")
    assert clip.prompt == "a red ball bouncing off the top slowly on a brick background"
    assert complete(clip, np.random.default_rng(0)).texture in TEXTURES


@pytest.mark.parametrize("name", MOTIONS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_the_judge_reads_every_motion_off_drawings(name, speed):
    """On each shape, texture and background."""
    for i, shape in enumerate(SHAPES):
        clip = Clip(shape, "green", TEXTURES[i % 3], name, speed, BACKGROUNDS[i % 3])
        track = centres(drawn(clip, i))
        assert track is not None and motion(track) == (name, speed)
        assert roughness(track) < 0.8  # pale dots that come and go at the rim move the centre a little


def test_the_texture_moves_with_the_object_and_the_background_stays():
    clip = Clip("square", "blue", "striped", "moving right", "quickly", "wavy")
    frames = drawn(clip)
    assert frames.shape == (FRAMES, SIZE, SIZE, 3) and flicker(frames) == 0
    track = centres(frames)
    assert track is not None
    first, last = (frames[i][_around(track[i])] for i in (0, 8))
    assert abs(first - last).mean() < 0.05 and abs(frames[0] - frames[8]).mean() > 0.04


def _around(centre: np.ndarray) -> tuple[slice, slice]:
    x, y = (round(c) for c in centre)
    return slice(y - 5, y + 5), slice(x - 5, x + 5)


def test_flicker_and_roughness_see_what_they_should():
    clip = Clip("ball", "red", "plain", "moving left", "slowly", "smooth")
    frames = drawn(clip)
    noisy = np.clip(frames + np.random.default_rng(0).normal(0, 2 / 255, frames.shape), 0, 1).astype(np.float32)
    assert flicker(noisy) == pytest.approx(2 * 2 / np.sqrt(np.pi), rel=0.1)
    track = centres(frames)
    assert track is not None
    shaken = track + np.random.default_rng(0).normal(0, 1, track.shape)
    assert roughness(shaken) > 1 > roughness(track)


def test_a_clip_without_an_object_has_no_track():
    assert centres(np.full((FRAMES, SIZE, SIZE, 3), 0.5, np.float32)) is None
