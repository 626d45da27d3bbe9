"""Geometry of large patches and the noise-consistent step."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from ddit.config import Start
from ddit.patches import (
    TokenLayout,
    coarse_input,
    consistent_level,
    crop,
    detail,
    detail_velocity,
    grow,
    low_velocity,
    noise_divisor,
    pack,
    pad_to_multiple,
    resize_matrices,
    shrink,
    unpack,
)

STARTS: tuple[Start, ...] = ("noise-consistent", "bilinear")


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- geometry ---


@pytest.mark.parametrize("scale", [2, 4])
def test_pad_and_crop_are_inverse_on_every_grid(scale):
    """1 x 1 to 9 x 9 tokens of 2 x 2 latent pixels; padding is the least that divides, and mirrors."""
    for rows, columns in itertools.product(range(1, 10), repeat=2):
        z = noise(1, 2, 2 * rows, 2 * columns)
        padded = pad_to_multiple(z, 2 * scale)
        height, width = padded.shape[-2:]
        assert height % (2 * scale) == width % (2 * scale) == 0
        assert 0 <= height - 2 * rows < 2 * scale and 0 <= width - 2 * columns < 2 * scale
        assert torch.equal(crop(padded, 2 * rows, 2 * columns), z)
        mirrored = np.pad(z.numpy(), [(0, 0), (0, 0), (0, height - 2 * rows), (0, width - 2 * columns)], "symmetric")
        assert torch.equal(padded, torch.from_numpy(mirrored))


@pytest.mark.parametrize(("length", "scale"), [(90, 4), (60, 4), (15, 2), (26, 4)])
def test_what_is_added_has_no_more_noise_than_the_rest(length, scale):
    """Pooled noise is about a scale-th of the latents' in every row; a row repeated would keep its own."""
    z = noise(64, 4, 2 * length, 16)
    rows = shrink(pad_to_multiple(z, 2 * scale), scale, 2, "noise-consistent").std((0, 1, 3))
    assert (rows * scale < 1.5).all() and (rows[:-2] * scale - 1).abs().max() < 0.1


def test_frames_of_a_video_stay_apart():
    z = noise(2, 3, 5, 6, 10)
    for start in STARTS:
        per_frame = torch.stack([shrink(pad_to_multiple(z[:, :, f], 4), 2, 2, start) for f in range(5)], dim=2)
        torch.testing.assert_close(shrink(pad_to_multiple(z, 4), 2, 2, start), per_frame)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("origin", [(0.0, 0.0), (3.0, 5.0)])
def test_interpolated_positions_are_the_centres(scale, origin):
    """The mean of the positions of the tokens a large patch covers."""
    rows, columns = 3, 2
    fine = TokenLayout((rows * scale, columns * scale)).places(origin).double()
    centres = F.avg_pool2d(rearrange(fine, "(r c) k -> k r c", r=rows * scale), scale).flatten(1).T
    layout = TokenLayout((rows, columns), scale, "interpolated")
    torch.testing.assert_close(layout.places(origin).double(), centres)


def test_grid_positions_count_on_from_the_origin():
    positions = TokenLayout((2, 3), 4).places((3.0, 5.0))
    assert positions.tolist() == [[3, 5], [3, 6], [3, 7], [4, 5], [4, 6], [4, 7]]
    assert positions.dtype == torch.float32


# --- resizing ---

SIZES = [(p, s) for p in (1, 2, 3) for s in (2, 4)]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("patch", "scale"), SIZES)
def test_shrinking_undoes_growing(patch, scale, start):
    """M U = 1, rows of M and U sum to one."""
    down, up = resize_matrices(patch, scale, start)
    assert down.shape == (patch**2, (scale * patch) ** 2) and up.shape == (down.shape[1], down.shape[0])
    torch.testing.assert_close(down @ up, torch.eye(patch**2), atol=1e-5, rtol=0)
    for matrix in (down, up):
        torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("patch", "scale"), SIZES)
def test_constants_are_preserved(patch, scale, start):
    z = torch.tensor([2.5, -1.0]).reshape(1, 2, 1, 1)
    fine = z.expand(1, 2, 2 * scale * patch, 3 * scale * patch)
    coarse = z.expand(1, 2, 2 * patch, 3 * patch)
    torch.testing.assert_close(shrink(fine, scale, patch, start), coarse, atol=1e-5, rtol=0)
    torch.testing.assert_close(grow(coarse, scale, patch, start), fine, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("patch", "scale"), SIZES)
