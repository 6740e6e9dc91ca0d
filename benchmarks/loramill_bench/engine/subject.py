"""What is measured: a base, random adapters of it, and engines over both."""

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
from loramill_bench.engine.shapes import shapes
from loramill_bench.kernels.model import Linears

RANK = 16
_SIZE = 0.02  # of a weight, as trained ones have
_ids = itertools.count()


@dataclass(frozen=True)
class Subject:
    """A base in bfloat16 and its adapters.

    Attributes:
        base: on disk.
        decoder: the same, loaded.
        adapters: PEFT folders of different adapters. Versions are whole numbers, and go round these.
    """

    base: Base
    decoder: Decoder
    adapters: tuple[Path, ...]

    def source(self, version: str) -> Path:
        """Where a version is, for an engine."""
        return self.adapters[int(version) % len(self.adapters)]

    @contextmanager
    def engine(self, config: EngineConfig) -> Iterator[Engine]:
        """An engine over both, closed in the end."""
        engine = Engine(self.decoder, self.source, config)
        try:
            yield engine
        finally:
            engine.close()

    @cached_property
    def linears(self) -> Linears:
        """Random ones of the base's shapes."""
        return Linears.random(backend(), shapes(self.decoder), self.decoder.dtype)

    @cached_property
    def tuned(self) -> Any:
        """The base under PEFT with all adapters, each named as its version; takes it half a minute."""
        from peft import PeftModel

        model = load_for_training(self.base, torch.bfloat16)
        tuned = PeftModel.from_pretrained(model, self.adapters[0], adapter_name="0", autocast_adapter_dtype=False)
        for version, folder in list(enumerate(self.adapters))[1:]:
            tuned.load_adapter(folder, adapter_name=str(version), autocast_adapter_dtype=False)
        return tuned.eval()

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random ones, so that no two begin alike."""
        prompts: list[list[int]] = torch.randint(self.decoder.config.vocabulary, (count, length)).tolist()
        return prompts

    def requests(self, versions: Sequence[str | None], length: int, new: int) -> list[Request]:
        """A greedy request a version, with a random prompt of `length` tokens and an answer of `new`."""
        prompts = self.prompts(len(versions), length)
        return [
            Request(f"request {next(_ids)}", "bench", tuple(prompt), SamplingParams(max_tokens=new), version)
            for prompt, version in zip(prompts, versions, strict=True)
        ]


def write_adapters(decoder: Decoder, folder: Path, count: int) -> tuple[Path, ...]:
    """Writes random adapters as PEFT does, rank 16 at all linears in bfloat16; returns their folders."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    folders = tuple(folder / str(number) for number in range(count))
    for each in folders:
        each.mkdir()
        save_file(_weights(decoder), weights_file(each))
        text = json.dumps({**config, "target_modules": "all-linear"})
        (each / "adapter_config.json").write_text(text, encoding="utf-8")
    return folders


def weights_file(adapter: Path) -> Path:
    """What holds an adapter's weights in its folder."""
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
            drawn = torch.randn(shape, dtype=torch.bfloat16) * _SIZE
            weights[f"base_model.model.{module}.lora_{part}.weight"] = drawn
    return weights
