"""The command line: quick help, clear refusals with exit code 2 and nothing written, and one real run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
from ddit import PatchSchedule
from ddit.cli import main, parser
from ddit.cli.common import call_options, check_run
from ddit.embedded import ASSETS
from ddit.preset import Preset

PROMPT = tiny.PROMPT


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A shrunken FLUX saved as any pipeline is, with a preset."""
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline().save_pretrained(folder)
    call = {"height": 32, "width": 32, "num_inference_steps": 6, "max_sequence_length": 20}
    Preset(call=call, patches=PatchSchedule(threshold=1e6, careful=False)).save(folder)
    return str(folder)


def refused(capsys, tmp_path: Path, *flags: str, prompt: str = PROMPT) -> str:
    """Run ``ddit generate``, expect exit code 2 and no file; returns what it said."""
    out = tmp_path / "out" / "x.png"
    try:
        code = main(["generate", prompt, "--out", str(out), *flags])
    except SystemExit as stop:  # argparse's own refusals
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in said and said.strip()
    assert not out.parent.exists()
    return said


def test_help_is_quick_and_loads_no_torch():
    code = "import sys; from ddit.cli import parser; parser().format_help(); assert 'torch' not in sys.modules"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.perf_counter() - started < 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--threshold", "-1"], "threshold"),
        (["--device", "cuda:99"], "this machine has cpu"),
        (["--device", "nonsense"], "this machine has cpu"),
        (["--cache", "magic:1"], "such as teacache:0.25"),
        (["--speedup", "0.5"], "at least 1"),
        (["--speedup", "2", "--quality", "30"], "needs one of"),
        (["--schedule", "1", "2", "--order", "2"], "order would have no effect"),
        (["--patches", "paper", "--start", "bilinear"], "start would have no effect"),
        (["--preset", "nowhere"], "holds no ddit.json"),
        (["--threshold", "nan"], "threshold"),
        (["--threshold", "inf"], "threshold"),
        (["--percentile", "1.5"], "percentile"),
        (["--scales", "2", "4"], "hold 1"),
        (["--scales", "1", "3"], "powers of two"),
        (["--order", "4"], "order"),
        (["--steps", "0"], "steps"),
        (["--height", "0"], "height"),
        (["--adapter", "nowhere"], "no folder 'nowhere'"),
        (["--adapter", "."], "can't be loaded"),
        (["--model", "."], "model_index.json"),
        (["--model", "nowhere"], "no folder"),
        (["--schedule", "3"], "powers of two"),
        (["--patches", "magic"], "invalid choice"),
        (["--num-images", "0"], "above 0"),
        (["--json", "/proc/nope/x.json"], "can't be written"),
        (["--json", "/proc"], "/proc is a folder; name a file in it"),
        (["--plot", "x.mp3"], "x.mp3 must end in one of ."),
        (["--repeats", "3"], "--repeats says how often --compare"),
        (["--adapter", ""], "adapter is empty"),
        (["--seed", str(2**63)], "is not a seed"),
        (["--seed", "-1"], "is not a seed"),
        (["--fps", "4"], "fps is 4, but FluxPipeline makes no clips"),
        (["--call", "guidance_scale=1", "--call", "guidance_scale=2"], "--call gives guidance_scale several times"),
    ],
)
def test_bad_flags_are_refused(capsys, tmp_path, flags, words):
    assert words in refused(capsys, tmp_path, *flags)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["compare", "--prompts", "prompts.txt"], "a file of prompts is given with --prompt-file"),
        (["evaluate", "--prompts", "1"], "draw at least 2"),
        (["bench", "--size", "1024x1024x5"], "flux.1-dev makes no clips; name a size without frames"),
        (["bench", "--size", "\u00b2x\u00b2"], "it must be HEIGHTxWIDTH"),
        (["bench", "--device", "cpu", "--schedule", "1,3"], "schedule '1,3' is none"),
    ],
)
def test_measurements_that_can_not_be_made_are_refused(capsys, tmp_path, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_empty_prompt_is_refused(capsys, tmp_path):
    assert "empty" in refused(capsys, tmp_path, prompt="  ")


def test_out_must_be_a_png_in_a_writable_folder(capsys):
    assert main(["generate", PROMPT, "--out", "picture.jpg"]) == 2
    assert main(["generate", PROMPT, "--out", "/proc/nope/x.png"]) == 2
    assert "can't be written" in capsys.readouterr().err


def test_unsupported_model_lists_the_supported(capsys, tmp_path, model):
    index = json.loads((Path(model) / "model_index.json").read_text())
    index["_class_name"] = "NoSuchPipeline"
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model_index.json").write_text(json.dumps(index))
    assert refused(capsys, tmp_path, "--model", str(tmp_path / "m"))


def test_generate_writes_picture_and_report(capsys, tmp_path, model):
    out, report, plot = tmp_path / "a.png", tmp_path / "a.json", tmp_path / "p.png"
    flags = ["--model", model, "--out", str(out), "--json", str(report), "--plot", str(plot), "--num-images", "2"]
    assert main(["generate", PROMPT, *flags]) == 0
    assert "steps: 1 1 1 4 4 4" in capsys.readouterr().out
    values = json.loads(report.read_text())
    assert values["scales"] == [[1, 1, 1, 4, 4, 4]] * 2
    assert 0 < values["flops_fraction"] < 1 and 0 < values["tokens_fraction"] < 1 and values["seconds"] > 0
    assert (tmp_path / "a-0.png").exists() and (tmp_path / "a-1.png").exists() and plot.exists()


def test_compare_reports_speed_and_likeness(tmp_path, model):
    out, report = tmp_path / "a.png", tmp_path / "a.json"
    flags = ["--model", model, "--out", str(out), "--json", str(report), "--compare", "--threshold", "0"]
    assert main(["generate", PROMPT, *flags]) == 0
    values = json.loads(report.read_text())
    assert {"baseline_seconds", "speedup", "psnr", "ssim"} <= set(values)
    assert values["ssim"] == pytest.approx(1.0) and values["flops_fraction"] == 1.0


def test_sizes_the_pipeline_would_round_are_refused(capsys, tmp_path, model):
    said = refused(capsys, tmp_path, "--model", model, "--height", "33")
    assert "multiples of 4, such as 32" in said


def test_further_arguments_of_the_call(tmp_path, model):
    """They reach the pipeline, and stand in the report."""
    report, flags = tmp_path / "a.json", ["--model", model, "--out", str(tmp_path / "a.png")]
    guided = ["--call", "true_cfg_scale=2.5", "--call", "negative_prompt=a red circle", "--call=max_sequence_length=8"]
    assert main(["generate", PROMPT, *flags, "--json", str(report)]) == 0
    before = (tmp_path / "a.png").read_bytes()
    assert main(["generate", PROMPT, *flags, "--json", str(report), *guided]) == 0
    told = json.loads(report.read_text())["call"]
    assert told["true_cfg_scale"] == 2.5 and told["negative_prompt"] == "a red circle"
    assert (tmp_path / "a.png").read_bytes() != before


@pytest.mark.parametrize(
    ("call", "word"),
    [
        ("guidance=4", "takes .*guidance_scale"),
        ("guidance_scale=much", "takes a number"),
        ("output_type=pt", "can't be called with output_type"),
        ("guidance_scale", "not NAME=VALUE"),
        ("num_inference_steps=3", "set by --steps"),
        ("num_frames=9", "set by --frames"),
        ("prompt=a blue star", "can't be called with prompt"),
        ("generator=3", "can't be called with generator"),
        ("num_images_per_prompt=2", "can't be called with num_images_per_prompt"),
        ("guidance_scale=null", "says nothing"),
        ("guidance_scale=NaN", "takes a number"),
        ("guidance_scale=1e999", "takes a number"),
        ("sigmas=[]", "is empty"),
        ("sigmas=[1, NaN]", "each item a number"),
        ("max_sequence_length=-1", "called with .*max_sequence_length=-1"),
        ('prompt_2=["a", "b"]', "called with .*prompt_2="),
    ],
)
def test_arguments_that_no_call_takes_are_refused(capsys, tmp_path, model, call, word):
    assert re.search(word, refused(capsys, tmp_path, "--model", model, "--call", call))


def test_commands_without_an_option_leave_it_to_call():
    told = parser().parse_args(["evaluate", "--steps", "4", "--call", "max_area=9", "--call", "guidance_scale=2"])
    check_run(told, ())
    assert call_options(told) == {"num_inference_steps": 4, "max_area": 9, "guidance_scale": 2}


def prompts_file(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text(f"{PROMPT}\n\na blue star\na green circle\n")
    return path


def test_a_file_of_prompts_goes_on_where_it_stopped(model, tmp_path, capsys):
    """Each as when drawn alone, with its report beside it."""
    folder = tmp_path / "many"
    flags = ["--model", model, "--prompts", str(prompts_file(tmp_path)), "--out", str(folder)]
    assert main(["generate", *flags]) == 0
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:05d}.{end}" for i in (1, 2, 3) for end in ("json", "png")]
    assert json.loads((folder / "00002.json").read_text())["prompt"] == "a blue star"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (folder / "00002.json").unlink()
    (folder / "00001.png").touch()
    stamp = (folder / "00001.png").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["generate", *flags]) == 0
    assert "wrote 1 of 3" in capsys.readouterr().out and (folder / "00001.png").stat().st_mtime_ns == stamp
    assert all(path.read_bytes() == data for path, data in before.items() if path.suffix == ".png")
    assert main(["generate", "a blue star", "--model", model, "--out", str(tmp_path / "alone.png")]) == 0
    assert (tmp_path / "alone.png").read_bytes() == before[folder / "00002.png"]
    assert main(["generate", *flags, "--steps", "5"]) == 2
    assert "call differ" in capsys.readouterr().err
    for other, told in ((["--dtype", "bfloat16"], "dtype"), (["--compare"], "compare"), (["--seed", "4"], "seeds")):
        assert main(["generate", *flags, *other]) == 2
        assert f"({told} differ)" in capsys.readouterr().err


