"""Train the embedded model: autoencoder, text encoders, then the flow transformer together with the text encoders.

Each stage writes into the run folder and is skipped when its result is there; the long ones also resume from
their last checkpoint. Everything follows from the seed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from ddit.embedded.autoencoder import encode_pictures, train_vae
from ddit.embedded.config import TrainingConfig
from ddit.embedded.data import cached_drawings
from ddit.embedded.flow import train_flow
from ddit.embedded.text import load_text, pretrain_text


def train(folder: Path, config: TrainingConfig, device: str = "cpu") -> Path:
    """Run every stage that is not done yet; returns the folder of the finished pipeline."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps(asdict(config), indent=2))
    if config.start_from and not (folder / "vae").exists():
        shutil.copytree(Path(config.start_from) / "vae", folder / "vae")
    prompts, pictures, masks = cached_drawings(folder / "drawings", count=config.pictures, seed=config.seed)
    vae = train_vae(folder / "vae", pictures, config, device)
    latents = encode_pictures(folder, vae, pictures, device)
    encoders = load_text(config.start_from) if config.start_from else pretrain_text(folder / "text.pt", config, device)
    return train_flow(folder, prompts, latents, masks, encoders, vae, config, device)
