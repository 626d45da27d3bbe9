"""What the nodes hang on a model: wrappers around ComfyUI's sampling, and the state of one sampling.

ComfyUI calls them from the outside in: a sampling (`outer_sample`), an evaluation of the model in it (`predict_noise`),
the model's answers to some lists of prompts (`calc_cond_batch`, where skipping sits), and one call of the model
(`apply_model`, where coarse steps sit). They hold nothing themselves: settings and state travel in
``transformer_options``, which ComfyUI copies for each sampling.

Letters: B samples, C channels, H and W latent height and width, sigma the noise level in (0, 1].
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP  # pyright: ignore[reportMissingImports]
from torch import Tensor

from ddit.config import FULL, FixedSchedule, PatchSchedule, SkipSchedule
from ddit.patches import (
    coarse_input,
    crop,
    detail_velocity,
    expand,
    grow,
    low_velocity,
    pad_to_multiple,
    scatter_rows,
    shrink,
)
from ddit.schedule import Fixed, Rule, StepContext, difference, noise_guard, statistics
from ddit.skip.policy import SkipPlan, SkipRule
from ddit.skip.skipper import Skipper

SETTINGS, RUN = "ddit", "ddit_run"
"""Names in ``transformer_options``; the first is also that of our wrappers."""
KEPT = 4
"""Latents that a third difference needs."""
NOISY = re.compile("ancestral|sde|ddpm|lcm|seeds|sa_solver")
"""In the names of ComfyUI's samplers that add noise in each step."""
REMEMBERED = {"dpmpp_2m": 2, "res_multistep": 2, "gradient_estimation": 2, "deis": 3, "unipc": 4, "ipndm": 4, "lms": 4}
"""In the name of a sampler -> of how many steps it takes the model's answers into its next move; of others 1."""
GRID_BOUND = ("position_ids", "vinput_mask")
"""Conditioning that tells where each token is."""


@dataclass(frozen=True)
class FirstSteps:
    """Large patches in the first steps of a run, whatever the latents do."""

    scale: int = 2
    share: float = 0.0
    """Of the steps, in [0, 1]."""


@dataclass(frozen=True)
class Settings:
    """What the nodes between the model and the sampler ask for."""

    patches: PatchSchedule | FirstSteps = FirstSteps()
    skip: SkipSchedule | None = None
    patch_size: int = 2
    """The model's own, in latent pixels."""


