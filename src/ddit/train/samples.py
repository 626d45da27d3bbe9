"""The base model's own samples on disk: what an adapter is distilled on. Sharded safetensors, resumable, shareable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddit.adapter import config_hash
from ddit.files import replacing, write_json
from ddit.generate import recorded
from ddit.models import architecture_for
from ddit.models.base import Inputs
from ddit.preset import for_batch
from ddit.progress import progress

MANIFEST = "samples.json"


@dataclass(frozen=True)
class Samples:
    """Clean latents of a base model, and how its transformer was called for them.

    One record is one guidance pass of one sample: with true CFG a prompt gives two.
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

    def __len__(self) -> int:
        return len(self.manifest["prompts"]) * self.passes

    def prompt(self, index: int) -> str:
        return self.manifest["prompts"][index // self.passes]

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Inputs]:
        """Clean latents ``[B, C, ..., H, W]`` and the tensors of the transformer's call but for the latents.

        Raises:
            ValueError: When a file is missing or cut short.
        """
        clean: list[Tensor] = []
        rows: dict[str, list[Tensor]] = {}
        call: Inputs = {}
        for index in indices:
            sample, which = divmod(index, self.passes)
            shard, row = divmod(sample, self.manifest["shard"])
            path = shard_path(self.folder, shard)
            try:
                with safe_open(path, framework="pt") as file:
                    clean.append(file.get_slice("clean")[row : row + 1])
                    for key in file.keys():  # noqa: SIM118 (no iterator of its own)
                        kind, _, name = key.partition("/")
                        if kind == f"row{which}":
                            rows.setdefault(name, []).append(file.get_slice(key)[row : row + 1])
                        elif kind == "shared":
                            call[name] = file.get_tensor(key)
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path} can't be read ({error}); delete it and run the same command to draw its samples again"
                ) from error
        call.update({name: torch.cat(parts) for name, parts in rows.items()})
        return torch.cat(clean), call


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"samples-{number:05d}.safetensors"


def read_prompts(source: str, count: int | None = None) -> list[str]:
    """Prompts from a text file, one per line, or from ``dataset:NAME:COLUMN``.

    Raises:
        ValueError: When there are none, or fewer than ``count``.
    """
    if source.startswith("dataset:"):
        _, name, column = [*source.split(":"), ""][:3]
        try:
            from datasets import load_dataset  # type: ignore[import-not-found]
        except ModuleNotFoundError:
            raise ValueError("prompts from a dataset need the package datasets: pip install datasets") from None
        prompts = [str(text) for text in load_dataset(name, split="train")[column]]
    else:
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"there is no file {source!r} with prompts; write one prompt per line")
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [text for text in prompts if text][:count]
    if not prompts or (count and len(prompts) < count):
        raise ValueError(f"{source} holds {len(prompts)} prompts, {count or 'at least 1'} were asked for")
    return prompts


def draw_samples(
    folder: Path,
    pipe: Any,
    settings: dict[str, Any],
    prompts: list[str] | None,
    *,
    batch: int,
    shard: int,
    seed: int,
    rank: int = 0,
    processes: int = 1,
    wait: Any = lambda: None,
) -> Samples:
    """Draw what is not there yet; several processes take shards by turns.

    Args:
        settings: Arguments of the pipeline's call.
        prompts: ``None`` takes those of the samples already begun in the folder.
        wait: Returns when all processes have called it.

    Raises:
        ValueError: When the folder holds samples of another model, other prompts or settings.
    """
    path = folder / MANIFEST
    asked = {
        "base": type(pipe.transformer).__name__,
        "base_hash": config_hash(pipe.transformer),
        "settings": settings,
        "seed": seed,
        "shard": shard,
    }
    if path.exists():
        manifest = json.loads(path.read_text())
        prompts = prompts or manifest["prompts"]
        wrong = [k for k, v in {**asked, "prompts": prompts}.items() if manifest[k] != v]
        if wrong:
            raise ValueError(
                f"{folder} holds samples with other {', '.join(wrong)}; name another folder, or delete this one"
            )
    if not prompts:
        raise ValueError(f"there are no samples in {folder} yet: name a file with prompts")
    shards = range(-(-len(prompts) // shard))
    folder.mkdir(parents=True, exist_ok=True)
    mine = [n for n in shards if n % processes == rank and not shard_path(folder, n).exists()]
    parts = {n: range(n * shard, min((n + 1) * shard, len(prompts))) for n in mine}
    total = sum(-(-len(part) // batch) for part in parts.values())
    with progress("samples", total, hidden=rank > 0) as advance:
        for number, part in parts.items():
            tensors, facts = _draw_shard(pipe, settings, [prompts[i] for i in part], part, batch, seed, advance)
            if not path.exists() and rank == 0:
                write_json(path, {**asked, **facts, "prompts": prompts})
            with replacing(shard_path(folder, number)) as partial:
                save_file(tensors, partial)
    wait()
    return Samples(folder, json.loads(path.read_text()))


@torch.no_grad()
def _draw_shard(
    pipe: Any,
    settings: dict[str, Any],
    prompts: list[str],
    numbers: range,
    batch: int,
    seed: int,
    advance: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one shard, and the facts that all shards share."""
    architecture = architecture_for(pipe.transformer)
    parts: dict[str, list[Tensor]] = {}
    shared: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for begin in range(0, len(prompts), batch):
        chosen = slice(begin, begin + batch)
        generators = [torch.Generator().manual_seed(_seed(seed, i)) for i in numbers[chosen]]
        with recorded(pipe) as calls:
            call = for_batch(settings, len(generators))
            latents = pipe(prompts[chosen], generator=generators, output_type="latent", **call)[0]
        levels = [float(architecture.sigma(inputs)[0]) for inputs, _ in calls]
        final = [inputs for (inputs, _), level in zip(calls, levels, strict=True) if level == levels[-1]]
        facts = {"sigmas": sorted(set(levels), reverse=True), "passes": len(final)}
        noisy = architecture.batched[0]
        clean = architecture.latents({**final[-1], noisy: latents})
        parts.setdefault("clean", []).append(clean)
        for which, inputs in enumerate(final):
            for name, value in inputs.items():
                if not isinstance(value, Tensor) or name in (noisy, "timestep"):
                    continue
                if name in architecture.batched:
                    parts.setdefault(f"row{which}/{name}", []).append(value)
                else:
                    shared[f"shared/{name}"] = value
        advance()
    tensors = {name: torch.cat(values) for name, values in parts.items()}
    return {name: t.cpu().contiguous() for name, t in {**tensors, **shared}.items()}, facts


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:6], "big")
