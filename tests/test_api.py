"""`ddit.apply` on real pipeline classes: exactness, schedules, guidance, batches, obstacles, reports, removal."""

import gc
import inspect
import itertools
import json
import re
import warnings
import weakref
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ddit
import tiny
from ddit import ScheduleConfig
from ddit.api import Handle
from ddit.config import Difference, Positions, Start
from ddit.patches import amplified, detail, grow, half_log_snr
from ddit.schedule import channel_moments, growth, statistic
from ddit.state import Generation

PLAIN = ScheduleConfig(threshold=0.0)
COARSE = ScheduleConfig(threshold=1e9, gain=0.5)
STEPS = 8
GUIDED: dict[str, Any] = dict(negative_prompt="", true_cfg_scale=2.0)


def fixed(*steps: int, **kwargs) -> ScheduleConfig:
    return ScheduleConfig(policy="fixed", steps=steps, **kwargs)


class Record:
    """Stands before a transformer's own forward and keeps the arguments of every call, and its FLOPs."""

    def __init__(self, transformer, count_flops=False):
        self.calls, self.flops, self.raises = [], [], False
        original = transformer.forward

        def forward(*args, **kwargs):
            self.calls.append(inspect.signature(original).bind(*args, **kwargs).arguments)
            if self.raises:
                raise RuntimeError("broken")
            if not count_flops:
                return original(*args, **kwargs)
            # The counter does not know the CPU's fused attention.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                result = original(*args, **kwargs)
            self.flops.append(counter.get_total_flops())
            return result

        transformer.forward = forward

    @property
    def tokens(self) -> list[int]:
        return [call["hidden_states"].shape[1] for call in self.calls]


