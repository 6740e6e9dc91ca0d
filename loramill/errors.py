"""All errors that loramill raises on purpose, in one tree.

    LoramillError                    500 internal_error
    ├── InvalidRequest               400 invalid_request
    │   ├── UnsupportedParameter     400 unsupported_parameter
    │   ├── ContextLengthExceeded    400 context_length_exceeded
    │   ├── DatasetInvalid           400 invalid_dataset
    │   └── DoesNotFit               400 does_not_fit           no GPU of the pool has enough memory for a job
    ├── Unauthenticated              401 invalid_api_key
    ├── Forbidden                    403 forbidden
    ├── NotFound                     404 not_found
    │   └── ModelNotFound            404 model_not_found
    │       └── VersionPruned        404 version_pruned         retention removed the version
    ├── Conflict                     409 conflict
    │   └── NightlyBusy              409 nightly_busy           another process works on the nightly run
    ├── Overloaded                   429 overloaded
    ├── QuotaExceeded                429 quota_exceeded
    ├── RateLimited                  429 rate_limit_exceeded
    ├── Unavailable                  503 unavailable
    ├── DeadlineExceeded             504 deadline_exceeded
    ├── SetupError                   500 setup_error            this machine cannot run loramill as it is set up
    │   ├── SettingsInvalid          500 settings_invalid
    │   │   └── DefinitionInvalid    500 definition_invalid     faults of nightly.yaml
    │   ├── PortTaken                500 port_taken
    │   ├── DiskFull                 500 disk_full
    │   ├── NotEnoughMemory          500 not_enough_memory
    │   ├── DatabaseUnusable         500 database_unusable
    │   ├── StoreUnusable            500 store_unusable         no such bucket, or no permission
    │   ├── BaseUnusable             500 base_unusable
    │   └── NotRunning               500 not_running
    ├── ArtifactError                500 artifact_error
    │   ├── ArtifactMissing          500 artifact_missing
    │   └── ArtifactCorrupt          500 artifact_corrupt
    ├── AdapterInvalid               500 adapter_invalid        the engine cannot serve an adapter
    ├── EvaluationError              500 evaluation_failed      a scorer or a judge gave no score
    ├── EngineFault                  500 engine_fault           a step failed, or an invariant of the engine is violated
    └── JobError                     500 job_failed
        ├── LeaseLost                500 lease_lost
        ├── JobCancelled             500 job_cancelled
        ├── JobPaused                500 job_paused
        ├── JobPreempted             500 job_preempted
        ├── OutOfMemory              500 out_of_memory
        └── TrainingDiverged         500 training_diverged

A message says what was wrong, where, and what to do; it is written for the person who caused the error.
Every class is picklable, so that an error raised in a Ray worker is the same error in the gateway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class LoramillError(Exception):
    """Root of the tree.

    Attributes:
        message: one or two sentences for the person who can fix the problem.
        param: name of the invalid request parameter, if there is one.
        code, status: the error code and the HTTP status in the API.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def type(self) -> str:
        """OpenAI's `type` of the error."""
        return "invalid_request_error" if self.status < 500 else "server_error"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__)


def _restore(cls: type[LoramillError], args: tuple[Any, ...], state: dict[str, Any]) -> LoramillError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class InvalidRequest(LoramillError):
    """The request is invalid."""

    status = 400
    code = "invalid_request"


class UnsupportedParameter(InvalidRequest):
    """A parameter of OpenAI's API that loramill does not support; `param` is its name."""

    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    """The prompt and the completion together exceed the context length of the base."""

    code = "context_length_exceeded"


