"""The ComfyUI node pack, on a stand-in of the parts of ComfyUI that it touches."""

from __future__ import annotations

import json
import logging
import sys
from copy import copy
from itertools import groupby, pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ddit.config import SkipSchedule
from ddit.patches import consistent_level, shrink

PACK = Path(__file__).resolve().parent.parent / "comfyui"
WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))
KINDS = ("outer_sample", "predict_noise", "calc_cond_batch", "apply_model")
STEPS = 12
ODD = (1, 4, 10, 14)
VARIANCE = 0.25


# --- the stand-in ---


class Const:
    """ComfyUI's `comfy.model_sampling.CONST`: a flow between pictures and noise."""

    def noise_scaling(self, sigma, noise, latents):
        return sigma * noise + (1 - sigma) * latents


class ImageToImage(Const):
    def noise_scaling(self, sigma, noise, latents):
        return latents


class Executor:
    """Calls wrappers from the first one inwards, as `comfy.patcher_extension.WrapperExecutor`."""

    def __init__(self, wrappers, original, class_obj=None):
        self.wrappers, self.original, self.class_obj = wrappers, original, class_obj

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](Executor(self.wrappers[1:], self.original, self.class_obj), *args, **kwargs)


class Patcher:
    """A model of ComfyUI with what hangs on it. It knows pictures of Gaussian pixels whose mean the prompt gives."""

    def __init__(self, sampling=None, patch_size: int | tuple[int, ...] | None = 2):
        self.objects = {"model_sampling": sampling or Const(), "diffusion_model": SimpleNamespace()}
        if patch_size is not None:
            self.objects["diffusion_model"].patch_size = patch_size
        self.model_options = {"transformer_options": {}}
        self.wrappers: dict = {}
        self.calls: list = []

    def get_model_object(self, name):
        return self.objects[name]

    def clone(self):
        other = copy(self)
        other.model_options = {"transformer_options": dict(self.model_options["transformer_options"])}
        other.wrappers = {kind: dict(keys) for kind, keys in self.wrappers.items()}
        return other

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def executor(self, kind, original, class_obj=None):
        return Executor([w for some in self.wrappers.get(kind, {}).values() for w in some], original, class_obj)

    def model(self, x, sigma, c_concat, c_crossattn, control, options, **conditions):
        self.calls.append(SimpleNamespace(x=x, sigma=sigma, c_concat=c_concat, conditions=conditions))
        level = sigma.reshape(-1, *[1] * (x.ndim - 1))
        mean = c_crossattn.reshape(level.shape)
        gain = (1 - level) * VARIANCE / ((1 - level) ** 2 * VARIANCE + level**2)
        return mean + gain * (x - (1 - level) * mean)


class Guider:
    """The parts of `comfy.samplers.CFGGuider` and its sampling."""

    def __init__(self, patcher, positive, negative, cfg, together):
        self.patcher, self.cfg, self.together = patcher, cfg, together
        self.conds = {"positive": positive, "negative": negative}
        self.model_options = {"transformer_options": dict(patcher.model_options["transformer_options"])}

    def sample(self, noise, sampler, sigmas):
        run = self.patcher.executor("outer_sample", self.inner, self)
        return run(noise, torch.zeros_like(noise), sampler, sigmas, None, seed=1, latent_shapes=[noise.shape])

    def inner(self, noise, latents, sampler, sigmas, *args, **kwargs):
        options = {"transformer_options": {**self.model_options["transformer_options"], "sample_sigmas": sigmas}}
        predict = self.patcher.executor("predict_noise", self.predict, self)
        return sampler.sampler_function(
            lambda x, s: predict(x, s.expand(len(x)), options, 1), sigmas[0] * noise, sigmas
        )

    def predict(self, x, sigma, options, seed):
        calc = self.patcher.executor("calc_cond_batch", self.calc)
        conds = [self.conds["positive"], None if self.cfg == 1 else self.conds["negative"]]
        positive, negative = calc(None, conds, x, sigma, options)
        return negative + (positive - negative) * self.cfg if self.cfg != 1 else positive

    def calc(self, model, conds, x, sigma, options):
        """One entry at most of each list is in force; all in one call of the model, or one after the other."""
        answers = [torch.zeros_like(x) for _ in conds]
        asked = [(i, c) for i, cond in enumerate(conds) for c in cond or [] if in_force(c, float(sigma[0]))]
        for part in [asked] if self.together else [[one] for one in asked]:
            inputs: dict = {}
            for _, c in part:
                values = {name: value.cond for name, value in c["model_conds"].items()}
                for name, value in values.items():
                    inputs.setdefault(name, []).append(value.expand(len(x), *value.shape[1:]))
            call = {name: torch.cat(values) for name, values in inputs.items()}
            apply = self.patcher.executor("apply_model", self.patcher.model)
            x_in, levels = torch.cat([x] * len(part)), torch.cat([sigma] * len(part))
            known = [call.pop(name, None) for name in ("c_concat", "c_crossattn")]
            out = apply(x_in, levels, *known, part[0][1].get("control"), options["transformer_options"], **call)
            for (i, _), answer in zip(part, out.chunk(len(part)), strict=True):
                answers[i] += answer
        return answers


