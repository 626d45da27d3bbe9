"""What runs on a machine with a GPU, tried on the CPU with tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import methods, stages, table
from benchmarks.gpu import train as training
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.parts import PART, pack, unpack
from benchmarks.gpu.record import Budget, OutOfTime, Record, read
from benchmarks.gpu.stages import Session

ROOT = Path(__file__).parents[1]


def measure(folder: Path, *words: str, seconds: float = 300) -> int:
    work = ["--work", str(folder / "work"), "--device", "cpu", "--tiny"]
    return main([*words, "--seconds", str(seconds), "--out", str(folder / "out"), *work])


@pytest.fixture
def stub(monkeypatch):
    """Stages that measure nothing: one that works, one that fails, one that does not end."""
    ran = []

    def good(session, record):
        record.once("one", lambda: ran.append("good") or {"seconds": 1.0})

    def bad(session, record):
        record.once("first", lambda: 1)
        record.once("second", lambda: 1 / 0)
        record.once("third", lambda: 3)
        raise RuntimeError("no memory")

    def endless(session, record):
        record.once("first", lambda: 1)
        record.once("second", lambda: time.sleep(60))

    monkeypatch.setattr(stages, "STAGES", {"good": (good, 1.0), "bad": (bad, 1.0), "endless": (endless, 1.0)})
    return ran


def session(folder: Path) -> Session:
    return Session(folder, "cpu", folder / "work", tiny=True)


def test_a_stage_that_fails_is_told_and_the_next_one_runs(tmp_path, stub):
    assert stages.run(["bad", "good"], session(tmp_path), 60) == ["bad"]
    bad, good = (read(tmp_path / f"{name}.json") for name in ("bad", "good"))
    assert not bad["done"] and bad["values"] == {"first": 1, "third": 3}
    assert "ZeroDivisionError" in bad["errors"]["second"] and "no memory" in bad["errors"]["stage"]
    assert good["done"] and good["environment"]["torch"] == torch.__version__


def test_what_is_there_is_not_done_again(tmp_path, stub):
    for _ in range(2):
        assert stages.run(["good"], session(tmp_path), 60) == []
    assert stub == ["good"]
    record = Record(tmp_path / "good.json", Budget(60))
    assert record.once("one", lambda: 1 / 0) == {"seconds": 1.0} and record.once("two", lambda: 2) == 2


def test_a_stage_is_ended_when_its_time_has_passed_and_keeps_what_it_has(tmp_path, stub):
    started = time.monotonic()
    assert stages.run(["endless", "good"], session(tmp_path), 2) == ["endless"]
    assert time.monotonic() - started < 10
    endless = read(tmp_path / "endless.json")
    assert endless["values"] == {"first": 1} and "OutOfTime" in endless["errors"]["stage"]
    assert read(tmp_path / "good.json")["done"]


def test_results_of_another_card_are_not_taken(tmp_path):
    first = Record(tmp_path / "x.json", Budget(5), {"card": "a", "environment": {}})
    first.once("one", lambda: 1)
    assert Record(tmp_path / "x.json", Budget(5), {"card": "a", "environment": {}}).values == {"one": 1}
    assert Record(tmp_path / "x.json", Budget(5), {"card": "b", "environment": {}}).values == {}


def test_results_of_other_code_are_not_taken(tmp_path, stub, monkeypatch):
    assert stages.run(["good"], session(tmp_path), 60) == []
    assert "first_environment" not in read(tmp_path / "good.json")
    monkeypatch.setattr(stages, "digest", lambda: "another")
    assert stages.run(["good"], session(tmp_path), 60) == [] and stub == ["good", "good"]


def test_lists_name_what_there_is():
    """Each measurement once, and every method that is known, in the forms that the stage tells."""
    for names in (stages.FLUX, stages.WAN, stages.PEERS):
        assert len(set(names)) == len(names)
    known = {"plain", "patches", "patches, skip 4", "patches, adapter", "patches, TeaCache", "TeaCache"}
    known |= {"rule, every step full", *(f"skip {n}" for n in methods.SKIPS)}
    for names in (stages.FLUX, stages.WAN):
        compiled = {name.split("/")[2] for name in names if name.startswith("compiled/long/")}
        assert compiled == known


def test_what_does_not_fit_into_the_time_is_left_out(tmp_path):
    record = Record(tmp_path / "x.json", Budget(5))
    assert record.once("long", lambda: 1, need=60) is None
    assert "60 s" in read(tmp_path / "x.json")["left_out"]["long"]
    with pytest.raises(OutOfTime), Budget(0.05).enforced():
        time.sleep(5)


@pytest.mark.slow
def test_a_stage_of_a_model_goes_on_where_it_was_ended(tmp_path, capsys):
    measure(tmp_path, "wan")
    path = tmp_path / "out" / "wan.json"
    whole = read(path)
    assert whole["done"], whole["errors"]
    assert whole["values"]["eager/8/plain"]["computed_calls"] == 2 * 8
    names = [name for name in whole["values"] if name.startswith("eager")]
    path.write_text(json.dumps({**whole, "done": False, "values": {name: whole["values"][name] for name in names}}))
    measure(tmp_path, "wan")
    again = read(path)
    assert again["done"] and list(again["took"]) and not [name for name in again["took"] if name in names]
    assert set(again["values"]) == set(whole["values"])
    measure(tmp_path, "wan")
    assert "there already" in capsys.readouterr().out


def test_nothing_runs_without_a_gpu_unless_tiny(tmp_path, capsys):
    assert main(["flux", "--seconds", "1", "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert "--tiny" in capsys.readouterr().err


def test_the_page_says_that_there_is_no_run_and_takes_a_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text())
    table.write_table(tmp_path, page)
    assert table.NONE in page.read_text()
    (tmp_path / "flux.json").write_text(json.dumps(figures()))
    before = page.read_text()
    main(["table", "--results", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert text.startswith(before.partition(table.BEGIN)[0]) and text.endswith(before.partition(table.END)[2])
    assert "| eager, 2p | 50.0 | 3.00x | 2.00x | 0.67 | 20% | +3.0% | 1.00 |" in text
    assert "| eager, 50 steps: patches | 5.00 | 2.00x | 46.0% | 0.92 | 0 | 1.00 | 0 |" in text
    assert "10.00 (reckoned from single steps)" in text and "Missing: compiled/steps (needs" in text
    (tmp_path / "flux.json").write_text(json.dumps({**figures(), "tiny": True}))
    with pytest.raises(ValueError, match="tiny"):
        table.write_table(tmp_path, page)


def figures() -> dict:
    """A stage as a GPU would leave it."""
    where = {"torch": "2", "diffusers": "0", "date": "today", "device": "cuda"}
    steps = {
        "batch": 1,
        "flops": {"1": 3e12, "2": 1e12},
        "seconds": {"1": 0.1, "2": 0.05},
        "flop_ratio": {"1": 1.0, "2": 3.0},
        "time_ratio": {"1": 1.0, "2": 2.0},
        "efficiency": {"1": 1.0, "2": 0.667},
        "utilisation": {"1": 0.3, "2": 0.2},
        "adapter_share": {"2": 0.03},
        "peak_memory": {"1": 2**30, "2": 2**30},
        "scheduler_share_of_a_plain_step": 0.001,
        "scheduler_share_with_skipping": 0.002,
    }
    patches = {"seconds": [5.0], "flops_fraction": 0.46, "reused": 0, "peak_memory": 2**30, "graphs": 0}
    values = {
        "matmul": {"flops_per_second": 1e14},
        "eager/steps": steps,
        "eager/50/patches": patches,
        "eager/50/plain, extrapolated": {"seconds": [10.0], "extrapolated": True},
    }
    left = {"compiled/steps": "needs about 90 s, 3 s are left"}
    return {"tiny": False, "card": "a card", "environment": where, "values": values, "left_out": left}


def checkpoint(folder: Path, name: str, step: int) -> dict:
    torch.manual_seed(step)
    weights = {"transformer.a": torch.randn(40, 50), "masks.b": torch.randn(8)}
    average = {"transformer.a": torch.randn(40, 50), **({} if name == "flow-guided" else {"masks.b": torch.randn(8)})}
    state = {"momentum": torch.randn(40, 50)}
    optimizers = [{"state": {0: state}, "param_groups": [{"lr": 0.1, "full_lr": 0.2, "params": [0]}]}]
    torch.save({"model": weights, "average": average, "optimizers": optimizers, "step": step}, folder / f"{name}.pt")
    return average


def test_a_run_goes_through_parts(tmp_path, monkeypatch):
    run, out, again = tmp_path / "image", tmp_path / "out", tmp_path / "again" / "image"
    (run / "vae").mkdir(parents=True)
    (run / "vae" / "config.json").write_text("{}")
    (run / "settings.json").write_text("{}")
    (run / "flow-64.jsonl").write_text('{"step": 10, "loss": 1.0}\n')
    checkpoint(run, "text", 3)
    checkpoint(run, "flow-64", 10)
    average = checkpoint(run, "flow-guided", 20)
    assert len(pack(run, out)) == 1 and PART < 16 * 2**20
    monkeypatch.setattr("benchmarks.gpu.parts.PART", 5000)
    assert 1 < len(pack(run, out)) < 10
    unpack(out, again)
    assert (again / "vae" / "config.json").exists() and not (again / "flow-128.pt").exists()
    first, last, text = (torch.load(again / f"{name}.pt") for name in ("flow-64", "flow-guided", "text"))
    assert (first["step"], last["step"], text["step"]) == (10, 20, 3)
    assert list(last["average"]) == ["transformer.a"] and set(first["average"]) == {"transformer.a", "masks.b"}
    torch.testing.assert_close(last["average"]["transformer.a"], average["transformer.a"], rtol=1e-3, atol=1e-3)
    assert torch.equal(first["model"]["transformer.a"], last["average"]["transformer.a"])
    assert last["optimizers"] == [{"state": {}, "param_groups": [{"lr": 0.1, "full_lr": 0.2, "params": [0]}]}]
    with pytest.raises(FileNotFoundError, match="train-image"):
        unpack(tmp_path / "none", again)


def wheel(folder: Path) -> None:
    """A wheel of one module, without any tool."""
    folder.mkdir()
    files = {
        "carried.py": "VALUE = 7\n",
        "carried-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n",
    }
    files["carried-1.0.dist-info/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files["carried-1.0.dist-info/RECORD"] = (
        "".join(f"{name},,\n" for name in files) + "carried-1.0.dist-info/RECORD,,\n"
    )
    with zipfile.ZipFile(folder / "carried-1.0-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def script(tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    """The script with no network: an index that nobody answers, and proxies that lead nowhere."""
    nowhere = {
        name: "http://127.0.0.1:9"
        for name in ("PIP_INDEX_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    }
    own = {"PYTHON": sys.executable, "GPU_WHEELS": str(tmp_path / "whl"), "GPU_SITE": str(tmp_path / "site")}
    environment = {**os.environ, **nowhere, **own, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    return subprocess.run(
        [ROOT / "scripts" / "gpu.sh", *words], env=environment, capture_output=True, text=True, cwd=tmp_path
    )


def test_the_script_refuses_nonsense(tmp_path):
    for words in ([], ["run"], ["run", "10", "out"], ["walk"]):
        done = script(tmp_path, *words)
        assert done.returncode == 2 and "prepare" in done.stderr


@pytest.mark.slow
def test_the_script_installs_what_was_carried_and_needs_no_network(tmp_path):
    wheel(tmp_path / "whl")
    done = script(tmp_path, "run", "10", "out", "flux", "--help")
    assert done.returncode == 0 and "--checkpoint" in done.stdout, done.stderr
    assert (tmp_path / "site" / "carried.py").exists()


@pytest.mark.slow
def test_all_stages_run_end_to_end(tmp_path):
    (tmp_path / "whl").mkdir()
    flags = ["--tiny", "--device", "cpu", "--work", str(tmp_path / "work")]
    done = script(tmp_path, "run", "600", "out", "all", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: read(tmp_path / "out" / f"{name}.json") for name in stages.STAGES if name != "train-together"}
    assert all(stage["done"] for stage in found.values()), {n: s["errors"] for n, s in found.items()}
    values = found["flux"]["values"]
    assert values["eager/8/skip 2"]["flops_fraction"] == 0.5 and values["compiled/8/patches"]["graphs"] == 0
    assert values["eager/8/plain"]["computed_calls"] == 8 and values["eager/8/patches, TeaCache"]["reused"] > 0
    assert set(values["eager/steps"]["adapter_share"]) == {"2", "4"}
    assert found["wan"]["values"]["eager/8/plain"]["computed_calls"] == 16
    assert found["peers"]["values"]["eager/8/TaylorSeer 4"]["computed_calls"] < 8
    for kind in training.DONE:
        assert 1 <= len(list((tmp_path / "out").glob(f"train-{kind}.tar.*"))) <= 4
    assert all(path.stat().st_size < 16 * 2**20 for path in (tmp_path / "out").iterdir())
    assert "there already" in script(tmp_path, "run", "600", "out", "all", *flags).stdout


@pytest.mark.slow
def test_trainings_go_on_side_by_side_from_parts_and_fit_into_what_comes_back(tmp_path):
    assert measure(tmp_path, "train-image") == 0
    parts = ["--checkpoint", str(tmp_path / "out"), "--work", str(tmp_path / "other")]
    (tmp_path / "back").mkdir()
    flags = ["--device", "cpu", "--tiny", *parts, "--seconds", "300", "--out", str(tmp_path / "back")]
    assert main(["train-together", *flags]) == 0
    told = read(tmp_path / "back" / "train-together.json")
    assert told["done"], told["errors"]
    begun = set(training.DONE) - {"image"}  # which came with the parts
    assert set(told["values"]["settings"]) == begun
    assert str(tmp_path / "other") in told["values"]["settings"]["image-adapter"]["model"]
    assert len(list((tmp_path / "back").iterdir())) <= 8


@pytest.mark.slow
def test_what_follows_a_training_that_fails_is_not_begun(tmp_path, monkeypatch):
    place = training.Place(tmp_path, tmp_path / "out", "cpu", tiny=True, settings=["batch=none"])
    monkeypatch.setattr(training, "_environment", lambda: {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"})
    record = Record(tmp_path / "x.json", Budget(120))
    with pytest.raises(RuntimeError, match=r"(?s)image ended with 2.*no number"):
        training.train("both", record, place, chains={"both": [["image", "image-adapter"]]})
    assert not (tmp_path / "image-adapter").exists() and "no number" in record.values["logs"]["image"]
    with pytest.raises(FileNotFoundError, match="parts of one"):
        training.train("both", record, place, tmp_path / "none", chains={"both": [["video"]]})
