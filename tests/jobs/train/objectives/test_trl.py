"""TRL's trainers as the oracle of preference tuning: loss, metrics and gradients of one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from loramill.jobs.train.objectives import losses
from loramill.jobs.train.objectives.losses import METRICS, AnswerLogProbs, PassLoss

from ....llama import tiny_llama

BETA = 0.2
VOCABULARY = 40
#: Prompt, chosen and rejected answer, of different lengths; token 0 ends an answer.
PAIRS = (
    ((5, 6, 7), (8, 9, 10, 11), (12,)),
    ((13, 14), (15, 16), (17, 18, 19, 20, 21)),
    ((22,), (23,), (24, 25)),
    ((5, 26, 27, 28, 29), (30, 31, 32), (33, 34, 35)),
)
LABELS = (True, False, False, True)
#: With prompts of one token, whose cross-entropy ORPO in TRL can't add: nothing predicts it.
SHORT_PROMPTS = tuple((prompt[:1], chosen, rejected) for prompt, chosen, rejected in PAIRS)

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]


@pytest.fixture
def policy() -> LlamaForCausalLM:
    return tiny_llama(seed=2, vocab_size=VOCABULARY, initializer_range=0.2)


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    return tiny_llama(seed=1, vocab_size=VOCABULARY, initializer_range=0.2).requires_grad_(False)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo_is_that_of_trl(policy, reference, tmp_path, loss_type):
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(**_arguments(tmp_path), loss_type=loss_type)
    trainer = DPOTrainer(policy, reference, arguments, train_dataset=_pairs(PAIRS), processing_class=_tokenizer())
    expected = _loss_of_trl(trainer, policy)

    loss_of = losses.dpo_sigmoid if loss_type == "sigmoid" else losses.dpo_ipo
    found = _whole_and_in_parts(
        policy,
        lambda pairs: loss_of(
            *_log_probs_of_pairs(policy, pairs),
            *(side.sums for side in _log_probs_of_pairs(reference, pairs)),
            beta=BETA,
            pairs=len(PAIRS),
        ),
        PAIRS,
    )
    _assert_equal(found, expected)


def test_orpo_is_that_of_trl(policy, tmp_path):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    arguments = ORPOConfig(**_arguments(tmp_path))
    trainer = ORPOTrainer(policy, arguments, train_dataset=_pairs(SHORT_PROMPTS), processing_class=_tokenizer())
    expected = _loss_of_trl(trainer, policy)

    tokens = sum(len(chosen) + 1 for _, chosen, _ in SHORT_PROMPTS)
    found = _whole_and_in_parts(
        policy,
        lambda pairs: losses.orpo(
            *_log_probs_of_pairs(policy, pairs), beta=BETA, pairs=len(SHORT_PROMPTS), chosen_tokens=tokens
        ),
        SHORT_PROMPTS,
    )
    _assert_equal(found, expected)


@pytest.mark.parametrize("labels", [LABELS, (False, False, False, False)])
def test_kto_is_that_of_trl(policy, reference, tmp_path, labels):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    answers = [(prompt, chosen) for prompt, chosen, _ in PAIRS]
    rows = [
        {"prompt": _text(prompt), "completion": f" {_text(answer)}", "label": label}
        for (prompt, answer), label in zip(answers, labels, strict=True)
    ]
    weights = {"desirable_weight": 0.75, "undesirable_weight": 1.5}
    arguments = KTOConfig(**_arguments(tmp_path), **weights)
    trainer = KTOTrainer(
        policy, reference, arguments, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer()
    )
    expected = _loss_of_trl(trainer, policy)

    mismatched = [(prompt, answers[index - 1][1]) for index, (prompt, _) in enumerate(answers)]
    with torch.no_grad():
        kl = losses.kto_kl(*(_log_probs(model, mismatched).sums for model in (policy, reference)))
    assert kl > 0
    found = _whole_and_in_parts(
        policy,
        lambda part: losses.kto(
            _log_probs(policy, [answer for answer, _ in part]),
            _log_probs(reference, [answer for answer, _ in part]).sums,
            torch.tensor([label for _, label in part]),
            kl=kl,
            beta=BETA,
            **weights,
            desirable_answers=sum(labels),
            undesirable_answers=len(labels) - sum(labels),
        ),
        list(zip(answers, labels, strict=True)),
    )
    _assert_equal(found, expected)


def _arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "beta": BETA,
        "per_device_train_batch_size": len(PAIRS),
        "max_length": None,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token per word."""
    words = {_text([token]): token for token in range(3, VOCABULARY)} | {"<end>": 0, "<unknown>": 1, "<pad>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def _text(tokens: Sequence[int]) -> str:
    return " ".join(f"word{token}" for token in tokens)


def _pairs(pairs: Sequence[Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"prompt": _text(prompt), "chosen": f" {_text(chosen)}", "rejected": f" {_text(rejected)}"}
            for prompt, chosen, rejected in pairs
        ]
    )


