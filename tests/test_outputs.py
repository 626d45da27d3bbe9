"""Files that `ddit generate` writes, and what it refuses before it draws."""

from __future__ import annotations

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

import tiny
from ddit.cli import main
from ddit.generate import check_size, draws_video
from ddit.outputs import frames, save


def ramp(*shape: int) -> np.ndarray:
    return np.linspace(0, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def test_pictures_side_by_side(tmp_path):
    plain, dynamic = ramp(2, 16, 16, 3), 1 - ramp(2, 16, 16, 3)
    paths = save(tmp_path / "new" / "a.png", dynamic, plain)
    assert [p.name for p in paths] == ["a-0.png", "a-1.png"]
    shown = np.asarray(Image.open(paths[1]), dtype=np.float32) / 255
    assert shown.shape == (16, 32, 3)
    np.testing.assert_allclose(shown[:, :16], plain[1], atol=0.003)
    np.testing.assert_allclose(shown[:, 16:], dynamic[1], atol=0.003)


def test_a_clip_and_its_contact_sheet(tmp_path):
    """Small clips are enlarged by a whole factor; frames keep their order and, but for the codec, their colours."""
    plain = np.repeat(np.linspace(0.1, 0.9, 5, dtype=np.float32), 64 * 64 * 3).reshape(1, 5, 64, 64, 3)
    dynamic = plain[:, ::-1]
    video, sheet = save(tmp_path / "a.mp4", dynamic, plain, fps=5)
    assert (video.name, sheet.name) == ("a.mp4", "a.png")
    written = iio.imread(video)
    assert written.shape == (5, 256, 512, 3)
    np.testing.assert_allclose(written[:, :, :256].mean((1, 2, 3)) / 255, plain[0, :, 0, 0, 0], atol=0.03)
    np.testing.assert_allclose(written[:, :, 256:].mean((1, 2, 3)) / 255, dynamic[0, :, 0, 0, 0], atol=0.03)
    rows = np.asarray(Image.open(sheet), dtype=np.float32) / 255
    assert rows.shape == (128, 320, 3)
    np.testing.assert_allclose(rows[0, ::64, 0], plain[0, :, 0, 0, 0], atol=0.003)
    np.testing.assert_allclose(rows[64, ::64, 0], dynamic[0, :, 0, 0, 0], atol=0.003)
    assert not list(tmp_path.glob("*partial*"))


def test_frames_of_clips_and_pictures():
    assert frames(ramp(2, 3, 8, 8, 3)).shape == (6, 8, 8, 3) and frames(ramp(2, 8, 8, 3)).shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"num_frames": 8}, "such as 9"), ({"num_frames": 16}, "such as 17"), ({"height": 40}, "such as 32")],
)
def test_sizes_that_a_video_pipeline_would_round_are_refused(settings, word):
    pipe = tiny.wan_pipeline()
    assert draws_video(pipe)
    check_size(pipe, {"num_frames": 9, "height": 64, "width": 96})
    with pytest.raises(ValueError, match=word):
        check_size(pipe, settings)


def test_frames_are_refused_for_pictures():
    pipe = tiny.pipeline()
    assert not draws_video(pipe)
    with pytest.raises(ValueError, match="draws pictures"):
        check_size(pipe, {"num_frames": 9})


def test_the_ending_must_fit_the_model(tmp_path, capsys):
    assert main(["generate", "a red circle on a smooth background", "--out", str(tmp_path / "a.mp4")]) == 2
    assert "must end in .png" in capsys.readouterr().err
    assert main(["generate", "a red circle", "--out", str(tmp_path / "a.gif")]) == 2
    assert ".mp4" in capsys.readouterr().err
