"""The stages, and how they share the time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import methods
from benchmarks.gpu import train as training
from benchmarks.gpu.measure import first_steps, host_waits, matmul_peak, single_steps, whole_run
from benchmarks.gpu.models import Loaded
from benchmarks.gpu.record import Budget, OutOfTime, Record, digest
from benchmarks.gpu.shapes import SHAPES, Shape, tiny
from ddit.cli.common import environment

FORMS = ("eager", "compiled")
MARGIN = 1.3
"""A run is begun if so many times its expected time is left."""


@dataclass
class Session:
    """What the stages share."""

    out: Path
    device: str
    work: Path
    """Folder for what does not come back."""
    tiny: bool = False
    checkpoint: Path | None = None
    """What training goes on from."""
    settings: Sequence[str] = ()
    """Of the training, ``NAME=NUMBER``."""
    shapes: dict[str, Shape] = field(default_factory=dict)
    loaded: dict[str, Loaded] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shapes = tiny(self.work) if self.tiny else SHAPES

    def model(self, name: str) -> Loaded:
        """A model on the device; the one before makes room."""
        if name not in self.loaded:
            self.loaded.clear()
            gc.collect()
            torch._dynamo.reset()
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()
            self.loaded[name] = Loaded(self.shapes[name], self.device)
        return self.loaded[name]


def run(names: Sequence[str], session: Session, seconds: float) -> list[str]:
    """Run stages in this order; returns the names of those that are not done."""
    whole, unfinished = Budget(seconds), []
    records = {name: Record(session.out / f"{name}.json", whole, _about(session, name)) for name in names}
    waiting = [name for name in names if not records[name].done]
    for name, record in records.items():
        if record.done:
            print(f"{name}: there already", flush=True)
            continue
        stage, weight = STAGES[name]
        record.budget = whole.part(weight / sum(STAGES[other][1] for other in waiting[waiting.index(name) :]))
        print(f"{name}: {record.budget.left:.0f} s", flush=True)
        _run_one(stage, session, record)
        print(f"{name}: {'done' if record.done else 'not done'}, {whole.left:.0f} s left", flush=True)
        unfinished += [] if record.done else [name]
    return unfinished


def _run_one(stage: Callable[[Session, Record], None], session: Session, record: Record) -> None:
    started = time.monotonic()
    record.write()
    try:
        with record.budget.enforced():
            stage(session, record)
        record.done = not record.errors and not record.left_out
    except (Exception, OutOfTime) as error:
        record.fail("stage", error)
        session.loaded.clear()
    record.about["seconds"] = round(time.monotonic() - started, 1)
    record.write()


def _about(session: Session, name: str) -> dict[str, Any]:
    about: dict[str, Any] = {"stage": name, "tiny": session.tiny, "environment": environment(session.device)}
    about["code"] = digest()
    if session.device.startswith("cuda"):
        about["card"] = torch.cuda.get_device_name(session.device)
        about["card_memory"] = torch.cuda.get_device_properties(session.device).total_memory
        about["cuda"] = torch.version.cuda
    return about


FLUX = (
    *("eager/steps", "eager/long/plain", "eager/long/patches"),
    *("compiled/steps", "compiled/long/plain", "compiled/long/patches", "compiled/long/patches, skip 4"),
    *("eager/long/patches, skip 4", "eager/long/patches, TeaCache", "eager/long/TeaCache"),
    *("eager/long/patches, adapter", "compiled/adapter", "compiled/long/patches, adapter"),
    *("eager/first steps", "eager/host waits", "eager/long/skip 2", "eager/long/skip 3", "eager/long/skip 5"),
    *("eager/long/rule, every step full", "eager/long/plain, again"),
    *("compiled/first steps", "compiled/host waits", "compiled/long/skip 2", "compiled/long/skip 3"),
    *("compiled/long/skip 5", "compiled/long/rule, every step full"),
    *("compiled/short/plain", "compiled/short/patches", "compiled/short/patches, skip 4"),
    *("eager/short/plain", "eager/short/patches", "eager/short/patches, skip 4", "eager/short/patches, TeaCache"),
    *("compiled/long/patches, TeaCache", "compiled/long/TeaCache"),
)
"""What is measured of FLUX.1-dev, what tells most first: ``FORM/WHAT`` of single steps, or ``FORM/LENGTH/METHOD``.

An adapter changes compiled blocks, which are compiled anew for it and after it, and a cache each block by itself.
"""
WAN = (
    *("compiled/steps", "compiled/long/patches", "compiled/long/plain", "eager/steps", "eager/long/patches"),
    *("compiled/long/patches, skip 4", "compiled/long/skip 3", "eager/first steps", "eager/host waits"),
    *("compiled/adapter", "compiled/long/patches, adapter"),
    *("eager/long/patches, TeaCache", "eager/long/TeaCache", "eager/long/patches, adapter", "eager/long/plain"),
    *("compiled/long/skip 2", "compiled/long/skip 5", "compiled/long/rule, every step full"),
    *("compiled/long/patches, TeaCache", "compiled/long/TeaCache"),
)
"""The same of Wan 2.1 1.3B, whose plain run takes a minute."""
CACHES = ("TaylorSeer 4", "cache-dit 0.1", "FirstBlockCache 0.1", "TaylorSeer 6")
PEERS = (
    *("eager/steps", "eager/long/plain", "eager/long/patches", "eager/long/skip 3"),
    *(f"eager/long/{name}" for name in (*CACHES, "TeaCache", "patches, TeaCache")),
    *("compiled/steps", "compiled/long/plain", "compiled/long/patches", "compiled/long/skip 3"),
    *(f"compiled/long/{name}" for name in (*CACHES, "TeaCache", "patches, TeaCache")),
)
"""Caches of other libraries beside ddit's means, on FLUX.1-dev."""
AGAIN = 30.0
"""Seconds that compiling may take after the first time, whose kernels are kept."""


