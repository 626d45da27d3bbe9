"""`apply`: put dynamic patches on a pipeline's transformer, and take them off again."""

from __future__ import annotations

import functools
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from diffusers.hooks.context_parallel import ContextParallelGatherHook
from diffusers.models._modeling_parallel import ContextParallelOutput
from torch import Tensor

from ddit.adapter import PatchAdapter
from ddit.caches import Cache, Config, make_cache
from ddit.config import ScheduleConfig
from ddit.dial import make_policy
from ddit.models import architecture_for
from ddit.models.base import Architecture, Inputs, first, to_meta
from ddit.preset import Preset
from ddit.report import Report
from ddit.schedule import Dynamic, Policy
from ddit.state import Generation, Memory

_MARK = "_ddit_handle"
_TRANSFORMERS = ("transformer", "transformer_2")
"""Where a pipeline has them; Wan 2.2 A14B hands over from the first to the second."""
_FORWARDS = ("forward", "_old_forward")
"""Where a forward may lie: accelerate moves it to ``_old_forward`` and back when its hooks come and go."""


def apply(
    pipe_or_transformer: Any,
    *,
    adapter: PatchAdapter | str | Path | None = None,
    config: ScheduleConfig | None = None,
    policy: Policy | None = None,
    detail_variance: Mapping[int, Sequence[float]] | None = None,
    cache: Config | str | None = None,
    preset: Preset | str | Path | None = None,
) -> Handle:
    """Let a pipeline's transformer change its patch size from step to step.

    Only the instance handed over changes, and only its ``forward``. Applying again replaces. Two transformers that
    take turns (Wan 2.2 A14B) share one schedule.

    Args:
        pipe_or_transformer: A diffusers pipeline with a supported ``transformer``, or that transformer.
        adapter: A `ddit.PatchAdapter`, or the folder or hub id of one. Its own form of a step holds
            (`ddit.PatchAdapter.form`).
        config: The schedule; by default the preset's, or without one the paper's threshold, with our steps.
        policy: Chooses the scales in place of ``config.policy``.
        detail_variance: Scale -> variance per latent channel of the detail inside large patches, measured on the
            model's own samples; by default the adapter's. It counts where there was no step at scale 1 yet.
        cache: Of diffusers (``FirstBlockCacheConfig``, ``TaylorSeerCacheConfig``, ``MagCacheConfig``), a
            `ddit.TeaCacheConfig`, or text as for ``--cache``. A cache that is there already, or comes later with
            ``transformer.enable_cache``, works as well.
        preset: What `ddit calibrate` measured on the model, the folder that holds it, or ``"paper"``; by default that
            of the folder that the pipeline was loaded from, if there is one.

    Returns:
        A handle with ``.report`` and ``.remove()``; in a ``with`` block it removes itself.

    Raises:
        ValueError: For an unsupported model, an adapter of another base model, without the schedule's scales or for a
            pipeline with two transformers, variances that don't fit the scales, or a cache that does not work here.
    """
    found = [model for model in (getattr(pipe_or_transformer, n, None) for n in _TRANSFORMERS) if model is not None]
    transformers = found or [pipe_or_transformer]
    pipe = pipe_or_transformer if found else None
    architectures = [architecture_for(transformer) for transformer in transformers]
    known = _preset(preset, pipe)
    config = config or ScheduleConfig.from_dict(dict(known.schedule))
    if known.origin:
        warnings.warn(f"the preset holds {known.origin}; 'ddit calibrate' measures this model's own", stacklevel=2)
    if adapter is not None:
        if len(transformers) > 1:
            raise ValueError(
                "an adapter serves one transformer and this pipeline has two; leave it out (--adapter none), "
                "or apply it to one of them"
            )
        adapter = adapter if isinstance(adapter, PatchAdapter) else PatchAdapter.from_pretrained(adapter)
        adapter.check(architectures[0].transformer)
        if adapter.asks and _parallel(architectures[0].transformer) is not None:
            raise ValueError(
                "an adapter that asks the model does not work where tokens are spread over several devices; "
                "leave it out (--adapter none), or draw a picture on each device with accelerate launch"
            )
        sampler, learnt = type(getattr(pipe, "scheduler", None)).__name__, adapter.config["sampler"]
        if pipe is not None and learnt not in (None, sampler):
            warnings.warn(
                f"the adapter mends forecasts for {learnt} and this pipeline samples by {sampler}, under which it may "
                "lose; compare with adapter=None (--adapter none)",
                stacklevel=2,
            )
        config = _adapted(config, adapter)
        detail_variance = detail_variance or adapter.detail_variance
    if not detail_variance and set(config.scales) <= {1, *known.detail_variance}:
        detail_variance = known.detail_variance
    variance = {s: torch.tensor(list(v)) for s, v in (detail_variance or {}).items()}
    missing = sorted(set(config.scales) - {1} - set(variance)) if variance else []
    if missing:
        raise ValueError(f"detail_variance has no entry for scales {missing}; measure them or leave it out")
    if config.quality:
        if known.dial is None:
            raise ValueError(
                "a quality needs a preset of this model: make one with 'ddit calibrate', "
                "or ask for a speedup or a threshold"
            )
        config = replace(config, threshold=known.dial.threshold_of_quality(config.quality))
    if isinstance(cache, str):
        cache = make_cache(cache, known.teacache)
    for transformer in transformers:
        previous = getattr(transformer, _MARK, None)
        if previous is not None:
            previous.remove()
    caches: list[Cache] = []
    try:
        for architecture in architectures:
            caches.append(Cache(architecture, cache))
    except BaseException:
        for put_on in caches:
            put_on.remove()
        raise
    seats = list(zip(transformers, architectures, caches, strict=True))
    policy = policy or make_policy(config)
    return Handle(seats, pipe, config, policy, variance, adapter)


