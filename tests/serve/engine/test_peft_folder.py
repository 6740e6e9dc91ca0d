"""The parts of PEFT's format that are served compute what PEFT computes; the others are refused by name."""

import json
import shutil

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loramill.errors import AdapterInvalid
from loramill.kernels.peft_folder import GAINS_FILE, BaseModules
from loramill.kernels.peft_folder import read_adapter as read

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def read_adapter(folder, model, **options):
    return read(folder, BaseModules.of_sites(model.sites, model.target_weight), **options)


@pytest.fixture
def folder(adapters, tmp_path):
    return shutil.copytree(adapters["lora"], tmp_path / "adapter")


def base_of(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


def assert_as_in_peft(folder, tiny, tiny_folder):
    """Every module of the folder computes what it does in PEFT; returns the deltas."""
    model = PeftModel.from_pretrained(base_of(tiny_folder), folder).eval()
    adapted = {
        path.removeprefix("base_model.model."): module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    deltas = read_adapter(folder, tiny)
    for path, module in adapted.items():
        weight = tiny.target_weight(path)
        with torch.inference_mode():
            if isinstance(module.get_base_layer(), torch.nn.Embedding):
                x = torch.tensor([3, 0, 99])
                expected, y = module(x), weight[x]
                x = torch.nn.functional.one_hot(x, len(weight)).float()
            else:
                x = torch.randn(5, weight.shape[1])
                expected, y = module(x), x @ weight.T
        if path in deltas:
            delta = deltas[path]
            assert delta.lookup == isinstance(module.get_base_layer(), torch.nn.Embedding)
            assert not torch.allclose(expected, y, atol=1e-2)
            y = y + x @ delta.a.T @ delta.b.T * delta.scale
            y = y if delta.gain is None else delta.gain * y
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    tiny.new_slab(1, 1 << 20).pack(deltas)
    assert set(deltas) <= set(adapted)
    return deltas, adapted


@pytest.mark.parametrize("name", ["lora", "all", "rslora", "patterns", "dora", "one layer"])
def test_every_module_computes_what_it_does_in_peft(adapters, tiny, tiny_folder, name):
    deltas, adapted = assert_as_in_peft(adapters[name], tiny, tiny_folder)
    assert set(deltas) == set(adapted)


def test_the_first_pattern_that_matches_counts_in_any_spelling(tiny, tiny_folder, tmp_path):
    config = LoraConfig(
        r=2,
        lora_alpha=7,
        target_modules=["q_proj", "v_proj", "up_proj", "gate_proj"],
        # In the order in which PEFT saves them.
        rank_pattern={
            "(up|gate)_proj": 5,
            "layers.1.self_attn.q_proj": 9,
            "model.layers.0.self_attn.v_proj": 6,
            "self_attn.q_proj": 3,
            "up_proj": 4,
            "v_proj": 8,
        },
        alpha_pattern={"up_proj": 3, r".*\.mlp\.(up|gate)_proj": 11},
        init_lora_weights=False,
    )
    get_peft_model(base_of(tiny_folder), config).save_pretrained(tmp_path)
    deltas, _ = assert_as_in_peft(tmp_path, tiny, tiny_folder)
    assert {module[13:]: len(delta.a) for module, delta in deltas.items()} == {
        "0.self_attn.q_proj": 3,
        "1.self_attn.q_proj": 9,
        "0.self_attn.v_proj": 6,
        "1.self_attn.v_proj": 8,
        **{f"{layer}.mlp.{part}_proj": 5 for layer in (0, 1) for part in ("up", "gate")},
    }


def test_dora_in_lower_precision_is_normed_in_float32(adapters, tiny, tmp_path):
    folder = shutil.copytree(adapters["dora"], tmp_path / "adapter")
    exact = read_adapter(folder, tiny)
    change_weights(folder, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    for module, delta in read_adapter(folder, tiny).items():
        assert delta.gain.dtype == torch.float32
        torch.testing.assert_close(delta.gain, exact[module].gain, rtol=2e-2, atol=0)


@pytest.mark.parametrize("dora", [False, True])
def test_heads_and_embeddings_are_read_with_the_base_layers_peft_saves(tiny, tiny_folder, tmp_path, dora):
    targets = ["lm_head", "v_proj"] if dora else ["embed_tokens", "lm_head", "v_proj"]
    config = LoraConfig(r=4, lora_alpha=9, target_modules=targets, init_lora_weights=False, use_dora=dora)
    get_peft_model(base_of(tiny_folder), config).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any("base_layer" in name for name in saved)
    deltas, _ = assert_as_in_peft(tmp_path, tiny, tiny_folder)
    assert {module.rpartition(".")[2] for module in deltas} == set(targets)
    assert not dora or deltas["lm_head"].gain is not None

    def lower(tensors):
        tensors.update({name: t.bfloat16() for name, t in tensors.items() if "base_layer" in name})

    change_weights(tmp_path, lower)
    assert set(read_adapter(tmp_path, tiny)) == set(deltas)

    def disturb(tensors):
        name = next(name for name in tensors if "lm_head.base_layer" in name)
        tensors[name][3, 3] += 1

    change_weights(tmp_path, disturb)
    with pytest.raises(AdapterInvalid, match=r"its own base layer 'lm_head', which is not this base's"):
        read_adapter(tmp_path, tiny)


def test_embeddings_that_peft_saves_untargeted_are_compared_too(tiny, tiny_folder, tmp_path):
    model = get_peft_model(base_of(tiny_folder), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")
    assert len(read_adapter(tmp_path, tiny)) == 2
    change_weights(tmp_path, lambda tensors: tensors["base_model.model.lm_head.weight"].zero_())
    with pytest.raises(AdapterInvalid, match="'lm_head'"):
        read_adapter(tmp_path, tiny)


def test_dora_on_an_embedding_is_refused(tiny, tiny_folder, tmp_path):
    config = LoraConfig(target_modules=["embed_tokens", "q_proj"], use_dora=True)
    get_peft_model(base_of(tiny_folder), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterInvalid, match=r"DoRA on the embedding 'model\.embed_tokens'|lora_embedding"):
        read_adapter(tmp_path, tiny)


def save_adalora(model, folder, *, prune: bool, alpha: int = 20):
    torch.manual_seed(5)
    config = AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=alpha, target_modules=["q_proj", "down_proj"], total_step=10
    )
    adapted = get_peft_model(model, config)
    pattern = {}
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
        if "lora_E" in name:
            keep = [True, False, True, True, False, True]
            if "layers.1.mlp" in name:
                keep = [False] * 6
            parameter.data.mul_(torch.tensor(keep)[:, None])
            pattern[name.removeprefix("base_model.model.")] = keep
    if prune:
        adapted.peft_config["default"].rank_pattern = pattern
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prune", [False, True])
def test_raw_adalora_loses_its_dead_ranks_and_nothing_else(tiny, tiny_folder, tmp_path, prune):
    folder = save_adalora(base_of(tiny_folder), tmp_path, prune=prune)
    deltas, adapted = assert_as_in_peft(folder, tiny, tiny_folder)
    assert set(adapted) - set(deltas) == {"model.layers.1.mlp.down_proj"}
    assert {len(delta.a) for delta in deltas.values()} == {4}


def test_adalora_that_saved_its_own_divisor_uses_it(tiny, tiny_folder, tmp_path):
    folder = save_adalora(base_of(tiny_folder), tmp_path, prune=False)
    (path,) = {
        name
        for name in load_file(folder / "adapter_model.safetensors")
        if "layers.0.self_attn" in name and "_E" in name
    }
    module = path.removeprefix("base_model.model.").removesuffix(".lora_E")
    before = read_adapter(folder, tiny)[module].b
    change_weights(folder, lambda t: t.update({path.replace("lora_E", "ranknum"): torch.tensor([3.0])}))
    torch.testing.assert_close(read_adapter(folder, tiny)[module].b, 2 * before, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_r": 5}, r"it must be \[5, 32\]"),
        ({"init_r": None}, "Rank or alpha is missing or malformed"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True, False]}}, r"it must be \[1, 32\]"),
    ],
)
def test_adalora_that_contradicts_its_config_is_refused(tiny, tiny_folder, tmp_path, changes, message):
    folder = save_adalora(base_of(tiny_folder), tmp_path, prune=False)
    change_config(folder, **changes)
    with pytest.raises(AdapterInvalid, match=message):
        read_adapter(folder, tiny)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_initializations_that_change_the_base_are_read_once_converted(tiny, tiny_folder, tmp_path, start):
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=start)
    torch.manual_seed(2)
    model = get_peft_model(base_of(tiny_folder), config)
    model.save_pretrained(tmp_path / "initial")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(AdapterInvalid, match=f"started with {start}"):
        read_adapter(tmp_path / "raw", tiny)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    deltas, _ = assert_as_in_peft(tmp_path / "converted", tiny, tiny_folder)
    assert {len(delta.a) for delta in deltas.values()} == {8}
    x = torch.arange(9)[None]
    with torch.inference_mode():
        trained, converted = (
            model.eval()(x).logits,
            PeftModel.from_pretrained(base_of(tiny_folder), tmp_path / "converted")(x).logits,
        )
    torch.testing.assert_close(trained, converted, rtol=1e-3, atol=1e-3)


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "not a LoRA adapter"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='none'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"r": 5}, r"q_proj.lora_A.weight.* is \[4, 32\];.*must be \[5, 32\]"),
        ({"r": 0}, "rank 0"),
        ({"r": None}, "Rank or alpha is missing or malformed"),
        ({"lora_alpha": "much"}, "Rank or alpha is missing or malformed"),
        ({"rank_pattern": {"(": 3}}, "Rank or alpha is missing or malformed"),
        ({"rank_pattern": {"q_proj": 3}}, r"must be \[3, 32\]"),
        ({"rank_pattern": {"(q|v)_proj": 3}}, r"must be \[3, 32\]"),
        ({"rank_pattern": [1]}, "Rank or alpha is missing or malformed"),
    ],
)
def test_settings_that_cannot_be_served_are_named(folder, tiny, changes, message):
    change_config(folder, **changes)
    with pytest.raises(AdapterInvalid, match=message):
        read_adapter(folder, tiny)


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clear(), "no weights"),
        (rename(f"{Q}.lora_A.weight", "base_model.model.lm_head.lora_A.weight"), "doesn't target 'lm_head'"),
        (rename(f"{Q}.lora_A.weight", f"{Q}.lora_embedding_A"), "lora_embedding_A"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), r"lacks .*layers.0.self_attn.q_proj.lora_B.weight.* holds lora_A"),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(31, 4)}), r"lora_B.weight.* is \[31, 4\]"),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(32, 4, dtype=torch.int32)}), "is I32"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(32)}), "magnitude"),
        (lambda t: t.update({Q.replace("layers.0", "layers.7") + ".lora_A.weight": torch.zeros(4, 32)}), "layers.7"),
    ],
)
def test_weights_that_cannot_be_served_are_named(folder, tiny, change, message):
    change_weights(folder, change)
    with pytest.raises(AdapterInvalid, match=message):
        tiny.new_slab(1, 1 << 20).pack(read_adapter(folder, tiny))


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_missing_and_broken_files_are_named(folder, tiny, file, damage):
    path = folder / file
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(AdapterInvalid, match=file.split(".")[0]):
        read_adapter(folder, tiny)


