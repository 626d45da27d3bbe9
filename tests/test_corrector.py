"""Correctors of forecasts: exact at the start, heard once a gap, strict about their base, gone when removed."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import UniPCMultistepScheduler

import ddit
import tiny
from ddit import FixedSchedule, ForecastCorrector, PatchAdapter, SkipSchedule
from ddit.config import FULL
from ddit.handle import Handle
from ddit.pretrained import config_hash
from ddit.skip.forecast import Reference, half_log_snr
from ddit.skip.skipper import Skipper
from test_architectures import CASES, SMALL, draw, parameters

CALLED = (1, 1, 0, 0, 1, 0, 0, 0)
"""Two gaps, after steps 1 and 4."""
SKIP = SkipSchedule(threshold=0.01)


def corrector_for(model, *, seed=0, size=0.02, **settings) -> ForecastCorrector:
    """A corrector that does something: every weight is random."""
    corrector = ForecastCorrector.for_model(model, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in corrector.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return corrector


class Listed:
    """Skips where the sample's list says 0."""

    watches = False

    def __init__(self, *samples):
        self.samples = samples

    def choose(self, context, moved, called):
        return [sample[context.step] == 0 for sample in self.samples]


def skipping(pipe, *samples, corrector=None) -> Handle:
    """Full steps and skipped ones, listed for each sample."""
    handle = ddit.apply(pipe, patches=FULL, skip=SKIP, corrector=corrector)
    loaded = handle.plan.corrector
    handle.plan = replace(handle.plan, make_skipper=lambda share: Skipper(Listed(*samples), loaded))
    return handle


def reference(shape=(2, 4, 8, 8), width=32, tokens=16, seed=0) -> Reference:
    """One with two before it, samples at noise levels of their own."""
    generator = torch.Generator().manual_seed(seed)
    made = None
    for noise in ([0.9, 0.8], [0.8, 0.7], [0.6, 0.5]):
        here = torch.tensor(noise[: shape[0]])
        z, velocity = torch.randn(2, *shape, generator=generator)
        hidden = torch.randn(shape[0], tokens, width, generator=generator)
        made = Reference.after(z, here, velocity, made, end=here - 0.05, hidden=hidden)
    assert made is not None
    return made


# In a run


@parameters([name for name in SMALL if CASES[name].rows == 1])  # as `CALLED` is for one
def test_a_new_corrector_changes_nothing_and_a_trained_one_does(name):
    case = CASES[name]
    pipe = case.make()
    with skipping(pipe, CALLED):
        free = draw(pipe, case)
    with skipping(pipe, CALLED, corrector=ForecastCorrector.for_model(pipe.transformer)):
        assert torch.equal(draw(pipe, case), free)
    with skipping(pipe, CALLED, corrector=corrector_for(pipe.transformer)) as run:
        assert not torch.allclose(draw(pipe, case), free)
    assert [len(step.corrected) for step in run.report.steps] == [0, 0, 1, 0, 0, 1, 0, 0], "passes count once"


def test_it_is_asked_once_for_each_gap_and_calls_no_model(pipe):
    corrector = corrector_for(pipe.transformer)
    calls = []
    listener = pipe.transformer.proj_out.register_forward_pre_hook(lambda *_: calls.append(1))
    with skipping(pipe, CALLED, corrector=corrector) as handle:
        tiny.sample(pipe)
        report = handle.report
    listener.remove()
    assert report.strip() == "1 1 - - 1 - - -" and len(calls) == 3
    latents, net = torch.zeros(1, 4, 16, 16), corrector.path
    expected = 2 * 64 * sum(layer.weight.numel() for layer in (net.first, *net.mix, net.last))
    expected += 2 * sum(net.levels[i].weight.numel() for i in (0, 2, 4)) + 2 * latents.numel() * 2 * 3
    assert report.correction_flops == expected == corrector.count_flops(latents)
    assert [len(step.corrected) for step in report.steps] == [0, 0, 1, 0, 0, 1, 0, 0]
    assert report.flops_fraction == pytest.approx((3 + 2 * expected / report.flops[1]) / 8)


def test_removal_leaves_nothing(pipe):
    plain = tiny.sample(pipe)
    corrector = corrector_for(pipe.transformer)
    with skipping(pipe, CALLED, corrector=corrector):
        assert not torch.allclose(tiny.sample(pipe), plain)
    assert torch.equal(tiny.sample(pipe), plain)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in pipe.transformer.modules())
    assert set(pipe.transformer.state_dict()) == set(tiny.transformer().state_dict())
    assert corrector._hidden is None


