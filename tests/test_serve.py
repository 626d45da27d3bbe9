"""`examples/serve.py` over a real socket: under load nothing is lost, and nobody disturbs a neighbour."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

import tiny
from ddit.config import FULL
from ddit.pipelines import generate, outputs
from ddit.preset import Preset
from helpers import random_adapter

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason="needs the extra serve")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")

from examples import serve  # noqa: E402 (needs the extra)

PRESET = Preset(call={"height": 16, "width": 16, "num_inference_steps": 4, "max_sequence_length": 20})
SCHEDULES: list[dict[str, Any]] = [
    {"patches": "full"},
    {"threshold": 1e6},
    {"patches": "paper", "threshold": 1e6},
    {"schedule": [1, 2, 4]},
    {"patches": "full", "speedup": 2, "steps": 6},
]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of runs of few steps


@contextmanager
def served(pipe):
    """A client of a server in a thread, and its worker."""
    worker = serve.Worker(pipe, PRESET)
    server = uvicorn.Server(uvicorn.Config(serve.build(worker), port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            yield client, worker
    finally:
        server.should_exit = True
        thread.join()
        worker.thread.shutdown()


def request(number: int) -> dict[str, Any]:
    return {"prompt": tiny.PROMPT, "seed": number % 3, **SCHEDULES[number % len(SCHEDULES)]}


def wait(client, job: int, *states: str) -> dict[str, Any]:
    """Its state, once that is one of those."""
    while (told := client.get(f"/jobs/{job}").json())["state"] not in states:
        time.sleep(0.01)
    return told


@pytest.fixture
def counted(pipe):
    """A pipeline, and how often its model was called."""
    calls: list[int] = []
    forward = pipe.transformer.forward

    def counting(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    pipe.transformer.forward = counting
    return pipe, calls


def test_a_hundred_requests_eight_at_a_time(pipe, tmp_path):
    """Of twenty, some are deleted and some hang up; all others get the picture that they get alone."""
    got: dict[int, bytes] = {}
    gone: dict[int, int] = {}

    async def one(client, number: int) -> None:
        answer = await client.post("/jobs", json=request(number))
        job = f"/jobs/{answer.json()['job']}"
        if number % 10 == 3:
            await client.delete(job)
        if number % 10 == 7:
            with pytest.raises(httpx.ReadTimeout):
                await client.get(f"{job}/image", timeout=0.01)
        picture = await client.get(f"{job}/image")
        if picture.status_code == 200:
            got[number] = picture.content
        else:
            gone[number] = picture.status_code

    async def load(base: str) -> None:
        eight = asyncio.Semaphore(8)
        async with httpx.AsyncClient(base_url=base, timeout=60) as client:

            async def turn(number: int) -> None:
                async with eight:
                    await one(client, number)

            await asyncio.gather(*map(turn, range(100)))

    with served(pipe) as (client, worker):
        asyncio.run(load(str(client.base_url)))
        assert all(job.future.done() for job in worker.jobs.values()) and len(worker.jobs) == len(got)
    deleted = {number for number in range(100) if number % 10 == 3}
    hung_up = {number for number in range(100) if number % 10 == 7}
    assert deleted <= set(gone) <= deleted | hung_up and set(gone.values()) <= {404, 410}
    assert len(set(gone) - deleted) >= 5, "those who hang up are cancelled"
    assert set(got) | set(gone) == set(range(100))
    alone = {number: drawn_alone(pipe, request(number), tmp_path) for number in range(15)}
    assert len(set(alone.values())) > 10
    assert all(picture == alone[number % 15] for number, picture in got.items())


def test_the_adapter_that_the_preset_names_serves(pipe, tmp_path):
    """Where the rule decides, unless another is named; one of another model is refused before anything is served."""
    random_adapter(pipe.transformer).save_pretrained(tmp_path / "own")
    random_adapter(tiny.transformer(num_layers=2)).save_pretrained(tmp_path / "other")
    preset = replace(PRESET, adapter=str(tmp_path / "own"))
    worker = serve.Worker(pipe, preset)
    ours, plain = worker.method({"threshold": 1e6}), worker.method({"patches": "full"})
    assert ours.adapter is worker.method({}).adapter is not None and plain.adapter is None
    assert serve.Worker(pipe, preset, adapter="none").method({}).adapter is None
    named = serve.Worker(pipe, PRESET, adapter=str(tmp_path / "own"))
    assert named.method({"patches": "full"}).adapter is None is not named.method({}).adapter
    with pytest.raises(ValueError, match="adapter"):
        serve.Worker(pipe, PRESET, adapter=str(tmp_path / "other"))


def drawn_alone(pipe, asked: dict[str, Any], folder) -> bytes:
    """The picture without a server."""
    words = {name: value for name, value in asked.items() if name not in ("prompt", "seed", "steps")}
    method = serve.make_method(words, PRESET, load_adapter=str)
    settings = generate.call_settings(PRESET, num_inference_steps=asked.get("steps"))
    plain = words == {"patches": "full"}
    assert not plain or method.patches == FULL
    run = generate.run(pipe, [asked["prompt"]], [asked["seed"]], settings, method=None if plain else method)
    return outputs.save(folder / "alone.png", run.pictures)[0].read_bytes()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": 5}, "body.prompt: Input should be a valid string; a request may have prompt, seed,"),
        ({"treshold": 0.1}, "body.treshold: Extra inputs are not permitted; a request may have"),
        ({"steps": 0}, "body.steps: Input should be greater than or equal to 1"),
        ({"seed": -1}, "body.seed: "),
        ({"height": 33}, "height is 33; this model takes multiples of"),
        ({"patches": "huge"}, "patches is 'huge'; it must be one of rule, paper, full"),
        ({"threshold": -1}, "threshold is -1.0; it must be"),
        ({"threshold": 0.1, "schedule": [1, 2]}, "threshold would have no effect beside a schedule"),
        ({"schedule": [3]}, "3 is not a scale"),
        ({"speedup": 0.5}, "speedup is 0.5; it must be"),
    ],
)
def test_a_bad_request_is_refused_with_a_sentence(pipe, wrong, said):
    worker = serve.Worker(pipe, PRESET)

    async def post():
        transport = httpx.ASGITransport(serve.build(worker))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post("/jobs", json={"prompt": tiny.PROMPT, **wrong})

    answer = asyncio.run(post())
    assert answer.status_code == 422 and answer.json()["detail"].startswith(said) and not worker.jobs
    assert "\n" not in answer.json()["detail"]


def test_a_cancelled_job_stops_and_the_next_one_is_as_alone(counted, tmp_path):
    pipe, calls = counted
    expected = drawn_alone(pipe, request(3), tmp_path)
    with served(pipe) as (client, _):
        calls.clear()
        long = client.post("/jobs", json={**request(3), "steps": 200}).json()["job"]
        next_one = client.post("/jobs", json=request(3)).json()["job"]
        wait(client, long, "drawing")
        while client.get(f"/jobs/{long}").json()["step"] == 0:
            time.sleep(0.01)
        assert client.get(f"/jobs/{next_one}").json()["state"] == "waiting"
        assert client.delete(f"/jobs/{long}").status_code == 204
        assert client.get(f"/jobs/{next_one}/image").content == expected
        told = wait(client, next_one, "done")
        assert len(calls) < 150
        for answer in (client.get(f"/jobs/{long}"), client.get(f"/jobs/{long}/image"), client.delete(f"/jobs/{long}")):
            assert answer.status_code == 404 and "cancelled" in answer.json()["detail"]
    assert told["schedule"] == "1 2 4 4" and told["step"] == 4


def test_what_breaks_is_told_and_the_next_one_is_drawn(pipe, monkeypatch):
    with served(pipe) as (client, _):
        for error, code in ((ValueError("scales don't fit"), 422), (RuntimeError("out of memory"), 500)):
            with monkeypatch.context() as patch:
                patch.setattr(serve.generate, "run", lambda *_, _e=error, **__: (_ for _ in ()).throw(_e))
                job = client.post("/jobs", json=request(0)).json()["job"]
                answer = client.get(f"/jobs/{job}/image")
            assert (answer.status_code, answer.json()["detail"]) == (code, str(error))
            assert client.get(f"/jobs/{job}").json()["state"] == "failed"
        job = client.post("/jobs", json=request(0)).json()["job"]
        assert client.get(f"/jobs/{job}/image").headers["content-type"] == "image/png"


def test_old_jobs_make_room_and_a_full_queue_refuses(pipe, monkeypatch):
    monkeypatch.setattr(serve, "MOST", 2)
    go = threading.Event()
    run = generate.run
    monkeypatch.setattr(serve.generate, "run", lambda *args, **kwargs: (go.wait(), run(*args, **kwargs))[1])
    with served(pipe) as (client, worker):
        for _ in range(2):
            assert client.post("/jobs", json=request(0)).status_code == 202
        full = client.post("/jobs", json=request(0))
        assert full.status_code == 503 and full.json()["detail"] == "2 jobs are waiting; try again later"
        go.set()
        wait(client, 2, "done")
        assert client.post("/jobs", json=request(0)).status_code == 202 and list(worker.jobs) == [2, 3]
