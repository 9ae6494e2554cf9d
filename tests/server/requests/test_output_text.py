import codecs
import re
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from model.tokenizer import BytesTokenizer
from server.requests.output_text import OutputText, StopStrings

TOKENIZER = BytesTokenizer()
ALPHABET = "ab\u00e9\u20ac\U0001f600"


class PieceTokenizer(BytesTokenizer):
    """A tokenizer in which token i stands for piece i, which may be any bytes."""

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__()
        self._pieces = pieces

    def token_bytes(self, id: int) -> bytes:
        return self._pieces[id]


def stream(pieces: list[bytes], stops: list[str], *, num_free: int = 0) -> tuple[list[str], str | None]:
    """Return the text that each piece and then `finish` releases, and the stop string that ended the text."""
    output = OutputText(PieceTokenizer(pieces), stops=StopStrings(stops), num_free=num_free)
    released = []
    for token in range(len(pieces)):
        released.append(output.add(token))
        if output.matched_stop is not None:
            break
    return [*released, output.finish()], output.matched_stop


def slow_cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Cut the text by the definition: at the stop string that ends first, of several that end there at the longest."""
    for end in range(1, len(text) + 1):
        ending_here = [stop for stop in stops if text[:end].endswith(stop)]
        if ending_here:
            longest = max(ending_here, key=len)
            return text[: end - len(longest)], longest
    return text, None


def slow_shown(text: str, stops: list[str]) -> str:
    """Return by the definition the longest prefix that no stop string can still cut, whatever text follows."""
    cut, matched = slow_cut(text, stops)
    if matched is not None:
        return cut
    claimable = [i for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in stops)]
    return text[: min(claimable, default=len(text))]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in pairwise(edges)]


texts = st.text(ALPHABET, max_size=40)
stop_lists = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=4)


@given(texts, stop_lists, st.lists(st.integers(0, 200), max_size=40))
def test_the_text_is_cut_at_the_stop_string_completed_first_however_it_was_cut_into_tokens(text, stops, places):
    released, matched = stream(cut(text.encode(), places), stops)
    assert ("".join(released), matched) == slow_cut(text, stops)


@given(st.binary(max_size=40), stop_lists, st.lists(st.integers(0, 200), max_size=40))
def test_bytes_that_are_no_text_are_shown_as_replacement_characters_and_cut_alike(data, stops, places):
    released, matched = stream(cut(data, places), stops)
    assert ("".join(released), matched) == slow_cut(data.decode(errors="replace"), stops)


@given(st.binary(max_size=40) | texts.map(str.encode), stop_lists, st.lists(st.integers(0, 200), max_size=40))
def test_after_every_token_the_longest_prefix_is_out_that_no_stop_string_can_still_claim(data, stops, places):
    pieces = cut(data, places)
    *released, _ = stream(pieces, stops)[0]
    for i in range(1, len(released) + 1):
        certain = codecs.getincrementaldecoder("utf-8")(errors="replace").decode(b"".join(pieces[:i]))
        assert "".join(released[:i]) == slow_shown(certain, stops)


@given(texts, stop_lists, st.lists(st.integers(0, 200), max_size=40), st.integers(0, 10))
def test_text_of_the_first_tokens_belongs_to_no_stop_string(text, stops, places, num_free):
    pieces = cut(text.encode(), places)
    released, matched = stream(pieces, stops, num_free=num_free)
    free = b"".join(pieces[:num_free]).decode(errors="ignore")
    rest, expected = slow_cut(text[len(free) :], stops)
    assert ("".join(released), matched) == (free + rest, expected)
    assert "".join(released[:num_free]) == free


def test_the_remains_of_an_unfinished_character_belong_to_the_last_token():
    assert stream([b"a", b"\xe2\x82"], ["\ufffd"], num_free=2) == (["a", "", "\ufffd"], None)
    assert stream([b"a", b"\xe2\x82"], ["\ufffd"], num_free=1) == (["a", "", ""], "\ufffd")


def test_a_stop_string_may_span_tokens_and_is_trimmed():
    released, matched = stream([b"one T", b"W", b"O three"], ["TWO"])
    assert released == ["one ", "", "", ""]
    assert matched == "TWO"


def test_text_held_back_in_vain_is_released():
    released, matched = stream([b"a\n", b"\nb", b"\n"], ["\n\n\n"])
    assert released == ["a", "\n\nb", "", "\n"]
    assert matched is None


def test_the_beginning_of_one_stop_string_may_hide_inside_another():
    assert "".join(stream([b"aab"], ["aaa", "ab"])[0]) == "a"
    assert stream([b"xabcd"], ["abcde", "bcd"]) == (["xa", ""], "bcd")


def test_a_character_is_never_split():
    released, _ = stream([bytes([byte]) for byte in "€é".encode()], [])
    assert released == ["", "", "€", "", "é", ""]


def test_an_unfinished_character_that_completes_a_stop_string_is_trimmed():
    released, matched = stream([b"a", b"\xe2\x82"], ["\ufffd"])
    assert (released, matched) == (["a", "", ""], "\ufffd")


def test_a_thousand_stop_strings_cost_no_more_per_character_than_one():
    stops = [f"{i:04d}stop" for i in range(1000)]
    released, matched = stream([b"0999sto", b"p later"], stops)
    assert "".join(released) == ""
    assert matched is not None
    assert re.fullmatch("0999stop", matched)