def call_inputs(batch=1, grid=(4, 4), sigma=0.5, seed=0, features=16, origin=(0, 0), **kwargs):
    """Arguments of a direct call of the tiny transformer."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(*(torch.arange(n) + o for n, o in zip(grid, origin, strict=True)), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    return dict(
        hidden_states=torch.randn(batch, len(ids), features, generator=g),
        encoder_hidden_states=torch.randn(batch, 5, 32, generator=g),
        pooled_projections=torch.randn(batch, 32, generator=g),
        timestep=torch.full((batch,), sigma),
        img_ids=ids,
        txt_ids=torch.zeros(5, 3),
        **kwargs,
    )


@torch.no_grad()
def denoise(transformer, steps=STEPS, sigma=1.0, **kwargs):
    """Euler steps on a bare transformer."""
    inputs = call_inputs(**kwargs)
    z, level = inputs["hidden_states"], torch.linspace(sigma, 0, steps + 1)
    for now, then in itertools.pairwise(level):
        inputs |= dict(hidden_states=z, timestep=now.expand(len(z)))
        z = z + (then - now) * transformer(**inputs).sample
    return z


def noise(batch, tokens=64, seed=0):
    return torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(seed))


def facts(pipe):
    """Every attribute of a pipeline and of all modules of its transformer, by identity."""
    own = {"_num_timesteps", "_joint_attention_kwargs"}  # made anew in every call
    result = {("pipe", name): name in own or id(value) for name, value in vars(pipe).items()}
    for path, module in pipe.transformer.named_modules():
        for name, value in vars(module).items():
            result[path, name] = id(value)
            if isinstance(value, dict):
                result |= {(path, name, k): id(v) for k, v in value.items()}
    return result


# --- exactness and removal ---


@pytest.mark.parametrize("batch", [1, 3])
def test_threshold_zero_is_bit_equal_to_the_plain_pipeline(pipe, batch):
    plain = tiny.sample(pipe, num_images_per_prompt=batch)
    with ddit.apply(pipe, config=PLAIN) as handle:
        ours = tiny.sample(pipe, num_images_per_prompt=batch)
        assert handle.report.scales == [[1] * STEPS] * batch
    assert torch.equal(ours, plain)
    assert torch.equal(tiny.sample(pipe, num_images_per_prompt=batch), plain)


def test_decoded_pictures_are_equal_too(pipe):
    plain = tiny.sample(pipe, output_type="np")
    ddit.apply(pipe, config=PLAIN)
    assert (tiny.sample(pipe, output_type="np") == plain).all()


def test_remove_leaves_nothing_behind(pipe):
    """Neither on the pipeline nor on any module, after runs at several scales."""
    plain = tiny.sample(pipe)  # diffusers leaves its own hook registry in a first run
    before = facts(pipe)
    handle = ddit.apply(pipe, config=COARSE)
    assert not torch.equal(tiny.sample(pipe), plain)
    assert facts(pipe) != before
    handle.remove()
    handle.remove()  # twice is harmless
    assert facts(pipe) == before
    assert torch.equal(tiny.sample(pipe), plain)


def test_apply_changes_the_instance_only(pipe):
    """A second pipeline of the same class runs as ever while the first one runs coarse."""
    other = tiny.pipeline()
    plain, before = tiny.sample(other), dict(vars(type(pipe.transformer)))
    ddit.apply(pipe, config=COARSE)
    assert not torch.equal(tiny.sample(pipe), plain)
    assert torch.equal(tiny.sample(other), plain)
    assert dict(vars(type(pipe.transformer))) == before


def test_apply_adds_no_weights_and_no_modules(pipe):
    keys, modules = list(pipe.transformer.state_dict()), [n for n, _ in pipe.transformer.named_modules()]
    ddit.apply(pipe)
    assert list(pipe.transformer.state_dict()) == keys
    assert [n for n, _ in pipe.transformer.named_modules()] == modules


def test_signature_of_forward_is_kept(pipe):
    """Pipelines inspect it to see which arguments they may pass."""
    before = inspect.signature(pipe.transformer.forward)
    ddit.apply(pipe)
    assert inspect.signature(pipe.transformer.forward) == before


def test_applying_twice_replaces(pipe):
    plain = tiny.sample(pipe)
    before = facts(pipe)
    first = ddit.apply(pipe, config=COARSE)
    second = ddit.apply(pipe, config=PLAIN)
    assert "removed" in repr(first) and "active" in repr(second)
    assert torch.equal(tiny.sample(pipe), plain)
    first.remove()  # does nothing any more
    assert second.report.scales == [[1] * STEPS]
    second.remove()
    assert facts(pipe) == before


def test_context_manager_removes_after_an_error_as_well(pipe):
    tiny.sample(pipe)
    before = facts(pipe)
    with pytest.raises(KeyError), ddit.apply(pipe, config=COARSE) as handle:
        assert isinstance(handle, Handle)
        raise KeyError
    assert facts(pipe) == before


def test_report_outlives_removal(pipe):
    with ddit.apply(pipe, config=COARSE) as handle:
        tiny.sample(pipe)
    assert handle.report.scales == [[1, 1, 1, 4, 4, 4, 4, 4]]


def test_a_removed_handle_frees_the_transformer(pipe):
    with ddit.apply(pipe):
        tiny.sample(pipe)
    transformer = weakref.ref(pipe.transformer)
    del pipe.transformer, pipe
    gc.collect()
    # The fixture holds the pipeline object, whose transformer is gone.
    assert transformer() is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_hook_and_ddit_in_any_order(pipe, when):
    """Both work together; a hook put on after ddit survives its removal."""
    plain, seen = tiny.sample(pipe), []
    before = facts(pipe)

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(kwargs["hidden_states"].shape[1])
            return args, kwargs

    if when == "before":
        add_hook_to_module(pipe.transformer, Hook())
    handle = ddit.apply(pipe, config=COARSE)
    if when == "after":
        add_hook_to_module(pipe.transformer, Hook())
    tiny.sample(pipe)
    assert handle.report.scales == [[1, 1, 1, 4, 4, 4, 4, 4]]
    handle.remove()
    seen.clear()
    assert torch.equal(tiny.sample(pipe), plain)
    assert seen == [64] * STEPS
    remove_hook_from_module(pipe.transformer)
    assert torch.equal(tiny.sample(pipe), plain)
    # accelerate leaves the bound method in the instance; nothing of ours may remain
    left = {key: value for key, value in facts(pipe).items() if key != ("", "forward")}
    assert left == before
    assert pipe.transformer.forward.__func__ is type(pipe.transformer).forward


def test_model_offload_takes_its_hooks_off_and_on_after_every_run(pipe):
    """As `enable_model_cpu_offload` does at the end of a call: the schedule stays in force for the next one."""
    add_hook_to_module(pipe.transformer, ModelHook())
    handle = ddit.apply(pipe, config=COARSE)
    for _ in range(3):
        tiny.sample(pipe)
        assert handle.report.scales == [[1, 1, 1, 4, 4, 4, 4, 4]]
        handle._finished = None  # so that a run that passes ddit by has no report
        remove_hook_from_module(pipe.transformer, recurse=True)
        add_hook_to_module(pipe.transformer, ModelHook())
    handle.remove()
    remove_hook_from_module(pipe.transformer)
    assert pipe.transformer.forward.__func__ is type(pipe.transformer).forward


def test_another_wrapper_put_on_later_survives_removal(pipe):
    plain = tiny.sample(pipe)
    handle = ddit.apply(pipe, config=COARSE)
    record = Record(pipe.transformer)
    tiny.sample(pipe)
    assert record.tokens == [64] * STEPS  # outside of ddit nobody sees large patches
    handle.remove()
    assert torch.equal(tiny.sample(pipe), plain)
    assert len(record.calls) == 2 * STEPS
    again = ddit.apply(pipe, config=COARSE)
    tiny.sample(pipe)
    assert again.report.scales == [[1, 1, 1, 4, 4, 4, 4, 4]]


# --- schedules ---


def test_huge_threshold_is_coarsest_after_warmup(pipe):
    """And the transformer really runs on fewer tokens."""
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe, config=ScheduleConfig(threshold=1e9, warmup=5, anchored=False))
    tiny.sample(pipe)
    assert handle.report.strip() == "1 1 1 1 1 4 4 4"
    assert record.tokens == [64] * 5 + [4] * 3
    assert len(handle.report.steps[2].statistics[0]) == 0
    assert set(handle.report.steps[3].statistics[0]) == {2, 4}


@pytest.mark.parametrize("order", [1, 2, 3])
def test_statistics_begin_after_order_steps(pipe, order):
    handle = ddit.apply(pipe, config=ScheduleConfig(threshold=0, order=order, warmup=order))
    tiny.sample(pipe)
    assert [bool(step.statistics[0]) for step in handle.report.steps] == [False] * order + [True] * (STEPS - order)


def test_warmup_scale(pipe):
    handle = ddit.apply(pipe, config=ScheduleConfig(threshold=0, warmup_scale=2))
    tiny.sample(pipe)
    assert handle.report.strip() == "2 2 2 1 1 1 1 1"


def test_fixed_policy(pipe):
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe, config=fixed(4, 2, 1, 2))
    tiny.sample(pipe)
    assert handle.report.strip() == "4 2 1 2 2 2 2 2"
    assert record.tokens == [4, 16, 64, *[16] * 6]  # the fourth twice: there and at the anchor
    assert [step.compared for step in handle.report.steps] == [
        frozenset({0}) if i == 3 else frozenset() for i in range(8)
    ]


def test_first_policy_knows_the_pipelines_steps(pipe):
    handle = ddit.apply(pipe, config=ScheduleConfig(policy="first", fraction=0.5, scales=(1, 2)))
    for steps in (8, 4):
        tiny.sample(pipe, steps=steps)
        assert handle.report.scales == [[2] * (steps // 2) + [1] * (steps // 2)]


def test_first_policy_is_refused_on_a_bare_transformer(pipe):
    ddit.apply(pipe.transformer, config=ScheduleConfig(policy="first"))
    with pytest.raises(ValueError, match="needs the number of steps, which only a pipeline knows"):
        tiny.sample(pipe)


def owed(sigmas: list[float], nodes: list[int], here: int) -> float:
    """What forecasts from three nodes up to and with a step make of a difference measured at the last of them."""
    levels, ends = [half_log_snr(sigma) for sigma in sigmas], [*sigmas[1:], 0.0]
    gap = range(nodes[-1] + 1, here + 1)
    sum_ = sum((sigmas[k] - ends[k]) * growth([levels[i] for i in nodes], levels[k]) for k in gap)
    return sum_ * amplified(ends[here])


@pytest.mark.parametrize("kind", ["plain", "per-sigma"])
def test_the_statistic_is_that_of_steps_at_scale_one(pipe, kind: Difference):
    """The paper's difference sees whatever the path does; ours only learns from steps at scale 1, and else grows."""
    handle = ddit.apply(pipe, config=fixed(1, 1, 1, 1, 2, 2, 2, 1, 2, difference=kind))
    tiny.sample(pipe, steps=10)
    stats = [step.statistics[0].get(2, 0.0) for step in handle.report.steps]
    assert stats[:3] == [0.0] * 3 and stats[3] != stats[4]
    sigmas = [step.sigma for step in handle.report.steps]
    grown = [stats[4] * owed(sigmas, [1, 2, 3], k) / owed(sigmas, [1, 2, 3], 4) for k in range(4, 8)]
    assert (stats[4:8] == pytest.approx(grown)) == (kind == "per-sigma")
    after = stats[8] * owed(sigmas, [2, 3, 7], 9) / owed(sigmas, [2, 3, 7], 8)
    assert (stats[9] == pytest.approx(after)) == (kind == "per-sigma")