def test_nothing_is_ever_unpickled(folder, tiny):
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(AdapterInvalid, match="safetensors"):
        read_adapter(folder, tiny)


def test_lower_precision_is_read_as_it_is(folder, tiny):
    change_weights(folder, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    for delta in read_adapter(folder, tiny).values():
        assert delta.a.dtype == delta.b.dtype == torch.bfloat16


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_nan_or_infinite_are_named(folder, tiny, value, dtype):
    name = f"{Q}.lora_B.weight"

    def spoil(tensors):
        tensors.update({each: tensor.to(dtype) for each, tensor in tensors.items()})
        tensors[name][3, 1] = float(value)

    change_weights(folder, spoil)
    with pytest.raises(AdapterInvalid, match=f"'{name}' .* NaN or infinite"):
        read_adapter(folder, tiny)


def test_large_but_finite_weights_are_read(folder, tiny):
    change_weights(folder, lambda t: t[f"{Q}.lora_A.weight"].fill_(3e38))
    assert read_adapter(folder, tiny)["model.layers.0.self_attn.q_proj"].a.min() > 1e38


def with_gains(folder, base, to, edit=lambda gains: None):
    """A copy of a DoRA's folder with its gains, as a job publishes them."""
    shutil.copytree(folder, to)
    gains = {module: delta.gain for module, delta in read_adapter(folder, base).items()}
    edit(gains)
    save_file(gains, to / GAINS_FILE)
    return to


def test_the_published_gains_of_a_dora_spare_reading_the_base(adapters, tiny, tmp_path, drive, prompts, expected):
    folder = with_gains(adapters["dora"], tiny, tmp_path / "published")
    driver = drive(lambda version: folder)
    base = driver.engine._adapters._loader._base
    for name in ("weight", "norms"):
        object.__setattr__(base, name, lambda *_: pytest.fail("the base was read"))
    driver.submit("published", prompts["dora"], "dora")
    assert driver.finish()["published"] == expected["dora"]


def test_without_published_gains_the_model_computes_norms_and_copies_no_weight(
    adapters, tiny, drive, prompts, expected, monkeypatch
):
    modules = []
    norms = type(tiny).merged_norms

    def counted(self, module, *rest):
        modules.append(module)
        return norms(self, module, *rest)

    monkeypatch.setattr(type(tiny), "merged_norms", counted)
    monkeypatch.setattr(type(tiny), "target_weight", lambda *_: pytest.fail("a weight was copied"))
    driver = drive()
    driver.submit("imported", prompts["dora"], "dora")
    assert driver.finish()["imported"] == expected["dora"]
    assert len(modules) == len(set(modules)) == 6


def test_published_gains_are_not_computed_again_and_can_be_ignored(adapters, tiny, tmp_path):
    folder = with_gains(
        adapters["dora"], tiny, tmp_path / "published", lambda gains: [g.add_(1) for g in gains.values()]
    )
    for module, delta in read_adapter(folder, tiny).items():
        computed = read_adapter(folder, tiny, published_gains=False)[module]
        torch.testing.assert_close(delta.gain, computed.gain + 1)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda gains: gains.popitem(), "the gain of .* is missing"),
        (lambda gains: gains.update(nowhere=torch.ones(3)), "the gain of 'nowhere'"),
        (lambda gains: gains.update({name: torch.ones(3) for name in gains}), "another shape"),
        (lambda gains: gains[next(iter(gains))].fill_(torch.nan), "NaN"),
    ],
)
def test_gains_that_are_not_the_adapters_are_refused(adapters, tiny, tmp_path, edit, message):
    folder = with_gains(adapters["dora"], tiny, tmp_path / "published", edit)
    with pytest.raises(AdapterInvalid, match=message):
        read_adapter(folder, tiny)
