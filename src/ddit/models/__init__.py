"""Registry of the supported transformers, by the exact path of their class."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddit.models.base import Architecture

REGISTRY = {
    "AceStepTransformer1DModel": ("ddit.models.ace_step", "AceStep"),
    "ChromaTransformer2DModel": ("ddit.models.chroma", "Chroma"),
    "Flux2Transformer2DModel": ("ddit.models.flux2", "Flux2"),
    "Flux3Transformer2DModel": ("ddit.models.flux3", "Flux3"),
    "FluxTransformer2DModel": ("ddit.models.flux", "Flux"),
    "HunyuanVideo15Transformer3DModel": ("ddit.models.hunyuan_video", "HunyuanVideo15"),
    "HunyuanVideoTransformer3DModel": ("ddit.models.hunyuan_video", "HunyuanVideo"),
    "Krea2Transformer2DModel": ("ddit.models.krea2", "Krea2"),
    "LTXVideoTransformer3DModel": ("ddit.models.ltx", "LTX"),
    "LongCatImageTransformer2DModel": ("ddit.models.longcat_image", "LongCatImage"),
    "Lumina2Transformer2DModel": ("ddit.models.lumina2", "Lumina2"),
    "OvisImageTransformer2DModel": ("ddit.models.ovis_image", "OvisImage"),
    "QwenImage21Transformer2DModel": ("ddit.models.qwen_image21", "QwenImage21"),
    "QwenImageTransformer2DModel": ("ddit.models.qwen_image", "QwenImage"),
    "SD3Transformer2DModel": ("ddit.models.sd3", "StableDiffusion3"),
    "SkyReelsV2Transformer3DModel": ("ddit.models.wan", "SkyReels"),
    "WanAnimateTransformer3DModel": ("ddit.models.wan", "Animate"),
    "WanTransformer3DModel": ("ddit.models.wan", "Wan"),
    "WanVACETransformer3DModel": ("ddit.models.wan", "Vace"),
    "ZImageTransformer2DModel": ("ddit.models.z_image", "ZImage"),
}
"""Class of diffusers -> module and class of its `Architecture`. A new architecture is one file and one line here."""

REFUSED = {
    "HunyuanVideoFramepackTransformer3DModel": "its history of frames has patches of its own, placed on the full grid",
    "LTX2VideoTransformer3DModel": "it answers with a video and its sound, and a coarse step makes the video alone",
}
"""Class of diffusers -> why large patches do not serve it."""


def supported_models() -> list[str]:
    """Names of the diffusers classes that `ddit.apply` accepts."""
    return sorted(REGISTRY)


def unsupported(transformer: str) -> str:
    """What to say of a transformer's class that is not in `REGISTRY`."""
    reason = f": {REFUSED[transformer]}" if transformer in REFUSED else ""
    return f"{transformer} is not supported{reason}; supported are {', '.join(supported_models())}"


def architecture_class(transformer: str) -> type[Architecture]:
    """The class that describes a transformer's class of this name, one of `REGISTRY`."""
    module, name = REGISTRY[transformer]
    return getattr(import_module(module), name)


def architecture_for(transformer: Any) -> Architecture:
    """The architecture that describes a transformer; ``torch.compile``'s wrapper is looked through.

    Raises:
        ValueError: For a class not in the registry.
    """
    model = getattr(transformer, "_orig_mod", transformer)
    for cls in type(model).__mro__:
        if cls.__name__ in REGISTRY and cls.__module__.startswith("diffusers."):
            return architecture_class(cls.__name__)(model)
    raise ValueError(
        f"{unsupported(type(model).__name__)}. "
        "To add an architecture, write a file like ddit/models/flux.py and a line in ddit.models.REGISTRY"
    )