@pytest.mark.parametrize("known", [True, False])
def test_the_statistic_does_not_depend_on_where_the_steps_at_scale_one_lie(known):
    """Velocities on a parabola of lambda: the sum of what lines through the last two steps at scale 1 are off by."""
    policy = tiny.Table([1, 1, 1, 2, 1, 2, 2, 1], [1, 1, 1, 1, 2, 2, 1, 1])
    x = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    generation = Generation(fixed(1, 2, scales=(1, 2)))
    sigmas = [0.9 - 0.02 * i for i in range(10)]
    generation.run = sigmas if known else []
    levels = [half_log_snr(s) for s in sigmas]
    z = torch.zeros(2, 4, 8, 8)
    for i, level in enumerate(levels[:-1]):
        generation.decide(z, sigmas[i], policy, 2, None)
        generation.record(torch.zeros_like(z), 0.0)
        z = z + (sigmas[i + 1] - sigmas[i]) * (x[0] + x[1] * level + x[2] * level**2)
    for sample, schedule in enumerate(policy.samples):
        for i in range(3, 9):
            a, b = [k for k in range(i) if schedule[k] == 1][-2:]
            gap = sum(0.02 * (levels[k] - levels[a]) * (levels[k] - levels[b]) for k in range(b + 1, i + 1))
            error = x[2] * gap * amplified(sigmas[i + 1])
            expected = statistic(channel_moments(error), 4, 0.4).item()
            assert generation.steps[i].statistics[sample][2] == pytest.approx(expected, rel=1e-3)


def test_anchors_between_two_answers_are_not_asked(pipe):
    """What the coarse grid says there lies on the line through the two; after a gap it is asked again."""
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe, config=fixed(1, 4, 1, 4, 1, 1, 4, 2))
    tiny.sample(pipe)
    assert record.tokens == [64, 4, 4, 64, 4, 64, 64, 4, 4, 16, 16]
    assert [bool(step.compared) for step in handle.report.steps] == [i in (1, 6, 7) for i in range(8)]


def test_custom_policy_sees_step_total_and_statistics(pipe):
    seen = []

    class Mine:
        def choose(self, moment):
            seen.append((moment.step, moment.total, len(moment.stats), len(moment.stats[0])))
            return [2 if moment.step % 2 else 1 for _ in moment.stats]

    handle = ddit.apply(pipe, policy=Mine(), config=ScheduleConfig(difference="plain", order=3))
    tiny.sample(pipe, num_images_per_prompt=2)
    assert handle.report.scales == [[1, 2] * 4] * 2
    assert seen == [(i, STEPS, 2, 0 if i < 3 else 2) for i in range(STEPS)]


@pytest.mark.parametrize("chosen", [[3], [8], [], [1, 1], ["2"], [None], None, 2])
def test_nonsense_of_a_policy_is_refused(chosen):
    class Bad:
        def choose(self, moment):
            return chosen

    transformer = tiny.transformer()
    with ddit.apply(transformer, policy=Bad()), pytest.raises(ValueError, match="the policy chose"):
        transformer(**call_inputs())


@pytest.mark.parametrize("start", ["noise-consistent", "bilinear"])
@pytest.mark.parametrize("positions", ["grid", "interpolated"])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("measured", [False, True])
def test_every_setting_of_the_coarse_step_runs(start: Start, positions: Positions, anchored, measured):
    variance = {2: [0.1] * 4, 4: [0.2] * 4} if measured else None
    config = fixed(1, 2, 4, start=start, positions=positions, anchored=anchored)
    transformer = tiny.transformer()
    ddit.apply(transformer, config=config, detail_variance=variance)
    latents = denoise(transformer, steps=4)
    assert latents.isfinite().all() and latents.std() > 0.1


def test_an_anchored_step_adds_half_of_what_changed_on_the_coarse_grid():
    """By hand: D v = D v_anchor + (w(now) - w(anchor)) / 2, w being the unanchored step's share that pooling keeps,
    and detail that leads to the anchor's clean latents."""
    transformer, config = tiny.transformer(), fixed(1, 2)
    calls = [call_inputs(sigma=0.8), call_inputs(sigma=0.7)]
    calls[1]["hidden_states"] = 0.9 * calls[0]["hidden_states"]
    with torch.no_grad():
        plain = transformer(**calls[0])[0]
        with ddit.apply(transformer, config=config) as handle:
            assert torch.equal(transformer(**calls[0])[0], plain)
            ours = transformer(**calls[1])[0]
            assert handle.report.scales == [[1, 2]]
        arch = handle._seats[0].architecture
        low = [arch.low_velocity(transformer.forward, call, 2, config) for call in calls]
        before, now = (arch.latents(call) for call in calls)
        anchor = arch.velocity(plain, (8, 8))
        v = anchor - detail(anchor, 2) + grow((low[1] - low[0]) / 2, 2, 2, "noise-consistent")
        v = v + detail(now - (before - 0.8 * anchor), 2) / 0.7
    torch.testing.assert_close(arch.velocity(ours, (8, 8)), v, rtol=1e-4, atol=1e-5)


