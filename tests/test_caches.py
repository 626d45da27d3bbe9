"""Caches under dynamic patches: fresh states on every change of scale, for every architecture and cache."""

from __future__ import annotations

import os
from copy import deepcopy
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    WanTransformer3DModel,
)
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from torch import Tensor

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "warning")
import cache_dit

import ddit
import tiny
from ddit import FixedSchedule, PatchSchedule
from ddit.caches import Cache, CacheDitConfig, make_cache, suits
from ddit.config import FULL
from ddit.models import architecture_for
from ddit.schedule import StepContext
from ddit.teacache import TeaCacheConfig, polynomial, relative_change
from test_architectures import CASES, draw, parameters

SCHEDULE = (1, 1, 1, 2, 2, 1, 4, 4)
FIXED = FixedSchedule(steps=SCHEDULE)
LIKELY = {
    "teacache": lambda: TeaCacheConfig(1e9, (0.0, 0.0)),
    "first-block": lambda: FirstBlockCacheConfig(1e9),
    "magcache": lambda: MagCacheConfig(1e9, max_skip_steps=99, retention_ratio=0.0, mag_ratios=FLUX_MAG_RATIOS),
    "taylorseer": lambda: TaylorSeerCacheConfig(
        cache_interval=99, disable_cache_before_step=1, use_lite_mode=True, taylor_factors_dtype=torch.float32
    ),
    "cache-dit": lambda: CacheDitConfig(1e9, {"max_warmup_steps": 1}),
}
DBCACHE = partial(cache_dit.DBCacheConfig, Fn_compute_blocks=1, residual_diff_threshold=1e9, max_warmup_steps=1)
"""Caches that answer whenever they may."""
REUSED = {
    "teacache": "1 (1) (1) 2 (2) 1 4 4",  # It always computes the last step.
    "first-block": "1 (1) (1) 2 (2) 1 4 (4)",
    "magcache": "1 (1) (1) 2 (2) 1 4 (4)",
    "taylorseer": "1 (1) 1 2 (2) 1 4 (4)",  # It computes the second step after its warm-up.
    "cache-dit": "1 (1) (1) 2 (2) 1 4 (4)",
}
"""Their strips."""
CACHED = ("flux", "hunyuan-video-replaced", "qwen-image", "wan", "wan2.2-a14b", "wan-vace")
"""Models that every cache is tried on."""
every_cache = pytest.mark.parametrize("cache", LIKELY)
UNKNOWN = (
    *("chroma", "flux2", "flux2-reference", "hunyuan-video-1.5", "longcat-image", "ovis-image", "qwen-image-2.1"),
    *("wan-animate", "skyreels-v2", "skyreels-v2-image", "skyreels-v2-forcing"),
)
NOT_KNOWN = [
    *((name, cache) for name in UNKNOWN for cache in ("teacache", "first-block", "magcache")),
    *(("ace-step", cache) for cache in LIKELY),
    ("qwen-image-2.1", "cache-dit"),
    ("wan-animate", "cache-dit"),
]
"""Models and the caches that do not know their blocks."""


