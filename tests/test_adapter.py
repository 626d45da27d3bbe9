"""Adapters: exact at the start, strict about their base, at home beside a user's LoRA."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import UniPCMultistepScheduler
from diffusers.utils import hub_utils
from huggingface_hub import ModelCard
from peft import LoraConfig

import ddit
import tiny
from ddit import PatchAdapter, ScheduleConfig
from ddit.adapter import config_hash
from ddit.anchor import Anchor
from ddit.config import Start
from ddit.models import architecture_for
from ddit.patches import half_log_snr, pack, unpack

COARSE = ScheduleConfig(policy="fixed", steps=(1, 2, 4, 4, 2, 1))


def adapter_for(model, *, seed=0, size=0.02, **settings) -> PatchAdapter:
    """An adapter that does something: every weight is random."""
    adapter = PatchAdapter.for_model(model, **{"rank": 4, **settings})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return adapter


def with_user_lora(model, seed=1) -> None:
    """A LoRA on attention and feed-forward layers, added through peft as diffusers does."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["to_q", "net.0.proj", "proj_mlp", "proj_out"], init_lora_weights=False)
    model.add_adapter(config, adapter_name="style")


@pytest.mark.parametrize("start", ["noise-consistent", "bilinear"])
def test_a_new_adapter_is_the_training_free_step(pipe, start: Start):
    adapter = PatchAdapter.for_model(pipe.transformer, start=start)
    config = ScheduleConfig(policy="fixed", steps=COARSE.steps, **{"gain": 0.0, **adapter.form})
    with ddit.apply(pipe, config=config):
        free = tiny.sample(pipe)
    with ddit.apply(pipe, adapter=adapter, config=config):
        assert torch.equal(tiny.sample(pipe), free)


def test_scale_one_is_bit_equal_and_removal_leaves_no_hooks(pipe):
    plain = tiny.sample(pipe)
    adapter = adapter_for(pipe.transformer)
    with ddit.apply(pipe, adapter=adapter, config=ScheduleConfig(threshold=0.0)):
        assert torch.equal(tiny.sample(pipe), plain)
    assert torch.equal(tiny.sample(pipe), plain)
    assert not any(m._forward_hooks for m in pipe.transformer.modules())
    assert set(pipe.transformer.state_dict()) == set(tiny.transformer().state_dict())


def test_every_part_has_its_share(pipe):
    """Each part alone changes the picture, and gradients reach all of them."""
    with ddit.apply(pipe, config=COARSE):
        free = tiny.sample(pipe)
    adapter = adapter_for(pipe.transformer)
    saved = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    for part in ("embed", "head", "residual", "size", "lora"):
        with torch.no_grad():
            for name, p in adapter.named_parameters():
                keep = name.split(".")[2] == part
                p.copy_(saved[name] if keep else torch.zeros_like(p))
        with ddit.apply(pipe, adapter=adapter, config=COARSE):
            assert not torch.allclose(tiny.sample(pipe), free), part


def test_an_anchored_adapter_is_silent_without_an_anchor(pipe):
    """It was never trained on such steps; one without anchors speaks at once."""
    config = ScheduleConfig(policy="fixed", steps=(2,))
    with ddit.apply(pipe, config=config):
        free = tiny.sample(pipe)
    for anchored in (True, False):
        adapter = adapter_for(pipe.transformer, anchored=anchored)
        with ddit.apply(pipe, adapter=adapter, config=config):
            assert torch.equal(tiny.sample(pipe), free) == anchored


@pytest.mark.parametrize("scale", [2, 4])
def test_gradients_reach_the_parts_of_the_scale_that_ran(scale):
    model = tiny.transformer().requires_grad_(False)
    adapter = adapter_for(model)
    config = ScheduleConfig(policy="fixed", steps=(1, scale))
    with ddit.apply(model, adapter=adapter, config=config):
        tiny_call(model, sigma=0.7)
        tiny_call(model).square().mean().backward()
    for name, p in adapter.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == name.startswith(f"parts.{scale}."), name


def tiny_call(model, sigma=0.6, batch=1, side=8):
    architecture = architecture_for(model)
    ids = torch.zeros(side * side, 3)
    ids[:, 1], ids[:, 2] = torch.arange(side * side) // side, torch.arange(side * side) % side
    generator = torch.Generator().manual_seed(3)
    return model(
        hidden_states=torch.randn(batch, side * side, architecture.features, generator=generator),
        encoder_hidden_states=torch.randn(batch, 5, 32, generator=generator),
        pooled_projections=torch.randn(batch, 32, generator=generator),
        timestep=torch.full((batch,), sigma),
        img_ids=ids,
        txt_ids=torch.zeros(5, 3),
    ).sample


