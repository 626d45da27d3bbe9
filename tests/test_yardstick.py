"""The training of the yardstick, in miniature."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks.yardstick import __main__ as yardstick
from benchmarks.yardstick import components, wan
from benchmarks.yardstick.autoencoder import crops, train_vae
from benchmarks.yardstick.components import LATENTS, WIDTH
from benchmarks.yardstick.config import ImageSettings, JudgeSettings, VideoSettings
from benchmarks.yardstick.data import Drawn
from benchmarks.yardstick.fit import Deadline, OutOfTime, Stage, cosine, fit
from benchmarks.yardstick.image import ImageKind
from benchmarks.yardstick.kind import train
from benchmarks.yardstick.train_judge import train_judge
from benchmarks.yardstick.video import VideoKind
from ddit.embedded import clip_judge
from ddit.embedded.clips import CLIP_SIZE, FRAMES, MOTIONS, clips, film, parse_clip, track
from ddit.embedded.drawing import draw, drawings
from ddit.embedded.judge import CELL, Found, distances, features, load_judge, score
from ddit.embedded.scenes import IMAGE_SIZE, SIZES, Scene, Thing, arrange, parse, random_scene, reach, scenes
from ddit.eval.metrics import FrechetTo


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
    assert reach("left of", spots) > 0 and spots[0, 2] >= SIZES["large"][0] and spots[1, 2] <= SIZES["small"][1]


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
    numbers = [wan.CHANNELS * (2 * scale) ** 2 for scale in (1, 2, 4)]
    assert all(wan.WIDTH / n >= room for n, room in zip(numbers, (12, 3, 0.75), strict=True))


def test_prompts_of_clips_are_parsed_back_and_fit_the_tokenizer():
    tokenizer = wan.make_wan_tokenizer()
    asked = list(islice(clips(0, "train"), 300))
    for clip in asked:
        assert parse_clip(clip.prompt) == clip and clip.split == "train"
        ids = tokenizer(clip.prompt).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) <= wan.TEXT_TOKENS
    assert {clip.motion for clip in asked} == set(MOTIONS)
    for wrong in ("a plain red star moving left on a moon background", "a red star moving left on a sea background"):
        with pytest.raises(ValueError, match="grammar"):
            parse_clip(wrong)


def test_a_clip_moves_as_its_prompt_says():
    rng = np.random.default_rng(0)
    clip = parse_clip("a plain red star moving left quickly on a sea background")
    frames, covers, spots = film(clip, rng)
    assert frames.shape == (FRAMES, CLIP_SIZE, CLIP_SIZE, 3) and covers.shape == frames.shape[:3]
    y, x = np.mgrid[0:CLIP_SIZE, 0:CLIP_SIZE] + 0.5
    seen = np.stack([[(c * x).sum(), (c * y).sum()] / c.sum() for c in covers])
    assert np.abs(IMAGE_SIZE / CLIP_SIZE * seen - spots[:, :2]).max() < 3 and seen[-1, 0] < seen[0, 0] - 18
    for clip in islice(clips(1, "train"), 60):
        moved, speed = clip_judge.motion(track(clip, 24, rng))
        assert moved == clip.motion and (clip.speed is None or speed == clip.speed)


def test_the_judge_of_clips_reads_tracks_finer_than_its_cells():
    rng = np.random.default_rng(0)
    centres = track(parse_clip("a plain red star bouncing off the top slowly on a sea background"), 24, rng)
    grid = CELL * (torch.arange(32) + 0.5)
    away = [(grid - x) ** 2 + (grid[:, None] - y) ** 2 for x, y in centres]
    maps = torch.zeros(FRAMES, 20, 32, 32)
    maps[:, 0] = torch.logit(torch.exp(-torch.stack(away) / 50).clamp(1e-4, 1 - 1e-4))
    there, found, radius, _ = clip_judge.seen(maps)
    assert there and radius == 0 and np.abs(found - centres).max() < 1.5
    assert clip_judge.motion(found) == ("bouncing off the top", "slowly")
    assert clip_judge.roughness(found) < 1.5
    still = np.zeros((FRAMES, CLIP_SIZE, CLIP_SIZE, 3), np.uint8)
    assert clip_judge.flicker(still, centres, 24) == 0
    still[::2] += 10
    assert clip_judge.flicker(still, centres, 24) == 10


def test_a_stage_ends_before_the_deadline_but_only_where_it_has_seconds():
    deadline = Deadline(60.0)
    assert deadline.within(None) is None and deadline.within(20.0) == 20.0
    assert 50 < (deadline.within(600.0) or 0) <= 55 and Deadline().within(600.0) == 600.0


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


TINY = {"vae_steps": 1, "text_steps": 1, "workers": 1}


def test_all_stages_of_the_image_model_and_a_pipeline_that_draws(tmp_path):
    flow = {"steps": (1, 1), "batch": (1, 1), "mix": ((0.0, 1.0), (0.0, 1.0, 0.0))}
    settings = ImageSettings(**TINY, **flow, pictures=4, distil_steps=1)
    prompts = [scene.prompt for scene in islice(scenes(0, "train"), 4)]
    pictures = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 3), np.uint8)
    drawn = Drawn(prompts, pictures, np.zeros((4, 3, 32, 32), np.uint8), np.zeros((4, 3, 3)))
    train(ImageKind(), tmp_path, settings, "cpu", Deadline(), drawn).save_pretrained(tmp_path / "model")
    assert (tmp_path / "flow-guided.pt").exists()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(prompts[:1], height=64, width=64, num_inference_steps=2, guidance_scale=3.0, output_type="np").images
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all()


def filmed(count):
    prompts = [clip.prompt for clip in islice(clips(0, "train"), count)]
    frames = np.random.default_rng(0).integers(0, 256, (count, FRAMES, CLIP_SIZE, CLIP_SIZE, 3), np.uint8)
    return Drawn(prompts, frames, np.zeros((count, 5, 32, 32), np.uint8), np.full((count, FRAMES, 3), 30.0, np.float32))


@pytest.mark.slow
def test_all_stages_of_the_video_model_and_a_pipeline_that_films(tmp_path):
    settings = VideoSettings(**TINY, clips=2, steps=(1, 1, 1), batch=(1, 1, 1))
    train(VideoKind(), tmp_path, settings, "cpu", Deadline(), filmed(2)).save_pretrained(tmp_path / "model")
    again = train_vae(tmp_path, wan.make_vae, np.empty(0), settings, "cpu", Deadline(), side=32)
    assert len(again.config.latents_std) == wan.CHANNELS and set(again.config.latents_std) != {1.0}
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    settings = {"height": 32, "width": 32, "num_frames": FRAMES, "num_inference_steps": 2, "max_sequence_length": 16}
    frames = pipe(filmed(1).prompts, guidance_scale=4.0, output_type="np", **settings).frames
    assert frames.shape == (1, FRAMES, 32, 32, 3) and np.isfinite(frames).all()


def test_crops_lie_inside_and_half_of_them_where_the_objects_are():
    samples = np.zeros((3, 2, 64, 64, 3), np.uint8)
    samples[:, :, 50:60, 4:14] = 255
    spots = np.tile([9.0, 55.0], (3, 1))
    near, anywhere = (crops(samples, np.random.default_rng(0), count=200, side=16, spots=s) for s in (spots, None))
    assert near.shape == (200, 2, 16, 16, 3)
    assert near.mean() > 1.5 * anywhere.mean()


def test_the_judge_pairs_objects_and_counts_what_is_right():
    scene = parse("a plain red star and a dotted blue heart on a sea background")
    star = Found(30, 30, 18, {"shape": "star", "colour": "red", "texture": "plain"})
    heart = Found(90, 90, 18, {"shape": "heart", "colour": "green", "texture": "dotted"})
    right = score(scene, [heart, star], "sea")
    assert right == {"shape": 1, "colour": 0.5, "texture": 1, "count": 1, "background": 1}
    assert score(scene, [star], "sky") == {"shape": 0.5, "colour": 0.5, "texture": 0.5, "count": 0, "background": 0}


def test_the_judge_learns_from_drawings_and_measures_distances(tmp_path):
    drawn, picture, _, spots = next(drawings(1, "train"))
    rows = np.zeros((1, 3, 3), np.float32)
    rows[0, : len(spots)] = spots
    pictures_ = Drawn([drawn.prompt], picture[None], np.empty(0), rows)
    judge = train_judge(tmp_path, pictures_, filmed(2), JudgeSettings(steps=1, batch=4), "cpu", Deadline())
    again = load_judge(tmp_path / "judge.safetensors")
    pictures = torch.rand(12, 3, 128, 128)
    assert torch.equal(judge.eval().features(pictures), again.features(pictures))
    one, two = features(judge, pictures), features(judge, -pictures)
    assert FrechetTo(one)(one) < 1e-3 * (1 + FrechetTo(one)(two))
    near, far = distances(judge, pictures, 0.9 * pictures, batch=5), distances(judge, pictures, -pictures)
    assert (distances(judge, pictures, pictures) < 1e-6).all() and (near < far).all() and near.shape == (12,)
    clip = filmed(2).samples
    assert (clip_judge.clip_distances(judge, clip, clip) < 1e-6).all()
    (tmp_path / "judge.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="can't be read"):
        load_judge(tmp_path / "judge.safetensors")
    row = clip_judge.verdict(judge, filmed(1).samples[0], parse_clip(filmed(1).prompts[0]))
    assert set(row) >= {"shape", "colour", "texture", "motion", "background", *clip_judge.BESIDE}
    assert clip_judge.clip_features(judge, list(filmed(2).samples)).shape == (2, 131)


def run(*args, monkeypatch):
    monkeypatch.setattr("sys.argv", ["yardstick", *map(str, args)])
    yardstick.main()


def test_drawings_are_shown_and_ununderstood_settings_refused(tmp_path, monkeypatch, capsys):
    run("draw", "--out", tmp_path, "--count", 2, monkeypatch=monkeypatch)
    run("check-judge", "--count", 5, "--json", tmp_path / "judge.json", monkeypatch=monkeypatch)
    judged = json.loads((tmp_path / "judge.json").read_text())
    assert judged["video"]["drawings"] == 1 and min(judged["image"][key] for key in ("shape", "background")) > 0.9
    run("draw", "--out", tmp_path / "clips", "--count", 1, "--video", monkeypatch=monkeypatch)
    assert Image.open(tmp_path / "sheet.png").width > 256
    assert len((tmp_path / "sheet.txt").read_text().splitlines()) == 2
    for args, said in (
        (("train-image", "--set", "foo=1"), "no setting 'foo'"),
        (("train-video", "--set", "compile=True"), "'compile=True'"),
        (("train-video", "--set", "steps=[1]"), "each of the 3 stages"),
        (("train-video", "--set", "mix=[1,1,1]"), "mix is [1, 1, 1]; it must be a list"),
        (("sample", "--out", tmp_path), "train-image"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(*args, monkeypatch=monkeypatch)
        assert said in capsys.readouterr().err


def test_what_is_finished_goes_into_the_package_with_every_hundredth_step_of_its_log(tmp_path, monkeypatch):
    for name in ("MODEL_FOLDER", "VIDEO_MODEL_FOLDER", "JUDGE"):
        monkeypatch.setattr(yardstick, name, tmp_path / name)
    (tmp_path / "video" / "model").mkdir(parents=True)
    (tmp_path / "video" / "model" / "model_index.json").write_text("{}")
    lines = [json.dumps({"step": step, "loss": 0.5}) for step in (*range(10, 210, 10), 204)]
    (tmp_path / "video" / "vae.jsonl").write_text("\n".join(lines) + "\n")
    run("ship", "--out", tmp_path, "--results", tmp_path, monkeypatch=monkeypatch)
    assert (tmp_path / "VIDEO_MODEL_FOLDER" / "model_index.json").exists() and not (tmp_path / "MODEL_FOLDER").exists()
    kept = [json.loads(line) for line in (tmp_path / "training-video.jsonl").read_text().splitlines()]
    assert [(one["stage"], one["step"]) for one in kept] == [("vae", 100), ("vae", 200), ("vae", 204)]
