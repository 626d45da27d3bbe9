"""Settings: what is refused, and that they survive being written down."""

import dataclasses
import json
import math

import pytest

from ddit.config import ScheduleConfig

NAN, INF = math.nan, math.inf

REFUSED = {
    "threshold": [-1e-9, -1, NAN, INF, -INF, True, "0.1", None],
    "percentile": [-0.01, 1.01, NAN, INF, False, "0.4", None],
    "fraction": [-0.01, 1.01, NAN, INF, True, None],
    "gain": [-0.01, 1.01, NAN, True],
    "order": [0, 4, -1, 1.5, 2.0, True, "3", None],
    "scales": [(), (2, 4), (1, 3), (1, 2, 2), (1, 1), (0, 1), (-2, 1), (1, 2.0), (1, True), "12", 2, None],
    "warmup": [1, 0, -1, 3.0, True],
    "warmup_scale": [3, 0, 8, 2.0, True, None],
    "steps": [(2, 3), (8,), (0,), (True,), (1.0,), 2, "21"],
    "policy": ["", "Dynamic", "other", None, 1, []],
    "start": ["pool", None],
    "positions": ["centre", None],
    "difference": ["persigma", None],
    "anchored": [1, None, "yes"],
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in REFUSED.items() for v in values])
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name}|is not a scale"):
        ScheduleConfig(**{name: value})


@pytest.mark.parametrize("name", ["threshold", "percentile", "fraction", "gain"])
def test_the_message_gives_the_range(name):
    with pytest.raises(ValueError, match=r"-3.*(in \[0, 1\]|at least 0)"):
        ScheduleConfig(**{name: -3})  # type: ignore[arg-type]


def test_bounds_of_a_range_are_allowed():
    ScheduleConfig(threshold=0, percentile=0, fraction=1)
    ScheduleConfig(threshold=5, percentile=1, fraction=0)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_warmup_covers_the_order(order):
    assert ScheduleConfig(order=order, warmup=order).warmup == order
    if order > 1:
        with pytest.raises(ValueError, match=f"needs {order + 1} latents"):
            ScheduleConfig(order=order, warmup=order - 1)


def test_what_is_not_given_suits_who_places_the_steps():
    rule, budget, given = ScheduleConfig(), ScheduleConfig(speedup=2.0), ScheduleConfig(policy="first")
    assert (rule.warmup, rule.gain) == (3, 0.0) and (budget.warmup, budget.gain) == (2, 0.0)
    assert (given.warmup, given.gain) == (3, 0.5)
    given = ScheduleConfig(speedup=2.0, warmup=5, gain=0.25)
    assert (given.warmup, given.gain) == (5, 0.25)
    assert ScheduleConfig.from_dict(budget.to_dict()) == budget


def test_fixed_needs_steps():
    with pytest.raises(ValueError, match=r"needs steps"):
        ScheduleConfig(policy="fixed")
    assert ScheduleConfig(policy="fixed", steps=(2, 1)).steps == (2, 1)


def test_steps_outside_scales_are_refused_and_named():
    with pytest.raises(ValueError, match=r"steps use \[4\].*\(1, 2\)"):
        ScheduleConfig(policy="fixed", scales=(1, 2), steps=(4, 2, 1))


def test_warmup_scale_outside_scales_is_refused():
    with pytest.raises(ValueError, match=r"warmup_scale is 4.*\(1, 2\)"):
        ScheduleConfig(scales=(1, 2), warmup_scale=4)


def test_lists_become_tuples_and_scales_are_sorted():
    config = ScheduleConfig(policy="fixed", scales=[4, 1, 2], steps=[4, 2, 1])  # type: ignore[arg-type]
    assert config.scales == (1, 2, 4)
    assert config.steps == (4, 2, 1)


def test_defaults():
    config = ScheduleConfig()
    assert (config.threshold, config.percentile, config.order, config.scales) == (4e-3, 0.4, 3, (1, 2, 4))
    assert (config.policy, config.difference) == ("dynamic", "per-sigma")


@pytest.mark.parametrize(
    "config",
    [
        ScheduleConfig(),
        ScheduleConfig(policy="fixed", steps=(4, 2, 1), positions="interpolated", start="bilinear"),
        ScheduleConfig(order=1, warmup=7, warmup_scale=2, scales=(1, 2, 8), difference="plain", anchored=False),
    ],
)
def test_round_trip(config):
    assert ScheduleConfig.from_dict(config.to_dict()) == config
    assert ScheduleConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_to_dict_has_every_field():
    assert set(ScheduleConfig().to_dict()) == {field.name for field in dataclasses.fields(ScheduleConfig)}


def test_unknown_settings_are_refused_and_the_known_ones_listed():
    with pytest.raises(ValueError, match=r"\['tau'\].*threshold"):
        ScheduleConfig.from_dict({"tau": 1e-3})


def test_positional_arguments_are_refused():
    with pytest.raises(TypeError):
        ScheduleConfig("dynamic")  # type: ignore[misc]


def test_frozen_and_hashable():
    config = ScheduleConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.threshold = 1.0  # type: ignore[misc]
    assert hash(config) == hash(ScheduleConfig())
