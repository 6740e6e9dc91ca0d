"""Every error loramill raises on purpose, in one tree.

    LoramillError                    500 internal_error
    ├── InvalidRequest               400 invalid_request
    │   ├── UnsupportedParameter     400 unsupported_parameter
    │   ├── ContextLengthExceeded    400 context_length_exceeded
    │   ├── DatasetInvalid           400 invalid_dataset
    │   └── DoesNotFit               400 does_not_fit           a job that no GPU of the pool can hold
    ├── Unauthenticated              401 invalid_api_key
    ├── Forbidden                    403 forbidden
    ├── NotFound                     404 not_found
    │   └── ModelNotFound            404 model_not_found
    ├── Conflict                     409 conflict
    ├── Overloaded                   429 overloaded
    ├── QuotaExceeded                429 quota_exceeded
    ├── RateLimited                  429 rate_limit_exceeded
    ├── Unavailable                  503 unavailable
    ├── DeadlineExceeded             504 deadline_exceeded
    ├── SetupError                   500 setup_error            this machine can't run it as it is
    │   ├── SettingsInvalid          500 settings_invalid
    │   ├── PortTaken                500 port_taken
    │   ├── DiskFull                 500 disk_full
    │   ├── NotEnoughMemory          500 not_enough_memory
    │   ├── DatabaseUnusable         500 database_unusable
    │   ├── StoreUnusable            500 store_unusable         no such bucket, or no permission there
    │   ├── BaseUnusable             500 base_unusable
    │   └── NotRunning               500 not_running
    ├── ArtifactError                500 artifact_error
    │   ├── ArtifactMissing          500 artifact_missing
    │   └── ArtifactCorrupt          500 artifact_corrupt
    ├── AdapterInvalid               500 adapter_invalid        an adapter the engine can't serve
    ├── EngineFault                  500 engine_fault           a step failed, or the engine's books don't add up
    └── JobError                     500 job_failed
        ├── LeaseLost                500 lease_lost
        ├── JobCancelled             500 job_cancelled
        ├── JobPaused                500 job_paused
        ├── JobPreempted             500 job_preempted
        ├── OutOfMemory              500 out_of_memory
        └── TrainingDiverged         500 training_diverged

A message says what was wrong, where, and what to do; it is written for whoever caused the error.
Every class is picklable, so an error raised in a Ray worker is the same error in the gateway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class LoramillError(Exception):
    """Root of the tree.

    Attributes:
        message: one or two sentences for the person who can mend it.
        param: the request parameter at fault, if it is one.
        code, status: what the API answers with.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def type(self) -> str:
        """OpenAI's coarse class of an error: who has to act."""
        return "invalid_request_error" if self.status < 500 else "server_error"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__)


def _restore(cls: type[LoramillError], args: tuple[Any, ...], state: dict[str, Any]) -> LoramillError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class InvalidRequest(LoramillError):
    """The request can't be carried out as it is written."""

    status = 400
    code = "invalid_request"


class UnsupportedParameter(InvalidRequest):
    """A parameter of OpenAI's API that loramill doesn't have; `param` names it."""

    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together don't fit the base's context."""

    code = "context_length_exceeded"


class DatasetInvalid(InvalidRequest):
    """A dataset has errors; `problems` lists them all, each with file, line and field."""

    code = "invalid_dataset"

    def __init__(self, message: str, *, problems: Sequence[str] = (), param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.problems = tuple(problems)


class DoesNotFit(InvalidRequest):
    """A job needs more memory than one GPU of the pool has; `nearest` describes the nearest ones that fit."""

    code = "does_not_fit"

    def __init__(self, message: str, *, nearest: Sequence[str] = (), param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.nearest = tuple(nearest)


class Unauthenticated(LoramillError):
    """No API key, or one that isn't known, has expired or was revoked."""

    status = 401
    code = "invalid_api_key"


class Forbidden(LoramillError):
    """The key may not do this. Says nothing about whether the thing exists."""

    status = 403
    code = "forbidden"


class NotFound(LoramillError):
    """Nothing of this name or id that the key may see."""

    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """`model` names no base, adapter, alias or version that the key may use."""

    code = "model_not_found"


