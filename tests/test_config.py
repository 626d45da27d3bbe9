"""Settings: what is refused, and that they survive being written down."""

import dataclasses
import json
import math

import pytest

from ddit.config import FULL, PAPER, Coarse, FixedSchedule, PatchSchedule, SkipSchedule
from ddit.pipelines.methods import make_method
from ddit.preset import Preset

NAN, INF = math.nan, math.inf

RULE = {
    "threshold": [-1e-9, -1, NAN, INF, -INF, True, "0.1", None],
    "percentile": [-0.01, 1.01, NAN, INF, False, "0.4", None],
    "order": [0, 4, -1, 1.5, 2.0, True, "3", None],
    "scales": [(), (2, 4), (1, 3), (1, 2, 2), (1, 1), (0, 1), (-2, 1), (1, 2.0), (1, True), "12", 2, None],
    "warmup": [1, 0, -1, 3.0, True],
    "careful": [1, None, "yes"],
    "coarse": [None, "bilinear", 1],
}
STEPS = [(), (2, 3), (0,), (-1,), (True,), (1.0,), 2, "21", None]
SKIP = {"threshold": [-1, NAN, INF, True, "0.1"], "speedup": [0, 0.99, -2, NAN, INF, True], "quality": [-1, NAN, "x"]}
COARSE = {"start": ["pool", None], "positions": ["centre", None]}


def cases(table):
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), cases(RULE))
def test_a_rule_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name}|is not a scale"):
        PatchSchedule(**{name: value})


@pytest.mark.parametrize("value", STEPS)
def test_steps_that_are_no_scales_are_refused(value):
    with pytest.raises(ValueError, match=r"steps|is not a scale"):
        FixedSchedule(steps=value)


@pytest.mark.parametrize(("name", "value"), cases(SKIP))
def test_a_skip_schedule_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        SkipSchedule(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(COARSE))
def test_an_unknown_form_is_refused_and_the_known_ones_listed(name, value):
    with pytest.raises(ValueError, match=rf"{name} is .*must be one of"):
        Coarse(**{name: value})


@pytest.mark.parametrize("given", [{}, {"threshold": 0.1, "speedup": 2}, {"quality": 40, "speedup": 2}])
def test_a_skip_schedule_is_one_wish(given):
    with pytest.raises(ValueError, match="needs one of threshold, speedup and quality"):
        SkipSchedule(**given)


@pytest.mark.parametrize("name", ["threshold", "percentile"])
def test_the_message_gives_the_range(name):
    with pytest.raises(ValueError, match=r"-3.*(in \[0, 1\]|at least 0)"):
        PatchSchedule(**{name: -3})  # type: ignore[arg-type]


def test_bounds_of_a_range_are_allowed():
    assert PatchSchedule(threshold=0, percentile=0).percentile == 0
    assert PatchSchedule(threshold=5, percentile=1).percentile == 1
    assert SkipSchedule(speedup=1).speedup == 1


@pytest.mark.parametrize("order", [1, 2, 3])
def test_warmup_covers_the_order(order):
    assert PatchSchedule(order=order, warmup=order).warmup == order
    if order > 1:
        with pytest.raises(ValueError, match=f"needs {order + 1} latents"):
            PatchSchedule(order=order, warmup=order - 1)


def test_lists_become_tuples_and_scales_are_sorted():
    assert PatchSchedule(scales=[4, 1, 2]).scales == (1, 2, 4)  # type: ignore[arg-type]
    fixed = FixedSchedule(steps=[4, 2, 4])  # type: ignore[arg-type]
    assert fixed.steps == (4, 2, 4) and fixed.scales == (1, 2, 4)
    assert FULL.scales == (1,)


def test_defaults_are_the_papers_rule():
    rule = PatchSchedule()
    assert (rule.threshold, rule.percentile, rule.order, rule.scales, rule.warmup) == (1e-3, 0.4, 3, (1, 2, 4), 3)


def test_the_paper_to_the_letter():
    paper = PatchSchedule.paper(threshold=0.01)
    assert (paper.threshold, paper.careful, paper.coarse) == (0.01, False, PAPER)
    assert (PAPER.start, PAPER.positions) == ("bilinear", "interpolated")


RECORDS = [
    PatchSchedule(),
    PatchSchedule.paper(order=1, warmup=7, scales=(1, 2, 8)),
    FixedSchedule(steps=(4, 2, 1), coarse=PAPER),
    SkipSchedule(speedup=2.0),
    Coarse(),
]


@pytest.mark.parametrize("record", RECORDS)
def test_round_trip(record):
    kind = type(record)
    assert kind.from_dict(record.to_dict()) == record
    assert kind.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert set(record.to_dict()) == {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("record", RECORDS)
def test_frozen_hashable_and_by_name_only(record):
    name = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, name, 1.0)
    assert hash(record) == hash(dataclasses.replace(record))
    with pytest.raises(TypeError):
        type(record)(1.0)


def test_unknown_settings_are_refused_and_the_known_ones_listed():
    with pytest.raises(ValueError, match=r"\['tau'\].*threshold"):
        PatchSchedule.from_dict({"tau": 1e-3})


@pytest.mark.parametrize(
    ("words", "loaded"),
    [
        ({}, "its own"),
        ({"threshold": 0.1, "speedup": 2}, "its own"),
        ({"adapter": "another"}, "another"),
        ({"adapter": "none"}, None),
        ({"patches": "full"}, None),
        ({"patches": "paper"}, None),
        ({"start": "bilinear"}, None),
    ],
)
def test_a_presets_adapter_is_used_where_it_suits_and_nothing_else_is_said(words, loaded):
    method = make_method(words, Preset(adapter="its own"), load_adapter=str)
    assert method.adapter == loaded
