"""The field's judges: CLIP score, ImageReward, LPIPS, SSIM, PSNR, and Inception's features for FID.

Each gives a figure (or features) per picture. They rest on transformers, PIL and PyTorch alone: the packages that carry
these judges also need torchvision or timm, which fit only the PyTorch they were built for.

Letters: B pictures, H and W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from ddit.eval.metrics import MOST, psnr, ssim
from ddit.extras import require


class Judge(nn.Module):
    """Says something of every picture.

    Called with pictures ``[B, H, W, 3]`` as files hold them (uint8), their prompts, and the pictures to be like (read
    by those of ``likeness`` alone); gives ``[B]``, or features ``[B, D]``.
    """

    name: ClassVar[str]
    weights: ClassVar[str] = ""
    """Hub id or address of what is loaded unless a folder or file is named; empty where there is nothing to load."""
    likeness: ClassVar[bool] = False
    digits: ClassVar[int] = 3
    """After the point, in tables."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.empty(0), persistent=False)  # where it computes

    @classmethod
    def load(cls, source: str) -> Judge:
        """From a folder, a file, a hub id or an address."""
        return cls()

    @property
    def device(self) -> torch.device:
        return self.place.device  # type: ignore[return-value]

    def unit(self, pictures: np.ndarray) -> Tensor:
        """Pictures as ``[B, 3, H, W]`` in [0, 1]."""
        return torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2).float() / 255


class Psnr(Judge):
    """Peak signal-to-noise ratio in dB to the plain picture; 80 where nothing differs."""

    name, likeness, digits = "psnr", True, 1

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
        state = _state(download(source))
        package = find_spec("torchmetrics")
        assert package is not None and package.submodule_search_locations, "asked for before"
        carried = Path(package.submodule_search_locations[0]) / "functional/image/lpips_models/alex.pth"
        heads = _state(carried)
        features = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
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

    name, digits = "clip", 4
    weights = "openai/clip-vit-base-patch16"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(cls, source: str) -> Clip:
        from transformers import CLIPModel, CLIPTokenizerFast

        return cls(CLIPModel.from_pretrained(source), CLIPTokenizerFast.from_pretrained(source))

    def forward(self, pictures: np.ndarray, prompts: Sequence[str], plain: np.ndarray | None = None) -> Tensor:
        config = self.model.config
        room = config.text_config.max_position_embeddings
        words = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=room, return_tensors="pt")
        seen = for_clip(pictures, config.vision_config.image_size).to(self.device)
        told = self.model(**words.to(self.device), pixel_values=seen)
        return (normalize(told.image_embeds) * normalize(told.text_embeds)).sum(1)