def _preset(preset: Preset | str | Path | None, pipe: Any) -> Preset:
    if isinstance(preset, Preset):
        return preset
    if preset is None:
        source = getattr(getattr(pipe, "config", None), "_name_or_path", None)
        return Preset.load(source) if source else Preset()
    return Preset.load(preset, required=True)


def _adapted(config: ScheduleConfig, adapter: PatchAdapter) -> ScheduleConfig:
    """The schedule with the adapter's own form of a coarse step."""
    foreign = sorted(set(config.scales) - {1, *adapter.scales})
    if foreign:
        raise ValueError(
            f"the schedule uses scales {foreign}, the adapter has {list(adapter.scales)}; "
            f"set scales to {(1, *adapter.scales)} or fewer, or leave the adapter out (--adapter none)"
        )
    own = {field.name: field.default for field in fields(ScheduleConfig)}
    default = replace(config, **{name: own[name] for name in adapter.form})
    for name, value in adapter.form.items():
        asked = getattr(config, name)
        if asked not in (value, getattr(default, name)):
            warnings.warn(
                f"{name}={asked!r} is not used: the adapter was trained with {value!r}; "
                "leave it out (--adapter none) for another",
                stacklevel=3,
            )
    return replace(config, **adapter.form)


def _parallel(transformer: Any) -> Any:
    """How `enable_parallelism` of diffusers spreads a transformer over devices; ``None`` where it does not."""
    return getattr(transformer, "_parallel_config", None)


