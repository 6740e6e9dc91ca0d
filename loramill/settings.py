"""Settings: defaults, overridden by `loramill.toml`, then by `LORAMILL_*` variables, then by command-line options.

A nested field is written `LORAMILL_JOBS__SESSIONS=2` or, in the file, `[jobs]` / `sessions = 2`. An unknown key is an
error. The descriptions of the fields are the source of help texts and docs. `LORAMILL_KERNELS`, which the kernels
read, is the only variable of loramill that is not a setting.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from loramill.errors import SettingsInvalid
from loramill.gpus import ray_share
from loramill.types import Quantization, RetentionPolicy, ServedQuantization

#: A folder or file; its path may begin with ~ and is made absolute, since processes have different working folders.
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


#: An origin as browsers send it: without a path, not even "/".
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$")]

#: Addresses of a gateway that listens on every interface, for clients on the same machine.
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def _number_of_text(value: object) -> object:
    """A number that a variable gives as text: pydantic converts it for `int`, but not for a Literal of numbers."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


#: Days for which stored completions are kept by default.
COMPLETION_DAYS = 30.0


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServeSettings(_Section):
    """Gateways and engine replicas."""

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address that the gateway listens on; 0.0.0.0 means every interface.",
    )
    port: int = Field(default=8400, ge=1, le=65535, description="Port that the gateway listens on.")
    ingress: Literal["direct", "proxy"] = Field(
        default="direct",
        description="What listens on the port: each gateway itself (direct), or Ray Serve's proxy (proxy).",
    )
    gateways: int = Field(
        default=1, ge=1, description="Number of gateway replicas; on one machine they share the port."
    )
    bases: tuple[str, ...] = Field(
        default=(), description="Base models to serve in addition to `base`; adapters are not trained on them."
    )
    min_replicas: int = Field(
        default=1, ge=0, description="Minimum number of engine replicas per base; 0 allows scaling to zero when idle."
    )
    max_replicas: int = Field(default=1, ge=1, description="Maximum number of engine replicas per base.")
    pending_seconds: float = Field(
        default=4.0, gt=0, description="Queued work per replica, in seconds, above which to scale up."
    )
    first_token_seconds: float = Field(
        default=2.0, gt=0, description="Time to first token, in seconds, above which to scale up."
    )
    down_seconds: float = Field(
        default=60.0, gt=0, description="How long fewer replicas must suffice before scaling down, in seconds."
    )
    idle_seconds: float = Field(
        default=300.0, gt=0, description="Time without a request, in seconds, before a base scales to zero."
    )
    start_seconds: float = Field(
        default=60.0, gt=0, description="How long a request waits for a replica to start, in seconds."
    )
    drain_seconds: float = Field(
        default=120.0, gt=0, description="How long a stopping replica may take to finish its requests, in seconds."
    )
    stuck_seconds: float = Field(
        default=60.0, gt=0, description="Time without an engine step, in seconds, after which a replica is replaced."
    )
    threads: int = Field(default=1, ge=1, description="CPU threads per engine replica.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Device that the base runs on. auto: a GPU if this machine has one that torch can use; on a "
        "cluster, the CPU.",
    )
    gpu_fraction: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share of one GPU that an engine replica takes. Unset: a whole GPU; with `loramill up`, half of it "
        "where training needs the same GPU.",
    )
    quantization: Literal["fp8"] | None = Field(
        default=None,
        description="Quantization of the base's linear layers for serving alone, on GPUs of compute capability 8.9 or "
        "higher: fp8 stores and multiplies them in float8, in half the memory; adapters stay in bfloat16, and jobs "
        "train on the unquantized base. Unset: the setting `quantization`.",
    )
    accelerator_type: str | None = Field(
        default=None,
        description="GPU that engine replicas are placed on, by Ray's name, such as L40S. Unset: any.",
    )
    max_batch_tokens: int | None = Field(
        default=None, ge=16, description="Maximum tokens per engine step. Unset: 128 on a CPU, 2048 on a GPU."
    )
    max_sequences: int = Field(default=64, ge=1, description="Maximum number of requests that decode at the same time.")
    max_waiting: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of waiting requests per replica; further ones are refused. Unset: 16 on a CPU, 4 "
        "times max_sequences on a GPU.",
    )
    kv_tokens: int | None = Field(
        default=None,
        ge=512,
        description="Size of the KV cache per replica, in tokens. Unset: 32768 on a CPU, what the GPU's memory holds.",
    )
    prefix_cache: bool = Field(
        default=True, description="Reuse the KV cache of prompts that begin with the same tokens."
    )
    adapter_slots: int = Field(
        default=64, ge=1, description="Maximum number of adapters in device memory at the same time."
    )
    adapter_bytes: int | None = Field(
        default=None,
        ge=2**20,
        description="Device memory for adapters per replica, in bytes. Unset: 1 GiB on a CPU, a tenth of what the "
        "base leaves of a GPU's memory.",
    )
    adapter_bits: Annotated[Literal[16, 8], BeforeValidator(_number_of_text)] = Field(
        default=16, description="Bits per adapter weight; 8 halves memory and bandwidth."
    )
    host_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Size of the host-memory cache of adapters per replica, in bytes. Unset: 256 MiB on a CPU; for a "
        "GPU, twice the memory of its adapters, at most an eighth of the free host memory; page-locked there.",
    )
    rank_budget: int = Field(
        default=1024, ge=1, description="Maximum sum of the ranks of the different adapters in one engine step."
    )
    grace_seconds: float = Field(
        default=180.0,
        ge=0,
        description="How long known API keys and model names keep working while the database is unreachable, "
        "in seconds.",
    )
    max_upload_bytes: int = Field(default=256 * 2**20, ge=1, description="Maximum size of an upload, in bytes.")
    cors_origins: tuple[Origin, ...] = Field(
        default=(),
        description='Origins of web pages that may call the gateway from a browser; "*" means every origin.',
    )

    def served_quantization(self, of_base: Quantization) -> ServedQuantization:
        """How an engine stores a base of this quantization.

        Raises:
            SettingsInvalid: the base is quantized, and another quantization is set for serving.
        """
        if self.quantization is not None and of_base != "none":
            raise SettingsInvalid(
                f'serve.quantization = "{self.quantization}" is for a base that is not quantized, and quantization is '
                f'"{of_base}": unset one of the two.'
            )
        return self.quantization or of_base


