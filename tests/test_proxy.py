"""The proxy card: rows with values made up, and the whole suite on a shrunken model."""

import json

import pytest

import tiny
from ddit.cli import main
from ddit.eval import proxy
from ddit.models import architecture_for
from ddit.preset import Preset


def figures(**changes):
    """Rows of all entries: level with plain, but for the changes."""
    level = {
        "adherence_change": 0.0,
        "adherence_change_interval": [-0.01, 0.01],
        "frechet": 2.0,
        "frechet_change_interval": [-0.1, 0.1],
        "psnr": 20.0,
        "ssim": 0.8,
        "flops_fraction": 0.33,
    }
    rows = [{"method": name, **level, **changes.get(name, {})} for name in proxy.entries(teacache=True)]
    return rows


WORSE = {"adherence_change": -0.1, "adherence_change_interval": [-0.2, -0.05], "frechet": 4.0}
REAL = {
    **{f"plain:run_steps={n}": WORSE for n in (17, 11, 7)},
    "plain:run_steps=25,cache=taylorseer:4": WORSE,
}


@pytest.fixture(scope="module")
def roomy():
    """4 channels in patches of 2 x 2: 16 numbers for a token of width 256."""
    return architecture_for(tiny.transformer(num_attention_heads=16))


def verdicts(rows, architecture):
    return [row.passed for row in proxy.card(rows, architecture, video=False)]


def test_a_model_like_the_real_ones_passes(roomy):
    card = proxy.card(figures(**REAL), roomy, video=False)
    assert all(row.passed for row in card) and [row.must for row in card] == [True] * 3 + [False] * 4
    assert card[0].proxy == "16, 4, 1"
    assert "miss" not in proxy.markdown(card)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"progressive:fraction=0.5": {"adherence_change": -0.02}}, 1),
        ({"progressive:fraction=0.5": {"frechet_change_interval": [0.2, 0.5]}}, 1),
        ({"plain:run_steps=17": {"adherence_change_interval": [-0.01, 0.01], "adherence_change": 0.0}}, 2),
        ({"plain:run_steps=30": WORSE}, 2),
        ({"plain:cache=taylorseer:4": {"psnr": 44.7}}, 3),
        ({"plain:cache=teacache:0.2": {"psnr": 30.5, "flops_fraction": 1 / 3}}, 4),
        ({"plain:run_steps=25,cache=taylorseer:4": {"adherence_change_interval": [-0.01, 0.01]}}, 5),
        ({"plain:run_steps=25": {"ssim": 0.95}}, 6),
    ],
)
def test_each_row_can_be_missed_alone(roomy, changes, missed):
    merged = {name: {**REAL.get(name, {}), **changes.get(name, {})} for name in {**REAL, **changes}}
    assert verdicts(figures(**merged), roomy) == [i != missed for i in range(7)]


def test_narrow_tokens_have_no_room():
    narrow = architecture_for(tiny.transformer())
    row = proxy.card(figures(**REAL), narrow, video=False)[0]
    assert not row.passed and row.proxy == "2, 0.5, 0.125" and "patches can't be judged" in proxy.markdown([row])


def test_a_forecast_that_is_too_easy_is_told_how_to_read(roomy):
    easy = {**REAL, "plain:cache=taylorseer:4": {"psnr": 44.7}}
    row = proxy.card(figures(**easy), roomy, video=False)[3]
    assert row.proxy == "44.7 dB, 22.4 dB easier: likeness decides nothing"


@pytest.mark.slow
def test_the_suite_writes_the_card(tmp_path):
    tiny.pipeline().save_pretrained(tmp_path / "model")
    Preset(call={"height": 128, "width": 128, "max_sequence_length": 20}).save(tmp_path / "model")
    flags = ["--suite", "proxy", "--model", str(tmp_path / "model"), "--prompts", "2", "--batch", "2"]
    assert main(["evaluate", *flags, "--out", str(tmp_path / "card")]) == 0
    told = json.loads((tmp_path / "card.json").read_text())
    assert len(told["card"]) == 7 and len(told["methods"]) == len(proxy.entries(teacache=False))
    assert (tmp_path / "card.md").read_text().startswith("| property |")


@pytest.mark.parametrize("flags", [["--methods", "plain"], ["--steps", "20"], ["--adapter", "embedded"]])
def test_what_the_card_decides_itself_is_refused(flags, tmp_path, capsys):
    assert main(["evaluate", "--suite", "proxy", *flags, "--out", str(tmp_path / "b")]) == 2
    assert "methods, steps and prompts of its own" in capsys.readouterr().err