def without_warm_up(cache: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cache of `LIKELY`, for which one computed step is enough."""
    from ddit.models.wan import Wan

    monkeypatch.setattr(Wan, "teacache_first", 1)
    return LIKELY[cache]()


@parameters(CACHED)
@every_cache
def test_a_cache_starts_afresh_on_every_change_of_scale(name, cache, monkeypatch):
    """Where the scale changes, the model answers just what it answers without a cache."""
    case = CASES[name]
    pipe = case.make()
    config = without_warm_up(cache, monkeypatch)
    if hasattr(pipe, "transformer_2") and pipe.transformer_2 is not None:
        pytest.skip("the hand-over between two transformers starts afresh as well; tested below")
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
    twin = deepcopy(pipe.transformer)
    if cache == "cache-dit":  # It may replace what lies below it, so the spy comes after it.
        cache_dit.enable_cache(pipe.transformer, cache_config=DBCACHE())
        config = None
    forward = pipe.transformer.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        answer = forward(*args, **kwargs)
        calls.append((args, kwargs, answer[0]))
        return answer

    pipe.transformer.forward = spy
    with ddit.apply(pipe, patches=FIXED, cache=config) as run:
        draw(pipe, case)
    assert run.report.strip() == REUSED[cache]
    exact = [torch.equal(twin(*args, **kwargs)[0], answer) for args, kwargs, answer in calls]
    assert len(calls) == case.passes * len(SCHEDULE)
    assert exact.count(False) == case.passes * REUSED[cache].count("(")


@parameters(CACHED)
@every_cache
def test_costs_and_removal(name, cache, monkeypatch):
    case = CASES[name]
    pipe = case.make()
    plain = draw(pipe, case)
    run = ddit.apply(pipe, patches=FIXED, cache=without_warm_up(cache, monkeypatch))
    first = draw(pipe, case)
    assert torch.equal(draw(pipe, case), first), "a second run starts afresh"
    with_cache = run.report
    assert with_cache.to_dict()["reused"] == [[0] if "(" in mark else [] for mark in REUSED[cache].split()]
    run.remove()
    assert torch.equal(draw(pipe, case), plain)
    with ddit.apply(pipe, patches=FIXED) as run:
        draw(pipe, case)
    assert with_cache.flops_fraction < run.report.flops_fraction


@parameters(CACHED)
@every_cache
def test_an_exception_leaves_nothing_behind(name, cache, monkeypatch):
    case = CASES[name]
    pipe = case.make()
    with ddit.apply(pipe, patches=FIXED, cache=without_warm_up(cache, monkeypatch)):
        whole = draw(pipe, case)

        def stop(_: Any, step: int, *rest: Any) -> dict[str, Any]:
            if step == 1:
                raise RuntimeError("stopped")
            return {}

        with pytest.raises(RuntimeError, match="stopped"):
            draw(pipe, case, seed=7, callback_on_step_end=stop)
        assert torch.equal(draw(pipe, case), whole)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("cache", ["first-block", "magcache", "taylorseer", "cache-dit"])
def test_a_users_own_cache_is_kept_apart_too(when, cache):
    case = CASES["wan"]
    pipe = case.make()
    with ddit.apply(pipe, patches=FIXED, cache=LIKELY[cache]()):
        ours = draw(pipe, case)

    def enable() -> None:
        if cache == "cache-dit":
            cache_dit.enable_cache(pipe.transformer, cache_config=DBCACHE())
        else:
            pipe.transformer.enable_cache(LIKELY[cache]())

    if cache == "cache-dit" and when == "after":
        pytest.skip("cache-dit puts its own forward in place of whatever is there: it has to come first")
    if when == "before":
        enable()
    run = ddit.apply(pipe, patches=FIXED)
    if when == "after":
        enable()
    assert torch.equal(draw(pipe, case), ours) and run.report.strip() == REUSED[cache]
    run.remove()
    assert hasattr(pipe.transformer, "_context_manager") if cache == "cache-dit" else pipe.transformer.is_cache_enabled


def test_cache_dit_leaves_nothing_behind():
    """Neither forwards nor another order of the lists of blocks, by which diffusers' caches find the first one."""
    case = CASES["flux"]
    pipe = case.make()
    with ddit.apply(pipe, patches=FIXED, cache=LIKELY["first-block"]()):
        first = draw(pipe, case)
    children = list(pipe.transformer._modules)
    with ddit.apply(pipe, patches=FIXED, cache=LIKELY["cache-dit"]()):
        draw(pipe, case)
    assert list(pipe.transformer._modules) == children and not hasattr(pipe.transformer, "_is_patched")
    with ddit.apply(pipe, patches=FIXED, cache=LIKELY["first-block"]()):
        assert torch.equal(draw(pipe, case), first)


class Alternating:
    """Even samples change their scale when odd ones do not."""

    scales = (1, 2, 4)

    def choose(self, context: StepContext) -> list[int]:
        step, others = context.step, (1, 1, 1, 1, 2, 2, 2, 2)
        return [SCHEDULE[step] if i % 2 == 0 else others[step] for i in range(context.batch)]


@every_cache
def test_samples_of_different_scale_have_states_of_their_own(cache, monkeypatch):
    case = CASES["flux"]
    pipe = case.make()
    config = without_warm_up(cache, monkeypatch)
    with ddit.apply(pipe, patches=Alternating(), cache=config) as run:
        draw(pipe, case, prompt=[tiny.PROMPT] * 3)
    # A sample that parts from the others, or joins them, starts afresh, and so do they.
    odd = {"teacache": "1 (1) (1) 1 2 2 (2) 2", "taylorseer": "1 (1) 1 1 2 2 (2) 2"}
    odd = odd.get(cache, "1 (1) (1) 1 2 2 (2) (2)")
    even = REUSED[cache].replace("2 (2)", "2 2")
    assert [run.report.strip(i) for i in range(3)] == [even, odd, even]


def test_two_transformers_that_take_turns():
    case = CASES["wan2.2-a14b"]
    pipe = case.make()
    plain = draw(pipe, case)
    with ddit.apply(pipe, patches=PatchSchedule(threshold=0.0), cache=LIKELY["first-block"]()) as run:
        draw(pipe, case)
    strip = run.report.strip().split()
    assert strip.count("1") == 2 and strip[0] == "1", "each transformer computes its own first step"
    assert torch.equal(draw(pipe, case), plain)


def test_a_cache_that_never_answers_changes_nothing():
    case = CASES["flux"]
    pipe = case.make()
    with ddit.apply(pipe, patches=FIXED) as run:
        alone = draw(pipe, case)
    for cache in (TeaCacheConfig(1e-9, (0.0, 1.0)), FirstBlockCacheConfig(0.0)):
        with ddit.apply(pipe, patches=FIXED, cache=cache) as run:
            assert torch.equal(draw(pipe, case), alone)
        assert "(" not in run.report.strip()


def test_without_ddit_a_change_of_the_grid_fails():
    """What the states of one's own are for: the cache alone, on the calls that dynamic patches make."""
    case = CASES["flux"]
    pipe = case.make()
    small, large = _call(pipe, 4), _call(pipe, 8)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(1e9))
    with pipe.transformer.cache_context("cond"), torch.no_grad():
        pipe.transformer(**large)
        with pytest.raises(RuntimeError, match="size"):
            pipe.transformer(**small)


