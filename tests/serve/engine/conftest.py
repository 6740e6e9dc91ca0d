"""A tiny random Llama, adapters for it made by PEFT, and a driver for engines."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from loramill.errors import ModelNotFound
from loramill.serve.engine import Engine, EngineConfig, Output, Request, SamplingParams
from loramill.serve.model import Decoder, load_decoder

from ...llama import tiny_llama, write_base

VOCABULARY = 101


def base_model() -> LlamaForCausalLM:
    return tiny_llama(vocab_size=VOCABULARY, initializer_range=0.25)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("tiny-llama"), base_model())


@pytest.fixture(scope="session")
def tiny(tiny_folder) -> Decoder:
    return load_decoder(tiny_folder, dtype=torch.float32)


def save_adapter(model, folder: Path, seed: int, **settings) -> Path:
    """Writes a random adapter, strong enough to change the tokens; consumes `model`."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **settings))
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    adapted.save_pretrained(folder)
    return folder


ADAPTERS = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 7, "lora_alpha": 3, "target_modules": "all-linear"},
    "rslora": {"r": 16, "lora_alpha": 4, "use_rslora": True, "target_modules": ["o_proj", "up_proj", "k_proj"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj", "gate_proj", "down_proj"],
        "rank_pattern": {"down_proj": 5, "layers.1.self_attn.q_proj": 9},
        "alpha_pattern": {"gate_proj": 1, "layers.0.mlp.down_proj": 12},
    },
    "dora": {"r": 4, "lora_alpha": 4, "use_dora": True, "target_modules": ["q_proj", "o_proj", "gate_proj"]},
    "one layer": {"r": 3, "target_modules": ["down_proj"], "layers_to_transform": [1]},
}
#: Bytes of the largest adapter.
LARGEST = 31488


@pytest.fixture(scope="session")
def adapters(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(base_model(), root / name, seed, **settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items())
    }


@dataclass
class Answer:
    """The outputs of one answer."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    last: Output | None = None


def name(request: str, index: int) -> str:
    return f"{request}/{index}" if index else request


class Driver:
    """Runs an engine until its requests have ended, and checks its invariants after every step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.answers: dict[str, Answer] = {}
        self.steps: list[list[Output]] = []

    def submit(
        self, id_: str, tokens, version=None, tenant="t", priority=0, timeout=None, mask=None, **sampling
    ) -> None:
        """The answers have the ids `id_`, `id_/1`, …"""
        params = SamplingParams(**{"max_tokens": 12, **sampling})
        self.engine.submit(Request(id_, tenant, tuple(tokens), params, version, priority, timeout, mask))
        self.answers |= {name(id_, index): Answer() for index in range(params.n)}

    def submit_all(self, prompts) -> None:
        """Submits the prompt of each version; str(version) is the id and the tenant."""
        for version, tokens in prompts.items():
            self.submit(str(version), tokens, version, tenant=str(version))

    def warm(self, *versions) -> None:
        """Makes versions resident, so that what follows doesn't depend on how long a load takes."""
        for version in versions:
            self.submit(f"warm {version}", [1], version, max_tokens=1)
        self.finish()
        self.answers.clear()

    def step(self) -> list[Output]:
        outputs = self.engine.step()
        self.engine.check_integrity()
        self.steps.append(outputs)
        for output in outputs:
            answer = self.answers[name(output.request_id, output.index)]
            assert answer.last is None, "an output after the last"
            answer.tokens += output.tokens
            answer.logprobs += output.logprobs
            if output.finish_reason:
                answer.last = output
        return outputs

    def finish(self) -> dict[str, list[int]]:
        while any(answer.last is None for answer in self.answers.values()):
            assert self.engine.wait(20), "nothing to do, and requests hang"
            self.step()
        stats = self.engine.stats
        assert (stats.waiting, stats.running, stats.free_blocks) == (0, 0, stats.blocks)
        return {id_: answer.tokens for id_, answer in self.answers.items()}


@pytest.fixture(scope="session")
def new_driver(tiny, adapters) -> Callable[..., Driver]:
    """Makes drivers; versions are the names in ADAPTERS, unless a source is passed. The caller closes them."""

    def source_of_adapters(version: str) -> Path:
        if version not in adapters:
            raise ModelNotFound(f"no version {version}")
        return adapters[version]

    def make(source: Callable[[str], Path] = source_of_adapters, **config) -> Driver:
        return Driver(Engine(tiny, source, EngineConfig(**{"block_size": 16, "kv_tokens": 1024, **config})))

    return make


@pytest.fixture
def drive(new_driver):
    """Makes drivers that are closed when the test ends."""
    made: list[Driver] = []

    def make(*args, **config) -> Driver:
        made.append(new_driver(*args, **config))
        return made[-1]

    yield make
    for driver in made:
        driver.engine.close()


#: A prompt for the base and each adapter: from one token to more than fit in a step.
PROMPTS = {
    version: [(start * 13 + i * i) % VOCABULARY for i in range(length)]
    for start, (version, length) in enumerate(zip([None, *ADAPTERS], (1, 5, 90, 17, 4, 33, 64), strict=True))
}


@pytest.fixture(scope="session")
def prompts() -> dict[str | None, list[int]]:
    return PROMPTS


@pytest.fixture(scope="session")
def expected(adapters) -> dict[str, list[int]]:
    """Greedy answers of 12 tokens by transformers and PEFT, each request alone, by str(version)."""
    answers = {}
    for version, tokens in PROMPTS.items():
        model = base_model()
        if version is not None:
            model = PeftModel.from_pretrained(model, adapters[version])
        ids = torch.tensor([tokens])
        mask = torch.ones_like(ids)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
        answers[str(version)] = out[0, len(tokens) :].tolist()
    assert len({tuple(answer) for answer in answers.values()}) == len(answers)
    return answers


@pytest.fixture(scope="session")
def tiny_reference() -> Callable[[list[int]], torch.Tensor]:
    """Log probabilities [positions, vocabulary] of what follows each token of a prompt, by transformers."""
    model = base_model()

    @torch.inference_mode()
    def logprobs(tokens: list[int]) -> torch.Tensor:
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    return logprobs
