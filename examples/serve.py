"""A server with one pipeline: pictures or clips over HTTP, each request with a schedule of its own.

    pip install 'ddit[serve]'
    python examples/serve.py
    curl localhost:8000/jobs --json '{"prompt": "a large red circle", "threshold": 0.01}'
    curl localhost:8000/jobs/1/image -o circle.png

``GET /jobs/1`` tells how far a job is. ``GET /jobs/1/image`` waits for its picture; who hangs up meanwhile cancels it,
as ``DELETE /jobs/1`` does. All wait in one queue for one worker, since a transformer has one schedule at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, Field
except ModuleNotFoundError as missing:
    raise SystemExit(f"this server needs the package {missing.name}: pip install 'ddit[serve]'") from None

from ddit.api import check_adapter
from ddit.cli.common import check_address, positive
from ddit.pipelines import generate, loading, outputs, sounds
from ddit.pipelines.methods import WORDS, make_method

HOST = "127.0.0.1"
MOST = 200
"""Jobs that are remembered: the oldest finished one makes room for the next."""


class Wanted(BaseModel, extra="forbid"):
    """What a client asks for; what is left out is the model's own."""

    prompt: str
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int | None = Field(None, ge=1, le=200)
    height: int | None = Field(None, ge=1, le=2048)
    width: int | None = Field(None, ge=1, le=2048)
    patches: str | None = None  # rule, paper, or full for a plain run
    threshold: float | None = None
    schedule: list[int] | None = None
    patch_speedup: float | None = None
    speedup: float | None = None


@dataclass
class Job:
    """A request, and what has become of it."""

    number: int
    future: Future[bytes] = field(default_factory=Future)
    step: int = 0
    schedule: str = ""
    cancelled: bool = False

    def told(self) -> dict[str, Any]:
        state = "drawing" if self.future.running() else "waiting"
        if self.future.done():
            state = "done" if self.future.exception() is None else "failed"
        return {"job": self.number, "state": state, "step": self.step, "schedule": self.schedule}


class Worker:
    """Draws one job after the other, in a thread of its own."""

    def __init__(self, pipe: Any, preset: Any, model: str = "", adapter: str | None = None, **load: str) -> None:
        """The adapter is the preset's where none is named; ``load`` are the dtype and device that it gets."""
        self.pipe, self.preset, self.model, self.adapter = pipe, preset, model, adapter
        self.load_adapter = cache(partial(loading.load_adapter, **load))
        ours = self.method({}).adapter
        if ours is not None:
            ours.check(pipe.transformer)
        self.suffix, self.media = (".mp4", "video/mp4") if generate.draws_video(pipe) else (".png", "image/png")
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.numbers = itertools.count(1)
        self.jobs: dict[int, Job] = {}

    def method(self, words: dict[str, Any]) -> generate.Method:
        """What makes a request faster."""
        return make_method(words, self.preset, load_adapter=self.load_adapter, adapter=self.adapter)

    def submit(self, wanted: Wanted) -> Job:
        """Check a request and queue it."""
        try:
            loading.check_prompt(wanted.prompt, self.model)
            size = {"height": wanted.height, "width": wanted.width}
            settings = generate.call_settings(self.preset, num_inference_steps=wanted.steps, **size)
            generate.check_call(self.pipe, settings)
            method = self.method(wanted.model_dump(include=set(WORDS)))  # no adapter among them
            if method.adapter is not None and method.patches is not None:
                check_adapter(method.adapter, method.patches)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        if len(self.jobs) >= MOST:
            finished = [number for number, job in self.jobs.items() if job.future.done()]
            if not finished:
                raise HTTPException(503, f"{MOST} jobs are waiting; try again later")
            del self.jobs[finished[0]]
        job = Job(next(self.numbers))
        self.jobs[job.number] = job
        job.future = self.thread.submit(self.draw, job, wanted, settings, method)
        return job

    def draw(self, job: Job, wanted: Wanted, settings: dict[str, Any], method: generate.Method) -> bytes:
        """The picture as a file; runs in the worker's thread."""

        def on_step(step: int, *_: Any) -> None:
            job.step = step
            if job.cancelled:
                self.pipe._interrupt = True  # diffusers' way to leave out the rest of the steps

        run = generate.run(self.pipe, [wanted.prompt], [wanted.seed], settings, method=method, on_step=on_step)
        job.schedule = run.report.strip() if run.report else ""
        with TemporaryDirectory() as folder:
            return outputs.save(Path(folder, f"drawn{self.suffix}"), run.pictures)[0].read_bytes()

    def cancel(self, job: Job) -> None:
        """Stop a job and forget it."""
        job.cancelled = True
        job.future.cancel()  # where it has not begun
        self.jobs.pop(job.number, None)

    def answer(self, job: Job) -> Response:
        """What a finished job has drawn, or why it has not."""
        if job.cancelled:
            raise HTTPException(410, f"job {job.number} was cancelled")
        error = job.future.exception()
        if error is not None:
            raise HTTPException(422 if isinstance(error, ValueError) else 500, str(error) or repr(error))
        return Response(job.future.result(), media_type=self.media)


def build(worker: Worker) -> FastAPI:
    """The server of a worker."""
    app = FastAPI(title="ddit")

    def find(number: int) -> Job:
        if number not in worker.jobs:
            raise HTTPException(404, f"there is no job {number}: it was cancelled, or made room for later ones")
        return worker.jobs[number]

    @app.exception_handler(RequestValidationError)
    async def refuse(_: Request, error: Any) -> JSONResponse:
        first = error.errors()[0]  # one sentence instead of FastAPI's list
        said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        return JSONResponse({"detail": f"{said}; a request may have {', '.join(Wanted.model_fields)}"}, 422)

    @app.post("/jobs", status_code=202)
    async def submit(wanted: Wanted) -> dict[str, Any]:
        return worker.submit(wanted).told()

    @app.get("/jobs/{number}")
    async def state(number: int) -> dict[str, Any]:
        return find(number).told()

    @app.get("/jobs/{number}/image")
    async def image(number: int, request: Request) -> Response:
        job = find(number)
        try:
            while not job.future.done():
                if await request.is_disconnected():
                    worker.cancel(job)
                await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            raise HTTPException(503, "the server stops") from None
        return worker.answer(job)

    @app.delete("/jobs/{number}", status_code=204)
    async def cancel(number: int) -> None:
        worker.cancel(find(number))

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="folder or hub id (default: the embedded model)")
    parser.add_argument("--adapter", help="folder or hub id, or none (default: the one that the preset names, if any)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--port", type=positive, default=8000)
    args = parser.parse_args()
    load = {"dtype": args.dtype, "device": args.device}
    try:
        check_address(HOST, args.port)
        pipe, preset = loading.load_pipeline(args.model, **load)
        if sounds.sample_rate(pipe) is not None:
            raise ValueError(f"{args.model} makes sound; name a model of pictures or clips")
        if generate.draws_video(pipe):
            outputs.check_video_writer()
        worker = Worker(pipe, preset, args.model, args.adapter, **load)
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    uvicorn.run(build(worker), host=HOST, port=args.port, timeout_graceful_shutdown=1)
    for job in list(worker.jobs.values()):  # or Python would draw them all before it ends
        worker.cancel(job)


if __name__ == "__main__":
    main()