def test_what_an_earlier_run_has_lost_is_drawn_again(model, tmp_path, capsys):
    """A picture that was deleted, and one whose report is none."""
    folder = tmp_path / "many"
    flags = ["--model", model, "--prompts", str(prompts_file(tmp_path)), "--out", str(folder), "--num-images", "2"]
    assert main(["generate", *flags]) == 0
    (folder / "00001-1.png").unlink()
    (folder / "00003.json").write_text("[1]")
    capsys.readouterr()
    assert main(["generate", *flags]) == 0
    assert "wrote 2 of 3" in capsys.readouterr().out and (folder / "00001-1.png").is_file()
    assert isinstance(json.loads((folder / "00003.json").read_text()), dict)


@pytest.mark.parametrize("command", [["generate"], ["calibrate"], ["study", "prepare"]], ids=" ".join)
def test_prompts_of_a_column_of_any_name(command, model, tmp_path, capsys):
    (tmp_path / "p.csv").write_text(f"words,n\n{PROMPT},1\n")
    flags = ["--model", model, "--prompts", str(tmp_path / "p.csv"), "--out", str(tmp_path / "out")]
    assert main([*command, *flags]) == 2
    assert "name one of words, n with --prompt-column" in capsys.readouterr().err
    assert main([*command, *flags, "--prompt-column", "n", "--width", "33"]) == 2
    assert "width is 33" in capsys.readouterr().err  # the prompts were read before


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ([], "or --prompts"),
        ([PROMPT, "--prompts", "p.txt"], "leave one of them out"),
        (["--prompts", "none.txt"], "no file"),
        ([PROMPT, "--prompt-column", "words"], "in --prompts FILE"),
        (["--prompts", "none.txt", "--json", "a.json"], "beside it"),
        (["--prompts", "none.txt", "--out", "a.png"], "must be a folder"),
    ],
)
def test_prompts_that_can_not_be_drawn_are_refused(flags, word, capsys):
    assert main(["generate", *flags]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_prompts(model, tmp_path):
    folder = tmp_path / "many"
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--multi_gpu"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "ddit.cli", "generate"]
    flags = ["--model", model, "--prompts", str(prompts_file(tmp_path)), "--out", str(folder)]
    done = subprocess.run([sys.executable, *launch, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(folder.glob("*.png"))) == len(list(folder.glob("*.json"))) == 3
    assert "wrote 2 of 3" in done.stdout and "wrote 1 of 3" in done.stdout


def test_info_names_versions_and_models(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert "torch" in said and "FluxTransformer2DModel" in said


def test_unknown_words_warn_with_near_ones(recwarn):
    from ddit.pipelines.loading import check_prompt

    check_prompt("a blu circle on a sea background", "embedded")
    assert any("'blu'" in str(w.message) and "blue" in str(w.message) for w in recwarn.list)


def test_a_broken_preset_is_refused(tmp_path):
    (tmp_path / "ddit.json").write_text("{}")
    with pytest.raises(ValueError, match="not a preset"):
        Preset.load(tmp_path)


def test_the_embedded_models_are_small():
    kinds = [[f for f in ASSETS.rglob("*") if f.is_file() and ("video" in str(f)) == video] for video in (False, True)]
    pictures, clips = (sum(file.stat().st_size for file in files) for files in kinds)
    assert 0 < pictures < 30_000_000 and clips < 30_000_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "--dtype", "bfloat16"], "--dtype need a device"),
        (["bench", "--steps", "50"], "--steps need a device"),
        (["compare", "--prompt-file", "p.txt", "--split", "tune"], "--split chooses among the project's own"),
        (["calibrate", "--model", "nowhere", "--prompts", "none.txt", "--out", "x"], "no file"),
        (["generate", "a star", "--patches", "full", "--adapter", "embedded"], "adapter would have no effect"),
        (["compare", "--methods", "taylorseer:4"], "a cache alone is plain:cache=taylorseer:4"),
        (["compare", "--methods", "ddit:schedule=1,1,4"], "lists are joined by /"),
    ],
)
def test_what_would_have_no_effect_is_refused(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a star\n")
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_one_scale_is_benched(capsys):
    assert main(["bench", "--arch", "embedded", "--size", "128x128", "--scales", "1"]) == 0
    assert "embedded" in capsys.readouterr().out


def test_training_settings_are_told_in_words(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Lowest noise level that each of scales is trained at" in said and "--call NAME=VALUE" in said
