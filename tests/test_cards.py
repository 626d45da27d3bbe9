"""Model cards: what is written beside the weights, and what goes to the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import tiny
from ddit import PatchAdapter
from ddit.pretrained import model_card
from ddit.seat import MARK

ROWS = [
    {"step": 40, "scale": 2, "sigma": 0.95, "error": 0.0125, "training_free": 0.5},
    {"step": 40, "scale": 4, "sigma": 0.95, "error": 0.1, "training_free": 0.75},
]


@pytest.fixture
def adapter():
    return PatchAdapter.for_model(tiny.transformer(), rank=2, detail_variance={2: [0.1], 4: [0.2]})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one repository: a folder. Its ``README.md`` counts as there once it is."""
    repo = tmp_path / "hub"
    repo.mkdir()

    def upload(*, folder_path, **_):
        for file in Path(folder_path).iterdir():
            (repo / file.name).write_bytes(file.read_bytes())

    def card(*_, **__):
        there = repo / "README.md"
        return ModelCard.load(there) if there.is_file() else ModelCard("---\nlibrary_name: diffusers\n---\n\nbare\n")

    named = type("Url", (), {"repo_id": "me/adapter"})
    for where in ("diffusers.utils.hub_utils", "diffusers.models.modeling_utils"):
        monkeypatch.setattr(f"{where}.create_repo", lambda *_, **__: named)
        monkeypatch.setattr(f"{where}.load_or_create_model_card", card)
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", upload)
    monkeypatch.setattr("ddit.pretrained.file_exists", lambda _, name, **__: (repo / name).is_file())
    return repo


def test_a_card_says_what_it_is_for_and_how_good(adapter):
    card = model_card(adapter, "owner/base", ROWS)
    data = card.data.to_dict()
    assert data["base_model"] == "owner/base" and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "ddit" and data["license"] == "other"
    assert {"ddit", "adapter", "arxiv:2602.16968"} <= set(data["tags"])
    assert "# Adapter for owner/base" in card.text and "FluxTransformer2DModel" in card.text
    assert "| scales | [2, 4] |" in card.text and "| rank | 2 |" in card.text
    assert "| step | scale | sigma | error | training_free |\n|---|---|---|---|---|\n" in card.text
    assert "| 40 | 2 | 0.95 | 0.0125 | 0.5 |" in card.text
    assert 'ddit.apply(pipe, adapter="' in card.text


def test_what_is_not_known_is_left_out(adapter):
    card = model_card(adapter)
    assert "base_model" not in card.data.to_dict() and "Quality" not in card.text
    assert "None" not in card.text and "detail_variance" not in card.text


def test_the_snippet_of_a_card_runs(tmp_path, pipe):
    import ddit

    PatchAdapter.for_model(pipe.transformer).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    code = card.text.split("```python\n")[1].split("```")[0]
    exec(code.replace(f"folder or hub id of this {PatchAdapter.noun}", str(tmp_path)), {"ddit": ddit, "pipe": pipe})
    assert getattr(pipe.transformer, MARK).plan.adapter is not None


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_the_hub_gets_the_card_of_the_folder(adapter, tmp_path, hub, how):
    """A card with measured quality, as training leaves it, goes along; one that is on the hub stays."""
    folder = tmp_path / "adapter"
    adapter.save_pretrained(folder)
    model_card(adapter, "owner/base", ROWS).save(folder / "README.md")
    loaded = PatchAdapter.from_pretrained(folder)

    def push():
        if how == "push_to_hub":
            loaded.push_to_hub("me/adapter")
        else:
            loaded.save_pretrained(str(tmp_path / "again"), push_to_hub=True, repo_id="me/adapter")

    push()
    assert (hub / "diffusion_pytorch_model.safetensors").is_file()
    assert "owner/base" in (hub / "README.md").read_text() and "0.0125" in (hub / "README.md").read_text()
    (hub / "README.md").write_text("---\nlibrary_name: ddit\n---\n\nmine\n")
    push()
    assert "mine" in (hub / "README.md").read_text()


def test_a_folder_saved_anew_keeps_its_card(adapter, tmp_path):
    adapter.save_pretrained(tmp_path / "a")
    model_card(adapter, "owner/base", ROWS).save(tmp_path / "a" / "README.md")
    PatchAdapter.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text() == (tmp_path / "a" / "README.md").read_text()
