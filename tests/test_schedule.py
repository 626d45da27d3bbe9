"""The rule: differences, patches, quantile and choice, against hand-computed values and the paper's formulas."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from ddit.config import ScheduleConfig
from ddit.dial import make_policy
from ddit.schedule import (
    Moment,
    channel_moments,
    choose_scale,
    difference,
    difference_per_sigma,
    growth,
    patch_deviation,
    project,
    statistic,
    statistics,
)
from ddit.state import Generation


def path(length, shape=(2, 3, 8, 12), seed=0, dtype=torch.float32):
    """A random trajectory with noise of order one."""
    return [*torch.randn(length, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)]


# --- the paper's formulas, again, in float64 ---


def paper_difference(z, order):
    """``dz_t = z_t - z_{t+1}`` and so on, where t counts down: z[-1] is the newest."""
    z = [np.asarray(t, dtype=np.float64) for t in z]
    t = len(z) - 1

    def d1(i):
        return z[i] - z[i - 1]

    def d2(i):
        return d1(i) - d1(i - 1)

    def d3(i):
        return d2(i) - d2(i - 1)

    return {1: d1, 2: d2, 3: d3}[order](t)


def forecast_error(v, levels, ahead=None):
    """How far the last velocity is from a polynomial through the others; or one still ahead."""
    nodes, target = (v[:-1], v[-1]) if ahead is None else (v[1:], ahead[1])
    where, here = (levels[:-1], levels[-1]) if ahead is None else (levels[1:], ahead[0])
    if not nodes:
        return target
    table = np.stack([np.asarray(x, dtype=np.float64) for x in nodes])
    line = np.polyfit(np.array(where), table.reshape(len(nodes), -1), len(nodes) - 1)
    powers = here ** np.arange(len(nodes) - 1, -1, -1)
    return np.asarray(target, dtype=np.float64) - (powers @ line).reshape(target.shape)


def paper_statistic(d, patch, percentile):
    """Quantile over patches of the deviation inside a patch, patch by patch."""
    deviations = []
    for sample in d:
        frames = sample[:, None] if sample.ndim == 3 else sample
        height, width = frames.shape[-2:]
        pad = ((0, 0), (0, 0), (0, -height % patch), (0, -width % patch))
        frames = np.pad(frames, pad, mode="edge")
        deviations.append(
            [
                frames[:, f, y : y + patch, x : x + patch].std()
                for f in range(frames.shape[1])
                for y in range(0, frames.shape[2], patch)
                for x in range(0, frames.shape[3], patch)
            ]
        )
    return np.quantile(np.array(deviations), percentile, axis=1)


# --- differences ---


def test_third_difference_by_hand():
    """1, 2, 4, 9: first differences 1, 2, 5; second 1, 3; third 2."""
    z = [torch.tensor([[[[float(v)]]]]) for v in (1, 2, 4, 9)]
    values = [difference(z, order).item() for order in (1, 2, 3)]
    assert values == [5, 3, 2]


def test_only_the_newest_latents_count():
    z = path(7)
    assert torch.equal(difference(z), difference(z[-4:]))


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 3, 2, 8, 12), (1, 4, 9, 7), (3, 1, 2, 5, 11)])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_plain_is_the_papers_formula(order, shape):
    """Also for videos and for grids that the patch does not divide."""
    z = path(6, shape, seed=order)
    ours = difference(z, order)
    theirs = paper_difference(z, order)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for scale in (2, 4):
        for rho in (0.0, 0.4, 1.0):
            expected = paper_statistic(theirs, 2 * scale, rho)
            np.testing.assert_allclose(statistic(channel_moments(ours), 2 * scale, rho), expected, rtol=1e-5)


UNEVEN = [-3.0, -1.5, -1.2]


def levels(*values):
    """Levels of two samples, the second one's all lower and closer."""
    return [list(values), [x / 2 - 1 for x in values]]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_per_sigma_is_the_error_of_a_forecast(order):
    """By the other nodes, wherever they lie."""
    v = path(order, seed=order)
    ours = difference_per_sigma(v, levels(*UNEVEN[:order]))
    for sample, where in enumerate(levels(*UNEVEN[:order])):
        theirs = forecast_error([x[sample] for x in v], where)
        np.testing.assert_allclose(ours[sample], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_per_sigma_equals_plain_by_an_even_step(order):
    z = path(order + 1)
    v = [new - old for old, new in pairwise(z)]
    ours = difference_per_sigma(v, levels(*[0.1, 0.2, 0.3][:order]))
    torch.testing.assert_close(ours, difference(z, order), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_growth_gives_the_error_of_a_forecast_still_ahead(order):
    """Of velocities that are a polynomial of degree order - 1, from nodes wherever they lie."""
    c = path(order, (1, 2, 8, 8), dtype=torch.float64)

    def velocity(level):
        return torch.stack([c[k] * level**k for k in range(order)]).sum(0)

    for nodes, here in (([-3.0, -2.0, -1.5], -1.4), ([-3.0, -1.0, -0.5], 2.0)):
        nodes = nodes[:order]
        v = [velocity(x) for x in nodes]
        ours = difference_per_sigma(v, [nodes]) * growth(nodes, here)
        theirs = forecast_error(v, nodes, (here, velocity(here)))
        if order == 1:  # nothing is forecast: the velocity itself
            theirs = v[0].numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_growth_by_hand():
    """Even steps: triangular numbers for order 3, whole numbers for order 2."""
    assert [growth([1.0, 2.0, 3.0], 3.0 + n) for n in (1, 2, 3, 4)] == [1, 3, 6, 10]
    assert [growth([2.0, 3.0], 3.0 + n) for n in (1, 2, 3)] == [1, 2, 3]
    assert growth([3.0], 9.0) == 1


def test_a_constant_velocity_has_no_difference():
    (v,) = path(1)
    for order in (2, 3):
        assert difference_per_sigma([v] * order, levels(*UNEVEN[:order])).abs().max() < 1e-6


def test_too_few_latents_are_refused():
    with pytest.raises(ValueError, match="needs 4 latents, there are 3"):
        difference(path(3))


# --- patches and quantile ---


def test_deviation_by_hand():
    """Two 2 x 2 patches: 0 0 / 0 4 has population deviation sqrt(3), a constant one has 0."""
    values = torch.tensor([[[[0.0, 0.0, 7.0, 7.0], [0.0, 4.0, 7.0, 7.0]]]])
    torch.testing.assert_close(patch_deviation(channel_moments(values), 2), torch.tensor([[math.sqrt(3), 0.0]]))


def test_deviation_runs_over_channels():
    """Channels are part of a patch: constant 1 and 3 deviate by 1."""
    values = torch.stack([torch.full((4, 4), 1.0), torch.full((4, 4), 3.0)])[None]
    torch.testing.assert_close(patch_deviation(channel_moments(values), 2), torch.ones(1, 4))


def test_a_grid_that_does_not_divide_is_continued_by_its_edge():
    """One row of 0 1 2, patches of 2: the last patch repeats the 2."""
    values = torch.tensor([[[[0.0, 1.0, 2.0]]]])
    torch.testing.assert_close(patch_deviation(channel_moments(values), 2), torch.tensor([[0.5, 0.0]]))


def test_patches_lie_inside_one_frame():
    """A video whose frames are constant, each at its own level, has no deviation."""
    values = torch.arange(3.0).reshape(1, 1, 3, 1, 1).expand(1, 2, 3, 4, 4)
    assert torch.equal(patch_deviation(channel_moments(values), 2), torch.zeros(1, 12))


def test_samples_are_independent():
    d = path(1, (3, 2, 8, 8))[0]
    together = statistic(channel_moments(d), 4, 0.4)
    torch.testing.assert_close(
        together, torch.cat([statistic(channel_moments(d[b : b + 1]), 4, 0.4) for b in range(3)])
    )


def test_ties_in_the_quantile():
    """Half of the patches flat: every quantile up to the last flat one is exactly 0."""
    d = torch.zeros(1, 1, 4, 8)
    d[..., 4:] = path(1, (1, 1, 4, 4))[0]
    assert statistic(channel_moments(d), 2, 0.4).item() == 0
    assert statistic(channel_moments(d), 2, 1.0).item() > 0


def test_statistics_skip_scale_one():
    d = path(1)[0]
    table = statistics(d, 2, (1, 2, 4), 0.4)
    assert [set(row) for row in table] == [{2, 4}] * 2
    assert [row[4] for row in table] == statistic(channel_moments(d), 8, 0.4).tolist()
    assert statistics(d, 2, (1,), 0.4) == [{}, {}]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_refused_with_a_reason(value):
    z = path(4)
    z[-1][1, 0, :] = value
    with pytest.raises(ValueError, match="NaN"):
        statistics(difference(z), 2, (1, 2, 4), 0.4)


# --- choice ---


@pytest.mark.parametrize(
    ("stats", "chosen"),
    [
        ({}, 1),
        ({2: 0.5, 4: 0.5}, 4),
        ({2: 0.5, 4: 1.0}, 2),  # equal to the threshold is not below it
        ({2: 1.0, 4: 1.0}, 1),
        ({2: 2.0, 4: 0.5}, 4),  # the largest that may be used, whatever lies between
        ({2: math.nextafter(1.0, 0), 4: 3.0}, 2),
    ],
)
def test_choice_at_threshold_one(stats, chosen):
    assert choose_scale(stats, 1.0) == chosen


def test_threshold_zero_chooses_scale_one_even_for_a_flat_difference():
    assert choose_scale({2: 0.0, 4: 0.0}, 0.0) == 1


def test_dynamic_policy_warms_up():
    policy = make_policy(ScheduleConfig(warmup=4, warmup_scale=2, threshold=1.0))
    stats = [{2: 0.0, 4: 0.0}, {2: 0.0, 4: 9.0}, {2: 9.0, 4: 9.0}]
    assert policy.choose(Moment(3, None, stats)) == [2, 2, 2]
    assert policy.choose(Moment(4, None, stats)) == [4, 2, 1]


def test_fixed_policy_holds_its_last_scale():
    policy = make_policy(ScheduleConfig(policy="fixed", steps=(4, 2, 1)))
    assert [policy.choose(Moment(i, None, [{}, {}])) for i in range(5)] == [[4, 4], [2, 2], [1, 1], [1, 1], [1, 1]]


@pytest.mark.parametrize(("fraction", "coarse"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_first_policy_counts_steps(fraction, coarse):
    policy = make_policy(ScheduleConfig(policy="first", fraction=fraction, scales=(1, 2)))
    assert [policy.choose(Moment(i, 8, [{}]))[0] for i in range(8)] == [2] * coarse + [1] * (8 - coarse)


def test_first_policy_needs_the_number_of_steps():
    policy = make_policy(ScheduleConfig(policy="first"))
    with pytest.raises(ValueError, match="number of steps"):
        policy.choose(Moment(0, None, [{}]))


# --- latents below float32 ---


def test_projection_recovers_a_step_in_the_span():
    """Two guidance passes mixed at scale 4, per sample its own step."""
    cond, uncond = path(2, (2, 4, 16, 16))
    step = torch.tensor([-0.02, 0.05]).reshape(2, 1, 1, 1) * (uncond + 4 * (cond - uncond))
    torch.testing.assert_close(project(step, [cond, uncond]), step, rtol=1e-4, atol=1e-6)


def test_projection_survives_two_equal_velocities():
    (v,) = path(1)
    torch.testing.assert_close(project(0.02 * v, [v, v]), 0.02 * v, rtol=1e-4, atol=1e-6)


def test_projection_removes_rounding():
    """bfloat16 latents moved by 0.02 v: rounding is cut at least tenfold."""
    z, v = path(2, (1, 4, 32, 32))
    z = z.bfloat16()
    moved = (z.float() + 0.02 * v).bfloat16()
    raw = moved.float() - z.float()
    error = (project(raw, [v]) - 0.02 * v).std()
    assert (raw - 0.02 * v).std() > 1e-3
    assert error < (raw - 0.02 * v).std() / 10


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("guidance", "floor"), [(None, 2.5e-4), (2.0, 4e-4)])
def test_rounded_latents_do_not_drown_the_signal(guidance, floor, order):
    """A straight path in bfloat16 has third difference zero; its plain difference reads several times tau."""
    config = ScheduleConfig(threshold=0.0, order=order)
    policy = make_policy(config)
    start, cond, uncond = path(3, (1, 16, 64, 64))
    v = cond.float() if guidance is None else torch.lerp(uncond.float(), cond.float(), guidance)
    generation, history = Generation(config), []
    for i in range(50):
        sigma = 1 - i / 50
        z = (start.float() - (1 - sigma) * v).bfloat16()
        generation.decide(z, sigma, policy, 2, None)
        history.append(z)
        for velocity in [cond] if guidance is None else [cond, uncond]:
            generation.record(velocity.bfloat16(), 0.0)
    kept = [step.statistics[0] for step in generation.steps]
    naive = [statistics(difference(history[:i]), 2, (1, 2, 4), 0.4) for i in range(4, 51, 5)]
    assert kept[:order] == [{}] * order
    assert max(max(stats.values()) for stats in kept[order:]) < floor
    assert min(min(stats.values()) for stats, *_ in naive) > 5e-3


def test_float32_latents_are_followed_exactly():
    """No projection where nothing is rounded: a curved path keeps its difference."""
    config = ScheduleConfig(threshold=0.0, difference="plain", order=3)
    z = path(6)
    generation = Generation(config)
    for i, latents in enumerate(z):
        generation.decide(latents, 1 - i / 50, make_policy(config), 2, None)
        generation.record(torch.zeros_like(latents), 0.0)
    expected = statistics(difference(z), 2, config.scales, config.percentile)
    assert [dict(s) for s in generation.steps[-1].statistics] == expected
