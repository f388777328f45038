"""What one sequence must produce, computed the slow way: one token after the other, with nothing cached."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from trio_runner.core.prompt import Item, Media, MediaRow, cut_after
from trio_runner.core.sequence import SequenceSpec
from trio_runner.testing import END, toy_cache_key, toy_next


@dataclass(frozen=True)
class Alone:
    """What a sequence produces, whatever happens to the others."""

    text: str
    reason: str
    stop: str | None
    n_sampled: int


def alone(spec: SequenceSpec, n_ctx: int) -> Alone:
    """What the toy generates for this request in a slot of `n_ctx` positions."""
    held = list(spec.prompt)
    cache_key = cache_key_of(spec)
    data = b""
    if spec.max_tokens == 0:
        return Alone("", "length", None, 0)
    for n_sampled in count(1):
        token = toy_next(held, cache_key)
        if token == END:
            return Alone(whole_text(data), "stop", None, n_sampled)
        data += bytes([token])
        found = first_stop(whole_text(data), spec.stop)
        if found is not None:
            text, stop = found
            return Alone(text, "stop", stop, n_sampled)
        if n_sampled == spec.max_tokens:
            return Alone(whole_text(data), "length", None, n_sampled)
        if len(held) == n_ctx:
            if not spec.shift:
                return Alone(whole_text(data), "length", None, n_sampled)
            discardable = n_ctx - spec.n_keep
            held = held[: spec.n_keep] + held[cut_after(held, spec.n_keep + max(discardable // 2, 1)) :]
        held.append(token)
    raise AssertionError("unreachable")


def cache_key_of(spec: SequenceSpec) -> str:
    """The toy's cache key of this request. Its adapters are named after their uids."""
    return toy_cache_key([(str(uid), scale) for uid, scale in spec.adapters], spec.encoder_tokens)


def rows_of(media: Media) -> tuple[Item, ...]:
    """All rows of an image."""
    return tuple(MediaRow(media, row) for row in range(media.n_rows))


def whole_text(data: bytes) -> str:
    """`data` as text, without half a character at its end."""
    for n_missing in range(4):
        tail = data[len(data) - n_missing :]
        if starts_character(tail):
            return data[: len(data) - n_missing].decode(errors="replace")
    return data.decode(errors="replace")


def starts_character(tail: bytes) -> bool:
    """Whether `tail` is the start of a character but not a whole one: table 3-7 of the Unicode standard."""
    seconds = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}
    lead = tail[0] if tail else 0
    length = 2 if 0xC2 <= lead <= 0xDF else 3 if 0xE0 <= lead <= 0xEF else 4 if 0xF0 <= lead <= 0xF4 else 0
    if not len(tail) < length:
        return False
    low, high = seconds.get(lead, (0x80, 0xBF))
    return all(a <= byte <= b for byte, (a, b) in zip(tail[1:], [(low, high), (0x80, 0xBF)], strict=False))


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str] | None:
    """(the text before it, the stop string that ends first, the longest on a tie), found by looking everywhere."""
    for end in range(1, len(text) + 1):
        here = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if here:
            longest = max(here, key=len)
            return text[: end - len(longest)], longest
    return None