class Run:
    """State of one sampling.

    Args:
        settings: What was asked for.
        sigmas: Noise level at the beginning of each step, and where the last one ends.
        noisy: Whether the sampler adds noise of its own, so that latents do not tell what comes next.
        remembers: Of how many steps it takes the model's answers into its next move.
    """

    def __init__(self, settings: Settings, sigmas: Sequence[float], noisy: bool, remembers: int = 1) -> None:
        self.sigmas, self.levels, self.patch_size = sigmas, sigmas[:-1], settings.patch_size
        self.remembers = remembers
        self.policy, self.skipper = _policy(settings.patches, len(self.levels)), _skipper(settings)
        self.points: list[Tensor] = []
        """The last latents, float32."""
        self.sigma, self.step = math.inf, 0
        self.first = True
        """Whether this is the first evaluation at this noise level; Heun's method has two."""
        self.scales: list[int] = []
        """Decision on this step for each sample."""
        self.chosen: list[list[int]] = []
        """The same for all steps so far."""
        self.skip = self.called = False
        self.passes = 0
        """Answers that were given in this evaluation."""
        self.asked: dict[int, Any] = {}
        """Number of an answer -> what it depends on beside the latents."""
        self.ran: list[str] = []
        """What each evaluation was, for the console."""
        self.bound: str | None = None
        """What beside the latents lies on the full grid, so that every step has to be full."""
        self._told: set[str] = set()
        if noisy and (self.skipper is not None or isinstance(self.policy, Rule)):
            self.tell("full steps, since the sampler adds noise; take a deterministic one, or a fixed schedule")
            self.skipper = None
            self.policy = Fixed(FULL) if isinstance(self.policy, Rule) else self.policy

    def tell(self, message: str) -> None:
        """Warn once."""
        if message not in self._told:
            self._told.add(message)
            logging.warning("ddit: %s", message)

    def begin(self, x: Tensor, sigma: float) -> None:
        """Decide on an evaluation of the model at latents ``[B, C, (F,) H, W]``; one decision for each noise level."""
        self.first, self.passes = sigma != self.sigma, 0
        self.ran.append("")
        if not self.first:
            self.points[-1] = x.float().clone()
            return
        if sigma > self.sigma:  # a sampler went back, or a wrapper restarts it
            self.tell("begins anew where the noise level rises again; samplers that go back in each step gain nothing")
            self._forget()
        self.sigma = sigma
        self.step = min(sum(level > sigma * (1 + 1e-4) for level in self.levels), len(self.levels) - 1)
        self.points = [*self.points, x.float().clone()][-KEPT:]
        answered, self.called, self.skip = self.called, False, False
        if x.ndim < 4:
            self.tell("full steps, since these latents are no pictures or videos")
            self.policy, self.skipper = Fixed(FULL), None
        context = StepContext(
            self.step,
            len(self.levels),
            self._statistics(),
            sigma,
            self.levels,
            chosen=self.chosen,
            end=max((level for level in self.sigmas if level < sigma * (1 - 1e-4)), default=0.0),
            remembers=self.remembers,
        )
        self.scales = self.policy.choose(context)
        if self.bound is not None and max(self.scales) > 1:
            self.tell(f"full steps, since {self.bound} lies on the full grid")
            self.scales = [1] * len(x)
        self.chosen = [*self.chosen, self.scales]
        if self.skipper is not None:
            moved = self.points[-1] - self.points[-2] if len(self.points) > 1 else None
            self.skip = all(self.skipper.choose(context, moved, [answered] * len(x)))

    def _statistics(self) -> list[dict[int, float]]:
        if not isinstance(self.policy, Rule) or len(self.points) <= self.policy.schedule.order:
            return [{} for _ in self.points[-1]]
        schedule = self.policy.schedule
        values = difference(self.points, schedule.order)
        return statistics(values, self.patch_size, schedule.scales, schedule.percentile)

    def _forget(self) -> None:
        self.points, self.chosen = [], []
        if self.skipper is not None:
            self.skipper.forget()

    def answer(self, x: Tensor, sigma: Tensor, asked: Sequence[Any], call: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Clean latents for some lists of prompts: forecasts in a skipped step, else those of the model.

        Args:
            x: Latents ``[B, C, (F,) H, W]`` or windows of them.
            sigma: Noise level ``[B]``.
            asked: For each list, what its answer depends on beside the latents; ``None`` where there is none: such a
                list is not counted.
            call: Asks the model.
        """
        assert self.skipper is not None
        given = [place for place, one in enumerate(asked) if one is not None]
        passes = range(self.passes, self.passes + len(given))
        self.passes += len(given)
        if self.asked.get(passes.start, asked) != asked:  # a prompt came or went: old answers tell nothing
            self.skipper.forget()
        self.asked[passes.start] = asked
        samples = range(len(x))
        skip = self.skip and all(self.skipper.ready(which, i) for which in passes for i in samples)
        if skip:
            velocities = {which: self.skipper.forecast(which, samples, x, sigma) for which in passes}
            clean = [torch.zeros_like(x) for _ in asked]
            for which, place in zip(passes, given, strict=True):
                clean[place] = x - expand(sigma, x) * velocities[which]
        else:
            clean = call()
            answers = ((x - clean[place]).float() / expand(sigma, x) for place in given)
            velocities = dict(zip(passes, answers, strict=True))
            self.called = True
        if self.first:
            for which, v in velocities.items():
                self.skipper.observe(which, self.step, [not skip] * len(x), self.scales, x.float(), v, self.sigma)
        return clean


def _policy(patches: PatchSchedule | FirstSteps, total: int) -> Rule | Fixed:
    if isinstance(patches, PatchSchedule):
        return Rule(patches, noise_guard({}))
    coarse = round(patches.share * total)
    return Fixed(FixedSchedule(steps=(patches.scale,) * coarse + (1,) * (total - coarse + 1)))


def _skipper(settings: Settings) -> Skipper | None:
    if settings.skip is None:
        return None
    if settings.skip.speedup is not None:
        return Skipper(SkipPlan(settings.skip.speedup))
    return Skipper(SkipRule(settings.skip.threshold or 0.0, settings.patch_size))


def name_of(sampler: Any) -> str:
    """Of a sampler of ComfyUI, such as ``sample_euler``."""
    return getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__).lower()


def adds_noise(sampler: Any) -> bool:
    """Whether a sampler of ComfyUI adds noise in each step; one that nobody knows is taken for deterministic."""
    options = getattr(sampler, "extra_options", {})
    usual = 1.0 if NOISY.search(name_of(sampler)) else 0.0
    return options.get("eta", usual) > 0 or options.get("s_churn", 0.0) > 0


def outer_sample(
    executor: Any, noise: Tensor, latents: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **more: Any
) -> Any:
    """A sampling begins, with a state of its own."""
    options = executor.class_obj.model_options["transformer_options"]
    remembers = next((n for name, n in REMEMBERED.items() if name in name_of(sampler)), 1)
    run = options[RUN] = Run(options[SETTINGS], sigmas.tolist(), adds_noise(sampler), remembers)
    result = executor(noise, latents, sampler, sigmas, *args, **more)
    logging.info("ddit: %s", " ".join(run.ran))
    return result


def predict_noise(executor: Any, x: Tensor, sigma: Tensor, options: dict[str, Any], *args: Any) -> Tensor:
    """An evaluation of the model begins."""
    run = _run(options)
    if run is None:
        return executor(x, sigma, options, *args)
    if not run.ran:
        wrappers = options.get("transformer_options", {}).get("wrappers", {}).get("diffusion_model", {})
        run.bound = "EasyCache's memory" if "easycache" in wrappers else bound_to_grid(x, executor.class_obj.conds)
    run.begin(x, float(sigma.max()))
    result = executor(x, sigma, options, *args)
    run.ran[-1] = run.ran[-1] or "-"
    return result


def calc_cond_batch(
    executor: Any, model: Any, conds: list[Any], x: Tensor, sigma: Tensor, options: dict[str, Any]
) -> list[Tensor]:
    """The model's answers to lists of prompts, the positive and the negative one."""
    run = _run(options)
    if run is None or run.skipper is None:
        return executor(model, conds, x, sigma, options)
    if options.get("context_handler") is not None:
        run.tell("no step is skipped, since context windows move about")
        return executor(model, conds, x, sigma, options)
    asked = [_asked(cond, x, run.sigma) for cond in conds]
    return run.answer(x, sigma, asked, lambda: executor(model, conds, x, sigma, options))


def _asked(cond: list[dict[str, Any]] | None, x: Tensor, sigma: float) -> Any:
    """What an answer depends on beside the latents: their size, and the prompts in force at this noise level."""
    if cond is None:
        return None
    spans = [(c.get("uuid"), c.get("timestep_start", math.inf), c.get("timestep_end", -math.inf)) for c in cond]
    return x.shape, [uuid for uuid, start, end in spans if end <= sigma <= start]


def apply_model(
    executor: Any,
    x: Tensor,
    sigma: Tensor,
    c_concat: Tensor | None,
    c_crossattn: Any,
    control: Any,
    options: dict[str, Any],
    **conditions: Any,
) -> Tensor:
    """One call of the model: clean latents ``[n B, C, (F,) H, W]`` for n prompts, one after the other."""
    run: Run | None = options.get(RUN)
    if run is None or not run.scales:
        return executor(x, sigma, c_concat, c_crossattn, control, options, **conditions)
    scales = run.scales * (len(x) // len(run.scales))
    if len(scales) != len(x):  # tiles of the latents, by another node
        scales = [min(run.scales)] * len(x)
    run.ran[-1] = run.ran[-1] or "/".join(map(str, dict.fromkeys(scales)))
    call = {"x": x, "sigma": sigma, "c_concat": c_concat, "c_crossattn": c_crossattn, "control": control, **conditions}
    answer: Tensor | None = None
    for scale in sorted(set(scales)):
        rows = [i for i, each in enumerate(scales) if each == scale]
        part = coarse_step(executor, scale, run.patch_size, options, **_take(call, rows, len(x)))
        answer = scatter_rows(part, rows, len(x), answer)
    assert answer is not None, "there are samples"
    return answer


def coarse_step(
    executor: Any,
    scale: int,
    patch_size: int,
    options: dict[str, Any],
    *,
    x: Tensor,
    sigma: Tensor,
    c_concat: Tensor | None,
    c_crossattn: Any,
    control: Any,
    **conditions: Any,
) -> Tensor:
    """Clean latents like ``x``, from the model on a smaller picture at a corrected noise level (docs/method.md)."""
    if scale == 1:
        return executor(x, sigma, c_concat, c_crossattn, control, options, **conditions)
    padded = pad_to_multiple(x.float(), scale * patch_size)
    small, level = coarse_input(padded, sigma.float(), scale, patch_size, "noise-consistent")
    if c_concat is not None:
        c_concat = shrink(pad_to_multiple(c_concat, scale * patch_size), scale, patch_size, "noise-consistent")
    clean = executor(small.to(x), level.to(sigma), c_concat, c_crossattn, control, options, **conditions)
    output = (small - clean) / expand(level, small)
    low = low_velocity(small, output, sigma.float(), scale, "noise-consistent")
    velocity = grow(low, scale, patch_size, "noise-consistent") + detail_velocity(padded, sigma.float(), scale, None)
    return x - expand(sigma, x) * crop(velocity, *x.shape[-2:])


def bound_to_grid(x: Tensor, conds: dict[str, list[dict[str, Any]]]) -> str | None:
    """What beside latents ``x`` can't be brought onto a smaller grid, or ``None``; channels beside them can be pooled.

    One prompt's reason holds for all: guidance would magnify what a full and a coarse answer differ by.
    """
    for cond in (each for some in conds.values() for each in some):
        if cond.get("control") is not None:
            return "a ControlNet"
        for name, value in cond["model_conds"].items():
            if name in GRID_BOUND or (name != "c_concat" and _has_latents(value.cond, x)):
                return f"the conditioning {name}"
    return None


def _has_latents(value: Any, x: Tensor) -> bool:
    """Whether conditioning holds pictures or masks, or a mask of attention between all tokens.

    Pictures are of the latents' size or so many times it, or have as many channels.
    """
    if isinstance(value, Tensor):
        if value.ndim < 4:
            return value.ndim == 3 and value.shape[1] == value.shape[2] > 1
        height, width = x.shape[-2:]
        times = max(1, value.shape[-2] // height)
        return value.shape[-2:] == (times * height, times * width) or value.shape[1] == x.shape[1]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(_has_latents(each, x) for each in values)


def _take(value: Any, rows: list[int], batch: int) -> Any:
    """Some samples of all that is nested in a call; what has no batch axis stays."""
    if len(rows) == batch:
        return value
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == batch else value
    if isinstance(value, list | tuple):
        return type(value)(_take(each, rows, batch) for each in value)
    return {k: _take(v, rows, batch) for k, v in value.items()} if isinstance(value, dict) else value


def _run(options: dict[str, Any]) -> Run | None:
    return options.get("transformer_options", {}).get(RUN)


WRAPPERS: dict[str, Callable[..., Any]] = {
    WrappersMP.OUTER_SAMPLE: outer_sample,
    WrappersMP.PREDICT_NOISE: predict_noise,
    WrappersMP.CALC_COND_BATCH: calc_cond_batch,
    WrappersMP.APPLY_MODEL: apply_model,
}
"""Kind of wrapper -> ours."""
