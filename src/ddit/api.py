"""`apply`: put dynamic patches on a pipeline's transformer, and take them off again."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ddit.adapter import PatchAdapter
from ddit.caches import Config, make_cache
from ddit.config import FULL, Coarse, FixedSchedule, Patches, PatchSchedule, PlannedSchedule, SkipSchedule
from ddit.handle import Handle
from ddit.models import architecture_for
from ddit.models.base import Architecture
from ddit.plan import Plan
from ddit.planned import CoarseError, Planned
from ddit.preset import Preset
from ddit.pretrained import fingerprint
from ddit.profile import error_at
from ddit.run import Skipping
from ddit.schedule import Fixed, Guard, Policy, Rule, detail_error, noise_guard, usual_detail
from ddit.seat import MARK, is_compiled, parallel_config
from ddit.util.tell import warn

if TYPE_CHECKING:
    from ddit.skip.joint import JointPlan

_TRANSFORMERS = ("transformer", "transformer_2")
"""Where a pipeline has them; Wan 2.2 A14B hands over from the first to the second."""


def apply(
    pipe_or_transformer: Any,
    *,
    patches: Patches | Policy | None = None,
    skip: SkipSchedule | None = None,
    speedup: float | None = None,
    quality: float | None = None,
    adapter: PatchAdapter | str | Path | None = None,
    detail_variance: Mapping[int, Sequence[float]] | None = None,
    cache: Config | str | None = None,
    preset: Preset | str | Path | None = None,
) -> Handle:
    """Let a pipeline's transformer change its patch size from step to step (DDiT, arXiv 2602.16968).

    By default the paper's rule decides. Only the instance handed over changes, and only its ``forward``. Applying again
    replaces; a call that raises leaves everything as it was. Two transformers that take turns (Wan 2.2 A14B) share one
    schedule.

    Args:
        pipe_or_transformer: A diffusers pipeline with a supported ``transformer``, or that transformer.
        patches: A `PatchSchedule` (the paper's rule), a `PlannedSchedule` (for a speed), a `FixedSchedule` (a list of
            scales), or a policy of your own (`ddit.schedule.Policy`). By default the preset's, or else
            ``PatchSchedule()``.
        skip: In which steps the model is not called at all. By default in none.
        speedup: How many times less work a run shall take than a plain one. Where the preset has a profile of errors
            (`ddit calibrate` measures it) and ``patches`` is left out, a plan over both mechanisms: each step full,
            with large patches, or skipped (`ddit.skip.joint`). Else patches as above, and as many skipped steps as are
            still needed. Short for ``skip=SkipSchedule(speedup=...)``.
        quality: Likewise for ``skip=SkipSchedule(quality=...)``.
        adapter: A `PatchAdapter`, or the folder or hub id of one: what makes large patches as good as small ones. It
            brings its own form of a coarse step. ``"none"`` is ``None``.
        detail_variance: Scale -> variance per latent channel of the detail inside large patches, measured on the
            model's own samples; by default the adapter's, or else the preset's.
        cache: Of diffusers (``FirstBlockCacheConfig``, ``TaylorSeerCacheConfig``, ``MagCacheConfig``), a
            `ddit.teacache.TeaCacheConfig`, or text as for ``--cache``. A cache that is there already, or comes later
            with ``transformer.enable_cache``, works as well.
        preset: What `ddit calibrate` measured on the model, the folder that holds it, or ``"paper"``; by default that
            of the folder that the pipeline was loaded from, if there is one.

    Returns:
        A handle with ``.report`` and ``.remove()``; in a ``with`` block it removes itself.

    Raises:
        ValueError: For an unsupported model, settings that can't be honoured together, an adapter of another base model
            or without the schedule's scales, variances that don't fit the scales, or a cache that does not work here.
    """
    if speedup is not None or quality is not None:
        if skip is not None:
            raise ValueError("skip says already when to skip; leave out speedup and quality, or skip")
        skip = SkipSchedule(speedup=speedup, quality=quality)
    found = [model for model in (getattr(pipe_or_transformer, n, None) for n in _TRANSFORMERS) if model is not None]
    transformers = found or [pipe_or_transformer]
    plan = _settle(
        [architecture_for(transformer) for transformer in transformers],
        transformers,
        pipe_or_transformer if found else None,
        patches=patches,
        skip=skip,
        adapter=adapter,
        detail_variance=detail_variance,
        cache=cache,
        known=_preset(preset, pipe_or_transformer if found else None),
    )
    earlier = list({id(h): h for h in (getattr(t, MARK, None) for t in transformers) if h is not None}.values())
    for handle in earlier:
        handle.remove()
    try:
        return Handle(plan)
    except BaseException:
        for handle in earlier:
            handle.put_on()
        raise


def _settle(
    architectures: list[Architecture],
    called: Sequence[Any],
    pipe: Any,
    *,
    patches: Patches | Policy | None,
    skip: SkipSchedule | None,
    adapter: PatchAdapter | str | Path | None,
    detail_variance: Mapping[int, Sequence[float]] | None,
    cache: Config | str | None,
    known: Preset,
) -> Plan:
    """Check everything and load what is named, before anything changes."""
    asked = {"patches": patches, "skip": skip}
    if known.origin:
        warn(f"the preset holds {known.origin}; 'ddit calibrate' measures this model's own")
    schedule = _checked(known.patches if patches is None else patches, skip)
    if adapter == "none":  # a word of the command line
        adapter = None
    if adapter is not None:
        adapter = _load_adapter(adapter, architectures)
        own = tuple(s for s in schedule.scales if s in (1, *adapter.scales))
        if patches is None and isinstance(schedule, PatchSchedule | PlannedSchedule) and len(own) > 1:
            schedule = replace(schedule, scales=own)  # nobody asked for sizes that it has not learnt
        check_adapter(adapter, schedule)
        detail_variance = detail_variance or adapter.detail_variance
    scales = {s for s in schedule.scales if s > 1}
    variance = _variance(detail_variance or {}, scales, known, architectures[0].channels)
    axes = architectures[0].axes
    detail = {s: float(v.mean()) for s, v in variance.items()}
    guard = noise_guard(detail, axes) if adapter is None else adapter.serves
    coarse = _coarse(schedule, adapter, architectures)
    policy = _policy(schedule, guard, _coarse_error(adapter, known, detail, axes))
    plan = _joint_plan(skip, patches, known, schedule.scales, adapter, guard)
    if plan is not None:
        policy, make_skipper = _halves(plan)
    else:
        make_skipper = _skipping(skip, architectures[0].patch_size)
    return Plan(
        architectures=architectures,
        called=called,
        pipe=_reference(pipe),
        policy=policy,
        measure=schedule if isinstance(schedule, PatchSchedule) else PatchSchedule(),
        coarse=coarse,
        variance=variance,
        adapter=adapter,
        make_skipper=make_skipper,
        speedup=_asked(schedule, skip),
        cache=make_cache(cache, known.teacache) if isinstance(cache, str) else cache,
        costs=known.costs,
        settings={**asked, "patches": schedule},
    )


def _asked(schedule: Patches | Policy, skip: SkipSchedule | None) -> float | None:
    """Speedup of the whole run, if one was asked for."""
    if skip is not None and skip.speedup is not None:
        return skip.speedup
    return schedule.speedup if isinstance(schedule, PlannedSchedule) else None


def _reference(pipe: Any) -> Callable[[], Any]:
    """Gives a pipeline without keeping it alive, where its class allows that."""
    try:
        return (lambda: None) if pipe is None else weakref.ref(pipe)
    except TypeError:
        return lambda: pipe


def _checked(schedule: Any, skip: Any) -> Patches | Policy:
    """The schedule of patches; refuses what is of another kind, and a skip schedule that is none."""
    if not isinstance(getattr(schedule, "scales", None), Sequence):
        raise ValueError(
            f"patches is {schedule!r}; it must be a PatchSchedule, a PlannedSchedule, a FixedSchedule or a policy "
            "(PatchSchedule.paper() is the paper's, FixedSchedule(steps=[...]) a list of scales)"
        )
    if not (skip is None or isinstance(skip, SkipSchedule)):
        raise ValueError(f"skip is {skip!r}; it must be a SkipSchedule, such as SkipSchedule(speedup=3)")
    return schedule


def _variance(
    given: Mapping[int, Sequence[float]], scales: set[int], known: Preset, channels: int
) -> dict[int, torch.Tensor]:
    """Scale -> variance of the detail per channel: what is given, else what is known of all scales, else none."""
    try:
        given = {int(scale): [float(value) for value in values] for scale, values in given.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"detail_variance is {given!r}; it must hold numbers for each scale, such as {{2: [0.1, ...]}}, one for "
            f"each of the {channels} channels: 'ddit calibrate' measures it"
        ) from None
    if not given and scales <= set(known.detail_variance):
        given = known.detail_variance
    for scale, values in given.items():
        if len(values) != channels or not all(math.isfinite(v) and v >= 0 for v in values):
            raise ValueError(
                f"detail_variance of scale {scale} is {list(values)}; it must be a number of at least 0 for each of "
                f"the {channels} channels: 'ddit calibrate' measures it"
            )
    missing = sorted(scales - set(given)) if given else []
    if missing:
        raise ValueError(f"detail_variance has no entry for scales {missing}; measure them or leave it out")
    return {s: torch.tensor(v) for s, v in given.items()}


def _coarse(schedule: Patches | Policy, adapter: PatchAdapter | None, architectures: list[Architecture]) -> Coarse:
    """How coarse steps are made: as an adapter has learnt them, else as the schedule says."""
    asked = schedule if isinstance(schedule, Patches) else PatchSchedule()
    coarse = asked.coarse if adapter is None else adapter.coarse
    if coarse.positions != "grid" and any(_moves_unseen(a) for a in architectures):
        raise ValueError(
            f"positions are {coarse.positions!r}, and compiled code would not see them move; "
            "take positions='grid', or, but for Z-Image, compile the blocks alone (compile_repeated_blocks)"
        )
    if coarse.positions != "grid" and any(a.rope and parallel_config(a.transformer) for a in architectures):
        raise ValueError(
            f"positions are {coarse.positions!r}, and this model's are split over several devices before they could "
            "be moved; take positions='grid'"
        )
    return coarse


def _moves_unseen(architecture: Architecture) -> bool:
    """Whether positions are moved by a hook, which code compiled before it came does not look for."""
    if type(architecture).placed is not Architecture.placed:  # of a block
        return is_compiled(architecture.transformer)
    return architecture.rope is not None and getattr(architecture.transformer, "_compiled_call_impl", None) is not None


def _preset(preset: Preset | str | Path | None, pipe: Any) -> Preset:
    if isinstance(preset, Preset):
        return preset
    if not isinstance(preset, str | Path | None):
        raise ValueError(f"preset is {preset!r}; it must be a ddit.preset.Preset or the folder of one")
    if preset is None:
        source = getattr(getattr(pipe, "config", None), "_name_or_path", None)
        return Preset.load(source) if source else Preset()
    return Preset.load(preset, required=True)


def _policy(schedule: Patches | Policy, guard: Guard, error: CoarseError) -> Policy:
    if isinstance(schedule, PatchSchedule):
        return Rule(schedule, guard)
    if isinstance(schedule, PlannedSchedule):
        return Planned(schedule, error, guard)
    return Fixed(schedule) if isinstance(schedule, FixedSchedule) else schedule


def _coarse_error(adapter: PatchAdapter | None, known: Preset, detail: Mapping[int, float], axes: int) -> CoarseError:
    """What coarse steps are off by: as the adapter's validation says, else as calibrated, else as much as can be."""
    learnt = {} if adapter is None else adapter.errors

    def error(scale: int, sigma: float) -> float:
        if scale in learnt:
            return error_at(learnt[scale], sigma)
        if known.profile is not None and scale in known.profile.coarse:
            return known.profile.coarse_error(scale, sigma)
        return detail_error(sigma, usual_detail(scale, detail, axes), scale, axes)

    return error


