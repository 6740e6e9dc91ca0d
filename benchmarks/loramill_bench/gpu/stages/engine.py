"""The stage engine: Llama-3-8B with random weights and adapters of rank 16 at all linears, from start to load."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from loramill.sizing.anatomy import Anatomy, anatomy
from loramill_bench.gpu import model
from loramill_bench.gpu.bases import llama, random_decoder, served_billions
from loramill_bench.gpu.session import BROKEN, EngineSession, Run, engine_session, median_ms
from loramill_bench.gpu.stage import Context
from loramill_bench.results import Result

#: Rows, different adapters among them, and tokens of context of the measured decodes.
_DECODES = ((1, 0, 1024), (1, 1, 1024), (32, 0, 1024), (32, 32, 1024), (128, 32, 512))
_DRY_DECODES = ((1, 1, 20), (4, 4, 20))
_PREFIX = 4096


def measure(context: Context) -> Iterator[Result]:
    """Warm-up, decodes, prompts, a cached prefix, loads during decodes, and an adapter with a NaN."""
    shapes = llama(context, served_billions())
    base = anatomy(shapes)
    with (
        tempfile.TemporaryDirectory(prefix="loramill-bench-") as scratch,
        engine_session(context, random_decoder(context, shapes), Path(scratch)) as session,
    ):
        begun = time.monotonic()
        session.engine.warm_up()
        yield Result("gpu engine: warm-up", time.monotonic() - begun, "s")
        yield from _idle_adapters(context, session)
        for rows, adapters, length in context.choose(_DECODES, _DRY_DECODES):
            yield from _decodes(context, session, base, rows, adapters, length)
        yield from _prompts(context, session)
        yield from _prefix(context, session)
        yield from _loads(context, session)
        yield from _broken(session)
        yield from _profile(context, session, base.layers)
        session.engine.check_integrity()
        context.note(f"loads {session.engine.stats.load_times}")
        if not context.dry:
            yield Result("gpu engine: peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")


def _versions(adapters: int) -> list[str | None]:
    return [str(number) for number in range(adapters)] or [None]


def _decodes(
    context: Context, session: EngineSession, base: Anatomy, rows: int, adapters: int, length: int
) -> Iterator[Result]:
    """A decode step with greedy answers, and with the default temperature of OpenAI's API."""
    case, new = f"gpu decode {rows}/{adapters}", context.choose(160 if rows > 32 else 96, 12)
    found: dict[str, float] = {}
    sampling: dict[str, dict[str, Any]] = {"greedy": {}, "temperature 1": {"temperature": 1.0, "seed": 1}}
    for kind, params in sampling.items():
        run = session.decode(rows, _versions(adapters), length, new, **params)
        full = run.full_steps(rows)
        found[kind] = median_ms(full)
        yield Result(f"{case}: {kind} step", found[kind], "ms")
        yield Result(f"{case}: {kind} slowest step", 1e3 * max(full[5:], default=0.0), "ms")
        yield Result(f"{case}: {kind} errors", len(run.errors), "answers")
    yield Result(f"{case}: temperature 1 over greedy", found["temperature 1"] / found["greedy"], "x")
    step = model.Decode(rows, length + new // 2, adapters)
    floor = 1e3 * model.decode_bytes(base, step) / context.bandwidth
    if floor:
        yield Result(f"{case}: over the floor", found["greedy"] / floor, "x")
        parts = model.decode_seconds(base, step, context.bandwidth)
        context.note(f"{case}: {found['greedy']:.2f} ms, modeled {1e3 * parts.total:.2f} ms: {parts}")


def _idle_adapters(context: Context, session: EngineSession) -> Iterator[Result]:
    """What adapters cost a step that uses none: 32 are loaded between two measurements of it."""
    rows, length, new = context.choose((32, 512, 96), (4, 20, 12))
    before = median_ms(session.decode(rows, [None], length, new).full_steps(rows))
    session.decode(rows, _versions(rows), 16, 2)
    after = median_ms(session.decode(rows, [None], length, new).full_steps(rows))
    yield Result(f"gpu decode {rows}/0: idle adapters added", after / before - 1, "of the step")


def _prompts(context: Context, session: EngineSession) -> Iterator[Result]:
    """Time to first token of prompts, and of prompts that are one and two tokens longer."""
    for length in context.choose((128, 512, 2048), (20, 40)):
        session.first_token_ms(session.prompt(length), "0")  # compiles
        known = session.first_token_ms(session.prompt(length), "0")
        longer = max(session.first_token_ms(session.prompt(length + more), "0") for more in (1, 2))
        yield Result(f"gpu prompt {length}: first token", known, "ms")
        yield Result(f"gpu prompt {length}: a new length over a known one", longer / known, "x")


def _prefix(context: Context, session: EngineSession) -> Iterator[Result]:
    """A prompt of 200 tokens behind a cached prefix, which needs no matrix of scores."""
    prefix, new = context.choose((_PREFIX, 200), (64, 20))
    start = session.prompt(prefix)
    session.first_token_ms(start, "0")
    session.first_token_ms(start + session.prompt(new), "0")
    found: list[float] = []
    before = 0 if context.dry else torch.cuda.memory_allocated()
    peak = context.peak_bytes(lambda: found.append(session.first_token_ms(start + session.prompt(new + 1), "0")))
    yield Result("gpu prefix: first token", found[0], "ms")
    yield Result("gpu prefix: memory", (peak - before) / 1e6, "MB")


def _loads(context: Context, session: EngineSession) -> Iterator[Result]:
    """Gaps between the tokens of answers while adapters are loaded, with the gaps while none is."""
    rows, new, loads = context.choose((32, 300, 16), (4, 20, 4))
    quiet = sorted(session.decode(rows, ["1"], 20, new).full_steps(rows))
    for _ in range(rows):
        session.submit(session.prompt(20), new, "1")
    for _ in range(context.choose(20, 4)):
        session.engine.step()
    gaps: list[float] = []
    for number in range(loads):
        # The request itself ends with its first token; its prompt makes the step a mixed one, which is not counted.
        request = session.submit(session.prompt(4), 1, str(100 + number))
        answered = False
        while not answered:
            begun = time.perf_counter()
            outputs = session.engine.step()
            gap = time.perf_counter() - begun
            answered = any(output.request_id == request for output in outputs)
            if not outputs:
                break
            if not answered:
                gaps.append(gap)
    session.run()
    busy = sorted(gaps)
    if quiet and busy:
        yield Result("gpu loads: p99 gap", _percentile(busy, 0.99) / _percentile(quiet, 0.99), "x")
        yield Result("gpu loads: median gap", 1e3 * _percentile(busy, 0.5), "ms")


def _percentile(ascending: list[float], share: float) -> float:
    return ascending[min(len(ascending) - 1, round(share * (len(ascending) - 1)))]


def _broken(session: EngineSession) -> Iterator[Result]:
    """An adapter with a NaN ends its own answers, and changes no other tokens."""
    prompt = list(range(3, 40))
    # Both batches have the same shapes: a GPU's last bits depend on them.
    _, expected = _answers_with(session, "1", prompt)
    run, tokens = _answers_with(session, BROKEN, prompt)
    yield Result("gpu engine: answers of a broken adapter", len(run.errors), "errors")
    differing = len(expected) - len(tokens) or sum(a != b for a, b in zip(tokens, expected, strict=True))
    yield Result("gpu engine: tokens that differ next to a broken adapter", differing, "tokens")


def _answers_with(session: EngineSession, version: str, prompt: list[int]) -> tuple[Run, list[int]]:
    """Three answers by a version, and the tokens of one by another."""
    for _ in range(3):
        session.submit(prompt, 12, version)
    other = session.submit(prompt, 12, "2")
    run = session.run()
    return run, run.tokens[other]


def _profile(context: Context, session: EngineSession, layers: int) -> Iterator[Result]:
    """The kernels of a decode step of 32 rows with 32 adapters."""
    if context.dry:
        return
    from torch.profiler import ProfilerActivity, profile

    for number in range(32):
        session.submit(session.prompt(64), 24, str(number))
    for _ in range(12):
        session.engine.step()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        session.engine.step()
        torch.cuda.synchronize()
    table = seen.key_averages().table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=70)
    (context.folder / "decode_profile.txt").write_text(table, encoding="utf-8")
    session.run()
    kernels = [event for event in seen.events() if event.device_type.name == "CUDA"]
    if kernels:
        yield Result("gpu decode 32/32: launches per layer", len(kernels) / layers, "launches")
