"""The training of the image yardstick, in miniature."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from benchmarks.yardstick import components
from benchmarks.yardstick.autoencoder import vae_loss
from benchmarks.yardstick.components import LATENTS, WIDTH, TextEncoders, make_pipeline
from benchmarks.yardstick.config import SIZES, Settings
from benchmarks.yardstick.data import Drawings, drawings
from benchmarks.yardstick.drawing import draw
from benchmarks.yardstick.fit import Deadline, OutOfTime, Stage, cosine, fit
from benchmarks.yardstick.flow import Flow, Source, train_flow
from benchmarks.yardstick.judge import Found, Judge, frechet, judge_loss, labels, score
from benchmarks.yardstick.scenes import Scene, Thing, arrange, parse, random_scene, reach, scenes


def test_prompts_are_parsed_back_and_fit_the_tokenizer():
    rng = np.random.default_rng(0)
    asked = [random_scene(rng, told=0.5) for _ in range(300)]
    tokenizer = components.make_tokenizer()
    for scene in asked:
        assert parse(scene.prompt) == scene
        ids = tokenizer(scene.prompt).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) <= components.TEXT_TOKENS
    with pytest.raises(ValueError, match="grammar"):
        parse("a plain red dog on a sea background")


def test_splits_never_meet_and_have_their_shares():
    rng = np.random.default_rng(0)
    splits = [random_scene(rng).split for _ in range(2000)]
    assert abs(splits.count("train") / 2000 - 0.8) < 0.04 and abs(splits.count("judge") / 2000 - 0.1) < 0.03
    train, judge = ({s.prompt for s in islice(scenes(0, split), 500)} for split in ("train", "judge"))
    assert not train & judge


def test_what_a_prompt_names_holds_in_its_drawing():
    rng = np.random.default_rng(0)
    things = (Thing("star", "red", "plain", "large"), Thing("heart", "blue", "dotted", "small"))
    spots = arrange(Scene(things, "sea", "left of"), rng)
    assert reach("left of", spots) > 0 and spots[0, 2] >= 24 and spots[1, 2] < 20


def test_drawings_follow_from_the_seed():
    (scene, picture, masks, spots), (_, again, *_) = next(drawings(1, "train")), next(drawings(1, "train"))
    assert picture.shape == (128, 128, 3) and np.array_equal(picture, again)
    assert masks.shape == (3, 128, 128) and spots.shape == (len(scene.things), 3)
    assert (masks[: len(spots)].sum((1, 2)) > 150).all()
    assert not np.array_equal(picture, draw(scene, np.random.default_rng(9))[0])


def test_a_token_has_room_for_large_patches():
    numbers = [LATENTS * (2 * scale) ** 2 for scale in (1, 2, 4)]
    assert all(WIDTH / n >= room for n, room in zip(numbers, (16, 4, 1), strict=True))
    parts = [components.make_transformer(), components.make_vae(), *components.make_text_encoders()]
    assert 2 * sum(p.numel() for part in parts for p in part.parameters()) < 30e6


def _line(folder, steps=6, every=200):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)

    def loss(step, rng):
        x = torch.from_numpy(rng.normal(size=(8, 3))).float()
        return (model(x) - x.sum(1, keepdim=True)).square().mean(), {}

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return Stage("line", folder / "line.pt", model, [optimizer], loss, steps, cosine, seed=1, ema=0.9, every=every)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    expected = fit(_line(whole))
    for _ in range(5):
        with pytest.raises(OutOfTime):
            fit(_line(parts), Deadline(0.0))
    resumed = fit(_line(parts))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    (parts / "line.pt").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"line\.pt.*delete it"):
        fit(_line(parts))


def test_a_stage_with_a_time_of_its_own_ends_early_at_a_rate_of_zero(tmp_path):
    shares = []
    stage = replace(_line(tmp_path, steps=10**9), seconds=0.3)
    stage.schedule = lambda step, share: shares.append(share) or cosine(step, share)
    fit(stage)
    assert 0.9 < shares[-1] < 1 and shares == sorted(shares)
    done = len(shares)
    fit(stage)
    assert len(shares) == done


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    fit(_line(tmp_path))
    kept = (tmp_path / "line.pt").read_bytes()
    stage = _line(tmp_path, steps=20)
    stage.loss = lambda step, rng: (stage.model(torch.full((1, 3), torch.nan)).sum(), {})
    with pytest.raises(FloatingPointError, match="line: the loss is nan"):
        fit(stage)
    assert (tmp_path / "line.pt").read_bytes() == kept


def test_all_stages_of_the_flow_and_a_pipeline_that_draws(tmp_path):
    torch.manual_seed(0)
    settings = Settings(batch=1, low_steps=1, high_steps=1, distil_steps=1, high_mix=(0.0, 1.0, 0.0))
    latents = {size: np.random.default_rng(0).normal(size=(4, (size // 8) ** 2, 16)) for size in SIZES}
    prompts = [scene.prompt for scene in islice(scenes(0, "train"), 4)]
    text = TextEncoders().eval()
    drawn = Drawings(prompts, np.empty(0), np.zeros((4, 3, 32, 32), np.uint8), np.empty(0))
    source = Source.made(latents, drawn, text, settings, "cpu")
    flow, average = train_flow(tmp_path, source, "cpu", Deadline())
    assert isinstance(flow, Flow) and all(torch.isfinite(value).all() for value in average.values())
    vae = components.make_vae()
    assert torch.isfinite(vae_loss(vae, torch.zeros(1, 3, 64, 64), 2, torch.Generator()))
    make_pipeline(vae, text, flow.transformer).to(dtype=torch.float16).save_pretrained(tmp_path / "model")
    pipe = FluxPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(prompts[:1], height=64, width=64, num_inference_steps=2, guidance_scale=3.0, output_type="np").images
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all()


def test_the_judge_pairs_objects_and_counts_what_is_right():
    scene = parse("a plain red star and a dotted blue heart on a sea background")
    star = Found(30, 30, 18, {"shape": "star", "colour": "red", "texture": "plain"})
    heart = Found(90, 90, 18, {"shape": "heart", "colour": "green", "texture": "dotted"})
    right = score(scene, [heart, star], "sea")
    assert right == {"shape": 1, "colour": 0.5, "texture": 1, "count": 1, "background": 1}
    assert score(scene, [star], "sky") == {"shape": 0.5, "colour": 0.5, "texture": 0.5, "count": 0, "background": 0}


def test_the_judge_learns_from_drawings_and_measures_distances():
    torch.manual_seed(0)
    judge = Judge().eval()
    answers, grounds = labels([parse("a plain red star on a sea background")])
    spots = torch.tensor([[[64.0, 64, 20], [0, 0, 0], [0, 0, 0]]])
    pictures = torch.rand(12, 3, 128, 128)
    assert torch.isfinite(judge_loss(*judge(pictures[:1]), spots, answers, grounds))
    assert frechet(judge, pictures, pictures) < 1e-3 * (1 + frechet(judge, pictures, -pictures))