def test_attached_by_hand_it_hears_each_call_once(pipe):
    corrector, told = corrector_for(pipe.transformer), []
    attached = corrector.attach(pipe.transformer)
    listener = pipe.transformer.proj_out.register_forward_pre_hook(lambda layer, args: told.append(args[0]))
    tiny.sample(pipe, steps=1)
    assert torch.equal(corrector.take_hidden(), told[0])
    with pytest.raises(AssertionError):
        corrector.take_hidden()
    attached.remove()
    attached.remove()
    listener.remove()
    tiny.sample(pipe, steps=1)
    assert corrector._hidden is None
    assert not any(m._forward_pre_hooks for m in pipe.transformer.modules())


def test_what_the_last_layer_read_takes_part(pipe):
    """It is that layer's input in the called step before, and is kept no longer than needed."""
    corrector, told = corrector_for(pipe.transformer), []
    listener = pipe.transformer.proj_out.register_forward_pre_hook(lambda layer, args: told.append(args[0]))
    encode = corrector.encode
    with skipping(pipe, CALLED, corrector=corrector) as handle:
        corrector.encode = lambda made: (told.append(made.hidden), encode(made))[1]
        tiny.sample(pipe)
        assert handle._state.hidden is None
    listener.remove()
    # Steps 0, 1 and 4 are called; each but the first begins a gap.
    _, second, heard, third, again = told
    assert torch.equal(heard, second) and torch.equal(again, third) and not torch.equal(second, third)
    one = reference()
    made = [encode(replace(one, hidden=torch.randn(2, 16, 32))) for _ in range(2)]
    assert not torch.allclose(*made)


def test_samples_of_one_batch_are_corrected_by_schedules_of_their_own(pipe):
    """As if each were drawn alone."""
    corrector, rows = corrector_for(pipe.transformer), [[1, 1, 0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 1, 1]]
    noise = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    alone = []
    for i, own in enumerate(rows):
        with skipping(pipe, own, corrector=corrector):
            alone.append(tiny.sample(pipe, latents=noise[i : i + 1]))
    with skipping(pipe, *rows, corrector=corrector) as run:
        both = tiny.sample(pipe, prompt=[tiny.PROMPT] * 2, latents=noise)
    assert [sorted(step.corrected) for step in run.report.steps] == [[], [], [0], [1], [], [0], [], []]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-5)


# By itself


def test_each_sample_of_a_batch_is_corrected_by_itself(pipe):
    """Frames, sizes and references of their own: as if it were alone."""
    corrector = corrector_for(pipe.transformer)
    for shape, tokens in (((2, 4, 8, 12), 24), ((2, 4, 3, 8, 12), 72)):
        made, sigma = reference(shape, tokens=tokens), torch.tensor([0.4, 0.2])
        assert made.bend is not None and made.bend.std() > 0.1
        # First, so that nothing is known yet of the batch.
        alone = [corrector.correct(torch.zeros(1, *shape[1:]), sigma[i : i + 1], made.rows([i])) for i in range(2)]
        both = corrector.correct(torch.zeros(shape), sigma, made)
        assert both.shape == shape and both.std() > 0
        for i in range(2):
            torch.testing.assert_close(both[i : i + 1], alone[i])


def test_it_corrects_in_place_and_not_from_a_single_called_step(pipe):
    corrector, sigma = corrector_for(pipe.transformer), torch.tensor([0.4])
    z, velocity = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    known = dict(end=torch.tensor([0.8]), hidden=torch.ones(1, 16, 32))
    first = Reference.after(z, torch.tensor([0.9]), velocity, **known)
    given = velocity.clone()
    assert corrector.correct(given, sigma, first) is given and torch.equal(given, velocity)
    second = Reference.after(z, torch.tensor([0.8]), velocity, first, **{**known, "end": torch.tensor([0.7])})
    assert corrector.correct(given, sigma, second) is given and not torch.equal(given, velocity)


def test_gradients_reach_every_weight(pipe):
    corrector = corrector_for(pipe.transformer)
    corrector.correct(torch.zeros(2, 4, 8, 8), torch.tensor([0.4, 0.2]), reference()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in corrector.parameters())


def test_a_bend_is_what_the_line_before_was_off_by():
    """None for a path that is straight in exp(-lambda / 4), and none where there was no line."""
    sigmas = [torch.tensor([s]) for s in (0.9, 0.7, 0.4)]
    for curved in (False, True):
        made, bends = None, []
        for sigma in sigmas:
            level = half_log_snr(sigma)
            clean = (level.square() if curved else torch.exp(-level / 4)).reshape(1, 1, 1, 1).expand(1, 4, 2, 2)
            made = Reference.after(clean, sigma, torch.zeros_like(clean), made, end=sigma - 0.1)
            bends.append(made.bend)
        assert not bends[0].any() and not bends[1].any()
        assert (bends[2].abs().mean() > 1) if curved else (bends[2].abs().max() < 1e-4)


