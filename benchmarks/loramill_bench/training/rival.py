"""Training as most people do it: PEFT's LoRA and transformers' Trainer, over padded batches."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from loramill.data.encoding import EncodedExample
from loramill.jobs.train.lr_schedule import learning_rate
from loramill.jobs.train.methods import attach_adapter
from loramill.models.catalog import Base
from loramill.types import JobSpec

log = logging.getLogger(__name__)


class Rival(TrainerCallback):  # type: ignore[misc]
    """Trainer's own loop, held after each optimizer step until it is asked for the next.

    Args:
        spec: whose adapter's first weights, rates and numbers it has, too.
        batches: the examples of each step.
    """

    def __init__(self, base: Base, spec: JobSpec, batches: Sequence[Sequence[EncodedExample]], scratch: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.bfloat16)
        with attach_adapter(model, spec, base.folder) as tuned:
            weights = {name: weight.detach().clone() for name, weight in tuned.weights.items()}
        config = LoraConfig(
            task_type="CAUSAL_LM", r=spec.rank, lora_alpha=int(spec.alpha), target_modules=list(spec.targets)
        )
        self._model = get_peft_model(model, config)
        set_peft_model_state_dict(self._model, weights)
        learned = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=spec.learning_rate, weight_decay=0.0, fused=True)
        rates = LambdaLR(optimizer, lambda step: learning_rate(spec, min(step, spec.steps - 1)) / spec.learning_rate)
        self._trainer = Trainer(
            model=self._model,
            args=TrainingArguments(
                str(scratch / "rival"),
                per_device_train_batch_size=spec.batch_size,
                max_steps=spec.steps,
                max_grad_norm=spec.max_grad_norm,
                train_sampling_strategy="sequential",
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="steps",
                logging_steps=1,
                remove_unused_columns=False,
                disable_tqdm=True,
            ),
            train_dataset=[example for batch in batches for example in batch],
            data_collator=_padded,
            optimizers=(optimizer, rates),
            callbacks=[self],
        )
        self._trainer.remove_callback(PrinterCallback)
        self._asked, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._ending, self._loss = False, 0.0
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._train, name="rival", daemon=True)

    def __enter__(self) -> Rival:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending = True
        self._asked.release()
        self._thread.join()

    def step(self) -> float:
        """Lets it take an optimizer step; returns the step's loss."""
        self._asked.release()
        self._done.acquire()
        if self._failed is not None:
            raise self._failed
        return self._loss

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Holds Trainer."""
        self._asked.acquire()
        if self._ending:
            raise _Ended

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Notes that Trainer is done with a step, whose last work is to log it."""
        if "loss" in logs:
            self._loss = logs["loss"]
            self._done.release()

    def _train(self) -> None:
        torch.set_num_threads(1)  # a thread's own
        try:
            self._trainer.train()
        except _Ended:
            pass
        except Exception as error:  # it is raised where the step was asked for
            log.exception("the rival failed")
            self._failed = error
            self._done.release()


class _Ended(Exception):  # never leaves this module
    """No more steps are wanted."""


def _padded(examples: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
    width = max(len(example.tokens) for example in examples)
    tokens, mask = torch.zeros(len(examples), width, dtype=torch.long), torch.zeros(len(examples), width).long()
    labels = torch.full_like(tokens, -100)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens[row, :length] = torch.tensor(example.tokens)
        labels[row, example.prompt_length : length] = tokens[row, example.prompt_length : length]
        mask[row, :length] = 1
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}
