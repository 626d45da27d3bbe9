"""How alike pictures or sets of pictures are, and how sure a figure is. Pure functions on tensors.

Letters: B pictures, C channels, H and W pixels; N values or pictures, D features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ddit.pipelines.outputs import eight_bits

Statistic = Callable[[Tensor], Tensor]
"""``[N, ...]`` -> one number; must not depend on the order of the N."""

SSIM_WINDOW = 11
"""Side in pixels of the Gaussian window (sigma 1.5) that SSIM compares."""
MOST = 80.0
"""PSNR in dB that stands for pictures which do not differ."""


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio ``[B]`` in dB of pictures ``[B, C, H, W]`` in [0, 1]; infinite if equal."""
    _check_pictures(a, b)
    return (-10 * (a.double() - b.double()).square().mean((1, 2, 3)).log10()).float()


def decibels(a: np.ndarray, b: np.ndarray) -> list[float]:
    """PSNR of each sample as files hold it: pictures or clips ``[B, ...]``, uint8 or in [0, 1].

    `MOST` where nothing differs.
    """
    return psnr(*(_saved(x).reshape(len(x), 1, 1, -1) for x in (a, b))).clamp(max=MOST).tolist()


def _saved(pictures: np.ndarray) -> Tensor:
    """As files hold them, in [0, 1]: above 50 dB rounding to 8 bits counts."""
    return torch.from_numpy(eight_bits(pictures)).float() / 255


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity ``[B]``, at most 1, of pictures ``[B, C, H, W]`` in [0, 1] (Wang et al. 2004)."""
    _check_pictures(a, b)
    if min(a.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"pictures are {a.shape[2]}x{a.shape[3]} pixels; SSIM needs {SSIM_WINDOW} a side or more")
    # In single precision, 26 times as fast as double: they differ by 3e-4 where pictures are flat, elsewhere by 1e-6.
    a, b = a.float(), b.float()
    mean_a, mean_b = _windowed(a), _windowed(b)
    variance_a = (_windowed(a * a) - mean_a**2).clamp(min=0)
    variance_b = (_windowed(b * b) - mean_b**2).clamp(min=0)
    covariance = _windowed(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variance_a + variance_b + 0.03**2)
    return (light * structure).mean((1, 2, 3))


def _windowed(x: Tensor) -> Tensor:
    """Weighted means of pictures ``[B, C, H, W]`` around every pixel; edges are mirrored."""
    at = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    weights = (-((at / 1.5) ** 2) / 2).exp()
    weights = weights / weights.sum()
    flat = nn.functional.pad(x.flatten(0, 1).unsqueeze(1), [SSIM_WINDOW // 2] * 4, mode="reflect")
    smooth = nn.functional.conv2d(nn.functional.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return smooth.view(*x.shape[:2], *smooth.shape[-2:])


class FrechetTo:
    """Fréchet distance of features to a fixed reference, between Gaussians fitted to both (Heusel et al. 2017, FID).

    ``|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))``. The trace of the root is the sum of the
    singular values of ``a cov_b^(1/2)`` with ``a`` centred and divided by ``sqrt(N - 1)``, from the smaller of its two
    Gram matrices. Biased upwards for few pictures: compare only distances from the same N, and keep N well above D.

    Args:
        reference: Features ``[M, D]``, M of 2 or more.
    """

    def __init__(self, reference: Tensor) -> None:
        self._check(reference)
        reference = reference.double()
        self._fit(reference.mean(0), torch.cov(reference.T).reshape([reference.shape[1]] * 2))

    @classmethod
    def of_gaussian(cls, mean: Tensor, covariance: Tensor) -> FrechetTo:
        """The distance to a Gaussian of ``mean [D]`` and ``covariance [D, D]``."""
        made = cls.__new__(cls)
        made._fit(mean.double(), covariance.double())
        return made

    def _fit(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean, self.trace = mean, covariance.trace()
        values, vectors = torch.linalg.eigh(covariance)
        self.root = vectors * values.clamp(min=0).sqrt() @ vectors.T

    def __call__(self, features: Tensor) -> Tensor:
        """The distance of features ``[N, D]``, N of 2 or more."""
        self._check(features)
        if features.shape[1] != len(self.mean):
            raise ValueError(f"features differ in width: {features.shape[1]} and {len(self.mean)}")
        mean = features.double().mean(0)
        a = (features.double() - mean) / (len(features) - 1) ** 0.5
        product = a @ self.root
        gram = product @ product.T if len(product) < product.shape[1] else product.T @ product
        root = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
        return (mean - self.mean).square().sum() + a.square().sum() + self.trace - 2 * root

    @staticmethod
    def _check(features: Tensor) -> None:
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features are {tuple(features.shape)}, expected [N, D] with N of 2 or more")
        _check_finite("features", features)


def bootstrap_interval(
    values: Tensor,
    statistic: Statistic = torch.mean,
    *,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979) of ``statistic(values)``.

    Args:
        values: ``[N, ...]``, one entry per prompt; drawn N at a time with replacement.
        statistic: What is computed from each draw.
        confidence: Share of the draws inside the interval.
        samples: Number of draws.
        seed: Decides the draws; the same seed and N draw the same prompts.

    Returns:
        Lower and upper end.
    """
    picks = _resamples(values, confidence, samples, seed)
    return _percentiles(torch.stack([statistic(values[pick]) for pick in picks]), confidence)