class Conflict(LoramillError):
    """The thing exists already, or its state forbids the change."""

    status = 409
    code = "conflict"


class Overloaded(LoramillError):
    """A queue is full; try again after a moment."""

    status = 429
    code = "overloaded"


class QuotaExceeded(LoramillError):
    """A tenant has as many jobs waiting, or as many bytes stored, as its quota allows."""

    status = 429
    code = "quota_exceeded"


class RateLimited(LoramillError):
    """A tenant's limit of requests or tokens is reached.

    Attributes:
        kind: which, "requests" or "tokens"; OpenAI's `type` of such an error.
        seconds: after which the same request may pass.
        headers: of the answer, what is left of the limits.
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
        """What there was too much of."""
        return self.kind


class Unavailable(LoramillError):
    """A part that is needed isn't up (yet); try again."""

    status = 503
    code = "unavailable"


class DeadlineExceeded(LoramillError):
    """An answer wasn't finished in the time that its request gave it."""

    status = 504
    code = "deadline_exceeded"


class SetupError(LoramillError):
    """This machine can't run loramill as it is set up."""

    code = "setup_error"


class SettingsInvalid(SetupError):
    """A setting is unknown or has a value that makes no sense."""

    code = "settings_invalid"


class PortTaken(SetupError):
    """Another program listens on the port."""

    code = "port_taken"


class DiskFull(SetupError):
    """Too little free space for what is about to be written."""

    code = "disk_full"


class NotEnoughMemory(SetupError):
    """Less memory is free than the command needs."""

    code = "not_enough_memory"


class DatabaseUnusable(SetupError):
    """The record can't be opened: broken file, wrong version, no server."""

    code = "database_unusable"


class StoreUnusable(SetupError):
    """The artifact or checkpoint store can't be used: no such bucket, wrong credentials, or no permission."""

    code = "store_unusable"


class BaseUnusable(SetupError):
    """A base model can't be found, read, or is of an unknown architecture."""

    code = "base_unusable"


class NotRunning(SetupError):
    """Nothing answers at the address of the gateway."""

    code = "not_running"


class ArtifactError(LoramillError):
    """A stored artifact can't be used."""

    code = "artifact_error"


class ArtifactMissing(ArtifactError):
    """No artifact of this hash in the store."""

    code = "artifact_missing"


class ArtifactCorrupt(ArtifactError):
    """An artifact's bytes aren't those that its hash names."""

    code = "artifact_corrupt"


class AdapterInvalid(LoramillError):
    """An adapter doesn't fit the base, or holds what the engine can't serve."""

    code = "adapter_invalid"


class EngineFault(LoramillError):
    """A step of the engine failed, or its books (blocks, slots, pins) don't add up: a defect, here or below."""

    code = "engine_fault"


class JobError(LoramillError):
    """A fine-tune job can't go on."""

    code = "job_failed"


class LeaseLost(JobError):
    """The job was leased to another worker meanwhile; this one may publish nothing."""

    code = "lease_lost"


class JobCancelled(JobError):
    """The job's owner asked it to stop."""

    code = "job_cancelled"


class JobPaused(JobError):
    """The job's owner asked it to wait; it goes on from its checkpoint when resumed."""

    code = "job_paused"


class JobPreempted(JobError):
    """A job of a higher priority takes the place; this one goes on from its checkpoint later."""

    code = "job_preempted"


class OutOfMemory(JobError):
    """A forward or backward pass found no memory."""

    code = "out_of_memory"


class TrainingDiverged(JobError):
    """Loss or gradient became NaN or infinite; `examples` are those of the step, counted from 1 in their file."""

    code = "training_diverged"

    def __init__(self, message: str, *, examples: Sequence[int] = (), param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.examples = tuple(examples)


def first_lines(message: str, lines: int = 2) -> str:
    """The first lines of a message that may list many problems, and how many follow."""
    first, rest = message.splitlines()[:lines], message.splitlines()[lines:]
    more = f"(and {len(rest)} more line{'' if len(rest) == 1 else 's'}: `loramill nightly show --json`)"
    return "\n".join([*first, more] if rest else first)
