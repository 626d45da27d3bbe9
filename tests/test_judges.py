"""The field's judges with small weights of their own classes, and ``ddit evaluate --suite paper`` from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPModel

import tiny
from benchmarks.yardstick.components import make_tokenizer
from ddit.cli import main
from ddit.eval import drawings, judges, paper
from ddit.eval.imagereward import ImageReward
from ddit.eval.metrics import FrechetTo
from ddit.pipelines.prompts import read_prompts
from ddit.preset import Preset
from ddit.util.extras import has

WORDS = ["a", "red", "blue", "circle", "square", "on", "sand"]
TEXTS = ["a red circle", "a blue square", "a red square on sand", "a blue circle", "a circle on sand"]


def pictures(count: int, side: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


class Network(nn.Module):
    """Inception's interface: ``layers`` takes ``[B, 3, 299, 299]`` in about -1 to 1."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 1), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def image_reward_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """As image-reward saves them: BLIP of one layer of width 64, and a head of two layers."""
    g = torch.Generator().manual_seed(seed)
    d, w = 64, 64
    v, t = "blip.visual_encoder", "blip.text_encoder"
    shapes: dict[str, tuple[int, ...]] = {
        f"{v}.cls_token": (1, 1, d),
        f"{v}.pos_embed": (1, 5, d),
        f"{v}.patch_embed.proj.weight": (d, 3, 8, 8),
        f"{v}.patch_embed.proj.bias": (d,),
        f"{t}.embeddings.word_embeddings.weight": (20, w),
        f"{t}.embeddings.position_embeddings.weight": (40, w),
        "blip.vision_proj.weight": (4, d),
        "mlp.layers.0.weight": (6, w),
        "mlp.layers.0.bias": (6,),
        "mlp.layers.2.weight": (1, 6),
        "mlp.layers.2.bias": (1,),
    }
    b = f"{v}.blocks.0"
    linears = {f"{b}.attn.qkv": (3 * d, d), f"{b}.attn.proj": (d, d), f"{b}.mlp.fc1": (2 * d, d)}
    linears |= {f"{b}.mlp.fc2": (d, 2 * d)}
    layer = f"{t}.encoder.layer.0"
    for attention in ("attention", "crossattention"):
        linears |= {f"{layer}.{attention}.self.{part}": (w, w) for part in ("query", "key", "value")}
        linears[f"{layer}.{attention}.output.dense"] = (w, w)
    linears |= {f"{layer}.intermediate.dense": (2 * w, w), f"{layer}.output.dense": (w, 2 * w)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    norms = [f"{b}.norm1", f"{b}.norm2", f"{v}.norm", f"{t}.embeddings.LayerNorm", f"{layer}.output.LayerNorm"]
    norms += [f"{layer}.{attention}.output.LayerNorm" for attention in ("attention", "crossattention")]
    for name in norms:
        shapes |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    return {name: torch.randn(shape, generator=g) / 4 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, str]:
    """Judge -> what holds its small weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    tokenizer = make_tokenizer(WORDS, length=16)
    half = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = {**half, "vocab_size": 20, "max_position_embeddings": 16, "eos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**half, "image_size": 16, "patch_size": 8}, projection_dim=4)
    CLIPModel(config).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "reward")
    torch.save(image_reward_weights(), folder / "reward" / "ImageReward.pt")
    torch.jit.script(Network().eval()).save(str(folder / "inception.pt"))
    torch.save({f"features.{k}": v for k, v in judges.alexnet().state_dict().items()}, folder / "alexnet.pth")
    named = {"fid": "inception.pt", "clip": "clip", "imagereward": "reward", "lpips": "alexnet.pth"}
    return {name: str(folder / path) for name, path in named.items()}


# The judges


def test_psnr_of_a_known_error():
    plain = np.full((1, 16, 16, 3), 100, np.uint8)
    off = plain + np.uint8(10)
    expected = 20 * math.log10(255 / 10)
    assert judges.Psnr()(off, [""], plain).tolist() == pytest.approx([expected], abs=1e-3)
    assert judges.Psnr()(plain, [""], plain).tolist() == [80.0]


def test_ssim_of_equal_pictures_is_one():
    assert judges.Ssim()(pictures(2), ["", ""], pictures(2)).tolist() == pytest.approx([1, 1], abs=1e-6)


@torch.no_grad()
def test_the_clip_score_is_a_cosine(weights):
    judge = judges.Clip.load(weights["clip"]).eval()
    shown = pictures(2, side=16)
    model = CLIPModel.from_pretrained(weights["clip"]).eval()
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    seen = torch.from_numpy((shown / 255 - mean) / deviation).permute(0, 3, 1, 2).float()
    by_hand = []
    for picture, text in zip(seen, TEXTS, strict=False):
        ids = torch.tensor([[judge.tokenizer.get_vocab()[word] for word in text.split()] + [1]])
        told = model(input_ids=ids, pixel_values=picture[None])
        a, b = told.image_embeds[0], told.text_embeds[0]
        by_hand.append(float(a @ b / (a.norm() * b.norm())))
    assert judge(shown, TEXTS[:2]).tolist() == pytest.approx(by_hand, abs=1e-5)
    assert abs(by_hand[0] - by_hand[1]) > 1e-3
    long = " ".join(["a red circle"] * 20)
    assert judge(shown[:1], [long]).isfinite().all(), "words beyond CLIP's room are left out"


def test_what_clip_sees_is_the_middle_square_resized():
    wide = np.zeros((1, 8, 32, 3), np.uint8)
    wide[:, :, 12:20] = 255
    seen = judges.for_clip(wide, 8)
    assert seen.shape == (1, 3, 8, 8) and torch.allclose(seen[0, 0], torch.tensor((1 - 0.48145466) / 0.26862954))


@torch.no_grad()
def test_lpips_equals_that_of_torchmetrics(weights, monkeypatch):
    module = pytest.importorskip("torchmetrics.functional.image.lpips")
    judge = judges.Lpips.load(weights["lpips"]).eval()
    monkeypatch.setattr(module, "_get_tv_model_features", lambda *_: judge.features)
    theirs = module._LPIPS(net="alex").eval()
    a, b = pictures(2, side=64), pictures(2, side=64, seed=1)
    expected = theirs(*(2 * torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 - 1 for x in (a, b)))
    assert judge(a, ["", ""], b).tolist() == pytest.approx(expected.flatten().tolist(), rel=1e-4)
    assert min(expected.flatten()) > 1e-4 and judge(a, ["", ""], a).tolist() == [0, 0]


@torch.no_grad()
def test_image_reward_reads_weights_of_image_reward(weights):
    judge = ImageReward.load(weights["imagereward"]).eval()
    state = image_reward_weights()
    assert torch.equal(
        judge.vision.encoder.layers[0].self_attn.qkv.weight, state["blip.visual_encoder.blocks.0.attn.qkv.weight"]
    )
    shown = pictures(2, side=16)
    values = judge(shown, TEXTS[:2])
    words = judge.tokenizer(TEXTS[:2], padding="max_length", max_length=35, return_tensors="pt")
    seen = judge.vision(judges.for_clip(shown, 16)).last_hidden_state
    read = judge.text(words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=seen)
    x = read.last_hidden_state[:, 0]
    for i in (0, 2):  # nothing but linear layers
        x = x @ state[f"mlp.layers.{i}.weight"].T + state[f"mlp.layers.{i}.bias"]
    assert values.tolist() == pytest.approx(((x[:, 0] - 0.16717362830052426) / 1.0333394966054072).tolist(), abs=1e-5)
    other = judge(shown[::-1].copy(), TEXTS[:2])
    assert (values - other).abs().min() > 1e-4, "it looks at the picture"
    assert float(judge(shown[:1], TEXTS[1:2])) != pytest.approx(float(values[0])), "and reads the prompt"
    # Padding changes nothing: a prompt on its own, and without its padding.
    alone = judge.text(words.input_ids[:1, :4], encoder_hidden_states=seen[:1]).last_hidden_state[0, 0]
    torch.testing.assert_close(alone, read.last_hidden_state[0, 0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_features_are_of_pictures_resized_as_clean_fid_does(weights):
    judge = judges.Inception.load(weights["fid"]).eval()
    assert judge.width() == 3
    flat = np.empty((1, 20, 30, 3), np.uint8)
    flat[:] = [0, 128, 255]
    convolution = judge.network.layers.state_dict()
    expected = convolution["0.weight"][:, :, 0, 0] @ torch.tensor([-1, 0, 127 / 128]) + convolution["0.bias"]
    assert judge(flat)[0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    ramp = np.repeat(np.arange(0, 240, 40, dtype=np.uint8), 6).reshape(1, 6, 6).repeat(3, 0).transpose(2, 1, 0)
    resized = judges.clean_resize(ramp, 3)
    assert resized.dtype == np.float32 and resized[1, 1].tolist() == pytest.approx([100] * 3, abs=1e-3)
    assert resized[0, 0, 0] != round(float(resized[0, 0, 0])), "not rounded to 8 bits in between"


def test_pictures_of_one_call_share_its_time():
    """Two calls of two pictures and one of one: three figures, not five."""
    records = [{"call": 0}, {"call": 0}, {"call": 2}, {"call": 2}, {"call": 4}]
    times = torch.tensor([[4.0, 1.0], [4.0, 1.0], [2.0, 1.0], [2.0, 1.0], [3.0, 2.0]])
    assert paper._by_call(records, times).tolist() == [[8, 2], [4, 2], [3, 2]]
    assert torch.equal(paper._by_call([{}] * 5, times), times)  # of files without it


def test_the_distance_of_two_gaussians():
    """|m|^2 + sum (s - t)^2 for axes alone; the covariance of the features is exact."""
    target = FrechetTo.of_gaussian(torch.tensor([0.0, 0.0]), torch.diag(torch.tensor([4.0, 9.0])))
    corners = torch.tensor([[x, y] for x in (-1.0, 1.0) for y in (-1.0, 1.0)]) * math.sqrt(3 / 4)  # of variance 1
    assert float(target(corners + torch.tensor([3.0, 0.0]))) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 1) ** 2)


@torch.no_grad()
def test_references(weights, tmp_path):
    judge = judges.Inception.load(weights["fid"]).eval()
    folder = tmp_path / "coco"
    folder.mkdir()
    for i, picture in enumerate(pictures(6)):
        Image.fromarray(picture).save(folder / f"{i}.png")
    found = judges.distance_to(folder, judge, "cpu", tmp_path / "kept")
    features = judge(pictures(6))
    assert float(found(features)) == pytest.approx(0, abs=1e-9)
    np.savez(tmp_path / "s.npz", mu=features.mean(0).numpy(), sigma=np.cov(features.numpy(), rowvar=False))
    same = judges.distance_to(tmp_path / "s.npz", judge, "cpu", tmp_path)
    torch.testing.assert_close(same(features[:4]), found(features[:4]), atol=1e-9, rtol=1e-4)
    judges.distance_to(folder, judge, "cpu", tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 1, "what was worked out is kept"
    Image.fromarray(pictures(1, seed=1)[0]).save(folder / "0.png")  # another picture of the same name
    assert float(judges.distance_to(folder, judge, "cpu", tmp_path / "kept")(features)) > 1e-7
    assert len(list((tmp_path / "kept").iterdir())) == 2
    for number in (1, 2, 3):
        (folder / f"{number}.png").unlink()
    with pytest.raises(ValueError, match="holds 3 pictures; FID needs more than 3"):
        judges.distance_to(folder, judge, "cpu", tmp_path / "kept")
    np.savez(tmp_path / "s.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="statistics of 5 features; the judge fid has 3"):
        judges.distance_to(tmp_path / "s.npz", judge, "cpu", tmp_path)
    np.savez(tmp_path / "s.npz", feats=np.eye(5))
    whole = (tmp_path / "s.npz").read_bytes()
    for content in (whole, whole[:50], b""):
        (tmp_path / "s.npz").write_bytes(content)
        with pytest.raises(ValueError, match="no file of statistics"):
            judges.distance_to(tmp_path / "s.npz", judge, "cpu", tmp_path)


# Prompts


@pytest.mark.parametrize(
    ("name", "text", "column"),
    [
        ("p.txt", "a cat\n\n a dog \n", None),
        ("p.json", '["a cat", "a dog"]', None),
        ("p.json", '[{"id": 1, "Prompt": "a cat"}, {"id": 2, "Prompt": "a dog"}]', None),
        ("p.jsonl", '{"said": "a cat"}\n\n{"said": ["a dog", "a hound"]}\n', "said"),
        ("p.csv", 'Prompts,Category\n"a cat",x\n"a dog",y\n', None),
        ("p.tsv", "Prompt\tCategory\na cat\tx\na dog\ty\n", None),
        ("p.tsv", "Prompt\tNote\nno\ta cat\nno\ta dog\n", "Note"),
        ("lines.txt", "a cat\r\n\ra dog", None),
        (
            "captions.json",
            '{"annotations": [{"image_id": 7, "caption": "a cat"}, {"image_id": 7, "caption": "one cat"}, '
            '{"image_id": 8, "caption": "a dog "}]}',
            None,
        ),
    ],
)
def test_prompts_are_read(tmp_path, name, text, column):
    (tmp_path / name).write_text(text)
    assert read_prompts(str(tmp_path / name), column) == ["a cat", "a dog"]
    assert read_prompts(str(tmp_path / name), column, 1) == ["a cat"]


@pytest.mark.parametrize(("name", "text"), [("p.txt", "{}\na dog\n"), ("p.jsonl", '"{}"\n"a dog"\n')])
def test_only_newlines_end_a_prompt(tmp_path, name, text):
    (tmp_path / name).write_text(text.format("a\u2028black\x85cat"), encoding="utf-8")
    assert read_prompts(str(tmp_path / name)) == ["a\u2028black\x85cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "text", "column", "message"),
    [
        ("p.txt", "\n  \n", None, "holds 0 prompts, one at least asked for"),
        ("p.txt", "a\nb\n", "caption", "has no columns"),
        ("p.json", '{"a": 1}', None, "must hold a list"),
        ("p.json", "[1]", None, "which is no text"),
        ("p.json", "[", None, "can't be read as json"),
        ("p.tsv", "Words\tNote\na\tb\n", None, "no column of a usual name; name one of Words, Note"),
        ("p.csv", "prompt\na\n", "caption", "no column 'caption'; name one of prompt"),
        ("p.parquet", "no", "caption", "parquet"),
    ],
)
def test_bad_prompts_are_refused(tmp_path, name, text, column, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name), column)


def test_too_few_prompts_are_refused(tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="holds 2 prompts, 3 asked for"):
        read_prompts(str(tmp_path / "p.txt"), None, 3)
    with pytest.raises(ValueError, match="there is no file"):
        read_prompts("nowhere.txt")


def test_a_data_set_of_the_hub_is_read_file_after_file(tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    import huggingface_hub

    files = {
        "default/train/0000.parquet": ["a", "b"],
        "default/train/0001.parquet": ["c"],
        "other/test/0000.parquet": [],
    }
    fetched = []

    def fetch(filename, repo_id, repo_type, revision):
        assert (repo_id, repo_type, revision) == ("me/prompts", "dataset", "refs/convert/parquet")
        fetched.append(filename)
        parquet.write_table(pyarrow.table({"Prompt": files[filename]}), tmp_path / "f.parquet")
        return tmp_path / "f.parquet"

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: [*files, "README.md"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert read_prompts("dataset:me/prompts:default/train", count=2) == ["a", "b"] and len(fetched) == 1
    assert read_prompts("dataset:me/prompts:default/train") == ["a", "b", "c"]
    with pytest.raises(ValueError, match="name one of its parts, default/train, other/test"):
        read_prompts("dataset:me/prompts")
    with pytest.raises(ValueError, match="no column 'x'; name one of Prompt"):
        read_prompts("dataset:me/prompts:default/train", "x")


@pytest.mark.skipif(has("pyarrow"), reason="only without it")
def test_the_hub_names_its_extra():
    with pytest.raises(ValueError, match=r"ddit\[judges\]"):
        read_prompts("dataset:me/prompts")


# The suite


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline().save_pretrained(folder)
    call = {"height": 64, "width": 64, "num_inference_steps": 6, "max_sequence_length": 20}
    Preset(call=call).save(folder)
    return str(folder)


@pytest.fixture
def flags(model, weights, tmp_path) -> list[str]:
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\n" + "".join(f"{text}\tx\n" for text in TEXTS))
    (tmp_path / "coco").mkdir()
    for i, picture in enumerate(pictures(5)):
        Image.fromarray(picture).save(tmp_path / "coco" / f"{i}.jpg")
    named = [part for name, path in weights.items() for part in ("--weights", f"{name}={path}")]
    suite = ["evaluate", "--suite", "paper", "--model", model, "--prompt-file", str(tmp_path / "p.tsv"), "--batch", "2"]
    methods = ["--methods", "plain", "plain:run_steps=3", "ddit:schedule=1/2"]
    return [*suite, *methods, "--reference", str(tmp_path / "coco"), *named, "--out", str(tmp_path / "o" / "flux")]


def test_the_whole_suite(flags, tmp_path, capsys):
    assert main(flags) == 0, capsys.readouterr().err
    out = tmp_path / "o" / "flux"
    result = json.loads(out.with_suffix(".json").read_text())
    plain, fewer, coarse = result["methods"]
    assert result["suite"] == "paper" and result["prompts"] == 5
    assert plain["run_steps"] == 6 and fewer["run_steps"] == 3 and coarse["flops_fraction"] < 1
    assert "lpips" not in plain and plain["speedup"] == 1
    for row in (fewer, coarse):
        for name in ("clip", "imagereward"):
            low, high = row[f"{name}_change_interval"]
            assert low <= row[f"{name}_change"] <= high
            assert row[f"{name}_change"] == pytest.approx(row[name] - plain[name], abs=1e-5)
        assert row["lpips"] > 0 and row["ssim"] < 1 and row["psnr"] < 80 and row["fid"] > 0
        low, high = row["fid_change_interval"]
        assert low <= row["fid_change"] <= high
    each = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert len(each) == 15 and [line["prompt"] for line in each[:5]] == TEXTS
    of_coarse = [line["psnr"] for line in each if line["method"] == coarse["method"]]
    assert np.mean(of_coarse) == pytest.approx(coarse["psnr"], abs=1e-4)
    a, b = (
        np.asarray(Image.open(out.with_suffix(".pictures") / n / "00003.png"), float)
        for n in ("plain", "plain-run_steps=3")
    )
    assert each[8]["psnr"] == pytest.approx(10 * math.log10(255**2 / np.square(a - b).mean()), abs=1e-3)
    table = out.with_suffix(".md").read_text()
    assert "| method | steps | s | speed | FLOPs | FID | CLIP | ImageReward | LPIPS | SSIM | PSNR, dB |" in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    assert "Weights of the judges: FID " in table
    told = capsys.readouterr()
    assert "FID of 5 pictures" not in told.err and table in told.out


def dying(function, after: int):
    """Calls it so often, and is killed in the next call."""
    count = 0

    def call(*args, **kwargs):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


@pytest.mark.slow
def test_a_killed_run_goes_on(flags, tmp_path, monkeypatch, capsys):
    out = tmp_path / "o" / "flux"
    drawn, seen = [], []
    real, judged = drawings.run, judges.Clip.forward

    def run(pipe, texts, seeds, settings, **kwargs):
        if settings["num_inference_steps"] != 5:  # a warm-up
            drawn.extend((settings["num_inference_steps"], kwargs["method"] is None, seed) for seed in seeds)
        return real(pipe, texts, seeds, settings, **kwargs)

    def forward(self, shown, texts, plain=None):
        seen.extend(picture.tobytes() for picture in shown)
        return judged(self, shown, texts, plain)

    monkeypatch.setattr(judges.Clip, "forward", forward)
    monkeypatch.setattr(drawings, "run", dying(run, 8))
    assert main(flags) == 130 and not out.with_suffix(".json").exists()
    monkeypatch.setattr(drawings, "run", run)
    with (out.with_suffix(".pictures") / "plain" / "drawn.jsonl").open("a") as file:
        file.write('{"number": 9, "pro')  # a line that the kill cut short
    monkeypatch.setattr(paper, "add_lines", dying(paper.add_lines, 11))
    assert main(flags) == 130
    assert len(drawn) == len(set(drawn)) == 15
    monkeypatch.undo()
    monkeypatch.setattr(judges.Clip, "forward", forward)
    monkeypatch.setattr(drawings, "run", dying(run, 0))
    assert main(flags) == 0, capsys.readouterr().err
    assert len(seen) - 2 <= len(set(seen)) == 15, "no more than the batch at which it was killed is judged twice"
    killed = json.loads(out.with_suffix(".json").read_text())["methods"]
    again = [*flags[:-1], str(tmp_path / "whole")]
    monkeypatch.undo()
    assert main(again) == 0
    whole = json.loads((tmp_path / "whole.json").read_text())["methods"]
    timed = ("seconds", "speedup", "speedup_interval")
    assert [{k: v for k, v in row.items() if k not in timed} for row in killed] == [
        {k: v for k, v in row.items() if k not in timed} for row in whole
    ]


def test_more_methods_and_other_weights_leave_what_is_there(flags, tmp_path, monkeypatch, weights, capsys):
    assert main([*flags, "--judges", "psnr", "ssim", "clip"]) == 2  # weights of others would be idle
    assert "would have no effect" in capsys.readouterr().err
    start = flags[: flags.index("--reference")]
    few = [*start, "--judges", "psnr", "clip", "--weights", f"clip={weights['clip']}", "--out", str(tmp_path / "x")]
    assert main(few) == 0
    monkeypatch.setattr(drawings, "run", dying(drawings.run, 2))  # a warm-up and one batch
    assert main([*few, "--prompts", "2", "--methods", "plain", "ddit"]) == 0
    assert len(json.loads((tmp_path / "x.json").read_text())["methods"]) == 2
    assert main([*few, "--seed", "1"]) == 2
    assert "holds pictures of another run (seed differ" in capsys.readouterr().err
    (tmp_path / "p.tsv").write_text("Prompt\na circle\n")
    assert main(few) == 2 and "(prompts differ)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--prompt-column", "Words"], "no column 'Words'; name one of Prompt, Category"),
        (["--reference", "nowhere"], "there is no folder nowhere with pictures"),
        (["--reference", "o"], "o holds 0 pictures; FID needs more than 3"),
        (["--weights", "clip=o"], "weights of the judge clip can't be loaded from o"),
        (["--weights", "lpips=nowhere"], "weights of the judge lpips can't be loaded from nowhere"),
        (["--judges", "vbench", "fid"], "no effect; clip does not judge"),
        (["--prompts", "9"], "holds 5 prompts, 9 asked for"),
        (["--suite", "quality"], "belongs to --suite paper"),
    ],
)
def test_what_is_missing_is_told_before_any_drawing(flags, tmp_path, monkeypatch, capsys, changed, message):
    monkeypatch.chdir(tmp_path)
    Path("o").mkdir()
    monkeypatch.setattr(drawings, "run", dying(drawings.run, 0))
    assert main([*flags, *changed]) == 2
    told = capsys.readouterr().err
    told = told.rpartition("ddit: error: ")[2]  # behind bars of what was loaded
    assert message in told and told.count("\n") == 1
    assert not list((tmp_path / "o").rglob("*.png"))


def test_fid_needs_a_reference_and_a_suite_its_prompts(flags, capsys):
    at = flags.index("--reference")
    assert main([*flags[:at], "--judges", "fid", "psnr"]) == 2
    assert "the judge fid needs --reference" in capsys.readouterr().err
    at = flags.index("--prompt-file")
    assert main([*flags[:at], *flags[at + 2 :]]) == 2
    assert "suite paper needs prompts" in capsys.readouterr().err
