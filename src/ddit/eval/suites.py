"""The suites of ``ddit evaluate``: run, print a table, write JSON, Markdown and a picture."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ddit.adapter import PatchAdapter
from ddit.caches import make_cache, suits
from ddit.embedded.scenes import Split
from ddit.eval import compare, paper, proxy, quality
from ddit.eval.drawings import Drawings, draw
from ddit.eval.grid import fewest_and_most, save_grid
from ddit.eval.parts import Parts, digest
from ddit.eval.prices import Prices
from ddit.eval.subjects import Clips, Own, Pictures, Subject
from ddit.models import architecture_for
from ddit.pipelines.generate import Method, call_settings, check_call, draws_video, run_steps
from ddit.pipelines.loading import load_adapter, load_pipeline
from ddit.pipelines.methods import make_method
from ddit.pipelines.sounds import refuse_sound
from ddit.preset import Preset
from ddit.pretrained import config_hash
from ddit.util.files import ended, write_json, write_text

DEFAULT_METHODS = (
    "plain",
    "plain:run_steps=25",
    "plain:run_steps=16",
    "plain:run_steps=10",
    "ddit",
    "ddit:speedup=3,patches=full",
    "ddit:speedup=3",
)


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """What to run; see ``ddit evaluate --help``."""

    model: str
    prompts: int
    batch: int
    out: Path
    """Stem of the files to write."""
    methods: tuple[str, ...] = ()
    adapter: str | None = None
    """Folder or hub id of the adapter that methods use unless they say ``adapter=none``."""
    split: Split = "judge"
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's call that override the model's own."""
    device: str = "cpu"
    dtype: str = "float32"
    preset: Path | None = None
    """Folder with a preset to use instead of the model's own."""
    run_steps: tuple[int, ...] = ()
    """Of the comparison: numbers of steps at which the methods run, the first one also for plain."""
    texts: tuple[str, ...] = ()
    """Prompts of the user's own in place of the model's grammar; but for the paper's suite only likeness is judged."""
    costs: str | None = None
    """Name of a model (`ddit.pipelines.known.names`) at whose costs work is planned and told, not at its own."""
    judges: tuple[str, ...] = ()
    """Of the paper's suite, as the next two; see `ddit.eval.paper.jury`."""
    weights: dict[str, str] = field(default_factory=dict)
    reference: Path | None = None


def run_suite(suite: str, config: SuiteConfig, about: dict[str, Any]) -> dict[str, Any]:
    """Run a suite; ``about`` (command, versions, hardware) goes into its JSON file."""
    suites = {
        "quality": _quality,
        "compare": _compare,
        "proxy": _proxy,
        "paper": _paper,
    }
    figures = suites[suite](config)
    return _write(config, {**about, "suite": suite, **figures})


def _write(config: SuiteConfig, result: dict[str, Any]) -> dict[str, Any]:
    """The suite's JSON file; what the suite kept to continue from goes once that is there."""
    write_json(ended(config.out, ".json"), result)
    shutil.rmtree(_parts_folder(config), ignore_errors=True)
    return result


def _parts_folder(config: SuiteConfig) -> Path:
    return ended(config.out, ".parts")


def _quality(config: SuiteConfig) -> dict[str, Any]:
    drawn = _race(config, *_load(config))
    save_grid(ended(config.out, ".png"), drawn.methods, drawn.results, drawn.first(8))
    for method, result in zip(drawn.methods, drawn.results, strict=True):
        skip = method.method.skip if method.method is not None else None
        if skip is not None and skip.quality is not None:
            path = ended(config.out, f"-{skip.quality:g}dB.png")
            extremes = fewest_and_most(result, drawn.asked)
            save_grid(path, [drawn.methods[0], method], [drawn.results[0], result], extremes)
    return drawn.figures


@dataclass(frozen=True)
class Drawn:
    """What all methods made of all prompts."""

    figures: dict[str, Any]
    asked: Sequence[Any]
    methods: Sequence[quality.Entry]
    results: Sequence[quality.Results]

    def first(self, count: int) -> dict[int, str]:
        """The first prompts, without titles, for `ddit.eval.grid.save_grid`."""
        return dict.fromkeys(range(min(count, len(self.asked))), "")


