"""Finding a base model: built in, in a local Hugging Face folder, or on a hub.

Nothing here imports torch or transformers until weights are converted or loaded, since the CLI and the gateway look a
base up at every start.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramill.errors import BaseUnusable, DiskFull
from loramill.models import hub, smollm2
from loramill.models.fingerprint import fingerprint, weight_files, weights_hash
from loramill.models.text_model import TEXT_ARCHITECTURES, ensure_text_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from loramill.kernels.peft_folder import BaseModules
    from loramill.kernels.quantization import Nf4Source, Quantization

#: Architectures with a decoder of our own. Other causal language models are served through transformers.
NATIVE_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
)
#: Those of them whose identity contains windows only if they are in use.
_WINDOWS_IN_USE = NATIVE_ARCHITECTURES[:4]
#: Native architectures with experts.
EXPERT_ARCHITECTURES = ("Qwen3MoeForCausalLM",)
_CAUSAL = ("ForCausalLM", "LMHeadModel")

#: Keys of config.json that only affect attention windows, which `fingerprint` regards as unused.
_WINDOWS = ("layer_types", "max_window_layers", "sliding_window", "sliding_window_pattern", "use_sliding_window")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


@dataclass(frozen=True, slots=True)
class Base:
    """A frozen model on which adapters are trained and served.

    Attributes:
        name: the name in the API, without a slash.
        folder: Hugging Face folder with config.json, safetensors and tokenizer; in the cache for the text model of a
            multimodal checkpoint.
        fingerprint: sha256 (hex) of configuration, weights and quantization; independent of the folder.
        architecture: one of `NATIVE_ARCHITECTURES`, or another causal language model of transformers.
        context_length: maximum tokens of prompt and answer together.
        quantization: quantization of the layers' linears, applied when the weights are loaded.
    """

    name: str
    folder: Path
    fingerprint: str
    architecture: str
    context_length: int
    quantization: Quantization = "none"

    @property
    def source(self) -> str:
        """The argument for `from_pretrained`: the hub id of a downloaded base, otherwise the absolute folder."""
        if self.name == smollm2.NAME:
            return smollm2.HUB_ID
        # The hub's cache has folders named models--owner--name.
        cached = (part for part in self.folder.parts if part.startswith("models--"))
        repo = next(cached, "") if self.folder.parent.name == "snapshots" else ""
        return repo.removeprefix("models--").replace("--", "/", 1) or str(self.folder.absolute())


def find_base(name: str, cache: Path, quantization: Quantization = "none") -> Base:
    """Finds, checks and identifies a base; results of costly work are cached under `cache`.

    Args:
        name: "smollm2-135m", a local Hugging Face folder, or a hub id such as "Qwen/Qwen3-0.6B". A model that was
            downloaded before is not downloaded again, so that a base doesn't change under its adapters.
        cache: folder for converted and quantized weights and known hashes; it may be deleted at any time.
        quantization: quantization of its linears for serving and training; a base in fewer bits is another base.

    Raises:
        BaseUnusable: it can't be found, read or served; the message names the fix.
        DiskFull: the disk has no room for the conversion or the download.
    """
    try:
        if name == smollm2.NAME:
            return _identify(name, smollm2.ensure_converted(cache), cache, quantization)
        path = Path(name).expanduser()
        if path.is_dir():
            return _identify(path.resolve().name, path.resolve(), cache, quantization)
        if path.exists():
            raise BaseUnusable(f"The base '{name}' is a file; give the Hugging Face folder it belongs to.")
        if _HUB_ID.fullmatch(name):
            return _from_hub(name, cache, quantization)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"No room for the base '{name}': {error}. Make room, or set `cache` elsewhere.") from error
        raise BaseUnusable(f"The base '{name}' can't be used: {error}. Correct the path or its permissions.") from error
    raise BaseUnusable(
        f"There is no base '{name}': give '{smollm2.NAME}', a folder that exists, or a hub id such as Qwen/Qwen3-0.6B."
    )


def load_for_training(
    base: Base,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    packed: bool | None = None,
    cache: Path | None = None,
) -> PreTrainedModel:
    """Loads a base as a transformers model in `dtype`, frozen and in eval mode.

    The linears of a quantized base have exactly the values that the engine serves with, in `dtype`. They are moved to
    the device and quantized there one by one, while the files' weights stay mapped: the host never holds a copy of the
    base, and weights that are in the cache are not read.

    Args:
        device: where the model goes.
        packed: keep NF4 in four bits, as bitsandbytes' Linear4bit with doubly quantized scales (QLoRA), which computes
            with the same values. None: on a GPU; on a CPU, unpacking takes several times as long as multiplying.
        cache: folder for weights in NF4 (`loramill.models.nf4_cache`); None: they are quantized at each call.

    Raises:
        BaseUnusable: the weights don't fit the configuration or can't be read.
        SetupError: the base is in NF4, and bitsandbytes isn't installed.
    """
    from safetensors import SafetensorError
    from torch import device as torch_device
    from transformers import AutoModelForCausalLM

    to = torch_device(device)
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BaseUnusable(f"The base '{base.name}' in {base.folder} can't be loaded: {error}") from error
    if base.quantization != "none":
        _quantize_linears(model, base, to, to.type == "cuda" if packed is None else packed, cache)
    return model.requires_grad_(False).eval().to(to)


def nf4_source(base: Base, device: torch.device, cache: Path | None) -> Nf4Source:
    """Returns a base's weights in NF4 on a device, from the cache if there is one."""
    from loramill.kernels.quantization import nf4_without_cache
    from loramill.models.nf4_cache import Nf4Cache

    return nf4_without_cache if cache is None else Nf4Cache(cache, base.fingerprint, device).pack


