"""Architectures known by name: their exact configurations, which need no weights to be counted or timed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ddit.adapter import PatchAdapter
from ddit.coarse import call_at
from ddit.config import Coarse
from ddit.models import REGISTRY, architecture_class, architecture_for, unsupported
from ddit.models.base import Architecture, Inputs
from ddit.pipelines.loading import check_device, model_folder, model_source
from ddit.preset import Preset

FOLDER = Path(__file__).parents[1] / "models" / "configs"


def names() -> list[str]:
    """Names that `meta_transformer` knows beside folders and hub ids."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def meta_transformer(model: str, blocks: Sequence[int] = ()) -> Any:
    """A transformer without weights, on the meta device.

    Args:
        model: One of `names`, or the folder or hub id of a pipeline; of that only the configuration is read.
        blocks: Keep only so many blocks: a number for each of the model's lists, or one for all.

    Raises:
        ValueError: When there is no configuration, it is of an unsupported class, or it has fewer blocks.
    """
    cls, config = _configuration(model, blocks)
    with torch.device("meta"):
        return cls.from_config(config)


def transformer(
    model: str, *, blocks: Sequence[int] = (), dtype: str = "float32", device: str = "cpu", random_weights: bool = False
) -> Any:
    """The same on a device: with its weights where there are any, else with random ones.

    Args:
        random_weights: Also for a folder or hub id, of which then only the configuration is read.

    Raises:
        ValueError: See `meta_transformer`; also for a device that is not there, weights that can't be read, or
            ``blocks`` of a model with weights.
    """
    check_device(device)
    cls, config = _configuration(model, blocks)
    kind = getattr(torch, dtype)
    if not (random_weights or model in names()):
        if blocks:
            raise ValueError("blocks can be left out of a model with random weights only; add --random-weights")
        try:
            return cls.from_pretrained(model_source(model), subfolder="transformer", torch_dtype=kind).to(device).eval()
        except Exception as error:  # diffusers, safetensors and the hub each raise their own
            raise ValueError(
                f"the weights of {model!r} can't be loaded: {(str(error) or repr(error)).splitlines()[0]}"
            ) from error
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(kind)
        with torch.device(device):
            made = cls.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)
    kept = set(cls._keep_in_fp32_modules or ())
    for name, parameter in made.named_parameters():  # as from_pretrained loads them
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return made


def compression(model: str, architecture: Architecture) -> tuple[int, int]:
    """Pixels of an edge, and frames, to one latent: as the autoencoder's configuration says, or as is usual.

    The first frame of a clip has a latent of its own.
    """
    vae = _autoencoder(model)
    if vae is None:
        return architecture.compression
    if "scale_factor_spatial" in vae:
        return vae["scale_factor_spatial"], vae["scale_factor_temporal"]
    if "spatio_temporal_scaling" in vae:
        halved = 2 ** sum(vae["spatio_temporal_scaling"])
        return vae["patch_size"] * halved, vae["patch_size_t"] * halved
    if "temperal_downsample" in vae:
        return 2 ** len(vae["temperal_downsample"]), 2 ** sum(vae["temperal_downsample"])
    return 2 ** (len(vae["block_out_channels"]) - 1), architecture.compression[1]


def latent_rate(model: str, architecture: Architecture) -> float:
    """Latents to a second of sound, likewise."""
    vae = _autoencoder(model)
    return architecture.latent_rate if vae is None else vae["sampling_rate"] / math.prod(vae["downsampling_ratios"])


def _autoencoder(model: str) -> Any:
    """Configuration of a pipeline's autoencoder; ``None`` of a model by name, and of a transformer on its own."""
    from diffusers import AutoencoderKL

    if model in names():
        return None
    try:
        return AutoencoderKL.load_config(model_source(model), subfolder="vae")
    except Exception:  # no such folder
        return None


def example(architecture: Architecture, model: str, height: int, width: int, frames: int, seconds: int = 0) -> Inputs:
    """A call for a picture, clip or sound of this size, with as much text as the model's pipeline takes.

    Raises:
        ValueError: For sizes that the model does not take.
    """
    if (architecture.axes == 1) != (seconds > 0):
        wanted = "seconds of sound, such as 60s" if architecture.axes == 1 else "HEIGHTxWIDTH"
        raise ValueError(f"the size of what {model} makes is given as {wanted}")
    text = Preset.load(model_folder(model)).call.get("max_sequence_length", architecture.text_tokens)
    if seconds:
        return architecture.example(1, 1, math.ceil(seconds * latent_rate(model, architecture)), text)
    pixels, group = compression(model, architecture)
    multiple = pixels * architecture.patch_size
    for name, size in (("height", height), ("width", width)):
        if size < multiple or size % multiple:
            raise ValueError(f"{name} is {size}; it must be a multiple of {multiple}")
    if frames % group != 1:
        raise ValueError(f"frames is {frames}; it must be one more than a multiple of {group}")
    return architecture.example((frames - 1) // group + 1, height // pixels, width // pixels, text)


PICTURE, CLIP = (1024, 1024, 1), (480, 832, 81)
"""Height, width and frames that costs are told for."""


@cache
def cost_ratios(model: str, scales: tuple[int, ...] = (1, 2, 4)) -> dict[int, float]:
    """Scale -> work of a step of a model at its usual size, in full steps; counted from its configuration.

    Raises:
        ValueError: When there is no configuration of an image or video model.
    """
    architecture = architecture_for(meta_transformer(model))
    if architecture.axes == 1:
        raise ValueError(f"{model} makes sound; name an image or video model, such as flux.1-dev or wan2.1-1.3b")
    call = example(architecture, model, *PICTURE)
    if architecture.read(call).latents.ndim == 5:
        call = example(architecture, model, *CLIP)
    at = {s: call_at(architecture, call, s, Coarse()) for s in scales}
    flops = {s: architecture.count_flops(inputs, s) for s, inputs in at.items()}
    return {s: n / flops[1] for s, n in flops.items()}


def _configuration(model: str, blocks: Sequence[int]) -> tuple[Any, dict[str, Any]]:
    """Class of the transformer and its configuration with so many blocks."""
    import diffusers

    known, folder = FOLDER / f"{model}.json", model_folder(model)
    if not known.is_file() and not folder.exists() and model.count("/") != 1:
        raise ValueError(f"{model!r} is none of {', '.join(names())}, no folder, and no hub id (owner/name) either")
    try:
        if known.is_file():
            loaded: Any = json.loads(known.read_text())
        else:
            loaded = PatchAdapter.load_config(model_source(model), subfolder="transformer")
    except Exception as error:  # diffusers and the hub each raise their own
        raise ValueError(
            f"{model!r} has no transformer/config.json that can be read: {(str(error) or repr(error)).splitlines()[0]}"
        ) from error
    name = loaded.get("_class_name")
    if name not in REGISTRY:
        raise ValueError(unsupported(name))
    if not hasattr(diffusers, name):
        raise ValueError(f"diffusers {diffusers.__version__} has no {name}; install a newer one")
    counts = architecture_class(name).block_counts
    if blocks:
        wanted = list(blocks) * len(counts) if len(blocks) == 1 else list(blocks)
        there = [loaded[key] for key in counts]
        if len(wanted) != len(counts) or not all(1 <= n <= most for n, most in zip(wanted, there, strict=False)):
            raise ValueError(
                f"blocks are {list(blocks)}; {model} has {' and '.join(map(str, there))}, "
                "name as many or fewer of each, at least 1"
            )
        loaded = {**loaded, **dict(zip(counts, wanted, strict=True))}
    return getattr(diffusers, name), loaded