class Seat:
    """One transformer with `Handle` around its forward, until `remove`."""

    def __init__(self, transformer: Any, architecture: Architecture, cache: Cache, handle: Handle) -> None:
        self.transformer = transformer
        self.architecture = architecture
        self.cache = cache
        self._parallel = _parallel(transformer)
        # Around `transformer.compile()`, so that decisions stay out of compiled code; inside accelerate's hook, which
        # model offloading takes off and on again after every run.
        places = [p for p in ("_compiled_call_impl", "_old_forward") if vars(transformer).get(p) is not None]
        self._place = [*places, "forward"][0]
        self.forward: Callable[..., Any] = getattr(transformer, self._place)
        # Straight into the instance's dictionary: torch.compile's wrapper forwards setattr to the module inside.
        self._saved: dict[str, Any] = {}
        call = functools.partial(handle._call, self)
        self._patched: dict[str, Any] = {_MARK: handle, self._place: _wrapped(self.forward, call)}
        reset = getattr(transformer, "_reset_stateful_cache", None)
        if reset is not None:  # Pipelines call this on every component when a generation ends.
            self._patched["_reset_stateful_cache"] = _wrapped(reset, functools.partial(handle._end, reset))
        for name, value in self._patched.items():
            if name in vars(transformer):
                self._saved[name] = vars(transformer)[name]
            vars(transformer)[name] = value

    def check(self) -> None:
        """Refuse to go on where tokens are split before they come here: no latents could be made of them."""
        if _parallel(self.transformer) is not self._parallel:
            raise ValueError(
                "enable_parallelism was called after ddit.apply, whose place is around it: "
                "call remove(), then ddit.apply again"
            )

    def whole(self, tokens: Tensor) -> Tensor:
        """What a layer sees of the tokens ``[B, N, width]``, of all devices among which they are spread."""
        spread = getattr(self._parallel, "context_parallel_config", None)
        if spread is None:
            return tokens
        plan: Any = [ContextParallelOutput(gather_dim=1)]
        gathered: Any = ContextParallelGatherHook(plan, spread).post_forward(self.transformer, tokens)
        return gathered

    def remove(self) -> None:
        """Give the transformer back as it was."""
        attributes = vars(self.transformer)
        for name, value in self._patched.items():
            for place in _FORWARDS if name in _FORWARDS else (name,):
                if attributes.get(place) is not value:
                    continue  # Somebody wrapped it after us; what is left of ours passes calls through.
                if name in self._saved:
                    attributes[place] = self._saved[name]
                elif place == "_old_forward":
                    attributes[place] = self.forward
                else:
                    del attributes[place]
        self.cache.remove()


