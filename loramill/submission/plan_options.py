"""The options of a job that is only planned, as the command line and a spec file give them."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from loramill.settings import JobSettings
from loramill.submission.request import Auto, LoramillOptions, spec_field
from loramill.types import Quantization


class PlanOptions(LoramillOptions):
    """Options of a job, and the base and device that it is planned for."""

    # A command line gives numbers as text. Built when first used, because every start of the command line imports it.
    model_config = ConfigDict(strict=False, defer_build=True)
    base: str | None = Field(
        default=None, description="Base: folder, config.json, hub id, or the size of a Llama such as 65B."
    )
    gpu: str | None = Field(default=None, description="GPU, by memory or name, such as 24GB or h100.")
    cpu: str | None = Field(default=None, description="Memory of a session without a GPU, instead of --gpu.")
    per_gpu: int | None = Field(default=None, description=JobSettings.model_fields["per_gpu"].description)
    tenants: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="Number of such jobs that share one session and its base. Default: one job in its own session.",
    )
    quantization: Quantization | None = Field(
        default=None, description="Quantization of the base. Default: that of the settings; qlora: nf4."
    )
    length: int | None = Field(default=None, description=LoramillOptions.model_fields["max_length"].description)
    batch_size: int | Auto | None = spec_field("batch_size", "8")
    answers: float | None = Field(
        default=None, description="Fraction of the tokens that the loss is computed on. Default: 1."
    )
