"""ImageReward, a judge that learnt from what people preferred, on BLIP of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from ddit.eval.judges import Judge, for_clip, state


class ImageReward(Judge):
    """What people would prefer (Xu et al. 2023): BLIP reads the prompt while looking at the picture; 0 is average.

    The package image-reward needs timm; here its weights go into BLIP of transformers. Their shapes give the sizes;
    heads are 64 wide.
    """

    name = "imagereward"
    weights = "THUDM/ImageReward"
    words: ClassVar[str] = "google-bert/bert-base-uncased"
    """Hub id of the tokenizer; a folder must hold it beside the weights."""
    mean: ClassVar[float] = 0.16717362830052426
    deviation: ClassVar[float] = 1.0333394966054072
    room: ClassVar[int] = 35
    """Tokens of a prompt that are read."""
    renamed: ClassVar[tuple[tuple[str, str], ...]] = (
        ("blip.visual_encoder.", "vision."),
        ("blip.text_encoder.", "text."),
        ("mlp.layers.", "mlp."),
        (".cls_token", ".embeddings.class_embedding"),
        (".pos_embed", ".embeddings.position_embedding"),
        (".patch_embed.proj.", ".embeddings.patch_embedding."),
        (".blocks.", ".encoder.layers."),
        (".attn.qkv.", ".self_attn.qkv."),
        (".attn.proj.", ".self_attn.projection."),
        (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."),
        ("vision.norm.", "vision.post_layernorm."),
    )

    def __init__(self, state: Mapping[str, Tensor], tokenizer: Any) -> None:
        """``state`` has the names of image-reward."""
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        for old, new in self.renamed:
            state = {name.replace(old, new): value for name, value in state.items()}
        vision, text = _blip_sizes(state)
        self.tokenizer = tokenizer
        self.side, self.vision = vision.image_size, BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        linear = {int(k.split(".")[1]): v.shape for k, v in state.items() if k.startswith("mlp.") and v.ndim == 2}
        # Dropout stands between the linear layers.
        gaps = range(max(linear) + 1)
        layers = [nn.Linear(linear[i][1], linear[i][0]) if i in linear else nn.Identity() for i in gaps]
        self.mlp = nn.Sequential(*layers)
        own = self.state_dict()
        self.load_state_dict({name: value for name, value in state.items() if name in own})

    @classmethod
    def load(cls, source: str) -> ImageReward:
        from huggingface_hub import hf_hub_download
        from transformers import AutoTokenizer

        local = Path(source).is_dir()
        file = Path(source) / "ImageReward.pt" if local else Path(hf_hub_download(source, "ImageReward.pt"))
        return cls(state(file), AutoTokenizer.from_pretrained(source if local else cls.words))

    def forward(self, pictures: np.ndarray, prompts: Sequence[str], plain: np.ndarray | None = None) -> Tensor:
        words = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.room, return_tensors="pt"
        ).to(self.device)
        seen = self.vision(for_clip(pictures, self.side).to(self.device)).last_hidden_state
        read = self.text(words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=seen)
        return (self.mlp(read.last_hidden_state[:, 0])[:, 0] - self.mean) / self.deviation


def _blip_sizes(state: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Configurations of the two halves of BLIP from the shapes of their weights."""
    from transformers import BlipTextConfig, BlipVisionConfig

    def layers(start: str) -> int:
        return 1 + max(int(name.removeprefix(start).split(".")[0]) for name in state if name.startswith(start))

    patches = state["vision.embeddings.patch_embedding.weight"]
    side = round((state["vision.embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    vision = BlipVisionConfig(
        hidden_size=patches.shape[0],
        intermediate_size=len(state["vision.encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=layers("vision.encoder.layers."),
        num_attention_heads=patches.shape[0] // 64,
        image_size=side * patches.shape[-1],
        patch_size=patches.shape[-1],
        layer_norm_eps=1e-6,
    )
    vocabulary, width = state["text.embeddings.word_embeddings.weight"].shape
    text = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=patches.shape[0],
        intermediate_size=len(state["text.encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=layers("text.encoder.layer."),
        num_attention_heads=width // 64,
        max_position_embeddings=len(state["text.embeddings.position_embeddings.weight"]),
    )
    return vision, text