def test_without_gain_the_model_is_not_asked_and_the_forecast_is_its_answer(pipe):
    """By hand: the line through the last two velocities, and detail that leads to the forecast clean latents."""
    plain, steps = tiny.sample(pipe), (1, 1, 4, 2, 1, 4, 1, 2)
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe, config=fixed(*steps, gain=0.0))
    drawn = tiny.sample(pipe)
    assert record.tokens == [64] * steps.count(1)
    report = handle.report
    assert report.flops_fraction == report.tokens_fraction == 0.5
    assert report.strip() == "1 1 - - 1 - 1 -" and report.to_dict()["skipped"] == [[0] * (s > 1) for s in steps]
    assert not torch.equal(drawn, plain) and (drawn - plain).std() < 0.5 * plain.std()
    transformer = tiny.transformer()
    calls = [call_inputs(sigma=0.8), call_inputs(sigma=0.7)]
    calls[1]["hidden_states"] = 0.9 * calls[0]["hidden_states"]
    with torch.no_grad(), ddit.apply(transformer, config=fixed(1, 2, gain=0.0)) as handle:
        velocity = transformer(**calls[0])[0]
        ours = transformer(**calls[1])[0]
        arch = handle._seats[0].architecture
        before, now = (arch.latents(call) for call in calls)
        anchor = arch.velocity(velocity, (8, 8))
        v = anchor - detail(anchor, 2) + detail(now - (before - 0.8 * anchor), 2) / 0.7
        torch.testing.assert_close(arch.velocity(ours, (8, 8)), v, rtol=1e-4, atol=1e-5)


def test_without_gain_an_unanchored_step_and_an_adapter_still_ask(pipe):
    record = Record(pipe.transformer)
    with ddit.apply(pipe, config=fixed(4, 1, 4, gain=0.0)) as handle:
        tiny.sample(pipe)
    assert record.tokens == [4, 64] and handle.report.strip() == "4 1 - - - - - -"
    adapter = ddit.PatchAdapter.for_model(pipe.transformer, rank=2)
    with ddit.apply(pipe, config=fixed(1, 1, 4, gain=0.0), adapter=adapter) as handle:
        tiny.sample(pipe)
    assert record.tokens[2:] == [64, 64, *[4] * 6] and handle.report.strip() == "1 1 4 4 4 4 4 4"


def test_an_anchored_step_without_change_repeats_the_velocity():
    """The same call again, now with large patches: nothing has changed since, so the answer is the model's own."""
    transformer = tiny.transformer()
    ddit.apply(transformer, config=fixed(1, 2, 4, difference="plain"))
    with torch.no_grad():
        plain = transformer(**call_inputs(sigma=0.8))[0]
        for i in (1, 2):
            call = call_inputs(sigma=0.8)
            call["timestep"] = call["timestep"] - i * 1e-7  # else it would be a further guidance pass
            torch.testing.assert_close(transformer(**call)[0], plain, rtol=1e-4, atol=1e-4)


# --- one generation, the next, and broken ones ---


class Stop(Exception):
    pass


def stop_after(step):
    def callback(pipe, i, t, kwargs):
        if i == step:
            raise Stop
        return kwargs

    return callback


@pytest.mark.parametrize(("step", "seed"), [(0, 0), (0, 1), (1, 1), (3, 0), (6, 1)])
def test_a_run_after_a_broken_one_equals_a_fresh_one(pipe, step, seed):
    """The broken run stops after any step, and the next has the same noise or another."""
    fresh, config = tiny.pipeline(), fixed(1, 2, 4, 1, 2)
    expected = ddit.apply(fresh, config=config)
    latents = tiny.sample(fresh, seed=0)
    handle = ddit.apply(pipe, config=config)
    with pytest.raises(Stop):
        tiny.sample(pipe, seed=seed, callback_on_step_end=stop_after(step))
    assert torch.equal(tiny.sample(pipe, seed=0), latents)
    assert handle.report.scales == expected.report.scales
    assert [s.sigma for s in handle.report.steps] == [s.sigma for s in expected.report.steps]


def test_a_shorter_run_after_a_broken_one_starts_anew():
    """Image-to-image begins at a lower noise level than where the broken run stopped."""
    config = fixed(1, 2, 4, 1)
    pipes = [tiny.pipeline(FluxImg2ImgPipeline) for _ in range(2)]
    handles = [ddit.apply(p, config=config) for p in pipes]
    picture: dict[str, Any] = dict(image=torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(Stop):
        tiny.sample(pipes[0], strength=1.0, callback_on_step_end=stop_after(2), **picture)
    results = [tiny.sample(p, strength=0.5, **picture) for p in pipes]
    assert handles[0].report.scales == handles[1].report.scales
    assert torch.equal(*results)


def test_an_error_inside_the_transformer_resets(pipe):
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe, config=fixed(2))
    record.raises = True
    with pytest.raises(RuntimeError, match="broken"):
        tiny.sample(pipe)
    assert not handle._generation.steps and not handle._generation.path
    with pytest.raises(RuntimeError, match="no report"):
        _ = handle.report
    record.raises = False
    tiny.sample(pipe)
    assert len(handle.report.steps) == STEPS


def test_removal_is_exact_after_a_broken_run(pipe):
    plain = tiny.sample(pipe)
    before = facts(pipe)
    handle = ddit.apply(pipe, config=fixed(2, 4))
    with pytest.raises(Stop):
        tiny.sample(pipe, callback_on_step_end=stop_after(2))
    handle.remove()
    assert {k: v for k, v in facts(pipe).items() if k[0] != "pipe"} == {
        k: v for k, v in before.items() if k[0] != "pipe"
    }
    assert torch.equal(tiny.sample(pipe), plain)


def test_latents_are_let_go_when_a_pipeline_call_ends(pipe):
    """The pipeline resets its components' caches; the report stays, the tensors don't."""
    handle = ddit.apply(pipe, config=fixed(1, 2))
    tiny.sample(pipe)
    state = handle._generation
    assert not (state.path or state.memories or state.nodes or state.velocities) and state.seen is None
    assert handle._finished is not None and handle._finished.seen is None and not handle._finished.path
    assert handle.report.strip() == "1 2 2 2 2 2 2 2"


@pytest.mark.parametrize("kind", ["plain", "per-sigma"])
def test_no_more_latents_are_kept_than_the_order_needs(pipe, kind: Difference):
    handle, counts = ddit.apply(pipe, config=replace(PLAIN, difference=kind, order=3)), []

    def callback(pipe, i, t, kwargs):
        state = handle._generation
        counts.append((len(state.path), len({id(v) for v in state.nodes}), len(state.velocities)))
        return kwargs

    tiny.sample(pipe, callback_on_step_end=callback)
    expected = {"plain": [(min(i + 1, 4), 0, 0) for i in range(STEPS)]}
    expected["per-sigma"] = [(1, min(i, 3), 0) for i in range(STEPS)]
    assert counts == expected[kind]


def test_a_bare_transformer_starts_over_when_the_timestep_rises():
    transformer = tiny.transformer()
    handle = ddit.apply(transformer, config=fixed(1, 2, 4, 1))
    first = denoise(transformer)
    assert len(handle.report.steps) == STEPS
    assert torch.equal(denoise(transformer), first)
    assert handle.report.strip() == "1 2 4 1 1 1 1 1"