def measure(model: str, names: Sequence[str], session: Session, record: Record) -> None:
    """Measure these of a model; where the time does not suffice, single whole runs are the sum of their steps."""
    loaded = session.model(model)
    record.put("weights_bytes", sum(p.numel() * p.element_size() for p in loaded.transformer.parameters()))
    record.once("matmul", lambda: matmul_peak(loaded.shape, loaded.device))
    for name in names:
        form, what = name.split("/", 1)
        length, _, method = what.partition("/")
        loaded.take(form)
        if method:
            _run(loaded, record, length, method)
        else:
            _single(loaded, record, what)


def _single(loaded: Loaded, record: Record, what: str) -> None:
    """Single steps, those with an adapter, the first of a run, or the waits of the host."""
    form, shape, known = loaded.form, loaded.shape, _known(loaded, record)
    compiled = form == "compiled"
    if what in ("steps", "adapter"):
        if what == "adapter" and not shape.recompiling:
            return
        learnt = what == "adapter" or not compiled
        need = _compiling(loaded, record) if compiled else 0.0
        record.once(f"{form}/{what}", lambda: single_steps(loaded, 0.1 * record.budget.left, adapter=learnt), need)
    elif known is None:
        return
    elif what == "first steps":
        record.once(f"{form}/{what}", lambda: first_steps(loaded), MARGIN * 20 * _by_scale(known["seconds"])[1])
    elif loaded.device.type == "cuda":
        put = methods.own(loaded, shape.lengths[0], _by_scale(known["flops"]))["patches"].put
        record.once(f"{form}/{what}", lambda: host_waits(loaded, put), 30 * _step(known, shape))


def _run(loaded: Loaded, record: Record, length: str, method: str) -> None:
    """A whole run, ``long`` or ``short``, as ``FORM/STEPS/METHOD``."""
    shape, known, compiled = loaded.shape, _known(loaded, record), loaded.form == "compiled"
    place = ("long", "short").index(length)
    if known is None or place >= len(shape.lengths):
        return
    total, flops = shape.lengths[place], _by_scale(known["flops"])
    every = {**methods.own(loaded, total, flops), **methods.others(loaded)}
    how = every.get(method.removesuffix(", again"))  # a plain run at the end tells whether the card has kept its speed
    name = f"{loaded.form}/{total}/{method}"
    if how is None:
        record.left_out[name] = "its package is not installed"
        return
    if compiled and how.changes_blocks and not shape.recompiling:
        return
    need = MARGIN * _step(known, shape) * (how.share * total + 8)
    if compiled and (how.changes_blocks or f"{loaded.form}/steps" not in record.values):
        need += _compiling(loaded, record)
    record.once(name, lambda: whole_run(loaded, how.put, total), need)
    if name in record.left_out and method in ("plain", "patches"):
        scales = [1] * total if method == "plain" else methods.schedule(total, flops)
        costs = _by_scale(known["seconds"])
        seconds = shape.guidance * sum(costs[scale] for scale in scales)
        record.put(f"{name}, extrapolated", {"seconds": [seconds], "extrapolated": True})


def _known(loaded: Loaded, record: Record) -> dict[str, Any] | None:
    """Single steps in this form, or else in the other one."""
    other = next(form for form in FORMS if form != loaded.form)
    return record.values.get(f"{loaded.form}/steps") or record.values.get(f"{other}/steps")


def _compiling(loaded: Loaded, record: Record) -> float:
    """Seconds that compiling may take now."""
    before = [name for name in record.values if name.startswith("compiled/") and "extrapolated" not in name]
    return min(AGAIN, loaded.shape.compiling) if before else loaded.shape.compiling


def _by_scale(values: dict[Any, float]) -> dict[int, float]:
    return {int(scale): value for scale, value in values.items()}


def _step(steps: dict[str, Any], shape: Shape) -> float:
    """Seconds of a full step with all its calls."""
    return shape.guidance * _by_scale(steps["seconds"])[1]


def train(stage: str, session: Session, record: Record) -> None:
    """Models of the yardstick, their judge, their adapters; see `benchmarks.gpu.train`."""
    work = session.work / "yardstick"
    place = training.Place(work, session.out, session.device, session.tiny, session.settings)
    training.train(stage, record, place, session.checkpoint)


STAGES: dict[str, tuple[Callable[[Session, Record], None], float]] = {
    "flux": (partial(measure, "flux", FLUX), 4.0),
    "train-image": (partial(train, "train-image"), 5.0),
    "wan": (partial(measure, "wan", WAN), 3.0),
    "train-video": (partial(train, "train-video"), 4.0),
    "train-judge": (partial(train, "train-judge"), 1.0),
    "train-adapter": (partial(train, "train-adapter"), 2.0),
    "peers": (partial(measure, "flux", PEERS), 2.0),
    "train-together": (partial(train, "train-together"), 12.0),
}
"""Name -> the stage, and its weight among those that share the time that is left; ``all`` takes this order, without the
last, which trains the same side by side."""
