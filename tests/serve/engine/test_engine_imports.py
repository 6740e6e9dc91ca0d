"""Kernels, model and engine import where there is nothing but torch, numpy and safetensors."""

import subprocess
import sys

SCRIPT = """
import sys
for name in ("pydantic", "pydantic_settings", "transformers", "ray", "peft", "fastapi", "httpx", "sqlalchemy", "fsspec",
             "datasets", "bitsandbytes", "rich", "typer"):
    sys.modules[name] = None
import loramill.kernels, loramill.serve.model, loramill.serve.engine
import torch
from loramill.kernels import Batch, Delta, Site, Slab, backend, lora
site = Site(2, ("m",), (2,))
slab = Slab([site], slots=1, size=4096, dtype=torch.float32, layout=backend().layout)
adapter = slab.pack({"m": Delta(torch.eye(2), torch.eye(2))})
slot = slab.allocate(adapter.bytes)
slab.load(slot, adapter)
y = torch.zeros(1, 2)
lora(torch.ones(1, 2), y, slab.views[0], Batch.of([(slot, 1)]))
assert y.tolist() == [[1.0, 1.0]]
"""


def test_nothing_else_is_needed():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
