"""What an architecture must supply: data about its layers, and how a call is read, written and answered.

Letters: B samples, C channels, H and W latent height and width, N tokens, s the scale, sigma the noise level in (0, 1].
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ddit.models.flops import Costs, count, lengths
from ddit.patches import TokenLayout, pool_tokens

Inputs = dict[str, Any]
"""Arguments of one call of a transformer, by name."""


class UnsupportedCall(ValueError):
    """A call that can't run with large patches; the message says why."""


@dataclass(frozen=True)
class Noisy:
    """What a call is about."""

    latents: Tensor
    """``[B, C, ..., H, W]``, of audio ``[B, C, T]``, as all that lies on their grid"""
    sigma: Tensor
    """``[B]``, or ``[1]`` for all of them, float32"""
    condition: Tensor | None = None
    """What the model is given on the latents' grid beside them ``[B, K, ..., H, W]``; without noise, pooled."""

    def rows(self, samples: Sequence[int]) -> Noisy:
        """Some samples of the batch only."""
        if len(samples) == len(self.latents):
            return self
        some = list(samples)
        condition = None if self.condition is None else self.condition[some]
        sigma = self.sigma if len(self.sigma) == 1 else self.sigma[some]
        return Noisy(self.latents[some], sigma, condition)


class Architecture(ABC):
    """One family of transformers: data, and four methods (`read`, `write`, `velocity`, `output`).

    The model must predict the velocity ``v = eps - x`` of ``z = (1 - sigma) x + sigma eps``, or what `velocity` turns
    into it. An instance serves one transformer and may cache what it reads.
    """

    patch_size: ClassVar[int] = 2
    """Height and width of the model's own patches, in latent pixels; of audio their length."""
    axes: ClassVar[int] = 2
    """How many axes of the latents a patch spans (`ddit.patches.spanned`): 1 for audio, ``[B, C, T]``."""
    grid_multiple: ClassVar[int] = 1
    """Numbers of rows and columns of tokens that the model takes are multiples of this."""
    compression: ClassVar[tuple[int, int]] = (8, 4)
    """Pixels of a picture's edge to one latent, and frames of a clip, in the usual autoencoder."""
    latent_rate: ClassVar[float] = 25.0
    """Latents to a second of sound in the usual autoencoder."""
    time_scale: ClassVar[float] = 1.0
    """Timestep of pure noise."""
    guidance_off: ClassVar[float] = 1.0
    """Scale by which its pipelines mean no guidance; 0 where they count ``cond + g (cond - uncond)``."""
    batched: ClassVar[tuple[str, ...]]
    """Names of the inputs whose first axis is the batch, the latents first; nested lists and dictionaries count."""
    timestep: ClassVar[str] = "timestep"
    """Name of the input that tells how noisy the latents are."""
    residuals: ClassVar[tuple[str, ...]] = ()
    """Names of the inputs with a ControlNet's residuals, lists of ``[B, N, width]`` for the tokens of a grid."""
    embedding: ClassVar[str]
    """Name of the layer that makes tokens from patches."""
    head: ClassVar[str] = "proj_out"
    """Name of the layer that makes patches from tokens."""
    rope: ClassVar[str | None] = None
    """Name of the module that derives positions from a call's shape, see `rotary`; ``None`` where calls tell them."""
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    """Names of the lists of blocks, in the order in which they run."""
    block_counts: ClassVar[tuple[str, ...]] = ("num_layers",)
    """Names of their lengths in the configuration."""
    feed_forward_names: ClassVar[re.Pattern[str]]
    """Names of the linear layers of the feed-forward parts, in every block."""
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

    # What a family must say

    @abstractmethod
    def read(self, inputs: Inputs) -> Noisy:
        """What a call is about, latents as a view where possible.

        Raises:
            UnsupportedCall: Where it can't run with large patches.
        """

    @abstractmethod
    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        """The same call about other latents, whose tokens lie as ``layout`` says; its answer is a tuple."""

    @abstractmethod
    def velocity(self, output: Tensor, size: Sequence[int]) -> Tensor:
        """The model's output as a velocity ``[B, C, ..., H, W]``; ``size`` is (..., H, W) of the latents."""

    @abstractmethod
    def output(self, velocity: Tensor, inputs: Inputs) -> Tensor:
        """The inverse of `velocity`, as the model answers the call ``inputs``."""

    @abstractmethod
    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        """A call for one sample, to count and to time.

        Args:
            frames, height, width: Of the latents; images have one frame. Audio is as long as it is wide.
            text: Tokens of the prompt.
        """

    # What a family may say

    def sigma(self, inputs: Inputs) -> Tensor:
        """The noise level ``[B]`` of any call, float32."""
        return inputs[self.timestep].float() / self.time_scale

    def rotary(self, layout: TokenLayout, args: tuple[Any, ...], output: Any) -> Any:
        """What the module `rope` answers to ``args`` where tokens lie as in ``layout``, instead of ``output``."""
        raise NotImplementedError

    @staticmethod
    def own(tokens: Tensor, count: int) -> Tensor:
        """Those ``count`` of the tokens ``[B, N, ...]`` in a layer that are about what is drawn, as a view."""
        return tokens[:, :count]

    def further_rows(self, inputs: Inputs) -> dict[str, int]:
        """Rows per sample of kinds that `ddit.models.flops.lengths` does not know, or knows otherwise."""
        return {}

    def teacache_signal(self, block: Any, argument: Callable[[str], Any]) -> Tensor:
        """What TeaCache watches: the modulated input of the first block.

        Args:
            block: The first one.
            argument: Gives one of its arguments by name.
        """
        raise ValueError(f"TeaCache does not know {type(self.transformer).__name__}; take another cache")

    def teacache_coefficients(self) -> tuple[float, ...] | None:
        """Published for this model (https://github.com/ali-vilab/TeaCache), or ``None``."""
        return None

    # What follows

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
        """Name every argument of a call of ``transformer.forward``."""
        bound = self._signature.bind(self.transformer, *args, **kwargs).arguments
        return dict(list(bound.items())[1:])

    def rows(self, inputs: Inputs, samples: Sequence[int]) -> Inputs:
        """The call for some samples of the batch only."""
        rows, batch = torch.tensor(list(samples)), len(inputs[self.batched[0]])

        def some(t: Tensor) -> Tensor:
            return (
                t if len(t) == 1 < batch else t[rows.to(t.device, non_blocking=True)]
            )  # one row may serve all samples

        return {k: _walk(v, some) if k in self.batched else v for k, v in inputs.items()}

    def pooled_residuals(self, inputs: Inputs, layout: TokenLayout, grid: Sequence[int]) -> Inputs:
        """The `residuals` of a call on ``grid`` (rows, columns), for the tokens of ``layout``."""
        there = [name for name in self.residuals if inputs.get(name) is not None and layout.grid != grid]
        return {name: [pool_tokens(x, grid, layout.scale) for x in inputs[name]] for name in there}

    def check_patch_size(self) -> None:
        """Refuse a model whose own patches, by its configuration, are not of `patch_size` (`UnsupportedCall`)."""
        config: Any = self.transformer.config
        if config.patch_size != self.patch_size:
            extent = "wide" if self.axes == 2 else "long"
            raise UnsupportedCall(f"the model's own patches are {config.patch_size} {extent}, not {self.patch_size}")

    def renoised(self, inputs: Inputs, latents: Tensor, sigma: Tensor) -> Inputs:
        """The same call with other latents ``[B, C, ..., H, W]`` at noise level ``sigma [B]``."""
        noisy = replace(self.read(inputs), latents=latents, sigma=sigma)
        return self.write(inputs, noisy, TokenLayout.of(latents, self.patch_size))

    def answer(self, velocity: Tensor, inputs: Inputs) -> Any:
        """A velocity ``[B, C, ..., H, W]`` in the form that the caller of the transformer expects."""
        output = self.output(velocity, inputs)
        return Transformer2DModelOutput(sample=output) if inputs.get("return_dict", True) else (output,)

    @contextmanager
    def placed(self, layout: TokenLayout) -> Iterator[None]:
        """The call of the model inside the block has its tokens where ``layout`` says.

        Positions that count on by one are what a model derives from the shape; others take their place.
        """
        if self.rope is None or layout.positions == "grid":
            yield
            return
        module = self.transformer.get_submodule(self.rope)
        handle = module.register_forward_hook(lambda _, args, output: self.rotary(layout, args, output))
        try:
            yield
        finally:
            handle.remove()

    def tokens(self, inputs: Inputs) -> int:
        """Number of image tokens of one sample, those of reference images too."""
        x = inputs[self.batched[0]]
        return x.shape[1] if x.ndim == 3 else x[0, 0].numel() // self.patch_size**self.axes

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.features // self.patch_size**self.axes

    @property
    def features(self) -> int:
        """Features of one token of the model's own patches."""
        return self.layer(self.head).out_features

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

    def count_flops(self, inputs: Inputs, scale: int = 1, adapter: Any = None) -> int:
        """Floating-point operations of one call, in closed form (`ddit.models.flops`).

        Args:
            inputs: Arguments at this scale.
            adapter: A `ddit.PatchAdapter`, counted along at scales above 1.
        """
        config = None if adapter is None or scale == 1 else adapter.config
        samples, rows = len(inputs[self.batched[0]]), lengths(self, inputs)
        learnt = config and (config["rank"], config["residual"], len(config["layers"]))
        key = (samples, *sorted(rows.items()), scale, learnt)
        if key not in self._counted:
            self._counted[key] = count(self, inputs, config, scale)
        return self._counted[key]


