"""The trainable half of DDiT (arXiv 2602.16968, section 3.2): what lets a frozen transformer work with large patches.

Per scale s: a patch embedding, a de-embedding, a residual path, a patch-size vector, and LoRA on the feed-forward
layers of every block. All of them start at zero and are added to what the model computes without training, so a new
adapter changes nothing and the frozen weights, with whatever LoRA their user put on them, stay in use at every scale.
Adding ``delta`` to the model's own projection of pooled patches is the paper's extra projection ``w_s = W M + delta``.

An adapter may also leave the model alone (``asks=False``): of all parts it then has the path past the transformer only,
in a form that mends forecasts (`ddit.forecaster`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ddit.anchor import Anchor
from ddit.config import Positions, ScheduleConfig, Start, form_of_adapter
from ddit.forecaster import Forecaster
from ddit.models import architecture_for


class LowRank(nn.Module):
    """LoRA (arXiv 2106.09685): ``x -> up(down(x))``, zero at first."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class ScaleParts(nn.Module):
    """The trainable parts of one scale.

    Args:
        inputs: Features of a large patch as the adapter sees it.
        outputs: Latent pixels times channels of a large patch.
        width: Width of the transformer.
        layers: Feed-forward layers, name -> (inputs, outputs).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        layers: Mapping[str, Sequence[int]],
        rank: int,
        *,
        residual: bool,
        size_vector: bool,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width, bias=False)
        self.head = nn.Linear(width, outputs)
        self.residual = nn.Linear(inputs, outputs, bias=False) if residual else None
        self.size = nn.Parameter(torch.zeros(width)) if size_vector else None
        self.lora = nn.ModuleDict({_key(name): LowRank(i, o, rank) for name, (i, o) in layers.items() if rank})
        for layer in (self.embed, self.head, self.residual):
            if layer is not None:
                nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.head.bias)


@dataclass
class AdapterCall:
    """What passes between an adapter and one call of the transformer."""

    patches: Tensor
    """``[B, N, inputs]``"""
    correction: Tensor | None = None
    """``[B, N, outputs]``, what the adapter adds to the velocity of each large patch."""


@dataclass
class AdapterState:
    """The scale whose LoRA takes part; 1 is none."""

    scale: int = 1


@dataclass
class LayerParts:
    """What a layer of the base knows of an adapter on it."""

    state: AdapterState
    scales: dict[int, Any]
    """Scale -> `LowRank`."""


@dataclass
class Attachment:
    """An adapter's hooks on a transformer."""

    handles: list[RemovableHandle]
    layers: list[nn.Module]

    def remove(self) -> None:
        """Take the adapter off. Safe to call twice."""
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            vars(layer).pop(_LOW_RANK, None)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class PatchAdapter(ModelMixin, ConfigMixin):
    """Adapter for the scales above 1 of one base model; saved and loaded like any model of diffusers.

    Make a new one with `for_model`. ``save_pretrained(folder)``, ``from_pretrained(folder_or_hub_id, revision=...)``
    and ``push_to_hub(name)`` are those of `diffusers.ModelMixin`, with safetensors only.

    Args:
        base: Class of the transformer.
        base_hash: `config_hash` of the transformer.
        features: Features of one token of the model's own patches.
        width: Width of the transformer.
        layers: Feed-forward layers, name -> [inputs, outputs].
        scales: The scales above 1 it serves.
        rank: Rank of LoRA; 0 leaves it out.
        start: What the adapter adds to, see `ddit.ScheduleConfig.start`.
        positions: Positions of large patches, see `ddit.ScheduleConfig.positions`.
        anchored: See `ddit.ScheduleConfig.anchored`; the adapter then sees what the last step at scale 1 predicted.
        residual: Whether there is a residual path from the latents to the output.
        size_vector: Whether there is a patch-size vector.
        asks: Whether large patches ask the model. ``False``: a path past it mends forecasts alone.
        patch: The model's own patch size in latent pixels.
        detail_variance: Scale -> variance per channel of what pooling loses, measured on the base's samples; used where
            `ddit.apply` gets none.
        sampler: Class of the scheduler under which an adapter that does not ask learnt.
        steps_trained: Number of optimiser steps so far.
        ddit_version: Version of ddit that made it.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        base: str,
        base_hash: str,
        features: int,
        width: int,
        layers: dict[str, list[int]],
        scales: tuple[int, ...] = (2, 4),
        rank: int = 32,
        start: Start = "noise-consistent",
        positions: Positions = "grid",
        anchored: bool = True,
        residual: bool = True,
        size_vector: bool = True,
        asks: bool = True,
        patch: int = 2,
        detail_variance: dict[str, list[float]] | None = None,
        sampler: str | None = None,
        steps_trained: int = 0,
        ddit_version: str = "",
    ) -> None:
        super().__init__()
        self.anchored = anchored
        self.asks = asks
        self.path = None if asks else Forecaster(features // patch**2, patch, width)
        self.inputs = {s: features * s * s * (2 if anchored else 1) for s in scales}
        self.parts = nn.ModuleDict(
            {
                str(s): ScaleParts(
                    self.inputs[s],
                    features * s * s,
                    width,
                    layers,
                    rank,
                    residual=residual,
                    size_vector=size_vector,
                )
                for s in scales
                if asks
            }
        )
        self._state = AdapterState()
        self._call: AdapterCall | None = None
        self._hidden: Tensor | None = None

    @classmethod
    def for_model(
        cls,
        transformer: nn.Module,
        *,
        scales: Sequence[int] = (2, 4),
        rank: int = 32,
        start: Start = "noise-consistent",
        positions: Positions | None = None,
        anchored: bool | None = None,
        residual: bool = True,
        size_vector: bool = True,
        asks: bool = True,
        detail_variance: Mapping[int, Sequence[float]] | None = None,
        sampler: str | None = None,
    ) -> PatchAdapter:
        """A new adapter for a transformer, which computes exactly what the model does without one.

        Args:
            positions: By default ``grid`` for ``noise-consistent`` and ``interpolated`` (the paper's) for ``bilinear``.
            anchored: By default yes for ``noise-consistent`` and no (the paper's) for ``bilinear``.
            asks: ``False`` leaves out all parts but a path past the model, which mends forecasts.
            sampler: Class of the scheduler under which it learns to.

        Raises:
            ValueError: For an unsupported model, scales that are no powers of two above 1, a negative rank, or no
                anchors for an adapter that does not ask.
        """
        from ddit import __version__

        architecture = architecture_for(transformer)
        if not scales or any(s < 2 or s & (s - 1) for s in scales) or len(set(scales)) != len(scales):
            raise ValueError(f"scales of an adapter are {tuple(scales)}; they must be distinct powers of two above 1")
        if rank < 0:
            raise ValueError(f"rank is {rank}; it must be at least 0, and 0 leaves LoRA out")
        anchored, asks = form_of_adapter(start, anchored, asks)
        return cls(
            base=type(transformer).__name__,
            base_hash=config_hash(transformer),
            features=architecture.features,
            width=architecture.width,
            layers={name: [layer.in_features, layer.out_features] for name, layer in architecture.feed_forward()},
            scales=tuple(sorted(scales)),
            rank=rank,
            start=start,
            positions=positions or ("grid" if start == "noise-consistent" else "interpolated"),
            anchored=anchored,
            residual=residual,
            size_vector=size_vector,
            asks=asks,
            patch=architecture.patch_size,
            detail_variance={str(s): list(v) for s, v in (detail_variance or {}).items()},
            sampler=sampler,
            ddit_version=__version__,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> PatchAdapter:
        """Load an adapter from a folder or the hub; arguments as in `diffusers.ModelMixin.from_pretrained`.

        Raises:
            ValueError: When there is no adapter, or its file is cut short, lacks weights or has foreign ones.
        """
        name = str(pretrained_model_name_or_path)
        settings = {**kwargs, "use_safetensors": True, "output_loading_info": True, "low_cpu_mem_usage": False}
        try:
            config = cls.load_config(name, **{k: v for k, v in kwargs.items() if k in _HUB})
            if not isinstance(config, dict) or config.get("_class_name") != cls.__name__:
                raise ValueError(f"its config.json is not that of a {cls.__name__}")
            loaded: Any = super().from_pretrained(name, **settings)
            adapter, info = loaded
        except Exception as error:  # diffusers, safetensors and the hub each raise their own
            raise ValueError(
                f"adapter {name!r} can't be loaded: {(str(error) or repr(error)).splitlines()[0]}"
            ) from error
        wrong = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(kind)}
        if wrong:
            told = "; ".join(f"{kind.replace('_', ' ')}: {_some(keys)}" for kind, keys in wrong.items())
            raise ValueError(f"the weights of adapter {name!r} don't fit its config.json ({told}); get the files anew")
        return adapter

    @property
    def form(self) -> dict[str, Any]:
        """The fields of `ddit.ScheduleConfig` that say how a coarse step is computed, as in training."""
        form = {name: self.config[name] for name in ("start", "positions", "anchored")}
        return {**form, "gain": 0.0} if self.anchored else form

    def fits(self, config: ScheduleConfig) -> bool:
        """Whether a schedule asks for no other form of a step, and no scale that the adapter lacks."""
        same = all(getattr(config, name) == value for name, value in self.form.items())
        return same and set(config.scales) <= {1, *self.scales}

    @property
    def detail_variance(self) -> dict[int, list[float]]:
        return {int(s): v for s, v in (self.config["detail_variance"] or {}).items()}

    @property
    def scales(self) -> tuple[int, ...]:
        return tuple(self.config["scales"])

    def check(self, transformer: nn.Module) -> None:
        """Refuse a transformer that the adapter was not made for.

        Raises:
            ValueError: Naming what the adapter expects and what the transformer has.
        """
        here = (type(transformer).__name__, config_hash(transformer))
        made_for = (self.config["base"], self.config["base_hash"])
        if here != made_for:
            raise ValueError(
                f"the adapter was made for a {made_for[0]} with configuration {made_for[1]}, "
                f"this is a {here[0]} with configuration {here[1]}; load the base model it was trained on"
            )

    def attach(self, transformer: nn.Module) -> Attachment:
        """Hook the adapter into a transformer; it stays silent outside `at`.

        Hooks sit on the innermost layers, below the wrappers of peft: a user's LoRA may come before or after.

        Raises:
            ValueError: See `check`; also for a transformer with an adapter on it.
        """
        self.check(transformer)
        architecture = architecture_for(transformer)
        head = architecture.layer(architecture.head)
        layers = architecture.feed_forward() if self.config["rank"] and self.asks else []
        if any(_LOW_RANK in vars(layer) for _, layer in layers):
            raise ValueError("there is an adapter on this transformer; remove it first")
        if self.asks:
            embedding = architecture.layer(architecture.embedding)
            handles = [embedding.register_forward_hook(self._embed), head.register_forward_hook(self._head)]
        else:
            handles = [head.register_forward_pre_hook(self._hear)]
        for name, layer in layers:
            # Past nn.Module's setattr: no submodule of the base, no weights in its state_dict.
            vars(layer)[_LOW_RANK] = LayerParts(self._state, {s: self._parts(s).lora[_key(name)] for s in self.scales})
            handles.append(layer.register_forward_hook(_low_rank))
        if any(getattr(m, "_compiled_call_impl", None) is not None for m in transformer.modules()):
            # Compiled code does not look for hooks that came later (torch._dynamo.config.skip_nnmodule_hook_guards).
            torch._dynamo.reset()
        return Attachment(handles, [layer for _, layer in layers])

    @contextmanager
    def at(self, scale: int, patches: Tensor) -> Iterator[AdapterCall]:
        """The one call of the transformer inside the block runs at ``scale``.

        Args:
            patches: What the adapter sees of each large patch, ``[B, N, inputs]``, ``N`` tokens of the coarse grid.

        Returns:
            The call, of which ``correction`` is to be added to the velocity afterwards.
        """
        self._join(patches.device)
        call = AdapterCall(patches.to(self.dtype))
        with self.low_rank_at(scale):
            self._call = call
            try:
                yield call
            finally:
                self._call = None

    def heard(self) -> Tensor:
        """What the model's last layer read ``[B, N, width]`` in the call before, for an adapter that does not ask."""
        hidden, self._hidden = self._hidden, None
        assert hidden is not None, "the adapter is on the model, which was called"
        return hidden

    def learn(self, anchor: Anchor) -> Tensor:
        """What is known at an anchor of its forecasts' errors, see `ddit.forecaster.Forecaster`."""
        assert self.path is not None, "an adapter that asks has no path past the model"
        self._join(anchor.sigma.device)
        return self.path(anchor)

    def mend(self, velocity: Tensor, sigma: Tensor, anchor: Anchor) -> Tensor:
        """Add what it learnt to a forecast velocity ``[B, C, ..., H, W]`` at a noise level ``[B]``, in place."""
        anchor.learnt = self.learn(anchor) if anchor.learnt is None else anchor.learnt
        return Forecaster.mend(velocity, sigma, anchor, anchor.learnt)

    def _join(self, device: torch.device) -> None:
        if self.device != device:
            nn.Module.to(self, device)

    @contextmanager
    def low_rank_at(self, scale: int) -> Iterator[None]:
        """LoRA belongs to ``scale`` inside the block: for a backward pass that computes blocks a second time."""
        before, self._state.scale = self._state.scale, scale
        try:
            yield
        finally:
            self._state.scale = before

    def forward(self, *_: Any, **__: Any) -> Any:
        raise TypeError("an adapter has no forward of its own; pass it to ddit.apply")

    def _parts(self, scale: int) -> ScaleParts:
        parts = self.parts[str(scale)]
        assert isinstance(parts, ScaleParts)
        return parts

    def _embed(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._call is None:
            return None
        parts = self._parts(self._state.scale)
        added = parts.embed(self._call.patches)
        added = (added if parts.size is None else added + parts.size).to(output.dtype)
        # A convolution puts channels first: [B, width, ..., h, w] where a linear layer gives [B, N, width].
        return output + (added if output.ndim == 3 else added.mT.reshape(output.shape))

    def _hear(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._hidden = args[0]

    def _head(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """The de-embedding reads what the model's own head reads; its answer takes a path of its own (see `at`)."""
        if self._call is None:
            return
        parts = self._parts(self._state.scale)
        correction = parts.head(args[0].to(self.dtype))
        if parts.residual is not None:
            correction = correction + parts.residual(self._call.patches)
        self._call.correction = correction


def _low_rank(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Adds LoRA to a layer's output.

    One function for all layers, which finds its weights through the layer: compiled code of one block then serves
    all blocks of its class, where a closure per layer would be compiled anew for each.
    """
    parts: LayerParts = vars(layer)[_LOW_RANK]
    if parts.state.scale == 1:
        return None
    low_rank = parts.scales[parts.state.scale]
    return output + low_rank(args[0].to(low_rank.down.weight.dtype)).to(output.dtype)


_LOW_RANK = "_ddit_low_rank"
_HUB = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download", "proxies")


def config_hash(transformer: Any) -> str:
    """Twelve hex digits that tell configurations apart; names, versions and quantization don't count."""
    settings = {
        k: v for k, v in dict(transformer.config).items() if not k.startswith("_") and k != "quantization_config"
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=list).encode()).hexdigest()[:12]


def _key(name: str) -> str:
    """Names of modules hold no dots."""
    return name.replace(".", "/")


def _some(keys: Sequence[Any], count: int = 3) -> str:
    shown = ", ".join(map(str, list(keys)[:count]))
    return shown if len(keys) <= count else f"{shown} and {len(keys) - count} more"
