"""One transformer, several runs: threads, pipelines that share it, copies."""

import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

import ddit
import tiny
from ddit import FixedSchedule, PatchSchedule, SkipSchedule
from ddit.caller import pipeline_calls
from ddit.config import FULL
from helpers import call_inputs, random_adapter

METHODS = {
    "rule": {"patches": PatchSchedule(threshold=1e9, careful=False)},
    "fixed": {"patches": FixedSchedule(steps=(1, 2, 4, 1))},
    "skip rule": {"patches": FULL, "skip": SkipSchedule(threshold=0.05)},
    "skip plan": {"patches": FULL, "skip": SkipSchedule(speedup=3)},
}


def shared(pipe):
    """Another pipeline on the same transformer, with a scheduler of its own: diffusers' recipe for servers."""
    other = FluxPipeline(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    return other


def draw_from(pipe, text, seed: int, steps: int):
    """Latents from encoded text: tokenizers of several threads disturb each other."""
    embeds, pooled, _ = text
    other = shared(pipe)
    return tiny.sample(other, prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled, seed=seed, steps=steps)


@pytest.mark.parametrize("name", METHODS)
def test_threads_draw_what_each_draws_alone(pipe, name):
    """Four at once, of different lengths; each has a report of its own."""
    lengths = {0: 12, 1: 8, 2: 20, 3: 12}
    text = pipe.encode_prompt(tiny.PROMPT, tiny.PROMPT, max_sequence_length=20)
    with ddit.apply(pipe, **METHODS[name]) as handle:
        alone = {}
        for seed, steps in lengths.items():
            alone[seed] = draw_from(pipe, text, seed, steps), handle.report.scales
        drawn, broken, together = {}, [], threading.Barrier(len(lengths))

        def draw(seed: int, steps: int) -> None:
            try:
                together.wait()
                drawn[seed] = draw_from(pipe, text, seed, steps), handle.report.scales
            except Exception as error:
                broken.append(error)

        workers = [threading.Thread(target=draw, args=item) for item in lengths.items()]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not broken and len(drawn) == len(lengths)
    for seed, (latents, scales) in alone.items():
        torch.testing.assert_close(drawn[seed][0], latents, rtol=1e-4, atol=1e-4)
        assert drawn[seed][1] == scales


def test_a_cache_serves_one_thread_at_a_time(pipe):
    """Refused while another run is under way, and served after it."""
    with ddit.apply(pipe, cache="first-block:0.5"):
        alone = tiny.sample(shared(pipe))
        refused = []

        def intrude(*_):
            if not refused:
                worker = threading.Thread(target=lambda: refused.append(error_of(shared(pipe))))
                worker.start()
                worker.join()
            return {}

        assert torch.equal(tiny.sample(pipe, callback_on_step_end=intrude), alone)
        assert "put a lock around the pipeline's call" in str(refused[0])
        assert torch.equal(tiny.sample(shared(pipe)), alone)


def error_of(pipe) -> Exception | None:
    try:
        tiny.sample(pipe)
    except RuntimeError as error:
        return error
    return None


def test_a_thread_without_a_run_reads_the_last_report_of_all(pipe):
    with ddit.apply(pipe, **METHODS["fixed"]) as handle:
        tiny.sample(pipe)
    seen = []
    worker = threading.Thread(target=lambda: seen.append(handle.report.strip()))
    worker.start()
    worker.join()
    assert seen == [handle.report.strip()] == ["1 2 4 1 1 1 1 1"]


def test_the_calling_pipeline_is_found(pipe):
    """Of several on one transformer, the one that runs; none for a bare transformer."""
    found, other = [], shared(pipe)
    forward = pipe.transformer.forward

    def spy(*args, **kwargs):
        found.append([caller for caller, _ in pipeline_calls(pipe.transformer)])
        return forward(*args, **kwargs)

    pipe.transformer.forward = spy
    for runs in (pipe, other):
        tiny.sample(runs, steps=2)
    assert found == [[pipe], [pipe], [other], [other]]
    assert not list(pipeline_calls(pipe.transformer))


@pytest.mark.parametrize("what", ["pipeline", "transformer"])
def test_a_copy_works_on_its_own_weights_without_ddit(pipe, what):
    plain = tiny.sample(pipe)
    with ddit.apply(pipe, **METHODS["fixed"]):
        ours = tiny.sample(pipe)
        if what == "pipeline":
            twin = copy.deepcopy(pipe)
        else:
            twin = FluxPipeline(**{**pipe.components, "transformer": copy.deepcopy(pipe.transformer)})
            twin.set_progress_bar_config(disable=True)
        assert torch.equal(tiny.sample(twin), plain)
        with torch.no_grad():
            for weight in twin.transformer.parameters():
                weight.zero_()
        assert not torch.equal(tiny.sample(twin), plain)
        assert torch.equal(tiny.sample(pipe), ours)
    assert torch.equal(tiny.sample(pipe), plain)
    with ddit.apply(twin, **METHODS["fixed"]) as handle:
        tiny.sample(twin)
        assert handle.report.strip() == "1 2 4 1 1 1 1 1"


def test_pickling_is_refused_with_a_reason_while_applied(pipe):
    with ddit.apply(pipe), pytest.raises(pickle.PicklingError, match=r"call remove\(\) before pickling"):
        pickle.dumps(pipe.transformer)
    back = pickle.loads(pickle.dumps(pipe.transformer))
    assert torch.equal(back.proj_out.weight, pipe.transformer.proj_out.weight)


def test_a_copy_made_under_an_adapter_takes_it_anew(pipe):
    adapter = random_adapter(pipe.transformer)
    with ddit.apply(pipe, patches=METHODS["fixed"]["patches"], adapter=adapter):
        ours = tiny.sample(pipe)
        twin = copy.deepcopy(pipe.transformer)
    plain = tiny.sample(pipe)
    other = FluxPipeline(**{**pipe.components, "transformer": twin})
    other.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.sample(other), plain)
    with ddit.apply(other, patches=METHODS["fixed"]["patches"], adapter=adapter):
        assert torch.equal(tiny.sample(other), ours)