def _wrapped(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement under the original's name and signature, which pipelines inspect."""

    @torch.compiler.disable  # for those who compile the whole transformer after `apply`
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return replacement(*args, **kwargs)

    return wrapper


class Handle:
    """Dynamic patches on a transformer, or two that take turns, until `remove`."""

    def __init__(
        self,
        transformers: Sequence[tuple[Any, Architecture, Cache]],
        pipe: Any,
        config: ScheduleConfig,
        policy: Policy,
        variance: dict[int, Tensor],
        adapter: PatchAdapter | None,
    ) -> None:
        self.config = config
        self._pipe = pipe
        self._policy = policy
        self._variance = variance
        self.adapter = adapter
        self._attachment = adapter.attach(transformers[0][1].transformer) if adapter is not None else None
        self._generation = self._new_generation()
        self._finished: Generation | None = None
        self._share = 0.0
        self._timesteps: Any = None
        self._warned: set[str] = set()
        self._active = True
        self._seats = [Seat(*parts, self) for parts in transformers]

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
        architecture = self._seats[0].architecture
        tokens = {s: architecture.tokens(generation.examples[s]) for s in scales}
        flops = {s: architecture.count_flops(generation.examples[s], s, self.adapter) for s in scales}
        asked, path = self.config.speedup or None, generation.path_flops
        return Report(tuple(generation.steps), tokens, flops, generation.forced, self._share, asked, path)

    def remove(self) -> None:
        """Give the transformer back as it was. Safe to call twice."""
        if not self._active:
            return
        self._active = False
        if self._attachment is not None:
            self._attachment.remove()
        for seat in self._seats:
            seat.remove()
        self._start_over()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self._active else "removed"
        names = " and ".join(type(seat.transformer).__name__ for seat in self._seats)
        return f"<ddit on {names}, {state}, {self.config.policy} schedule>"

    def _end(self, reset: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._start_over()
        return reset(*args, **kwargs)

    def _start_over(self) -> None:
        if self._generation.steps:
            self._finished = self._generation.finished()
            self._remark(self._finished)
        self._forget()

    def _remark(self, run: Generation) -> None:
        """Say once when a whole run was not what a dynamic schedule is for."""
        if not isinstance(self._policy, Dynamic) or run.forced:
            return
        said = self._policy.remark([step.scales for step in run.steps], [step.statistics for step in run.steps])
        if said is not None and not self._warned:
            self._warned.add(said)
            warnings.warn(said, stacklevel=4)

    @property
    def _mender(self) -> PatchAdapter | None:
        """The adapter, if it mends forecasts without asking the model."""
        return None if self.adapter is None or self.adapter.asks else self.adapter

    def _new_generation(self) -> Generation:
        return Generation(self.config, mended=self._mender is not None)

    def _forget(self) -> None:
        """Forget the generation under way."""
        self._generation = self._new_generation()
        for seat in self._seats:
            seat.cache.start_over()

    def _call(self, seat: Seat, *args: Any, **kwargs: Any) -> Any:
        if not self._active:
            return seat.forward(*args, **kwargs)
        try:
            return self._step(seat, args, kwargs)
        except BaseException:
            self._forget()
            raise

    def _step(self, seat: Seat, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        started = time.perf_counter()
        seat.check()
        arch = seat.architecture
        inputs = arch.bind(args, kwargs)
        if self._run_begins():
            self._start_over()
        sigma = self._sigma(arch.sigma(inputs))
        obstacle = arch.obstacle(inputs)
        if obstacle is not None:
            return self._plain_step(seat, inputs, sigma, obstacle, args, kwargs)
        z = arch.latents(inputs)
        if not self._generation.repeats(z, sigma):
            self._begin(arch, inputs, self._generation.continues(z, sigma))
            with torch.no_grad():
                self._generation.decide(z, sigma, self._policy, arch.patch_size, self._total)
        scales = self._generation.scales
        height, width = z.shape[-2:]
        if set(scales) == {1}:
            answer = self._ask(seat, range(len(z)), *args, **kwargs)
            velocity = arch.velocity(first(answer), (height, width))
            self._generation.record(velocity.detach(), time.perf_counter() - started)
            return answer
        velocity = self._mixed_step(seat, inputs, scales, (height, width))
        self._generation.record(velocity.detach(), time.perf_counter() - started)
        return arch.answer(velocity.to(z.dtype), inputs)

    @property
    def _total(self) -> int | None:
        """Number of steps of this generation, where the pipeline knows it."""
        return getattr(self._pipe, "_num_timesteps", None)

    def _forward(self, seat: Seat, scale: int, samples: Sequence[int], *, aside: bool = False) -> Callable[..., Any]:
        """The transformer's own forward for some samples of the current step; see `Cache.call`."""
        self._share = seat.cache.share
        generation = self._generation
        return seat.cache.call(
            seat.forward,
            step=len(generation.steps) - 1,
            steps=self._total,
            guidance=generation.passes,
            scale=scale,
            samples=samples,
            reused=generation.reused,
            aside=aside,
        )

    def _ask(self, seat: Seat, samples: Sequence[int], /, *args: Any, **kwargs: Any) -> Any:
        """The transformer's answer at scale 1 for some samples, to which an adapter that mends forecasts listens."""
        answer = self._forward(seat, 1, samples)(*args, **kwargs)
        if self._mender is not None:
            self._generation.heard(samples, seat.whole(self._mender.heard().detach()))
        return answer

    def _sigma(self, told: Tensor) -> float:
        """Noise level of a call: the scheduler's own where a pipeline has one, since timesteps may be rounded."""
        rounded = float(told[0])
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

    def _begin(self, arch: Architecture, inputs: Inputs, continues: bool) -> None:
        """Start over if a call does not continue the generation under way."""
        if not continues:
            self._start_over()
        if len(self._generation.examples) < len(self.config.scales):  # none, or those of a forced step
            self._generation.examples = self._examples(arch, inputs)
            self._generation.run = self._levels()
            if self._mender is not None and arch.obstacle(inputs) is None:
                self._generation.path_flops = arch.count_path(arch.latents(inputs), self._mender)
            if self.config.speedup:
                self._generation.costs, self._generation.gap = self._costs(arch)

    def _levels(self) -> list[float]:
        """Noise levels of all steps of this generation; none where nobody knows."""
        sigmas = getattr(getattr(self._pipe, "scheduler", None), "sigmas", None)
        if sigmas is None or self._total is None or len(sigmas) <= self._total:
            return []
        return [float(sigma) for sigma in sigmas[:-1][-self._total :]]  # the last one is where the run ends

    def _costs(self, arch: Architecture) -> tuple[dict[int, float], float]:
        """Scale -> work of a step after an anchor, and an adapter's for each gap, in steps at scale 1."""
        examples, asks = self._generation.examples, arch.asks(self.config, self.adapter)
        flops = {s: arch.count_flops(example, s, self.adapter) for s, example in examples.items()}
        costs = {s: n / flops[1] if s == 1 or asks else 0.0 for s, n in flops.items()}
        return costs, self._generation.path_flops / flops[1]

    def _plain_step(
        self, seat: Seat, inputs: Inputs, sigma: float, obstacle: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call that can't run with large patches: say so once, and record it."""
        started = time.perf_counter()
        tokens = inputs[seat.architecture.batched[0]]
        if not self._generation.repeats(tokens, sigma):
            self._begin(seat.architecture, inputs, self._generation.continues(tokens, sigma))
            self._generation.force(tokens, sigma)
        self._generation.forced = obstacle
        if obstacle not in self._warned:
            self._warned.add(obstacle)
            warnings.warn(f"ddit keeps every step at scale 1: {obstacle}", stacklevel=5)
        answer = self._forward(seat, 1, range(len(tokens)))(*args, **kwargs)
        self._generation.passes += 1
        self._generation.add_seconds(time.perf_counter() - started)
        return answer

    def _mixed_step(self, seat: Seat, inputs: Inputs, scales: list[int], size: tuple[int, int]) -> Tensor:
        """One call with a scale for each sample: samples of one scale run together."""
        memory = self._generation.memory()
        groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for sample, scale in enumerate(scales):
            groups[scale, scale > 1 and memory.known[sample]].append(sample)
        parts = [self._group(seat, inputs, scale, samples, memory, size) for (scale, _), samples in groups.items()]
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([sample for samples in groups.values() for sample in samples])
        return torch.cat(parts)[order.argsort()]

    def _group(
        self, seat: Seat, inputs: Inputs, scale: int, samples: list[int], memory: Memory, size: tuple[int, int]
    ) -> Tensor:
        """Velocity of samples of one scale, all with a step at scale 1 behind them or all without."""
        arch, config = seat.architecture, self.config
        rows = inputs if len(samples) == len(memory.known) else arch.rows(inputs, samples)
        if scale == 1:
            return arch.velocity(first(self._ask(seat, samples, **rows)), size).float()
        anchor = low = None
        if memory.known[samples[0]]:
            low = functools.partial(memory.line, scale, samples)
            if self._mender is None:
                anchor = memory.anchor.rows(samples)
            else:
                anchor, new = memory.mended(samples, self._mender.learn)
                self._generation.learnt(new)
            if not arch.asks(config, self.adapter):
                self._generation.skipped(samples)
            for missing, earlier in memory.unasked(scale, samples) if config.gain > 0 else ():
                there = memory.anchor.rows(missing)
                call = arch.rows(inputs, missing)
                with torch.no_grad():
                    forward = self._forward(seat, scale, missing, aside=True)
                    line = arch.low_line(forward, call, scale, config, there, earlier)
                memory.asked(scale, missing, line)
                self._generation.compared(missing)
        return arch.coarse_step(
            self._forward(seat, scale, samples),
            rows,
            scale,
            config,
            anchor=anchor,
            low=low,
            variance=self._variance.get(scale),
            adapter=self.adapter,
        )

    def _examples(self, arch: Architecture, inputs: Inputs) -> dict[int, Inputs]:
        """Inputs of one sample at every scale, without data: from these, costs are counted when asked for."""
        one = arch.rows(inputs, [0])
        if arch.obstacle(inputs) is not None:
            return {1: to_meta(one)}
        with torch.no_grad():
            coarse = {s: arch.coarse_inputs(one, s, self.config)[0] for s in self.config.scales if s > 1}
        return {s: to_meta(example) for s, example in {1: one, **coarse}.items()}
