"""Registry of the supported transformers, by the exact path of their class."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddit.models.base import Architecture

REGISTRY = {
    "ChromaTransformer2DModel": ("ddit.models.chroma", "Chroma"),
    "Flux2Transformer2DModel": ("ddit.models.flux2", "Flux2"),
    "Flux3Transformer2DModel": ("ddit.models.flux3", "Flux3"),
    "FluxTransformer2DModel": ("ddit.models.flux", "Flux"),
    "QwenImage21Transformer2DModel": ("ddit.models.qwen_image21", "QwenImage21"),
    "QwenImageTransformer2DModel": ("ddit.models.qwen_image", "QwenImage"),
    "SD3Transformer2DModel": ("ddit.models.sd3", "StableDiffusion3"),
    "SkyReelsV2Transformer3DModel": ("ddit.models.wan", "SkyReels"),
    "WanAnimateTransformer3DModel": ("ddit.models.wan", "Animate"),
    "WanTransformer3DModel": ("ddit.models.wan", "Wan"),
    "WanVACETransformer3DModel": ("ddit.models.wan", "Vace"),
}
"""Class of diffusers -> module and class of its `Architecture`. A new architecture is one file and one line here."""


def supported_models() -> list[str]:
    """Names of the diffusers classes that `ddit.apply` accepts."""
    return sorted(REGISTRY)


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
        f"{type(model).__name__} is not supported; supported are {', '.join(supported_models())}. "
        "To add an architecture, write a file like ddit/models/flux.py and a line in ddit.models.REGISTRY"
    )