def _joint_plan(
    skip: SkipSchedule | None,
    patches: Patches | Policy | None,
    known: Preset,
    scales: tuple[int, ...],
    adapter: PatchAdapter | None,
    guard: Guard,
) -> JointPlan | None:
    """The plan over both mechanisms, where a speedup or a quality asks for one; ``None`` where each goes by its own."""
    if skip is None or skip.threshold is not None:
        return None
    alone = patches == FULL
    if skip.quality is not None:
        if known.profile is None or known.quality is None:
            raise ValueError(
                "a quality needs a preset of this model: make one with 'ddit calibrate', "
                "or ask for a speedup or a threshold"
            )
        if not (patches is None or alone):
            raise ValueError(
                "a quality is a plan over patches and skipping: leave out patches, or ask for a speedup or a "
                "threshold; patches=FixedSchedule(steps=(1,)) (--patches full) plans skipping alone"
            )
        if not alone and known.quality.adapter != ("" if adapter is None else fingerprint(adapter)):
            how = "with another" if known.quality.adapter else "without an"
            warn(
                f"the preset's qualities were measured {how} adapter, and likeness to plain runs will be another: "
                "calibrate with the same one (ddit calibrate --adapter), or ask for a speedup"
            )
    elif patches is not None or known.profile is None:
        return None
    # The core knows skipping through `ddit.run.Skipping` alone.
    from ddit.skip.joint import JointPlan

    errors = known.profile if adapter is None else known.profile.learnt(adapter.errors)
    scales = tuple(s for s in scales if s == 1 or s in errors.coarse)
    error = 0.0 if skip.quality is None or known.quality is None else known.quality.error_of(skip.quality)
    return JointPlan((1,) if alone else scales, errors, guard, skip.speedup, error)