@pytest.mark.parametrize("then", ["remove", "apply"])
def test_what_is_removed_while_it_draws_ends_that_step(pipe, then):
    """In another thread: the step under way is finished first, and the others are plain, or by the new schedule."""
    adapter = random_adapter(pipe.transformer)
    handle = ddit.apply(pipe, patches=FixedSchedule(steps=(2,)), adapter=adapter)
    inside, go_on, broken = threading.Event(), threading.Event(), []

    def hold(*_) -> None:
        if len(handle.scales) and handle.report.steps[2:]:
            inside.set()
            go_on.wait(10)

    probe = pipe.transformer.transformer_blocks[0].norm1.register_forward_pre_hook(hold)

    def draw() -> None:
        try:
            tiny.sample(pipe)
        except Exception as error:
            broken.append(error)

    def change() -> None:
        handle.remove() if then == "remove" else ddit.apply(pipe, patches=FixedSchedule(steps=(4,)))

    drawing, changing = threading.Thread(target=draw), threading.Thread(target=change)
    drawing.start()
    assert inside.wait(10)
    changing.start()
    go_on.set()
    for thread in (drawing, changing):
        thread.join(30)
    probe.remove()
    assert not broken and not drawing.is_alive() and not changing.is_alive()


def test_removed_from_inside_the_call(pipe):
    plain, handle = tiny.sample(pipe), ddit.apply(pipe, patches=FULL)
    probe = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: handle.remove())
    assert torch.equal(tiny.sample(pipe), plain)
    probe.remove()


def test_a_cache_is_free_after_a_run_that_broke_off(pipe):
    """In a worker that lives on: its pipeline's call is over, so that another worker may draw."""
    lock = threading.Lock()

    def draw(cancel: bool) -> Tensor:
        def stop(_, index, *__):
            if cancel and index == 2:
                raise InterruptedError
            return {}

        with lock:
            return tiny.sample(shared(pipe), callback_on_step_end=stop)

    with (
        ddit.apply(pipe, patches=FULL, cache="first-block:0.5"),
        ThreadPoolExecutor(1) as one,
        ThreadPoolExecutor(1) as two,
    ):
        expected = two.submit(draw, False).result()
        with pytest.raises(InterruptedError):
            one.submit(draw, True).result()
        for worker in (two, one, two):
            assert torch.equal(worker.submit(draw, False).result(), expected)


def test_an_adapter_on_two_models_hears_one_call_at_a_time(pipe):
    """Two threads, one adapter, a transformer each: every picture is what it is alone."""
    adapter = random_adapter(pipe.transformer)
    pipes = [pipe, tiny.pipeline(seed=1)]
    text = [p.encode_prompt(tiny.PROMPT, tiny.PROMPT, max_sequence_length=20) for p in pipes]
    for one in pipes:
        ddit.apply(one, patches=FixedSchedule(steps=(1, 2, 4, 1, 2)), adapter=adapter)
    alone = [draw_from(one, said, 0, 30) for one, said in zip(pipes, text, strict=True)]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda i: draw_from(pipes[i], text[i], 0, 30), range(2)))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_transformer_does_not_hold_the_pipelines_that_used_it(pipe):
    other = shared(pipe)
    handle = ddit.apply(other, **METHODS["fixed"])
    tiny.sample(other)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    tiny.sample(pipe)
    assert handle.report.strip() == "1 2 4 1 1 1 1 1"


