"""The text of a place, and which place a store's snapshot is."""

from __future__ import annotations

import pytest

from services.web.places import Place, place_of_store, place_of_text
from services.web.problems import Problem
from shared.batches import Cursor, CursorKey

PLACE = Place("0123456789abcdef", "candles", {0: Cursor(7, "1703545260123-4"), 3: Cursor(0, "0-0")})


def test_a_place_survives_its_text() -> None:
    text = PLACE.text()
    assert text.isascii()
    assert not set(text) & set('"\\+/= \n')
    assert place_of_text(text, "candles") == PLACE


@pytest.mark.parametrize(
    "text", ["", "x", "%%%", "AAAA", "ümlaut", PLACE.text()[:-3], PLACE.text() + "AAAA", "A" * 100_000,
             Place("", "candles", {0: Cursor(1, "1-1")}).text(), Place("a", "candles", {}).text()],
)  # fmt: skip
def test_other_texts_are_none(text: str) -> None:
    with pytest.raises(Problem) as told:
        place_of_text(text, "candles")
    assert told.value.status == 400
    assert "id" in str(told.value)


def test_a_place_is_of_its_topic() -> None:
    with pytest.raises(Problem, match="another channel"):
        place_of_text(PLACE.text(), "signals")


def cursors(*held: tuple[str, str, int]) -> dict[CursorKey, Cursor]:
    return {key: Cursor(5, "9-1") for key in held}


def test_the_place_of_a_snapshot() -> None:
    start, nine = Cursor(0, "0-0"), Cursor(5, "9-1")
    held = cursors(("b", "candles", 1), ("b", "signals", 0))
    assert place_of_store(held, "candles", "b", 2, [1]) == Place("b", "candles", {0: start, 1: nine})
    # An empty store has all of it before it, and so has one of partitions that it has nothing of.
    assert place_of_store({}, "candles", "b", 2, [0, 1]) == Place("b", "candles", {0: start, 1: start})
    # A store of another bus must have come to this one, on each partition where there is something.
    other = cursors(("a", "candles", 0), ("a", "candles", 1))
    assert place_of_store(other, "candles", "b", 2, []) is None
    assert place_of_store({}, "candles", "b", 2, [], was="a") is None
    assert place_of_store(other | held, "candles", "b", 2, [0, 1]) is None
    assert place_of_store(other | held, "candles", "b", 2, [1]) == Place("b", "candles", {0: start, 1: nine})
    # What was backfilled came from no bus, so that there is nothing to wait for.
    filled = cursors(("backfill-4fb882f8ee51b4bd", "candles", 0))
    assert place_of_store(filled, "candles", "b", 2, []) == Place("b", "candles", {0: start, 1: start})
    assert place_of_store(filled | other, "candles", "b", 2, []) is None
