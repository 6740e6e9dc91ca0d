"""The modules of a base that an adapter may target, and the module that a tensor's name refers to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from loramill.kernels.adapters.packing import Site

#: PEFT's prefix of module names in a file.
PREFIX = "base_model.model."
#: What torch.compile, FSDP and activation checkpointing insert before or between the parts of a module's name.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: What PEFT and DDP insert before a module's name; PEFT applied twice inserts it twice.
_PEFT = re.compile(r"(?:(?:base_model\.model|module)\.)*")
#: Prefixes of the same layers in other classes of transformers: with or without a head, alone or next to a tower.
_HOLDERS = re.compile(r"(?:(?:model|language_model|transformer|text_model)\.)*")


@dataclass(frozen=True, slots=True)
class Module:
    """A linear or embedding of a base.

    Attributes:
        d_in: Columns of the weight; of an embedding, its vocabulary.
        d_out: Rows of the weight; of an embedding, the width of its vectors.
        lookup: Whether it is an embedding.
        head: Whether it computes the logits; "all-linear" excludes it.
    """

    d_in: int
    d_out: int
    lookup: bool = False
    head: bool = False


@dataclass(frozen=True, slots=True)
class BaseModules:
    """The modules of a base that an adapter may target.

    Attributes:
        modules: By their names in the base, in its order.
        weight: Returns a module's weight [d_out, d_in], of an embedding [vocabulary, width]; for `<module>.bias`, its
            bias [d_out]. None if it has none.
        norms: Returns `merged_norms` of a module's weight, given its name and the other arguments; None: by `weight`.
    """

    modules: Mapping[str, Module]
    weight: Callable[[str], torch.Tensor | None]
    norms: Callable[[str, torch.Tensor, torch.Tensor, float], torch.Tensor] | None = None
    _cores: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        """Finds the names that are unique without their prefixes."""
        counts = Counter(map(_core, self.modules))
        cores = {core: name for name in self.modules if counts[core := _core(name)] == 1}
        object.__setattr__(self, "_cores", cores)

    @staticmethod
    def of_sites(
        sites: Iterable[Site],
        weight: Callable[[str], torch.Tensor | None],
        norms: Callable[[str, torch.Tensor, torch.Tensor, float], torch.Tensor] | None = None,
    ) -> BaseModules:
        """The modules of a model that the engine runs."""
        modules = {
            name: Module(site.d_in, width, site.lookup, site.head)
            for site in sites
            for name, width in zip(site.modules, site.widths, strict=True)
        }
        return BaseModules(modules, weight, norms)

    @staticmethod
    def of_model(model: nn.Module, head: nn.Module | None) -> BaseModules:
        """The modules of a transformers model in full precision, which may be on the meta device.

        Args:
            model: The model.
            head: Its output embeddings.
        """
        found = {name: module for name, module in model.named_modules() if _adaptable(module)}

        def weight(name: str) -> torch.Tensor | None:
            module, _, part = name.rpartition(".")
            if part == "bias" and module in found:
                bias: torch.Tensor | None = getattr(found[module], "bias", None)
                return bias
            return weight_of(found[name]) if name in found else None

        return BaseModules({name: _described(module, module is head) for name, module in found.items()}, weight)

    def norms_of(self, module: str, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """`merged_norms` of a module's weight."""
        if self.norms is not None:
            return self.norms(module, a, b, scale)
        weight = self.weight(module)
        assert weight is not None
        return merged_norms(weight, a, b, scale)

    def find(self, path: str) -> tuple[str, str] | None:
        """Finds the module of a tensor in a file by the tensor's name without its part.

        Returns:
            The name in this base, and the name in the model that was trained, to which the config's patterns refer.
        """
        plain = path.removeprefix(PREFIX)
        if plain in self.modules:  # PEFT's form: the common case, with hundreds of names per adapter
            return plain, plain
        trained = _WRAPPERS.sub("", path)
        trained = trained[_PEFT.match(trained).end() :]  # type: ignore[union-attr]  # matches nothing, at least
        if trained in self.modules:
            return trained, trained
        name = self._cores.get(_core(trained))
        return None if name is None else (name, trained)

    def trained_names(self, found: Mapping[str, str]) -> dict[str, str]:
        """The name of each module of the base in the model that was trained.

        Args:
            found: These names for the modules in a file.
        """
        holders = {_holder(name): _holder(trained) for name, trained in found.items() if name != trained}
        return {
            name: found.get(name) or (holders[_holder(name)] + _core(name) if _holder(name) in holders else name)
            for name in self.modules
        }


def merged_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """The norms of the rows of `weight + scale * b @ a`, float32 [d_out], for DoRA (Liu et al. 2024, equation 5)."""
    norms: torch.Tensor = torch.linalg.vector_norm(weight.float() + scale * (b.float() @ a.float()), dim=1)
    return norms


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight [d_out, d_in] of a linear, [vocabulary, width] of an embedding, without a copy."""
    weight: torch.Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.T if _is_conv1d(module) else weight


def _described(module: nn.Module, head: bool) -> Module:
    if isinstance(module, nn.Embedding):
        return Module(module.num_embeddings, module.embedding_dim, lookup=True)
    if isinstance(module, nn.Linear):
        return Module(module.in_features, module.out_features, head=head)
    d_out, d_in = weight_of(module).shape
    return Module(d_in, d_out, head=head)


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear of transformers, which isn't imported here; its weight is [d_in, d_out]."""
    return type(module).__name__ == "Conv1D"


def _holder(name: str) -> str:
    match = _HOLDERS.match(name)
    return match[0] if match else ""


def _core(name: str) -> str:
    return name[len(_holder(name)) :]
