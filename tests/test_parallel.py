"""One picture on two processes: diffusers' context parallelism under dynamic patches."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import ContextParallelConfig

import ddit
import tiny
from ddit import FixedSchedule, PatchAdapter, PatchSchedule, SkipSchedule
from ddit.config import FULL
from test_architectures import CASES, SMALL, draw

ALONE = ("krea-2", "longcat-image", "ltx", "lumina2", "ovis-image", "sd3", "z-image")
"""Those whose tokens diffusers can't spread; LTX-Video's masks of prompts are not split with its heads."""
SPREAD = tuple(name for name in SMALL if name not in ALONE)
SCHEDULES: dict[str, dict[str, Any]] = {
    "all scales": dict(patches=FixedSchedule(steps=(1, 1, 1, 2, 4, 1, 2, 1))),
    "the rule": dict(patches=PatchSchedule(threshold=0.05, careful=False)),
    "skips": dict(patches=FULL, skip=SkipSchedule(speedup=2.0)),
    "skips by the rule": dict(patches=FULL, skip=SkipSchedule(threshold=0.1)),
}


def in_two(work: Any, *args: Any, folder: Path) -> list[Any]:
    """What ``work(*args)`` returns in each of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, args=(port, work, args, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _process(rank: int, port: int, work: Any, args: tuple[Any, ...], folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers takes the remainder by it, and a CPU has none
    dist.init_process_group("gloo")
    torch.save(work(*args), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def spread(transformer: Any) -> None:
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, ulysses_anything=True))


def alone_and_together(name: str) -> list[tuple[Any, Any]]:
    """Pictures and schedules of each of `SCHEDULES`; by this process, then by both."""
    case = CASES[name]
    pipe = case.make()
    drawn = []
    for each in (lambda _: None, spread):
        each(pipe.transformer)
        for settings in SCHEDULES.values():
            with ddit.apply(pipe, **settings) as run:
                picture = draw(pipe, case)
            drawn.append((picture, run.report.strip()))
    return drawn


def alone_together_and_refused(name: str) -> tuple[list[tuple[Any, Any]], list[str]]:
    """All at once: two processes take long to start."""
    return alone_and_together(name), what_is_refused()


@pytest.mark.slow  # two processes take long to start
@pytest.mark.parametrize("name", SPREAD)
def test_one_picture_on_two_processes(name, tmp_path):
    """Both decide alike, and draw what one alone does; what does not work is refused."""
    if getattr(CASES[name].make().transformer, "_cp_plan", None) is None:
        pytest.skip("diffusers has no plan for spreading it")
    (first, refused), (second, alike) = in_two(alone_together_and_refused, name, folder=tmp_path)
    late, adapted, moved = refused
    assert "after ddit.apply" in late and "then ddit.apply again" in late
    assert "positions='grid'" in moved
    assert "accelerate launch" in adapted and refused == alike
    for (picture, schedule), (other, same) in zip(first, second, strict=True):
        assert torch.equal(torch.as_tensor(picture), torch.as_tensor(other)) and schedule == same
    count = len(first) // 2
    for (alone, decided), (together, same) in zip(first[:count], first[count:], strict=True):
        assert decided == same and len(set(decided.split())) > 1
        torch.testing.assert_close(torch.as_tensor(together), torch.as_tensor(alone), rtol=1e-4, atol=1e-4)


def what_is_refused() -> list[str]:
    pipe = tiny.pipeline()
    run = ddit.apply(pipe)
    spread(pipe.transformer)
    told = []
    with pytest.raises(ValueError) as late:
        tiny.sample(pipe)
    told.append(str(late.value))
    run.remove()
    with pytest.raises(ValueError) as adapted:
        ddit.apply(pipe, adapter=PatchAdapter.for_model(pipe.transformer, rank=2))
    told.append(str(adapted.value))
    pipe = tiny.wan_pipeline()
    spread(pipe.transformer)
    with pytest.raises(ValueError) as moved:
        ddit.apply(pipe, patches=PatchSchedule.paper())
    told.append(str(moved.value))
    return told