def test_a_bare_transformer_starts_over_when_the_shape_changes():
    """Even at a lower noise level: another grid, another batch."""
    transformer = tiny.transformer()
    handle = ddit.apply(transformer, config=fixed(1, 2))
    changes: list[dict[str, Any]] = [dict(), dict(grid=(4, 6)), dict(batch=2), dict(batch=1)]
    for kwargs in changes:
        with torch.no_grad():
            transformer(**call_inputs(sigma=0.9, **kwargs))
            transformer(**call_inputs(sigma=0.8, seed=1, **kwargs))
        assert handle.report.strip() == "1 2"


def test_sizes_may_change_between_runs(pipe):
    handle = ddit.apply(pipe, config=fixed(2))
    for size, tokens in (((32, 32), (64, 16)), ((16, 48), (48, 12)), ((20, 28), (35, 12))):
        tiny.sample(pipe, size=size)
        assert handle.report.tokens == {1: tokens[0], 2: tokens[1]}


def test_inference_mode(pipe):
    with ddit.apply(pipe, config=fixed(1, 2, 4)), torch.inference_mode():
        inside = tiny.sample(pipe)
    with ddit.apply(pipe, config=fixed(1, 2, 4)):
        assert torch.equal(tiny.sample(pipe), inside)


def test_gradients_flow_through_a_coarse_step():
    """A distillation needs them."""
    transformer = tiny.transformer()
    ddit.apply(transformer, config=fixed(2))
    transformer(**call_inputs()).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in transformer.parameters())


# --- batches and guidance ---


def test_a_sample_is_the_same_alone_and_in_a_batch(pipe):
    """Every sample its own schedule, so that a batch mixes scales in a step."""
    tables = [[1, 1, 2, 4], [1, 2, 1, 2], [4, 4, 1, 1], [1, 1, 2, 2]]
    prompts, z = [tiny.PROMPT, "a large red circle", tiny.PROMPT, ""], noise(4)
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe, policy=tiny.Table(*tables))
    together = tiny.sample(pipe, prompt=prompts, latents=z, steps=4)
    assert handle.report.scales == tables
    assert sorted(record.tokens[:2]) == [4, 64]  # a group for each scale of the first step
    for i, table in enumerate(tables):
        handle = ddit.apply(pipe, policy=tiny.Table(table))
        alone = tiny.sample(pipe, prompt=prompts[i], latents=z[i : i + 1], steps=4)
        assert handle.report.scales == [table]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_samples_at_scale_one_share_a_call(pipe):
    """Whether or not they had a step at scale 1 before."""
    record = Record(pipe.transformer)
    ddit.apply(pipe, policy=tiny.Table([1, 1], [2, 1], [2, 2]))
    tiny.sample(pipe, steps=2, num_images_per_prompt=3)
    assert [(c["hidden_states"].shape[:2]) for c in record.calls] == [(1, 64), (2, 16), (2, 64), (1, 16)]