class JobSettings(_Section):
    """The pool that runs fine-tune jobs."""

    sessions: int = Field(
        default=max(1, min(8, os.cpu_count() or 1)),
        ge=1,
        description="Maximum number of sessions at once; each trains up to per_session jobs.",
    )
    per_session: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="Maximum number of jobs that one session trains at once, by passes over the base that they share. "
        "A session takes another job only while its passes have room, and its memory too, as far as that is known. On "
        "a CPU it starts with one; the limit doubles each time a job ends, until the queue is empty.",
    )
    pass_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Maximum tokens of a pass that several jobs of a session share. Unset: 1024 on a CPU, 8192 on a "
        "GPU.",
    )
    threads: int = Field(default=1, ge=1, description="CPU threads per session.")
    use_gpu: bool | Literal["auto"] = Field(
        default="auto",
        description="Train on GPUs. auto: if this machine has one that torch can use; on a cluster, no.",
    )
    per_gpu: int = Field(
        default=1,
        ge=1,
        le=16,
        description="Number of sessions that share one GPU, each with an equal part of its memory.",
    )
    gpu_fraction: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share of one GPU that its per_gpu sessions take together. Unset: a whole GPU; with `loramill up`, "
        "what an engine on the same GPU leaves.",
    )
    accelerator_type: str | None = Field(
        default=None, description="GPU that jobs are trained on, by Ray's name, such as L4. Unset: any."
    )
    device_bytes: int | None = Field(
        default=None,
        ge=2**28,
        description="Memory of one GPU (of one session, without GPUs), in bytes. Unset: that of the smallest GPU of "
        "the pool, as far as it is known; without GPUs, memory needs are not checked.",
    )
    cpus: float = Field(default=1.0, gt=0, description="CPUs of the Ray cluster that a session without a GPU reserves.")
    lease_seconds: float = Field(
        default=15.0, gt=0, description="Time without a heartbeat, in seconds, after which a worker loses its job."
    )
    idle_seconds: float = Field(
        default=120.0, gt=0, description="Time without a job, in seconds, after which a session ends."
    )
    max_attempts: int = Field(default=5, ge=1, description="Maximum number of attempts per job.")
    backoff_seconds: float = Field(
        default=2.0, ge=0, description="Delay before the first retry, in seconds; it doubles with each further retry."
    )
    min_examples: int = Field(default=10, ge=1, description="Minimum number of examples in a training file.")
    deterministic: bool = Field(
        default=False,
        description="On a GPU, give the same bits each time that a job with the same data runs on the same kind of GPU "
        "with the same software; attention's backward pass takes longer and more memory. A CPU always does.",
    )
    dedicated_tokens: float = Field(
        default=50e6, gt=0, description="Number of training tokens from which a job gets a dedicated trainer."
    )
    loggers: tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...] = Field(
        default=(), description="Where training metrics are written in addition to the database."
    )

    @property
    def on_gpu(self) -> bool:
        """Whether jobs train on GPUs; "auto" that was not decided for a machine means the CPU."""
        return self.use_gpu is True

    @property
    def gpu_share(self) -> float:
        """The share of one GPU that a job takes, of Ray's resources and of the memory."""
        return ray_share((self.gpu_fraction or 1.0) / self.per_gpu)


class NightlySettings(_Section):
    """Nightly runs."""

    file: AbsolutePath | None = Field(
        default=None,
        description="File that defines nightly runs and their schedule. Unset: nightly.yaml in `home`; without that "
        "file, runs start by `loramill nightly run` alone.",
    )


