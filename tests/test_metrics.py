"""Metrics against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from ddit.eval.metrics import (
    MOST,
    FrechetTo,
    bootstrap_difference,
    bootstrap_interval,
    corrected_difference,
    decibels,
    psnr,
    similarity,
    ssim,
)
from ddit.pipelines.outputs import eight_bits


def frechet_distance(a, b) -> float:
    return float(FrechetTo(b)(a))


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian(count: int, mean: list[float], std: list[float]) -> torch.Tensor:
    """Features [count, D] whose sample mean and covariance are exactly `mean` and diag(std^2)."""
    x = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T).reshape(len(mean), -1)).T)
    return x * torch.tensor(std) + torch.tensor(mean)


# Pictures


def test_psnr_is_per_picture():
    a = torch.full((3, 3, 16, 16), 0.5)
    b = a + torch.tensor([0.1, 0.01, 0.0]).reshape(3, 1, 1, 1)
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 40.0, math.inf]), atol=1e-3, rtol=0)


def test_ssim_of_equal_pictures_is_one():
    a = pictures(2, 3, 32, 32)
    torch.testing.assert_close(ssim(a, a), torch.ones(2))


def test_ssim_of_flat_pictures_is_their_luminance_term():
    a, b = torch.full((1, 3, 32, 32), 0.25), torch.full((1, 3, 32, 32), 0.75)
    c1 = 0.01**2
    expected = (2 * 0.25 * 0.75 + c1) / (0.25**2 + 0.75**2 + c1)
    torch.testing.assert_close(ssim(a, b), torch.tensor([expected]), atol=1e-3, rtol=0)


def test_each_picture_is_scored_on_its_own():
    a, b = pictures(3, 3, 24, 24), pictures(3, 3, 24, 24, seed=1)
    for metric in (psnr, ssim):
        torch.testing.assert_close(metric(a, b), torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(3)]))


def test_similarity_is_the_mean_over_pictures_with_channels_last():
    a, b = pictures(2, 3, 16, 24), pictures(2, 3, 16, 24, seed=1)
    a, b = ((x * 255).round() / 255 for x in (a, b))  # as files hold them
    mean = similarity(a.permute(0, 2, 3, 1).numpy(), b.permute(0, 2, 3, 1).numpy())
    assert mean == pytest.approx({"psnr": float(psnr(a, b).mean()), "ssim": float(ssim(a, b).mean())})


def test_decibels_are_of_what_files_hold():
    """A difference of a tenth of a level is seen in one value of ten, there as a whole level."""
    a = (np.arange(2000) + 0.5).reshape(1, -1) / 10 / 255
    likeness = decibels(a, a + 0.1 / 255)
    assert likeness == pytest.approx([20 * math.log10(255) + 10], abs=0.01)
    assert decibels(eight_bits(a), eight_bits(a + 0.1 / 255)) == likeness
    assert decibels(a, a + 0.001 / 255) == [MOST]


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (pictures(1, 3, 16, 16), pictures(2, 3, 16, 16), "the same"),
        (pictures(3, 16, 16), pictures(3, 16, 16), "the same"),
        (pictures(1, 3, 16, 16), pictures(1, 3, 16, 16) * 2 - 1, r"in \[0, 1\]"),
        (
            torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
            torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
            "floats",
        ),
    ],
)
def test_pictures_are_checked(metric, a, b, message):
    with pytest.raises(ValueError, match=message):
        metric(a, b)


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(ValueError, match="11 a side"):
        ssim(pictures(1, 3, 8, 16), pictures(1, 3, 8, 16))


# Sets of pictures


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        ([0, 0, 0], [1, 2, 3], 0.0),
        ([3, 4, 0], [1, 2, 3], 25.0),  # only the means differ
        ([0, 0, 0], [2, 2, 3], 1.0),  # (2 - 1)^2
        ([1, 0, 0], [2, 4, 6], 1 + 1 + 4 + 9),
        ([0, 0, 0], [0, 2, 3], 1.0),  # a direction without variance
    ],
)
def test_frechet_distance_of_known_gaussians(mean, std, expected):
    a, b = gaussian(50, [0, 0, 0], [1, 2, 3]), gaussian(80, mean, std)
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_does_not_depend_on_the_axes():
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    a, b = gaussian(50, [0, 0, 0], [1, 2, 3]), gaussian(50, [1, 0, 0], [2, 4, 6])
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(15.0, abs=1e-6)


def test_frechet_distance_of_covariances_that_do_not_commute():
    quarter = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    a, b = gaussian(50, [0, 0], [1, 3]), gaussian(50, [0, 0], [1, 3]) @ quarter
    # 2x2: tr((AB)^(1/2)) = sqrt(tr AB + 2 sqrt(det AB)); A = diag(1, 9), B = [[5, 4], [4, 5]] up to sign.
    assert frechet_distance(a, b) == pytest.approx(20 - 2 * math.sqrt(50 + 2 * 9), abs=1e-6)


def test_frechet_distance_of_one_feature():
    assert frechet_distance(gaussian(20, [0], [1]), gaussian(20, [2], [3])) == pytest.approx(8.0, abs=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(4, 3), "N of 2 or more"),
        (torch.zeros(4), torch.zeros(4, 3), r"expected \[N, D\]"),
        (torch.zeros(4, 3), torch.zeros(4, 2), "differ in width"),
        (torch.full((4, 3), math.nan), torch.zeros(4, 3), "finite"),
    ],
)
def test_features_are_checked(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


# How sure


def test_interval_of_a_mean_is_the_normal_one():
    values = gaussian(400, [5.0], [2.0])[:, 0]
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(5 - 1.96 * 0.1, abs=0.02)
    assert high == pytest.approx(5 + 1.96 * 0.1, abs=0.02)


def test_interval_narrows_with_less_confidence_and_is_repeatable():
    values = pictures(50)
    wide, narrow = bootstrap_interval(values), bootstrap_interval(values, confidence=0.5)
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]
    assert wide == bootstrap_interval(values)
    assert wide != bootstrap_interval(values, seed=1)


def test_interval_of_equal_values_is_a_point():
    assert bootstrap_interval(torch.full((7,), 0.25)) == (0.25, 0.25)


def test_interval_takes_any_statistic_of_any_shape():
    features, other = gaussian(60, [0, 0], [1, 1]), gaussian(60, [3, 0], [1, 1])

    def distance(drawn: torch.Tensor) -> torch.Tensor:
        return torch.tensor(frechet_distance(drawn, other))

    low, high = bootstrap_interval(features, distance, samples=100)
    assert low < 9 < high


def test_pairing_cancels_what_both_methods_share():
    hard = pictures(100) * 10
    a, b = hard + 0.1 + 0.01 * pictures(100, seed=1), hard
    low, high = bootstrap_difference(a, b)
    assert 0.1 < low < high < 0.11
    assert high - low < 0.01 * (bootstrap_interval(a)[1] - bootstrap_interval(a)[0])


def test_a_difference_applies_the_statistic_to_each_method():
    a, b = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([9.0, 2.0, 1.0])
    low, high = bootstrap_difference(a, b, lambda x: x.max(), samples=200)
    assert (low, high) == (-8.0, 8.0)  # draws of the first prompt alone, and of the last alone


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (torch.zeros(0), {}, "N of 1 or more"),
        (torch.tensor(1.0), {}, "N of 1 or more"),
        (torch.tensor([1.0, math.inf]), {}, "finite"),
        (torch.zeros(3), {"confidence": 95}, "between 0 and 1"),
        (torch.zeros(3), {"samples": 0}, "samples is 0"),
        (torch.zeros(3), {"statistic": lambda x: x}, "one number"),
    ],
)
def test_bootstrap_is_checked(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, **options)
    with pytest.raises(ValueError, match=message):
        bootstrap_difference(values, values, **options)


def test_pairs_must_match():
    with pytest.raises(ValueError, match="differ in shape"):
        bootstrap_difference(torch.zeros(3), torch.zeros(4))


def test_a_difference_of_distances_is_freed_of_what_repeats_do_to_it():
    """Of a narrower or wider method the interval holds what many pictures show, which that of repeats does not."""
    g = torch.Generator().manual_seed(0)
    wide, few = 64, 128
    distance = FrechetTo(torch.randn(4000, wide, generator=g))
    base, method = (torch.randn(few, wide, generator=g) for _ in range(2))
    many = torch.randn(20000, wide, generator=g)
    for width in (0.9, 1.1):
        truth = float(distance(width * many) - distance(many))
        change, (low, high) = corrected_difference(width * method, base, distance, samples=100)
        assert low < change < high and low < truth < high
        low, high = bootstrap_difference(width * method, base, distance, samples=100)
        assert not low < truth < high
    with pytest.raises(ValueError, match="differ in shape"):
        corrected_difference(method, base[1:], distance)