def _call(pipe: Any, side: int) -> dict[str, Any]:

    return architecture_for(pipe.transformer).example(1, 2 * side, 2 * side, 512)


# TeaCache


def test_teacache_computes_again_once_enough_has_changed():
    """The sum of expected changes starts anew with every computed step; the first and the last always are."""
    case = CASES["flux"]
    pipe = case.make()
    strips = {}
    for threshold in (0.5, 2.5, 99.0):
        with ddit.apply(pipe, patches=FULL, cache=TeaCacheConfig(threshold, (0.0, 1.0))) as run:
            draw(pipe, case)
        strips[threshold] = run.report.strip()
    assert strips[0.5] == "1 1 1 1 1 1 1 1"
    assert strips[2.5] == "1 (1) (1) 1 (1) (1) 1 1"
    assert strips[99.0] == "1 (1) (1) (1) (1) (1) (1) 1"


def test_teacache_adds_what_the_blocks_added():
    """A reused step at the very same input gives the very same answer."""
    case = CASES["flux"]
    pipe = case.make()
    call = _call(pipe, 4)
    call["hidden_states"] = torch.randn(call["hidden_states"].shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = pipe.transformer(**call)[0]
        with ddit.apply(pipe.transformer, patches=FULL, cache=LIKELY["teacache"]()) as run:
            pipe.transformer(**call)
            later = {**call, "timestep": call["timestep"] * 0.9}
            pipe.transformer(**later)
            assert run.report.strip() == "1 (1)"
            again = pipe.transformer(**later)[0]
    assert again.shape == plain.shape


def test_a_pass_that_a_cache_answers_is_paid_for_alone(monkeypatch):
    """Of two guidance passes the model computes one, and the cache answers the other."""
    case = CASES["wan"]
    pipe, turns = case.make(), cycle((False, True))
    monkeypatch.setattr("ddit.caches.cache._answered", lambda state: next(turns))
    with ddit.apply(pipe, patches=FixedSchedule(steps=(1,)), cache=TeaCacheConfig(coefficients=(0.0,))) as run:
        draw(pipe, case)
    assert case.passes == 2 and run.report.flops_fraction == pytest.approx(0.5)


def test_the_polynomial_and_the_change():
    assert polynomial((2.0, 0.0, -1.0), 3.0) == 17.0
    assert relative_change(torch.tensor([1.0, -3.0]), torch.tensor([2.0, -2.0])) == 0.5


def test_published_coefficients_belong_to_their_models():
    from ddit.models import architecture_for
    from ddit.pipelines.known import meta_transformer

    for name, last in (("flux.1-dev", 0.264230861), ("wan2.1-1.3b", -0.0499875664), ("wan2.1-14b", -0.315583525)):
        told = architecture_for(meta_transformer(name)).teacache_coefficients()
        assert told is not None and len(told) == 5 and told[-1] == last
    assert architecture_for(tiny.transformer()).teacache_coefficients() is None
    with torch.device("meta"):  # Wan 2.2 TI2V, with as many blocks as Wan 2.1 1.3B
        other = WanTransformer3DModel(num_layers=30, num_attention_heads=24, in_channels=48, out_channels=48)
    assert architecture_for(other).teacache_coefficients() is None
    pair = CASES["wan2.2-a14b"].make()
    with pytest.raises(ValueError, match="nobody has published TeaCache's coefficients"):
        ddit.apply(pair, cache="teacache:0.1")


# Refusals


@pytest.mark.parametrize(
    "text", ["", "teacache", "teacache:x", "teacache:-1", "taylorseer:1.5", "other:1", "magcache:0"]
)
def test_text_that_names_no_cache(text):
    with pytest.raises(ValueError, match="such as teacache"):
        make_cache(text)


def test_text_that_names_one():
    assert make_cache("teacache:0.3") == TeaCacheConfig(0.3)
    assert make_cache("first-block:0.1").threshold == 0.1
    assert make_cache("taylorseer:4").cache_interval == 4
    assert make_cache("magcache:0.06").threshold == 0.06


def test_magcache_is_told_the_number_of_steps():
    case = CASES["flux"]
    pipe = case.make()
    config = make_cache("magcache:0.06")
    with ddit.apply(pipe, patches=FIXED, cache=config):
        draw(pipe, case)
        used = pipe.transformer._cache_config
    assert used.num_inference_steps == case.steps == len(used.mag_ratios)


@pytest.mark.parametrize(("name", "cache"), NOT_KNOWN)
def test_a_cache_that_does_not_know_the_blocks_is_refused(name, cache):
    pipe = CASES[name].make()
    block = architecture_for(pipe.transformer).blocks()[0]
    before = set(vars(block))
    with pytest.raises(ValueError, match=r"does not know the blocks of \w+; choose another cache"):
        ddit.apply(pipe, cache=LIKELY[cache]())
    assert set(vars(block)) == before
    assert not suits(architecture_for(pipe.transformer), LIKELY[cache]())


@parameters(CACHED)
@every_cache
def test_a_cache_that_suits_is_known_and_taken_off_again(name, cache):
    transformer = CASES[name].make().transformer
    assert suits(architecture_for(transformer), LIKELY[cache]())
    assert not Cache(architecture_for(transformer), None).active


@pytest.mark.parametrize(("name", "share"), [("flux", 1 / 2), ("ovis-image", 2 / 4), ("hunyuan-video", 2 / 3)])
def test_cache_dit_counts_what_it_computes_of_every_list(name, share):
    """It makes one list of FLUX.1's two, and keeps the others' apart."""
    architecture = architecture_for(CASES[name].make().transformer)
    cache = Cache(architecture, CacheDitConfig(1e9))
    assert cache.share == pytest.approx(share)
    cache.remove()


def test_cache_dit_takes_no_more_blocks_than_the_shortest_list_has():
    """As Ovis-Image's 6 before 27."""
    pipe = CASES["ovis-image"].make()
    blocks = pipe.transformer.single_transformer_blocks
    blocks.extend(deepcopy(blocks[0]) for _ in range(14))
    cache = Cache(architecture_for(pipe.transformer), CacheDitConfig(1e9))
    assert cache.share == pytest.approx(4 / 18)
    with ddit.apply(pipe, patches=FULL) as run:
        draw(pipe, CASES["ovis-image"])
    assert run.report.strip().startswith("1")
    cache.remove()


def test_what_answered_is_seen_without_lite_mode_and_with_last_blocks():
    """TaylorSeer may cache attention alone, and cache-dit may always run the last blocks."""
    case = CASES["flux"]
    parts = TaylorSeerCacheConfig(cache_interval=99, disable_cache_before_step=1, use_lite_mode=False)
    last = CacheDitConfig(1e9, {"Fn_compute_blocks": 1, "Bn_compute_blocks": 1, "max_warmup_steps": 1})
    for config, share in ((parts, 1.0), (last, 1.0)):
        pipe = case.make()
        with ddit.apply(pipe, patches=FULL, cache=config) as run:
            draw(pipe, case)
        assert run.report.strip().count("(1)") > 3 and run.report.flops_fraction <= share


def test_an_adapter_reads_what_taylorseer_leaves_out():
    pipe = tiny.pipeline()
    adapter = ddit.PatchAdapter.for_model(pipe.transformer, rank=2)
    with pytest.raises(ValueError, match="TaylorSeer in lite mode"):
        ddit.apply(pipe, adapter=adapter, cache="taylorseer:4")
    with ddit.apply(pipe, adapter=adapter, patches=FIXED):
        pipe.transformer.enable_cache(LIKELY["taylorseer"]())
        with pytest.raises(ValueError, match="TaylorSeer in lite mode"):
            tiny.sample(pipe)


@pytest.mark.parametrize("by", ["ddit", "user"])
def test_cache_dit_and_offloading(by):
    """A hook of accelerate, as for model offloading, comes before the cache, and goes and comes again after a run."""
    pipe = tiny.pipeline()
    plain = tiny.sample(pipe)
    settings = dict(patches=FIXED, cache=CacheDitConfig(1e9, {"max_warmup_steps": 1}))
    with ddit.apply(pipe, **settings) as run:
        expected, strip = tiny.sample(pipe), run.report.strip()
    assert "(" in strip
    add_hook_to_module(pipe.transformer, ModelHook())
    if by == "user":
        cache_dit.enable_cache(pipe.transformer, cache_config=DBCACHE())
        with pytest.raises(ValueError, match="put on after offloading"):
            ddit.apply(pipe, patches=FIXED)
        return
    with ddit.apply(pipe, **settings) as run:
        for _ in range(2):
            assert torch.equal(tiny.sample(pipe), expected) and run.report.strip() == strip
            remove_hook_from_module(pipe.transformer)
            add_hook_to_module(pipe.transformer, ModelHook())
    assert torch.equal(tiny.sample(pipe), plain)
    remove_hook_from_module(pipe.transformer)
    assert torch.equal(tiny.sample(pipe), plain) and pipe.transformer.forward.__func__ is type(pipe.transformer).forward


@pytest.mark.parametrize("name", ["lumina2", "z-image"])
def test_cache_dit_of_the_user_on_a_model_without_caches_in_diffusers(name):
    case = CASES[name]
    pipe = case.make()
    cache_dit.enable_cache(pipe.transformer, cache_config=DBCACHE())
    with ddit.apply(pipe, patches=FIXED) as run:
        draw(pipe, case)
    assert "(" in run.report.strip()


@pytest.mark.parametrize("name", ["krea-2", "lumina2", "sd3", "z-image"])
@every_cache
def test_a_model_without_caches_in_diffusers_is_left_as_it_was(name, cache):
    pipe = CASES[name].make()
    before = set(vars(pipe.transformer))
    with pytest.raises(ValueError, match=r"diffusers has no caches for \w+; leave cache= out"):
        ddit.apply(pipe, cache=LIKELY[cache]())
    assert set(vars(pipe.transformer)) == before


def test_pairs_that_cannot_work_are_refused():
    pipe = tiny.pipeline()
    before = tiny.sample(pipe)
    with pytest.raises(ValueError, match="ddit calibrate"):
        ddit.apply(pipe, cache="teacache:0.2")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(0.0))
    with pytest.raises(ValueError, match="has a cache already"):
        ddit.apply(pipe, cache="first-block:0.1")
    pipe.transformer.disable_cache()
    with pytest.raises(ValueError, match="PyramidAttentionBroadcastConfig does not work"):
        ddit.apply(pipe, cache=PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 1))  # type: ignore[arg-type]
    assert not pipe.transformer.is_cache_enabled
    assert torch.equal(tiny.sample(pipe), before)
    with pytest.raises(ValueError, match="above 0"):
        TeaCacheConfig(0.0)
    with pytest.raises(ValueError, match="MagCache calibrates on plain runs"):
        ddit.apply(pipe, cache=MagCacheConfig(calibrate=True))
    short = tiny.pipeline(num_single_layers=0)
    for cache in (TeaCacheConfig(0.1, (1.0, 0.0)), FirstBlockCacheConfig(0.1)):
        with pytest.raises(ValueError, match="this model has one"):
            ddit.apply(short, cache=cache)


