"""From a prompt to pictures, plain and with dynamic patches: what the command line and the evaluation share."""

from __future__ import annotations

import functools
import inspect
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor

from ddit.adapter import PatchAdapter
from ddit.api import apply
from ddit.caches import Config as CacheConfig
from ddit.config import FixedSchedule, Patches, SkipSchedule
from ddit.handle import Handle
from ddit.models import architecture_for
from ddit.models.base import Inputs, first
from ddit.preset import Preset, for_batch
from ddit.report import Report
from ddit.schedule import Policy
from ddit.util.kinds import fits, told

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
    cache: CacheConfig | None = None
    preset: Preset | None = None

    def apply(self, pipe: Any) -> Handle:
        """See `ddit.apply`."""
        return apply(pipe, **{field.name: getattr(self, field.name) for field in fields(self)})


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


_SPATIAL = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
"""By what names pipelines say how many pixels of an edge, and how many frames, make a latent."""


def _said(pipe: Any, names: Sequence[str]) -> int | None:
    return next((getattr(pipe, name) for name in names if hasattr(pipe, name)), None)


def pixels_per_latent(pipe: Any) -> int:
    """Of an edge."""
    return _said(pipe, _SPATIAL) or 8


def check_call(pipe: Any, settings: dict[str, Any]) -> None:
    """Refuse arguments that a pipeline does not take, and a height, width or number of frames that it would round.

    Raises:
        ValueError: Also for a pipeline of an unsupported model.
    """
    architecture = architecture_for(getattr(pipe, "transformer", pipe))
    multiple = pixels_per_latent(pipe) * architecture.patch_size * architecture.grid_multiple
    sizes = {name: settings[name] for name in ("height", "width", "num_frames") if settings.get(name) is not None}
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise ValueError(f"{name} is {size!r}; it must be a whole number")
        if name != "num_frames" and size % multiple:
            below = max(size // multiple, 1) * multiple
            raise ValueError(f"{name} is {size}; this model takes multiples of {multiple}, such as {below}")
    count, group = sizes.get("num_frames"), _said(pipe, _TEMPORAL)
    if count is not None and group is None:
        raise ValueError(f"frames is {count}, but {type(pipe).__name__} makes no clips; leave it out")
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
    return _said(pipe, _TEMPORAL) is not None


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
        on_step: Not called where the pipeline itself has no ``callback_on_step_end``.

    Raises:
        ValueError: When the pipeline raises before its first step is done; the message names the settings as well.
    """
    settings = for_batch(pipe, settings, len(prompts))
    handle = None if method is None else method.apply(pipe)
    try:
        pictures, seconds = _called(pipe, prompts, seeds, settings, handle, on_step)
        return Run(pictures, seconds, handle.report if handle else None)
    finally:
        if handle is not None:
            handle.remove()


def _called(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    settings: dict[str, Any],
    handle: Handle | None,
    on_step: OnStep | None,
) -> tuple[np.ndarray, float]:
    """What a pipeline draws, and the seconds of its call; see `run`."""
    stepped = False

    def callback(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal stepped
        stepped = True
        if on_step is not None:
            scales = handle.scales if handle is not None else [1] * len(prompts)
            on_step(index + 1, pipe.num_timesteps, scales)
        return tensors

    # HunyuanVideo 1.5 calls nobody back.
    takes = "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
    calls_back = {"callback_on_step_end": callback} if takes else {}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    started = time.perf_counter()
    try:
        # By name: pipelines that take pictures have them first.
        texts = {"prompt": prompts, **calls_back, **settings}
        made = pipe(generator=generators, output_type="np", return_dict=False, **texts)[0]
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if stepped:
            raise
        called = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise ValueError(f"{error} ({type(pipe).__name__} was called with {called})") from error
    return np.asarray(made), time.perf_counter() - started


def run_steps(pipe: Any, settings: Mapping[str, Any]) -> int:
    """Number of denoising steps that a call takes: the pipeline's own, where nobody says."""
    own = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    return settings.get("num_inference_steps", own)


def guidance_scale(pipe: Any, settings: Mapping[str, Any]) -> float:
    """Scale ``g`` of classifier-free guidance in two passes that a call with these settings has, as in
    ``uncond + g (cond - uncond)``; 1 for none."""
    guider = getattr(pipe, "guider", None)
    if guider is not None:
        return float(getattr(guider, "guidance_scale", 1.0))
    known = inspect.signature(type(pipe).__call__).parameters
    for name in ("true_cfg_scale", "guidance_scale"):  # where there is the first, the second is told to the model
        if name in known:
            value = settings.get(name, known[name].default)
            counted_from = architecture_for(pipe.transformer).guidance_off
            return float(value) + 1 - counted_from if isinstance(value, int | float) else 1.0
    return 1.0


def guided_error(errors: Sequence[Tensor], guidance: float) -> Tensor:
    """Mean squared error of each row, ``[rows]``, of what guidance makes of its passes.

    Args:
        errors: Of each pass ``[rows, ...]``.
        guidance: Its scale g; counts where there are two passes. Which is which does not: the parts of the passes are
            taken alike.
    """
    own = torch.stack([_mean_square(error) for error in errors]).mean(0)
    if len(errors) != 2 or guidance <= 1:
        return own
    return own + guidance * (guidance - 1) * _mean_square(errors[0] - errors[1])


def _mean_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1)


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
    patches = None if method is None else method.patches or (method.preset or Preset()).patches
    scales = (1, 2, 4) if patches is None else patches.scales
    steps = FixedSchedule(steps=(1, *sorted(scales, reverse=True)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of this schedule, which is nobody's
        run(pipe, prompts, seeds, warm, method=method and Method(patches=steps, adapter=method.adapter))


def _median(runs: list[Run]) -> Run:
    return Run(runs[-1].pictures, statistics.median(r.seconds for r in runs), runs[-1].report)