def test_a_callback_may_draw_with_another_pipeline(pipe):
    """The run around it goes on as if nothing had been."""
    with ddit.apply(pipe, **METHODS["rule"]) as handle:
        alone, other = tiny.sample(pipe), shared(pipe)
        scales = handle.report.scales

        def preview(pipe, index, *_):
            if index == 4:
                tiny.sample(other, seed=1, steps=6)
            return {}

        assert torch.equal(tiny.sample(pipe, callback_on_step_end=preview), alone)
        assert handle.report.scales == scales


def test_a_run_that_is_broken_off_or_freed_is_not_remarked_upon(pipe, recwarn):
    """Nothing of it says that settings are wrong, or that ddit is off."""

    def stop(pipe, index, *_):
        pipe._interrupt = index == 3
        return {}

    handle = ddit.apply(pipe, patches=PatchSchedule(threshold=1e-9, careful=False))
    tiny.sample(pipe, steps=20, callback_on_step_end=stop)
    assert len(handle.report.steps) == 4
    pipe.maybe_free_model_hooks()
    assert not recwarn.list


def test_a_pipeline_may_call_itself_in_a_callback(pipe):
    """With a scheduler of its own meanwhile, as plain diffusers allows."""
    with ddit.apply(pipe, **METHODS["fixed"]) as handle:
        alone, seen = tiny.sample(pipe), []

        def preview(pipe, index, *_):
            if index == 2:
                before = pipe.scheduler
                pipe.scheduler = copy.deepcopy(before)
                tiny.sample(pipe, seed=1, steps=4)
                pipe.scheduler = before
            seen.append(handle.scales)
            return {}

        assert torch.equal(tiny.sample(pipe, callback_on_step_end=preview), alone)
        assert handle.report.strip() == "1 2 4 1 1 1 1 1" and seen[1:4] == [[2], [4], [1]]


def test_a_callback_may_free_another_pipeline(pipe):
    with ddit.apply(pipe, **METHODS["fixed"]) as handle:
        alone, other = tiny.sample(pipe), shared(pipe)

        def free(*_):
            other.maybe_free_model_hooks()
            return {}

        assert torch.equal(tiny.sample(pipe, callback_on_step_end=free), alone)
        tiny.sample(other, steps=3)
        pipe.maybe_free_model_hooks()
        assert handle.report.strip() == "1 2 4"


def test_a_cache_refuses_a_run_inside_a_run(pipe):
    """And goes on to refuse other threads until the outer one ends."""
    with ddit.apply(pipe, cache="first-block:0.5"):
        alone, other, refused = tiny.sample(pipe), shared(pipe), []

        def intrude(*_):
            refused.append(error_of(other))
            with ThreadPoolExecutor(1) as thread:
                refused.append(thread.submit(error_of, other).result())
            return {}

        assert torch.equal(tiny.sample(pipe, callback_on_step_end=intrude), alone)
        assert "the call around this one" in str(refused[0]) and "another thread" in str(refused[1])
        assert error_of(other) is None


@dataclass
class Equal:
    """A user's own pipeline, without a hash; with slots it would allow no weak reference either."""

    transformer: Any
    scheduler: Any

    def __call__(self, steps: int = 5) -> Tensor:
        self.scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=1.0)
        self.scheduler.set_begin_index(0)
        inputs = call_inputs()
        z = inputs.pop("hidden_states")
        for t in self.scheduler.timesteps:
            told = {**inputs, "hidden_states": z, "timestep": t.expand(1) / 1000}
            with torch.no_grad():
                z = self.scheduler.step(self.transformer(**told).sample, t, z).prev_sample
        return z


@pytest.mark.parametrize("own", [Equal, dataclass(slots=True)(Equal)])
def test_pipelines_of_ones_own_need_no_hash_and_no_weak_reference(pipe, own):
    mine = own(pipe.transformer, copy.deepcopy(pipe.scheduler))
    with ddit.apply(mine, **METHODS["fixed"]) as handle:
        mine()
        assert handle.report.strip() == "1 2 4 1 1"


def test_a_report_is_the_last_run_of_all_also_where_nobody_says_that_it_ended(pipe, monkeypatch):
    """Models without caches in diffusers don't; each request has a pipeline of its own."""
    monkeypatch.setattr(type(pipe.transformer), "_reset_stateful_cache", None)
    monkeypatch.setattr(FluxPipeline, "maybe_free_model_hooks", lambda self: None)
    with ddit.apply(pipe, **METHODS["fixed"]) as handle:
        for steps in (4, 6):
            with ThreadPoolExecutor(1) as thread:
                thread.submit(tiny.sample, shared(pipe), steps=steps).result()
        assert handle.report.strip() == "1 2 4 1 1 1"