def test_noise_consistent_resizing_is_pooling_and_repetition(patch, scale):
    """Whatever the patch, so D and U of the noise-consistent step don't know of patches."""
    z = noise(2, 3, 2 * patch * scale, 3 * patch * scale)
    pooled = F.avg_pool2d(z, scale)
    torch.testing.assert_close(shrink(z, scale, patch, "noise-consistent"), pooled, atol=1e-6, rtol=1e-6)
    repeated = pooled.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    torch.testing.assert_close(grow(pooled, scale, patch, "noise-consistent"), repeated, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(detail(z, scale), z - repeated, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("patch", "scale"), SIZES)
def test_bilinear_growing_is_interpolation_of_each_patch(patch, scale):
    """On a single patch, and patch by patch on a grid: neighbours don't mix."""
    z = noise(2, 3, patch, patch)
    expected = F.interpolate(z, scale_factor=scale, mode="bilinear", align_corners=False)
    torch.testing.assert_close(grow(z, scale, patch, "bilinear"), expected, atol=1e-6, rtol=1e-6)
    two = torch.cat([z, noise(2, 3, patch, patch, seed=1)], dim=-1)
    torch.testing.assert_close(
        grow(two, scale, patch, "bilinear")[..., : scale * patch], expected, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("scale", [2, 4])
def test_pi_resize_identity(scale):
    """FlexiViT: a small patch grown by U meets the resized weights M' w as it met w itself, <w, x> = <M' w, U x>;
    and resizing the weights equals shrinking the latents, <M' w, y> = <w, M y>."""
    down, up = (m.double() for m in resize_matrices(2, scale, "bilinear"))
    w, x, y = noise(4), noise(4, seed=1), noise(4 * scale**2, seed=2)
    resized = down.T @ w
    torch.testing.assert_close(resized @ (up @ x), w @ x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(resized @ y, w @ (down @ y), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(down, torch.linalg.pinv(up), atol=1e-5, rtol=0)  # the least-squares solution


def test_matrices_made_during_inference_serve_training():
    """They are cached; a tensor made in inference mode would be refused by autograd later."""
    resize_matrices.cache_clear()
    with torch.inference_mode():
        shrink(torch.ones(1, 1, 4, 4), 2, 2, "bilinear")
    z = torch.ones(1, 1, 4, 4, requires_grad=True)
    shrink(z, 2, 2, "bilinear").sum().backward()
    assert z.grad is not None


# --- the noise-consistent step ---

SIGMAS = torch.tensor([0.05, 0.3, 0.7, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("scale", [2, 4])
def test_pooled_noise_has_the_deviation_that_its_level_says(scale):
    """Pure noise at level sigma becomes noise of deviation sigma', white: neighbours are uncorrelated."""
    eps = noise(4, 4, 128, 128)
    z = SIGMAS.reshape(-1, 1, 1, 1) * eps
    small, level = coarse_input(z, SIGMAS, scale, 2, "noise-consistent")
    torch.testing.assert_close(small.flatten(1).std(1), level, rtol=0.03, atol=0)
    neighbours = (small[..., 1:] * small[..., :-1]).flatten(1).mean(1) / level**2
    assert neighbours.abs().max() < 0.05


@pytest.mark.parametrize("scale", [2, 4])
def test_pooled_latents_are_a_noisy_latent_again(scale):
    """z' = (1 - sigma') D x + sigma' s D eps."""
    x, eps = noise(4, 3, 8, 16), noise(4, 3, 8, 16, seed=1)
    sigma = SIGMAS.reshape(-1, 1, 1, 1)
    small, level = coarse_input((1 - sigma) * x + sigma * eps, SIGMAS, scale, 2, "noise-consistent")
    level = level.reshape(-1, 1, 1, 1)
    expected = (1 - level) * F.avg_pool2d(x, scale) + level * scale * F.avg_pool2d(eps, scale)
    torch.testing.assert_close(small, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_limits_of_the_level(scale):
    """sigma' is 1 at 1, sigma / s near 0, below sigma between; scale 1 changes nothing."""
    sigma = torch.tensor([1.0, 1e-6, 0.5], dtype=torch.float64)
    factor, level = consistent_level(sigma, scale)
    assert level[0] == 1 and factor[0] == scale
    assert level[1] == pytest.approx(1e-6 / scale, rel=1e-5)
    if scale == 1:
        assert torch.equal(level, sigma)
    else:
        assert level[2] < 0.5


def test_bilinear_start_leaves_the_level():
    small, level = coarse_input(noise(4, 3, 8, 8), SIGMAS, 2, 2, "bilinear")
    assert level is SIGMAS and small.shape == (4, 3, 4, 4)


def blocky(scale, dtype=torch.float64):
    """A picture constant inside large patches, its noise, latents, and an ideal model's call on the coarse grid."""
    lo, eps = noise(4, 3, 6, 4).to(dtype), noise(4, 3, 6 * scale, 4 * scale, seed=1).to(dtype)
    x = lo.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    sigma = SIGMAS.to(dtype)
    z = (1 - sigma.reshape(-1, 1, 1, 1)) * x + sigma.reshape(-1, 1, 1, 1) * eps
    small, _ = coarse_input(z, sigma, scale, 2, "noise-consistent")
    ideal = scale * F.avg_pool2d(eps, scale) - F.avg_pool2d(x, scale)
    return x, eps, z, sigma, small, ideal


def step(z, sigma, small, output, scale, variance=None):
    """The noise-consistent step without an anchor."""
    low = low_velocity(small, output, sigma, scale, "noise-consistent")
    return grow(low, scale, 2, "noise-consistent") + detail_velocity(z, sigma, scale, variance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("scale", [2, 4])
def test_velocity_is_exact_without_detail(scale, dtype, tolerance):
    """Nothing lies inside the patches: with an ideal model the coarse step returns eps - x itself."""
    x, eps, z, sigma, small, ideal = blocky(scale, dtype)
    velocity = step(z, sigma, small, ideal, scale)
    assert velocity.dtype == dtype
    torch.testing.assert_close(velocity, eps - x, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("scale", [2, 4])
def test_wiener_gain_is_the_design_formula(scale):
    """v = U v_lo + k_s (z - U D z), k_s = (sigma n - (1 - sigma) h) / ((1 - sigma)^2 h + sigma^2 n)."""
    z, output = noise(4, 3, 8, 16), noise(4, 3, 8 // scale, 16 // scale, seed=1)
    h = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    small, level = coarse_input(z, SIGMAS, scale, 2, "noise-consistent")
    level, sigma = level.reshape(-1, 1, 1, 1), SIGMAS.reshape(-1, 1, 1, 1)
    n, H = 1 - 1 / scale**2, h.reshape(-1, 1, 1)
    k = (sigma * n - (1 - sigma) * H) / ((1 - sigma) ** 2 * H + sigma**2 * n)
    v_lo = (small + (1 - level) * output) / scale - (small - level * output)
    expected = v_lo.repeat_interleave(scale, -1).repeat_interleave(scale, -2) + k * detail(z, scale)
    torch.testing.assert_close(step(z, SIGMAS, small, output, scale, h), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [2, 4])
def test_wiener_estimate_is_the_best_linear_one(scale):
    """On random pictures a smaller or larger variance than the true one raises the error of the velocity."""
    h = 0.3
    x, eps, sigma = h**0.5 * noise(1, 1, 256, 256), noise(1, 1, 256, 256, seed=1), torch.tensor([0.5]).double()
    z = 0.5 * x + 0.5 * eps
    small, _ = coarse_input(z, sigma, scale, 2, "noise-consistent")
    ideal = scale * F.avg_pool2d(eps, scale) - F.avg_pool2d(x, scale)
    true = detail(x, scale).square().mean().reshape(1)

    def error(variance):
        return (step(z, sigma, small, ideal, scale, variance) - (eps - x)).square().mean().item()

    # h of the formula is the variance of the detail; noise of the pixels leaves n of it there as well.
    assert error(true) < min(error(true * 0.7), error(true * 1.4), error(true * 0))


def test_no_variance_is_zero_variance():
    z, output = noise(4, 3, 8, 8), noise(4, 3, 4, 4, seed=1)
    small, _ = coarse_input(z, SIGMAS, 2, 2, "noise-consistent")
    torch.testing.assert_close(step(z, SIGMAS, small, output, 2, torch.zeros(3)), step(z, SIGMAS, small, output, 2))


def test_bilinear_velocity_is_the_output():
    output = noise(2, 3, 4, 4)
    assert low_velocity(output, output, SIGMAS[:2], 2, "bilinear") is output


# --- audio: patches span time alone ---

LEVELS = SIGMAS.reshape(-1, 1, 1)


@pytest.mark.parametrize(("patch", "scale"), SIZES)
def test_sound_is_pooled_and_repeated_along_time(patch, scale):
    z = noise(2, 3, 5 * patch * scale)
    pooled = F.avg_pool1d(z, scale)
    repeated = pooled.repeat_interleave(scale, -1)
    torch.testing.assert_close(shrink(z, scale, patch, "noise-consistent"), pooled, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grow(pooled, scale, patch, "noise-consistent"), repeated, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(detail(z, scale), z - repeated, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("patch", "scale"), SIZES)
def test_bilinear_growing_of_sound_is_linear(patch, scale):
    z = noise(2, 3, patch)
    expected = F.interpolate(z, scale_factor=scale, mode="linear", align_corners=False)
    torch.testing.assert_close(grow(z, scale, patch, "bilinear"), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(shrink(expected, scale, patch, "bilinear"), z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", range(1, 10))
def test_sound_of_every_length_is_padded_cropped_and_packed(length):
    z = noise(2, 3, length)
    padded = pad_to_multiple(z, 4)
    assert padded.shape == (2, 3, -(-length // 4) * 4)
    assert torch.equal(crop(padded, length), z)
    mirrored = np.pad(z.numpy(), [(0, 0), (0, 0), (0, padded.shape[-1] - length)], "symmetric")
    assert torch.equal(padded, torch.from_numpy(mirrored))
    tokens = pack(padded, 4)
    assert torch.equal(tokens[0, 0], padded[0, :, :4].flatten())
    assert torch.equal(unpack(tokens, 4, padded.shape), padded)


def test_places_of_sound_are_moments():
    layout = TokenLayout.of(noise(1, 3, 6), 2, 4, "interpolated")
    assert layout.grid == (3,) and layout.places().tolist() == [[1.5], [5.5], [9.5]]
    assert TokenLayout((3,), 4).places((2.0,)).tolist() == [[2], [3], [4]]


@pytest.mark.parametrize("scale", [2, 4])
def test_noise_falls_by_the_root_of_how_many_values_are_averaged(scale):
    """One axis averages s values, two average s * s; pooled noise is again as strong as its level says."""
    assert noise_divisor(noise(1, 2, 8), scale) == pytest.approx(scale**0.5)
    assert noise_divisor(noise(1, 2, 8, 8), scale) == noise_divisor(noise(1, 2, 3, 8, 8), scale) == scale
    eps = noise(4, 4, 2**14)
    small, level = coarse_input(LEVELS * eps, SIGMAS, scale, 2, "noise-consistent")
    torch.testing.assert_close(small.flatten(1).std(1), level, rtol=0.03, atol=0)
    assert level[-1] == 1


@pytest.mark.parametrize("scale", [2, 4])
def test_velocity_of_sound_is_exact_without_detail(scale):
    lo, eps = noise(4, 3, 12), noise(4, 3, 12 * scale, seed=1)
    x = lo.repeat_interleave(scale, -1)
    z = (1 - LEVELS) * x + LEVELS * eps
    small, _ = coarse_input(z, SIGMAS, scale, 2, "noise-consistent")
    ideal = scale**0.5 * F.avg_pool1d(eps, scale) - F.avg_pool1d(x, scale)
    torch.testing.assert_close(step(z, SIGMAS, small, ideal, scale), eps - x, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scale", [2, 4])
def test_wiener_estimate_of_sound_is_the_best_linear_one(scale):
    """On white latents a smaller or larger variance of the detail raises the error of the velocity."""
    x, eps, sigma = noise(1, 1, 2**16), noise(1, 1, 2**16, seed=1), torch.tensor([0.5]).double()
    z = 0.5 * x + 0.5 * eps
    small, _ = coarse_input(z, sigma, scale, 2, "noise-consistent")
    ideal = scale**0.5 * F.avg_pool1d(eps, scale) - F.avg_pool1d(x, scale)
    true = detail(x, scale).square().mean().reshape(1)
    assert true.item() == pytest.approx(1 - 1 / scale, abs=0.02)

    def error(variance):
        return (step(z, sigma, small, ideal, scale, variance) - (eps - x)).square().mean().item()

    assert error(true) < min(error(true * 0.7), error(true * 1.4), error(true * 0))


@pytest.mark.parametrize("start", ["noise-consistent", "bilinear"])
def test_resizing_keeps_its_precision(start):
    """Whatever dtype the user has made the default, or lets the model compute in."""
    z = noise(1, 4, 16, 16, dtype=torch.float32)
    expected = shrink(z, 2, 2, start)
    resize_matrices.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = shrink(z, 2, 2, start)
    finally:
        torch.set_default_dtype(torch.float32)
        resize_matrices.cache_clear()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
