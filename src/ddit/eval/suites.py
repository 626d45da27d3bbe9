"""The suites of ``ddit evaluate``: run, print a table, write JSON, Markdown and a picture."""

from __future__ import annotations

import hashlib
import inspect
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ddit.adapter import PatchAdapter
from ddit.embedded.scenes import Split
from ddit.eval import compare, invariance, quality, steps, switch
from ddit.eval.grid import fewest_and_most, save_grid
from ddit.eval.parts import Parts
from ddit.eval.subjects import Clips, Own, Pictures, Subject
from ddit.files import write_json
from ddit.generate import call_settings, check_call, draws_video, load_adapter, load_pipeline
from ddit.models import architecture_for
from ddit.preset import Preset

DEFAULT_METHODS = (
    "plain",
    "plain:run_steps=25",
    "plain:run_steps=16",
    "plain:run_steps=10",
    "dynamic",
    "first:fraction=0.5,scales=1/2",
    "first:fraction=0.7,scales=1/2",
)


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """What to run; see ``ddit evaluate --help``."""

    model: str
    methods: tuple[str, ...]
    prompts: int
    adapter: str | None
    """Folder or hub id of the adapter that methods use unless they say ``adapter=none``."""
    split: Split
    batch: int
    seed: int
    settings: dict[str, Any]
    """Arguments of the pipeline's call that override the model's own."""
    device: str
    dtype: str
    out: Path
    """Stem of the files to write."""
    preset: Path | None = None
    """Folder with a preset to use instead of the model's own."""
    run_steps: tuple[int, ...] = ()
    """Of the comparison: numbers of steps at which the methods run, the first one also for plain."""
    texts: tuple[str, ...] = ()
    """Prompts of the user's own in place of the model's grammar; then only likeness to plain is judged."""


def run_suite(suite: str, config: SuiteConfig, about: dict[str, Any]) -> dict[str, Any]:
    """Run a suite; ``about`` (command, versions, hardware) goes into its JSON file."""
    suites = {
        "quality": _quality,
        "velocity": _velocity,
        "caches": _caches,
        "invariance": _invariance,
        "compare": _compare,
    }
    figures = suites[suite](config)
    return _write(config, {**about, "suite": suite, **figures})


def choose_threshold(
    config: SuiteConfig, thresholds: Sequence[float], margin: float, about: dict[str, Any]
) -> dict[str, Any]:
    """The threshold that saves the most work among those that cost at most ``margin`` of adherence, and no likeness.

    The latter is the Fréchet distance to drawings, which must not lie above plain's.

    Prompts are of the ``tune`` split, whatever ``config`` says, so that the choice can be judged on others. The
    result is the quality suite's, with ``chosen``, which is 0 (always scale 1) where every threshold costs more.

    Args:
        config: As for `run_suite`; methods are replaced.
        thresholds: The candidates.
        margin: Largest fall of adherence on average over the prompts, as a fraction: 0.01 is one point.
        about: Goes into the JSON file.
    """
    names = {f"dynamic:threshold={t:g}": t for t in thresholds}
    config = replace(config, split="tune", methods=("plain", *names))
    figures = _quality(config)
    good = [
        row
        for row in figures["methods"][1:]
        if row["adherence_change"] >= -margin and row["frechet"] <= figures["methods"][0]["frechet"]
    ]
    best = min(good, key=lambda row: row["flops_fraction"], default=None)
    chosen = 0.0 if best is None else names[best["method"]]
    return _write(config, {**about, "suite": "quality", "margin": margin, **figures, "chosen": chosen})


def _write(config: SuiteConfig, result: dict[str, Any]) -> dict[str, Any]:
    """The suite's JSON file; what the suite kept to continue from goes once that is there."""
    write_json(config.out.with_suffix(".json"), result)
    shutil.rmtree(_parts_folder(config), ignore_errors=True)
    return result


def _parts_folder(config: SuiteConfig) -> Path:
    return config.out.with_suffix(".parts")


