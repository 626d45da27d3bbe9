"""Trained parts as files: diffusers' format, a model card, and the check that they fit the model."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ConfigMixin, ModelMixin
from huggingface_hub import ModelCard, ModelCardData, file_exists
from safetensors import safe_open
from torch import nn

Part = TypeVar("Part", bound="TrainedPart")

_HUB = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download", "proxies")


class TrainedPart(ModelMixin, ConfigMixin):
    """Trained for one base model; saved and loaded like any model of diffusers, with safetensors only."""

    config_name = "config.json"
    noun = "part"
    """What users call it, and the argument of `ddit.apply` that takes it."""

    @classmethod
    def from_pretrained(cls: type[Part], pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Part:
        """Load from a folder or the hub; arguments as in `diffusers.ModelMixin.from_pretrained`.

        Raises:
            ValueError: When there is none, or its file is cut short, lacks weights or has foreign ones.
        """
        name, noun = str(pretrained_model_name_or_path), cls.noun
        settings = {**kwargs, "use_safetensors": True, "output_loading_info": True, "low_cpu_mem_usage": False}
        try:
            config = cls.load_config(name, **{k: v for k, v in kwargs.items() if k in _HUB})
            if not isinstance(config, dict) or config.get("_class_name") != cls.__name__:
                found = config.get("_class_name") if isinstance(config, dict) else None
                raise ValueError(f"its config.json is that of a {found}, not of a {cls.__name__}")
            check_types(Path(name))
            loaded: Any = super().from_pretrained(name, **settings)
            part, info = loaded
        except Exception as error:  # diffusers, safetensors and the hub each raise their own
            raise ValueError(
                f"{noun} {name!r} can't be loaded: {(str(error) or repr(error)).splitlines()[0]}; "
                "name one that is whole, or get its files anew"
            ) from error
        wrong = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(kind)}
        if wrong:
            told = "; ".join(f"{kind.replace('_', ' ')}: {_some(keys)}" for kind, keys in wrong.items())
            raise ValueError(f"the weights of {noun} {name!r} don't fit its config.json ({told}); get the files anew")
        check_weights(part, f"{noun} {name!r}")
        return part

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save to a folder, with a model card (``README.md``); arguments as in `diffusers.ModelMixin`."""
        super().save_pretrained(save_directory, **kwargs)
        if not kwargs.get("push_to_hub"):  # or `_upload_folder` has seen to it
            self.card().save(Path(save_directory) / "README.md")

    def _upload_folder(self, working_dir: Any, repo_id: str, token: Any = None, **kwargs: Any) -> Any:
        """As in diffusers, whose bare card gives way to ours; a card that is on the hub already stays."""
        if not file_exists(repo_id, "README.md", token=token):
            self.card().save(Path(working_dir) / "README.md")
        return super()._upload_folder(working_dir, repo_id, token=token, **kwargs)

    def card(self) -> ModelCard:
        """The model card that it was loaded with, else a new one."""
        source = self.config.get("_name_or_path")
        loaded = source and Path(source) / "README.md"
        return ModelCard.load(loaded) if loaded and loaded.is_file() else model_card(self)

    def check(self, transformer: nn.Module) -> None:
        """Refuse a transformer that this was not made for.

        Raises:
            ValueError: Naming what it expects and what the transformer has.
        """
        model = getattr(transformer, "_orig_mod", transformer)  # inside of torch.compile's wrapper
        here = (type(model).__name__, config_hash(model))
        made_for = (self.config["base"], self.config["base_hash"])
        if here != made_for:
            raise ValueError(
                f"the {self.noun} was made for a {made_for[0]} with configuration {made_for[1]}, "
                f"this is a {here[0]} with configuration {here[1]}; load the base model it was trained on"
            )

    def _join(self, device: Any) -> None:
        """Move to where the model's tensors are."""
        if self.device != device:
            nn.Module.to(self, device)

    def forward(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"a {self.noun} has no forward of its own; pass it to ddit.apply")