def _quantize_linears(
    model: PreTrainedModel, base: Base, device: torch.device, packed: bool, cache: Path | None
) -> None:
    """Quantizes the linears except the head on the device, one by one.

    GPT-2's Conv1D has a transposed weight. It is not packed, but gets the quantized values.
    """
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    from loramill.kernels.quantization import dequantize, nf4_linear, quantize, unpack_nf4

    to_nf4, head = nf4_source(base, device, cache), model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear | Conv1D) or module is head:
            continue
        transposed, weight = isinstance(module, Conv1D), module.weight.data
        read = partial((weight.T if transposed else weight).to, device)
        if base.quantization == "nf4" and packed and not transposed:
            model.set_submodule(name, nf4_linear(module, to_nf4(name, read)))
            continue
        quantized = unpack_nf4(to_nf4(name, read)) if base.quantization == "nf4" else quantize(read(), "int8")
        values = dequantize(quantized, weight.dtype)
        module.weight.data = values.T.contiguous() if transposed else values


def base_modules(base: Base) -> BaseModules:
    """The modules of a base that adapters may target; weights are read from its files when they are needed.

    Raises:
        BaseUnusable: transformers can't build it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from loramill.kernels.peft_folder import BaseModules

    try:
        config = AutoConfig.from_pretrained(base.folder, local_files_only=True)
        with quiet_transformers(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise BaseUnusable(f"transformers can't build '{base.name}' from its config.json: {error}") from error
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {name: module for name, module in model.named_modules() if module in (embedding, head)}
    tied = {name for name, module in names.items() if module is head and head.weight is embedding.weight}
    of_embedding = next(name for name, module in names.items() if module is embedding)
    found = BaseModules.of_model(model, head)
    return BaseModules(found.modules, lambda name: _read_weight(base, of_embedding if name in tied else name))


def _read_weight(base: Base, name: str) -> torch.Tensor | None:
    """A module's weight, or its bias by `<module>.bias`, from the base's files; None if they don't contain it."""
    from safetensors import safe_open

    tensor = name if name.endswith(".bias") else f"{name}.weight"
    for path in weight_files(base.folder):
        with safe_open(path, framework="pt") as file:
            if tensor in file.keys():  # noqa: SIM118  # it has no __contains__
                found: torch.Tensor = file.get_tensor(tensor)
                return found
    return None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides the progress bars and warnings of transformers; errors are still shown."""
    from torch import cuda
    from transformers.utils import logging

    if not cuda.is_available():  # transformers imports DeepSpeed, which would report that on stdout
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _identify(name: str, folder: Path, cache: Path, quantization: Quantization) -> Base:
    """Checks a Hugging Face folder and computes its identity."""
    config = _read_config(folder)
    if next(iter(config.get("architectures") or ()), None) in TEXT_ARCHITECTURES:
        folder = ensure_text_model(folder, config, cache)
        config = _read_config(folder)
    architecture = _check_architecture(config, folder)
    if architecture in EXPERT_ARCHITECTURES and quantization != "none":
        raise BaseUnusable(
            f"{folder} is a mixture of experts, and experts can't be quantized: leave the setting `quantization` out."
        )
    context = context_length(config)
    if context is None:
        raise BaseUnusable(f"{folder / 'config.json'} has no number in max_position_embeddings; add it.")
    files = weight_files(folder)
    if not (folder / "tokenizer.json").is_file():
        raise BaseUnusable(
            f"{folder} has no tokenizer.json; write one with "
            "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` of transformers."
        )
    return Base(
        name=re.sub(r"[^a-z0-9._-]+", "-", name.lower()),
        folder=folder,
        fingerprint=fingerprint(_identity(config, architecture), weights_hash(files, cache), quantization),
        architecture=architecture,
        context_length=context,
        quantization=quantization,
    )


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise BaseUnusable(f"{folder} has no config.json: it is not a Hugging Face model folder.")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise BaseUnusable(f"{path} is not JSON: {error}. Copy or download the folder again.") from error
    if not isinstance(config, dict):
        raise BaseUnusable(f"{path} does not contain a JSON object. Copy or download the folder again.")
    return config


def _check_architecture(config: Mapping[str, Any], folder: Path) -> str:
    """The architecture, if it can be served."""
    architecture = next(iter(config.get("architectures") or ()), None)
    if not str(architecture).endswith(_CAUSAL):
        raise BaseUnusable(
            f"{folder} is a {architecture or 'model without architecture'}; causal language models can be served: "
            f"{', '.join(NATIVE_ARCHITECTURES)}, and others of transformers."
        )
    if config.get("quantization_config"):
        raise BaseUnusable(f"{folder} contains quantized weights; give the model's original folder.")
    return str(architecture)


def context_length(config: Mapping[str, Any]) -> int | None:
    """The context length of a base with this config.json, in tokens; None if the config has none.

    With longrope, only the length of the original training counts: beyond it, all frequencies change with the longest
    sequence of a batch, and the keys of a sequence would depend on the other sequences.
    """
    context = config.get("max_position_embeddings") or config.get("n_positions")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if "longrope" in (rope.get("rope_type"), rope.get("type")):
        context = config.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", context))
    return context if isinstance(context, int) else None


def _identity(config: Mapping[str, Any], architecture: str) -> Mapping[str, Any]:
    """The config for a fingerprint: with windows that are in use, and with the keys that are false where the default of
    another family may be true."""
    if architecture in _WINDOWS_IN_USE:
        return (
            {**config, "windows": {key: config.get(key) for key in _WINDOWS}}
            if _uses_sliding_window(config)
            else config
        )
    windows = {key: config.get(key) for key in _WINDOWS}
    return {**config, "windows": windows, "off": sorted(key for key, value in config.items() if value is False)}


def _uses_sliding_window(config: Mapping[str, Any]) -> bool:
    """Whether a sliding window is enabled that may be shorter than the context."""
    mistral = config["architectures"][0] == "MistralForCausalLM"
    if not mistral and (not config["architectures"][0].startswith("Qwen") or not config.get("use_sliding_window")):
        return False
    window = config.get("sliding_window", 4096)
    return window is not None and bool(window < (context_length(config) or 0))


def _from_hub(repo: str, cache: Path, quantization: Quantization) -> Base:
    """A hub's model from an earlier download, or downloads it."""
    name = repo.rpartition("/")[2]
    if (folder := hub.cached_snapshot(repo, _HUB_FILES)) is not None:
        with suppress(BaseUnusable):  # an interrupted download, which is completed below
            return _identify(name, folder, cache, quantization)
    return _identify(name, hub.download_snapshot(repo, _HUB_FILES), cache, quantization)
