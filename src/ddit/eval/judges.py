"""The field's judges: CLIP score, LPIPS, SSIM, PSNR, and Inception with the distance that FID is.

They rest on transformers, PIL and PyTorch alone: the packages that carry these judges also need torchvision or timm,
which fit only the PyTorch they were built for.

Letters: B pictures, H and W pixels, D features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from ddit.eval.metrics import MOST, FrechetTo, psnr, ssim
from ddit.util.files import replacing
from ddit.util.progress import progress

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Judge(nn.Module):
    """Says something of every picture.

    Called with pictures ``[B, H, W, 3]`` as files hold them (uint8), their prompts, and the pictures to be like (read
    by those of ``likeness`` alone); gives ``[B]``, or features ``[B, D]``.
    """

    name: ClassVar[str]
    weights: ClassVar[str] = ""
    """Hub id or address of what is loaded unless a folder or file is named; empty where there is nothing to load."""
    likeness: ClassVar[bool] = False
    place: Tensor
    mark: str = ""
    """Tells its weights from others."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.empty(0), persistent=False)  # where it computes

    @classmethod
    def load(cls, source: str) -> Judge:
        """From a folder, a file, a hub id or an address."""
        return cls()

    @property
    def device(self) -> torch.device:
        return self.place.device

    def unit(self, pictures: np.ndarray) -> Tensor:
        """Pictures as ``[B, 3, H, W]`` in [0, 1]."""
        return torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2).float() / 255


class Psnr(Judge):
    """Peak signal-to-noise ratio in dB to the plain picture; 80 where nothing differs."""

    name, likeness = "psnr", True

    def forward(self, pictures: np.ndarray, prompts: Sequence[str], plain: np.ndarray) -> Tensor:
        return psnr(self.unit(pictures), self.unit(plain)).clamp(max=MOST)


class Ssim(Judge):
    """Structural similarity to the plain picture (Wang et al. 2004)."""

    name, likeness = "ssim", True

    def forward(self, pictures: np.ndarray, prompts: Sequence[str], plain: np.ndarray) -> Tensor:
        return ssim(self.unit(pictures), self.unit(plain))


class Lpips(Judge):
    """Distance to the plain picture in features of AlexNet (Zhang et al. 2018), version 0.1; 0 where nothing differs.

    Weights of the layers' channels are those that torchmetrics carries; AlexNet's are torchvision's file.
    """

    name, likeness = "lpips", True
    weights = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
    taps: ClassVar[tuple[int, ...]] = (1, 4, 7, 9, 11)
    """Layers whose output is compared: AlexNet's five rectifiers."""
    shift: Tensor
    scale: Tensor

    def __init__(self, features: Mapping[str, Tensor], channels: Sequence[Tensor]) -> None:
        super().__init__()
        self.features = alexnet()
        self.features.load_state_dict(features)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        for i, weight in enumerate(channels):
            self.register_buffer(f"channels_{i}", weight)

    @classmethod
    def load(cls, source: str) -> Lpips:
        network = state(download(source))
        package = find_spec("torchmetrics")
        assert package is not None and package.submodule_search_locations, "asked for before"
        carried = Path(package.submodule_search_locations[0]) / "functional/image/lpips_models/alex.pth"
        heads = state(carried)
        features = {k.removeprefix("features."): v for k, v in network.items() if k.startswith("features.")}
        return cls(features, [heads[f"lin{i}.model.1.weight"] for i in range(len(cls.taps))])

    def forward(self, pictures: np.ndarray, prompts: Sequence[str], plain: np.ndarray) -> Tensor:
        a, b = (((2 * self.unit(x) - 1) - self.shift) / self.scale for x in (pictures, plain))
        total = torch.zeros(len(pictures), device=self.device)
        for i, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if i in self.taps:
                weight = getattr(self, f"channels_{self.taps.index(i)}")
                difference = (_of_length_one(a) - _of_length_one(b)).square()
                total += (difference * weight).sum(1).mean((1, 2))
        return total


def alexnet() -> nn.Sequential:
    """The convolutions of AlexNet as in torchvision, layers counted alike."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


def _of_length_one(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()


class Clip(Judge):
    """Cosine of what CLIP sees and what it reads (Hessel et al. 2021); others give it times 100."""

    name = "clip"
    weights = "openai/clip-vit-base-patch16"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(cls, source: str) -> Clip:
        from transformers import AutoTokenizer, CLIPModel

        return cls(CLIPModel.from_pretrained(source), AutoTokenizer.from_pretrained(source))

    def forward(self, pictures: np.ndarray, prompts: Sequence[str], plain: np.ndarray | None = None) -> Tensor:
        config = self.model.config
        room = config.text_config.max_position_embeddings
        words = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=room, return_tensors="pt")
        seen = for_clip(pictures, config.vision_config.image_size).to(self.device)
        told = self.model(**words.to(self.device), pixel_values=seen)
        return (normalize(told.image_embeds) * normalize(told.text_embeds)).sum(1)


def for_clip(pictures: np.ndarray, side: int) -> Tensor:
    """What CLIP and BLIP see, ``[B, 3, side, side]``: the shorter side resized, the middle square, normalised."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    height, width = pictures.shape[1:3]
    short = min(height, width)
    size = int(side * width / short), int(side * height / short)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    resized = [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in pictures]
    square = np.stack(resized)[:, top : top + side, left : left + side].astype(np.float32) / 255
    normal = (square - np.array(OPENAI_CLIP_MEAN, np.float32)) / np.array(OPENAI_CLIP_STD, np.float32)
    return torch.from_numpy(normal).permute(0, 3, 1, 2)


