"""The detector that ships with the package, on drawings it has never seen."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from ddit.embedded.autoencoder import to_model
from ddit.embedded.data import drawings
from ddit.embedded.detector import (
    ASSETS,
    ATTRIBUTES,
    Detector,
    crowd,
    evaluate_detector,
    judge,
    labels,
    load_detector,
    save_detector,
    train_detector,
)
from ddit.embedded.judging import disturb
from ddit.embedded.optim import fit
from ddit.embedded.scenes import Scene, Thing, draw

ENOUGH = 0.99


@pytest.fixture(scope="module")
def detector() -> Detector:
    return load_detector()


def picture(scene: Scene, seed: int = 0) -> torch.Tensor:
    """[1, 3, 128, 128] in [-1, 1]"""
    return to_model(draw(scene, np.random.default_rng(seed))[None])


def held_out(seed: int, count: int) -> tuple[list[Scene], torch.Tensor]:
    asked, _, pictures = zip(*islice(drawings(seed, "judge"), count), strict=True)
    return list(asked), to_model(np.stack(pictures))


# Accuracy


def test_accuracy_on_held_out_drawings(detector):
    figures = evaluate_detector(detector, count=300, seed=501)
    assert (figures["count"], figures["seed"], figures["split"]) == (300, 501, "judge")
    assert list(figures["accuracy"]) == ["drawn"]
    assert figures["accuracy"]["drawn"].keys() == set(ATTRIBUTES)
    assert min(figures["accuracy"]["drawn"].values()) >= ENOUGH, figures


@pytest.mark.slow
def test_accuracy_on_many_held_out_drawings(detector):
    figures = evaluate_detector(detector, count=3000, seed=502)["accuracy"]["drawn"]
    assert min(figures.values()) >= ENOUGH, figures


def test_accuracy_on_disturbed_pictures_of_prompts_that_leave_things_unsaid(detector):
    asked, pictures = held_out(seed=503, count=150)
    judged = judge(detector, disturb(pictures, torch.Generator().manual_seed(0)), asked)
    values = [value for row in judged for value in row.values()]
    assert np.mean(values) >= ENOUGH


def test_crowds_are_seen_as_crowds(detector):
    rng = np.random.default_rng(504)
    scenes = [crowd(rng) for _ in range(60)]
    judged = judge(detector, torch.cat([picture(s, i) for i, s in enumerate(scenes)]), scenes)
    assert np.mean([row["place"] for row in judged]) >= 0.97


# Judging

ONE = Scene((Thing("star", "red", "large", "plain", "left"),), "brick")
TWO = Scene(
    (Thing("star", "red", "large", "plain", "left"), Thing("circle", "blue", "small", "dotted", "right")),
    "wavy",
)
ALL_RIGHT = dict.fromkeys(ATTRIBUTES, 1.0)


def changed(scene: Scene, index: int, **values: str | None) -> Scene:
    things = list(scene.things)
    things[index] = replace(things[index], **values)
    return replace(scene, things=tuple(things))


@pytest.mark.parametrize("scene", [ONE, TWO])
def test_the_right_prompt_is_all_right(detector, scene):
    assert judge(detector, picture(scene), [scene]) == [ALL_RIGHT]


@pytest.mark.parametrize(
    ("name", "wrong"), [("shape", "cross"), ("colour", "green"), ("size", "small"), ("texture", "hatched")]
)
def test_a_wrong_attribute_is_one_of_one_or_half_of_two(detector, name, wrong):
    assert judge(detector, picture(ONE), [changed(ONE, 0, **{name: wrong})]) == [ALL_RIGHT | {name: 0.0}]
    assert judge(detector, picture(TWO), [changed(TWO, 0, **{name: wrong})]) == [ALL_RIGHT | {name: 0.5}]


def test_a_wrong_background(detector):
    assert judge(detector, picture(ONE), [replace(ONE, background="smooth")]) == [ALL_RIGHT | {"background": 0.0}]


def test_a_thing_at_another_place_has_nothing_right(detector):
    [row] = judge(detector, picture(ONE), [changed(ONE, 0, place="right")])
    assert row == dict.fromkeys(ATTRIBUTES, 0.0) | {"background": 1.0}


def test_a_missing_thing_is_half_and_one_too_many_is_out_of_place(detector):
    first = replace(TWO, things=TWO.things[:1])
    half = dict.fromkeys(("shape", "colour", "size", "texture"), 0.5)
    assert judge(detector, picture(first), [TWO]) == [half | {"place": 0.0, "background": 1.0}]
    assert judge(detector, picture(TWO), [first]) == [ALL_RIGHT | {"place": 0.0}]


def test_swapped_things_are_wrong(detector):
    swapped = Scene((replace(TWO.things[1], place="left"), replace(TWO.things[0], place="right")), TWO.background)
    [row] = judge(detector, picture(swapped), [TWO])
    assert row == dict.fromkeys(ATTRIBUTES, 0.0) | {"place": 1.0, "background": 1.0}


def test_what_is_unsaid_is_absent(detector):
    asked = changed(ONE, 0, size=None, texture=None, place=None)
    assert judge(detector, picture(ONE), [asked]) == [{"shape": 1.0, "colour": 1.0, "background": 1.0}]
    asked = changed(TWO, 0, texture=None)
    assert judge(detector, picture(TWO), [asked]) == [ALL_RIGHT]
    asked = changed(asked, 1, texture="striped")
    assert judge(detector, picture(TWO), [asked]) == [ALL_RIGHT | {"texture": 0.0}]


def test_an_empty_picture_has_only_its_background_right(detector):
    empty = picture(Scene((), "brick"))
    [row] = judge(detector, empty, [changed(ONE, 0, place=None)])
    assert row == {"shape": 0.0, "colour": 0.0, "size": 0.0, "texture": 0.0, "background": 1.0}


def test_pictures_are_judged_one_by_one(detector):
    asked, pictures = held_out(seed=505, count=8)
    together = judge(detector, pictures, asked)
    assert together == [judge(detector, pictures[i : i + 1], asked[i : i + 1])[0] for i in range(8)]


# The network


def test_shapes(detector):
    found = detector(torch.zeros(2, 3, 128, 128))
    assert found.occupied.shape == (2, 5)
    assert {k: tuple(v.shape) for k, v in found.things.items()} == {
        "shape": (2, 5, 5),
        "colour": (2, 5, 6),
        "size": (2, 5, 2),
        "texture": (2, 5, 4),
    }
    assert found.background.shape == (2, 4)
    assert detector.features(torch.zeros(2, 3, 128, 128)).shape == (2, 64)


def test_features_tell_objects_and_backgrounds_apart(detector):
    def mean(scene: Scene) -> torch.Tensor:
        with torch.no_grad():
            return detector.features(torch.cat([picture(scene, seed) for seed in range(8)]))

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.mean(0) - b.mean(0)).norm())

    same = distance(mean(ONE)[:4], mean(ONE)[4:])
    assert distance(mean(ONE), mean(replace(ONE, background="wavy"))) > 2 * same
    assert distance(mean(ONE), mean(changed(ONE, 0, shape="circle", colour="blue", texture="dotted"))) > 2 * same


def test_wrong_sizes_are_refused(detector):
    with pytest.raises(ValueError, match="expected"):
        detector(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="2 pictures but 1 scenes"):
        judge(detector, torch.zeros(2, 3, 128, 128), [ONE])


def test_a_detector_of_another_grammar_is_refused(tmp_path, detector):
    save_detector(detector, tmp_path, {})
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("hatched", "knitted"))
    with pytest.raises(ValueError, match="train it again"):
        load_detector(tmp_path)


def test_the_shipped_weights_are_small():
    assert (ASSETS / "model.safetensors").stat().st_size < 1_000_000


# Training


def test_labels_say_what_is_where():
    # left, right, top, bottom, center; shape, colour, size, texture
    empty = [-1] * 4
    assert labels(TWO).tolist() == [[3, 0, 1, 0], [0, 4, 0, 2], empty, empty, empty]


def test_training_resumes_as_if_never_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "__defaults__", (lambda step, steps: 1.0,))  # whatever the number of steps
    options = {"pictures": 12, "batch": 6, "seed": 3}
    whole = train_detector(tmp_path / "whole", steps=3, **options)
    train_detector(tmp_path / "part", steps=1, **options)
    resumed = train_detector(tmp_path / "part", steps=3, **options)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    shipped = load_detector(tmp_path / "part" / "model").state_dict()
    torch.testing.assert_close(shipped, whole.state_dict(), rtol=1e-3, atol=1e-4)