def _race(config: SuiteConfig, pipe: Any, preset: Preset) -> Drawn:
    """All methods on all prompts; the table of their figures is written and printed."""
    settings = call_settings(preset, **config.settings)
    steps = run_steps(pipe, settings)
    settings.pop("num_inference_steps", None)
    make = _method_maker(config, preset)
    methods = [quality.parse_entry(text, steps, make) for text in config.methods or DEFAULT_METHODS]
    subject = _subject(config, pipe)
    _check_size(subject, settings)
    asked = subject.prompts(config.split, config.prompts, config.seed)
    parts = Parts(_parts_folder(config), _identity(config, pipe, methods, settings))
    results = quality.draw_all(
        pipe,
        methods,
        asked,
        settings,
        batch=config.batch,
        seed=config.seed,
        parts=parts,
        costs=_costs(config, methods),
    )
    rows = quality.summarise(methods, results, asked, subject, config.split)
    _show(config, quality.markdown(rows, len(asked), config.costs))
    figures = {
        "prompts": len(asked),
        "split": "own" if config.texts else config.split,
        "batch": config.batch,
        "seed": config.seed,
        "costs": {"model": config.costs, "scales": preset.costs} if config.costs else None,
        "methods": rows,
    }
    return Drawn(figures, asked, methods, results)


def _compare(config: SuiteConfig) -> dict[str, Any]:
    """The quality suite over all that a user could pick; see `ddit.eval.compare`."""
    pipe, preset = _load(config)
    if not config.methods:
        steps = config.run_steps or (run_steps(pipe, call_settings(preset, **config.settings)),)
        planned = preset.profile is not None
        adapter = config.adapter or preset.adapter or None
        architecture = architecture_for(pipe.transformer)

        def suiting(name: str) -> bool:
            return suits(architecture, make_cache(name, preset.teacache))

        methods = compare.methods(steps, suits=suiting, adapter=adapter, planned=planned)
        config = replace(config, methods=tuple(methods), adapter=None)
        config = replace(config, settings={**config.settings, "num_inference_steps": steps[0]})
    drawn = _race(config, pipe, preset)
    rows = drawn.figures["methods"]
    by = "speedup" if config.costs is None else "times_less_work"
    table = compare.markdown(rows, by)
    with ended(config.out, ".md").open("a") as file:
        file.write("\n" + table)
    compare.plot(config.out, rows, by)
    print(table)
    measures = compare.measures(rows)
    best = {m: {f"{k:g}": [r["method"] for r in v] for k, v in compare.winners(rows, m, by).items()} for m in measures}
    places = {row["method"]: i for i, row in enumerate(rows)}
    for speed, names in best[measures[0]].items():
        shown = [0, *(places[name] for name in names)]
        path = ended(config.out, f"-{speed}x.png")
        save_grid(path, [drawn.methods[i] for i in shown], [drawn.results[i] for i in shown], drawn.first(6))
    return {**drawn.figures, "best_at_least_as_fast": best}


def _proxy(config: SuiteConfig) -> dict[str, Any]:
    """The proxy card of a model that a grammar of the project judges; see `ddit.eval.proxy`."""
    if config.texts or config.methods or config.adapter or "num_inference_steps" in config.settings:
        raise ValueError(
            "the proxy card has methods, steps and prompts of its own, and no adapter; "
            "leave --methods, --steps, --prompt-file and --adapter out"
        )
    pipe, preset = _load(config)
    architecture = architecture_for(pipe.transformer)
    known = suits(architecture, make_cache("teacache:0.1", preset.teacache))
    settings = {**config.settings, "num_inference_steps": proxy.STEPS}
    config = replace(config, methods=tuple(proxy.entries(teacache=known)), adapter=None, settings=settings)
    drawn = _race(config, pipe, preset)
    card = proxy.card(drawn.figures["methods"], architecture, video=draws_video(pipe))
    table = proxy.markdown(card)
    write_text(ended(config.out, ".md"), table + "\n" + ended(config.out, ".md").read_text())
    print(table)
    return {**drawn.figures, "card": proxy.to_dicts(card)}


