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
from benchmarks.gpu.record import Budget, OutOfTime, Record, read
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
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()
            self.loaded[name] = Loaded(self.shapes[name], self.device)
        return self.loaded[name]


def run(names: Sequence[str], session: Session, seconds: float) -> list[str]:
    """Run stages in this order; returns the names of those that are not done."""
    whole, unfinished = Budget(seconds), []
    for index, name in enumerate(names):
        path = session.out / f"{name}.json"
        if read(path).get("done"):
            print(f"{name}: there already", flush=True)
            continue
        stage, weight = STAGES[name]
        weights = [STAGES[n][1] for n in names[index:] if not read(session.out / f"{n}.json").get("done")]
        record = Record(path, whole.part(weight / sum(weights)), _about(session, name))
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
    if session.device.startswith("cuda"):
        about["card"] = torch.cuda.get_device_name(session.device)
        about["card_memory"] = torch.cuda.get_device_properties(session.device).total_memory
        about["cuda"] = torch.version.cuda
    return about


def flux(session: Session, record: Record) -> None:
    """Single steps and whole runs of FLUX.1-dev."""
    _model_stage("flux", session, record)


def wan(session: Session, record: Record) -> None:
    """The same of Wan 2.1 1.3B, with two calls in a step."""
    _model_stage("wan", session, record)


def _model_stage(name: str, session: Session, record: Record) -> None:
    loaded = session.model(name)
    shape = loaded.shape
    record.put("weights_bytes", sum(p.numel() * p.element_size() for p in loaded.transformer.parameters()))
    record.once("matmul", lambda: matmul_peak(shape, loaded.device))
    for form in FORMS:  # what tells most of both forms comes before the rest of either
        steps = _steps(loaded, record, form, adapter=form == "eager")
        if steps is not None:
            chosen = methods.own(loaded, shape.lengths[0], _by_scale(steps["flops"]))
            first = {name: chosen[name] for name in methods.FIRST}
            _runs(loaded, record, shape.lengths[0], first, steps, late=False)
    for form in FORMS:
        steps = _steps(loaded, record, form, adapter=form == "eager")
        if steps is None:
            continue
        record.once(f"{form}/first steps", lambda: first_steps(loaded))
        for total in shape.lengths:
            chosen = methods.own(loaded, total, _by_scale(steps["flops"]))
            put = chosen["patches"].put
            if total == shape.lengths[0] and loaded.device.type == "cuda":
                record.once(f"{form}/host waits", lambda put=put: host_waits(loaded, put), 30 * _step(steps, shape))
            _runs(loaded, record, total, chosen, steps, late=False)
    if steps is not None and shape.recompiling:
        record.once(
            "compiled/adapter", lambda: single_steps(loaded, 0.1 * record.budget.left, adapter=True), shape.compiling
        )
        total = shape.lengths[0]
        _runs(loaded, record, total, methods.own(loaded, total, _by_scale(steps["flops"])), steps, late=True)


def _steps(loaded: Loaded, record: Record, form: str, *, adapter: bool, share: float = 0.1) -> dict[str, Any] | None:
    """The model in this form, and its single steps for this share of the time, unless there is none.

    An adapter changes the blocks, which are compiled anew for it: so there it comes last.
    """
    loaded.take(form)
    return record.once(
        f"{form}/steps",
        lambda: single_steps(loaded, share * record.budget.left, adapter=adapter),
        loaded.shape.compiling if form == "compiled" else 0.0,
    )


def _runs(
    loaded: Loaded, record: Record, total: int, chosen: methods.Methods, steps: dict[str, Any], *, late: bool
) -> None:
    """Whole runs by each method, each as ``FORM/STEPS/METHOD``; where the time does not suffice, the sum of its steps.

    Args:
        steps: What single steps take.
        late: Those methods for which compiled blocks are compiled anew, or those for which they are not; eager, all
            count as early.
    """
    one = _step(steps, loaded.shape)
    for method, how in chosen.items():
        again = how.changes_blocks and loaded.form == "compiled"
        if again != late:
            continue
        name = f"{loaded.form}/{total}/{method}"
        need = MARGIN * one * (how.share * total + 8) + again * loaded.shape.compiling
        record.once(name, lambda how=how: whole_run(loaded, how.put, total), need)
        if name in record.left_out and method in ("plain", "patches"):
            scales = [1] * total if method == "plain" else methods.schedule(total, _by_scale(steps["flops"]))
            costs = _by_scale(steps["seconds"])
            seconds = loaded.shape.guidance * sum(costs[scale] for scale in scales)
            record.put(f"{name}, extrapolated", {"seconds": [seconds], "extrapolated": True})


def _by_scale(values: dict[Any, float]) -> dict[int, float]:
    return {int(scale): value for scale, value in values.items()}


def _step(steps: dict[str, Any], shape: Shape) -> float:
    """Seconds of a full step with all its calls."""
    return shape.guidance * _by_scale(steps["seconds"])[1]


def peers(session: Session, record: Record) -> None:
    """Caches of other libraries beside ddit's means on FLUX.1-dev, in one process."""
    loaded = session.model("flux")
    total = loaded.shape.lengths[0]
    for form in FORMS:
        plain = _steps(loaded, record, form, adapter=False, share=0.02)
        if plain is None:
            continue
        mine = methods.own(loaded, total, _by_scale(plain["flops"]))
        chosen = {"plain": mine["plain"], **methods.others(loaded), **mine}
        chosen = {k: v for k, v in chosen.items() if k not in (methods.ADAPTER, "rule, every step full")}
        _runs(loaded, record, total, chosen, plain, late=False)
    if plain is not None and loaded.shape.recompiling:
        _runs(loaded, record, total, chosen, plain, late=True)


def train(stage: str, session: Session, record: Record) -> None:
    """Models of the yardstick, their judge, their adapters; see `benchmarks.gpu.train`."""
    work = session.work / "yardstick"
    place = training.Place(work, session.out, session.device, session.tiny, session.settings)
    training.train(stage, record, place, session.checkpoint)


STAGES: dict[str, tuple[Callable[[Session, Record], None], float]] = {
    "flux": (flux, 4.0),
    "train-image": (partial(train, "train-image"), 5.0),
    "wan": (wan, 3.0),
    "train-video": (partial(train, "train-video"), 4.0),
    "train-judge": (partial(train, "train-judge"), 1.0),
    "train-adapter": (partial(train, "train-adapter"), 2.0),
    "peers": (peers, 1.5),
    "train-together": (partial(train, "train-together"), 12.0),
}
"""Name -> the stage, and its weight among those that share the time that is left; ``all`` takes this order, without the
last, which trains the same side by side."""
