"""What each objective of a job needs: its data, its options and its methods."""

from __future__ import annotations

from collections.abc import Mapping

from loramill.data.preferences import DataKind
from loramill.errors import DatasetInvalid, InvalidRequest
from loramill.submission.request import LoramillOptions
from loramill.types import Objective

#: The kind of data that an objective trains on.
DATA_KINDS: Mapping[Objective, DataKind] = {
    "sft": "supervised",
    "dpo": "preference",
    "orpo": "preference",
    "kto": "labeled",
}

#: Options that only some objectives use.
_OPTIONS: Mapping[str, tuple[Objective, ...]] = {
    "beta": ("dpo", "orpo", "kto"),
    "dpo_loss": ("dpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "train_on": ("sft",),
}

_KIND_NAMES: Mapping[DataKind, str] = {
    "supervised": "answers to train on",
    "preference": "preferences between two answers",
    "labeled": "answers with labels",
}

_KIND_FORMATS: Mapping[DataKind, str] = {
    "supervised": "messages, or prompt and completion",
    "preference": "input, preferred_output and non_preferred_output, or prompt, chosen and rejected",
    "labeled": "prompt, completion and label, or messages and label",
}


def check_kind(objective: Objective, kind: DataKind, filename: str, param: str | None = None) -> None:
    """Checks that a file can be used by a job with this objective.

    Raises:
        DatasetInvalid: it has another kind of data.
    """
    needed = DATA_KINDS[objective]
    if kind == needed:
        return
    fitting = " or ".join(f"'{each}'" for each, other in DATA_KINDS.items() if other == kind)
    raise DatasetInvalid(
        f"{filename} holds {_KIND_NAMES[kind]}, and the objective '{objective}' needs {_KIND_NAMES[needed]} "
        f"({_KIND_FORMATS[needed]}): give other data, or set 'objective' to {fitting}.",
        param=param,
    )


def check_objective(options: LoramillOptions) -> None:
    """Checks that the options of a request fit its objective.

    Raises:
        InvalidRequest: an option has no meaning for it, or the method can't train it.
    """
    objective = options.objective or "sft"
    for name, objectives in _OPTIONS.items():
        if getattr(options, name) is not None and objective not in objectives:
            raise InvalidRequest(
                f"'loramill.{name}' has no meaning for the objective '{objective}': leave it out, or set 'objective' "
                f"to {' or '.join(objectives)}.",
                param=f"loramill.{name}",
            )
    if objective != "sft" and options.method == "full":
        raise InvalidRequest(
            f"Full fine-tuning can't train the objective '{objective}', since its trainer computes the loss of single "
            "answers only: use an adapter method such as 'lora'.",
            param="loramill.method",
        )
