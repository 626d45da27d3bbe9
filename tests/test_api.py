"""`ddit.apply` on a real pipeline: bit-equal when nothing is to change, gone when removed, refused as a whole."""

import gc
import inspect
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import ddit
import tiny
from ddit import FixedSchedule, PatchAdapter, PatchSchedule
from ddit.handle import Handle
from helpers import COARSE, PLAIN, STEPS, Record, call_inputs, facts, fixed, noise

# --- exactness and removal ---


@pytest.mark.parametrize("batch", [1, 3])
def test_threshold_zero_is_bit_equal_to_the_plain_pipeline(pipe, batch):
    plain = tiny.sample(pipe, num_images_per_prompt=batch)
    with ddit.apply(pipe, patches=PLAIN) as handle:
        ours = tiny.sample(pipe, num_images_per_prompt=batch)
        assert handle.report.scales == [[1] * STEPS] * batch
    assert torch.equal(ours, plain)
    assert torch.equal(tiny.sample(pipe, num_images_per_prompt=batch), plain)


def test_decoded_pictures_are_equal_too(pipe):
    plain = tiny.sample(pipe, output_type="np")
    ddit.apply(pipe, patches=PLAIN)
    assert (tiny.sample(pipe, output_type="np") == plain).all()


def test_remove_leaves_nothing_behind(pipe):
    """Neither on the pipeline nor on any module, after runs at several scales."""
    plain = tiny.sample(pipe)  # diffusers leaves its own hook registry in a first run
    before = facts(pipe)
    handle = ddit.apply(pipe, patches=COARSE)
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
    ddit.apply(pipe, patches=COARSE)
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
    first = ddit.apply(pipe, patches=COARSE)
    second = ddit.apply(pipe, patches=PLAIN)
    assert "removed" in repr(first) and "active" in repr(second)
    assert torch.equal(tiny.sample(pipe), plain)
    first.remove()  # does nothing any more
    assert second.report.scales == [[1] * STEPS]
    second.remove()
    assert facts(pipe) == before


def test_context_manager_removes_after_an_error_as_well(pipe):
    tiny.sample(pipe)
    before = facts(pipe)
    with pytest.raises(KeyError), ddit.apply(pipe, patches=COARSE) as handle:
        assert isinstance(handle, Handle)
        raise KeyError
    assert facts(pipe) == before


def test_report_outlives_removal(pipe):
    with ddit.apply(pipe, patches=COARSE) as handle:
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
    handle = ddit.apply(pipe, patches=COARSE)
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
    handle = ddit.apply(pipe, patches=COARSE)
    for steps in (8, 7, 6):
        tiny.sample(pipe, steps=steps)
        assert handle.report.scales == [[1, 1, 1] + [4] * (steps - 3)]
        remove_hook_from_module(pipe.transformer, recurse=True)
        add_hook_to_module(pipe.transformer, ModelHook())
    handle.remove()
    remove_hook_from_module(pipe.transformer)
    assert pipe.transformer.forward.__func__ is type(pipe.transformer).forward


def test_another_wrapper_put_on_later_survives_removal(pipe):
    plain = tiny.sample(pipe)
    handle = ddit.apply(pipe, patches=COARSE)
    record = Record(pipe.transformer)
    tiny.sample(pipe)
    assert record.tokens == [64] * STEPS  # outside of ddit nobody sees large patches
    handle.remove()
    assert torch.equal(tiny.sample(pipe), plain)
    assert len(record.calls) == 2 * STEPS
    again = ddit.apply(pipe, patches=COARSE)
    tiny.sample(pipe)
    assert again.report.scales == [[1, 1, 1, 4, 4, 4, 4, 4]]


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
    with ddit.apply(transformer, patches=fixed(2)) as handle:
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
    ddit.apply(pipe, detail_variance={2: [0.1] * 4}, patches=PatchSchedule(scales=(1, 2)))


