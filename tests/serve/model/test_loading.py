"""How much memory loading takes, and what quantization leaves alone."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from loramill.errors import BaseUnusable, SetupError
from loramill.kernels import Batch
from loramill.kernels.quantization import quantize
from loramill.serve.model import Chunk, load_decoder, load_model

from .models import SMALL

LARGE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
MEASURE = """
import gc, sys
import torch
from loramill.kernels import backend
from loramill.serve.model import load_decoder

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) << 10

dtype = getattr(torch, sys.argv[2])
backend().linear(torch.zeros(1, 64, dtype=dtype), backend().pack(torch.zeros(32, 64, dtype=dtype)))
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
decoder = load_decoder(__import__("pathlib").Path(sys.argv[1]), dtype=dtype)
print(status("VmHWM") - before, status("VmRSS") - before)
"""


def write_zeros(folder, config, dtype):
    """Writes a model folder of zeros; returns their number."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    save_file({name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}, folder / "model.safetensors")
    return sum(shape.numel() for shape in shapes.values())


@pytest.mark.parametrize(
    ("file_dtype", "weight_dtype", "tied", "vocabulary"),
    [(torch.bfloat16, "bfloat16", True, 32000), (torch.float32, "bfloat16", False, 16000)],
)
def test_loading_takes_little_more_than_the_weights(tmp_path, file_dtype, weight_dtype, tied, vocabulary):
    config = LlamaConfig(**LARGE, vocab_size=vocabulary, tie_word_embeddings=tied)
    weights = write_zeros(tmp_path, config, file_dtype) * getattr(torch, weight_dtype).itemsize
    assert weights > 130 << 20
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), weight_dtype], capture_output=True, text=True, check=True
    )
    peak, kept = map(int, done.stdout.split())
    assert weights < kept < 1.1 * weights
    assert peak < 1.3 * weights


@pytest.mark.parametrize("hidden", [64, 48])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_layers_linears_are_quantized_and_nothing_else(tmp_path, kind, hidden):
    torch.manual_seed(1)
    config = Qwen3Config(**SMALL | {"hidden_size": hidden, "intermediate_size": 128}, head_dim=16)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    prompt = list(range(1, 30))

    def logits(model):
        with torch.inference_mode():
            return model(torch.tensor([prompt])).logits[0, -1]

    whole = logits(model)
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                rounded = quantize(module.weight.detach(), kind)
                module.weight.data = rounded if isinstance(rounded, torch.Tensor) else rounded.values(torch.float32)
    decoder = load_decoder(tmp_path, dtype=torch.float32, quantization=kind)
    cache = decoder.new_cache(blocks=2, block_size=16)
    chunk = Chunk(prompt, 0, [0, 1], logits_to_keep=1)
    got = decoder.forward([chunk], cache, decoder.new_slab(1, 1 << 10), Batch.of([(None, len(prompt))]))[0]
    torch.testing.assert_close(got, logits(model), rtol=2e-4, atol=2e-4)
    assert (got - whole).norm() > 0.01 * whole.norm()
    # The weights that DoRA's gain is computed from.
    k_proj = "model.layers.1.self_attn.k_proj"
    assert torch.equal(decoder.target_weight(k_proj), model.get_submodule(k_proj).weight)
    assert torch.equal(decoder.target_weight("lm_head"), model.lm_head.weight)


def test_only_a_base_on_a_gpu_turns_cudnn_attention_off(tmp_path, monkeypatch):
    changes = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", changes.append)
    for device, expected in (("cpu", []), ("cuda", [False])):
        with pytest.raises(BaseUnusable):
            load_decoder(tmp_path, dtype=torch.bfloat16, device=device)
        assert changes == expected


def test_float8_is_refused_where_it_has_no_products(tmp_path, monkeypatch):
    with pytest.raises(SetupError, match=r'needs a GPU, and the engine runs on the CPU.*"int8" or "nf4"'):
        load_model(tmp_path, dtype=torch.bfloat16, quantization="fp8")
    write_zeros(tmp_path, LlamaConfig(**SMALL), torch.bfloat16)
    with pytest.raises(SetupError, match="needs a GPU, and the engine runs on the CPU"):
        load_model(tmp_path, dtype=torch.bfloat16, quantization="fp8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A10G")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(SetupError, match=r'8\.9 \(Ada, Hopper\) or newer, and NVIDIA A10G has 8\.6.*"int8" or "nf4"'):
        load_model(tmp_path, dtype=torch.bfloat16, quantization="fp8", device="cuda")
