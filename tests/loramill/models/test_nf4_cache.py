"""A base's linears in NF4 are quantized once per machine."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import save_file

from loramill.kernels.quantization import PackedNf4, dequantize, pack_nf4, quantize, unpack_nf4
from loramill.models import nf4_cache
from loramill.models.catalog import Base, load_for_training, nf4_source
from loramill.models.nf4_cache import KEPT, Nf4Cache
from loramill.serve.model import load_decoder, loading

from ...llama import tiny_llama, write_base

CPU = torch.device("cpu")
#: Whole blocks of NF4, and blocks across rows.
SHAPES = [(24, 128), (10, 80)]
Quantizer = Callable[..., Any]


def random_weight(shape: tuple[int, int] = (24, 128), seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def unused() -> torch.Tensor:
    raise AssertionError("The weight was read.")


def assert_equal(first: PackedNf4, second: PackedNf4) -> None:
    assert torch.equal(first.codes, second.codes)
    assert all(map(torch.equal, first.tensors().values(), second.tensors().values()))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantize(unpack_nf4(first), dtype), dequantize(unpack_nf4(second), dtype))


@pytest.fixture
def no_quantizer(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes bitsandbytes' quantizer fail from the call on."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("The quantizer ran.")

    return lambda: monkeypatch.setattr(functional, "quantize_4bit", fail)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_from_the_disk_are_the_quantizers(
    tmp_path: Path, shape: tuple[int, int], no_quantizer: Callable[[], None]
) -> None:
    weight = random_weight(shape)
    expected = pack_nf4(weight)
    assert_equal(Nf4Cache(tmp_path, "f" * 64, CPU).pack("q_proj", lambda: weight), expected)
    no_quantizer()
    assert_equal(Nf4Cache(tmp_path, "f" * 64, CPU).pack("q_proj", unused), expected)
    assert [file.name for file in (tmp_path / "nf4" / ("f" * 64 + "-2")).iterdir()] == ["q_proj.safetensors"]


def test_another_base_or_format_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, (fingerprint, version) in enumerate([("a" * 64, 1), ("b" * 64, 1), ("a" * 64, 3)]):
        monkeypatch.setattr(nf4_cache, "FORMAT", version)
        weight = random_weight(seed=seed)
        found = Nf4Cache(tmp_path, fingerprint, CPU).pack("q_proj", lambda weight=weight: weight)
        assert_equal(found, pack_nf4(weight))


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def lose_the_end(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def lose_pages(file: Path) -> None:
    size = file.stat().st_size
    os.truncate(file, size - 500)
    os.truncate(file, size)


def lose_the_checksum(file: Path) -> None:
    save_file({"weight": torch.zeros(3)}, file)


@pytest.mark.parametrize("damage", [flip_a_bit, lose_the_end, lose_pages, lose_the_checksum, Path.touch])
def test_a_damaged_file_is_made_anew(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture, no_quantizer: Callable[[], None]
) -> None:
    weight = random_weight()
    expected = Nf4Cache(tmp_path, "f" * 64, CPU).pack("q_proj", lambda: weight)
    file = next(tmp_path.rglob("*.safetensors"))
    if damage is Path.touch:
        file.write_bytes(b"")
    damage(file)
    with caplog.at_level(logging.WARNING):
        assert_equal(Nf4Cache(tmp_path, "f" * 64, CPU).pack("q_proj", lambda: weight), expected)
    assert len(caplog.records) == 1 and "is damaged" in caplog.text and str(file) in caplog.text
    no_quantizer()
    assert_equal(Nf4Cache(tmp_path, "f" * 64, CPU).pack("q_proj", unused), expected)


@pytest.mark.parametrize("other", [("f" * 64, "k_proj"), ("e" * 64, "q_proj")], ids=["module", "base"])
def test_a_file_of_another_module_or_base_is_made_anew(
    tmp_path: Path, other: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    weight = random_weight()
    Nf4Cache(tmp_path, other[0], CPU).pack(other[1], lambda: random_weight(seed=1))
    wrong = next(tmp_path.rglob("*.safetensors"))
    file = tmp_path / "nf4" / ("f" * 64 + "-2") / "q_proj.safetensors"
    file.parent.mkdir(exist_ok=True)
    wrong.rename(file)
    assert_equal(Nf4Cache(tmp_path, "f" * 64, CPU).pack("q_proj", lambda: weight), pack_nf4(weight))
    assert "its base, module or checksum does not match" in caplog.text
    assert_equal(Nf4Cache(tmp_path, "f" * 64, CPU).pack("q_proj", unused), pack_nf4(weight))


def test_other_users_can_read_the_files(tmp_path: Path) -> None:
    Nf4Cache(tmp_path, "f" * 64, CPU).pack("q_proj", random_weight)
    assert next(tmp_path.rglob("*.safetensors")).stat().st_mode & 0o777 == 0o644


def test_all_processes_use_the_codes_that_were_written_first(tmp_path: Path) -> None:
    first, second = random_weight(seed=1), random_weight(seed=2)
    expected: list[PackedNf4] = []

    def overtaken() -> torch.Tensor:
        expected.append(Nf4Cache(tmp_path, "f" * 64, CPU).pack("q_proj", lambda: first))
        return second

    assert_equal(Nf4Cache(tmp_path, "f" * 64, CPU).pack("q_proj", overtaken), expected[0])
    assert len(list(tmp_path.rglob("*"))) == 3  # two folders and the file


def test_without_a_place_to_write_each_start_quantizes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "nf4").touch()
    cache, weight = Nf4Cache(tmp_path, "f" * 64, CPU), random_weight()
    with caplog.at_level(logging.WARNING):
        for name in ("q_proj", "k_proj"):
            assert_equal(cache.pack(name, lambda: weight), pack_nf4(weight))
    assert len([record for record in caplog.records if "every start quantizes" in record.message]) == 1


def test_the_bases_that_were_used_last_are_kept(tmp_path: Path) -> None:
    weight, now, root = random_weight((2, 64)), time.time(), tmp_path / "nf4"
    for age, name in enumerate("abcd"):
        Nf4Cache(tmp_path, name, CPU).pack("q_proj", lambda: weight)
        os.utime(root / f"{name}-2", (now - 100 + age, now - 100 + age))
    # `a` goes with the next base.
    Nf4Cache(tmp_path, "b", CPU).pack("q_proj", unused)
    Nf4Cache(tmp_path, "e", CPU).pack("q_proj", lambda: weight)
    assert sorted(folder.name for folder in root.iterdir()) == ["b-2", "d-2", "e-2"] and KEPT == 3


def test_other_formats_and_files_of_killed_processes_go_with_the_next_base(tmp_path: Path) -> None:
    weight = random_weight((2, 64))
    Nf4Cache(tmp_path, "a", CPU).pack("q_proj", lambda: weight)
    (tmp_path / "nf4/a-0").mkdir()
    killed, running = (tmp_path / "nf4/a-2" / f".{name}" for name in ("killed", "running"))
    for file in (killed, running):
        file.touch()
    os.utime(killed, (time.time() - 4000, time.time() - 4000))
    Nf4Cache(tmp_path, "b", CPU).pack("q_proj", lambda: weight)
    names = [str(file.relative_to(tmp_path / "nf4")) for file in (tmp_path / "nf4").glob("*/*")]
    assert sorted(names) == ["a-2/.running", "a-2/q_proj.safetensors", "b-2/q_proj.safetensors"]
    assert not (tmp_path / "nf4/a-0").exists()


@pytest.fixture(scope="module", params=[64, 80], ids=["whole blocks", "blocks across rows"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    model = tiny_llama(vocab_size=64, hidden_size=request.param, intermediate_size=2 * request.param)
    folder = write_base(tmp_path_factory.mktemp("base"), model)
    return Base("tiny", folder, "c" * 64, "LlamaForCausalLM", 256, "nf4")


def test_the_second_start_reads_neither_weights_nor_quantizer(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_quantizer: Callable[[], None]
) -> None:
    uncached = load_for_training(base, torch.bfloat16)
    trained = load_for_training(base, torch.bfloat16, cache=tmp_path)
    assert all(map(torch.equal, uncached.parameters(), trained.parameters()))
    no_quantizer()
    again = load_for_training(base, torch.bfloat16, cache=tmp_path)
    assert all(map(torch.equal, trained.parameters(), again.parameters()))
    packed = load_for_training(base, torch.bfloat16, packed=True, cache=tmp_path)
    taken: list[str] = []
    take = loading.Tensors.take
    monkeypatch.setattr(
        loading.Tensors, "take", lambda self, name, *shape: taken.append(name) or take(self, name, *shape)
    )
    source = nf4_source(base, CPU, tmp_path)
    served = load_decoder(base.folder, dtype=torch.bfloat16, quantization="nf4", nf4_source=source)
    assert taken and not any("_proj" in name for name in taken)
    for name, module in trained.named_modules():
        if name.endswith("_proj"):
            assert torch.equal(served.target_weight(name), module.weight)
            state = packed.get_submodule(name).weight.quant_state
            assert torch.equal(functional.dequantize_4bit(packed.get_submodule(name).weight.data, state), module.weight)


def test_each_linear_is_quantized_where_the_model_goes(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[str] = []
    to = torch.Tensor.to

    def moved(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and args[0] == torch.device("cuda"):
            devices.append("cuda")
            args = (CPU, *args[1:])
        return to(self, *args, **kwargs)

    quantized: list[int] = []
    original: Quantizer = functional.quantize_4bit
    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    monkeypatch.setattr(
        functional, "quantize_4bit", lambda *args, **kwargs: quantized.append(len(devices)) or original(*args, **kwargs)
    )
    model = load_for_training(base, torch.bfloat16, device="cuda")
    assert quantized == list(range(1, 15))  # each is moved right before it is quantized
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


def test_the_files_weights_stay_mapped_and_are_not_copied(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_mapped(tensor: torch.Tensor) -> bool:
        lines = Path("/proc/self/maps").read_text().splitlines()
        ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(base.folder / "model.safetensors"))]
        return any(int(start, 16) <= tensor.data_ptr() < int(end, 16) for start, end in ranges)

    mapped: list[bool] = []

    def pack(_self: Nf4Cache, _name: str, weight: Callable[[], torch.Tensor]) -> PackedNf4:
        mapped.append(is_mapped(weight()))
        return pack_nf4(weight())

    monkeypatch.setattr(Nf4Cache, "pack", pack)
    load_for_training(base, torch.float32, packed=True, cache=tmp_path)
    assert len(mapped) == 14 and all(mapped)


def test_quantizing_is_packing_and_unpacking() -> None:
    weight = random_weight()
    assert torch.equal(
        dequantize(quantize(weight, "nf4"), torch.float32), dequantize(unpack_nf4(pack_nf4(weight)), torch.float32)
    )
