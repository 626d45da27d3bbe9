"""Krea 2."""

from __future__ import annotations

import torch
from diffusers import Krea2Pipeline

import tiny_krea2
from ddit.coarse import coarse_call
from ddit.config import Coarse
from families import call_of


def test_a_coarse_call_is_one_of_a_smaller_picture():
    """Positions of the prompt stay in front of those of the image's tokens."""
    arch, inputs, _ = call_of(tiny_krea2.pipeline(), "krea-2")
    small = coarse_call(arch, inputs, arch.read(inputs), 2, Coarse()).inputs
    assert small.keys() == inputs.keys()
    assert torch.equal(small["position_ids"], Krea2Pipeline.prepare_position_ids(6, 4, 6, torch.device("cpu")))