class Inception(Judge):
    """Features for FID (Heusel et al. 2017) as clean-fid takes them (Parmar et al. 2022), ``[B, 2048]``.

    Pictures are resized as `cleanfid.resize.make_resizer("PIL", False, "bicubic", (299, 299))` does: PIL's bicubic
    filter, which is antialiased, on each channel in floating point, clipped to 0 to 255. The network is the TorchScript
    file that clean-fid downloads; clean-fid itself needs torchvision.
    """

    name = "fid"
    weights = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
    side: ClassVar[int] = 299

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    @classmethod
    def load(cls, source: str) -> Inception:
        return cls(torch.jit.load(download(source), map_location="cpu"))

    def forward(self, pictures: np.ndarray, prompts: Sequence[str] = (), plain: np.ndarray | None = None) -> Tensor:
        resized = np.stack([clean_resize(picture, self.side) for picture in pictures])
        x = torch.from_numpy(resized).to(self.device).permute(0, 3, 1, 2)
        return self.network.layers((x - 128) / 128).flatten(1)

    def width(self) -> int:
        """D."""
        return self(np.zeros((1, self.side, self.side, 3), np.uint8)).shape[1]


def clean_resize(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture ``[H, W, 3]`` of 0 to 255 as float32 ``[side, side, 3]``, as clean-fid does."""
    channels = [Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(picture, -1, 0)]
    resized = [np.asarray(c.resize((side, side), Image.Resampling.BICUBIC)) for c in channels]
    return np.stack(resized, -1).clip(0, 255)


@torch.no_grad()
def distance_to(source: Path, judge: Inception, device: str, kept: Path) -> FrechetTo:
    """FID: the distance of features to a reference; computed where ``device`` says, if that has double precision.

    Args:
        source: Folder of pictures, or ``.npz`` with ``mu [D]`` and ``sigma [D, D]`` as clean-fid writes.
        kept: Folder to keep the statistics of a folder in.

    Raises:
        ValueError: When there are too few pictures, or no such statistics.
    """
    width = judge.width()
    if source.suffix == ".npz":
        return _statistics(source, width, device)
    if not source.is_dir():
        raise ValueError(f"there is no folder {source} with pictures; name one, or a .npz with mu and sigma")
    pictures = sorted(path for path in source.rglob("*") if path.suffix.lower() in PICTURES)
    if len(pictures) <= width:
        raise ValueError(
            f"{source} holds {len(pictures)} pictures; FID needs more than {width} to compare with, or a file of "
            "statistics (.npz with mu and sigma)"
        )
    files = [(str(p.relative_to(source)), p.stat().st_size, p.stat().st_mtime_ns) for p in pictures]
    mark = hashlib.sha256(json.dumps([str(source.resolve()), files]).encode()).hexdigest()[:12]
    path = kept / f"reference-{mark}-{judge.mark}.npz"
    if path.exists():
        return _statistics(path, width, device)
    judge.to(device)
    features = []
    with progress("reference", len(pictures)) as advance:
        for picture in pictures:
            with Image.open(picture) as file:
                features.append(judge(np.asarray(file.convert("RGB"))[None]).double().cpu().numpy())
            advance()
    found = np.concatenate(features)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, mu=found.mean(0), sigma=np.cov(found, rowvar=False))
    return _statistics(path, width, device)


def _statistics(path: Path, width: int, device: str) -> FrechetTo:
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(file[name].astype(np.float64)) for name in ("mu", "sigma"))
    except (OSError, EOFError, BadZipFile, AttributeError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no file of statistics with mu and sigma: {error}") from error
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise ValueError(f"{path} has statistics of {len(mean)} features; the judge fid has {width}")
    precise = device if device.startswith("cuda") else "cpu"
    return FrechetTo.of_gaussian(mean.to(precise), covariance.to(precise))


def download(source: str) -> Path:
    """A file, or one from an address, kept where `torch.hub` keeps such."""
    if not source.startswith("https://"):
        return Path(source)
    path = Path(torch.hub.get_dir()) / "checkpoints" / source.rpartition("/")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(source, str(path))
    return path


def state(path: Path) -> dict[str, Tensor]:
    """Weights in a file of PyTorch's."""
    return torch.load(path, map_location="cpu", weights_only=True)
