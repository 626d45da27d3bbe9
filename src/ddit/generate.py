"""From a prompt to pictures, plain and with dynamic patches: what the command line and the evaluation share."""

from __future__ import annotations

import difflib
import functools
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor

from ddit.adapter import PatchAdapter
from ddit.api import apply
from ddit.caches import Config as CacheConfig
from ddit.config import FixedSchedule, Patches, SkipSchedule
from ddit.embedded import CORRECTOR_FOLDER, MODEL_FOLDER, video
from ddit.handle import Handle
from ddit.kinds import fits, told
from ddit.models import architecture_for
from ddit.models.base import Inputs, first
from ddit.preset import Preset, for_batch
from ddit.pretrained import Part
from ddit.report import Report
from ddit.schedule import Policy
from ddit.skip.corrector import ForecastCorrector
from ddit.tell import warn

EMBEDDED: dict[str, tuple[Path, Path]] = {
    "embedded": (MODEL_FOLDER, CORRECTOR_FOLDER),
    "embedded-video": (video.MODEL_FOLDER, video.CORRECTOR_FOLDER),
}
"""Names of the models that ship with ddit -> folder of the model, folder of its corrector."""

OnStep = Callable[[int, int, list[int]], None]
"""Called after each step with its number from 1, the number of steps, and the scales of the step's samples."""


@dataclass(frozen=True)
class Run:
    """Pictures or clips of one call of a pipeline."""

    pictures: np.ndarray
    """``[N, H, W, 3]`` in [0, 1], of a video pipeline ``[N, F, H, W, 3]``; sound ``[N, channels, T]`` in [-1, 1]."""
    seconds: float
    """Wall-clock time of the whole call, text encoders and decoder included."""
    report: Report | None
    """``None`` for a plain run."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What makes a pipeline faster: the arguments of `ddit.apply`."""

    patches: Patches | Policy | None = None
    skip: SkipSchedule | None = None
    adapter: PatchAdapter | None = None
    corrector: ForecastCorrector | None = None
    cache: CacheConfig | None = None
    preset: Preset | None = None

    def apply(self, pipe: Any) -> Handle:
        """See `ddit.apply`."""
        return apply(pipe, **{field.name: getattr(self, field.name) for field in fields(self)})