def check_arguments(given: Mapping[str, Any] | None, harmless: set[str]) -> None:
    """Refuse attention arguments but those that are known to be ``harmless``: to know nothing of image tokens.

    Raises:
        UnsupportedCall: Naming the others.
    """
    unknown = sorted(set(given or {}) - harmless)
    if unknown:
        raise UnsupportedCall(f"the attention arguments {unknown} may depend on the model's own tokens")


def centre_waves(layout: TokenLayout, dims: Sequence[int], theta: float) -> Tensor:
    """Rotary waves of the rows and columns of tokens ``[N, sum(dims) / 2]``, complex.

    Args:
        dims: Features of a head for rows and for columns.
    """
    places: Any = layout.places().double()
    axes = zip(places.T, dims, strict=True)
    waves: Any = [get_1d_rotary_pos_embed(dim, axis, theta, freqs_dtype=torch.float64) for axis, dim in axes]
    return torch.cat(waves, dim=1)


def first(output: Any) -> Tensor:
    """The tensor in a model's answer, a tuple or an output class."""
    return output[0]


def channels_first(layer: nn.Module) -> bool:
    """Whether a layer has its tokens as ``[B, width, ...]`` instead of ``[B, N, width]``, as convolutions do."""
    return isinstance(layer, nn.modules.conv._ConvNd)


def to_meta(value: Any) -> Any:
    """The same nest of tensors without data, in float32 where it was floating-point."""

    def empty(t: Tensor) -> Tensor:
        return torch.empty_like(t, device="meta", dtype=torch.float32 if t.is_floating_point() else t.dtype)

    return _walk(value, empty)


def _walk(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_walk(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _walk(v, change) for k, v in value.items()}
    return value
