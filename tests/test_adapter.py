"""Adapters: exact at the start, strict about their base, at home beside a user's LoRA."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.utils import hub_utils
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import ddit
import tiny
from ddit import FixedSchedule, PatchAdapter, PatchSchedule, pretrained
from ddit.config import PAPER, Start
from ddit.models import architecture_for
from ddit.patches import pack, unpack
from ddit.pretrained import config_hash

COARSE = FixedSchedule(steps=(1, 2, 4, 4, 2, 1))


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
    schedule = FixedSchedule(steps=COARSE.steps, coarse=adapter.coarse)
    with ddit.apply(pipe, patches=schedule):
        free = tiny.sample(pipe)
    with ddit.apply(pipe, adapter=adapter, patches=schedule):
        assert torch.equal(tiny.sample(pipe), free)


def test_large_patches_are_used_where_they_were_learnt(pipe):
    adapter = adapter_for(pipe.transformer, min_sigma={2: 0.3, 4: 0.6})
    with ddit.apply(pipe, adapter=adapter, patches=PatchSchedule(threshold=1e9)) as handle:
        tiny.sample(pipe, steps=12)
    chosen = [(step.sigma, step.scales[0]) for step in handle.report.steps[3:]]
    assert chosen == [(sigma, 4 if sigma >= 0.6 else 2 if sigma >= 0.3 else 1) for sigma, _ in chosen]
    assert {scale for _, scale in chosen} == {1, 2, 4}
    with ddit.apply(pipe, adapter=adapter, patches=PatchSchedule(threshold=1e9, careful=False)) as handle:
        with pytest.warns(
            UserWarning, match=r"5 steps used large patches at noise levels .* \(2p from 0.3, 4p from 0.6\)"
        ):
            tiny.sample(pipe, steps=12)
        assert handle.report.steps[-1].scales == (4,)
    ddit.apply(pipe, adapter=adapter, patches=FixedSchedule(steps=(1, 2)))
    with pytest.warns(UserWarning, match="let full steps come sooner"):
        tiny.sample(pipe)


def test_scale_one_is_bit_equal_and_removal_leaves_no_hooks(pipe):
    plain = tiny.sample(pipe)
    adapter = adapter_for(pipe.transformer)
    with ddit.apply(pipe, adapter=adapter, patches=PatchSchedule(threshold=0.0)):
        assert torch.equal(tiny.sample(pipe), plain)
    assert torch.equal(tiny.sample(pipe), plain)
    assert not any(m._forward_hooks for m in pipe.transformer.modules())
    assert set(pipe.transformer.state_dict()) == set(tiny.transformer().state_dict())


def test_every_part_has_its_share(pipe):
    """Each part alone changes the picture, and gradients reach all of them."""
    with ddit.apply(pipe, patches=COARSE):
        free = tiny.sample(pipe)
    adapter = adapter_for(pipe.transformer)
    saved = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    for part in ("embed", "head", "residual", "size", "lora"):
        with torch.no_grad():
            for name, p in adapter.named_parameters():
                keep = name.split(".")[2] == part
                p.copy_(saved[name] if keep else torch.zeros_like(p))
        with ddit.apply(pipe, adapter=adapter, patches=COARSE):
            assert not torch.allclose(tiny.sample(pipe), free), part


def test_a_coarse_step_hears_the_adapter_wherever_it_comes(pipe):
    """The first step included: nothing has to come before it."""
    first = FixedSchedule(steps=(2, 1))
    with ddit.apply(pipe, patches=first):
        free = tiny.sample(pipe)
    with ddit.apply(pipe, adapter=adapter_for(pipe.transformer), patches=first):
        assert not torch.allclose(tiny.sample(pipe), free)


@pytest.mark.parametrize("scale", [2, 4])
def test_gradients_reach_the_parts_of_the_scale_that_ran(scale):
    model = tiny.transformer().requires_grad_(False)
    adapter = adapter_for(model)
    schedule = FixedSchedule(steps=(1, scale))
    with ddit.apply(model, adapter=adapter, patches=schedule):
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
    with ddit.apply(pipe, patches=COARSE) as handle:
        tiny.sample(pipe)
        free = handle.report.flops
    adapter = adapter_for(pipe.transformer)
    with ddit.apply(pipe, adapter=adapter, patches=COARSE) as handle:
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


# Files


def test_saved_and_loaded(pipe, tmp_path):
    adapter = adapter_for(pipe.transformer, rank=3, scales=(2,))
    adapter.save_pretrained(tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["base"] == "FluxTransformer2DModel" and config["base_hash"] == config_hash(pipe.transformer)
    assert config["scales"] == [2] and config["rank"] == 3 and config["ddit_version"] == ddit.__version__
    again = PatchAdapter.from_pretrained(tmp_path / "a")
    assert again.scales == (2,) and not again.training
    before, after = adapter.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    two = FixedSchedule(steps=(1, 2))
    with ddit.apply(pipe, adapter=adapter, patches=two):
        expected = tiny.sample(pipe)
    with ddit.apply(pipe, adapter=tmp_path / "a", patches=two):
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
    monkeypatch.setattr(pretrained, "file_exists", lambda *_, **__: False)
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
    """From given noise: PyTorch draws another in half precision, depending on its version."""
    noise = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))
    adapter_for(pipe.transformer).save_pretrained(tmp_path)
    half = PatchAdapter.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with ddit.apply(pipe, adapter=tmp_path, patches=COARSE):
        expected = tiny.sample(pipe, latents=noise)
    with ddit.apply(pipe, adapter=half, patches=COARSE):
        torch.testing.assert_close(tiny.sample(pipe, latents=noise), expected, rtol=0.02, atol=0.02)
    with ddit.apply(pipe.to(dtype=torch.bfloat16), adapter=half, patches=COARSE):
        torch.testing.assert_close(tiny.sample(pipe, latents=noise).float(), expected, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("damage", ["cut short", "missing", "extra", "shape", "no config", "foreign config", "pickle"])
def test_damaged_files_are_refused_with_the_folder_named(pipe, tmp_path, damage):
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
        ddit.apply(pipe, adapter=adapter, patches=PatchSchedule())
    with ddit.apply(pipe, adapter=adapter, patches=None) as handle:  # nobody asked for them
        assert handle.plan.policy.scales == (1, 2)


def test_another_form_of_the_step_is_refused(pipe):
    """One that was asked for; the default gives way to the adapter's."""
    adapter = adapter_for(pipe.transformer)
    for schedule in (PatchSchedule(coarse=PAPER), FixedSchedule(steps=(1, 2), coarse=PAPER)):
        with pytest.raises(ValueError, match=r"'bilinear'.*trained for Coarse\(start='noise-consistent'"):
            ddit.apply(pipe, adapter=adapter, patches=schedule)
    assert "forward" not in vars(pipe.transformer)
    paper = adapter_for(pipe.transformer, start="bilinear")
    assert paper.coarse == PAPER
    drawn = []
    for schedule in (COARSE, FixedSchedule(steps=COARSE.steps, coarse=PAPER)):
        with ddit.apply(pipe, adapter=paper, patches=schedule) as handle:
            assert handle.plan.coarse == PAPER
            drawn.append(tiny.sample(pipe))
    assert torch.equal(*drawn)


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
    with ddit.apply(pipe, adapter=adapter, patches=COARSE):
        without = tiny.sample(pipe)
    with ddit.apply(fused, adapter=adapter, patches=COARSE):
        expected = tiny.sample(fused)
    if order == "before":
        with_user_lora(pipe.transformer)
        ddit.apply(pipe, adapter=adapter, patches=COARSE)
    else:
        ddit.apply(pipe, adapter=adapter, patches=COARSE)
        with_user_lora(pipe.transformer)
    torch.testing.assert_close(tiny.sample(pipe), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, without, atol=1e-3)
    pipe.transformer.set_adapters(["style"], weights=[0.0])
    torch.testing.assert_close(tiny.sample(pipe), without, rtol=1e-4, atol=1e-4)
    pipe.transformer.delete_adapters(["style"])
    torch.testing.assert_close(tiny.sample(pipe), without, rtol=1e-4, atol=1e-4)