# Files


def test_saved_and_loaded(pipe, tmp_path):
    corrector = corrector_for(pipe.transformer, sampler="FlowMatchEulerDiscreteScheduler")
    corrector.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["base"] == "FluxTransformer2DModel" and config["base_hash"] == config_hash(pipe.transformer)
    assert config["sampler"] == "FlowMatchEulerDiscreteScheduler" and config["ddit_version"] == ddit.__version__
    again = ForecastCorrector.from_pretrained(tmp_path)
    before, after = corrector.state_dict(), again.state_dict()
    assert not again.training
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    with skipping(pipe, CALLED, corrector=corrector):
        expected = tiny.sample(pipe)
    with skipping(pipe, CALLED, corrector=tmp_path):  # weights lie elsewhere in memory, which rounds otherwise
        torch.testing.assert_close(tiny.sample(pipe), expected)
    half = ForecastCorrector.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with skipping(pipe, CALLED, corrector=half):
        torch.testing.assert_close(tiny.sample(pipe), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("damage", ["cut short", "missing", "extra", "shape", "no config", "an adapter", "pickle"])
def test_damaged_files_are_refused_with_the_folder_named(pipe, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    corrector_for(pipe.transformer).save_pretrained(tmp_path)
    path, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    weights = load_file(path)
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "missing":
        del weights["path.first.weight"]
        save_file(weights, path)
    elif damage == "extra":
        save_file({**weights, "path.mix.2.weight": torch.zeros(2)}, path)
    elif damage == "shape":
        save_file({**weights, "path.first.bias": torch.zeros(7)}, path)
    elif damage == "no config":
        config.unlink()
    elif damage == "an adapter":
        PatchAdapter.for_model(pipe.transformer, rank=2).save_pretrained(tmp_path)
    else:
        path.unlink()
        torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"corrector.*{tmp_path}"):
        ForecastCorrector.from_pretrained(tmp_path)
    before = dict(vars(pipe.transformer))
    with pytest.raises(ValueError, match=str(tmp_path)):
        ddit.apply(pipe, patches=FULL, skip=SKIP, corrector=tmp_path)
    assert vars(pipe.transformer) == before


# Refusals


def test_another_base_is_refused_and_left_untouched(pipe):
    other = corrector_for(tiny.transformer(num_single_layers=2))
    with pytest.raises(ValueError, match=r"corrector was made for a FluxTransformer2DModel.*this is a FluxTransf"):
        ddit.apply(pipe, patches=FULL, skip=SKIP, corrector=other)
    with pytest.raises(ValueError, match="corrector was made for"):
        other.attach(pipe.transformer)
    assert "forward" not in vars(pipe.transformer)
    assert not any(m._forward_pre_hooks for m in pipe.transformer.modules())


def test_without_skipping_and_beside_large_patches_it_is_refused(pipe):
    corrector = corrector_for(pipe.transformer)
    with pytest.raises(ValueError, match="no step is skipped"):
        ddit.apply(pipe, patches=FULL, corrector=corrector)
    for patches in (None, FixedSchedule(steps=(1, 2))):
        with pytest.raises(ValueError, match="learnt from full steps"):
            ddit.apply(pipe, patches=patches, skip=SKIP, corrector=corrector)
    assert not any(m._forward_pre_hooks for m in pipe.transformer.modules())


def test_another_sampler_than_in_training_is_warned_about(pipe, recwarn):
    corrector = ForecastCorrector.for_model(pipe.transformer, sampler="FlowMatchEulerDiscreteScheduler")
    ddit.apply(pipe, patches=FULL, skip=SKIP, corrector=corrector).remove()
    assert not any("Euler" in str(w.message) for w in recwarn)
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.warns(UserWarning, match=r"under FlowMatchEuler.*samples by UniPCMultistepScheduler.*--corrector none"):
        ddit.apply(pipe, patches=FULL, skip=SKIP, corrector=corrector).remove()


def test_it_has_no_forward_of_its_own(pipe):
    with pytest.raises(TypeError, match=r"pass it to ddit\.apply"):
        corrector_for(pipe.transformer)()
    with pytest.raises(ValueError, match="Linear is not supported"):
        ForecastCorrector.for_model(torch.nn.Linear(2, 2))


def test_two_transformers_take_no_corrector():
    pipe = tiny.wan_pipeline(two=True)
    corrector = ForecastCorrector.for_model(pipe.transformer)
    with pytest.raises(ValueError, match="correctors serve one transformer and this pipeline has two"):
        ddit.apply(pipe, patches=FULL, speedup=2, corrector=corrector)
