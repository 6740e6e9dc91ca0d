"""A real gateway on a real port over a real registry; only the model is an echo."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace

import httpx
import pytest
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from openai import OpenAI
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loramill.data.tokenizer import ChatTokenizer
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.registry import Registry, adapters, api_keys, migrate, tenants
from loramill.serve.api.app import build_api
from loramill.serve.api.limits import flush
from loramill.serve.api.limits.tracker import UsageBatch
from loramill.serve.protocol import GenerationBackend, TextChunk, TextRequest
from loramill.serve.replica.fake import EchoBackend
from loramill.settings import Settings
from loramill.types import VersionRecord

from ...gateways import running
from ...waiting import eventually

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

#: Everything that the gateway itself reads of a base.
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


class Switch:
    """Passes everything on to the backend that the current test sets."""

    def __init__(self) -> None:
        self.now: GenerationBackend = EchoBackend()

    def generate(self, request: TextRequest) -> AsyncIterator[TextChunk]:
        return self.now.generate(request)

    async def ready(self) -> None:
        await self.now.ready()


@dataclass(frozen=True)
class Site:
    """A running gateway and its registry."""

    url: str
    registry: Registry
    base: Base
    tokenizer: ChatTokenizer
    settings: Settings
    backend: Switch
    admin_key: str
    app: FastAPI

    def key(self, tenant: str) -> str:
        with self.registry.writing() as session:
            return api_keys.create(session, tenant)[1]

    def openai(self, key: str, **options: object) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)  # type: ignore[arg-type]

    def http(self, key: str | None = None, **headers: str) -> httpx.Client:
        auth = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=auth | headers, trust_env=False)

    def publish(self, adapter: str, content: str, job: str | None = None) -> str:
        """Records a version, made by a job or imported; returns its id."""
        version = hashlib.sha256(content.encode()).hexdigest()
        with self.registry.writing() as session:
            adapters.get_or_create(session, AdapterName.parse(adapter))
            record = VersionRecord(
                id=version, adapter=adapter, job=job, base=self.base.fingerprint, bytes=1, created_at=time.time()
            )
            adapters.add_version(session, record)
        return version


def byte_tokenizer() -> ChatTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", "<pad>")])
    settings = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    return ChatTokenizer(tokenizer.to_str(), settings, {})


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home = tmp_path_factory.mktemp("registry")
    settings = Settings(home=home, cache=home / "cache", serve={"max_upload_bytes": 200_000}, jobs={"min_examples": 4})
    migrate(settings.database)
    registry = Registry.open(settings.database, settings.artifacts)
    with registry.writing() as session:
        _, admin_key = api_keys.create(session, None)
    (home / "config.json").write_text(json.dumps(CONFIG))
    base = Base("tiny", home, hashlib.sha256(b"tiny").hexdigest(), "LlamaForCausalLM", 512)
    backend, tokenizer = Switch(), byte_tokenizer()
    app = build_api(registry=registry, base=base, tokenizer=tokenizer, backend=backend, settings=settings)
    with running(app) as url:
        yield Site(url, registry, base, tokenizer, settings, backend, admin_key, app)
    registry.close()


@pytest.fixture
def twin(site: Site) -> Iterator[Site]:
    """A second gateway on the same database with its own connections, as in another process."""
    registry = Registry.open(site.settings.database, site.settings.artifacts)
    app = build_api(
        registry=registry, base=site.base, tokenizer=site.tokenizer, backend=site.backend, settings=site.settings
    )
    with running(app) as url:
        yield replace(site, url=url, registry=registry, app=app)
    registry.close()


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Site], None]:
    """Waits until a gateway has written its usage and read the other gateways' windows: `flushed(site)`."""
    begun: Counter[str] = Counter()
    write_and_read = flush._write_and_read_peers

    def counted(registry: Registry, gateway_id: str, batch: UsageBatch | None) -> object:
        begun[gateway_id] += 1
        return write_and_read(registry, gateway_id, batch)

    monkeypatch.setattr(flush, "_write_and_read_peers", counted)
    monkeypatch.setattr(flush, "FLUSH_INTERVAL_SECONDS", 0.05)

    def wait(site: Site) -> None:
        gateway_id = site.app.state.gateway.usage_tracker.gateway_id
        # The first that begins may have taken its batch before the call. The third begins after the end of the second.
        third = begun[gateway_id] + 3
        eventually(lambda: begun[gateway_id] >= third)

    return wait


@pytest.fixture
def endpoints(site: Site) -> list[tuple[str, str]]:
    """Method and path of every endpoint; a path parameter is a star."""
    paths = get_openapi(title="", version="", routes=site.app.routes)["paths"]
    return [(method.upper(), re.sub(r"{[^}]*}", "*", path)) for path, methods in paths.items() for method in methods]


@pytest.fixture
def serving() -> Callable[[FastAPI], object]:
    """Runs another app: `with serving(app) as url`."""
    return running


@pytest.fixture(autouse=True)
def echo(site: Site) -> EchoBackend:
    site.backend.now = backend = EchoBackend()
    return backend


_numbers = itertools.count(1)


@pytest.fixture
def tenant(site: Site) -> str:
    with site.registry.writing() as session:
        return tenants.create(session, f"tenant{next(_numbers)}").name


@pytest.fixture
def other(site: Site) -> str:
    """A second tenant."""
    with site.registry.writing() as session:
        return tenants.create(session, f"tenant{next(_numbers)}").name


@pytest.fixture
def client(site: Site, tenant: str) -> Iterator[OpenAI]:
    with site.openai(site.key(tenant)) as client:
        yield client


@pytest.fixture
def admin(site: Site) -> Iterator[OpenAI]:
    with site.openai(site.admin_key) as client:
        yield client


@pytest.fixture
def http(site: Site, tenant: str) -> Iterator[httpx.Client]:
    """Plain HTTP with a tenant's key, for what the client wouldn't send."""
    with site.http(site.key(tenant)) as client:
        yield client


@pytest.fixture
def jsonl() -> Callable[..., bytes]:
    """Chat examples: `jsonl(12)`, or `jsonl(12, "prefix")` for others."""

    def make(count: int, word: str = "number") -> bytes:
        rows = [
            {"messages": [{"role": "user", "content": f"{word} {i}?"}, {"role": "assistant", "content": f"it is {i}"}]}
            for i in range(count)
        ]
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    return make