def model_folder(model: str) -> Path:
    """Where a model's files are, if they are on this machine."""
    return EMBEDDED[model][0] if model in EMBEDDED else Path(model)


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
        flag = " --video" if model == "embedded-video" else ""
        raise ValueError(
            f"the model {model} is not part of this ddit; make it with 'ddit embedded train{flag}' and "
            f"'ddit embedded install{flag}'"
        )
    if (folder / "modular_model_index.json").is_file():
        raise ValueError(
            f"{folder} holds a modular pipeline, which the command line can't call; use ddit.apply in Python"
        )
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} has no model_index.json; name a folder that a diffusers pipeline was saved to")
    if not folder.exists() and model.count("/") != 1:
        raise ValueError(f"there is no folder {model!r}, and it is no hub id (owner/name) either")
    try:
        pipe = DiffusionPipeline.from_pretrained(model_source(model), dtype=getattr(torch, dtype))
    except Exception as error:  # Missing files, unknown classes, no network: diffusers raises what it meets.
        raise ValueError(f"model {model!r} can't be loaded: {(str(error) or repr(error)).splitlines()[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    own = Preset.load(folder)
    return pipe.to(device), own if given is None else replace(given, call=given.call or own.call)


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
    """An adapter from a folder or a hub id.

    Raises:
        ValueError: When there is none, or its files are damaged.
    """
    return _load_part(PatchAdapter, name, dtype, device)


def load_corrector(name: str, *, dtype: str = "float32", device: str = "cpu") -> ForecastCorrector:
    """A corrector from a folder, a hub id, or that of an embedded model.

    Raises:
        ValueError: When there is none, or its files are damaged.
    """
    return _load_part(ForecastCorrector, str(EMBEDDED[name][1]) if name in EMBEDDED else name, dtype, device)


def _load_part(kind: type[Part], name: str, dtype: str, device: str) -> Part:
    if not Path(name).exists() and name.count("/") != 1:
        raise ValueError(f"there is no folder {name!r} with {kind.noun}, and it is no hub id (owner/name) either")
    part: Any = kind.from_pretrained(name, dtype=getattr(torch, dtype))
    return part.to(device)


def check_prompt(prompt: str, model: str) -> None:
    """Refuse an empty prompt; warn of words that the embedded model never learnt."""
    if not prompt.strip():
        raise ValueError("the prompt is empty; say what to draw")
    if model not in EMBEDDED:
        return
    from ddit.embedded.scenes import vocabulary as picture_words
    from ddit.embedded.video.clips import vocabulary as clip_words

    words = picture_words() if model == "embedded" else clip_words()
    for word in prompt.split():
        if word not in words:
            near = difflib.get_close_matches(word, words, n=3, cutoff=0.4) or words[8:14]
            warn(f"the model {model} doesn't know {word!r}; near are {', '.join(near)}")


SET = {
    "prompt",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "generator",
    "output_type",
    "return_dict",
    "callback_on_step_end",
}
"""Arguments of a pipeline's call that `run` decides: it draws one picture for each prompt it is given."""


def check_call(pipe: Any, settings: dict[str, Any]) -> None:
    """Refuse arguments that a pipeline does not take, and a height, width or number of frames that it would round."""
    multiple = 2 * getattr(pipe, "vae_scale_factor", getattr(pipe, "vae_scale_factor_spatial", 8))
    for name in ("height", "width"):
        size = settings.get(name)
        if size is not None and size % multiple:
            below = max(size // multiple, 1) * multiple
            raise ValueError(f"{name} is {size}; this model takes multiples of {multiple}, such as {below}")
    count, group = settings.get("num_frames"), getattr(pipe, "vae_scale_factor_temporal", None)
    if count is not None and group is None:
        raise ValueError(f"frames is {count}, but {type(pipe).__name__} draws pictures; leave it out")
    if count is not None and group is not None and count % group != 1:
        near = count // group * group + 1
        raise ValueError(f"frames is {count}; this model takes one more than a multiple of {group}, such as {near}")
    takes = inspect.signature(type(pipe).__call__).parameters
    hints = _hints(type(pipe).__call__)
    for name, value in settings.items():
        if name not in takes or name in SET:
            allowed = ", ".join(sorted(takes.keys() - {"self"} - SET))
            raise ValueError(f"{type(pipe).__name__} can't be called with {name}; it takes {allowed}")
        if isinstance(takes[name].default, int | float) and not fits(value, bool | float):
            raise ValueError(f"{name} is {value!r}; {type(pipe).__name__} takes a number there")
        if value == []:
            raise ValueError(f"{name} is empty; give at least one, or leave it out")
        if name in hints and not fits(value, hints[name]):
            raise ValueError(f"{name} is {value!r}; {type(pipe).__name__} takes {told(hints[name])} there")


def _hints(function: Any) -> dict[str, Any]:
    """Annotations of a call; none where they can't be looked up."""
    try:
        return get_type_hints(function)
    except Exception:  # names that only type checkers import
        return {}


def draws_video(pipe: Any) -> bool:
    """Whether a pipeline draws clips."""
    return hasattr(pipe, "vae_scale_factor_temporal")


def call_settings(preset: Preset, **chosen: Any) -> dict[str, Any]:
    """Arguments of a pipeline's call: the preset's, overridden by those chosen that are not ``None``."""
    return {**preset.call, **{k: v for k, v in chosen.items() if v is not None}}


def run(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    settings: dict[str, Any],
    *,
    method: Method | None = None,
    on_step: OnStep | None = None,
) -> Run:
    """Call a pipeline once, plain or by a method.

    Args:
        prompts: One per picture.
        seeds: One per picture, so that a picture does not depend on its batch.
        settings: Arguments of the pipeline's call, such as ``num_inference_steps``.

    Raises:
        ValueError: When the pipeline raises before its first step is done; the message names the settings as well.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = for_batch(pipe, settings, len(prompts))
    handle: Handle | None = None
    if method is not None:
        handle = method.apply(pipe)
    stepped = False

    def callback(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal stepped
        stepped = True
        if on_step is not None:
            scales = handle.scales if handle is not None else [1] * len(prompts)
            on_step(index + 1, pipe.num_timesteps, scales)
        return tensors

    try:
        started = time.perf_counter()
        pictures = pipe(
            prompts,
            generator=generators,
            output_type="np",
            callback_on_step_end=callback,
            return_dict=False,
            **settings,
        )[0]
        seconds = time.perf_counter() - started
        return Run(np.asarray(pictures), seconds, handle.report if handle else None)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if stepped:
            raise
        called = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise ValueError(f"{error} ({type(pipe).__name__} was called with {called})") from error
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def recorded(pipe: Any) -> Iterator[list[tuple[Inputs, Tensor]]]:
    """Calls of the transformer inside the block: their arguments by name, and the answers.

    With `ddit.apply` before it, answers are those that the pipeline gets.
    """
    transformer = pipe.transformer
    architecture, forward = architecture_for(transformer), transformer.forward
    before = vars(transformer).get("forward")
    calls: list[tuple[Inputs, Tensor]] = []

    @functools.wraps(forward)  # modular pipelines read the signature
    def spy(*args: Any, **kwargs: Any) -> Any:
        answer = forward(*args, **kwargs)
        calls.append((architecture.bind(args, kwargs), first(answer)))
        return answer

    transformer.forward = spy
    try:
        yield calls
    finally:
        if before is None:
            del transformer.forward
        else:
            transformer.forward = before


def by_turns(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    settings: dict[str, Any],
    methods: Mapping[str, Method | None],
    *,
    repeats: int = 1,
    on_step: OnStep | None = None,
) -> dict[str, Run]:
    """Several methods by turns after a short warm-up at every scale; each with the median of its times.

    Args:
        methods: Name -> method, ``None`` for the untouched pipeline.

    Raises:
        ValueError: For fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; it must be at least 1")
    for method in methods.values():
        warm_up(pipe, prompts, seeds, settings, method)
    drawn: dict[str, list[Run]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            drawn[name].append(run(pipe, prompts, seeds, settings, method=method, on_step=on_step))
    return {name: _median(runs) for name, runs in drawn.items()}


def warm_up(pipe: Any, prompts: list[str], seeds: list[int], settings: dict[str, Any], method: Method | None) -> None:
    """Run a few steps at every scale of a method, so that the first use of each is not timed."""
    warm = {**settings, "num_inference_steps": min(settings.get("num_inference_steps", 4), 4)}
    scales = method.patches.scales if method is not None and method.patches is not None else (1, 2, 4)
    steps = FixedSchedule(steps=(1, *sorted(scales, reverse=True)))
    run(pipe, prompts, seeds, warm, method=method and Method(patches=steps, adapter=method.adapter))


def _median(runs: list[Run]) -> Run:
    return Run(runs[-1].pictures, statistics.median(r.seconds for r in runs), runs[-1].report)
