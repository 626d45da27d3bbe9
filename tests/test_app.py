"""The blind study: nothing tells which picture is which, no vote is lost; and the page in a real browser."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import tiny
from ddit import PatchSchedule
from ddit.app import draw as drawing
from ddit.app.draw import Studio, draw_pairs, words_of
from ddit.app.study import ANSWERS, CHOICES, DATABASE, PICTURES, Study, as_csv, interval, markdown
from ddit.cli import main
from ddit.pipelines.generate import Method
from ddit.preset import Preset
from ddit.util.extras import has

ABOUT = {"model": "m", "call": {"steps": 3}, "suffix": ".png"}
PROMPTS = [f"prompt {i}" for i in range(12)]
CALL = {"height": 32, "width": 32, "num_inference_steps": 6, "max_sequence_length": 20}
pytestmark = pytest.mark.filterwarnings("ignore:every step after the warm-up")
PRESET = Preset(call=CALL, patches=PatchSchedule(threshold=1e6, careful=False))
KNOBS = {
    "patches": "rule",
    "threshold": None,
    "speed": None,
    "schedule": "",
    "skip": "off",
    "amount": None,
    "adapter": "",
}


def drawn(folder: Path) -> Study:
    """A study whose pictures are there, if not worth looking at."""
    study = Study.prepare(folder, ABOUT, PROMPTS, 0)
    for pair in study.pairs():
        study.note_work(pair.pair, 0.5)
        for path in (pair.plain, pair.dynamic):
            path.write_bytes(b"picture")
    return study


@pytest.fixture
def study(tmp_path) -> Study:
    return drawn(tmp_path / "study")


def prefer(study: Study, voter: str, pair: str, choice: str) -> str:
    """The answer with which a voter says so."""
    if choice not in ("plain", "dynamic"):
        return choice
    return "left" if study.on_left(voter, pair) == choice else "right"


def test_nothing_tells_which_picture_is_which(study):
    """Names are as random as they look, and each voter has an order and sides of their own, the same every time."""
    names = [path.stem for pair in study.pairs() for path in (pair.plain, pair.dynamic)]
    assert len(set(names)) == 24 and all(len(name) == 16 and int(name, 16) >= 0 for name in names)
    assert 0 < sum(pair.plain.stem < pair.dynamic.stem for pair in study.pairs()) < 12
    orders = {voter: [pair.pair for pair in study.order(voter)] for voter in ("a", "b")}
    assert orders["a"] != orders["b"] and sorted(orders["a"]) == sorted(orders["b"])
    sides = {voter: [study.on_left(voter, pair.pair) for pair in study.pairs()] for voter in ("a", "b")}
    assert sides["a"] != sides["b"] and set(sides["a"]) == {"plain", "dynamic"}
    again = Study.open(study.folder)
    assert [pair.pair for pair in again.order("a")] == orders["a"] and again.pairs() == study.pairs()
    assert study.secret not in repr([study.digest("browser"), *study.pairs()])


def test_of_a_pair_a_voter_has_one_vote_and_the_last_counts(study):
    pair = study.pairs()[0].pair
    for answer in ANSWERS:
        study.vote("a", pair, answer)
    study.vote("b", pair, "left")
    assert [(v["voter"], v["answer"]) for v in study.votes()] == [("a", "bad"), ("b", "left")]
    assert study.votes()[1]["choice"] == study.on_left("b", pair)


def test_a_voter_sees_each_pair_once_and_may_go_back(study):
    seen = []
    order = study.order("a")
    while (pair := study.turn("a", order)) is not None:
        seen.append(pair)
        study.vote("a", pair.pair, "equal")
    assert seen == order
    assert study.turn("a", order, before="") == order[-1]  # after the end
    assert study.turn("a", order, before=order[3].pair) == order[2]
    assert study.turn("a", order, before=order[0].pair) == order[0]
    order[4].plain.unlink()
    assert order[4] not in study.order("a")


def test_results_are_shares_of_choices(study):
    """Whatever side it lay on: two voters, one of them undecided."""
    for i, pair in enumerate(study.pairs()):
        choice = ("dynamic", "dynamic", "plain", "bad")[i % 4]
        study.vote("a", pair.pair, prefer(study, "a", pair.pair, choice))
        study.vote("b", pair.pair, "equal")
    results = study.results()
    assert (results["pairs"], results["voters"], results["votes"], results["work"]) == (12, 2, 24, 0.5)
    assert {k: row["votes"] for k, row in results["answers"].items()} == dict(equal=12, dynamic=6, plain=3, bad=3)
    assert results["answers"]["dynamic"]["share"] == 0.25 and results["answers"]["equal"]["paper"] == 0.61
    assert all(row["interval"][0] <= row["share"] <= row["interval"][1] for row in results["answers"].values())
    assert "| equally good | 12 | 50% |" in markdown(results) and "not asked" in markdown(results)
    assert list(results["answers"]) == list(CHOICES) and json.loads(json.dumps(results)) is not None


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(10, 20, 0.2993, 0.7007), (0, 5, 0.0, 0.4345), (5, 5, 0.5655, 1.0)],  # from tables of Wilson's interval
)
def test_with_a_vote_per_pair_the_interval_is_wilsons(hits, count, low, high):
    found = interval([1] * hits + [0] * (count - hits), [1] * count)
    assert found == pytest.approx((low, high), abs=1e-4)


def test_voters_who_agree_are_no_more_evidence_than_one():
    one = interval([1] * 4 + [0] * 6, [1] * 10)
    assert interval([3] * 4 + [0] * 6, [3] * 10) == pytest.approx(one)
    low, high = interval([2] * 5 + [1] * 5, [3] * 10)  # they hardly agree
    assert high - low < one[1] - one[0]
    assert interval([2], [4]) == pytest.approx(interval([1, 0], [1, 1]), abs=0.3)  # a single pair tells little


def test_several_voters_at_once_lose_no_vote(study):
    def visit(voter: str) -> None:
        for pair in study.order(voter):
            Study.open(study.folder).vote(voter, pair.pair, "left")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, [f"voter {i}" for i in range(8)]))
    assert len(study.votes()) == 8 * 12


def test_a_vote_outlives_a_kill(study):
    pair = study.pairs()[0].pair
    code = (
        "import os, signal; from pathlib import Path; from ddit.app.study import Study;"
        f"Study.open(Path({str(study.folder)!r})).vote('a', {pair!r}, 'bad'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert [vote["answer"] for vote in Study.open(study.folder).votes()] == ["bad"]
    with closing(sqlite3.connect(study.folder / DATABASE)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_votes_that_mean_nothing_are_refused(study):
    pair = study.pairs()[0].pair
    for voter, name, answer, word in [
        ("a", "nowhere", "left", "no pair 'nowhere'"),
        ("a", pair, "plain", "must be one of left"),
        ("", pair, "left", "no voter"),
    ]:
        with pytest.raises(ValueError, match=word):
            study.vote(voter, name, answer)
    assert study.votes() == []
    with pytest.raises(ValueError, match="no vote yet"):
        study.results()


def test_a_study_grows_but_its_settings_stay(study):
    study.vote("a", study.pairs()[0].pair, "left")
    more = Study.prepare(study.folder, ABOUT, [*PROMPTS, "another"], 0)
    assert more.pairs()[:12] == study.pairs()[:12] and len(more.pairs()) == 13 and len(more.order("a")) == 12
    assert len(Study.prepare(study.folder, ABOUT, PROMPTS, 1).pairs()) == 25
    with pytest.raises(ValueError, match=r"other settings \(call differ\)"):
        Study.prepare(study.folder, {**ABOUT, "call": {"steps": 4}}, ["not added"], 0)
    assert len(study.pairs()) == 25 and len(study.votes()) == 1


def foreign(path: Path, kind: str) -> None:
    if kind == "text":
        path.write_text("not a database" * 100)
    elif kind == "other":
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("CREATE TABLE pairs (a)")
    elif kind == "broken":
        path.write_bytes(path.read_bytes()[:100] + b"x" * 3000)
    elif kind == "folder":
        path.mkdir()


@pytest.mark.parametrize("kind", ["none", "text", "other", "broken", "folder"])
def test_foreign_folders_are_refused_and_left_alone(kind, tmp_path, capsys):
    folder = tmp_path / "study"
    if kind == "broken":
        drawn(folder)
    folder.mkdir(exist_ok=True)
    foreign(folder / DATABASE, kind)
    before = (folder / DATABASE).read_bytes() if (folder / DATABASE).is_file() else None
    (tmp_path / "p.txt").write_text("a red circle\n")
    commands = [["study", "results", str(folder)], ["app", "--study", str(folder), "--port", str(free_port())]]
    if kind != "none":
        commands.append(["study", "prepare", "--prompts", str(tmp_path / "p.txt"), "--out", str(folder)])
    for command in commands:
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "study" in said and "Traceback" not in said and len(said.splitlines()) == 1
    assert before is None or (folder / DATABASE).read_bytes() == before
    assert kind == "broken" or not (folder / PICTURES).exists()


# Drawing


def test_knobs_say_what_the_command_line_says():
    assert words_of(**KNOBS) == {}
    assert words_of(**KNOBS | {"threshold": 0.01, "schedule": "1 2"}) == {"threshold": 0.01}
    assert words_of(**KNOBS | {"patches": "schedule", "schedule": "1, 4 2"}) == {"schedule": [1, 4, 2]}
    assert words_of(**KNOBS | {"patches": "off", "skip": "speedup", "amount": 3}) == {"patches": "full", "speedup": 3}
    assert words_of(**KNOBS | {"patches": "off", "adapter": "a/b"}) == {"patches": "full"}
    assert words_of(**KNOBS | {"patches": "paper", "adapter": " a/b "}) == {"patches": "paper", "adapter": "a/b"}
    assert words_of(**KNOBS | {"patches": "speed", "speed": 2.2}) == {"patch_speedup": 2.2}
    with pytest.raises(ValueError, match="the speed is empty"):
        words_of(**KNOBS | {"patches": "speed"})
    with pytest.raises(ValueError, match="one scale per step"):
        words_of(**KNOBS | {"patches": "schedule", "schedule": "1 two"})
    with pytest.raises(ValueError, match="amount is empty"):
        words_of(**KNOBS | {"skip": "quality"})


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """Names of the runs that a studio draws."""
    found: list[str] = []
    inner = drawing.run

    def run(*args, **kwargs):
        found.append("plain" if kwargs["method"] is None else "dynamic")
        return inner(*args, **kwargs)

    monkeypatch.setattr(drawing, "run", run)
    return found


def test_the_plain_run_is_drawn_once(pipe, runs, tmp_path, monkeypatch):
    """For a prompt, seed and steps; and each step is told."""
    studio, told = Studio(pipe, PRESET, "m", CALL), []
    first = studio.draw("a", 0, 6, {}, lambda name, *rest: told.append((name, *rest)))
    assert told[:4] == [("dynamic", i, 6, [s]) for i, s in ((1, 1), (2, 1), (3, 1), (4, 4))] and len(told) == 12
    second = studio.draw("a", 0, 6, {"patches": "full"})
    assert runs == ["dynamic", "plain", "dynamic"] and second.plain is first.plain
    assert (second.plain.pictures == second.dynamic.pictures).all()
    assert second.figures["work saved"] == "0%" and second.figures["steps"] == "1 1 1 1 1 1"
    assert first.figures["steps"] == "1 1 1 4 4 4" and first.figures["work saved"] != "0%"
    first.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
    for prompt, seed, steps in (("b", 0, 6), ("a", 1, 6), ("a", 0, 5)):
        studio.draw(prompt, seed, steps, {})
    assert runs.count("plain") == 4
    monkeypatch.setattr(drawing, "KEPT", 4)
    studio.draw("c", 0, 6, {})
    assert list(studio.kept) == [("b", 0, 6), ("a", 1, 6), ("a", 0, 5), ("c", 0, 6)]


@pytest.mark.parametrize(
    ("prompt", "steps", "words", "told"),
    [
        (" ", 6, {}, "prompt is empty"),
        ("a", 0, {}, "steps is 0"),
        ("a", 6, {"schedule": [3]}, "powers of two"),
        ("a", 6, {"speedup": 0.5}, "at least 1"),
        ("a", 6, {"quality": 30}, "calibrate"),
        ("a", 6, {"adapter": "nowhere"}, "no folder 'nowhere'"),
    ],
)
def test_what_can_not_be_honoured_is_refused_before_anything_is_drawn(pipe, runs, prompt, steps, words, told):
    studio = Studio(pipe, PRESET, "m", CALL)
    with pytest.raises(ValueError, match=told):
        studio.draw(prompt, 0, steps, words)
    assert "plain" not in runs
    assert studio.draw("a", 0, 6, {}).figures["steps"] == "1 1 1 4 4 4"  # it goes on all the same


def test_pairs_are_drawn_once(pipe, tmp_path):
    study = Study.prepare(tmp_path, ABOUT, ["a", "b"], 3)
    assert draw_pairs(study, pipe, CALL, Method(preset=PRESET)) == 4
    files = {path: path.read_bytes() for pair in study.pairs() for path in (pair.plain, pair.dynamic)}
    assert len(set(files.values())) == 4 and len(study.order("a")) == 2
    assert draw_pairs(study, pipe, CALL, Method(preset=PRESET)) == 0
    study.pairs()[0].dynamic.unlink()
    assert draw_pairs(study, pipe, CALL, Method(preset=PRESET)) == 1
    assert files == {path: path.read_bytes() for path in files}
    study.vote("a", study.pairs()[0].pair, "equal")
    assert 0 < study.results()["work"] < 1


# Commands


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A shrunken FLUX saved as any pipeline is, with a preset."""
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline().save_pretrained(folder)
    PRESET.save(folder)
    return str(folder)


