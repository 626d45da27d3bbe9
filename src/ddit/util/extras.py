"""Packages that a plain install leaves out, asked for before any work."""

from __future__ import annotations

from importlib.util import find_spec

EXTRA_OF = {
    "matplotlib": "plot",
    "imageio": "video",
    "imageio_ffmpeg": "video",
    "cache_dit": "cache-dit",
    "prodigyopt": "train",
    "torchmetrics": "judges",
    "pyarrow": "judges",
    "gradio": "app",
}
"""Module that is imported only where it is needed -> the extra that brings it."""


def has(module: str) -> bool:
    """Whether a module can be imported here."""
    return find_spec(module) is not None


def require(module: str, what: str) -> None:
    """Refuse what needs a package that is not there.

    Raises:
        ValueError: Naming the extra to install.
    """
    if not has(module):
        raise ValueError(f"{what} needs the package {module}: pip install 'ddit[{EXTRA_OF[module]}]'")