def in_force(cond, sigma):
    return cond.get("timestep_end", 0) <= sigma <= cond.get("timestep_start", 1)


def sample_euler(model, x, sigmas):
    for now, then in pairwise(sigmas):
        x = x + (x - model(x, now)) / now * (then - now)
    return x


def sample_euler_ancestral(model, x, sigmas):
    return sample_euler(model, x, sigmas)


def sample_heun(model, x, sigmas):
    for now, then in pairwise(sigmas):
        slope = (x - model(x, now)) / now
        ahead = x + slope * (then - now)
        if then > 0:
            slope = (slope + (ahead - model(ahead, then)) / then) / 2
        x = x + slope * (then - now)
    return x


@pytest.fixture(scope="module")
def pack():
    """The node pack, imported beside the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        extension = ModuleType("comfy.patcher_extension")
        extension.WrappersMP = SimpleNamespace(**{kind.upper(): kind for kind in KINDS})  # type: ignore[attr-defined]
        sampling, api = ModuleType("comfy.model_sampling"), ModuleType("comfy_api.latest")
        sampling.CONST = Const  # type: ignore[attr-defined]
        api.ComfyExtension = object  # type: ignore[attr-defined]
        api.io = SimpleNamespace(  # type: ignore[attr-defined]
            ComfyNode=object,
            Schema=SimpleNamespace,
            NodeOutput=lambda value: SimpleNamespace(result=(value,)),
            **{
                name: SimpleNamespace(Input=lambda id, **more: SimpleNamespace(id=id, **more), Output=SimpleNamespace)
                for name in ("Model", "Combo", "Float", "Int", "Boolean")
            },
        )
        for module in (ModuleType("comfy"), ModuleType("comfy_api"), extension, sampling, api):
            patch.setitem(sys.modules, module.__name__, module)
        for name in ("comfyui", "comfyui.nodes", "comfyui.sampling"):
            patch.delitem(sys.modules, name, raising=False)
        import comfyui.nodes

        yield comfyui.nodes
        for name in ("comfyui", "comfyui.nodes", "comfyui.sampling"):
            sys.modules.pop(name)


@pytest.fixture
def nodes(pack):
    """Both nodes as functions of a model, with the defaults of their inputs."""

    def node(kind):
        inputs = {i.id: i.default for i in kind.define_schema().inputs if i.id != "model"}
        return lambda model, **changes: kind.execute(model, **{**inputs, **changes}).result[0]

    return SimpleNamespace(patches=node(pack.DDiTPatches), skip=node(pack.DDiTSkip))


def prompt(value, uuid, **more):
    conds = {"c_crossattn": torch.tensor([[float(value)]]), **more.pop("model_conds", {})}
    return {"uuid": uuid, "model_conds": {k: SimpleNamespace(cond=v) for k, v in conds.items()}, **more}


def noise_like(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(
    model, noise=None, *, cfg=3.0, together=True, sampler=sample_euler, steps=STEPS, positive=None, negative=None
):
    """Draw, and what the model was called with."""
    model.calls.clear()
    guider = Guider(model, positive or [prompt(0.5, "p")], negative or [prompt(-0.2, "n")], cfg, together)
    options = SimpleNamespace(sampler_function=sampler, extra_options={})
    drawn = guider.sample(noise_like(ODD) if noise is None else noise, options, torch.linspace(1, 0, steps + 1))
    return drawn, list(model.calls)


def widths(calls):
    return [call.x.shape[-1] for call in calls]


# --- nothing asked for ---


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("together", [True, False])
def test_nodes_that_are_off_change_no_bit(nodes, cfg, together):
    model = Patcher()
    plain, calls = sample(model, cfg=cfg, together=together)
    for off in (
        nodes.skip(nodes.patches(model, threshold=0.0), speedup=1.0),
        nodes.patches(nodes.skip(model, by="threshold", threshold=0.0), schedule="fixed", share=0.0),
    ):
        drawn, same = sample(off, cfg=cfg, together=together)
        assert torch.equal(drawn, plain)
        assert widths(same) == widths(calls)


def test_the_model_handed_in_stays_as_it_was(nodes):
    model = Patcher()
    nodes.skip(nodes.patches(model, schedule="fixed", share=1.0))
    assert model.wrappers == {} and model.model_options == {"transformer_options": {}}


# --- patches ---


@pytest.mark.parametrize("shape", [ODD, (1, 4, 3, 10, 14)])
def test_the_first_steps_see_fewer_tokens_at_a_corrected_noise_level(nodes, shape):
    model = Patcher(patch_size=(1, 2, 2))
    drawn, calls = sample(nodes.patches(model, schedule="fixed", largest="4x", share=0.5), noise_like(shape))
    assert drawn.shape == shape and drawn.isfinite().all()
    # 10 x 14 is continued to 16 x 16, the next multiple of 4 times the model's own patches.
    assert [tuple(call.x.shape[-2:]) for call in calls] == [(4, 4)] * 6 + [(10, 14)] * 6
    expected = consistent_level(torch.linspace(1, 0, STEPS + 1), 4)[1]
    torch.testing.assert_close(torch.stack([call.sigma[0] for call in calls[:6]]), expected[:6])


def test_a_coarse_step_is_exact_where_there_is_no_detail(nodes):
    model = Patcher()
    model.model = lambda x, *args, **kwargs: torch.full_like(x, 0.7)  # what is drawn is a grey square
    drawn, _ = sample(nodes.patches(model, schedule="fixed", share=1.0), cfg=1.0)
    torch.testing.assert_close(drawn, torch.full(ODD, 0.7))


def test_the_rule_decides_for_each_sample(nodes):
    ruled = nodes.patches(Patcher(), threshold=0.002, careful=False)
    noise = noise_like((2, *ODD[1:])) * torch.tensor([0.1, 3.0]).reshape(2, 1, 1, 1)
    both, calls = sample(ruled, noise)
    assert {len(call.x) for call in calls} == {2, 4}, "in some steps the samples part"
    ones = [sample(ruled, noise[i : i + 1])[0] for i in range(2)]
    torch.testing.assert_close(both, torch.cat(ones))


def test_a_careful_rule_keeps_steps_full_once_detail_shows_through_the_noise(nodes):
    _, careful = sample(nodes.patches(Patcher(), threshold=1.0), steps=24)
    _, bold = sample(nodes.patches(Patcher(), threshold=1.0, careful=False), steps=24)
    assert widths(bold) == [14] * 3 + [4] * 21
    assert widths(careful) == [14] * 3 + [4] + [8] * 2 + [14] * 18  # from sigma .84 and .79 down


def test_channels_beside_the_latents_are_pooled_with_them(nodes):
    beside = noise_like((1, 5, 10, 14), seed=3)
    image = [prompt(0.5, "p", model_conds={"c_concat": beside})]
    _, calls = sample(nodes.patches(Patcher(), schedule="fixed", largest="2x", share=0.3), positive=image, cfg=1.0)
    wide = torch.cat([beside, beside[..., -2:].flip(-1)], -1)  # mirrored
    padded = torch.cat([wide, wide[..., -2:, :].flip(-2)], -2)
    torch.testing.assert_close(calls[0].c_concat, shrink(padded, 2, 2, "noise-consistent"))
    assert torch.equal(calls[-1].c_concat, beside)


@pytest.mark.parametrize(
    "more, reason",
    [
        ({"control": object()}, "ControlNet"),
        ({"model_conds": {"ref_latents": noise_like((1, 4, 6, 6))}}, "ref_latents"),
        ({"model_conds": {"denoise_mask": noise_like((1, 1, 10, 14))}}, "denoise_mask"),
        ({"model_conds": {"attention_mask": noise_like((1, 9, 9))}}, "attention_mask"),
        ({"model_conds": {"camera_conditions": noise_like((1, 24, 3, 80, 112))}}, "camera_conditions"),
        ({"model_conds": {"position_ids": noise_like((1, 9))}}, "position_ids"),
    ],
)
def test_what_lies_on_the_full_grid_keeps_all_prompts_at_full_steps(nodes, caplog, more, reason):
    positive = [prompt(0.5, "p", **more)]
    plain, _ = sample(Patcher(), positive=positive, together=False)
    with caplog.at_level(logging.WARNING):
        drawn, _ = sample(nodes.patches(Patcher(), schedule="fixed", share=0.5), positive=positive, together=False)
    assert torch.equal(drawn, plain)
    assert [reason in record.message for record in caplog.records] == [True]


def test_easycache_keeps_full_steps(nodes, caplog):
    """Its memory is of one grid."""
    model = nodes.patches(Patcher(), schedule="fixed", share=0.5)
    model.model_options["transformer_options"]["wrappers"] = {"diffusion_model": {"easycache": [object()]}}
    with caplog.at_level(logging.WARNING):
        _, calls = sample(model)
    assert set(widths(calls)) == {14} and "EasyCache" in caplog.text


def test_mean_flow_models_are_refused(nodes):
    model = Patcher()
    model.objects["diffusion_model"].time_r_in = object()
    with pytest.raises(ValueError, match="MeanFlow"):
        nodes.patches(model)


def test_a_patch_size_that_the_model_does_not_tell_is_taken_from_the_node(nodes):
    _, calls = sample(nodes.patches(Patcher(patch_size=None), schedule="fixed", share=0.1, patch_size=1, largest="2x"))
    assert calls[0].x.shape[-2:] == (5, 7)
    chained = nodes.skip(nodes.patches(Patcher(patch_size=None), schedule="fixed", share=0.1, patch_size=1))
    assert chained.model_options["transformer_options"]["ddit"].patch_size == 1
    ltx = Patcher(patch_size=None)
    ltx.objects["diffusion_model"].patchifier = SimpleNamespace(patch_size=(1, 1, 1))
    assert nodes.patches(ltx, schedule="fixed").model_options["transformer_options"]["ddit"].patch_size == 1


# --- skipping ---


@pytest.mark.parametrize("cfg, together", [(1.0, True), (3.0, True), (3.0, False)])
def test_a_speedup_halves_the_calls(nodes, cfg, together):
    plain, calls = sample(Patcher(), cfg=cfg, together=together)
    drawn, fewer = sample(nodes.skip(Patcher(), speedup=2.0), cfg=cfg, together=together)
    assert 2 * len(fewer) == len(calls)
    error = (drawn - plain).std() / plain.std()
    assert 0 < error < 0.1
    same, _ = sample(nodes.skip(Patcher(), speedup=2.0), cfg=cfg, together=True)
    torch.testing.assert_close(drawn, same)


def test_a_threshold_skips_more_the_higher_it_is(nodes):
    counts = [len(sample(nodes.skip(Patcher(), by="threshold", threshold=t))[1]) for t in (0.0, 0.02, 0.2)]
    assert counts[0] == STEPS > counts[1] > counts[2]


def test_a_batch_is_drawn_as_its_samples_are(nodes):
    model = nodes.skip(nodes.patches(Patcher(), schedule="fixed", share=0.4))
    noise = noise_like((2, *ODD[1:]))
    both, _ = sample(model, noise)
    torch.testing.assert_close(both, torch.cat([sample(model, noise[i : i + 1])[0] for i in range(2)]))


def test_a_prompt_that_comes_late_is_asked(nodes):
    positive = [prompt(0.5, "a", timestep_end=0.4), prompt(-0.9, "b", timestep_start=0.4)]
    _, calls = sample(nodes.skip(Patcher(), speedup=4.0), positive=positive, cfg=1.0)
    asked = [float(call.sigma[0]) for call in calls]
    levels = torch.linspace(1, 0, STEPS + 1)
    assert float(levels[levels < 0.4][0]) in asked


# --- both, samplers, runs ---


def test_the_nodes_may_stand_in_either_order_and_replace_themselves(nodes):
    one, calls = sample(nodes.skip(nodes.patches(Patcher(), schedule="fixed", share=0.4)))
    other, same = sample(nodes.patches(nodes.skip(Patcher()), schedule="fixed", share=0.4))
    again, _ = sample(nodes.skip(nodes.patches(nodes.skip(Patcher(), speedup=5.0), schedule="fixed", share=0.4)))
    assert torch.equal(one, other) and torch.equal(one, again) and widths(calls) == widths(same)
    assert len(calls) < STEPS and {4, 14} == set(widths(calls))


def test_a_second_sampler_finds_nothing_of_the_first(nodes):
    model = nodes.skip(nodes.patches(Patcher(), threshold=0.01))
    large = noise_like((2, 4, 20, 30))
    alone, _ = sample(model, large)
    sample(model)
    after, _ = sample(model, large)
    assert torch.equal(alone, after)
    assert "ddit_run" not in model.model_options["transformer_options"]


def test_a_noise_level_seen_twice_has_one_decision(nodes):
    _, calls = sample(nodes.patches(Patcher(), schedule="fixed", share=0.5), sampler=sample_heun)
    assert widths(calls) == [4] * 11 + [14] * 12
    plain, calls = sample(Patcher(), sampler=sample_heun)
    drawn, fewer = sample(nodes.skip(Patcher(), speedup=2.0), sampler=sample_heun)
    levels = [float(call.sigma[0]) for call in fewer]
    assert len(fewer) < 0.6 * len(calls) and (drawn - plain).std() < 0.05 * plain.std()
    assert all(levels.count(level) == 2 for level in levels[1:])


def test_the_path_keeps_one_point_for_a_noise_level_and_starts_anew_where_it_rises(pack):
    sampling = sys.modules["comfyui.sampling"]
    run = sampling.Run(sampling.Settings(), [1.0, 0.8, 0.6, 0.4, 0.0], noisy=False)
    points = [torch.full(ODD, float(i)) for i in range(5)]
    for sigma, point in zip((1.0, 0.8, 0.8, 0.6), points[:4], strict=True):
        run.begin(point, sigma)
    assert [float(z.mean()) for z in run.points] == [0.0, 2.0, 3.0]
    run.begin(points[4], 0.8)
    assert [float(z.mean()) for z in run.points] == [4.0] and run.step == 1


def test_policies_are_told_what_those_of_pipelines_are(pack):
    """Where a step ends, what was chosen before, and what the sampler remembers."""
    sampling = sys.modules["comfyui.sampling"]
    settings = sampling.Settings(sampling.FirstSteps(2, 0.5), SkipSchedule(threshold=0.1))
    sampler = SimpleNamespace(sampler_function=SimpleNamespace(__name__="sample_dpmpp_2m"))
    assert next(n for name, n in sampling.REMEMBERED.items() if name in sampling.name_of(sampler)) == 2
    run = sampling.Run(settings, [1.0, 0.8, 0.6, 0.4, 0.0], noisy=False, remembers=2)
    told, choose = [], run.skipper.choose
    run.skipper.choose = lambda context, *rest: told.append(context) or choose(context, *rest)
    for sigma in (1.0, 0.8, 0.8, 0.7, 0.4):  # one level twice, and one between two steps
        run.begin(noise_like(ODD), sigma)
    assert [(c.sigma, c.end) for c in told] == [(1.0, 0.8), (0.8, 0.6), (0.7, 0.6), (0.4, 0.0)]
    assert [len(c.chosen) for c in told] == [0, 1, 2, 3] and told[-1].chosen[:2] == [[2], [2]]
    assert {c.remembers for c in told} == {2}


def test_the_rule_settles_after_a_change_of_size(nodes):
    """It keeps a size until the difference spans steps of that size alone."""
    _, calls = sample(nodes.patches(Patcher(), threshold=0.002, careful=False), noise_like(ODD), steps=24, cfg=1.0)
    runs = [len(list(group)) for _, group in groupby(widths(calls))]
    assert len(runs) > 1 and all(length >= 3 for length in runs[:-1])


def test_a_list_without_prompts_is_no_answer_to_wait_for(nodes):
    """As guiders ask that leave one of several lists out."""
    plain, calls = sample(Patcher(), cfg=1.0)

    def sample_as(model):
        model.calls.clear()
        guider = Guider(model, [prompt(0.5, "p")], [prompt(-0.2, "n")], 1.0, True)

        def predict(x, sigma, options, seed):
            calc = guider.patcher.executor("calc_cond_batch", guider.calc)
            return calc(None, [None, guider.conds["positive"]], x, sigma, options)[1]

        guider.predict = predict
        options = SimpleNamespace(sampler_function=sample_euler, extra_options={})
        return guider.sample(noise_like(ODD), options, torch.linspace(1, 0, STEPS + 1)), len(model.calls)

    drawn, count = sample_as(nodes.skip(Patcher(), speedup=2.0))
    assert 2 * count == len(calls) and (drawn - plain).std() < 0.1 * plain.std()


def test_a_sampler_that_goes_back_asks_the_model_anew(nodes):
    def sample_there_and_back(model, x, sigmas):
        middle = sample_euler(model, x, sigmas[:8])
        return sample_euler(model, middle + (sigmas[4] - sigmas[7]) * torch.ones_like(x), sigmas[4:])

    _, calls = sample(nodes.skip(Patcher(), by="threshold", threshold=1.0), sampler=sample_there_and_back)
    asked = [round(STEPS * (1 - float(call.sigma[0]))) for call in calls]
    assert asked == [0, 1, 2, 4, 5, 6]


def test_a_sampler_that_adds_noise_keeps_full_steps_but_for_a_fixed_schedule(nodes, caplog):
    plain, _ = sample(Patcher(), sampler=sample_euler_ancestral)
    with caplog.at_level(logging.WARNING):
        drawn, _ = sample(nodes.skip(nodes.patches(Patcher(), threshold=1.0)), sampler=sample_euler_ancestral)
    assert torch.equal(drawn, plain)
    assert ["adds noise" in record.message for record in caplog.records] == [True]
    _, calls = sample(nodes.patches(Patcher(), schedule="fixed", share=0.5), sampler=sample_euler_ancestral)
    assert widths(calls) == [4] * 6 + [14] * 6


def test_the_console_tells_what_ran(nodes, caplog):
    with caplog.at_level(logging.INFO):
        sample(nodes.skip(nodes.patches(Patcher(), schedule="fixed", largest="2x", share=0.3)))
    line = caplog.records[-1].message
    assert line.startswith("ddit: 2 2 2 ") and set(line.split()[1:]) == {"2", "1", "-"}


def test_latents_that_are_no_pictures_keep_full_steps(nodes, caplog):
    tokens = noise_like((1, 8, 30))
    plain, _ = sample(Patcher(), tokens)
    drawn, _ = sample(nodes.skip(nodes.patches(Patcher(), schedule="fixed", share=0.5)), tokens)
    assert torch.equal(drawn, plain) and "no pictures" in caplog.text


# --- what is refused, and what is shipped ---


@pytest.mark.parametrize("sampling", [object(), ImageToImage()])
def test_models_that_are_no_flow_are_refused(nodes, sampling):
    for node in (nodes.patches, nodes.skip):
        with pytest.raises(ValueError, match="flow-matching model"):
            node(Patcher(sampling))


def test_patches_that_are_not_square_are_refused(nodes):
    with pytest.raises(ValueError, match="16 x 1"):
        nodes.patches(Patcher(patch_size=(16, 1)))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_fit_the_nodes_and_their_links(pack, path):
    flow = json.loads(path.read_text())
    by_id = {node["id"]: node for node in flow["nodes"]}
    schemas = {s.node_id: s for s in (pack.DDiTPatches.define_schema(), pack.DDiTSkip.define_schema())}
    ours = [node for node in flow["nodes"] if node["type"] in schemas]
    assert ours, "a workflow shows a node of ours"
    for node in ours:
        inputs = [i for i in schemas[node["type"]].inputs if i.id != "model"]
        assert len(node["widgets_values"]) == len(inputs)
        for value, one in zip(node["widgets_values"], inputs, strict=True):
            assert value in one.options if hasattr(one, "options") else type(value) is type(one.default)
    for link, source, output, target, slot, kind in flow["links"]:
        assert by_id[source]["outputs"][output]["type"] == kind == by_id[target]["inputs"][slot]["type"]
        assert link in by_id[source]["outputs"][output]["links"] and by_id[target]["inputs"][slot]["link"] == link


def test_there_are_workflows():
    assert len(WORKFLOWS) >= 2