def for_clip(pictures: np.ndarray, side: int) -> Tensor:
    """What CLIP and BLIP see, ``[B, 3, side, side]``: shorter side resized (PIL, bicubic), middle square, normalised."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    height, width = pictures.shape[1:3]
    short = min(height, width)
    size = int(side * width / short), int(side * height / short)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    resized = [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in pictures]
    square = np.stack(resized)[:, top : top + side, left : left + side].astype(np.float32) / 255
    normal = (square - np.float32(OPENAI_CLIP_MEAN)) / np.float32(OPENAI_CLIP_STD)
    return torch.from_numpy(normal).permute(0, 3, 1, 2)


class ImageReward(Judge):
    """What people would prefer (Xu et al. 2023): BLIP reads the prompt while looking at the picture; 0 is average.

    The package image-reward needs timm; here its weights go into BLIP of transformers. Their shapes give the sizes;
    heads are 64 wide.
    """

    name = "imagereward"
    weights = "THUDM/ImageReward"
    words: ClassVar[str] = "google-bert/bert-base-uncased"
    """Hub id of the tokenizer; a folder must hold it beside the weights."""
    mean: ClassVar[float] = 0.16717362830052426
    deviation: ClassVar[float] = 1.0333394966054072
    room: ClassVar[int] = 35
    """Tokens of a prompt that are read."""
    renamed: ClassVar[tuple[tuple[str, str], ...]] = (
        ("blip.visual_encoder.", "vision."),
        ("blip.text_encoder.", "text."),
        ("mlp.layers.", "mlp."),
        (".cls_token", ".embeddings.class_embedding"),
        (".pos_embed", ".embeddings.position_embedding"),
        (".patch_embed.proj.", ".embeddings.patch_embedding."),
        (".blocks.", ".encoder.layers."),
        (".attn.qkv.", ".self_attn.qkv."),
        (".attn.proj.", ".self_attn.projection."),
        (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."),
        ("vision.norm.", "vision.post_layernorm."),
    )

    def __init__(self, state: Mapping[str, Tensor], tokenizer: Any) -> None:
        """``state`` has the names of image-reward."""
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        for old, new in self.renamed:
            state = {name.replace(old, new): value for name, value in state.items()}
        vision, text = _blip_sizes(state)
        self.tokenizer = tokenizer
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        linear = {int(k.split(".")[1]): v.shape for k, v in state.items() if k.startswith("mlp.") and v.ndim == 2}
        # Dropout stands between the linear layers.
        layers = [nn.Linear(*reversed(linear[i])) if i in linear else nn.Identity() for i in range(max(linear) + 1)]
        self.mlp = nn.Sequential(*layers)
        own = self.state_dict()
        self.load_state_dict({name: value for name, value in state.items() if name in own})

    @classmethod
    def load(cls, source: str) -> ImageReward:
        from huggingface_hub import hf_hub_download
        from transformers import BertTokenizerFast

        local = Path(source).is_dir()
        file = Path(source) / "ImageReward.pt" if local else Path(hf_hub_download(source, "ImageReward.pt"))
        return cls(_state(file), BertTokenizerFast.from_pretrained(source if local else cls.words))

    def forward(self, pictures: np.ndarray, prompts: Sequence[str], plain: np.ndarray | None = None) -> Tensor:
        words = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.room, return_tensors="pt"
        ).to(self.device)
        seen = self.vision(for_clip(pictures, self.vision.config.image_size).to(self.device)).last_hidden_state
        read = self.text(words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=seen)
        return (self.mlp(read.last_hidden_state[:, 0])[:, 0] - self.mean) / self.deviation


def _blip_sizes(state: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Configurations of the two halves of BLIP from the shapes of their weights."""
    from transformers import BlipTextConfig, BlipVisionConfig

    def layers(start: str) -> int:
        return 1 + max(int(name.removeprefix(start).split(".")[0]) for name in state if name.startswith(start))

    patches = state["vision.embeddings.patch_embedding.weight"]
    side = round((state["vision.embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    vision = BlipVisionConfig(
        hidden_size=patches.shape[0],
        intermediate_size=len(state["vision.encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=layers("vision.encoder.layers."),
        num_attention_heads=patches.shape[0] // 64,
        image_size=side * patches.shape[-1],
        patch_size=patches.shape[-1],
        layer_norm_eps=1e-6,
    )
    vocabulary, width = state["text.embeddings.word_embeddings.weight"].shape
    text = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=patches.shape[0],
        intermediate_size=len(state["text.encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=layers("text.encoder.layer."),
        num_attention_heads=width // 64,
        max_position_embeddings=len(state["text.embeddings.position_embeddings.weight"]),
    )
    return vision, text


class Inception(Judge):
    """Features for FID (Heusel et al. 2017) as clean-fid takes them (Parmar et al. 2022), ``[B, 2048]``.

    Pictures are resized as `cleanfid.resize.make_resizer("PIL", False, "bicubic", (299, 299))` does: PIL's bicubic
    filter, which is antialiased, on each channel in floating point, clipped to 0 to 255. The network is the TorchScript
    file that clean-fid downloads; clean-fid itself needs torchvision.
    """

    name = "fid"
    weights = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
    digits = 2
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


JUDGES: dict[str, type[Judge]] = {kind.name: kind for kind in (Inception, Clip, ImageReward, Lpips, Ssim, Psnr)}
"""Name -> kind, in the order of the paper's table."""


def load_judges(names: Sequence[str], sources: Mapping[str, str]) -> list[Judge]:
    """Judges on the CPU, in the order of `JUDGES`.

    Args:
        sources: Name -> folder, file or hub id of weights to use in place of the default.

    Raises:
        ValueError: When a package or weights are missing.
    """
    if Lpips.name in names:
        require("torchmetrics", "the judge lpips")
    judges = []
    for name, kind in JUDGES.items():
        if name not in names:
            continue
        source = sources.get(name, kind.weights)
        try:
            judges.append(kind.load(source).eval().requires_grad_(False))
        except Exception as error:  # Missing files, no network, other weights: libraries raise what they meet.
            reason = (str(error) or repr(error)).splitlines()[0]
            raise ValueError(
                f"weights of the judge {name} can't be loaded from {source} ({reason}); name what holds them with "
                f"--weights {name}=PATH, or leave {name} out of --judges"
            ) from error
    return judges


def download(source: str) -> Path:
    """A file, or one from an address, kept where `torch.hub` keeps such."""
    if not source.startswith("https://"):
        return Path(source)
    path = Path(torch.hub.get_dir()) / "checkpoints" / source.rpartition("/")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(source, str(path))
    return path


def _state(path: Path) -> dict[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)
