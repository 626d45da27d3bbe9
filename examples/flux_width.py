"""A pipeline as wide as FLUX.1-dev with a few of its blocks and random weights, to measure training on.

    python examples/flux_width.py runs/flux-width --blocks 1 2 --dtype bfloat16
    ddit train --model runs/flux-width --prompts prompts.txt --out runs/wide

Transformer: FLUX.1-dev's configuration but for the number of blocks; all 19 and 38 need 24 GB. Text: 512 tokens of its
width from encoders of one layer. Tokenizers and autoencoder are the embedded model's, whose latents are a quarter of
the picture: 256 x 256 pixels make 1,024 tokens, as 512 x 512 do in FLUX.1-dev.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from ddit.pipelines.known import meta_transformer
from ddit.pipelines.loading import load_pipeline
from ddit.preset import Preset


def build(double: int, single: int, size: int, dtype: torch.dtype) -> tuple[Any, Preset]:
    """The pipeline, and how to call it."""
    pipe, preset = load_pipeline("embedded", dtype="float32", device="cpu")
    config = {k: v for k, v in meta_transformer("flux.1-dev").config.items() if not k.startswith("_")}
    config.update(num_layers=double, num_single_layers=single)
    torch.manual_seed(0)
    words = len(pipe.tokenizer)
    clip = CLIPTextConfig(vocab_size=words, hidden_size=768, num_hidden_layers=1, eos_token_id=1, pad_token_id=0)
    t5 = T5Config(vocab_size=words, d_model=4096, d_ff=64, num_layers=1, num_heads=2, pad_token_id=0)
    wide: Any = FluxPipeline(
        scheduler=pipe.scheduler,
        vae=pipe.vae,
        text_encoder=CLIPTextModel(clip),
        tokenizer=pipe.tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=pipe.tokenizer_2,
        transformer=FluxTransformer2DModel(**config),
    )
    return wide.to(dtype), Preset(call={**preset.call, "height": size, "width": size, "max_sequence_length": 512})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, nargs=2, default=(1, 2), metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--size", type=int, default=256, help="pixels of the picture's edge (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    double, single = args.blocks
    pipe, preset = build(double, single, args.size, getattr(torch, args.dtype))
    pipe.save_pretrained(args.out)
    preset.save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
