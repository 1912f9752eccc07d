"""Text of an answer in pieces: against the whole text, cut by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fot.library.words import Words


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def pieces(data: bytes, stops: list[str]) -> tuple[list[str], bool]:
    words = Words(decode, stops)
    said = []
    for byte in data:
        said.append(words.add(byte))
        if words.stopped:
            break
    return [*said, words.end()], words.stopped


@given(st.text("abEND äß€😀", max_size=30), st.lists(st.text("abEND ä", min_size=1, max_size=4), max_size=3))
def test_pieces_are_the_text_before_the_first_stop(text: str, stops: list[str]) -> None:
    said, stopped = pieces(text.encode(), stops)
    # The stop that is complete first ends the answer; of two that end together, the one that began earlier.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert ("".join(said), stopped) == (text, False)
        return
    shown = text[: min(ends)]
    cut = min(shown.find(stop) for stop in stops if stop in shown)
    assert ("".join(said), stopped) == (shown[:cut], True)


@given(st.binary(max_size=40))
def test_any_bytes_give_the_whole_text_in_the_end(data: bytes) -> None:
    said, _ = pieces(data, [])
    assert "".join(said) == decode(list(data))


def test_half_a_character_waits_for_the_rest() -> None:
    assert pieces("a😀b".encode(), [])[0] == ["a", "", "", "", "😀", "b", ""]


@pytest.mark.parametrize("stops", [["\n\n"], ["x\n\n", "\n\n"]])
def test_what_may_begin_a_stop_waits(stops: list[str]) -> None:
    assert pieces(b"a\nb", stops)[0] == ["a", "", "\nb", ""]
