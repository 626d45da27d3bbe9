"""Models by name: pipelines and adapters from folders, from the hub, or those that ship with ddit."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers.utils import logging as transformers_logging

from ddit.adapter import PatchAdapter
from ddit.embedded import ADAPTER_FOLDER, MODEL_FOLDER, VIDEO_ADAPTER_FOLDER, VIDEO_MODEL_FOLDER
from ddit.pipelines import modular
from ddit.preset import Preset
from ddit.util.tell import warn

EMBEDDED: dict[str, Path] = {"embedded": MODEL_FOLDER, "embedded-video": VIDEO_MODEL_FOLDER}
"""Names of the models that ship with ddit -> folder."""
ADAPTERS: dict[str, Path] = {"embedded": ADAPTER_FOLDER, "embedded-video": VIDEO_ADAPTER_FOLDER}
"""Names of these models -> folder of their adapter."""
INDEX = "model_index.json"
"""In a folder or repository that holds a pipeline."""


def model_folder(model: str) -> Path:
    """Where a model's files are, if they are on this machine."""
    return EMBEDDED[model] if model in EMBEDDED else Path(model)


def model_source(model: str) -> str:
    """What diffusers loads a model from: its folder on this machine, or its hub id."""
    folder = model_folder(model)
    return str(folder) if folder.exists() else model


def load_pipeline(
    model: str = "embedded", *, dtype: str = "float32", device: str = "cpu", preset: str | Path | None = None
) -> tuple[Any, Preset]:
    """A pipeline from a folder, a hub id or the embedded model, with its preset.

    Args:
        preset: Folder with the preset to use instead of the model's own, or a name (`ddit.preset.SHIPPED`). One that
            does not say how to call the model leaves that to the model's own.

    Raises:
        ValueError: When there is no such model, or this is no pipeline's folder.
    """
    from diffusers import DiffusionPipeline

    check_device(device)
    given = None if preset is None else Preset.load(preset, required=True)
    folder = model_folder(model)
    if model in EMBEDDED and not folder.exists():
        raise ValueError(
            f"the model {model} is not part of this ddit; benchmarks/yardstick of the repository trains and ships it"
        )
    if folder.exists() and not any((folder / name).is_file() for name in (INDEX, modular.INDEX)):
        raise ValueError(f"{folder} has no model_index.json; name a folder that a diffusers pipeline was saved to")
    if not folder.exists() and model.count("/") != 1:
        raise ValueError(f"there is no folder {model!r}, and it is no hub id (owner/name) either")
    try:
        load = modular.load if _is_modular(model) else DiffusionPipeline.from_pretrained
        with _without_bars() if model in EMBEDDED else nullcontext():
            pipe = load(model_source(model), dtype=getattr(torch, dtype))
    except Exception as error:  # Missing files, unknown classes, no network: diffusers raises what it meets.
        raise ValueError(f"model {model!r} can't be loaded: {(str(error) or repr(error)).splitlines()[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    own = Preset.load(folder)
    return pipe.to(device), own if given is None else replace(given, call=given.call or own.call)


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress is shown inside the block, of what takes no second."""
    libraries: Any = (diffusers_logging, transformers_logging)
    shown = [logging for logging in libraries if logging.is_progress_bar_enabled()]
    for logging in shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in shown:
            logging.enable_progress_bar()


def _is_modular(model: str) -> bool:
    """Whether a folder or hub id holds a modular pipeline, and no other."""
    folder = model_folder(model)
    if folder.exists():
        return not (folder / INDEX).is_file()
    try:
        hf_hub_download(model, INDEX)  # from the cache where there is no network
    except RemoteEntryNotFoundError:
        return True
    return False


def check_device(device: str) -> None:
    """Refuse a device that this machine or this PyTorch does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        there = ", ".join(["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])])
        raise ValueError(
            f"device {device!r} can't be used here ({str(error).splitlines()[0]}); this machine has {there}"
        ) from error


def load_adapter(name: str, *, dtype: str = "float32", device: str = "cpu") -> PatchAdapter:
    """An adapter from a folder or a hub id, or that of an embedded model, by the model's name.

    Raises:
        ValueError: When there is none, or its files are damaged.
    """
    folder = str(ADAPTERS.get(name, name))
    if not Path(folder).exists() and folder.count("/") != 1:
        raise ValueError(f"there is no folder {folder!r} with an adapter, and it is no hub id (owner/name) either")
    adapter: Any = PatchAdapter.from_pretrained(folder, dtype=getattr(torch, dtype))
    return adapter.to(device)


def check_prompt(prompt: str, model: str) -> None:
    """Refuse an empty prompt; warn of words that the embedded model never learnt."""
    if not prompt.strip():
        raise ValueError("the prompt is empty; say what to draw")
    if model not in EMBEDDED:
        return
    from ddit.embedded.clips import vocabulary as clip_words
    from ddit.embedded.scenes import vocabulary as picture_words

    words = picture_words() if model == "embedded" else clip_words()
    for word in prompt.split():
        if word not in words:
            near = difflib.get_close_matches(word, words, n=3, cutoff=0.4) or words[8:14]
            warn(f"the model {model} doesn't know {word!r}; near are {', '.join(near)}")
