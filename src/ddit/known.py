"""Architectures known by name: their exact configurations, which need no weights to be counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ddit.adapter import PatchAdapter
from ddit.generate import model_folder
from ddit.models import REGISTRY

FOLDER = Path(__file__).parent / "models" / "configs"


def names() -> list[str]:
    """Names that `meta_transformer` knows beside folders and hub ids."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def meta_transformer(model: str) -> Any:
    """A transformer without weights, on the meta device.

    Args:
        model: One of `names`, or the folder or hub id of a pipeline; of that only the configuration is read.

    Raises:
        ValueError: When there is no configuration, or it is of an unsupported class.
    """
    import diffusers

    known, folder = FOLDER / f"{model}.json", model_folder(model)
    if not known.is_file() and not folder.exists() and model.count("/") != 1:
        raise ValueError(f"{model!r} is none of {', '.join(names())}, no folder, and no hub id (owner/name) either")
    try:
        if known.is_file():
            loaded: Any = json.loads(known.read_text())
        else:
            loaded = PatchAdapter.load_config(str(folder) if folder.exists() else model, subfolder="transformer")
    except Exception as error:  # diffusers and the hub each raise their own
        raise ValueError(
            f"{model!r} has no transformer/config.json that can be read: {(str(error) or repr(error)).splitlines()[0]}"
        ) from error
    name = loaded.get("_class_name")
    if name not in REGISTRY:
        raise ValueError(f"{name} is not supported; supported are {', '.join(sorted(REGISTRY))}")
    with torch.device("meta"):
        return getattr(diffusers, name).from_config(loaded)
