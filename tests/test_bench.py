"""Counts on the meta device."""

from __future__ import annotations

import json

import pytest

from ddit.cli import main
from ddit.eval.bench import count, table
from ddit.known import meta_transformer, names


def test_known_architectures_are_the_real_ones():
    """Parameters in billions, as their authors give them."""
    expected = {"flux.1-dev": 11.9, "flux.1-schnell": 11.9, "wan2.1-1.3b": 1.4, "wan2.1-14b": 14.3, "qwen-image": 20.4}
    assert set(expected) == set(names())
    for name, billions in expected.items():
        parameters = sum(p.numel() for p in meta_transformer(name).parameters())
        assert parameters / 1e9 == pytest.approx(billions, abs=0.06), name


def test_flux_at_1024():
    """A token costs two operations per parameter it meets, and attention on top."""
    result = count("flux.1-dev", height=1024, width=1024)
    assert {s: row["tokens"] for s, row in result["scales"].items()} == {1: 4096, 2: 1024, 4: 256}
    assert result["scales"][1]["flops"] / 1e12 == pytest.approx(74.4, abs=0.1)
    assert result["scales"][2]["ratio"] == pytest.approx(3.46, abs=0.01)
    assert result["scales"][4]["ratio"] == pytest.approx(7.19, abs=0.01)


def test_grids_of_wan_are_padded():
    """480 x 832 are 30 x 52 tokens: at 4p 8 x 13 large patches, the last row half empty."""
    result = count("wan2.1-1.3b", height=480, width=832, frames=81)
    assert {s: row["tokens"] for s, row in result["scales"].items()} == {1: 32760, 2: 8190, 4: 21 * 8 * 13}
    assert result["scales"][1]["flops"] / 1e12 == pytest.approx(283, abs=1)


def test_an_adapter_is_counted_along():
    plain = count("wan2.1-1.3b", height=256, width=256, frames=5, scales=(1, 2))
    adapted = count("wan2.1-1.3b", height=256, width=256, frames=5, scales=(1, 2), rank=32)
    assert adapted["scales"][1] == plain["scales"][1]
    share = adapted["scales"][2]["flops"] / plain["scales"][2]["flops"] - 1
    assert 0 < share < 0.05


def test_the_command_writes_a_table(tmp_path, capsys):
    out = tmp_path / "flops"
    sizes = ["--size", "256x256", "--arch", "flux.1-schnell", "wan2.1-1.3b"]
    assert main(["bench", *sizes, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    saved = json.loads(out.with_suffix(".json").read_text())
    assert table(saved["counts"]) == out.with_suffix(".md").read_text() and "wan2.1-1.3b" in shown
    assert len(saved["counts"]) == 2 and saved["command"].startswith("ddit ")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--size", "1000x1024"], "multiple of 16"),
        (["--size", "large"], "HEIGHTxWIDTH"),
        (["--size", "480x832x80", "--arch", "wan2.1-1.3b"], "multiple of 4"),
        (["--arch", "flux.2"], "flux.1-dev"),
        (["--scales", "3"], "power"),
    ],
)
def test_nonsense_is_refused(flags, word, capsys):
    assert main(["bench", *flags]) == 2
    assert word in capsys.readouterr().err
