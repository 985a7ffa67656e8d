"""Whether Redis has lost the end of a stream that a sink has read, and from where it reads again."""

from __future__ import annotations

from typing import NamedTuple

START = "0-0"


class Entry(NamedTuple):
    """A stream entry as far as it matters here; `seq` is None where it has none."""

    id: str
    seq: int | None


def lost_tail(seq: int, at: str, before: Entry | None, first: Entry | None, out_seq: int | None) -> str | None:
    """Why the bus must have lost what a reader at sequence `seq`, entry `at` has read; None if it has not.

    `before` is the stream's newest entry not after `at`, `first` its first one; `out_seq` is the
    stage's newest output sequence. Trimming explains entries that are missing at the start of a
    stream, never one that is missing behind an older one. An entry that is still there settles it,
    whatever the sequences say: reading again would only come back to here.
    """
    if at == START:
        return None
    if before is not None:
        same = before.id == at and before.seq in (seq, None)
        return None if same else f"entry {at} (sequence {seq}) is gone from the stream"
    if first is None:
        return f"the stream is empty, behind sequence {seq}"
    if first.seq is not None and first.seq <= seq:
        return f"the stream begins again at sequence {first.seq}, behind {seq}"
    if out_seq is not None and out_seq < seq:
        return f"its newest sequence is {out_seq}, behind {seq}"
    return None


def lost_entries(at: str, before: Entry | None, told: str | None, trimmed: bool) -> tuple[str, str] | None:
    """(why, the entry behind which all may be lost) for a stream whose producers each count for themselves.

    `told` is the position that Redis knows of this reader, `trimmed` whether entries ever were. What
    Redis knows it has not lost, so all up to `told` is sound; and an entry that it did not know to be
    done with cannot have been trimmed. START, or none, says nothing: the consumer may have been dropped
    for a while. In doubt nothing is lost, for what is forgotten must be there to be read again.
    """
    if at == START or (before is not None and before.id == at):
        return None
    why = f"entry {at} is gone from the stream"
    if before is not None:
        return why, before.id if told in (None, START) else older(before.id, told or START)
    if told is None or told == START:
        return None if trimmed else (why, START)
    return (why, told) if after(at, told) else None


def entry(seen: list[bytes]) -> Entry | None:
    """An entry as the bus saw it: [id, sequence], [id] or []."""
    if not seen:
        return None
    try:
        return Entry(seen[0].decode(), int(seen[1]))
    except (IndexError, ValueError):
        return Entry(seen[0].decode(), None)


def after(a: str, b: str) -> bool:
    """Whether stream id a is newer than b."""
    return tuple(map(int, a.split("-"))) > tuple(map(int, b.split("-")))


def older(a: str, b: str) -> str:
    """The older of two stream ids."""
    return b if after(a, b) else a


def was_free(told: str | None, at: str) -> bool:
    """Whether trimming was free to pass `at`: Redis was told of a newer position, or had forgotten this consumer."""
    return at != START if told is None else after(told, at)