CARD = """# {title}

For ddit ([DDiT](https://arxiv.org/abs/2602.16968)), which changes the patch size of a diffusion transformer from step
to step. Made for {base}, whose licence holds for this {noun} too.

```python
ddit.apply(pipe, {noun}="folder or hub id of this {noun}")
```

| setting | |
|---|---|
{settings}
"""
QUALITY = """
## Quality

On samples kept apart: `error` with this {noun}, `training_free` without it. Lower is better.

| {head} |
|{rule}
{rows}
"""


def model_card(
    part: TrainedPart, base_model: str | None = None, quality: Sequence[Mapping[str, Any]] = ()
) -> ModelCard:
    """What readers on the hub should know, as the trainers of diffusers write it.

    Args:
        base_model: Hub id of the pipeline that it was trained for.
        quality: Rows of one validation, as in ``validation.jsonl``.
    """
    data = ModelCardData(
        base_model=base_model,
        base_model_relation=base_model and "adapter",
        library_name="ddit",  # with "diffusers" the hub would tell people to load it as a pipeline
        license="other",
        license_name="as-the-base-model",
        tags=["ddit", "diffusers", "diffusion-transformer", part.noun, "arxiv:2602.16968"],
    )
    shown = {k: v for k, v in part.config.items() if not k.startswith("_") and not isinstance(v, dict)}
    base = part.config["base"] if base_model is None else f"{base_model} ({part.config['base']})"
    text = CARD.format(
        title=f"{part.noun.capitalize()} for {base_model or part.config['base']}",
        base=base,
        noun=part.noun,
        settings="\n".join(f"| {name} | {json.dumps(value)} |" for name, value in shown.items()),
    )
    if quality:
        rows = ["| " + " | ".join(f"{value:g}" for value in row.values()) + " |" for row in quality]
        head = " | ".join(quality[0])
        text += QUALITY.format(noun=part.noun, head=head, rule="---|" * len(quality[0]), rows="\n".join(rows))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


SOME = 16
"""Numbers of a weight that are looked at."""
LARGEST = 1e4
"""Beyond this no weight of a trained part lies; float16 ends at 6.5e4."""


def check_weights(part: nn.Module, named: str) -> None:
    """Refuse weights that training can't have made: they would turn pictures into noise without a word.

    Raises:
        ValueError: For weights that are not finite, or out of range.
    """
    for name, weight in part.state_dict().items():
        if not bool(weight.isfinite().all()):
            wrong = "holds NaN or infinity"
        elif weight.numel() and float(weight.abs().max()) > LARGEST:
            wrong = f"holds {float(weight.abs().max()):.2g}, which no training makes"
        else:
            continue
        raise ValueError(f"{named} is broken: its weight {name} {wrong}; get the files anew, or train it again")


def check_types(folder: Path) -> None:
    """Refuse files on this machine whose weights are whole numbers, which loading would cast without a word.

    Raises:
        ValueError: Naming the file and the first such weight.
    """
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no iterator of its own)
                kind = file.get_slice(name).get_dtype()
                if not kind.startswith(("F", "BF")):
                    raise ValueError(f"in {path.name} the weight {name} is of type {kind}, not floating-point")


def config_hash(transformer: Any) -> str:
    """Twelve hex digits that tell configurations apart; names, versions and quantization don't count.

    Nor do options at their defaults: a later diffusers may have more of them.
    """
    known = inspect.signature(type(transformer).__init__).parameters
    defaults = {name: json.dumps(known[name].default, default=str) for name in known}
    settings = {
        name: value
        for name, value in dict(transformer.config).items()
        if not name.startswith("_")
        and name != "quantization_config"
        and json.dumps(value, default=list) != defaults.get(name)
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=list).encode()).hexdigest()[:12]


def fingerprint(model: nn.Module) -> str:
    """Twelve hex digits that tell weights apart, by a few numbers of each; bfloat16 and float32 of them are alike."""
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // SOME)]
        some = some.bfloat16() if some.is_floating_point() else some
        found.update(name.encode() + some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def _some(keys: Sequence[Any], count: int = 3) -> str:
    shown = ", ".join(map(str, list(keys)[:count]))
    return shown if len(keys) <= count else f"{shown} and {len(keys) - count} more"