def _loss_of_trl(trainer: Any, policy: LlamaForCausalLM) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """Loss, metrics and gradients of the batch with all examples, in order."""
    rows = [trainer.train_dataset[index] for index in range(len(PAIRS))]
    policy.train().zero_grad()
    loss = trainer.compute_loss(policy, trainer.data_collator(rows))
    loss.backward()
    stored = (getattr(trainer, "_metrics", None) or trainer._stored_metrics)["train"]
    assert stored
    return loss.item(), {name: values[-1] for name, values in stored.items()}, _gradients(policy)


def _whole_and_in_parts(
    policy: LlamaForCausalLM, loss_of: Callable[[Sequence[Any]], PassLoss], batch: Sequence[Any]
) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """Loss, metrics and gradients of a batch in passes of 1 and 3; they equal those of one pass."""
    found = []
    for parts in ([batch], [batch[:1], batch[1:]]):
        policy.zero_grad()
        passes = [loss_of(part) for part in parts]
        for each in passes:
            each.loss.backward()
        loss, metrics = sum(each.loss.item() for each in passes), sum(each.metrics for each in passes)
        found.append((loss, metrics, _gradients(policy)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6, equal_nan=True)
    loss, metrics, gradients = found[1]
    return loss, dict(zip(METRICS, metrics.tolist(), strict=True)), gradients


def _assert_equal(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    for name in set(METRICS) & set(expected[1]):  # TRL has no rewards of answers that are not in the batch
        assert found[1][name] == pytest.approx(expected[1][name], abs=1e-5), name
    assert max(gradient.abs().max() for gradient in found[2]) > 1e-3
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-6)


def _gradients(model: LlamaForCausalLM) -> list[torch.Tensor]:
    return [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in model.parameters()]


def _log_probs_of_pairs(model: LlamaForCausalLM, pairs: Sequence[Any]) -> list[AnswerLogProbs]:
    """Log-probabilities of the chosen and of the rejected answers, from one pass."""
    both = _log_probs(model, [(prompt, answer) for prompt, *answers in pairs for answer in answers])
    return [replace(both, sums=both.sums[side::2], tokens=both.tokens[side::2]) for side in (0, 1)]


def _log_probs(model: LlamaForCausalLM, sequences: Sequences) -> AnswerLogProbs:
    """Log-probabilities of answers, with their end, after their prompts: one forward pass each, without padding."""
    found, counts = [], []
    for prompt, answer in sequences:
        tokens = torch.tensor([*prompt, *answer, 0])
        log_probs = model(tokens[None]).logits[0].log_softmax(-1)
        found.append(log_probs[:-1].gather(1, tokens[1:, None])[len(prompt) - 1 :, 0])
        counts.append(len(answer) + 1)
    return losses.sum_by_answer(torch.cat(found), counts)
