"""What is written where: links are followed, pipes and shared names refused before any work, a closed pipe is quiet."""

import os
import subprocess
import sys

import pytest

import tiny
from ddit.cli import main
from ddit.util.files import replacing, replacing_folder, write_json


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "far").mkdir()
    link, target = tmp_path / "link.json", tmp_path / "far" / "target.json"
    link.symlink_to(target)
    for value in (1, 2):  # not there yet, then there
        write_json(link, value)
        assert link.is_symlink() and target.read_text() == f"{value}\n"
    assert os.listdir(tmp_path / "far") == ["target.json"]


def test_a_link_to_a_folder_is_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replacing_folder(tmp_path / "link") as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "new").exists()


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="full"), replacing_folder(tmp_path / "a") as partial:
        partial.mkdir()
        raise OSError("full")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--json", "--plot", "--out"])
def test_a_pipe_is_refused_before_any_work(tmp_path, capsys, flag):
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    flags = {"--out": str(tmp_path / "a.png"), flag: str(pipe), "--model": "nowhere"}
    assert main(["generate", tiny.PROMPT, *(part for item in flags.items() for part in item)]) == 2
    assert "not a regular file" in capsys.readouterr().err
    assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe.png"]
    with pytest.raises(OSError, match="not a regular file"), replacing(pipe):
        pass


@pytest.mark.parametrize(("one", "other"), [("--json", "--out"), ("--plot", "--out"), ("--json", "--plot")])
def test_two_outputs_of_one_name_are_refused_before_any_work(tmp_path, capsys, one, other):
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    flags = [one, str(tmp_path / "link.png"), other, str(tmp_path / "a.png"), "--model", "nowhere"]
    assert main(["generate", tiny.PROMPT, *flags]) == 2
    assert "two outputs are one file" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--out", "a.png", "--num-images", "2", "--json", "a-1.png"],
        ["--out", "a.mp4", "--plot", "a.png"],
        ["--out", "a.mp4", "--num-images", "2", "--plot", "a-0.png"],
    ],
)
def test_files_beside_the_first_count_as_well(tmp_path, monkeypatch, capsys, flags):
    """Of several pictures, and the contact sheet of a clip."""
    monkeypatch.chdir(tmp_path)
    assert main(["generate", tiny.PROMPT, *flags, "--model", "nowhere"]) == 2
    assert "two outputs are one file" in capsys.readouterr().err and not os.listdir(tmp_path)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_are_closed_are_no_error(closed):
    done = subprocess.run(
        f"{sys.executable} -m ddit.cli --version {closed}", shell=True, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr


@pytest.mark.parametrize(("command", "unbuffered"), [(["--help"], ""), (["--help"], "1"), (["info"], "")])
def test_a_reader_that_left_is_no_error(command, unbuffered):
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    ddit = [sys.executable, "-m", "ddit.cli", *command]
    done = subprocess.run(ddit, stdout=write, stderr=subprocess.PIPE, text=True, env=env)
    os.close(write)
    assert done.returncode == 0 and not done.stderr