def test_the_rule_decides_for_each_sample(pipe):
    """A threshold between the samples' statistics: they part, and each goes the way it goes alone."""
    z = noise(4) * torch.tensor([0.5, 1.0, 1.0, 2.0]).reshape(4, 1, 1)
    handle = ddit.apply(pipe, config=PLAIN)
    tiny.sample(pipe, latents=z, num_images_per_prompt=4)
    values = sorted(stats[2] for step in handle.report.steps[3:] for stats in step.statistics)
    gaps = [(b / a, (a * b) ** 0.5) for a, b in itertools.pairwise(values)]
    middle = max(gaps[len(gaps) // 4 : -len(gaps) // 4])[1]
    config = ScheduleConfig(threshold=middle)
    handle = ddit.apply(pipe, config=config)
    together = tiny.sample(pipe, latents=z, num_images_per_prompt=4)
    schedules = handle.report.scales
    assert len({tuple(s) for s in schedules}) > 1
    for i in range(4):
        handle = ddit.apply(pipe, config=config)
        alone = tiny.sample(pipe, latents=z[i : i + 1])
        assert handle.report.scales == [schedules[i]]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_num_images_per_prompt(pipe):
    handle = ddit.apply(pipe, config=COARSE)
    latents = tiny.sample(pipe, prompt=["a large red circle", ""], num_images_per_prompt=3)
    assert latents.shape[0] == 6
    assert handle.report.scales == [[1, 1, 1, 4, 4, 4, 4, 4]] * 6


@pytest.mark.parametrize("config", [COARSE, fixed(1, 2, 4, 2)], ids=["dynamic", "fixed"])
def test_both_guidance_passes_take_one_decision(pipe, config):
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe, config=replace(config, anchored=False))
    tiny.sample(pipe, **GUIDED)
    assert len(handle.report.steps) == STEPS
    assert len(record.calls) == 2 * STEPS
    assert record.tokens == [64 // s**2 for s in handle.report.scales[0] for _ in range(2)]


def test_guidance_is_bit_equal_at_threshold_zero(pipe):
    plain = tiny.sample(pipe, **GUIDED)
    handle = ddit.apply(pipe, config=PLAIN)
    assert torch.equal(tiny.sample(pipe, **GUIDED), plain)
    assert len(handle.report.steps) == STEPS


def test_each_guidance_pass_has_its_own_anchor(pipe):
    """Passes with the same prompt equal a run without guidance, whose step is the same mixture."""
    ddit.apply(pipe, config=fixed(1, 2, 4, 1))
    once = tiny.sample(pipe)
    twice = tiny.sample(pipe, negative_prompt=tiny.PROMPT, true_cfg_scale=3.0)
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-5)


def test_guidance_embedding(pipe):
    """As FLUX.1-dev: the guidance scale is an input, one per sample."""
    pipe = tiny.pipeline(guidance_embeds=True)
    plain = tiny.sample(pipe, guidance_scale=3.5, num_images_per_prompt=2)
    with ddit.apply(pipe, config=PLAIN):
        assert torch.equal(tiny.sample(pipe, guidance_scale=3.5, num_images_per_prompt=2), plain)
    handle = ddit.apply(pipe, policy=tiny.Table([1, 2], [4, 1]))
    tiny.sample(pipe, guidance_scale=3.5, num_images_per_prompt=2)
    assert handle.report.scales == [[1] + [2] * 7, [4] + [1] * 7]


# --- other pipelines ---


def picture(seed=0):
    return Image.effect_noise((32, 32), 60).convert("RGB") if seed else Image.new("RGB", (32, 32), "red")


@pytest.mark.parametrize("cls", [FluxImg2ImgPipeline, FluxInpaintPipeline])
def test_img2img_and_inpaint(cls):
    """Bit-equal at threshold 0; coarse at a large one; the report has the steps that ran."""
    pipe = tiny.pipeline(cls)
    kwargs: dict[str, Any] = dict(image=picture(), strength=0.6, steps=10)
    if cls is FluxInpaintPipeline:
        mask = Image.new("L", (32, 32), 0)
        mask.paste(255, (8, 8, 24, 32))
        kwargs["mask_image"] = mask
    plain = tiny.sample(pipe, **kwargs)
    with ddit.apply(pipe, config=PLAIN) as handle:
        assert torch.equal(tiny.sample(pipe, **kwargs), plain)
        assert handle.report.scales == [[1] * 6]
    with ddit.apply(pipe, config=COARSE) as handle:
        assert not torch.equal(tiny.sample(pipe, **kwargs), plain)
        assert handle.report.scales == [[1, 1, 1, 4, 4, 4]]
        assert handle.report.steps[0].sigma < 0.9
    with ddit.apply(pipe, config=ScheduleConfig(policy="first", fraction=0.5)) as handle:
        tiny.sample(pipe, **kwargs)
        assert handle.report.scales == [[4, 4, 4, 1, 1, 1]]
    assert torch.equal(tiny.sample(pipe, **kwargs), plain)


def test_bfloat16_pipeline(pipe):
    """Bit-equal at threshold 0, bfloat16 out, and statistics far below the rounding of bfloat16."""
    pipe.to(torch.bfloat16)
    plain = tiny.sample(pipe)
    with ddit.apply(pipe, config=PLAIN) as handle:
        assert torch.equal(tiny.sample(pipe), plain)
        assert handle.report.scales == [[1] * STEPS]
    record = Record(pipe.transformer)
    ddit.apply(pipe, config=fixed(1, 2, 4))
    latents = tiny.sample(pipe)
    assert latents.dtype == torch.bfloat16 and latents.isfinite().all()
    for call in record.calls:
        assert call["hidden_states"].dtype == call["timestep"].dtype == torch.bfloat16
    assert record.calls[1]["img_ids"].dtype == torch.float32  # half positions need it


@pytest.mark.parametrize("kind", ["plain", "per-sigma"])
def test_bfloat16_statistics_agree_with_float32(pipe, kind: Difference):
    """Same weights and noise, 50 steps: the rule sees the same in both, though timesteps are rounded in one."""
    tables = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe.to(dtype)
        handle = ddit.apply(pipe, config=replace(PLAIN, difference=kind))
        tiny.sample(pipe, steps=50, latents=noise(1).bfloat16().to(dtype))
        tables.append(torch.tensor([step.statistics[0][2] for step in handle.report.steps[3:]]))
    wide, narrow = tables
    assert (narrow - wide).abs().median() < 5e-4


# --- grids ---


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("grid", [(5, 7), (1, 1), (1, 9), (8, 4), (3, 2)])
def test_grids_that_do_not_divide_are_padded(grid, scale):
    transformer = tiny.transformer()
    record = Record(transformer)
    handle = ddit.apply(transformer, config=fixed(1, scale, scale, 1))
    ours = denoise(transformer, steps=4, grid=grid)
    assert ours.shape == (1, grid[0] * grid[1], 16) and ours.isfinite().all()
    padded = -(-grid[0] // scale) * -(-grid[1] // scale)
    assert record.tokens == [grid[0] * grid[1], *[padded] * 3, grid[0] * grid[1]]  # one of them at the anchor
    assert handle.report.tokens == {1: grid[0] * grid[1], scale: padded}


def test_a_pipeline_with_a_grid_that_does_not_divide(pipe):
    """5 x 7 tokens at scale 4 are 2 x 2."""
    handle = ddit.apply(pipe, config=fixed(1, 4))
    assert tiny.sample(pipe, size=(20, 28)).shape == (1, 35, 16)
    assert handle.report.tokens == {1: 35, 4: 4}


@pytest.mark.parametrize(
    ("positions", "rows", "columns"),
    [("grid", [3, 4], [5, 6, 7]), ("interpolated", [3.5, 5.5], [5.5, 7.5, 9.5])],
)
def test_positions_count_from_the_first_token(positions: Positions, rows, columns):
    """img_ids that don't begin at zero, on a grid that is not square."""
    transformer = tiny.transformer()
    record = Record(transformer)
    ddit.apply(transformer, config=fixed(2, positions=positions))
    transformer(**call_inputs(grid=(4, 6), origin=(3, 5)))
    ids = record.calls[0]["img_ids"]
    assert ids.tolist() == [[0, r, c] for r in rows for c in columns]


def test_positions_with_a_batch_axis():
    """Older callers pass [B, N, 3]; diffusers still takes them."""
    transformer = tiny.transformer()
    ddit.apply(transformer, config=fixed(1, 2, 4))
    inputs = call_inputs(batch=2)
    flat = [transformer(**inputs | dict(timestep=torch.full((2,), s))).sample for s in (0.9, 0.8, 0.7)]
    inputs["img_ids"] = inputs["img_ids"].expand(2, -1, -1)
    deep = [transformer(**inputs | dict(timestep=torch.full((2,), s))).sample for s in (0.9, 0.8, 0.7)]
    assert all(torch.equal(a, b) for a, b in zip(flat, deep, strict=True))


def test_a_coarse_call_leaves_its_arguments_alone():
    transformer = tiny.transformer()
    ddit.apply(transformer, config=fixed(2))
    inputs = call_inputs(joint_attention_kwargs={"scale": 1.0})
    copies = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    transformer(**inputs)
    assert all(torch.equal(inputs[k], v) for k, v in copies.items())
    assert inputs["joint_attention_kwargs"] == {"scale": 1.0}


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_return_dict_is_honoured(scale):
    transformer = tiny.transformer()
    ddit.apply(transformer, config=fixed(scale))
    default = transformer(**call_inputs())
    wrapped = transformer(**call_inputs(return_dict=True))
    plain = transformer(**call_inputs(return_dict=False))
    assert isinstance(plain, tuple) and len(plain) == 1
    assert type(default) is type(wrapped) and default.sample.shape == (1, 16, 16)
    torch.testing.assert_close(wrapped.sample, plain[0])


def test_positional_arguments():
    transformer = tiny.transformer()
    inputs = call_inputs()
    ddit.apply(transformer, config=fixed(2))
    named = transformer(**inputs).sample
    torch.testing.assert_close(transformer(*inputs.values()).sample, named)


# --- calls that must stay at scale 1 ---


def controlnet(inputs):
    return inputs | dict(controlnet_block_samples=[torch.zeros(1, inputs["hidden_states"].shape[1], 32)])


def kontext(inputs):
    reference = inputs["img_ids"] + torch.tensor([1.0, 0, 0])
    return inputs | dict(
        hidden_states=torch.cat([inputs["hidden_states"]] * 2, dim=1),
        img_ids=torch.cat([inputs["img_ids"], reference]),
    )


def attention(inputs):
    return inputs | dict(joint_attention_kwargs={"attention_mask": None})


OBSTACLES = [(controlnet, "ControlNet"), (kontext, "Kontext"), (attention, "attention_mask")]


@pytest.mark.parametrize(("change", "word"), OBSTACLES, ids=[w for _, w in OBSTACLES])
@torch.no_grad()
def test_an_obstacle_forces_scale_one_with_one_warning(change, word):
    transformer = tiny.transformer()
    if change is attention:
        transformer.transformer_blocks, transformer.single_transformer_blocks = (torch.nn.ModuleList(),) * 2
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.2]
    calls = [change(call_inputs(sigma=s)) for s in sigmas]
    plain = [transformer(**c).sample for c in calls]
    handle = ddit.apply(transformer, config=fixed(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            ours = [transformer(**c).sample for c in calls]
    messages = [str(w.message) for w in caught if "ddit" in str(w.message)]
    assert len(messages) == 1 and word in messages[0] and "scale 1" in messages[0]
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    report = handle.report
    assert report.strip() == "1 1 1 1 1" and [s.sigma for s in report.steps] == pytest.approx(sigmas)
    assert report.forced is not None and word in report.forced and word in repr(report)
    assert report.flops_fraction == report.tokens_fraction == 1


def test_condition_channels_force_scale_one():
    """Fill and Control: more channels go in than come out."""
    transformer = tiny.transformer(in_channels=40, out_channels=16)
    handle = ddit.apply(transformer, config=fixed(2))
    with pytest.warns(UserWarning, match="condition channels"):
        output = transformer(**call_inputs(features=40)).sample
    assert output.shape == (1, 16, 16) and handle.report.strip() == "1"


@torch.no_grad()
def test_an_obstacle_may_come_and_go():
    """Residuals on some steps only: the others keep their schedule, and the report stays whole."""
    transformer = tiny.transformer()
    handle = ddit.apply(transformer, config=fixed(2))
    with pytest.warns(UserWarning, match="ControlNet"):
        for i, sigma in enumerate([1.0, 0.9, 0.8, 0.7, 0.6]):
            inputs = call_inputs(sigma=sigma, seed=i)
            transformer(**(controlnet(inputs) if i in (0, 1, 3) else inputs))
    report = handle.report
    assert report.strip() == "1 1 2 1 2"
    assert report.tokens == {1: 16, 2: 4}
    assert report.tokens_fraction == pytest.approx((3 * 16 + 2 * 4) / (5 * 16))


# --- refusals ---


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), object(), None, 3])
def test_an_unsupported_model_is_refused_and_the_supported_are_listed(thing):
    with pytest.raises(ValueError, match=r"is not supported; supported are .*FluxTransformer2DModel"):
        ddit.apply(thing)


