"""What an adapter is distilled on: runs of the base, and what the base says at each of their steps.

Plain runs, or noised pictures of the user's: the latents of every step, and what the base answered there, so that
training asks no teacher. Sharded safetensors, resumable.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ddit.models import architecture_for
from ddit.models.base import Inputs
from ddit.pipelines.generate import call_settings, check_call, recorded
from ddit.preset import Preset, for_batch
from ddit.pretrained import config_hash, fingerprint
from ddit.train.arguments import arguments, is_list_of_tensors, optional_masks, padded
from ddit.train.config import TrainConfig
from ddit.train.pictures import noised
from ddit.train.sources import Source
from ddit.util.files import replacing, write_json
from ddit.util.progress import progress

CONDITIONS = ("image", "images", "image_reference", "control_image", "mask_image", "video")
"""Arguments of pipelines that may start from pictures or clips, of which a run has none."""

MANIFEST = "samples.json"
VERSION = 6
"""Of the files."""


@dataclass(frozen=True)
class Samples:
    """Runs of a base model, and how its transformer was called for them.

    One record is one guidance pass of one run: with true CFG a prompt gives two.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def sigmas(self) -> list[float]:
        """Noise levels that the sampler visited, falling."""
        return self.manifest["sigmas"]

    @property
    def passes(self) -> int:
        return self.manifest["passes"]

    @property
    def prompts(self) -> list[str]:
        """One for each run."""
        return self.manifest["prompts"]

    def __len__(self) -> int:
        return len(self.prompts) * self.passes

    def clean(self, index: int) -> Tensor:
        """Where a record's run ended, ``[1, C, ..., H, W]``."""
        shard, row = divmod(index // self.passes, self.manifest["shard"])
        return self._read(shard, lambda file: file.get_slice("clean")[row : row + 1])

    def load(self, indices: Sequence[int], steps: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Inputs]:
        """Chosen steps of some records, as many of each.

        Returns:
            Noisy latents and the base's velocity ``[B, steps, C, ..., H, W]``, and the arguments of the transformer's
            last call.

        Raises:
            ValueError: When a file is missing or cut short.
        """
        parts: dict[str, list[Tensor]] = {}
        lists: dict[str, list[Tensor]] = {}
        call: Inputs = {}

        def read(file: Any, row: int, which: int, chosen: Sequence[int]) -> None:
            for key in file.keys():  # noqa: SIM118 (no iterator of its own)
                kind, _, name = key.partition("/")
                if kind in ("latents", f"velocity{which}"):
                    found = file.get_slice(key)
                    value = torch.stack([found[row : row + 1, i] for i in chosen], dim=1)
                    parts.setdefault(kind.rstrip("0123456789"), []).append(value)
                elif kind == f"row{which}":
                    parts.setdefault(f"row/{name}", []).append(file.get_slice(key)[row : row + 1])
                elif kind == f"list{which}":
                    padded = file.get_slice(key)[row]
                    lists.setdefault(name, []).append(padded[~padded.isnan().all(1)])
                elif kind == "shared":
                    call[name] = file.get_tensor(key)

        for index, chosen in zip(indices, steps, strict=True):
            sample, which = divmod(index, self.passes)
            shard, row = divmod(sample, self.manifest["shard"])
            self._read(shard, partial(read, row=row, which=which, chosen=chosen))
        joined = padded(parts)
        latents, velocity = joined.pop("latents"), joined.pop("velocity")
        own = {name.removeprefix("row/"): value for name, value in joined.items()}
        for name in self.manifest.get("optional_masks", ()):
            if name in own and own[name].all():
                del own[name]  # as the pipeline does where nothing is padded
        return latents, velocity, {**self.manifest.get("call", {}), **call, **own, **lists}

    def _read(self, shard: int, take: Callable[[Any], Any]) -> Any:
        path = shard_path(self.folder, shard)
        try:
            with safe_open(path, framework="pt") as file:
                return take(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} can't be read ({error}); delete it and run the same command to draw its samples again"
            ) from error


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"samples-{number:05d}.safetensors"


