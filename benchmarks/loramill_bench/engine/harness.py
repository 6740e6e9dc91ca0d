"""The base, its random adapters, and engines that serve them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loramill.kernels import backend
from loramill.models.catalog import Base, load_for_training
from loramill.serve.engine import Engine, EngineConfig, Request, SamplingParams
from loramill.serve.model import Decoder
from loramill_bench.engine.shapes import model_shapes
from loramill_bench.kernels.model import Linears

RANK = 16
_WEIGHT_STD = 0.02  # standard deviation of the weights, as in trained adapters
_ids = itertools.count()


@dataclass(frozen=True)
class Harness:
    """A base in bfloat16 and its adapters.

    Attributes:
        base: The base on disk.
        decoder: The loaded base.
        adapters: PEFT folders of different adapters. A version is an integer as text; version v has the files of the
            adapter with index v modulo the number of adapters.
    """

    base: Base
    decoder: Decoder
    adapters: tuple[Path, ...]

    def source(self, version: str) -> Path:
        """The folder of a version, for an engine."""
        return self.adapters[int(version) % len(self.adapters)]

    @contextmanager
    def engine(self, config: EngineConfig) -> Iterator[Engine]:
        """An engine that serves the base and the adapters; it is closed at the end."""
        engine = Engine(self.decoder, self.source, config)
        try:
            yield engine
        finally:
            engine.close()

    @cached_property
    def linears(self) -> Linears:
        """Random linears with the base's shapes."""
        return Linears.random(backend(), model_shapes(self.decoder), self.decoder.dtype)

    @cached_property
    def peft_model(self) -> Any:
        """The base in PEFT with all adapters, each named by its version; loading takes half a minute."""
        from peft import PeftModel

        model = load_for_training(self.base, torch.bfloat16)
        adapted = PeftModel.from_pretrained(model, self.adapters[0], adapter_name="0", autocast_adapter_dtype=False)
        for version, folder in list(enumerate(self.adapters))[1:]:
            adapted.load_adapter(folder, adapter_name=str(version), autocast_adapter_dtype=False)
        return adapted.eval()

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random prompts of token ids, which share no prefix."""
        prompts: list[list[int]] = torch.randint(self.decoder.config.vocabulary, (count, length)).tolist()
        return prompts

    def requests(self, versions: Sequence[str | None], length: int, new: int) -> list[Request]:
        """One greedy request per version, with a random prompt of `length` tokens and an answer of `new`."""
        prompts = self.prompts(len(versions), length)
        return [
            Request(f"request {next(_ids)}", "bench", tuple(prompt), SamplingParams(max_tokens=new), version)
            for prompt, version in zip(prompts, versions, strict=True)
        ]


def write_adapters(decoder: Decoder, folder: Path, count: int) -> tuple[Path, ...]:
    """Writes random adapters as PEFT does, rank 16 at all linears in bfloat16; returns their folders."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    folders = tuple(folder / str(number) for number in range(count))
    for adapter in folders:
        adapter.mkdir()
        save_file(_weights(decoder), weights_file(adapter))
        text = json.dumps({**config, "target_modules": "all-linear"})
        (adapter / "adapter_config.json").write_text(text, encoding="utf-8")
    return folders


def weights_file(adapter: Path) -> Path:
    """The file with an adapter's weights."""
    return adapter / "adapter_model.safetensors"


def _weights(decoder: Decoder) -> dict[str, torch.Tensor]:
    projections = [
        (site.d_in, module, width)
        for site in decoder.sites
        for module, width in zip(site.modules, site.widths, strict=True)
        if module.endswith("_proj")  # neither the embedding nor the head
    ]
    weights: dict[str, torch.Tensor] = {}
    for d_in, module, width in projections:
        for part, shape in (("A", (RANK, d_in)), ("B", (width, RANK))):
            drawn = torch.randn(shape, dtype=torch.bfloat16) * _WEIGHT_STD
            weights[f"base_model.model.{module}.lora_{part}.weight"] = drawn
    return weights
