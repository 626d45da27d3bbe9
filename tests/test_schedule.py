"""The rule: differences, patches, quantile and choice, against hand-computed values and the paper's formulas."""

import math

import numpy as np
import pytest
import torch

from ddit.config import FixedSchedule, PatchSchedule
from ddit.path import project, unrounded
from ddit.run import RunState
from ddit.schedule import (
    Fixed,
    Rule,
    StepContext,
    below_noise,
    channel_moments,
    choose_scale,
    difference,
    held_scale,
    noise_guard,
    patch_deviation,
    statistic,
    statistics,
)


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


def paper_statistic(d, patch, percentile):
    """Quantile over patches of the deviation inside a patch, patch by patch."""
    deviations = []
    for sample in d:
        frames = sample.reshape(len(sample), *[1] * (4 - sample.ndim), *sample.shape[1:])  # sound: one row, continued
        height, width = frames.shape[-2:]
        pad = ((0, 0), (0, 0), (0, -height % patch), (0, -width % patch))
        frames = np.pad(frames, pad, mode="symmetric")
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


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 3, 2, 8, 12), (1, 4, 9, 7), (3, 1, 2, 5, 11), (2, 4, 13)])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_plain_is_the_papers_formula(order, shape):
    """Also for videos, for sound, and for grids that the patch does not divide."""
    z = path(6, shape, seed=order)
    ours = difference(z, order)
    theirs = paper_difference(z, order)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for scale in (2, 4):
        for rho in (0.0, 0.4, 1.0):
            expected = paper_statistic(theirs, 2 * scale, rho)
            np.testing.assert_allclose(statistic(channel_moments(ours), 2 * scale, rho), expected, rtol=1e-5)


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
def test_broken_latents_lie_below_no_threshold(value):
    z = path(4)
    z[-1][1, 0, :] = value
    sound, broken = statistics(difference(z), 2, (1, 2, 4), 0.4)
    assert all(map(math.isfinite, sound.values())) and all(map(math.isnan, broken.values()))
    assert choose_scale(sound, 1e9) == 4 and choose_scale(broken, 1e9) == 1


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


def test_the_rule_warms_up():
    rule = Rule(PatchSchedule(warmup=4, threshold=1.0))
    stats = [{2: 0.0, 4: 0.0}, {2: 0.0, 4: 9.0}, {2: 9.0, 4: 9.0}]
    assert rule.choose(StepContext(3, None, stats)) == [1, 1, 1]
    assert rule.choose(StepContext(4, None, stats)) == [4, 2, 1]


def test_a_fixed_schedule_holds_its_last_scale():
    policy = Fixed(FixedSchedule(steps=(4, 2, 1)))
    chosen = [policy.choose(StepContext(i, None, [{}, {}])) for i in range(5)]
    assert chosen == [[4, 4], [2, 2], [1, 1], [1, 1], [1, 1]]


def test_what_is_dropped_lies_below_the_noise_by_hand():
    """h = .075 at 2p: .1 of signal per dropped coefficient, 1 % of the noise at sigma = sqrt(10) (1 - sigma)."""
    edge = 10**0.5 / (1 + 10**0.5)
    assert below_noise(edge + 1e-6, 0.075, 2) and not below_noise(edge - 1e-6, 0.075, 2)
    assert below_noise(1.0, 100.0, 4)  # pure noise holds no detail


def test_along_one_axis_less_noise_is_dropped():
    """h = .1 at 2p: half of the noise and .2 of signal per dropped coefficient; 1 % at sigma = sqrt(20) (1 - sigma)."""
    edge = 20**0.5 / (1 + 20**0.5)
    assert below_noise(edge + 1e-6, 0.1, 2, 1) and not below_noise(edge - 1e-6, 0.1, 2, 1)


def test_where_nobody_has_measured_sound_all_of_it_counts_as_detail():
    flat, edge = [{2: 0.0}], 200**0.5 / (1 + 200**0.5)
    rule = Rule(PatchSchedule(threshold=1.0), noise_guard({}, axes=1))
    assert [rule.choose(StepContext(5, None, flat, sigma=edge + off)) for off in (-1e-4, 1e-4)] == [[1], [2]]
    assert Rule(PatchSchedule(threshold=1.0), noise_guard({})).choose(
        StepContext(5, None, flat, sigma=edge - 1e-4)
    ) == [2]