def _quality(config: SuiteConfig) -> dict[str, Any]:
    drawn = _race(config, *_load(config))
    save_grid(config.out.with_suffix(".png"), drawn.methods, drawn.results, drawn.first(8))
    for method, result in zip(drawn.methods, drawn.results, strict=True):
        if method.config is not None and method.config.quality:
            path = config.out.with_name(f"{config.out.name}-{method.config.quality:g}dB.png")
            extremes = fewest_and_most(result, drawn.asked)
            save_grid(path, [drawn.methods[0], method], [drawn.results[0], result], extremes)
    return drawn.figures


@dataclass(frozen=True)
class Drawn:
    """What all methods made of all prompts."""

    figures: dict[str, Any]
    asked: Sequence[Any]
    methods: Sequence[quality.Method]
    results: Sequence[quality.Results]

    def first(self, count: int) -> dict[int, str]:
        """The first prompts, without titles, for `ddit.eval.grid.save_grid`."""
        return dict.fromkeys(range(min(count, len(self.asked))), "")


def _race(config: SuiteConfig, pipe: Any, preset: Preset) -> Drawn:
    """All methods on all prompts; the table of their figures is written and printed."""
    settings = call_settings(preset, **config.settings)
    run_steps = _steps(settings, pipe)
    settings.pop("num_inference_steps", None)
    adapters = _adapter_loader(config)
    methods = [quality.parse_method(text, run_steps, preset, adapters) for text in config.methods or DEFAULT_METHODS]
    subject = _subject(config, pipe)
    _check_size(subject, settings)
    asked = subject.prompts(config.split, config.prompts, config.seed)
    if any(method.fitted for method in methods):
        others = _others(config, subject)
        methods = [quality.fit(method, pipe, others, settings) for method in methods]
    parts = Parts(_parts_folder(config), _identity(config, pipe, methods))
    results = quality.draw_all(
        pipe, preset, methods, asked, settings, batch=config.batch, seed=config.seed, parts=parts
    )
    rows = quality.summarise(methods, results, asked, subject, config.split)
    _show(config, quality.markdown(rows, len(asked)))
    figures = {
        "prompts": len(asked),
        "split": "own" if config.texts else config.split,
        "batch": config.batch,
        "seed": config.seed,
        "methods": rows,
    }
    return Drawn(figures, asked, methods, results)


def _others(config: SuiteConfig, subject: Subject) -> list[str]:
    """Prompts that the suite does not judge, to fit something on."""
    if config.texts or config.split == "tune":
        raise ValueError(
            "a fitted schedule needs other prompts than it is judged on: leave --prompt-file and --split out"
        )
    return [scene.prompt for scene in subject.prompts("tune", 16, config.seed)]


def _compare(config: SuiteConfig) -> dict[str, Any]:
    """The quality suite over all that a user could pick; see `ddit.eval.compare`."""
    pipe, preset = _load(config)
    if not config.methods:
        steps = config.run_steps or (_steps(call_settings(preset, **config.settings), pipe),)
        known = bool(preset.teacache) or architecture_for(pipe.transformer).teacache_coefficients() is not None
        methods = compare.methods(steps, video=draws_video(pipe), teacache=known, adapter=config.adapter)
        config = replace(config, methods=tuple(methods), adapter=None)
        config = replace(config, settings={**config.settings, "num_inference_steps": steps[0]})
    drawn = _race(config, pipe, preset)
    rows = drawn.figures["methods"]
    table = compare.markdown(rows)
    with config.out.with_suffix(".md").open("a") as file:
        file.write("\n" + table)
    compare.plot(config.out, rows)
    print(table)
    measures = compare.measures(rows)
    best = {m: {f"{k:g}": [r["method"] for r in v] for k, v in compare.winners(rows, m).items()} for m in measures}
    places = {row["method"]: i for i, row in enumerate(rows)}
    for speed, names in best[measures[0]].items():
        shown = [0, *(places[name] for name in names)]
        path = config.out.with_name(f"{config.out.name}-{speed}x.png")
        save_grid(path, [drawn.methods[i] for i in shown], [drawn.results[i] for i in shown], drawn.first(6))
    return {**drawn.figures, "best_at_least_as_fast": best}


