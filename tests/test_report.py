"""`Handle.report`: what ran and what it saved, and the remarks that ddit makes of a run."""

import itertools
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ddit
import tiny
from ddit import FixedSchedule, PatchSchedule, SkipSchedule
from ddit.config import FULL
from helpers import COARSE, PLAIN, STEPS, Record, fixed

# --- the report ---


def test_no_report_before_a_run(pipe):
    handle = ddit.apply(pipe)
    with pytest.raises(RuntimeError, match="no report before a run"):
        _ = handle.report


@pytest.mark.parametrize("size", [(32, 32), (20, 28)])
def test_fractions_are_what_the_model_really_did(pipe, size):
    """Tokens and FLOPs counted while the real transformer ran."""
    record = Record(pipe.transformer, count_flops=True)
    tiny.sample(pipe, size=size)
    tokens, flops = sum(record.tokens), sum(record.flops)
    record.calls, record.flops = [], []
    handle = ddit.apply(pipe, patches=fixed(1, 2, 4, 2, 1))
    tiny.sample(pipe, size=size)
    assert handle.report.tokens_fraction == pytest.approx(sum(record.tokens) / tokens)
    assert handle.report.flops_fraction == pytest.approx(sum(record.flops) / flops)
    assert handle.report.flops == {s: record.flops[i] for i, s in ((0, 1), (1, 2), (2, 4))}


def test_fractions_of_a_mixed_batch(pipe):
    handle = ddit.apply(pipe, patches=tiny.Table([1, 2], [4, 1]))
    tiny.sample(pipe, steps=2, num_images_per_prompt=2)
    assert handle.report.tokens == {1: 64, 2: 16, 4: 4}
    assert handle.report.tokens_fraction == pytest.approx((64 + 16 + 4 + 64) / (4 * 64))


def test_a_run_of_full_steps_saves_nothing(pipe):
    handle = ddit.apply(pipe, patches=PLAIN)
    tiny.sample(pipe)
    report = handle.report
    assert report.tokens_fraction == report.flops_fraction == 1
    assert set(report.flops) == {1} and report.forced is None


