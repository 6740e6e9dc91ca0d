"""Token bytes: joined, they are the text, for every kind of vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from loramill.data.token_bytes import TokenBytes, bytes_as_text
from loramill.data.tokenizer import ChatTokenizer
from loramill.serve.api.generation.offsets import TextOffsets
from loramill.serve.engine import TokenLogprobs
from loramill.serve.protocol import TokenText
from loramill.serve.replica.output_assembler import TokenTexts

EMOJI = "Emoji list: \U0001f600 \U0001f603 \U0001f604"

# SmolLM2 has no tokens for seven control characters and for unassigned planes, and drops them
text = st.text(st.characters(exclude_categories=["Cs", "Cn", "Cc"], include_characters="\n\t\r"), max_size=40)

PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "\u2581",
    "a",
    "b",
    "\u2581a",
    "\u2581ab",
]
SPECIAL = ("<unk>", "<s>", "</s>")


def sentencepiece(kind: str) -> Tokenizer:
    """A few pieces, and one byte token each for everything else, as in Llama 2's tokenizer."""
    ids = {piece: number for number, piece in enumerate(PIECES)}
    merges = [("\u2581", "a"), ("\u2581a", "b")]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace, fallback, fuse = decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()
    if kind == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.decoder = decoders.Sequence([replace, fallback, fuse, decoders.Strip(" ", 1, 0)])
    elif kind == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.decoder = decoders.Sequence([replace, fallback, fuse])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([fallback, decoders.Metaspace(prepend_scheme="first", split=False)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def joined(tokens: TokenBytes, ids: list[int]) -> bytes:
    found, first = b"", True
    for token in ids:
        raw = tokens.bytes_of(token, first=first)
        found, first = found + (raw or b""), first and raw is None
    return found


@given(text=text)
@example(text=EMOJI)
@example(text="  two  spaces\n\n\t12 <|im_end|>")
def test_bytes_of_the_real_tokenizer_are_its_text(tokenizer: ChatTokenizer, text: str) -> None:
    assert joined(tokenizer.token_bytes, tokenizer.encode_text(text)) == text.encode()


@given(ids=st.lists(st.integers(0, 49151), max_size=60))
def test_bytes_of_any_tokens_decode_to_their_text(tokenizer: ChatTokenizer, ids: list[int]) -> None:
    assert joined(tokenizer.token_bytes, ids).decode(errors="replace") == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["llama", "gemma", "metaspace"])
@given(text=st.text(st.sampled_from("ab \u00e9\u65e5\U0001f642\n<0xF>"), max_size=20))
@example(text=EMOJI)
@example(text=" a  ab")
def test_bytes_of_sentencepiece_are_its_text(kind: str, text: str) -> None:
    tokenizer = sentencepiece(kind)
    tokens = TokenBytes(tokenizer, frozenset(range(3)))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert joined(tokens, [1, *ids, 2]).decode() == tokenizer.decode(ids)


def test_tokens_are_displayed_as_text(tokenizer: ChatTokenizer) -> None:
    tokens = tokenizer.token_bytes
    assert [tokens.text(token) for token in tokenizer.encode_text("Hi you")] == ["Hi", " you"]
    assert [(tokens.text(token), tokens.bytes_of(token)) for token in (0, 2)] == [
        ("<|endoftext|>", None),
        ("<|im_end|>", None),
    ]
    assert (tokens.text(49999), tokens.bytes_of(49999)) == ("token_id:49999", None)
    assert (
        bytes_as_text(b"\xf0\x9f") == r"\xf0\x9f"
        and bytes_as_text(b" \xf0") == r" \xf0"
        and bytes_as_text("\u00e9".encode()) == "\u00e9"
    )


def test_an_unknown_decoder_gives_the_bytes_of_the_text() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    assert TokenBytes(tokenizer, frozenset()).bytes_of(1) == b"b"


def test_alternatives_with_the_same_text_have_different_names() -> None:
    tokens = TokenBytes(sentencepiece("llama"), frozenset(range(3)))
    ids = {piece: number for number, piece in enumerate(PIECES)}
    alike = [ids["\u2581a"], ids["a"], ids["<0x61>"]]
    logprobs = [(token, -1.0 - at) for at, token in enumerate(alike)]
    texts = TokenTexts(tokens)
    first = texts.translate(TokenLogprobs(alike[1], -2.0, tuple(logprobs)))
    # The chosen token keeps its text; no text includes the space before the first token.
    assert first.token == TokenText("a", -2.0, b"a")
    assert [(top.text, top.logprob) for top in first.top] == [("\u2581a", -1.0), ("a", -2.0), ("<0x61>", -3.0)]
    later = texts.translate(TokenLogprobs(alike[0], -1.0, tuple(logprobs)))
    assert [(top.text, top.raw) for top in later.top] == [(" a", b" a"), ("a", b"a"), ("<0x61>", b"a")]


@pytest.mark.parametrize(
    ("raws", "expected"),
    [
        ([b"a", b" b", b"c"], [0, 1, 3]),
        ([b"\xf0\x9f", b"\x99", b"\x82", b"!"], [0, 0, 0, 1]),
        ([b"a\xf0\x9f", b"\x99\x82b\xc3", b"\xa9", b""], [0, 1, 3, 4]),
        ([b"\xf0", b"a", b"b"], [0, 1, 2]),
        ([None, b"a", None], [0, 0, 1]),
    ],
)
def test_offsets_count_characters(raws: list[bytes | None], expected: list[int]) -> None:
    offsets = TextOffsets()
    tokens: list[Any] = [TokenText("", None, raw) for raw in raws]
    assert [offsets.next_offset(token) for token in tokens] == expected
    assert TextOffsets().next_offset(TokenText("", None, b"abc"), 0) == 0


@given(text=text)
def test_offsets_are_the_texts_before(tokenizer: ChatTokenizer, text: str) -> None:
    ids, offsets = tokenizer.encode_text(text), TextOffsets()
    for at, token in enumerate(ids):
        raw = tokenizer.token_bytes.bytes_of(token)
        whole = tokenizer.decode(ids[:at]).rstrip("\ufffd")
        assert offsets.next_offset(TokenText("", None, raw)) == len(whole)
