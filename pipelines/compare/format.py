"""Numbers as text."""

from __future__ import annotations

_STEPS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def scaled(number: float) -> str:
    """A number of at least 0 in three digits, such as `4.88M`."""
    for step, letter in _STEPS:
        if number >= 0.9995 * step:
            return f"{float(f'{number / step:.3g}'):g}{letter}"
    return f"{float(f'{number:.3g}'):g}"


def size(number: float) -> str:
    """Bytes: `512 MB`, in powers of ten."""
    text = scaled(number)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def duration(seconds: float) -> str:
    """A short time: `1.52 s`, `8.31 ms`."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