def test_report_is_readable_and_written_as_json(pipe, tmp_path):
    handle = ddit.apply(pipe, patches=COARSE)
    tiny.sample(pipe)
    report = handle.report
    values = json.loads(json.dumps(report.to_dict()))
    assert values["scales"] == [[1, 1, 1, 4, 4, 4, 4, 4]]
    assert values["tokens"] == {"1": 64, "4": 4}
    assert len(values["sigmas"]) == len(values["statistics"]) == len(values["step_seconds"]) == STEPS
    assert values["sigmas"] == sorted(values["sigmas"], reverse=True) and values["sigmas"][0] == 1
    assert values["tokens_fraction"] == report.tokens_fraction == pytest.approx((3 * 64 + 5 * 4) / (8 * 64))
    assert report.seconds == pytest.approx(sum(values["step_seconds"])) and report.seconds > 0
    assert "8 steps, 1 samples" in repr(report) and "1 1 1 4 4 4 4 4" in repr(report)
    report.plot(tmp_path / "schedule.png", threshold=1e-3)
    assert (tmp_path / "schedule.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


class Reads(TorchDispatchMode):
    """Counts what the host reads off tensors: on a GPU each waits for all that was given to it."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        tolist = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: [self._noted(), tolist(tensor)][1])

    def _noted(self):
        self.count += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self._noted()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("patches", "skip", "most"),
    # The noise level as it is told, and the scheduler's own, which lies on the host; each rule reads its statistics.
    [
        (FULL, SkipSchedule(speedup=2), 2),
        (PLAIN, None, 3),
        (COARSE, None, 3),
        (FULL, SkipSchedule(threshold=0.01), 3),
        (PLAIN, SkipSchedule(threshold=0.01), 4),
    ],
)
def test_a_step_reads_little_off_the_device(pipe, monkeypatch, patches, skip, most):
    def per_step() -> list[int]:
        counts = []
        with Reads(monkeypatch) as reads:
            tiny.sample(pipe, callback_on_step_end=lambda *args: counts.append(reads.count) or {})
        return [after - before for before, after in itertools.pairwise(counts)]

    plain = per_step()
    ddit.apply(pipe, patches=patches, skip=skip)
    extra = [ours - theirs for ours, theirs in zip(per_step(), plain, strict=True)]
    assert max(extra[3:]) <= most


def test_a_blind_policy_measures_nothing(pipe):
    handle = ddit.apply(pipe, patches=FULL, skip=SkipSchedule(speedup=2))
    tiny.sample(pipe)
    assert all(step.statistics == ({},) for step in handle.report.steps)


def test_plot_of_a_run_without_statistics(pipe, tmp_path):
    handle = ddit.apply(pipe, patches=fixed(2))
    tiny.sample(pipe, steps=2)
    handle.report.plot(tmp_path / "short.png")
    assert (tmp_path / "short.png").stat().st_size > 0


def test_repr_of_a_large_batch_is_short(pipe):
    handle = ddit.apply(pipe, patches=COARSE)
    tiny.sample(pipe, num_images_per_prompt=20, size=(8, 8))
    lines = repr(handle.report).splitlines()
    assert len(lines) < 25 and "... 12 more" in lines[-1]


def test_scales_of_the_current_step(pipe):
    """For those who watch a run; empty between runs, and a copy."""
    handle, seen = ddit.apply(pipe, patches=fixed(1, 2, 4)), []

    def callback(pipe, i, t, kwargs):
        seen.append(handle.scales)
        return kwargs

    tiny.sample(pipe, steps=4, num_images_per_prompt=2, callback_on_step_end=callback)
    assert seen == [[1, 1], [2, 2], [4, 4], [4, 4]]
    assert handle.scales == []


def test_report_is_a_snapshot(pipe):
    """One read in mid-run does not grow."""
    handle, seen = ddit.apply(pipe, patches=PLAIN), []

    def callback(pipe, i, t, kwargs):
        seen.append(handle.report)
        return kwargs

    tiny.sample(pipe, callback_on_step_end=callback)
    assert [len(report.steps) for report in seen] == list(range(1, STEPS + 1))


def test_report_of_a_finished_run_survives_a_broken_one(pipe):
    """Another size breaks in its first call: costs still belong to the run that is reported."""
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe, patches=fixed(1, 2))
    tiny.sample(pipe)
    before = handle.report
    record.raises = True
    with pytest.raises(RuntimeError, match="broken"):
        tiny.sample(pipe, size=(16, 16))
    record.raises = False
    after = handle.report
    assert after.steps == before.steps and after.tokens == before.tokens and after.flops == before.flops


@pytest.mark.parametrize(
    ("patches", "steps", "word"),
    [
        (PatchSchedule(threshold=1e-12, careful=False), 9, "no step used large patches.*Raise"),
        (PatchSchedule(threshold=1e9), 9, "none is safe at the noise levels"),
        (COARSE, 6, "every step after the warm-up.*Lower"),
        (COARSE, 3, "all 3 belong to the warm-up of 3"),
        (PLAIN, 6, None),
        (PatchSchedule(threshold=1e9, scales=(1,)), 3, None),
        (FixedSchedule(steps=(2,)), 6, None),
        (FULL, 6, None),
    ],
)
def test_a_run_that_no_dynamic_schedule_is_for_is_remarked_once(patches, steps, word, recwarn):
    pipe = tiny.pipeline()
    with ddit.apply(pipe, patches=patches):
        for _ in range(2):
            tiny.sample(pipe, steps=steps)
    said = [str(w.message) for w in recwarn.list if "patches" in str(w.message)]
    assert len(said) == (word is not None)
    assert word is None or re.search(word, said[0])


def test_warnings_name_the_users_line(pipe):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ddit.apply(pipe, preset="paper"):
            tiny.sample(pipe)
    ours = [w for w in caught if "ddit calibrate" in str(w.message) or "no step used" in str(w.message)]
    assert len(ours) == 2
    assert {Path(w.filename).name for w in ours} <= {"test_report.py", "tiny.py"}


@pytest.mark.parametrize(("warmup", "shorter"), [(3, False), (5, True)])
def test_a_short_run_is_advised_what_is_possible(pipe, warmup, shorter):
    with (
        ddit.apply(pipe, patches=PatchSchedule(warmup=warmup)),
        pytest.warns(UserWarning, match="Take more steps") as said,
    ):
        tiny.sample(pipe, steps=2)
    assert ("or a shorter warm-up (3 at least)" in str(said[0].message)) == shorter
