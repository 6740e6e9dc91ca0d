"""The fallback: any causal language model of transformers, with the same paged KV cache and adapters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from loramill.errors import BaseUnusable, SetupError
from loramill.kernels import (
    Backend,
    Batch,
    KVSpan,
    LayerKV,
    Pages,
    Quantized,
    Site,
    Slab,
    Weight,
    backend,
    torch_backend,
)
from loramill.kernels.peft_folder import merged_norms
from loramill.kernels.quantization import Nf4Source, Quantization, nf4_without_cache, quantize, unpack_nf4
from loramill.serve.model.config import read_raw_config
from loramill.serve.model.hf_step import (
    ATTENTION,
    AttentionShape,
    HFStep,
    ProbeStep,
    adapt_linear,
    adapt_lookup,
    attend,
    in_step,
)
from loramill.serve.model.protocol import Chunk, logits_rows

#: Kinds of layers that paged attention supports.
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
#: Number of tokens of the trial, and the allowed error of its logits relative to their norm: far below that of a bug.
_TRIAL = 20
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def load_hf(
    folder: Path,
    *,
    dtype: torch.dtype,
    quantization: Quantization = "none",
    threads: int | None = None,
    nf4_source: Nf4Source = nf4_without_cache,
) -> HuggingFaceModel:
    """Loads a base through transformers, and verifies on a few tokens that its logits equal those of transformers.

    Args:
        folder: A Hugging Face model.
        dtype: bfloat16 or float32, whatever the files contain.
        quantization: Of the linears other than the head; everything else stays in `dtype`.
        threads: Number of CPU threads, for the whole process; None: unchanged.
        nf4_source: Returns a module's weight in NF4, from a cache or quantized.

    Raises:
        BaseUnusable: transformers can't load it, or it does not work with a paged cache or mixed batches.
        SetupError: NF4 was requested, and bitsandbytes isn't installed.
    """
    if read_raw_config(folder).get("quantization_config"):
        raise BaseUnusable(f"The weights in {folder} are already quantized; use the model's original folder.")
    ops = backend()
    if threads is not None:
        ops.set_threads(threads)
    try:
        with _without_progress_bars(), torch.inference_mode():
            model = _open(folder, dtype)
            expected = _reference(model)
            loaded = HuggingFaceModel(model, ops)
            _verify(loaded, expected)
            if quantization != "none":
                loaded.quantize(quantization, nf4_source)
    except BaseUnusable as error:
        raise BaseUnusable(f"{folder} can't be served through transformers: {error.message}") from error
    except SetupError:
        raise
    except Exception as error:
        # The code of any architecture, with a config of unknown origin, may fail in any way.
        raise BaseUnusable(f"{folder} can't be served through transformers: {error!r}.") from error
    return loaded


class HuggingFaceModel:
    """A frozen transformers model; implements `Model`.

    Attributes:
        vocabulary, context_length, dtype, sites: See `Model`.
    """

    def __init__(self, model: Any, ops: Backend) -> None:
        """Adapts the model, which from then on runs only within steps.

        Raises:
            BaseUnusable: Its layers are not all plain attention.
        """
        self.context_length = _context_length(model.config.get_text_config())
        self.dtype: torch.dtype = model.dtype
        self._model = model
        self._ops = ops
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        model.set_attn_implementation(ATTENTION)
        survey, seen, self.vocabulary = self._probe()
        self._attentions = survey.attentions
        _check_windows(model.config.get_text_config(), list(self._attentions.values()))
        self._weights: dict[str, Callable[[], torch.Tensor]] = {}
        self.sites = tuple(self._adapt(index, *found) for index, found in enumerate(seen))

    def new_cache(self, blocks: int, block_size: int) -> tuple[LayerKV, ...]:
        """An empty KV cache of `blocks` blocks, each of `block_size` positions, for `forward`."""
        return tuple(
            torch_backend.new_kv(1, blocks, block_size, a.kv_heads, a.head_dim, self.dtype)[0]
            for a in self._attentions.values()
        )

    def new_slab(self, slots: int, size: int, bits: int = 16) -> Slab:
        """An empty slab of `slots` adapters in `size` bytes for `forward`; int8 if `bits` is 8."""
        dtype = torch.int8 if bits == 8 else self.dtype
        return Slab(self.sites, slots=slots, size=size, dtype=dtype, layout=self._ops.layout)

    def target_weight(self, module: str) -> torch.Tensor | None:
        """The weight of a module, or its bias for `<module>.bias`; None if adapters can't target the module."""
        return self._weights[module]() if module in self._weights else None

    def merged_norms(self, module: str, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """See `Model.merged_norms`."""
        return merged_norms(self._weights[module](), a, b, scale)

    def prepare(self, run_steps: Callable[[], None]) -> None:
        """See `Model.prepare`."""
        run_steps()

    @property
    def failed_captures(self) -> int:
        """See `Model.failed_captures`."""
        return 0

    @property
    def asynchronous(self) -> bool:
        """See `Model.asynchronous`."""
        return False

    @torch.inference_mode()
    def forward(
        self,
        chunks: Sequence[Chunk],
        cache: Sequence[LayerKV],
        slab: Slab,
        batch: Batch,
        tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs one step over the chunks' tokens; see `Model.forward`."""
        spans = [KVSpan(chunk.start, len(chunk.tokens), chunk.block_table) for chunk in chunks]
        pages, kept_rows = Pages.of(spans, cache[0].block_size), logits_rows(chunks)
        step = HFStep(pages, slab, batch, kept_rows, dict(zip(self._attentions, cache, strict=True)))
        if tokens is None:
            tokens = torch.tensor([token for chunk in chunks for token in chunk.tokens])
        with in_step(step):
            return self._logits(
                tokens, torch.from_numpy(pages.positions).long(), torch.tensor(kept_rows, dtype=torch.long)
            )

    def _logits(self, tokens: torch.Tensor, positions: torch.Tensor, kept_rows: torch.Tensor) -> torch.Tensor:
        kept = {"logits_to_keep": kept_rows} if self._keeps else {}
        out = self._model(input_ids=tokens[None], position_ids=positions[None], use_cache=False, **kept)
        logits: torch.Tensor = out.logits[0] if self._keeps else out.logits[0, kept_rows]
        return logits.float()

    def _probe(self) -> tuple[ProbeStep, list[tuple[str, nn.Module]], int]:
        """Finds the attention modules, the modules that adapters can target, and the vocabulary.

        A linear can have adapters if it sees every row of the step, or every row that needs logits. A vision tower's
        linears see none; an expert's see those that a router selected.
        """
        rows, kept_rows = 11, torch.tensor([2, 4])
        head = self._model.get_output_embeddings()
        seen: dict[nn.Module, bool] = {}

        def record_input(module: nn.Module, args: tuple[Any, ...], _: Any) -> None:
            x = args[0] if args else None
            if not isinstance(x, torch.Tensor) or module in seen:
                seen[module] = False
            elif isinstance(module, nn.Embedding):
                seen[module] = x.dtype == torch.int64 and x.shape == (1, rows)
            else:
                at_head = module is head and x.shape[:-1] == (1, len(kept_rows))
                seen[module] = x.dtype == self.dtype and (x.shape[:-1] in ((1, rows), (rows,)) or at_head)

        modules = {module: name for name, module in self._model.named_modules() if _adaptable(module)}
        hooks = [module.register_forward_hook(record_input) for module in modules]
        survey = ProbeStep()
        with in_step(survey):
            logits = self._logits(torch.arange(rows), torch.arange(rows), kept_rows)
        for hook in hooks:
            hook.remove()
        if not survey.attentions or logits.shape[0] != len(kept_rows):
            raise BaseUnusable(f"{type(self._model).__name__} doesn't take its attention from transformers' registry.")
        return survey, [(name, module) for module, name in modules.items() if seen.get(module)], logits.shape[1]

    def _adapt(self, index: int, name: str, module: Any) -> Site:
        if isinstance(module, nn.Embedding):
            self._weights[name] = lambda: module.weight
            adapt_lookup(module, index)
            return Site(module.num_embeddings, (name,), (module.embedding_dim,), lookup=True)
        # GPT-2's Conv1D has a transposed weight.
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
        self._weights[name] = lambda: weight
        if module.bias is not None:
            self._weights[f"{name}.bias"] = lambda: module.bias
        adapt_linear(module, partial(_linear, weight), module.bias, index, self._ops)
        head = module is self._model.get_output_embeddings()
        return Site(weight.shape[1], (name,), (weight.shape[0],), head=head)

    def quantize(self, kind: Literal["int8", "nf4"], nf4_source: Nf4Source) -> None:
        """Quantizes the weights of all linears that adapters can target except the head, and frees the originals."""
        for index, site in enumerate(self.sites):
            name = site.modules[0]
            module = self._model.get_submodule(name)
            if not site.lookup and module is not self._model.get_output_embeddings():
                read = self._weights[name]
                rounded = unpack_nf4(nf4_source(name, read)) if kind == "nf4" else quantize(read(), kind)
                packed = _packed(rounded, module.weight.dtype, self._ops)
                self._weights[name] = partial(self._ops.embed, torch.arange(packed.d_out), packed)
                adapt_linear(module, partial(_quantized_linear, packed, self._ops), module.bias, index, self._ops)
                module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)


def _linear(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)


def _quantized_linear(weight: Weight, ops: Backend, x: torch.Tensor) -> torch.Tensor:
    return ops.linear(x, weight)


def _packed(rounded: Quantized | torch.Tensor, dtype: torch.dtype, ops: Backend) -> Weight:
    if isinstance(rounded, Quantized):
        return ops.pack_quantized(rounded, dtype)
    return ops.pack(rounded.to(dtype))


def _adaptable(module: nn.Module) -> bool:
    """Whether PEFT's adapter of a module computes the same as ours; a subclass may compute something else."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Embedding):
        return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _open(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", local_files_only=True, trust_remote_code=False
    )
    return model.requires_grad_(False).eval()


def _reference(model: Any) -> torch.Tensor:
    """transformers' own logits [tokens, vocabulary] of the trial."""
    logits: torch.Tensor = model(input_ids=torch.arange(_TRIAL)[None], use_cache=False).logits[0]
    return logits.float()


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _context_length(config: Any) -> int:
    """As `loramill.models.catalog.context_length`: for longrope, the part in which its frequencies are constant."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope["original_max_position_embeddings"])
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int):
        raise BaseUnusable("max_position_embeddings in its config is not a number.")
    return context


def _check_windows(config: Any, attentions: list[AttentionShape]) -> None:
    """Refuses layers that do not pass their window to the attention function: the trial is too short to detect them."""
    kinds = list(getattr(config, "layer_types", None) or ())
    if set(kinds) - _KNOWN_LAYERS or getattr(config, "attention_chunk_size", None):
        raise BaseUnusable(f"its layers are {sorted(set(kinds))}; {sorted(_KNOWN_LAYERS)} are supported.")
    passed = sum(attention.window is not None for attention in attentions)
    expected = kinds.count("sliding_attention")
    if not kinds and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        expected = 1
    if passed < expected:
        raise BaseUnusable(f"{expected} of its layers have a sliding window, but {passed} pass it to the attention.")


def _verify(model: HuggingFaceModel, expected: torch.Tensor) -> None:
    """Runs the trial in two chunks, batched with another sequence, and compares the logits."""
    tokens, size = list(range(_TRIAL)), 16
    cache, slab = model.new_cache(4, size), model.new_slab(1, 0)
    got = []
    for part in (slice(0, 7), slice(7, _TRIAL)):
        other = Chunk(tokens[part][::-1], part.start, [2, 0], logits_to_keep=0)
        chunk = Chunk(tokens[part], part.start, [3, 1], logits_to_keep=len(tokens[part]))
        got.append(model.forward([other, chunk], cache, slab, Batch.of([(None, 2 * len(tokens[part]))])))
    error = ((torch.cat(got) - expected).norm() / expected.norm()).item()
    if not error < _TOLERANCE[model.dtype]:
        raise BaseUnusable(
            f"the logits of a prompt in two chunks differ from those in one by {error:.2g} of their norm: the model "
            "keeps something other than keys and values between tokens."
        )