def draw_samples(
    folder: Path,
    pipe: Any,
    settings: dict[str, Any],
    prompts: list[str],
    *,
    batch: int,
    seed: int,
    pictures: Sequence[Path] = (),
    rank: int = 0,
    processes: int = 1,
    wait: Any = lambda: None,
) -> Samples:
    """Draw what is not there yet; several processes take files by turns.

    Args:
        settings: Arguments of the pipeline's call.
        batch: Samples drawn at once and kept in a file; files that are there keep their size.
        pictures: One for each prompt, to be noised; none for the base's own runs, or where nothing is missing.
        wait: Returns when all processes have called it.

    Raises:
        ValueError: When the folder holds samples of another model, other prompts, pictures or settings, or the sampler
            calls the model several times in a step.
    """
    check_sampler(pipe.scheduler)
    path = folder / MANIFEST
    asked: dict[str, Any] = {"settings": settings, "seed": seed, "prompts": prompts, "version": VERSION}
    for name, part in (("base", pipe.transformer), ("sampler", pipe.scheduler)):
        asked |= {name: type(part).__name__, f"{name}_hash": config_hash(part)}
    asked["base_weights"] = fingerprint(pipe.transformer)
    if pictures:
        asked["pictures"] = [file.name for file in pictures]
    begun = json.loads(path.read_text()) if path.exists() else {**asked, "shard": batch}
    wrong = [k for k, v in asked.items() if begun.get(k) != v]
    if wrong:
        raise ValueError(
            f"{folder} holds samples with other {', '.join(wrong)}; name another folder, or delete this one"
        )
    shard = begun["shard"]
    missing = [n for n in range(-(-len(prompts) // shard)) if not shard_path(folder, n).exists()]
    if missing and "pictures" in begun and not pictures:
        raise ValueError(
            f"{folder} holds samples of pictures, and {len(missing)} of its files are missing; "
            "name the folder of the pictures (--images), to make them again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    mine = [n for n in missing if n % processes == rank]
    parts = {n: range(n * shard, min((n + 1) * shard, len(prompts))) for n in mine}
    total = sum(-(-len(part) // batch) for part in parts.values())
    runs = _Runs(pipe, settings, batch)
    with progress("samples", total, hidden=rank > 0) as advance:
        for number, part in parts.items():
            seeds = [_seed(seed, i) for i in part]
            shown = [pictures[i] for i in part] if pictures else []
            tensors, facts = runs.draw([prompts[i] for i in part], seeds, shown, advance)
            if not path.exists() and rank == 0:
                write_json(path, {**begun, **facts})
            _save_shard(tensors, shard_path(folder, number))
    wait()
    return Samples(folder, json.loads(path.read_text()))


def check_sampler(scheduler: Any) -> None:
    """Refuse a sampler whose steps hold several calls of the model: its noise levels can't be told from the calls."""
    calls = getattr(scheduler, "order", 1)
    if calls > 1:
        raise ValueError(
            f"{type(scheduler).__name__} calls the model {calls} times in a step, and samples hold one call of each; "
            "save the pipeline with another sampler, such as FlowMatchEulerDiscreteScheduler"
        )


def samples_of(config: TrainConfig, accelerator: Accelerator, pipe: Any, preset: Preset, source: Source) -> Samples:
    """The samples of a run, drawn where they are missing, each process its share."""
    size = {"height": config.height, "width": config.width}
    settings = call_settings(
        preset, **{"num_inference_steps": config.sample_steps, **size, "num_frames": config.frames, **config.call}
    )
    check_call(pipe, settings)
    return draw_samples(
        config.samples_folder,
        pipe,
        settings,
        source.prompts,
        batch=config.sample_batch,
        seed=config.seed,
        pictures=source.pictures,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
    )


@dataclass(frozen=True)
class _Runs:
    """How runs are drawn."""

    pipe: Any
    settings: dict[str, Any]
    batch: int

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], pictures: Sequence[Path], advance: Callable[[], Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of one file, and the facts that all files share."""
        parts: dict[str, list[Tensor]] = {}
        lists: dict[str, list[Tensor]] = {}
        shared: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        for begin in range(0, len(prompts), self.batch):
            chosen = slice(begin, begin + self.batch)
            rows, others, facts = self._draw_batch(prompts[chosen], seeds[chosen], pictures[chosen])
            for name, value in rows.items():
                if isinstance(value, Tensor):
                    parts.setdefault(name, []).append(value.cpu())
                else:
                    lists.setdefault(name, []).extend(x.cpu() for x in value)
            shared.update({name: value.cpu() for name, value in others.items()})
            advance()
        # Of lists NaN lies behind what is shorter.
        ragged = {k: pad_sequence(v, batch_first=True, padding_value=torch.nan) for k, v in lists.items()}
        tensors = {**padded(parts), **ragged, **shared}
        return {name: t.contiguous() for name, t in tensors.items()}, facts

    def _draw_batch(
        self, prompts: Sequence[str], seeds: Sequence[int], pictures: Sequence[Path]
    ) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
        """Tensors with an axis of samples or lists with one of each, tensors without, and facts."""
        pipe = self.pipe
        architecture = architecture_for(pipe.transformer)
        optional = optional_masks(pipe.transformer, architecture.batched)
        with recorded(pipe) as calls, noised(pipe, calls, pictures) if pictures else nullcontext():
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            call = for_batch(pipe, self.settings, len(seeds))
            try:
                drawn = pipe(prompt=list(prompts), generator=generators, output_type="latent", **call)[0]
            except (AttributeError, TypeError, ValueError) as error:
                taken = [name for name in inspect.signature(type(pipe).__call__).parameters if name in CONDITIONS]
                if calls or not taken:
                    raise
                raise ValueError(
                    f"{error} ({type(pipe).__name__} was called with prompts alone. If it can't do without "
                    f"{', '.join(taken)}, train on the text pipeline of the same transformer)"
                ) from error
        levels = [float(architecture.sigma(inputs)[0]) for inputs, _ in calls]
        sigmas = sorted(set(levels), reverse=True)
        passes = len(calls) // len(sigmas)
        noisy = architecture.batched[0]
        final = calls[-1][0]
        clean = architecture.read({**final, noisy: drawn}).latents
        rows: dict[str, Any] = {"clean": clean}
        shared: dict[str, Tensor] = {}
        latents = [architecture.read(inputs).latents[: len(clean)] for inputs, _ in calls[::passes]]
        rows["latents"] = torch.stack(latents, dim=1)
        records = 0
        for which in range(passes):
            answers = [architecture.velocity(answer, clean.shape[2:]) for _, answer in calls[which::passes]]
            # Where guidance is stacked in one call, each of its copies of the batch is a record.
            for samples in torch.arange(len(answers[0])).split(len(clean)):
                rows[f"velocity{records}"] = torch.stack([answer[samples] for answer in answers], dim=1)
                # Of the last step, latents and noise level too: conditions may sit in them (image to video).
                inputs = calls[which - passes][0]
                own = inputs if len(samples) == len(answers[0]) else architecture.rows(inputs, samples.tolist())
                found, others = arguments(own, records, architecture.batched, optional)
                rows |= found
                shared |= others
                records += 1
        plain = {k: v for k, v in final.items() if k != "return_dict" and not is_list_of_tensors(v)}
        told = {k: v for k, v in plain.items() if isinstance(v, bool | int | float | list | tuple)}
        facts = {"sigmas": sigmas, "passes": records, "call": told, "optional_masks": optional}
        return rows, shared, facts


def _save_shard(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        with replacing(path) as target:
            save_file(tensors, target)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} can't be written ({error}); the samples before it are kept. "
            "Free some space and run the same command"
        ) from error


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:6], "big")