class Settings(BaseSettings):
    """All settings of loramill, read by `Settings.load()`."""

    model_config = SettingsConfigDict(
        env_prefix="LORAMILL_",
        env_nested_delimiter="__",
        toml_file="loramill.toml",
        extra="forbid",
        frozen=True,
    )

    home: AbsolutePath = Field(
        default=Path("~/.loramill"),
        validate_default=True,
        description="Folder of the database, the artifacts, the admin key and the logs.",
    )
    cache: AbsolutePath = Field(
        default=Path("~/.cache/loramill"),
        validate_default=True,
        description="Folder of converted and quantized base models; it can be deleted at any time.",
    )
    database_url: str | None = Field(
        default=None, description="SQLAlchemy URL of the database. Unset: an SQLite file in `home`."
    )
    artifacts_url: str | None = Field(
        default=None, description="fsspec URL of the artifact store. Unset: a folder in `home`."
    )
    base: str = Field(
        default="smollm2-135m",
        description="Base model that adapters are trained on: built-in name, local folder, or Hugging Face Hub ID.",
    )
    quantization: Quantization = Field(
        default="none",
        description="Quantization of the base's linear layers, for serving and for training: nf4 (4 bits, as in QLoRA) "
        "or int8. Training takes less memory with nf4 on a GPU alone.",
    )
    url: str | None = Field(
        default=None, description="URL of the gateway that the client calls. Unset: this machine's gateway."
    )
    api_key: str | None = Field(
        default=None, description="API key that the client uses. Unset: the admin key in `home`."
    )
    completion_days: float = Field(
        default=COMPLETION_DAYS,
        gt=0,
        le=36_500,
        allow_inf_nan=False,
        description="Days for which completions are stored that a tenant has requested to store, unless the tenant has "
        "a number of days of its own.",
    )
    serve: ServeSettings = Field(default=ServeSettings(), description="Gateways and engine replicas.")
    jobs: JobSettings = Field(default=JobSettings(), description="The pool that runs fine-tune jobs.")
    nightly: NightlySettings = Field(default=NightlySettings(), description="Nightly runs.")
    retention: RetentionPolicy = Field(
        default=RetentionPolicy(), description="Which versions and checkpoints the supervisor removes, every hour."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Gives the file a lower priority than the environment."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @classmethod
    def load(cls, **overrides: Any) -> Settings:
        """Reads the settings from the file and the environment.

        Args:
            overrides: values of command-line options, which have the highest priority.

        Raises:
            SettingsInvalid: a key is unknown, a value is invalid, or two exclude each other; the message names them.
        """
        try:
            settings = cls(**overrides)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise SettingsInvalid(
                f"Setting '{where}': {first['msg']}. Correct it in loramill.toml or in the LORAMILL_* variables."
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsInvalid(f"loramill.toml in this folder is not valid TOML: {error}. Correct it.") from error
        except SettingsError as error:
            raise SettingsInvalid(f"A LORAMILL_* variable can't be read: {error}. Correct it.") from error
        settings.serve.served_quantization(settings.quantization)
        known = {f"LORAMILL_{name}".upper() for name in cls.model_fields}
        for variable in os.environ:
            top = variable.split("__")[0].upper()
            if top.startswith("LORAMILL_") and top not in known | {"LORAMILL_KERNELS"}:
                raise SettingsInvalid(f"The variable {variable} is not a setting of loramill; remove or correct it.")
        return settings

    @property
    def database(self) -> str:
        """URL of the database, with the default filled in."""
        return self.database_url or f"sqlite:///{self.home / 'loramill.db'}"

    @property
    def artifacts(self) -> str:
        """URL of the artifact store, with the default filled in."""
        return self.artifacts_url or (self.home / "artifacts").as_uri()

    @property
    def sessions(self) -> str:
        """URL of Ray Train's storage for sessions, next to the artifacts; every node must be able to reach it."""
        return self.artifacts.rstrip("/") + "-sessions"

    @property
    def checkpoints(self) -> str:
        """URL (a path if local) of jobs' checkpoints, next to the artifacts; every node must be able to reach it."""
        url = self.artifacts.rstrip("/") + "-checkpoints"
        return unquote(urlsplit(url).path) if url.startswith("file:") else url

    @property
    def nightly_file(self) -> Path:
        """File that defines nightly runs, with the default filled in; it may not exist."""
        return self.nightly.file or self.home / "nightly.yaml"

    @property
    def address(self) -> str:
        """URL of this machine's gateway, without `/v1`."""
        host = _LOOPBACK.get(self.serve.host, self.serve.host)
        return f"http://[{host}]:{self.serve.port}" if ":" in host else f"http://{host}:{self.serve.port}"

    @property
    def address_file(self) -> Path:
        """File in which `loramill up` stores the gateway's URL, so that commands find it on a non-default port."""
        return self.home / "gateway.url"

    @property
    def gateway(self) -> str:
        """URL that clients call, without `/v1`: the `url` setting, or the gateway of this home."""
        if self.url is None and self.address_file.exists():
            return self.address_file.read_text().strip()
        return (self.url or self.address).rstrip("/")

    @property
    def admin_key_file(self) -> Path:
        """File in which `loramill up` stores the admin key."""
        return self.home / "admin.key"