def test_a_refused_apply_leaves_the_former_one_in_force(pipe):
    handle = ddit.apply(pipe, patches=COARSE)
    with pytest.raises(ValueError):
        ddit.apply(pipe, detail_variance={2: [0.1] * 4})
    tiny.sample(pipe)
    assert handle.report.scales == [[1, 1, 1, 4, 4, 4, 4, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_latents_are_as_broken_as_without_ddit(pipe, value, dtype, recwarn):
    """With one warning; the next run is fine."""
    pipe.to(dtype)
    latents = (noise(1) * value).to(dtype)
    plain = tiny.sample(pipe, latents=latents.clone())
    handle = ddit.apply(pipe, patches=COARSE)
    ours = tiny.sample(pipe, latents=latents.clone())
    torch.testing.assert_close(ours, plain, equal_nan=True, rtol=0, atol=0)
    assert handle.report.scales == [[1] * STEPS]
    assert len([w for w in recwarn.list if "hold NaN or infinity" in str(w.message)]) == 1
    assert tiny.sample(pipe).isfinite().all() and handle.report.counts[4] == 5


# --- apply is atomic ---


@pytest.mark.parametrize("settings", [dict(cache="teacache:0.25"), dict(cache="teacache:0.25", adapter="new")])
@pytest.mark.parametrize("earlier", [dict(patches=COARSE), dict(patches=COARSE, cache="first-block:0.05"), None])
def test_a_cache_that_is_refused_leaves_everything_as_it_was(pipe, settings, earlier):
    """No coefficients are known: whatever else was asked for is not there either."""
    if "adapter" in settings:
        settings = settings | dict(adapter=PatchAdapter.for_model(pipe.transformer, rank=2))
    unchanged_by(pipe, settings, "coefficients", earlier)


@pytest.mark.parametrize("earlier", [dict(patches=COARSE), dict(patches=COARSE, cache="first-block:0.05"), None])
def test_an_adapter_put_on_by_hand_beside_a_cache_leaves_everything_as_it_was(pipe, earlier):
    by_hand = PatchAdapter.for_model(pipe.transformer, rank=2)
    with by_hand.attach(pipe.transformer):
        settings = dict(adapter=PatchAdapter.for_model(pipe.transformer, rank=2), cache="first-block:0.05")
        unchanged_by(pipe, settings, "there is an adapter", earlier)


def unchanged_by(pipe, settings: dict[str, Any], told: str, earlier: dict[str, Any] | None) -> None:
    """A refused `ddit.apply`: what was in force draws the same, and only its cache is on."""
    handle = None if earlier is None else ddit.apply(pipe, **earlier)
    expected = tiny.sample(pipe)
    with pytest.raises(ValueError, match=told):
        ddit.apply(pipe, **settings)
    assert torch.equal(tiny.sample(pipe), expected)
    assert pipe.transformer.is_cache_enabled == (earlier is not None and "cache" in earlier)
    if handle is not None:
        assert "active" in repr(handle)
        assert [s.strip("()") for s in handle.report.strip().split()] == ["1", "1", "1", *"44444"]
        handle.remove()
        assert not pipe.transformer.is_cache_enabled
    assert "ddit" not in repr(pipe.transformer.forward)


# --- what is done by default ---


def test_by_default_the_rule_runs_large_patches_where_it_may_and_skips_nothing(pipe):
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe)
    tiny.sample(pipe, steps=50)
    report = handle.report
    assert report.scales == [[{64: 1, 16: 2, 4: 4}[tokens] for tokens in record.tokens]]
    assert report.tokens_fraction == sum(record.tokens) / (50 * 64) < 1 and report.flops_fraction < 1


def test_by_default_large_patches_end_where_detail_shows_through_the_noise(pipe):
    """A threshold that always allows: the guard alone decides, from the noise level."""
    record = Record(pipe.transformer)
    handle = ddit.apply(pipe, patches=PatchSchedule(threshold=1e9))
    tiny.sample(pipe, steps=20)
    scales = handle.report.scales[0]
    assert scales[:3] == [1, 1, 1] and 0 not in scales and handle.report.tokens_fraction < 1
    assert scales[3] > 1 and scales[-1] == 1 and scales[3:] == sorted(scales[3:], reverse=True)
    assert record.tokens == [64 // scale**2 for scale in scales]
    assert handle.report.tokens_fraction == sum(record.tokens) / (20 * 64)


def test_an_adapter_needs_no_guard(pipe):
    handle = ddit.apply(pipe, patches=PatchSchedule(threshold=1e9), adapter=PatchAdapter.for_model(pipe.transformer))
    tiny.sample(pipe)
    assert handle.report.strip() == "1 1 1 4 4 4 4 4"


# --- golden numbers ---


def test_the_paper_draws_what_it_always_drew(pipe):
    """Recorded once; random weights, so that any change of the coarse step shows. Text encoders' differ by version."""
    generator = torch.Generator().manual_seed(0)
    text = {"prompt_embeds": (1, 20, 32), "pooled_prompt_embeds": (1, 32)}
    ddit.apply(pipe, patches=PatchSchedule.paper(threshold=1e9))
    latents = tiny.sample(pipe, prompt=None, **{k: torch.randn(s, generator=generator) for k, s in text.items()})
    found = latents[0, [0, 9, 27, 45, 63], [0, 3, 7, 11, 15]]
    torch.testing.assert_close(found, torch.tensor(GOLDEN), rtol=0, atol=1e-3)
    assert latents.std().item() == pytest.approx(GOLDEN_STD, abs=1e-3)


GOLDEN = [-2.4342, -0.1977, 1.4151, 0.1333, -1.8682]
GOLDEN_STD = 1.1174


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(patches="paper"), "patches is 'paper'; it must be a PatchSchedule"),
        (dict(patches=[1, 2]), "a list of scales"),
        (dict(skip=2), "skip is 2; it must be a SkipSchedule"),
        (dict(patches=fixed(1, 2), detail_variance={2: [0.1] * 16}), "each of the 4 channels"),
        (dict(patches=fixed(1, 2), detail_variance={2: [-0.1] * 4}), "at least 0"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(pipe, settings, told):
    before = facts(pipe)
    with pytest.raises(ValueError, match=told):
        ddit.apply(pipe, **settings)
    assert facts(pipe) == before
    ddit.apply(pipe, patches=fixed(1, 2), detail_variance={"2": [0.1] * 4}).remove()  # as JSON has it


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"detail_variance": 3}, "must hold numbers for each scale"),
        ({"detail_variance": {2: 0.1, 4: 0.1}}, "must hold numbers for each scale"),
        ({"preset": 3}, "must be a ddit.preset.Preset or the folder of one"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_in_a_sentence(pipe, settings, said):
    with pytest.raises(ValueError, match=said):
        ddit.apply(pipe, **settings)


def test_variances_may_be_tensors(pipe):
    with ddit.apply(pipe, detail_variance={2: torch.full((4,), 0.1), 4: np.full(4, 0.2)}) as handle:
        assert handle.plan.variance[4].tolist() == pytest.approx([0.2] * 4)


def test_a_policys_own_speedup_is_nobodys_wish(pipe):
    class Own(FixedSchedule):
        speedup = "fast"

    with ddit.apply(pipe, patches=Own(steps=(1, 2))) as handle:
        tiny.sample(pipe)
    assert handle.report.asked is None and "2p" in repr(handle.report)


def test_no_adapter_has_a_word(pipe):
    with ddit.apply(pipe, adapter="none") as handle:
        assert handle.adapter is None