def _paper(config: SuiteConfig) -> dict[str, Any]:
    """The paper's table on prompts of the field; see `ddit.eval.paper`. Pictures and scores stay in a folder."""
    folder = ended(config.out, ".pictures")
    jury = paper.jury(config.judges, config.weights, config.reference, device=config.device, kept=folder)
    pipe, preset = _load(config)
    jury.check(len(config.texts), video=draws_video(pipe))
    settings = call_settings(preset, **config.settings)
    make = _method_maker(config, preset)
    steps = settings.pop("num_inference_steps", None) or run_steps(pipe, {})
    methods = [quality.parse_entry(text, steps, make) for text in dict.fromkeys(config.methods or paper.METHODS)]
    known = _identity(config, pipe, methods, settings)
    same = ("model", "scheduler", "versions", "seed", "dtype", "batch", "settings")
    shared = {name: known[name] for name in same}
    drawings = [
        Drawings(folder, entry.name, {**shared, "method": repr(own)}, config.texts)
        for entry, own in zip(methods, known["methods"], strict=True)
    ]
    costs = _costs(config, methods)
    draw(pipe, methods, drawings, settings, batch=config.batch, seed=config.seed, costs=costs)
    del pipe  # judges get its place
    if config.device.startswith("cuda"):
        torch.cuda.empty_cache()
    paper.judge(jury, drawings, config.batch, config.device)
    said = [paper.collect(jury, drawn, drawings[0]) for drawn in drawings]
    rows = paper.summarise(methods, drawings, said, jury.fid)
    sources = {j.name: config.weights.get(j.name, j.weights) for j in jury.judges if j.weights}
    _show(config, paper.markdown(rows, len(config.texts), sources, config.costs))
    paper.write_each(ended(config.out, ".jsonl"), methods, drawings, said)
    return {
        "prompts": len(config.texts),
        "batch": config.batch,
        "seed": config.seed,
        "settings": settings,
        "judges": sources,
        "reference": config.reference and str(config.reference),
        "methods": rows,
    }


def _load(config: SuiteConfig) -> tuple[Any, Preset]:
    pipe, preset = load_pipeline(config.model, dtype=config.dtype, device=config.device, preset=config.preset)
    refuse_sound(pipe)
    check_call(pipe, call_settings(preset, **config.settings))
    return pipe, preset if config.costs is None else replace(preset, costs=Prices(config.costs).ratios)


def _show(config: SuiteConfig, table: str) -> None:
    """Write a suite's table, and print it."""
    write_text(ended(config.out, ".md"), table)
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
    frames = settings.get("num_frames")
    if subject.frames is not None and frames is not None and frames != subject.frames:
        raise ValueError(
            f"frames is {frames}; clips of the project's own prompts are judged at {subject.frames} alone: leave "
            "--frames out, or give prompts of your own with --prompt-file"
        )


def subject_of(pipe: Any) -> Subject:
    """What a pipeline draws."""
    return Clips() if draws_video(pipe) else Pictures()


def _costs(config: SuiteConfig, methods: Sequence[quality.Entry]) -> Prices | None:
    """At which work is told, for all patch sizes of these methods."""
    if config.costs is None:
        return None
    used = {s for entry in methods if entry.method is not None for s in getattr(entry.method.patches, "scales", ())}
    return Prices(config.costs, tuple(sorted({1, 2, 4, *used})))


def _identity(
    config: SuiteConfig, pipe: Any, methods: Sequence[quality.Entry], settings: dict[str, Any]
) -> dict[str, Any]:
    """All that the pictures of a suite and its times depend on."""
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    adapters = [None if m.method is None else m.method.adapter for m in methods]
    learnt = [None if adapter is None else digest(adapter) for adapter in adapters]
    return {
        **{k: str(v) for k, v in asdict(config).items() if k not in ("methods", "out")},
        "settings": settings,
        "model": [digest(m) for m in modules],
        "scheduler": [type(pipe.scheduler).__name__, config_hash(pipe.scheduler)],
        "versions": {name: version(name) for name in ("ddit", "diffusers", "torch")},
        "methods": [
            (m.name, m.run_steps, m.method and repr(replace(m.method, adapter=None)), own)
            for m, own in zip(methods, learnt, strict=True)
        ],
    }


def _method_maker(config: SuiteConfig, preset: Preset) -> quality.MakeMethod:
    """Loads each adapter once; a method that names none has the command line's or the preset's, ``none`` is none."""

    @cache
    def adapter(name: str) -> PatchAdapter:
        return load_adapter(name, dtype=config.dtype, device=config.device)

    def make(values: dict[str, Any]) -> Method:
        return make_method(values, preset, load_adapter=adapter, adapter=config.adapter)

    return make
