"""Modular pipelines of diffusers, called as others are: the commands know one form of a call."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import ModularPipeline

INDEX = "modular_model_index.json"
"""In a folder or repository that holds one."""


def load(source: str, dtype: Any) -> Any:
    """A modular pipeline with all its components.

    Args:
        source: Folder or hub id.
    """
    pipe = ModularPipeline.from_pretrained(source)
    pipe.load_components(dtype=dtype)
    return called_as_others(pipe)


def called_as_others(pipe: Any) -> Any:
    """The same pipeline, whose call takes a list of prompts and returns ``(pictures,)``.

    Its signature tells the inputs of its blocks. One prompt is handed on by itself: some take no lists (FLUX.3).
    """
    base: Any = type(pipe)
    drawn = next(name for name in ("images", "videos") if name in {output.name for output in pipe.blocks.outputs})
    inputs = [i for i in pipe.blocks.inputs if i.name]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(i.name, keyword, default=i.default) for i in inputs if i.name != "prompt"]

    def call(self: Any, prompt: list[str], *, return_dict: bool = False, **settings: Any) -> tuple[Any]:
        asked = prompt[0] if len(prompt) == 1 else prompt
        return (base.__call__(self, prompt=asked, output=drawn, **settings),)

    own = list(inspect.signature(call).parameters.values())[:2]
    call.__signature__ = inspect.Signature([*own, *parameters])  # type: ignore[attr-defined]
    pipe.__class__ = type(base.__name__, (base,), {"__call__": call})
    return pipe