def prepared(folder: Path, model: str) -> Study:
    (folder / "p.txt").write_text("a red circle\na blue star\na green circle\n")
    flags = ["--prompts", str(folder / "p.txt"), "--out", str(folder / "study"), "--model", model]
    assert main(["study", "prepare", *flags]) == 0
    return Study.open(folder / "study")


def test_from_prompts_to_a_table(model, tmp_path, capsys):
    study = prepared(tmp_path, model)
    assert "drew 6 of 6" in capsys.readouterr().out
    prepared(tmp_path, model)
    assert "drew 0 of 6" in capsys.readouterr().out
    flags = ["--prompts", str(tmp_path / "p.txt"), "--out", str(study.folder), "--model", model]
    assert main(["study", "prepare", *flags, "--patches", "full"]) == 2
    assert "method, patches differ" in capsys.readouterr().err
    assert main(["study", "results", str(study.folder)]) == 2
    assert "no vote yet" in capsys.readouterr().err and not (study.folder / "results.json").exists()
    for pair in study.pairs():
        study.vote("a", pair.pair, prefer(study, "a", pair.pair, "dynamic"))
    assert main(["study", "results", str(study.folder)]) == 0
    assert "| prefer dynamic | 3 | 100% | 44% to 100% | 17% |" in capsys.readouterr().out
    values = json.loads((study.folder / "results.json").read_text())
    assert values["answers"]["dynamic"]["votes"] == 3 and values["about"]["model"] == model and len(values["rows"]) == 3
    rows = list(csv.DictReader((study.folder / "results.csv").open()))
    assert {row["choice"] for row in rows} == {"dynamic"} and as_csv(study.votes()).count("\n") == 4


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.skipif(not has("gradio"), reason="needs pip install 'ddit[app]'")
def test_a_port_in_use_is_refused(capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert main(["app", "--port", str(server.getsockname()[1])]) == 2
    assert "name another with --host and --port" in capsys.readouterr().err


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("quic", "background-networking", "component-update", "sync", "gpu")
FLAGS = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]


