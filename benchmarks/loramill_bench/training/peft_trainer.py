"""The baseline of training: PEFT's LoRA and transformers' Trainer, with padded batches."""

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


class PeftTrainer(TrainerCallback):  # type: ignore[misc]
    """transformers' Trainer in a thread, which takes one optimizer step per call of `step`; a context manager.

    Args:
        base: The base.
        spec: The job that it is compared with: initial weights, learning rates and sizes are the same.
        batches: The examples of each step.
        scratch: Folder for Trainer's output.
    """

    def __init__(self, base: Base, spec: JobSpec, batches: Sequence[Sequence[EncodedExample]], scratch: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.bfloat16)
        with attach_adapter(model, spec, base.folder) as adapted:
            weights = {name: weight.detach().clone() for name, weight in adapted.weights.items()}
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
            data_collator=_collate,
            optimizers=(optimizer, rates),
            callbacks=[self],
        )
        self._trainer.remove_callback(PrinterCallback)
        self._requested, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._ending, self._loss = False, 0.0
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._train, name="rival", daemon=True)

    def __enter__(self) -> PeftTrainer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending = True
        self._requested.release()
        self._thread.join()

    def step(self) -> float:
        """Takes an optimizer step; returns its loss."""
        self._requested.release()
        self._done.acquire()
        if self._failed is not None:
            raise self._failed
        return self._loss

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Waits until the next step is requested."""
        self._requested.acquire()
        if self._ending:
            raise _Stopped

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Ends a step: Trainer logs it as its last action."""
        if "loss" in logs:
            self._loss = logs["loss"]
            self._done.release()

    def _train(self) -> None:
        torch.set_num_threads(1)  # a setting of each thread
        try:
            self._trainer.train()
        except _Stopped:
            pass
        except Exception as error:  # raised by `step`
            log.exception("Trainer failed")
            self._failed = error
            self._done.release()


class _Stopped(Exception):  # never leaves this module
    """No further steps are requested."""


def _collate(examples: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
    width = max(len(example.tokens) for example in examples)
    tokens, mask = torch.zeros(len(examples), width, dtype=torch.long), torch.zeros(len(examples), width).long()
    labels = torch.full_like(tokens, -100)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens[row, :length] = torch.tensor(example.tokens)
        labels[row, example.prompt_length : length] = tokens[row, example.prompt_length : length]
        mask[row, :length] = 1
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}