def bootstrap_difference(
    a: Tensor,
    b: Tensor,
    statistic: Statistic = torch.mean,
    *,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of ``statistic(a) - statistic(b)``; ``a[i]`` and ``b[i]`` are two methods on the same prompt.

    Each draw takes the same prompts from both, so what makes a prompt hard for both cancels out. If the
    interval leaves out 0, the methods differ. Arguments as in `bootstrap_interval`.
    """
    return _percentiles(_differences(a, b, statistic, confidence, samples, seed), confidence)


def corrected_difference(
    a: Tensor, b: Tensor, statistic: Statistic, *, confidence: float = 0.95, samples: int = 200, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """``statistic(a) - statistic(b)`` and its interval for a statistic that repeats bias, such as a Fréchet distance.

    Sets drawn with repeats are less varied, and how far that moves a distance depends on the set. By as much as draws
    lie beside the value, it lies beside that of endlessly many prompts: both are mirrored (basic bootstrap, Davison and
    Hinkley 1997). Arguments as in `bootstrap_difference`.
    """
    drawn = _differences(a, b, statistic, confidence, samples, seed)
    found = float(statistic(a) - statistic(b))
    low, high = _percentiles(drawn, confidence)
    return 2 * found - float(drawn.double().mean()), (2 * found - high, 2 * found - low)


def _differences(a: Tensor, b: Tensor, statistic: Statistic, confidence: float, samples: int, seed: int) -> Tensor:
    """What each draw of prompts gives, ``[samples]``."""
    if a.shape != b.shape:
        raise ValueError(f"paired values differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    _check_finite("values b", b)
    picks = _resamples(a, confidence, samples, seed)
    return torch.stack([statistic(a[pick]) - statistic(b[pick]) for pick in picks])


def _resamples(values: Tensor, confidence: float, samples: int, seed: int) -> Tensor:
    """Indices ``[samples, N]`` with repeats, after checking everything."""
    if values.ndim == 0 or len(values) == 0:
        raise ValueError(f"values are {tuple(values.shape)}, expected [N, ...] with N of 1 or more")
    _check_finite("values", values)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, must lie between 0 and 1")
    if samples < 1:
        raise ValueError(f"samples is {samples}, must be 1 or more")
    return torch.randint(len(values), (samples, len(values)), generator=torch.Generator().manual_seed(seed))


def _percentiles(drawn: Tensor, confidence: float) -> tuple[float, float]:
    """The ends that cut off the same share of ``drawn [samples]`` on either side."""
    if drawn.ndim != 1:
        raise ValueError(f"the statistic gave {tuple(drawn.shape[1:])}, must give one number")
    tail = (1 - confidence) / 2
    low, high = torch.quantile(drawn.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _check_pictures(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"pictures are {tuple(a.shape)} and {tuple(b.shape)}, both must be the same [B, C, H, W]")
    for x in (a, b):
        if not x.is_floating_point() or x.min() < 0 or x.max() > 1:
            raise ValueError(f"pictures are {x.dtype} from {x.min():.3g} to {x.max():.3g}, must be floats in [0, 1]")


def _check_finite(name: str, values: Tensor) -> None:
    if not values.is_floating_point() or not values.isfinite().all():
        raise ValueError(f"{name} must be finite floats; leave out pictures without a finite figure")


def similarity(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of two sets of pictures ``[N, H, W, C]`` as files hold them, uint8 or in [0, 1]."""
    x, y = (_saved(p).permute(0, 3, 1, 2) for p in (a, b))
    return {"psnr": float(psnr(x, y).mean()), "ssim": float(ssim(x, y).mean())}