@pytest.mark.filterwarnings("ignore:ddit keeps every step full")
def test_what_a_cache_answers_in_a_forced_step_is_told(pipe):
    with ddit.apply(pipe, patches=FULL, cache=FirstBlockCacheConfig(1e9)) as run:
        tiny.sample(pipe, joint_attention_kwargs={"attention_mask": None})
    assert run.report.forced and run.report.strip() == "1 (1) (1) (1) (1) (1) (1) (1)"
    assert run.report.flops_fraction < 0.7


def test_settings_of_magcache_stay_the_users(pipe):
    """They are fitted to a run's number of steps on a copy, so that the next run starts from all of them."""
    config = make_cache("magcache:0.06")
    ratios = config.mag_ratios.clone()
    with ddit.apply(pipe, patches=FULL, cache=config):
        tiny.sample(pipe, steps=4)
    assert torch.equal(config.mag_ratios, ratios) and config.num_inference_steps == len(ratios)


@pytest.mark.parametrize("text", ["taylorseer:inf", "first-block:nan", "teacache:inf"])
def test_numbers_of_caches_are_finite(text):
    with pytest.raises(ValueError, match="such as teacache"):
        make_cache(text)


def test_ratios_of_another_model_are_warned_about():
    with pytest.warns(UserWarning, match="MagCache goes by the ratios of FLUX.1-dev"):
        ddit.apply(tiny.wan_pipeline(), cache="magcache:0.06").remove()