def test_a_switch_is_no_evidence():
    """Steps of two sizes lie in the difference: the size stays, or falls to what is allowed."""
    assert held_scale([1, 1, 1], [2, 4]) is None and held_scale([4, 4, 4], [2, 4]) is None
    assert held_scale([1, 1, 4], [2, 4]) == 4 and held_scale([1, 4, 1], [2, 4]) == 1
    assert held_scale([1, 4, 4], [2]) == 2 and held_scale([1, 4, 4], []) == 1
    bent, flat = [{2: 9.0, 4: 9.0}], [{2: 0.0, 4: 0.0}]
    before = [[1], [1], [1], [4]]
    for settle, kept in ((True, [4]), (False, [1])):
        rule = Rule(PatchSchedule(threshold=1.0, settle=settle))
        assert rule.choose(StepContext(4, None, bent, chosen=before)) == kept
        assert rule.choose(StepContext(6, None, bent, chosen=[*before, [4], [4]])) == [1]
        assert rule.choose(StepContext(3, None, flat, chosen=before[:3])) == [4]
        # UniPC's moves are made of two answers before as well.
        assert rule.choose(StepContext(6, None, bent, chosen=[*before, [4], [4]], remembers=3)) == kept


@pytest.mark.parametrize(("careful", "late"), [(True, 1), (False, 4)])
def test_a_careful_rule_keeps_full_steps_once_detail_shows(careful, late):
    rule = Rule(PatchSchedule(threshold=1.0, careful=careful), noise_guard({2: 0.05, 4: 0.15}))
    flat = [{2: 0.0, 4: 0.0}]
    assert rule.choose(StepContext(5, None, flat, sigma=0.95)) == [4]
    assert rule.choose(StepContext(5, None, flat, sigma=0.3)) == [late]
    assert Rule(PatchSchedule(threshold=1.0)).choose(StepContext(5, None, flat, sigma=0.3)) == [4]


# --- latents below float32 ---


def test_projection_recovers_a_step_in_the_span():
    """Two guidance passes mixed at scale 4, per sample its own step."""
    cond, uncond = path(2, (2, 4, 16, 16))
    step = torch.tensor([-0.02, 0.05]).reshape(2, 1, 1, 1) * (uncond + 4 * (cond - uncond))
    torch.testing.assert_close(project(step, [cond, uncond]), step, rtol=1e-4, atol=1e-6)


def test_projection_survives_two_equal_velocities():
    (v,) = path(1)
    torch.testing.assert_close(project(0.02 * v, [v, v]), 0.02 * v, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("euler", [True, False])
def test_rounding_is_dropped_and_what_others_moved_is_seen(euler):
    """Of three pictures, nobody touched the first; of the second most was put back; the third was changed all over."""
    v, w, z, other = torch.randn(4, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    before = z.bfloat16().float()
    exact = 0.08 * v - (0 if euler else 0.06 * w)
    step = exact.clone()
    step[1, :, 8:] = 0.05 * other[1, :, 8:]
    step[2] += 0.1
    after = (before + step).bfloat16().float()
    given, jump = ([v], 0.08) if euler else ([v, w], None)
    found = unrounded(after - before, given, jump, 2**-8 * after.abs())
    torch.testing.assert_close(found[0], exact[0], rtol=0, atol=2e-4)
    if euler:  # what is known of a picture says nothing against large patches
        torch.testing.assert_close(found[1], exact[1])
    assert torch.equal(found[2], (after - before)[2])


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
    schedule = PatchSchedule(threshold=0.0, order=order)
    start, cond, uncond = path(3, (1, 16, 64, 64))
    v = cond.float() if guidance is None else torch.lerp(uncond.float(), cond.float(), guidance)
    run, history = RunState(Rule(schedule), schedule), []
    for i in range(50):
        sigma = 1 - i / 50
        z = (start.float() - (1 - sigma) * v).bfloat16()
        run.decide(z, sigma, 2)
        history.append(z)
        for velocity in [cond] if guidance is None else [cond, uncond]:
            run.record(velocity.bfloat16(), [1], 0.0)
    kept = [step.statistics[0] for step in run.log.steps]
    naive = [statistics(difference(history[:i]), 2, (1, 2, 4), 0.4) for i in range(4, 51, 5)]
    assert kept[:order] == [{}] * order
    assert max(max(stats.values()) for stats in kept[order:]) < floor
    assert min(min(stats.values()) for stats, *_ in naive) > 5e-3


def test_float32_latents_are_followed_exactly():
    """No projection where nothing is rounded: a curved path keeps its difference."""
    schedule = PatchSchedule(threshold=0.0)
    z = path(6)
    run = RunState(Rule(schedule), schedule)
    for i, latents in enumerate(z):
        run.decide(latents, 1 - i / 50, 2)
        run.record(torch.zeros_like(latents), [1, 1], 0.0)
    expected = statistics(difference(z), 2, schedule.scales, schedule.percentile)
    assert [dict(s) for s in run.log.steps[-1].statistics] == expected


def test_one_broken_number_breaks_the_statistic():
    """Sorted it lies last, beyond the quantile."""
    values = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    values[1, 0, 3, 5] = float("nan")
    whole, broken = statistics(values, 2, (1, 2, 4), 0.4)
    assert all(math.isfinite(value) for value in whole.values()) and all(map(math.isnan, broken.values()))
    assert choose_scale(broken, 1e9) == 1
