"""Settings: defaults, then `loramill.toml`, then `LORAMILL_*` variables, then what a command says.

Nested fields are written `LORAMILL_JOBS__SESSIONS=2` or, in the file, `[jobs]` / `sessions = 2`.
An unknown key is an error. Nothing else in the project reads an environment variable to decide something.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from loramill.errors import SettingsInvalid
from loramill.types import Quantization

#: A folder whose path may begin with ~, and whose meaning must not hang on where a process works.
FolderPath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


#: An origin as browsers send it: without a path, not even "/".
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$")]

#: The address by which to reach a gateway that listens on all addresses.
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServeSettings(_Section):
    """The gateways and the engine replicas."""

    host: str = Field(
        default="127.0.0.1", min_length=1, description="address that the gateway listens on; 0.0.0.0 is every one"
    )
    port: int = Field(default=8400, ge=1, le=65535)
    ingress: Literal["direct", "proxy"] = Field(
        default="direct",
        description="who listens on the port: each gateway itself, or Ray Serve's proxy",
    )
    gateways: int = Field(default=1, ge=1, description="gateway replicas; on one machine they share the port")
    bases: tuple[str, ...] = Field(default=(), description="bases that can be asked beside the one that is tuned here")
    min_replicas: int = Field(default=1, ge=0, description="engine replicas of a base; 0: it sleeps when nobody asks")
    max_replicas: int = Field(default=1, ge=1, description="engine replicas of a base under load")
    pending_seconds: float = Field(default=4.0, gt=0, description="of work before a replica, beyond which more come")
    first_token_seconds: float = Field(default=2.0, gt=0, description="to the first token, beyond which more come")
    down_seconds: float = Field(default=60.0, gt=0, description="for which fewer replicas must have been enough")
    idle_seconds: float = Field(default=300.0, gt=0, description="without a request until a base sleeps")
    start_seconds: float = Field(default=60.0, gt=0, description="for which a request waits for a replica to start")
    drain_seconds: float = Field(default=120.0, gt=0, description="for which a replica that goes finishes its answers")
    stuck_seconds: float = Field(default=60.0, gt=0, description="an engine without a step for so long is replaced")
    threads: int = Field(default=1, ge=1, description="CPU threads of one engine replica")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="where the base runs; auto: a GPU if torch finds one, but on Ray the CPU",
    )
    max_batch_tokens: int | None = Field(
        default=None, ge=16, description="tokens of one engine step; None: 128 on a CPU, 2048 on a GPU"
    )
    max_sequences: int = Field(default=64, ge=1, description="requests that decode at once")
    max_waiting: int = Field(default=16, ge=1, description="requests that wait at a replica; more are refused")
    kv_tokens: int = Field(default=32768, ge=512, description="tokens of KV cache")
    prefix_cache: bool = Field(default=True, description="share what prompts that begin alike have in common")
    adapter_slots: int = Field(default=64, ge=1, description="adapters resident at once")
    adapter_bytes: int = Field(default=2**30, ge=2**20, description="what these may take together")
    adapter_bits: Literal[16, 8] = Field(default=16, description="of a weight of theirs; 8 halves memory and traffic")
    host_bytes: int = Field(default=2**28, ge=0, description="of adapters that were read and have no slot now")
    rank_budget: int = Field(default=1024, ge=1, description="sum of the different adapters' ranks in one step")
    grace_seconds: float = Field(
        default=180.0,
        ge=0,
        description="how long known keys and names keep working while the database is away",
    )
    max_upload_bytes: int = Field(default=256 * 2**20, ge=1, description="bytes of the largest upload")
    cors_origins: tuple[Origin, ...] = Field(
        default=(), description='origins of web pages that may call the gateway from a browser; "*" is every one'
    )


class JobSettings(_Section):
    """The pool that fine-tune jobs run on."""

    sessions: int = Field(default=max(1, min(8, os.cpu_count() or 1)), ge=1, description="jobs that train at once")
    threads: int = Field(default=1, ge=1, description="CPU threads of one session")
    use_gpu: bool = False
    per_gpu: int = Field(default=1, ge=1, le=16, description="jobs that share one GPU, each with 1/k of its memory")
    device_bytes: int | None = Field(
        default=None, ge=2**28, description="memory of one GPU, or of a session without; None: jobs aren't sized"
    )
    cpus: float = Field(
        default=1.0, gt=0, description="of the Ray cluster's CPUs, what one session takes without a GPU"
    )
    lease_seconds: float = Field(default=15.0, gt=0, description="a worker silent for so long has lost its job")
    idle_seconds: float = Field(default=120.0, gt=0, description="a session without jobs for so long ends")
    max_attempts: int = Field(default=5, ge=1, description="leases of a job before it counts as failed")
    backoff_seconds: float = Field(default=2.0, ge=0, description="before a first retry; each further one waits twice")
    min_examples: int = Field(default=10, ge=1, description="examples below which a training file is refused")
    dedicated_tokens: float = Field(
        default=50e6, gt=0, description="training tokens from which a job gets a trainer of its own"
    )
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        default=(), description="where training's numbers go besides the record"
    )


class Settings(BaseSettings):
    """All of loramill's settings; `Settings.load()` is how to get them."""

    model_config = SettingsConfigDict(
        env_prefix="LORAMILL_",
        env_nested_delimiter="__",
        toml_file="loramill.toml",
        extra="forbid",
        frozen=True,
    )

    home: FolderPath = Field(
        default=Path("~/.loramill"), validate_default=True, description="the record, artifacts, admin key and logs"
    )
    cache: FolderPath = Field(
        default=Path("~/.cache/loramill"),
        validate_default=True,
        description="converted bases; may be deleted at any time",
    )
    database_url: str | None = Field(default=None, description="SQLAlchemy URL; None: SQLite under home")
    artifacts_url: str | None = Field(default=None, description="fsspec URL; None: a folder under home")
    base: str = Field(default="smollm2-135m", description="built-in name, local folder or hub id")
    quantization: Quantization = Field(
        default="none", description="of the base's linears, where it is served and where adapters are trained"
    )
    url: str | None = Field(default=None, description="gateway that the client calls; None: this machine's")
    api_key: str | None = Field(default=None, description="key that the client uses; None: the admin key under home")
    serve: ServeSettings = ServeSettings()
    jobs: JobSettings = JobSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Puts the file below the environment."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @classmethod
    def load(cls, **said: Any) -> Settings:
        """Reads the settings; `said` is what a command line gives and wins over everything.

        Raises:
            SettingsInvalid: a key is unknown or a value makes no sense; the message names it.
        """
        try:
            settings = cls(**said)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise SettingsInvalid(
                f"Setting '{where}': {first['msg']}. Correct it in loramill.toml or in the LORAMILL_* variables."
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsInvalid(f"loramill.toml in this folder isn't valid TOML: {error}. Correct it.") from error
        except SettingsError as error:
            raise SettingsInvalid(f"A LORAMILL_* variable can't be read: {error}. Correct it.") from error
        known = {f"LORAMILL_{name}".upper() for name in cls.model_fields}
        for variable in os.environ:
            top = variable.split("__")[0].upper()
            if top.startswith("LORAMILL_") and top not in known | {"LORAMILL_KERNELS"}:
                raise SettingsInvalid(f"The variable {variable} is no setting of loramill; remove or correct it.")
        return settings

    @property
    def database(self) -> str:
        """The database's URL, resolved."""
        return self.database_url or f"sqlite:///{self.home / 'loramill.db'}"

    @property
    def artifacts(self) -> str:
        """The artifact store's URL, resolved."""
        return self.artifacts_url or (self.home / "artifacts").as_uri()

    @property
    def sessions(self) -> str:
        """Where Ray Train keeps its own notes on the sessions, beside the artifacts: every node must reach it."""
        return self.artifacts.rstrip("/") + "-sessions"

    @property
    def checkpoints(self) -> str:
        """Where jobs keep their checkpoints, beside the artifacts: every node must reach it. A local one is a path."""
        place = self.artifacts.rstrip("/") + "-checkpoints"
        return unquote(urlsplit(place).path) if place.startswith("file:") else place

    @property
    def address(self) -> str:
        """Where this machine reaches its gateway, without `/v1`."""
        host = _LOOPBACK.get(self.serve.host, self.serve.host)
        return f"http://[{host}]:{self.serve.port}" if ":" in host else f"http://{host}:{self.serve.port}"

    @property
    def address_file(self) -> Path:
        """Where `up` notes its address, so that commands find a gateway that was given another port."""
        return self.home / "gateway.url"

    @property
    def gateway(self) -> str:
        """The address that clients call, without `/v1`: the `url` setting, or the gateway of this home."""
        if self.url is None and self.address_file.exists():
            return self.address_file.read_text().strip()
        return (self.url or self.address).rstrip("/")

    @property
    def admin_key_file(self) -> Path:
        """Where `up` leaves the admin's key."""
        return self.home / "admin.key"