@contextmanager
def served(port: int, *flags: str):
    """``ddit app`` in a process of its own, killed in the end."""
    command = [sys.executable, "-m", "ddit.cli", "app", "--port", str(port), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert "in a browser" in server.stdout.readline()
            yield
        finally:
            server.kill()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: install Debian's chromium, or Chrome")
@pytest.mark.skipif(not has("gradio"), reason="needs pip install 'ddit[app]'")
def test_a_run_a_vote_and_a_restart_in_a_browser(model, tmp_path):
    sync_playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright").sync_playwright
    study, port = prepared(tmp_path, model), free_port()
    flags = ["--model", model, "--study", str(study.folder)]
    with sync_playwright() as play:
        browser = play.chromium.launch_persistent_context(tmp_path / "profile", executable_path=CHROMIUM, args=FLAGS)
        page, asked = browser.pages[0], []
        page.on("request", lambda request: asked.append((request.url, request.post_data or "")))
        with served(port, *flags):
            page.goto(f"http://127.0.0.1:{port}")
            page.click("#draw")
            page.get_by_text("the prompt is empty").first.wait_for()
            page.fill("#prompt textarea", "a <b>red</b> circle")
            page.click("#draw")
            page.get_by_text("work saved").first.wait_for()
            page.wait_for_function("[...document.images].filter(i => i.naturalWidth == 32).length >= 2")
            before = len(asked)
            page.get_by_role("tab", name="Blind study").click()
            page.get_by_text("Pair 1 of 3").wait_for()
            page.click("#vote-left")
            page.get_by_text("Pair 2 of 3").wait_for()
            secret = page.request.get(f"http://127.0.0.1:{port}/gradio_api/file={study.folder / DATABASE}")
            assert secret.status == 403
        (vote,) = study.votes()
        assert vote["answer"] == "left"
        with served(port, *flags):
            page.reload()
            page.get_by_role("tab", name="Blind study").click()
            page.get_by_text("Pair 2 of 3").wait_for()
            page.click("#back")
            page.get_by_text("Pair 1 of 3").wait_for()
            for answer, then in (("equal", "Pair 2 of 3"), ("bad", "Pair 3 of 3"), ("right", "Thank you")):
                page.click(f"#vote-{answer}")
                page.get_by_text(then).wait_for()
            assert "3 votes" in page.content()
        browser.close()
    assert sorted(vote["answer"] for vote in study.votes()) == ["bad", "equal", "right"]
    told = [url + data for url, data in asked[before:]]
    assert not any("plain" in text or "dynamic" in text for text in told)
    assert all(url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:")) for url, _ in asked)