def test_pack_and_unpack_are_inverses():
    for shape in [(2, 3, 8, 12), (2, 3, 5, 8, 4)]:
        z = torch.randn(shape)
        tokens = pack(z, 4)
        assert tokens.shape == (2, z[0, 0].numel() // 16, 3 * 16)
        assert torch.equal(unpack(tokens, 4, shape), z)
    one = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert pack(one, 2)[0, 1].tolist() == [2.0, 3.0, 6.0, 7.0]


def test_flops_of_the_adapter_are_counted(pipe):
    with ddit.apply(pipe, config=COARSE) as handle:
        tiny.sample(pipe)
        free = handle.report.flops
    adapter = adapter_for(pipe.transformer)
    with ddit.apply(pipe, adapter=adapter, config=COARSE) as handle:
        tiny.sample(pipe)
        learnt = handle.report.flops
    assert learnt[1] == free[1]
    for scale, tokens in ((2, 16), (4, 4)):
        text, parts = 20, adapter.parts[str(scale)]
        image = sum(m.weight.numel() for m in (parts.embed, parts.head, parts.residual))
        double = sum(p.numel() for k, m in parts.lora.items() if not k.startswith("single") for p in m.parameters())
        single = sum(p.numel() for k, m in parts.lora.items() if k.startswith("single") for p in m.parameters())
        expected = 2 * (tokens * (image + double) + (tokens + text) * single)
        assert learnt[scale] - free[scale] == expected


# One that does not ask the model


MENDED = ScheduleConfig(policy="fixed", steps=(1, 1, 2, 2, 1, 2))


def test_a_new_path_past_the_model_changes_nothing(pipe):
    config = ScheduleConfig(policy="fixed", steps=MENDED.steps, gain=0.0)
    with ddit.apply(pipe, config=config):
        free = tiny.sample(pipe)
    with ddit.apply(pipe, adapter=PatchAdapter.for_model(pipe.transformer, asks=False), config=MENDED):
        assert torch.equal(tiny.sample(pipe), free)


def test_mended_forecasts_ask_nothing_and_leave_nothing(pipe):
    """No calls of the model. The path speaks once there are two steps at scale 1 to forecast from."""
    plain = tiny.sample(pipe)
    adapter = adapter_for(pipe.transformer, asks=False)
    config = ScheduleConfig(policy="fixed", steps=(1, 2, 2, 2, 2, 2), gain=0.0)
    with ddit.apply(pipe, config=config):
        once = tiny.sample(pipe)
    with ddit.apply(pipe, adapter=adapter, config=config):
        assert torch.equal(tiny.sample(pipe), once)
    with ddit.apply(pipe, adapter=adapter, config=MENDED) as handle:
        mended = tiny.sample(pipe)
        report = handle.report
    assert report.strip() == "1 1 - - 1 - - -" and not torch.allclose(mended, plain)
    latents = torch.zeros(1, 4, 16, 16)
    path = adapter.path
    expected = 2 * 64 * sum(layer.weight.numel() for layer in (path.first, *path.mix, path.last))
    expected += 2 * sum(path.levels[i].weight.numel() for i in (0, 2, 4)) + 2 * latents.numel() * 2 * 3
    assert report.path_flops == expected == architecture_for(pipe.transformer).count_path(latents, adapter)
    assert [len(step.learnt) for step in report.steps] == [0, 0, 1, 0, 0, 1, 0, 0], "once for each gap"
    assert report.flops_fraction == pytest.approx((3 + 2 * expected / report.flops[1]) / 8)
    assert torch.equal(tiny.sample(pipe), plain)
    assert not any(m._forward_pre_hooks for m in pipe.transformer.modules()) and adapter._hidden is None


def test_what_the_last_layer_read_takes_part(pipe):
    """It is that layer's input in the call before, and is kept no longer than needed."""
    adapter, told = adapter_for(pipe.transformer, asks=False), []
    listener = pipe.transformer.proj_out.register_forward_pre_hook(lambda layer, args: told.append(args[0]))
    learn = adapter.learn
    with ddit.apply(pipe, adapter=adapter, config=MENDED) as handle:
        adapter.learn = lambda anchor: (told.append(anchor.hidden), learn(anchor))[1]
        tiny.sample(pipe)
        assert handle._generation.hidden is None
    listener.remove()
    # Steps at scale 1 are 0, 1 and 4; each but the first begins a gap.
    _, second, heard, third, again = told
    assert torch.equal(heard, second) and torch.equal(again, third) and not torch.equal(second, third)
    z, sigma = torch.randn(1, 4, 8, 8), torch.tensor([0.9])
    anchor = Anchor.after(z, sigma, z, end=sigma - 0.1)
    made = [learn(replace(anchor, hidden=torch.randn(1, 16, adapter.config["width"]))) for _ in range(2)]
    assert not torch.allclose(*made)


def test_another_sampler_than_in_training_is_warned_about(pipe, recwarn):
    adapter = PatchAdapter.for_model(pipe.transformer, asks=False, sampler="FlowMatchEulerDiscreteScheduler")
    ddit.apply(pipe, adapter=adapter, config=MENDED).remove()
    assert not any("Euler" in str(w.message) for w in recwarn)
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.warns(UserWarning, match=r"for FlowMatchEuler.*samples by UniPCMultistepScheduler.*--adapter none"):
        ddit.apply(pipe, adapter=adapter, config=MENDED).remove()


def test_a_path_past_the_model_is_saved_and_loaded(pipe, tmp_path):
    adapter = adapter_for(pipe.transformer, asks=False)
    adapter.save_pretrained(tmp_path)
    with ddit.apply(pipe, adapter=adapter, config=MENDED):
        expected = tiny.sample(pipe)
    with ddit.apply(pipe, adapter=tmp_path, config=MENDED):
        assert torch.equal(tiny.sample(pipe), expected)
    half = PatchAdapter.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with ddit.apply(pipe, adapter=half, config=MENDED):
        torch.testing.assert_close(tiny.sample(pipe), expected, rtol=0.1, atol=0.1)


def test_each_sample_of_a_batch_is_mended_by_itself(pipe):
    """Frames, sizes and anchors of their own: as if it were alone."""
    adapter = adapter_for(pipe.transformer, asks=False)
    architecture = architecture_for(pipe.transformer)
    torch.manual_seed(0)
    for shape, tokens in (((2, 4, 8, 12), 24), ((2, 4, 3, 8, 12), 72)):
        sigma = torch.tensor([0.4, 0.2])
        anchor = None
        for noise in ([0.9, 0.8], [0.8, 0.7], [0.6, 0.5]):
            here = torch.tensor(noise)
            hidden = torch.randn(2, tokens, architecture.width)
            anchor = Anchor.after(torch.randn(shape), here, torch.randn(shape), anchor, end=here - 0.05, hidden=hidden)
        assert anchor.bend.std() > 0.1
        # First, so that nothing is known yet of the batch.
        alone = [adapter.mend(torch.zeros(1, *shape[1:]), sigma[i : i + 1], anchor.rows([i])) for i in range(2)]
        both = adapter.mend(torch.zeros(shape), sigma, anchor)
        assert both.shape == shape and both.std() > 0 and architecture.channels == 4
        for i in range(2):
            torch.testing.assert_close(both[i : i + 1], alone[i])


def test_samples_of_one_batch_are_mended_by_schedules_of_their_own(pipe):
    """As if each were drawn alone; the path is taken once for each gap of each."""
    adapter, config = adapter_for(pipe.transformer, asks=False), ScheduleConfig(gain=0.0)
    schedules = [[1, 1, 2, 2, 1, 2, 2, 2], [1, 1, 1, 2, 4, 2, 1, 1]]
    noise = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    alone = []
    for i, own in enumerate(schedules):
        with ddit.apply(pipe, adapter=adapter, config=config, policy=tiny.Table(own)):
            alone.append(tiny.sample(pipe, latents=noise[i : i + 1]))
    with ddit.apply(pipe, adapter=adapter, config=config, policy=tiny.Table(*schedules)) as run:
        both = tiny.sample(pipe, prompt=[tiny.PROMPT] * 2, latents=noise)
        assert [sorted(step.learnt) for step in run.report.steps] == [[], [], [0], [1], [], [0], [], []]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_bend_is_what_the_line_before_was_off_by():
    """None for a path that is straight in exp(-lambda / 4), and none where there was no line."""
    sigmas = [torch.tensor([s]) for s in (0.9, 0.7, 0.4)]
    for curved in (False, True):
        anchor, bends = None, []
        for sigma in sigmas:
            level = half_log_snr(sigma)
            clean = (level.square() if curved else torch.exp(-level / 4)).reshape(1, 1, 1, 1).expand(1, 4, 2, 2)
            anchor = Anchor.after(clean, sigma, torch.zeros_like(clean), anchor, end=sigma - 0.1)
            bends.append(anchor.bend)
        assert not bends[0].any() and not bends[1].any()
        assert (bends[2].abs().mean() > 1) if curved else (bends[2].abs().max() < 1e-4)


# Files


def test_saved_and_loaded(pipe, tmp_path):
    adapter = adapter_for(pipe.transformer, rank=3, scales=(2,))
    adapter.save_pretrained(tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["base"] == "FluxTransformer2DModel" and config["base_hash"] == config_hash(pipe.transformer)
    assert config["scales"] == [2] and config["rank"] == 3 and config["ddit_version"] == ddit.__version__
    again = PatchAdapter.from_pretrained(tmp_path / "a")
    assert again.scales == (2,) and not again.training
    before, after = adapter.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    two = ScheduleConfig(policy="fixed", steps=(1, 2), scales=(1, 2))
    with ddit.apply(pipe, adapter=adapter, config=two):
        expected = tiny.sample(pipe)
    with ddit.apply(pipe, adapter=tmp_path / "a", config=two):
        assert torch.equal(tiny.sample(pipe), expected)


def test_pushed_to_the_hub_and_loaded_from_it(pipe, tmp_path, monkeypatch):
    """Through diffusers' own code on both ways; only what would need a network is replaced by the hub's local cache."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--you--flux-adapter"
    uploads = []

    def upload(*, repo_id, folder_path, **_):
        uploads.append(repo_id)
        shutil.copytree(folder_path, cached / "snapshots" / revision)

    monkeypatch.setattr(hub_utils, "create_repo", lambda name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *_, **__: ModelCard("---\n{}\n---\n"))
    monkeypatch.setattr(hub_utils, "upload_folder", upload)
    adapter = adapter_for(pipe.transformer)
    adapter.push_to_hub("you/flux-adapter")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)

    files = {path.name for path in (cached / "snapshots" / revision).iterdir()}
    assert uploads == ["you/flux-adapter"]
    assert files == {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}
    for version in ("main", revision):
        loaded = PatchAdapter.from_pretrained(
            "you/flux-adapter", revision=version, cache_dir=tmp_path, local_files_only=True
        )
        before, after = adapter.state_dict(), loaded.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(ValueError, match="you/flux-adapter"):
        PatchAdapter.from_pretrained("you/flux-adapter", revision="v9", cache_dir=tmp_path, local_files_only=True)


def test_loaded_in_half_precision(pipe, tmp_path):
    adapter_for(pipe.transformer).save_pretrained(tmp_path)
    half = PatchAdapter.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with ddit.apply(pipe.to(dtype=torch.bfloat16), adapter=half, config=COARSE):
        assert torch.isfinite(tiny.sample(pipe)).all()


@pytest.mark.parametrize("damage", ["cut short", "missing", "extra", "shape", "no config", "foreign config", "pickle"])
def test_damaged_files_are_refused_with_the_folder_named(pipe, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    adapter_for(pipe.transformer).save_pretrained(tmp_path)
    path, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    weights = load_file(path)
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "missing":
        del weights["parts.2.embed.weight"]
        save_file(weights, path)
    elif damage == "extra":
        save_file({**weights, "parts.8.embed.weight": torch.zeros(2)}, path)
    elif damage == "shape":
        save_file({**weights, "parts.2.size": torch.zeros(7)}, path)
    elif damage == "no config":
        config.unlink()
    elif damage == "foreign config":
        config.write_text(json.dumps({"_class_name": "UNet2DModel"}))
    else:
        path.unlink()
        torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=str(tmp_path)):
        PatchAdapter.from_pretrained(tmp_path)


# Refusals


def test_another_base_is_refused_and_left_untouched(pipe):
    other = adapter_for(tiny.transformer(num_single_layers=2))
    with pytest.raises(ValueError, match=r"made for a FluxTransformer2DModel.*this is a FluxTransformer2DModel"):
        ddit.apply(pipe, adapter=other)
    assert "forward" not in vars(pipe.transformer)
    assert not any(m._forward_hooks for m in pipe.transformer.modules())


def test_scales_that_the_adapter_lacks_are_refused(pipe):
    adapter = adapter_for(pipe.transformer, scales=(2,))
    with pytest.raises(ValueError, match=r"scales \[4\].*\[2\]"):
        ddit.apply(pipe, adapter=adapter)


def test_another_form_of_the_step_is_warned_about(pipe):
    adapter = adapter_for(pipe.transformer)
    with pytest.warns(UserWarning, match="'bilinear' is not used"):
        handle = ddit.apply(pipe, adapter=adapter, config=ScheduleConfig(start="bilinear"))
    assert handle.config.start == "noise-consistent"


@pytest.mark.parametrize("settings", [{"scales": (3,)}, {"scales": (1, 2)}, {"scales": ()}, {"rank": -1}])
def test_nonsense_is_refused(pipe, settings):
    with pytest.raises(ValueError, match="must be"):
        PatchAdapter.for_model(pipe.transformer, **settings)


# Beside a user's LoRA


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_users_lora_stays_active_at_every_scale(pipe, order):
    """The same picture as with the LoRA's weights fused into the base, whoever comes first."""
    fused = tiny.pipeline()
    with_user_lora(fused.transformer)
    fused.transformer.fuse_lora()
    adapter = adapter_for(pipe.transformer)
    with ddit.apply(pipe, adapter=adapter, config=COARSE):
        without = tiny.sample(pipe)
    with ddit.apply(fused, adapter=adapter, config=COARSE):
        expected = tiny.sample(fused)
    if order == "before":
        with_user_lora(pipe.transformer)
        ddit.apply(pipe, adapter=adapter, config=COARSE)
    else:
        ddit.apply(pipe, adapter=adapter, config=COARSE)
        with_user_lora(pipe.transformer)
    torch.testing.assert_close(tiny.sample(pipe), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, without, atol=1e-3)
    pipe.transformer.set_adapters(["style"], weights=[0.0])
    torch.testing.assert_close(tiny.sample(pipe), without, rtol=1e-4, atol=1e-4)
    pipe.transformer.delete_adapters(["style"])
    torch.testing.assert_close(tiny.sample(pipe), without, rtol=1e-4, atol=1e-4)


def test_the_users_scale_does_not_rescale_the_adapter(pipe):
    adapter = adapter_for(pipe.transformer)
    ddit.apply(pipe, adapter=adapter, config=COARSE)
    without = tiny.sample(pipe)
    with_user_lora(pipe.transformer)
    off = tiny.sample(pipe, joint_attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(off, without, rtol=1e-4, atol=1e-4)


# Beside offloading and quantization


def test_group_offloading(pipe):
    adapter = adapter_for(pipe.transformer)
    with ddit.apply(pipe, adapter=adapter, config=COARSE):
        expected = tiny.sample(pipe)
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    with ddit.apply(pipe, adapter=adapter, config=COARSE):
        assert torch.equal(tiny.sample(pipe), expected)


def test_model_offloading_moves_the_base_and_leaves_the_adapter(pipe):
    """As `enable_model_cpu_offload`: a hook that moves the transformer at every call, put on before or after."""
    adapter = adapter_for(pipe.transformer)
    with ddit.apply(pipe, adapter=adapter, config=COARSE):
        expected = tiny.sample(pipe)
    add_hook_to_module(pipe.transformer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    with ddit.apply(pipe, adapter=adapter, config=COARSE):
        assert torch.equal(tiny.sample(pipe), expected)


def test_a_quantized_base(pipe):
    """torchao's 8-bit weights: the base changes a little, the adapter's share stays the same."""
    torchao = pytest.importorskip("torchao.quantization")
    adapter = adapter_for(pipe.transformer)
    with ddit.apply(pipe, adapter=adapter, config=COARSE):
        full = tiny.sample(pipe)
    torchao.quantize_(pipe.transformer, torchao.Int8WeightOnlyConfig())
    with ddit.apply(pipe, config=COARSE):
        free = tiny.sample(pipe)
    with ddit.apply(pipe, adapter=adapter, config=COARSE):
        learnt = tiny.sample(pipe)
    assert (learnt - full).square().mean() < 0.05 * (free - full).square().mean()


def test_two_adapters_on_one_transformer_are_refused(pipe):
    adapter = adapter_for(pipe.transformer)
    attachment = adapter.attach(pipe.transformer)
    with pytest.raises(ValueError, match="remove it first"):
        ddit.apply(pipe, adapter=adapter)
    attachment.remove()
    attachment.remove()
    with ddit.apply(pipe, adapter=adapter):
        pass
    assert not any("_ddit" in name for m in pipe.transformer.modules() for name in vars(m))
