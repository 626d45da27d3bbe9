"""ddit beside what people put on pipelines as well: hooks, samplers, schedules and offloading of others."""

import warnings

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading
from peft import LoraConfig

import ddit
import tiny
from ddit import FixedSchedule, PatchAdapter, PatchSchedule, SkipSchedule
from ddit.config import FULL
from helpers import COARSE, call_inputs, fixed


class Doubling(ModelHook):
    """Doubles the model's answer."""

    def post_forward(self, module, output):
        return (output[0] * 2, *output[1:])


@pytest.mark.parametrize("first", ["hook", "ddit"])
@pytest.mark.parametrize("leaves", ["hook", "ddit"])
def test_two_hooks_and_one_leaves(pipe, first, leaves):
    """A hook of diffusers on the same transformer, in either order; what stays works as alone."""
    plain = tiny.sample(pipe)
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.register_hook(Doubling(), "doubling")
    doubled = tiny.sample(pipe)
    registry.remove_hook("doubling")
    with ddit.apply(pipe, patches=fixed(1, 2)):
        patched = tiny.sample(pipe)

    def put(name: str):
        return (
            registry.register_hook(Doubling(), "doubling") if name == "hook" else ddit.apply(pipe, patches=fixed(1, 2))
        )

    handles = {name: put(name) for name in (first, "ddit" if first == "hook" else "hook")}
    both = tiny.sample(pipe)
    assert not torch.equal(both, doubled) and not torch.equal(both, patched)
    if leaves == "hook":
        registry.remove_hook("doubling")
        if first == "hook":  # diffusers then gives the model its own forward back, whatever came after
            with pytest.warns(UserWarning, match=r"never asked.*Call ddit.apply again"):
                assert torch.equal(tiny.sample(pipe), plain)
        else:
            torch.testing.assert_close(tiny.sample(pipe), patched)
        handles["ddit"].remove()
    else:
        handles["ddit"].remove()
        torch.testing.assert_close(tiny.sample(pipe), doubled)
        registry.remove_hook("doubling")
    assert torch.equal(tiny.sample(pipe), plain)


def test_a_users_lora_is_untouched_after_removal(pipe):
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "mine")
    plain = tiny.sample(pipe)
    with ddit.apply(pipe, patches=COARSE, skip=SkipSchedule(speedup=2)):
        assert not torch.equal(tiny.sample(pipe), plain)
    assert torch.equal(tiny.sample(pipe), plain) and pipe.transformer.active_adapters() == ["mine"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_group_offloading(pipe, when):
    """Leaf by leaf, on the CPU as both devices: hooks on every layer."""
    with ddit.apply(pipe, patches=fixed(1, 2, 4)):
        expected = tiny.sample(pipe)
    offload = {
        "onload_device": torch.device("cpu"),
        "offload_device": torch.device("cpu"),
        "offload_type": "leaf_level",
    }
    if when == "before":
        apply_group_offloading(pipe.transformer, **offload)
    with ddit.apply(pipe, patches=fixed(1, 2, 4)) as handle:
        if when == "after":
            apply_group_offloading(pipe.transformer, **offload)
        torch.testing.assert_close(tiny.sample(pipe), expected)
        assert handle.report.strip() == "1 2 4 4 4 4 4 4"


@pytest.mark.parametrize("when", ["before", "after"])
def test_sequential_offloading(pipe, when):
    """Weights lie on the meta device but while their layer runs; here the CPU stands for the GPU."""
    settings = dict(patches=fixed(1, 2, 4), skip=SkipSchedule(speedup=2))
    with ddit.apply(pipe, **settings, adapter=opened(pipe.transformer)):
        expected = tiny.sample(pipe)

    def offload():
        cpu_offload(pipe.transformer, execution_device=torch.device("cpu"), offload_buffers=True)

    if when == "before":
        offload()
    with ddit.apply(pipe, **settings, adapter=opened(pipe.transformer)):
        if when == "after":
            offload()
        assert next(pipe.transformer.parameters()).is_meta
        torch.testing.assert_close(tiny.sample(pipe), expected)


def opened(transformer) -> PatchAdapter:
    """An adapter that changes what is drawn."""
    torch.manual_seed(0)
    adapter = PatchAdapter.for_model(transformer, rank=2)
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight, std=0.01)
    return adapter


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["sequential", "stream"])
def test_offloading_from_a_gpu(pipe, kind):
    with ddit.apply(pipe, patches=fixed(1, 2, 4)):
        expected = tiny.sample(pipe)
    if kind == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        devices = {"onload_device": torch.device("cuda"), "offload_device": torch.device("cpu")}
        apply_group_offloading(pipe.transformer, **devices, offload_type="leaf_level", use_stream=True)
        pipe.to("cuda")
    with ddit.apply(pipe, patches=fixed(1, 2, 4)):
        torch.testing.assert_close(tiny.sample(pipe).cpu(), expected, rtol=1e-3, atol=1e-3)


