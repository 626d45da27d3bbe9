"""One way from words, those of the command line and of races, to the arguments of `ddit.apply`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ddit.config import FULL, Coarse, FixedSchedule, Patches, PatchSchedule, PlannedSchedule, SkipSchedule
from ddit.preset import Preset

if TYPE_CHECKING:
    from ddit.pipelines.generate import Method

KINDS = ("rule", "paper", "full")
"""Of patches by name: the model's preset or the rule; the rule as the paper has it; none."""
RULE = tuple(field.name for field in fields(PatchSchedule) if field.name != "coarse")
"""Fields of `PatchSchedule` but for those of `COARSE`."""
COARSE = tuple(field.name for field in fields(Coarse))
SKIP = {"speedup": "speedup", "quality": "quality", "skip_threshold": "threshold"}
"""Word -> field of `SkipSchedule`."""
PLANNED = ("scales", "careful")
"""Fields of `PatchSchedule` that `PlannedSchedule` has too."""
WORDS = ("patches", "schedule", "patch_speedup", *RULE, *COARSE, *SKIP, "adapter", "cache")
"""All words."""

Loader = Callable[[str], Any]


def make_method(
    values: Mapping[str, Any], preset: Preset, *, load_adapter: Loader, adapter: str | None = None
) -> Method:
    """Settings by name, to what they stand for; what is not given is the preset's.

    Args:
        values: Word (`WORDS`) -> value.
        load_adapter: Called with a name.
        adapter: Name of the one to take in place of the preset's, where steps can use any and no word names another.

    Raises:
        ValueError: For unknown words, and words that have no meaning together.
    """
    from ddit.caches import make_cache
    from ddit.pipelines.generate import Method

    unknown = sorted(set(values) - set(WORDS))
    if unknown:
        raise ValueError(f"unknown settings {unknown}; allowed are {', '.join(WORDS)}")
    given = {name: value for name, value in values.items() if value is not None}
    if adapter is not None and given.get("patches") != "full":
        given = {"adapter": adapter, **given}
    suits = given.get("patches", "rule") == "rule" and not set(COARSE) & set(given)
    name = given.get("adapter", preset.adapter if suits else "")
    if given.get("adapter") == "":
        raise ValueError("adapter is empty; name its folder or hub id, or say none")
    if "adapter" in given and name != "none" and given.get("patches") == "full":
        _refuse(["adapter"], "patches=full, which has none")
    loaded = None if name in ("", "none") else load_adapter(name)
    cache = make_cache(given["cache"], preset.teacache) if "cache" in given else None
    patches = None if planned_jointly(given, preset) else patches_of(given, preset)
    return Method(patches=patches, skip=skip_of(given), adapter=loaded, cache=cache, preset=preset)


def planned_jointly(given: Mapping[str, Any], preset: Preset) -> bool:
    """Whether a wish is planned over patches and skipping: nothing is said of patches, and there is a profile."""
    said = {"patches", "schedule", "patch_speedup", *RULE, *COARSE} & set(given)
    return bool({"speedup", "quality"} & set(given)) and not said and preset.profile is not None


def patches_of(given: Mapping[str, Any], preset: Preset) -> Patches:
    """The schedule of patches.

    Raises:
        ValueError: For words that have no meaning together.
    """
    rule = {name: given[name] for name in RULE if name in given}
    coarse = {name: given[name] for name in COARSE if name in given}
    kind = given.get("patches", "rule")
    if kind not in KINDS:
        raise ValueError(f"patches is {kind!r}; it must be one of {', '.join(KINDS)}")
    if "schedule" in given:
        _refuse([*rule, *({"patches", "patch_speedup"} & set(given))], "a schedule, which is a list of scales")
        return FixedSchedule(steps=given["schedule"], coarse=_form(preset.patches.coarse, coarse))
    if "patch_speedup" in given:
        _refuse([*(set(rule) - set(PLANNED)), *({"patches"} & set(given))], "patch_speedup, which plans the steps")
        return _planned(preset.patches, {**rule, "speedup": given["patch_speedup"]}, coarse)
    if kind == "full":
        _refuse([*rule, *coarse], "patches=full, which has none")
        return FULL
    if kind == "paper":
        _refuse(coarse, "patches=paper, which has its own")
        return PatchSchedule.paper(**rule)
    if "patches" in given and not isinstance(preset.patches, PatchSchedule):  # the rule was asked for by its name
        return PatchSchedule(**rule, coarse=_form(preset.patches.coarse, coarse))
    if not rule and not coarse:
        return preset.patches
    if isinstance(preset.patches, PlannedSchedule) and set(rule) <= set(PLANNED):
        return _planned(preset.patches, rule, coarse)
    own = preset.patches if isinstance(preset.patches, PatchSchedule) else PatchSchedule()
    base = {field.name: getattr(own, field.name) for field in fields(own)}
    return PatchSchedule(**{**base, **rule, "coarse": _form(own.coarse, coarse)})


def _planned(own: Patches, given: Mapping[str, Any], coarse: Mapping[str, Any]) -> PlannedSchedule:
    """A plan with what is given, else as the preset has it."""
    names = ("speedup", *PLANNED) if isinstance(own, PlannedSchedule) else PLANNED
    known = {} if isinstance(own, FixedSchedule) else {name: getattr(own, name) for name in names}
    return PlannedSchedule(**{**known, **given, "coarse": _form(own.coarse, coarse)})


def _form(own: Coarse, given: Mapping[str, Any]) -> Coarse:
    """How coarse steps are made: as given, else as the preset has it."""
    return Coarse.from_dict({**own.to_dict(), **given})


def skip_of(given: Mapping[str, Any]) -> SkipSchedule | None:
    """The skip schedule, if there is one.

    Raises:
        ValueError: For several at once.
    """
    asked = {field: given[word] for word, field in SKIP.items() if word in given}
    return SkipSchedule(**asked) if asked else None


def _refuse(idle: Any, beside: str) -> None:
    if idle:
        raise ValueError(f"{', '.join(idle)} would have no effect beside {beside}; leave one of them out")
