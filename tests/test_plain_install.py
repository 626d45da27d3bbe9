"""Without extras: the demo works, and whatever needs one says which before any work."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from ddit.eval.metrics import psnr, ssim
from ddit.util.extras import EXTRA_OF

BLOCKED = ("torchmetrics", *EXTRA_OF)
CODE = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r})); from ddit.cli import main; sys.exit(main())"


def plain(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_the_demo_needs_no_extra(tmp_path):
    done = plain("demo", "--out", str(tmp_path / "demo.png"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo.png").is_file() and (tmp_path / "demo.json").is_file()
    assert "patches + skip" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["generate", tiny.PROMPT, "--plot", "p.png"], "plot"),
        (["evaluate", "--out", "e"], "plot"),
        pytest.param(["train", "--prompts", "p.txt", "--out", "run"], "train", marks=pytest.mark.slow),
        (["app", "--study", "nowhere"], "app"),
    ],
)
def test_the_extra_is_named_before_any_work(tmp_path, monkeypatch, arguments, extra):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a red circle\n")
    done = plain(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"pip install 'ddit[{extra}]'" in done.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["p.txt"]


def test_the_extras_bring_what_they_are_named_for():
    project = pytest.importorskip("tomllib").loads((Path(__file__).parents[1] / "pyproject.toml").read_text())[
        "project"
    ]
    names = {"imageio_ffmpeg": "imageio-ffmpeg", "cache_dit": "cache-dit"}
    for module, extra in EXTRA_OF.items():
        brought = project["optional-dependencies"][extra]
        assert any(line.startswith(names.get(module, module)) for line in brought), module


def test_likeness_equals_that_of_torchmetrics():
    image = pytest.importorskip("torchmetrics.functional.image")
    a = torch.rand(3, 3, 24, 17, generator=torch.Generator().manual_seed(0))
    b = (a + 0.1 * torch.rand(a.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    expected = image.structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(a, b), expected, rtol=1e-5, atol=1e-5)
    expected = image.peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(psnr(a, b), expected)