def test_a_class_that_only_shares_the_name_is_refused():
    cls = type("FluxTransformer2DModel", (torch.nn.Linear,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match="not supported"):
        ddit.apply(cls(2, 2))


def test_a_subclass_is_accepted():
    transformer = tiny.transformer()
    transformer.__class__ = type("Mine", (type(transformer),), {})
    with ddit.apply(transformer, config=fixed(2)) as handle:
        transformer(**call_inputs())
        assert handle.report.strip() == "2"


def test_a_missing_adapter_is_refused(pipe, tmp_path):
    before = set(vars(pipe.transformer))
    with pytest.raises(ValueError, match=r"mine' can't be loaded"):
        ddit.apply(pipe, adapter=tmp_path / "mine")
    assert set(vars(pipe.transformer)) == before


def test_variances_must_cover_the_scales(pipe):
    with pytest.raises(ValueError, match=r"no entry for scales \[4\]"):
        ddit.apply(pipe, detail_variance={2: [0.1] * 4})
    ddit.apply(pipe, detail_variance={2: [0.1] * 4}, config=ScheduleConfig(scales=(1, 2)))


def test_a_refused_apply_leaves_the_former_one_in_force(pipe):
    handle = ddit.apply(pipe, config=COARSE)
    with pytest.raises(ValueError):
        ddit.apply(pipe, detail_variance={2: [0.1] * 4})
    tiny.sample(pipe)
    assert handle.report.scales == [[1, 1, 1, 4, 4, 4, 4, 4]]


def test_broken_latents_are_refused_with_a_reason(pipe):
    """NaN in the latents raises when the rule would have to read them, and the next run is fine."""
    ddit.apply(pipe, config=COARSE)
    with pytest.raises(ValueError, match="NaN"):
        tiny.sample(pipe, latents=noise(1) * torch.nan)
    assert tiny.sample(pipe).isfinite().all()


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
    handle = ddit.apply(pipe, config=fixed(1, 2, 4, 2, 1))
    tiny.sample(pipe, size=size)
    assert handle.report.tokens_fraction == pytest.approx(sum(record.tokens) / tokens)
    assert handle.report.flops_fraction == pytest.approx(sum(record.flops) / flops)
    assert handle.report.flops == {s: record.flops[i] for i, s in ((0, 1), (1, 2), (3, 4))}


def test_fractions_of_a_mixed_batch(pipe):
    handle = ddit.apply(pipe, config=ScheduleConfig(gain=0.5), policy=tiny.Table([1, 2], [4, 1]))
    tiny.sample(pipe, steps=2, num_images_per_prompt=2)
    assert handle.report.tokens == {1: 64, 2: 16, 4: 4}
    assert handle.report.tokens_fraction == pytest.approx((64 + 2 * 16 + 4 + 64) / (4 * 64))


def test_a_run_at_scale_one_saves_nothing(pipe):
    handle = ddit.apply(pipe, config=PLAIN)
    tiny.sample(pipe)
    report = handle.report
    assert report.tokens_fraction == report.flops_fraction == 1
    assert set(report.flops) == {1} and report.forced is None


def test_report_is_readable_and_written_as_json(pipe, tmp_path):
    handle = ddit.apply(pipe, config=COARSE)
    tiny.sample(pipe)
    report = handle.report
    values = json.loads(json.dumps(report.to_dict()))
    assert values["scales"] == [[1, 1, 1, 4, 4, 4, 4, 4]]
    assert values["tokens"] == {"1": 64, "4": 4}
    assert len(values["sigmas"]) == len(values["statistics"]) == len(values["step_seconds"]) == STEPS
    assert values["sigmas"] == sorted(values["sigmas"], reverse=True) and values["sigmas"][0] == 1
    assert values["tokens_fraction"] == report.tokens_fraction == pytest.approx((3 * 64 + 6 * 4) / (8 * 64))
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
    ("config", "most"),
    # The noise level as it is told, and the scheduler's own, which lies on the host; the rule reads its statistics.
    [(ScheduleConfig(speedup=2), 2), (ScheduleConfig(threshold=0.0), 3), (ScheduleConfig(threshold=1e9), 2)],
)
def test_a_step_reads_little_off_the_device(pipe, monkeypatch, config, most):
    def per_step() -> list[int]:
        counts = []
        with Reads(monkeypatch) as reads:
            tiny.sample(pipe, callback_on_step_end=lambda *args: counts.append(reads.count) or {})
        return [after - before for before, after in itertools.pairwise(counts)]

    plain = per_step()
    ddit.apply(pipe, config=config)
    extra = [ours - theirs for ours, theirs in zip(per_step(), plain, strict=True)]
    assert max(extra[3:]) <= most


