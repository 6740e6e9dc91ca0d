"""The distributions that a sampler's documentation defines, and a test that tokens are drawn from one."""

import math

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

LOGITS = torch.tensor([1.0, 3.0, 0.5, 2.0, -1.0])
KNOBS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 3},
    {"top_p": 0.7},
    {"top_p": 0.99},
    {"temperature": 2.0, "top_k": 4, "top_p": 0.6},
    {"top_k": 1},
    {"top_p": 0.01},
    {"top_k": 50},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 3.0, "top_k": 4, "top_p": 0.95, "min_p": 0.5},
]
#: Parameters of rows that are sampled together.
MIXED = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 40, "min_p": 0.01},
    {"repetition_penalty": 1.3},
    {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "top_p": 0.5},
    {"logit_bias": ((3, 9.0),), "temperature": 2.0},
    {"min_tokens": 3, "stop_ids": (1, 5), "temperature": 1.0},
]


def naive(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The distribution by the definitions, one filter after the other, each renormalised; float64."""
    x = logits.double().numpy()
    p = np.exp((x - x.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0.0
        p /= p.sum()
    before = p[order].cumsum() - p[order]
    p[order[1:][before[1:] >= top_p]] = 0.0
    p /= p.sum()
    p[p < min_p * p.max()] = 0.0
    return p / p.sum()


def oracle(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The same by transformers, in its own order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    warpers += [TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]
    return warpers(None, logits[None].double())[0].softmax(-1).numpy()


def assert_drawn_from(p: np.ndarray, drawn: list[int]) -> None:
    """Pearson's chi-square at a chance of about one in 10^6, by Wilson and Hilferty; nothing of probability 0."""
    counts = np.bincount(drawn, minlength=len(p))
    assert not counts[p == 0].any()
    expected = p * len(drawn)
    common = expected >= 5
    got = np.append(counts[common], counts[~common].sum())
    due = np.append(expected[common], expected[~common].sum())
    got, due = got[due > 0], due[due > 0]
    freedom = len(got) - 1
    if freedom:
        chi = ((got - due) ** 2 / due).sum()
        assert (chi / freedom) ** (1 / 3) < 1 - 2 / (9 * freedom) + 4.8 * math.sqrt(2 / (9 * freedom))
