"""A tiny base on disk, and the exported result of a job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loramill.kernels.quantization import Quantization
from loramill.models.catalog import Base
from loramill.types import JobSpec

from ....llama import tiny_llama, write_base
from .method_training import VOCABULARY, load_model, logits_of, store_adapter, trained_model


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A random Llama of three layers whose head is its embedding; rows are of whole NF4 blocks."""
    model = tiny_llama(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    folder = write_base(tmp_path_factory.mktemp("small"), model)
    return Base("small", folder, "0" * 64, "LlamaForCausalLM", 128)


@pytest.fixture
def exported(small: Base, tmp_path: Path) -> Callable[..., tuple[Path, torch.Tensor]]:
    """Trains a spec and returns its folder with the logits of the model it was trained on."""

    def export(spec: JobSpec, quantization: Quantization = "none") -> tuple[Path, torch.Tensor]:
        with trained_model(load_model(small, quantization), spec, small.folder) as adapted:
            return store_adapter(adapted, spec, tmp_path / "adapter"), logits_of(adapted.model)

    return export