def _steps(settings: dict[str, Any], pipe: Any) -> int:
    """Number of steps that a call takes: the pipeline's own, for a model without a preset."""
    own = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    return settings.get("num_inference_steps", own)


def _load(config: SuiteConfig) -> tuple[Any, Preset]:
    pipe, preset = load_pipeline(config.model, dtype=config.dtype, device=config.device, preset=config.preset)
    check_call(pipe, call_settings(preset, **config.settings))
    return pipe, preset


def _show(config: SuiteConfig, table: str) -> None:
    """Write a suite's table, and print it."""
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.with_suffix(".md").write_text(table)
    print(table)


def _subject(config: SuiteConfig, pipe: Any) -> Subject:
    return Own(config.texts) if config.texts else subject_of(pipe)


def _check_size(subject: Subject, settings: dict[str, Any]) -> None:
    """Refuse pictures that the subject can't judge, before they are drawn."""
    size = settings.get("height"), settings.get("width")
    if subject.size is not None and subject.size != size:
        asked = "x".join("the model's own" if side is None else str(side) for side in size)
        raise ValueError(
            f"size is {asked}; pictures of the project's own prompts are judged at "
            f"{subject.size[0]}x{subject.size[1]} alone: leave --height and --width out, or give prompts of your own "
            "with --prompt-file"
        )


def subject_of(pipe: Any) -> Subject:
    """What a pipeline draws."""
    return Clips() if draws_video(pipe) else Pictures()


def _identity(config: SuiteConfig, pipe: Any, methods: Sequence[quality.Method]) -> dict[str, Any]:
    """All that the pictures of a suite depend on."""
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    learnt = [None if m.adapter is None else _digest(m.adapter) for m in methods]
    return {
        **{k: str(v) for k, v in asdict(config).items() if k not in ("methods", "out")},
        "model": [_digest(m) for m in modules],
        "methods": [
            (m.name, m.run_steps, repr(m.config), repr(m.cache), a) for m, a in zip(methods, learnt, strict=True)
        ],
    }


def _digest(module: torch.nn.Module) -> str:
    """Of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _adapter_loader(config: SuiteConfig) -> quality.Adapters:
    """Loads each adapter once; ``None`` is the one of the command line, ``"none"`` is none."""

    @cache
    def load(name: str) -> PatchAdapter:
        return load_adapter(name, dtype=config.dtype, device=config.device)

    def choose(name: str | None) -> PatchAdapter | None:
        name = name or config.adapter
        return None if name in (None, "none") else load(name)

    return choose


def _velocity(config: SuiteConfig) -> dict[str, Any]:
    pipe, preset = _load(config)
    asked = _subject(config, pipe).prompts(config.split, config.prompts, config.seed)
    settings = call_settings(preset, **config.settings)
    adapter = _adapter_loader(config)(None)
    rows = steps.velocity_errors(pipe, preset, [s.prompt for s in asked], settings, adapter=adapter)
    table = steps.velocity_table(rows)
    _show(config, table)
    return {"prompts": len(asked), "split": config.split, "rows": rows}


def _caches(config: SuiteConfig) -> dict[str, Any]:
    pipe, preset = _load(config)
    prompt = _subject(config, pipe).prompts(config.split, 1, config.seed)[0].prompt
    rows = switch.at_changes_of_scale(pipe, prompt, call_settings(preset, **config.settings))
    _show(config, switch.table(rows))
    return {"schedule": switch.SCHEDULE, "rows": rows}


def _invariance(config: SuiteConfig) -> dict[str, Any]:
    pipe, preset = _load(config)
    asked = _subject(config, pipe).prompts(config.split, config.prompts, config.seed)
    settings = call_settings(preset, **config.settings)
    if "height" not in settings or "width" not in settings:
        raise ValueError("the model's preset names no size; give --height and --width")
    prompts, adapter = [s.prompt for s in asked], _adapter_loader(config)(None)
    rows = invariance.speedups_held(pipe, preset, prompts, settings, adapter)
    _show(config, invariance.table(rows))
    return {"prompts": len(asked), "split": config.split, "rows": rows}
