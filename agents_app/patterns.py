"""How long a regular expression may take: Python's cannot be interrupted, and holds up the whole process meanwhile."""

import re
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MAX_CHARS = 1_000
# So many steps take a fifth of a second at the most (docs/performance.md).
MAX_STEPS = 50_000_000
REPEATS = {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}


class PatternRefused(ValueError):
    """A pattern that does not compile, or might be tried in too many ways; the text is for people."""


def ensure_bounded(pattern: str, *, longest: int, is_searched: bool) -> None:
    """Raise PatternRefused unless the pattern is quick on every text of up to `longest` characters.

    `is_searched`: whether it may begin anywhere in the text, not only at its start.
    """
    if len(pattern) > MAX_CHARS:
        raise PatternRefused(f"A pattern may have {MAX_CHARS:,} characters.")
    try:
        parts = parser.parse(pattern)
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternRefused(f"This is no regular expression: {error}.") from None
    starts = longest + 1 if is_searched and not _is_anchored(parts) else 1
    if starts * _ways(parts, longest) * _length(parts) > MAX_STEPS:
        raise PatternRefused(
            f"This pattern can take very long on a text of {longest:,} characters: a repetition in a repetition, "
            "an alternative in a repetition, or too many repetitions after each other. Anchor it with ^, give its "
            "repetitions bounds such as {1,20}, or bound the text it is for."
        )


def _is_anchored(parts: Any) -> bool:
    first = parts[0] if len(parts) else (None, None)
    return str(first[0]) == "AT" and str(first[1]) in ("AT_BEGINNING", "AT_BEGINNING_STRING")


def _ways(parts: Any, longest: int) -> int:
    """In how many ways the pattern can be tried from one place in the text, estimated from above."""
    ways = 1
    for part in parts:
        ways = min(ways * _ways_of(part, longest), MAX_STEPS + 1)
    return ways


def _ways_of(part: Any, longest: int) -> int:
    kind, what = str(part[0]), part[1]
    if kind in REPEATS:
        return _repeated(*what, longest=longest)
    if kind == "BRANCH":
        return sum(_ways(branch, longest) for branch in what[1])
    if kind == "GROUPREF_EXISTS":
        return sum(_ways(branch, longest) for branch in what[1:] if branch)
    if kind == "GROUPREF":
        return longest + 1  # compares as much as the group has found
    if kind in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return _ways(what[-1], longest)
    return _ways(what, longest) if kind == "ATOMIC_GROUP" else 1


def _repeated(least: int, most: int, parts: Any, *, longest: int) -> int:
    """Of so many repetitions each number is a way, and each way of one goes with every way of the next."""
    ways, shortest = _ways(parts, longest), max(parts.getwidth()[0], 1)
    most = max(min(int(most), longest // shortest + 1), int(least))
    if ways == 1:
        return most - int(least) + 1
    total = 0
    for times in range(int(least), most + 1):
        total += ways ** min(times, 64)
        if total > MAX_STEPS:
            break
    return total


def _length(parts: Any) -> int:
    """How much of the text one way has to look at before it can fail, not counting what repetitions may add."""
    length = 1
    for kind, what in parts:
        if str(kind) in REPEATS:
            length += int(what[0]) * _length(what[2])
        elif str(kind) in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
            length += _length(what[-1])
        elif str(kind) == "BRANCH":
            length += max(_length(branch) for branch in what[1])
        else:
            length += 1
    return min(length, MAX_STEPS)
