"""ddit for ComfyUI: larger patches and skipped steps on any flow-matching model."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
