"""Steps with patches of two sizes in one call (`ddit.config.Coarse.mixed`)."""

import numpy as np
import pytest
import torch

import ddit
import tiny
from ddit import FixedSchedule, PatchAdapter, PatchSchedule
from ddit.cells import inner_variance, liveliest
from ddit.coarse import coarse_call, coarse_step
from ddit.config import Coarse
from ddit.models import architecture_for
from ddit.patches import cut, pack
from families import call_of
from helpers import call_inputs
from test_architectures import CASES, draw

MIXING = ["flux", "flux2", "ovis-image", "flux-kontext", "flux-controlnet", "flux-fill"]


def mixed(*steps: int, fine: float = 0.25) -> FixedSchedule:
    return FixedSchedule(steps=steps, coarse=Coarse.mixed(fine))


def test_the_liveliest_patches_are_cut():
    z = torch.zeros(1, 2, 8, 12)
    z[:, :, 4:8, 8:12] = torch.randn(1, 2, 4, 4)  # the last of 2 x 3 large patches
    cells = liveliest(inner_variance(z, 4)[0], (2, 3), 2, 1 / 6)
    assert sorted(cells.large.tolist()) == [0, 1, 2, 3, 4]
    assert cells.small.tolist() == [16, 17, 22, 23]  # rows 2 and 3, columns 4 and 5 of a grid of 4 x 6
    assert cells.all_large == 6
    assert torch.equal(cells.covered(2, z.shape), (z != 0).any(1, keepdim=True))


def test_scatter_undoes_gather():
    fine, coarse = torch.randn(1, 24, 5), torch.randn(1, 8, 5)  # two tokens of something else behind
    cells = liveliest(torch.randn(6), (2, 3), 2, 0.5)
    tokens = cells.gather(coarse, fine)
    assert tokens.shape == (1, 3 + 12 + 2, 5) and torch.equal(tokens[:, -2:], coarse[:, -2:])
    scattered = cells.scatter_large(tokens), cells.scatter_small(tokens)
    for found, was, places in zip(scattered, (coarse[:, :6], fine), (cells.large, cells.small), strict=True):
        assert torch.equal(found[:, places], was[:, places])
        assert found.count_nonzero() == 5 * len(places)


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("scale", [2, 4])
def test_small_patches_everywhere_are_a_full_step(name, scale):
    """In another order of tokens, and, where the grid does not divide, with more of them."""
    arch, inputs, answer = call_of(CASES[name].make(), name)
    noisy = arch.read(inputs)
    want = arch.velocity(answer, noisy.latents.shape[2:])
    grid = [n // arch.patch_size for n in noisy.latents.shape[2:]]
    found = coarse_step(arch, arch.transformer.forward, inputs, noisy, scale, Coarse.mixed(1.0))
    assert found.shape == want.shape
    references = inputs[arch.batched[0]].shape[1] > np.prod(grid)  # pooled in coarse steps
    if not references and not any(n % scale for n in grid):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MIXING)
def test_pipelines_draw_with_two_sizes(name):
    pipe = CASES[name].make()
    plain = draw(pipe, CASES[name])
    with ddit.apply(pipe, patches=mixed(1, 2, 4, 2, 1)) as run:
        drawn = draw(pipe, CASES[name])
    assert run.report.forced is None and {2, 4} <= set(run.report.scales[0])
    assert drawn.shape == plain.shape and torch.isfinite(drawn).all() and not torch.equal(drawn, plain)
    assert torch.equal(draw(pipe, CASES[name]), plain)


def test_small_patches_lie_where_the_clean_latents_vary():
    pipe = tiny.pipeline()
    arch = architecture_for(pipe.transformer)
    inputs = call_inputs(grid=(8, 8))
    clean = torch.zeros(1, 4, 16, 16)
    clean[:, :, :4, :4] = torch.randn(1, 4, 4, 4)
    call = coarse_call(arch, inputs, arch.read(inputs), 2, Coarse.mixed(1 / 16), clean)
    assert call.inputs["hidden_states"].shape[1] == 15 + 4
    own = inputs["hidden_states"].reshape(1, 8, 8, 16)[:, :2, :2].flatten(1, 2)
    assert torch.equal(call.inputs["hidden_states"][:, -4:], own)
    places = call.inputs["img_ids"]
    assert places[-4:, 1:].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert {(row % 2, column % 2) for row, column in places[:-4, 1:].tolist()} == {(0.5, 0.5)}