class DatasetInvalid(InvalidRequest):
    """A dataset has errors; `problems` lists all of them, each with file, line and field."""

    code = "invalid_dataset"

    def __init__(self, message: str, *, problems: Sequence[str] = (), param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.problems = tuple(problems)


class DoesNotFit(InvalidRequest):
    """A job needs more memory than one GPU of the pool has; `nearest` describes similar jobs that fit."""

    code = "does_not_fit"

    def __init__(self, message: str, *, nearest: Sequence[str] = (), param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.nearest = tuple(nearest)


class Unauthenticated(LoramillError):
    """The API key is missing, unknown, expired or revoked."""

    status = 401
    code = "invalid_api_key"


class Forbidden(LoramillError):
    """The key does not allow this. The error does not reveal whether the object exists."""

    status = 403
    code = "forbidden"


class NotFound(LoramillError):
    """There is no object with this name or ID that the key may see."""

    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """`model` is not a base, adapter, alias or version that the key may use."""

    code = "model_not_found"


class VersionPruned(ModelNotFound):
    """The version existed, and retention removed it."""

    code = "version_pruned"


class Conflict(LoramillError):
    """The object already exists, or its state does not allow the change."""

    status = 409
    code = "conflict"


class NightlyBusy(Conflict):
    """Another process works on the nightly run."""

    code = "nightly_busy"


class Overloaded(LoramillError):
    """A queue is full; try again in a moment."""

    status = 429
    code = "overloaded"


class QuotaExceeded(LoramillError):
    """A tenant has as many waiting jobs, or stored bytes, as its quota allows."""

    status = 429
    code = "quota_exceeded"


class RateLimited(LoramillError):
    """A tenant's limit of requests or tokens is reached.

    Attributes:
        kind: "requests" or "tokens"; OpenAI's `type` of such an error.
        seconds: time after which the same request may succeed.
        headers: headers of the response with what is left of the limits.
    """

    status = 429
    code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        *,
        kind: str = "requests",
        seconds: float = 1.0,
        headers: Mapping[str, str] | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message, param=param)
        self.kind, self.seconds, self.headers = kind, seconds, dict(headers or {})

    @property
    def type(self) -> str:
        """Which limit was reached: "requests" or "tokens"."""
        return self.kind


class Unavailable(LoramillError):
    """A required service is not ready or not reachable; try again."""

    status = 503
    code = "unavailable"


class DeadlineExceeded(LoramillError):
    """A request was not finished before its deadline."""

    status = 504
    code = "deadline_exceeded"


class SetupError(LoramillError):
    """This machine cannot run loramill as it is set up."""

    code = "setup_error"


class SettingsInvalid(SetupError):
    """A setting is unknown or has an invalid value."""

    code = "settings_invalid"


class DefinitionInvalid(SettingsInvalid):
    """The definition of nightly runs has faults; `problems` lists all of them, each with file, line and key."""

    code = "definition_invalid"

    def __init__(self, message: str, *, problems: Sequence[str] = (), param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.problems = tuple(problems)


class PortTaken(SetupError):
    """Another program uses the port."""

    code = "port_taken"


class DiskFull(SetupError):
    """There is too little free disk space."""

    code = "disk_full"


class NotEnoughMemory(SetupError):
    """There is less free memory than the command needs."""

    code = "not_enough_memory"


class DatabaseUnusable(SetupError):
    """The database cannot be opened: the file is damaged, the version is wrong, or there is no server."""

    code = "database_unusable"


class StoreUnusable(SetupError):
    """The artifact or checkpoint store cannot be used: no such bucket, wrong credentials, or no permission."""

    code = "store_unusable"


class BaseUnusable(SetupError):
    """A base model cannot be found or read, or its architecture is unknown."""

    code = "base_unusable"


class NotRunning(SetupError):
    """There is no gateway at its address."""

    code = "not_running"


class ArtifactError(LoramillError):
    """A stored artifact cannot be used."""

    code = "artifact_error"


class ArtifactMissing(ArtifactError):
    """There is no artifact with this hash in the store."""

    code = "artifact_missing"


class ArtifactCorrupt(ArtifactError):
    """The content of an artifact does not match its hash."""

    code = "artifact_corrupt"


class AdapterInvalid(LoramillError):
    """An adapter does not fit the base, or contains something that the engine cannot serve."""

    code = "adapter_invalid"


class EngineFault(LoramillError):
    """An engine step failed, or an invariant of blocks, slots or pins is violated: a defect of the code."""

    code = "engine_fault"


class EvaluationError(LoramillError):
    """A scorer or a judge gave no score for an answer, or what was evaluated is not enough for a decision."""

    code = "evaluation_failed"


class JobError(LoramillError):
    """A fine-tune job cannot continue."""

    code = "job_failed"


class LeaseLost(JobError):
    """The job was leased to another worker in the meantime; this worker may not publish anything."""

    code = "lease_lost"


class JobCancelled(JobError):
    """The job's owner cancelled it."""

    code = "job_cancelled"


class JobPaused(JobError):
    """The job's owner paused it; it continues from its checkpoint when it is resumed."""

    code = "job_paused"


class JobPreempted(JobError):
    """A job of a higher priority takes the worker; this job continues from its checkpoint later."""

    code = "job_preempted"


class OutOfMemory(JobError):
    """A forward or backward pass ran out of memory."""

    code = "out_of_memory"


class TrainingDiverged(JobError):
    """The loss or a gradient became NaN or infinite; `examples` are those of the step, counted from 1 in their file."""

    code = "training_diverged"

    def __init__(self, message: str, *, examples: Sequence[int] = (), param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.examples = tuple(examples)


def first_lines(message: str, lines: int = 2) -> str:
    """Returns the first lines of a nightly run's error, and how many more there are and which command shows them."""
    first, rest = message.splitlines()[:lines], message.splitlines()[lines:]
    more = f"(and {len(rest)} more line{'' if len(rest) == 1 else 's'}: `loramill nightly show --json`)"
    return "\n".join([*first, more] if rest else first)
