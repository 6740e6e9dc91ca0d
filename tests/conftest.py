"""Fixtures that several packages share, and what each test needs besides Python: see MARKERS."""

from __future__ import annotations

import gc
import os
import ssl
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import hypothesis
import pytest
import torch

from loramill.data.tokenizer import ChatTokenizer
from loramill.models.catalog import Base, find_base

from .hermes import VOCABULARY, write_hermes_tokenizer
from .llama import tiny_llama, write_base

# Garbage collection is off until pytest has collected the tests: modules and tests live to the end, and scanning them
# repeatedly took 6% of the CPU time of all tests.
gc.disable()

# The readline that pytest loads exports COLUMNS to the processes of pytest-xdist, where it would fold every table.
os.environ.pop("COLUMNS", None)

# Each client of httpx reads the certificate authorities, for 24 ms; tests use plain HTTP, and share what is read once.
ssl.create_default_context = cache(ssl.create_default_context)

# An example may take any time: on a busy machine one of 16 ms took 570 ms.
hypothesis.settings.register_profile("loramill", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("loramill")

TESTS = Path(__file__).parent
#: Markers that tests get by their path or parameter; `make fast` runs the tests that have none of them.
MARKERS = {
    "ray": ("e2e/*", "*_on_ray.py*"),
    "postgres": ("*[[]*postgresql*]", "serve/api/*outage*", "jobs/*outage*"),
    "compiler": ("kernels/test_build.py*", "kernels/test_triton*", "serve/model/test_graphs.py*"),
    # 1,000 of the 1,330 CPU seconds without Ray: training, the real base, grids of shapes, gateways behind commands.
    "slow": (
        "benchmarks/*",
        "jobs/train/*",
        "jobs/worker/*",
        "kernels/test_attention*",
        "kernels/test_lora*",
        "kernels/test_peft_reader*",
        "kernels/test_pointwise*",
        "kernels/test_quantized*",
        "loramill/cli/*",
        "loramill/client/test_client*",
        "loramill/data/test_chat_template*",
        "loramill/local/*",
        "loramill/models/test_catalog*",
        "loramill/models/test_smollm2*",
        "loramill/registry/*",
        "loramill/sizing/test_memory*",
        "pipelines/compare/test_run*",
        "pipelines/test_log_probs*",
        "serve/api/limits/*",
        "serve/api/test_open*",
        "serve/engine/test_engine_smollm2*",
        "serve/metrics/*",
        "serve/model/*",
        "serve/test_offline*",
        "test_docs*",
        "test_wheel*",
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests, skips those that need a GPU where there is none, and puts the files with slow tests first.

    A slow file at the end would leave the other process idle.
    """
    for item in items:
        name = f"{item.path.relative_to(TESTS).as_posix()}::{item.name}"
        for marker, patterns in MARKERS.items():
            if any(fnmatch(name, pattern) for pattern in patterns):
                item.add_marker(marker)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("compiler")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Excludes what exists by now from garbage collection."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def base() -> Base:
    """The real SmolLM2-135M, converted once per machine."""
    return find_base("smollm2-135m", Path("~/.cache/loramill").expanduser())


@pytest.fixture(scope="session")
def tokenizer(base: Base) -> ChatTokenizer:
    """The real base's tokenizer."""
    return ChatTokenizer.load(base.folder)


@pytest.fixture(scope="session")
def hermes_base(tmp_path_factory) -> Base:
    """A tiny random Llama with a byte tokenizer and tools; it has a few more logits than there are tokens."""
    model = tiny_llama(
        vocab_size=VOCABULARY + 3,
        max_position_embeddings=4096,
        initializer_range=0.25,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = write_base(tmp_path_factory.mktemp("hermes"), model)
    write_hermes_tokenizer(folder)
    return Base("hermes", folder, "1" * 64, "LlamaForCausalLM", 4096)