def test_noise_is_added_back_and_the_same_in_both_passes():
    torch.manual_seed(0)
    pipe = tiny.pipeline()
    arch = architecture_for(pipe.transformer)
    inputs = call_inputs(grid=(64, 64), sigma=0.5)
    noise = pack(torch.randn(1, 4, 128, 128), 2)
    inputs["hidden_states"] = 0.5 * noise  # of a picture of zeros
    noisy = arch.read(inputs)
    one, again, other = (coarse_call(arch, inputs, noisy, 2, Coarse.mixed(), seed=seed).latents for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.std() == pytest.approx(0.5, rel=0.02)


def test_a_picture_is_the_same_alone_and_in_a_batch():
    pipe, method = tiny.pipeline(), mixed(1, 2, 2, 2)
    one, other = (torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    with ddit.apply(pipe, patches=method):
        both = tiny.sample(pipe, prompt=[tiny.PROMPT] * 2, latents=torch.cat([one, other]))
        alone = tiny.sample(pipe, latents=other)
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_work_is_that_of_both_sizes():
    pipe = tiny.pipeline()
    with ddit.apply(pipe, patches=mixed(1, 2)) as run:
        tiny.sample(pipe)
    whole = run.report.tokens[1]
    assert run.report.tokens[2] == whole / 4 * 0.75 + whole * 0.25
    assert run.report.flops[2] < run.report.flops[1]


def test_an_adapter_of_two_sizes():
    """A new one changes nothing, a trained one large patches; it is saved with its form."""
    transformer = tiny.transformer()
    arch = architecture_for(transformer)
    adapter = PatchAdapter.for_model(transformer, start="renoised", fine=0.25, rank=2)
    assert adapter.coarse == Coarse.mixed(0.25)
    inputs = call_inputs(grid=(8, 8))
    told = arch, transformer.forward, inputs, arch.read(inputs), 2, adapter.coarse
    free = coarse_step(*told)
    with adapter.attach(transformer):
        torch.testing.assert_close(coarse_step(*told, adapter=adapter), free)
        with torch.no_grad():
            adapter.get_parameter("parts.2.head.bias").fill_(1.0)
        added = coarse_step(*told, adapter=adapter) - free
    cells = cut(added, 4).mean(-1).mean(1).flatten()
    assert sorted(cells.round(decimals=4).tolist()) == [0.0] * 4 + [1.0] * 12


def test_what_can_not_be_mixed_is_refused():
    with pytest.raises(ValueError, match="take start 'renoised' or 'bilinear', and positions 'interpolated'"):
        Coarse(fine=0.25)
    with pytest.raises(ValueError, match=r"it must be a number in \[0, 1\]"):
        Coarse.mixed(1.5)
    with pytest.raises(ValueError, match="WanTransformer3DModel can't have patches of two sizes"):
        ddit.apply(tiny.wan_pipeline(), patches=mixed(1, 2))
    with pytest.raises(ValueError, match="leave the cache out, or fine"):
        ddit.apply(tiny.pipeline(), patches=mixed(1, 2), cache="first-block:0.1")


def test_a_cache_that_comes_later_is_refused_in_the_run():
    from diffusers import FirstBlockCacheConfig

    pipe = tiny.pipeline()
    with ddit.apply(pipe, patches=mixed(1, 2)):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(RuntimeError, match="leave the cache out, or fine"):
            tiny.sample(pipe)


def test_the_rule_with_two_sizes():
    pipe = tiny.pipeline()
    rule = PatchSchedule(threshold=1e9, careful=False, coarse=Coarse.mixed(0.5))
    with ddit.apply(pipe, patches=rule) as run:
        drawn = tiny.sample(pipe)
    assert {1, 4} <= set(run.report.scales[0]) and torch.isfinite(drawn).all()
