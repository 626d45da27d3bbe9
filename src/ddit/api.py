"""`apply`: put dynamic patches on one transformer, and take them off again."""

from __future__ import annotations

import functools
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ddit.adapter import PatchAdapter
from ddit.config import ScheduleConfig
from ddit.models import architecture_for
from ddit.models.base import Architecture, Inputs, first, to_meta
from ddit.report import Report
from ddit.schedule import Policy, make_policy
from ddit.state import Generation, Memory

_MARK = "_ddit_handle"
_FORWARDS = ("forward", "_old_forward")
"""Where a forward may lie: accelerate moves it to ``_old_forward`` and back when its hooks come and go."""


def apply(
    pipe_or_transformer: Any,
    *,
    adapter: PatchAdapter | str | Path | None = None,
    config: ScheduleConfig | None = None,
    policy: Policy | None = None,
    detail_variance: Mapping[int, Sequence[float]] | None = None,
) -> Handle:
    """Let a pipeline's transformer change its patch size from step to step.

    Only the instance handed over changes, and only its ``forward``. Applying again replaces.

    Args:
        pipe_or_transformer: A diffusers pipeline with a supported ``transformer``, or that transformer.
        adapter: A `ddit.PatchAdapter`, or the folder or hub id of one. Its own ``start``, ``positions`` and
            ``anchored`` hold.
        config: The schedule; by default the paper's threshold, with our steps.
        policy: Chooses the scales in place of ``config.policy``.
        detail_variance: Scale -> variance per latent channel of the detail inside large patches, measured on the
            model's own samples; by default the adapter's. It counts where there was no step at scale 1 yet.

    Returns:
        A handle with ``.report`` and ``.remove()``; in a ``with`` block it removes itself.

    Raises:
        ValueError: For an unsupported model, an adapter of another base model or without the schedule's scales, or
            variances that don't fit the scales.
    """
    transformer = getattr(pipe_or_transformer, "transformer", pipe_or_transformer)
    pipe = pipe_or_transformer if transformer is not pipe_or_transformer else None
    architecture = architecture_for(transformer)
    config = config or ScheduleConfig()
    if adapter is not None:
        adapter = adapter if isinstance(adapter, PatchAdapter) else PatchAdapter.from_pretrained(adapter)
        adapter.check(architecture.transformer)
        config = _adapted(config, adapter)
        detail_variance = detail_variance or adapter.detail_variance
    variance = {s: torch.tensor(list(v)) for s, v in (detail_variance or {}).items()}
    missing = sorted(set(config.scales) - {1} - set(variance)) if variance else []
    if missing:
        raise ValueError(f"detail_variance has no entry for scales {missing}; measure them or leave it out")
    previous = getattr(transformer, _MARK, None)
    if previous is not None:
        previous.remove()
    return Handle(transformer, pipe, architecture, config, policy or make_policy(config), variance, adapter)


def _adapted(config: ScheduleConfig, adapter: PatchAdapter) -> ScheduleConfig:
    """The schedule with the adapter's own form of a coarse step."""
    foreign = sorted(set(config.scales) - {1, *adapter.scales})
    if foreign:
        raise ValueError(
            f"the schedule uses scales {foreign}, the adapter has {list(adapter.scales)}; "
            f"set scales to {(1, *adapter.scales)} or fewer, or leave the adapter out (--adapter none)"
        )
    default = ScheduleConfig()
    for name, value in adapter.form.items():
        asked = getattr(config, name)
        if asked not in (value, getattr(default, name)):
            warnings.warn(
                f"{name}={asked!r} is not used: the adapter was trained with {value!r}; "
                "leave it out (--adapter none) for another",
                stacklevel=3,
            )
    return replace(config, **adapter.form)


