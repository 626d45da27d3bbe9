"""What an architecture must supply, and the coarse step that is the same for all of them.

Letters: B samples, C channels, H and W latent height and width, s the scale, sigma the noise level in (0, 1].
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Protocol

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ddit.config import Coarse
from ddit.models.flops import Costs, count
from ddit.patches import (
    coarse_input,
    crop,
    detail_velocity,
    grow,
    low_velocity,
    pack,
    pad_to_multiple,
    patch_features,
    unpack,
)

Inputs = dict[str, Any]
"""Arguments of one call of a transformer, by name."""


class Adapter(Protocol):
    """What a coarse step needs of `ddit.adapter.PatchAdapter`."""

    config: Any
    inputs: dict[int, int]

    def attach(self, transformer: nn.Module) -> Any: ...

    def at(self, scale: int, patches: Tensor) -> AbstractContextManager[Any]: ...


class Architecture(ABC):
    """Facts about one family of transformers. An instance serves one transformer and may cache what it reads.

    The model must predict the velocity ``v = eps - x`` of ``z = (1 - sigma) x + sigma eps``.
    """

    patch_size: ClassVar[int]
    """Height and width of the model's own patches, in latent pixels."""
    batched: ClassVar[tuple[str, ...]]
    """Names of the inputs whose first axis is the batch, the latents first; nested lists and dictionaries count."""
    embedding: ClassVar[str]
    """Name of the layer that makes tokens from patches."""
    head: ClassVar[str]
    """Name of the layer that makes patches from tokens."""
    feed_forward_names: ClassVar[re.Pattern[str]]
    """Names of the linear layers of the feed-forward parts, in every block."""

    block_lists: ClassVar[tuple[str, ...]]
    """Names of the lists of blocks, in the order in which they run."""
    block_counts: ClassVar[tuple[str, ...]] = ("num_layers",)
    """Names of their lengths in the configuration."""
    text_tokens: ClassVar[int] = 512
    """Tokens of a prompt by the pipeline's default."""
    costs: ClassVar[Costs]
    """What tokens its layers see."""
    teacache_first: ClassVar[int] = 1
    """Steps at the beginning that TeaCache always computes."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self._signature = inspect.signature(type(transformer).forward)
        self._counted: dict[Any, int] = {}

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
        """Name every argument of a call of ``transformer.forward``."""
        bound = self._signature.bind(self.transformer, *args, **kwargs).arguments
        return dict(list(bound.items())[1:])

    @abstractmethod
    def obstacle(self, inputs: Inputs) -> str | None:
        """Why this call can't run with large patches, or ``None``."""

    @abstractmethod
    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        """A call for one sample, to count and to time.

        Args:
            frames, height, width: Of the latents; pictures have one frame.
            text: Tokens of the prompt.
        """

    @abstractmethod
    def latents(self, inputs: Inputs) -> Tensor:
        """The noisy latents ``[B, C, ..., H, W]`` of a call, a view where possible."""

    @abstractmethod
    def sigma(self, inputs: Inputs) -> Tensor:
        """The noise level ``[B]`` of a call, float32."""

    @abstractmethod
    def coarse(self, inputs: Inputs, latents: Tensor, sigma: Tensor, scale: int, coarse: Coarse) -> Inputs:
        """Inputs of the same call on a coarse grid: ``latents [B, C, ..., H/s, W/s]`` at noise level ``sigma [B]``."""

    def placed(self, grid: tuple[int, int], scale: int, coarse: Coarse) -> AbstractContextManager[Any]:
        """The call of the model inside the block is on the coarse ``grid`` (rows, columns of tokens).

        For models that derive positions themselves; those that are told them need nothing here.
        """
        return nullcontext()

    @abstractmethod
    def renoised(self, inputs: Inputs, latents: Tensor, sigma: Tensor) -> Inputs:
        """Inputs of the same call with other latents ``[B, C, ..., H, W]`` at noise level ``sigma [B]``."""

    @abstractmethod
    def velocity(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """The model's output as a velocity ``[B, C, ..., H, W]``; ``size`` is (H, W)."""

    @abstractmethod
    def output(self, velocity: Tensor) -> Tensor:
        """The inverse of `velocity`."""

    @abstractmethod
    def tokens(self, inputs: Inputs) -> int:
        """Number of picture tokens of one sample."""

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.layer(self.head).out_features // self.patch_size**2

    @property
    def features(self) -> int:
        """Features of one token of the model's own patches."""
        return self.channels * self.patch_size**2

    @property
    def width(self) -> int:
        """Features of a token inside the transformer."""
        return self.layer(self.head).in_features

    def layer(self, name: str) -> Any:
        """A layer by name, without the wrappers that peft puts around it."""
        layer: Any = self.transformer.get_submodule(name)
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        return layer

    def feed_forward(self) -> list[tuple[str, Any]]:
        """Names and layers of the feed-forward parts of all blocks."""
        names = [name for name, _ in self.transformer.named_modules() if self.feed_forward_names.fullmatch(name)]
        return [(name, self.layer(name)) for name in names]

    def blocks(self) -> list[nn.Module]:
        """The transformer's blocks in the order in which they run."""
        return [block for name in self.block_lists for block in self.transformer.get_submodule(name).children()]

    @abstractmethod
    def teacache_signal(self, block: Any, argument: Callable[[str], Any]) -> Tensor:
        """What TeaCache watches: the modulated input of the first block.

        Args:
            block: The first one.
            argument: Gives one of its arguments by name.
        """

    def teacache_coefficients(self) -> tuple[float, ...] | None:
        """Published for this model (https://github.com/ali-vilab/TeaCache), or ``None``."""
        return None

    def answer(self, velocity: Tensor, inputs: Inputs) -> Any:
        """A velocity ``[B, C, ..., H, W]`` in the form that the caller of the transformer expects."""
        tokens = self.output(velocity)
        return Transformer2DModelOutput(sample=tokens) if inputs.get("return_dict", True) else (tokens,)

    def rows(self, inputs: Inputs, index: list[int]) -> Inputs:
        """The call for some samples of the batch only."""
        rows = torch.tensor(index)
        return {k: _take(v, rows) if k in self.batched else v for k, v in inputs.items()}

    def coarse_inputs(self, inputs: Inputs, scale: int, coarse: Coarse) -> tuple[Inputs, Tensor]:
        """Inputs of a call at ``scale``, and the shrunk latents among them in float32."""
        return self._coarse_call(inputs, self.latents(inputs), self.sigma(inputs), scale, coarse)

    def _coarse_call(
        self, inputs: Inputs, z: Tensor, sigma: Tensor, scale: int, coarse: Coarse
    ) -> tuple[Inputs, Tensor]:
        padded = pad_to_multiple(z.float(), scale * self.patch_size)
        small, level = coarse_input(padded, sigma, scale, self.patch_size, coarse.start)
        return self.coarse(inputs, small.to(z.dtype), level, scale, coarse), small

    def coarse_step(
        self,
        forward: Callable[..., Any],
        inputs: Inputs,
        scale: int,
        coarse: Coarse,
        *,
        noisy: tuple[Tensor, Tensor] | None = None,
        variance: Tensor | None = None,
        adapter: Adapter | None = None,
    ) -> Tensor:
        """The model's answer to a call, computed with patches ``scale`` times as large (paper, section 3.2).

        Args:
            forward: The transformer's own forward.
            coarse: How; an adapter's own form where there is one.
            noisy: The call's latents ``[B, C, ..., H, W]`` and noise level ``[B]``, where they have been read already.
            variance: Variance of the detail inside large patches ``[C]``, measured on the model's samples.
            adapter: Adds what it learnt, attached to the transformer.

        Returns:
            Velocity ``[B, C, ..., H, W]``, float32.
        """
        z, sigma = noisy or (self.latents(inputs), self.sigma(inputs))
        padded = pad_to_multiple(z.float(), scale * self.patch_size)
        call, small = self._coarse_call(inputs, z, sigma, scale, coarse)
        height, width = small.shape[-2:]
        grid = (height // self.patch_size, width // self.patch_size)
        seen: AbstractContextManager[Any] = nullcontext()
        if adapter is not None:
            features = patch_features(padded, sigma, scale, coarse.start)
            seen = adapter.at(scale, pack(features, scale * self.patch_size))
        with self.placed(grid, scale, coarse), seen as learnt:
            output = self.velocity(first(forward(**call)), (height, width)).float()
        pooled = low_velocity(small, output, sigma, scale, coarse.start)
        velocity = grow(pooled, scale, self.patch_size, coarse.start)
        if coarse.start == "noise-consistent":
            velocity = velocity + detail_velocity(padded, sigma, scale, variance)
        if learnt is not None:
            velocity = velocity + unpack(learnt.correction.float(), scale * self.patch_size, padded.shape)
        return crop(velocity, *z.shape[-2:])

    def count_flops(self, inputs: Inputs, scale: int = 1, adapter: Adapter | None = None) -> int:
        """Floating-point operations of one call, in closed form (`ddit.models.flops`).

        Args:
            inputs: Arguments at this scale.
            adapter: Counted along at scales above 1.
        """
        config = None if adapter is None or scale == 1 else adapter.config
        shapes = [(name, tuple(value.shape)) for name, value in inputs.items() if isinstance(value, Tensor)]
        key = (*shapes, scale, str(config))
        if key not in self._counted:
            self._counted[key] = count(self, inputs, config, scale)
        return self._counted[key]


class PackedArchitecture(Architecture):
    """One whose pipeline packs squares of latent pixels into tokens ``[B, N, C p p]`` for the transformer."""

    def velocity(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        return unpack(output, self.patch_size, (len(output), self.channels, *size))

    def output(self, velocity: Tensor) -> Tensor:
        return pack(velocity, self.patch_size)

    def tokens(self, inputs: Inputs) -> int:
        return inputs[self.batched[0]].shape[1]


def first(output: Any) -> Tensor:
    """The tensor in a model's answer, a tuple or an output class."""
    return output[0]


def to_meta(value: Any) -> Any:
    """The same nest of tensors without data, in float32 where it was floating-point."""

    def empty(t: Tensor) -> Tensor:
        return torch.empty_like(t, device="meta", dtype=torch.float32 if t.is_floating_point() else t.dtype)

    return _walk(value, empty)


def _take(value: Any, rows: Tensor) -> Any:
    return _walk(value, lambda t: t[rows.to(t.device)])


def _walk(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_walk(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _walk(v, change) for k, v in value.items()}
    return value
