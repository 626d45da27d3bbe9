"""Settings of the embedded model's training."""

from __future__ import annotations

from dataclasses import dataclass

RESOLUTIONS = (128, 64, 32)
"""Picture sizes in pixels the flow is trained at: 256, 64 and 16 image tokens."""
CROP = 8
"""Height and width in tokens of a crop; three times as many crops as pictures fit in a batch."""


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Settings of the flow's training that pictures and clips share."""

    flow_steps: int
    mix: tuple[float, float, float] = (0.9, 0.07, 0.03)
    """Share of steps at full size, half and a quarter of it."""
    lr: float = 1.2e-3
    """Learning rate of the flow after its warm-up: Muon for the blocks' matrices, half of it in AdamW for the rest."""
    decay_from: float = 0.7
    """Fraction of ``flow_steps`` after which the learning rate falls linearly to zero."""
    noise_mean: float = 0.4
    """Noise levels at a quarter of the size are ``sigmoid(n)`` with ``n`` normal of this mean."""
    noise_std: float = 1.3
    """Deviation of ``n``."""
    mask_weight: float = 2.0
    """Weight of the masks' loss beside the flow's (see `ddit.embedded.flow.MaskHead`)."""
    ema: float = 0.995
    unconditional: float = 0.1
    """Chance that a prompt is replaced by the empty one, which makes classifier-free guidance possible."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(FlowConfig):
    """Settings of the whole training; saved beside the result."""

    pictures: int = 16_000
    """Number of drawings."""
    vae_steps: int = 3_000
    text_steps: int = 500
    flow_steps: int = 12_000
    batch: dict[int, int] | None = None
    """Batch size of each resolution; ``None`` is 24 at 128, 48 at 64 and 64 at 32 pixels."""
    crops: float = 0.55
    """Share of the steps at 128 pixels that see `CROP` x `CROP` tokens around a place their prompts name."""
    bf16: bool = True
    """Compute the flow's loss in bfloat16; weights and optimizers stay in float32."""
    checkpoint_every: int = 200
    """Steps of the flow between two checkpoints."""
    start_from: str | None = None
    """Folder of a finished pipeline whose autoencoder and text encoders are kept, and where the transformer starts."""

    @property
    def batches(self) -> dict[int, int]:
        return self.batch or {128: 24, 64: 48, 32: 64}