def _halves(plan: JointPlan) -> tuple[Policy, Any]:
    """What a plan over both mechanisms decides for patches, and what makes the skipper of a run."""
    from ddit.skip.joint import JointPatches, JointSkips
    from ddit.skip.skipper import Skipper

    return JointPatches(plan), lambda: Skipper(JointSkips(plan))


def _load_adapter(adapter: PatchAdapter | str | Path, architectures: Sequence[Architecture]) -> PatchAdapter:
    transformer: Any = architectures[0].transformer
    if len(architectures) > 1:
        raise ValueError(
            "an adapter serves one transformer and this pipeline has two; leave it out (--adapter none), "
            "or apply it to one of them"
        )
    if parallel_config(transformer) is not None:
        raise ValueError(
            "an adapter does not work where tokens are spread over several devices; "
            "leave it out (--adapter none), or draw a picture on each device with accelerate launch"
        )
    adapter = adapter if isinstance(adapter, PatchAdapter) else PatchAdapter.from_pretrained(adapter)
    adapter.check(transformer)
    return adapter


def check_adapter(adapter: PatchAdapter, schedule: Patches | Policy) -> None:
    """Refuse a schedule that asks for what an adapter has not learnt.

    Raises:
        ValueError: Naming scales or the form of a coarse step.
    """
    foreign = sorted(set(schedule.scales) - {1, *adapter.scales})
    if foreign:
        raise ValueError(
            f"the schedule uses scales {foreign}, the adapter has {list(adapter.scales)}; "
            f"set scales to {(1, *adapter.scales)} or fewer, or leave the adapter out (--adapter none)"
        )
    coarse = getattr(schedule, "coarse", None)
    if coarse not in (None, PatchSchedule().coarse, adapter.coarse):
        raise ValueError(
            f"the schedule asks for {coarse}, the adapter was trained for {adapter.coarse}; "
            "leave coarse out of the schedule, or the adapter (--adapter none)"
        )


def _skipping(skip: SkipSchedule | None, patch_size: int) -> Callable[[], Skipping] | None:
    """What makes the skipper of a run that knows nothing of patches."""
    if skip is None:
        return None
    # The core knows skipping through `ddit.run.Skipping` alone.
    from ddit.skip.policy import SkipPlan, SkipRule
    from ddit.skip.skipper import Skipper

    speedup, threshold = skip.speedup, skip.threshold
    if speedup is not None:
        return lambda: Skipper(SkipPlan(speedup))
    assert threshold is not None, "a quality has a plan over both"
    return lambda: Skipper(SkipRule(threshold, patch_size))