class _Leaving(ModelHook):
    """Takes itself off in its first call, as the hook of streamed group offloading does."""

    def post_forward(self, module, output):
        module._diffusers_hook.remove_hook("leaving", recurse=False)
        return output


def test_a_hook_that_takes_itself_off_leaves_ddit_on(pipe):
    with ddit.apply(pipe, patches=fixed(1, 2, 4)) as handle:
        expected = tiny.sample(pipe)
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.register_hook(_Leaving(), "leaving")
    with ddit.apply(pipe, patches=fixed(1, 2, 4)) as handle:
        for _ in range(2):
            assert torch.equal(tiny.sample(pipe), expected)
            assert handle.report.strip() == "1 2 4 4 4 4 4 4"
    forward = vars(pipe.transformer)["forward"]
    assert "ddit" not in type(forward).__module__ and not registry.hooks


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_in_int8(pipe, when):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    with ddit.apply(pipe, patches=fixed(1, 2, 4), adapter=opened(pipe.transformer)):
        expected = tiny.sample(pipe)
    if when == "before":
        quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())
    with ddit.apply(pipe, patches=fixed(1, 2, 4), adapter=opened(pipe.transformer)) as handle:
        if when == "after":
            quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())
        drawn = tiny.sample(pipe)
    assert handle.report.strip() == "1 2 4 4 4 4 4 4" and 0 < (drawn - expected).std() < 0.1 * expected.std()


def test_sigmas_of_ones_own(pipe):
    """They are the run's: a plan places its calls among them."""
    sigmas = [1.0, 0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05]
    with ddit.apply(pipe, patches=FULL, skip=SkipSchedule(speedup=2)) as handle:
        tiny.sample(pipe, steps=len(sigmas), sigmas=sigmas)
    levels = [step.sigma for step in handle.report.steps]
    assert levels == pytest.approx([float(x) for x in pipe.scheduler.sigmas[:-1]]) and len(levels) == len(sigmas)
    assert handle.report.counts == {0: 5, 1: 5}


def test_unknown_arguments_fail_as_without_ddit_and_nones_pass():
    transformer = tiny.transformer()
    with pytest.raises(TypeError) as plain:
        transformer(**call_inputs(), not_there=1)
    with ddit.apply(transformer, patches=FixedSchedule(steps=(2,))):
        with pytest.raises(TypeError) as ours:
            transformer(**call_inputs(), not_there=1)
        nones = dict(guidance=None, joint_attention_kwargs=None, controlnet_block_samples=None)
        assert torch.equal(transformer(**call_inputs(), **nones).sample, transformer(**call_inputs()).sample)
    assert "not_there" in str(plain.value) and "not_there" in str(ours.value)


def test_a_run_in_which_nothing_is_coarse_says_so(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ddit.apply(pipe, patches=PatchSchedule(threshold=0.0)) as handle:
            tiny.sample(pipe)
    assert "0 coarse" in repr(handle.report)


@pytest.mark.parametrize("steps", [5, 8])
def test_a_few_step_model_is_told_that_there_is_little_to_gain(pipe, steps):
    with pytest.warns(UserWarning, match="little to gain"), ddit.apply(pipe, patches=PatchSchedule(threshold=1e-12)):
        tiny.sample(pipe, steps=steps)