def test_the_users_scale_does_not_rescale_the_adapter(pipe):
    adapter = adapter_for(pipe.transformer)
    ddit.apply(pipe, adapter=adapter, patches=COARSE)
    without = tiny.sample(pipe)
    with_user_lora(pipe.transformer)
    off = tiny.sample(pipe, joint_attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(off, without, rtol=1e-4, atol=1e-4)


# Beside offloading and quantization


def test_group_offloading(pipe):
    adapter = adapter_for(pipe.transformer)
    with ddit.apply(pipe, adapter=adapter, patches=COARSE):
        expected = tiny.sample(pipe)
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    with ddit.apply(pipe, adapter=adapter, patches=COARSE):
        assert torch.equal(tiny.sample(pipe), expected)


def test_model_offloading_moves_the_base_and_leaves_the_adapter(pipe):
    """As `enable_model_cpu_offload`: a hook that moves the transformer at every call, put on before or after."""
    adapter = adapter_for(pipe.transformer)
    with ddit.apply(pipe, adapter=adapter, patches=COARSE):
        expected = tiny.sample(pipe)
    add_hook_to_module(pipe.transformer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    with ddit.apply(pipe, adapter=adapter, patches=COARSE):
        assert torch.equal(tiny.sample(pipe), expected)


def test_a_quantized_base(pipe):
    """torchao's 8-bit weights: the base changes a little, the adapter's share stays the same."""
    torchao = pytest.importorskip("torchao.quantization")
    adapter = adapter_for(pipe.transformer)
    with ddit.apply(pipe, adapter=adapter, patches=COARSE):
        full = tiny.sample(pipe)
    torchao.quantize_(pipe.transformer, torchao.Int8WeightOnlyConfig())
    with ddit.apply(pipe, patches=COARSE):
        free = tiny.sample(pipe)
    with ddit.apply(pipe, adapter=adapter, patches=COARSE):
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


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (lambda w: w * torch.nan, "holds NaN or infinity.*get the files anew"),
        (lambda w: w + torch.inf, "holds NaN or infinity"),
        (lambda w: w + 3e7, r"holds 3e\+07, which no training makes"),
        (lambda w: (100 * w).to(torch.int32), "is of type I32, not floating-point"),
        (lambda w: w.to(torch.int8), "is of type I8"),
    ],
)
def test_weights_that_no_training_makes_are_refused(pipe, tmp_path, broken, told):
    PatchAdapter.for_model(pipe.transformer, rank=2).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    values = load_file(file)
    key = next(iter(values))
    save_file({**values, key: broken(values[key]).contiguous()}, file)
    with pytest.raises(ValueError, match=told) as raised:
        PatchAdapter.from_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value)
