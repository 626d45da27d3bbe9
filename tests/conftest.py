"""Settings for all tests: pytest puts this folder on the path, so that `import tiny` works."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: of workers beside each other, none spins for the others

import diffusers
import pytest
import torch

import tiny

torch.set_num_threads(1)  # The models are too small to share their work.
diffusers.utils.logging.disable_progress_bar()


@pytest.fixture
def pipe():
    """A shrunken FLUX pipeline of one's own."""
    return tiny.pipeline()