class Handle:
    """Dynamic patches on one transformer, until `remove`."""

    def __init__(
        self,
        transformer: Any,
        pipe: Any,
        architecture: Architecture,
        config: ScheduleConfig,
        policy: Policy,
        variance: dict[int, Tensor],
        adapter: PatchAdapter | None,
    ) -> None:
        self.transformer = transformer
        self.config = config
        self._pipe = pipe
        self._architecture = architecture
        self._policy = policy
        self._variance = variance
        self.adapter = adapter
        self._attachment = adapter.attach(architecture.transformer) if adapter is not None else None
        self._generation = Generation(config)
        self._finished: Generation | None = None
        self._timesteps: Any = None
        self._warned: set[str] = set()
        # Around `transformer.compile()`, so that decisions stay out of compiled code; inside accelerate's hook, which
        # model offloading takes off and on again after every run.
        places = [p for p in ("_compiled_call_impl", "_old_forward") if vars(transformer).get(p) is not None]
        self._place = [*places, "forward"][0]
        self._forward: Callable[..., Any] = getattr(transformer, self._place)
        self._active = True
        # Straight into the instance's dictionary: torch.compile's wrapper forwards setattr to the module inside.
        self._saved: dict[str, Any] = {}
        self._patched: dict[str, Any] = {_MARK: self, self._place: self._wrap(self._forward, self._call)}
        reset = getattr(transformer, "_reset_stateful_cache", None)
        if reset is not None:  # Pipelines call this on every component when a generation ends.
            self._patched["_reset_stateful_cache"] = self._wrap(reset, functools.partial(self._end, reset))
        for name, value in self._patched.items():
            if name in vars(transformer):
                self._saved[name] = vars(transformer)[name]
            vars(transformer)[name] = value

    @staticmethod
    def _wrap(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
        """The replacement under the original's name and signature, which pipelines inspect."""

        @torch.compiler.disable  # for those who compile the whole transformer after `apply`
        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return replacement(*args, **kwargs)

        return wrapper

    @property
    def scales(self) -> list[int]:
        """Scale of each sample in the current step; empty between generations."""
        return list(self._generation.scales)

    @property
    def report(self) -> Report:
        """What ran in the current generation, or the last one.

        Raises:
            RuntimeError: Before any run.
        """
        generation = self._generation if self._generation.steps else self._finished
        if generation is None:
            raise RuntimeError("there is no report before a run; call the pipeline first")
        scales = sorted({1, *(s for step in generation.steps for s in step.scales)})
        tokens = {s: self._architecture.tokens(generation.examples[s]) for s in scales}
        flops = {s: self._architecture.count_flops(generation.examples[s], s, self.adapter) for s in scales}
        return Report(tuple(generation.steps), tokens, flops, generation.forced)

    def remove(self) -> None:
        """Give the transformer back as it was. Safe to call twice."""
        if not self._active:
            return
        self._active = False
        if self._attachment is not None:
            self._attachment.remove()
        attributes = vars(self.transformer)
        for name, value in self._patched.items():
            for place in _FORWARDS if name in _FORWARDS else (name,):
                if attributes.get(place) is not value:
                    continue  # Somebody wrapped it after us; what is left of ours passes calls through.
                if name in self._saved:
                    attributes[place] = self._saved[name]
                elif place == "_old_forward":
                    attributes[place] = self._forward
                else:
                    del attributes[place]
        self._start_over()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self._active else "removed"
        return f"<ddit on {type(self.transformer).__name__}, {state}, {self.config.policy} schedule>"

    def _end(self, reset: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._start_over()
        return reset(*args, **kwargs)

    def _start_over(self) -> None:
        if self._generation.steps:
            self._finished = self._generation.finished()
        self._generation = Generation(self.config)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not self._active:
            return self._forward(*args, **kwargs)
        try:
            return self._step(args, kwargs)
        except BaseException:
            self._generation = Generation(self.config)
            raise

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        started = time.perf_counter()
        arch = self._architecture
        inputs = arch.bind(args, kwargs)
        if self._run_begins():
            self._start_over()
        sigma = self._sigma(inputs)
        obstacle = arch.obstacle(inputs)
        if obstacle is not None:
            return self._plain_step(inputs, sigma, obstacle, args, kwargs)
        z = arch.latents(inputs)
        if not self._generation.repeats(z, sigma):
            self._begin(inputs, self._generation.continues(z, sigma))
            total = getattr(self._pipe, "_num_timesteps", None)
            with torch.no_grad():
                self._generation.decide(z, sigma, self._policy, arch.patch_size, total)
        scales = self._generation.scales
        height, width = z.shape[-2:]
        if set(scales) == {1}:
            answer = self._forward(*args, **kwargs)
            velocity = arch.velocity(first(answer), (height, width))
            self._generation.record(velocity.detach(), time.perf_counter() - started)
            return answer
        velocity = self._mixed_step(inputs, scales, (height, width))
        self._generation.record(velocity.detach(), time.perf_counter() - started)
        return arch.answer(velocity.to(z.dtype), inputs)

    def _sigma(self, inputs: Inputs) -> float:
        """Noise level of a call: the scheduler's own where a pipeline has one, since timesteps may be bfloat16."""
        rounded = float(self._architecture.sigma(inputs)[0])
        scheduler: Any = getattr(self._pipe, "scheduler", None)
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is None:
            return rounded
        index = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index or 0
        exact = float(sigmas[min(index, len(sigmas) - 1)])
        return exact if abs(exact - rounded) <= 2**-8 else rounded

    def _run_begins(self) -> bool:
        """Whether the pipeline has set its timesteps anew: a new run, even where the last one broke half-way."""
        before, self._timesteps = self._timesteps, getattr(getattr(self._pipe, "scheduler", None), "timesteps", None)
        return self._timesteps is not before

    def _begin(self, inputs: Inputs, continues: bool) -> None:
        """Start over if a call does not continue the generation under way."""
        if not continues:
            self._start_over()
        if len(self._generation.examples) < len(self.config.scales):  # none, or those of a forced step
            self._generation.examples = self._examples(inputs)

    def _plain_step(
        self, inputs: Inputs, sigma: float, obstacle: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call that can't run with large patches: say so once, and record it."""
        started = time.perf_counter()
        tokens = inputs[self._architecture.batched[0]]
        if not self._generation.repeats(tokens, sigma):
            self._begin(inputs, self._generation.continues(tokens, sigma))
            self._generation.force(tokens, sigma)
        self._generation.forced = obstacle
        if obstacle not in self._warned:
            self._warned.add(obstacle)
            warnings.warn(f"ddit keeps every step at scale 1: {obstacle}", stacklevel=5)
        answer = self._forward(*args, **kwargs)
        self._generation.add_seconds(time.perf_counter() - started)
        return answer

    def _mixed_step(self, inputs: Inputs, scales: list[int], size: tuple[int, int]) -> Tensor:
        """One call with a scale for each sample: samples of one scale run together."""
        memory = self._generation.memory()
        groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for sample, scale in enumerate(scales):
            groups[scale, scale > 1 and memory.known[sample]].append(sample)
        parts = [self._group(inputs, scale, samples, memory, size) for (scale, _), samples in groups.items()]
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([sample for samples in groups.values() for sample in samples])
        return torch.cat(parts)[order.argsort()]

    def _group(self, inputs: Inputs, scale: int, samples: list[int], memory: Memory, size: tuple[int, int]) -> Tensor:
        """Velocity of samples of one scale, all with a step at scale 1 behind them or all without."""
        arch, config = self._architecture, self.config
        rows = inputs if len(samples) == len(memory.known) else arch.rows(inputs, samples)
        if scale == 1:
            return arch.velocity(first(self._forward(**rows)), size).float()
        anchor = low = None
        if memory.known[samples[0]]:
            for missing, earlier in memory.unasked(scale, samples):
                there = memory.anchor.rows(missing)
                call = arch.rows(inputs, missing)
                with torch.no_grad():
                    line = arch.low_line(self._forward, call, scale, config, there, earlier, self.adapter)
                memory.asked(scale, missing, line)
                self._generation.compared(missing)
            anchor, low = memory.anchor.rows(samples), functools.partial(memory.line, scale, samples)
        return arch.coarse_step(
            self._forward,
            rows,
            scale,
            config,
            anchor=anchor,
            low=low,
            variance=self._variance.get(scale),
            adapter=self.adapter,
        )

    def _examples(self, inputs: Inputs) -> dict[int, Inputs]:
        """Inputs of one sample at every scale, without data: from these, costs are counted when asked for."""
        arch = self._architecture
        one = arch.rows(inputs, [0])
        if arch.obstacle(inputs) is not None:
            return {1: to_meta(one)}
        with torch.no_grad():
            coarse = {s: arch.coarse_inputs(one, s, self.config)[0] for s in self.config.scales if s > 1}
        return {s: to_meta(example) for s, example in {1: one, **coarse}.items()}
