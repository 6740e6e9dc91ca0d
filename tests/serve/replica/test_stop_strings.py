from hypothesis import given
from hypothesis import strategies as st

from loramill.serve.replica.stop_strings import StopScanner

texts = st.text(alphabet="abc", max_size=30)


def run(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, bool]:
    scanner, shown = StopScanner(stops), ""
    for piece in pieces:
        text, stopped = scanner.push(piece)
        shown += text
        if stopped:
            return shown, True
    return shown + scanner.finish(), False


def test_a_stop_string_across_pieces_is_cut_off() -> None:
    assert run(["Hello wo", "rld, the", "re"], ("world",)) == ("Hello ", True)


def test_the_first_of_several_stops_wins() -> None:
    assert run(["one two three"], ("three", "two")) == ("one ", True)


def test_an_incomplete_stop_string_is_returned_at_the_end() -> None:
    assert run(["ends with a st"], ("stop",)) == ("ends with a st", False)


def test_only_text_that_can_become_a_stop_string_is_held_back() -> None:
    scanner = StopScanner(("END",))
    assert scanner.push("abcE") == ("abc", False)
    assert scanner.push("xyz") == ("Exyz", False)


@given(pieces=st.lists(texts, max_size=8), stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3))
def test_streaming_equals_a_search_in_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    shown, stopped = run(pieces, tuple(stops))
    whole = "".join(pieces)
    found = [at for stop in stops if (at := whole.find(stop)) >= 0]
    assert stopped == bool(found)
    # Which of two overlapping stops is found first may depend on the pieces; the text never contains one.
    assert whole.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if not found:
        assert shown == whole