def kept(*objects: Any) -> int:
    """Numbers in the tensors that objects hold, shared ones counted once."""
    found: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[value.data_ptr()] = value.numel()
        elif is_dataclass(value) and not isinstance(value, type):
            for field in fields(value):
                look(getattr(value, field.name))
        elif isinstance(value, dict):
            look(list(value.values()))
        elif isinstance(value, list | tuple):
            for item in value:
                look(item)

    look(list(objects))
    return sum(found.values())


def test_between_steps_little_is_kept(pipe):
    """Two answers at scale 1 and what they said of the picture; the rule keeps as many velocities as its order too."""
    sizes = {}
    for name, config in {"plan": ScheduleConfig(speedup=2), "rule": ScheduleConfig(threshold=1e9)}.items():
        seen = []
        handle = ddit.apply(pipe, config=config)
        tiny.sample(pipe, callback_on_step_end=lambda *args, h=handle, s=seen: s.append(kept(h._generation)) or {})
        sizes[name] = max(seen) / (16 * 8 * 8)
        handle.remove()
    assert sizes["plan"] < 4 + 1.1  # and the step's own latents
    assert sizes["rule"] < 4 + 3 + 1.1


def test_a_blind_policy_measures_nothing(pipe):
    handle = ddit.apply(pipe, config=ScheduleConfig(speedup=2))
    tiny.sample(pipe)
    assert all(step.statistics == ({},) for step in handle.report.steps)
    assert not handle._generation.nodes and not handle._generation.path


def test_plot_of_a_run_without_statistics(pipe, tmp_path):
    handle = ddit.apply(pipe, config=fixed(2))
    tiny.sample(pipe, steps=2)
    handle.report.plot(tmp_path / "short.png")
    assert (tmp_path / "short.png").stat().st_size > 0


def test_repr_of_a_large_batch_is_short(pipe):
    handle = ddit.apply(pipe, config=COARSE)
    tiny.sample(pipe, num_images_per_prompt=20, size=(8, 8))
    lines = repr(handle.report).splitlines()
    assert len(lines) < 25 and "... 12 more" in lines[-1]


def test_scales_of_the_current_step(pipe):
    """For those who watch a run; empty between runs, and a copy."""
    handle, seen = ddit.apply(pipe, config=fixed(1, 2, 4)), []

    def callback(pipe, i, t, kwargs):
        seen.append(handle.scales)
        return kwargs

    tiny.sample(pipe, steps=4, num_images_per_prompt=2, callback_on_step_end=callback)
    assert seen == [[1, 1], [2, 2], [4, 4], [4, 4]]
    assert handle.scales == []


def test_report_is_a_snapshot(pipe):
    """One read in mid-run does not grow."""
    handle, seen = ddit.apply(pipe, config=PLAIN), []

    def callback(pipe, i, t, kwargs):
        seen.append(handle.report)
        return kwargs

    tiny.sample(pipe, callback_on_step_end=callback)
    assert [len(report.steps) for report in seen] == list(range(1, STEPS + 1))


def test_report_of_a_finished_run_survives_a_broken_one(pipe):
    """Another size breaks in its first call: costs still belong to the run that is reported."""
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe, config=fixed(1, 2))
    tiny.sample(pipe)
    before = handle.report
    record.raises = True
    with pytest.raises(RuntimeError, match="broken"):
        tiny.sample(pipe, size=(16, 16))
    record.raises = False
    after = handle.report
    assert after.steps == before.steps and after.tokens == before.tokens and after.flops == before.flops


def test_flux_pipeline_is_the_one_tested(pipe):
    assert type(pipe) is FluxPipeline


@pytest.mark.parametrize(
    ("settings", "steps", "word"),
    [
        ({"threshold": 1e-12}, 6, "no step used large patches.*Raise"),
        ({"threshold": 1e9}, 6, "every step after the warm-up.*Lower"),
        ({"threshold": 1e9}, 3, "all 3 belong to the warm-up of 3"),
        ({"threshold": 0.0}, 6, None),
        ({"threshold": 1e9, "scales": (1,)}, 3, None),
        ({"policy": "fixed", "steps": (2,)}, 6, None),
        ({"speedup": 1.0}, 6, None),
    ],
)
def test_a_run_that_no_dynamic_schedule_is_for_is_remarked_once(settings, steps, word, recwarn):
    pipe = tiny.pipeline()
    with ddit.apply(pipe, config=ScheduleConfig(**settings)):
        for _ in range(2):
            tiny.sample(pipe, steps=steps)
    said = [str(w.message) for w in recwarn.list if "patches" in str(w.message)]
    assert len(said) == (word is not None)
    assert word is None or re.search(word, said[0])
