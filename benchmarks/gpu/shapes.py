"""What is measured at which size; ``--tiny`` has the same with models that a CPU runs in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ddit.util.files import write_json


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and how it is called."""

    model: str
    height: int
    width: int
    frames: int = 1
    guidance: int = 1
    """Calls of the model in a step."""
    shift: float
    """Of the noise levels, as the model's pipeline has it at this size."""
    dtype: str = "bfloat16"
    rank: int = 32
    lengths: tuple[int, ...] = (50, 28)
    """Steps of whole runs, the most important first."""
    repeats: int = 15
    """Most repeats of single steps."""
    matrix: int = 8192
    """Rows and columns of the matrices that tell what the card can do."""
    compiling: float = 90.0
    """Seconds that compiling may take."""
    compile: dict[str, Any] = field(default_factory=lambda: {"dynamic": False})
    """Arguments of ``compile_repeated_blocks``."""
    recompiling: bool = True
    """Whether what changes the blocks is measured compiled as well."""


SHAPES = {
    "flux": Shape(model="flux.1-dev", height=1024, width=1024, shift=3.158),  # exp(1.15)
    "wan": Shape(
        model="wan2.1-1.3b", height=480, width=832, frames=81, guidance=2, shift=3.0, lengths=(50,), repeats=10
    ),
}

_FLUX = dict(
    _class_name="FluxTransformer2DModel",
    patch_size=1,
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    pooled_projection_dim=32,
    guidance_embeds=True,
    axes_dims_rope=[4, 6, 6],
)
_WAN = dict(
    _class_name="WanTransformer3DModel",
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
    rope_max_seq_len=64,
)


def tiny(work: Path) -> dict[str, Shape]:
    """The same for a CPU; the models' configurations go into ``work``."""
    for name, config in {"flux": _FLUX, "wan": _WAN}.items():
        write_json(work / f"tiny-{name}" / "transformer" / "config.json", config)
    small: dict[str, Any] = dict(dtype="float32", rank=2, repeats=2, matrix=64, compiling=0.0, recompiling=False)
    small["compile"] = {"backend": "eager"}
    return {
        "flux": replace(SHAPES["flux"], model=str(work / "tiny-flux"), height=128, width=128, lengths=(8, 6), **small),
        "wan": replace(
            SHAPES["wan"], model=str(work / "tiny-wan"), height=128, width=128, frames=5, lengths=(8,), **small
        ),
    }
