"""How people are shown what clients and models wrote: nothing hidden, nothing alive, nothing endless.

Every function here returns plain text that whoever prints it still has to escape (Django's templates and admin do),
except `box`, `badge` and `link`, which return finished elements and escape what they are given.
"""

import json
import re
import unicodedata
from datetime import datetime
from typing import Any

from django.template.loader import render_to_string
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString

EMPTY = "–"
LINE_CHARS = 100

# What hides, reorders or forges text on a screen, but newline and tab: first and last of each range.
INVISIBLE = [
    *[(0x00, 0x08), (0x0B, 0x1F), (0x7F, 0x9F)],  # C0 and C1 controls
    *[(0x061C, 0x061C), (0x200E, 0x200F), (0x202A, 0x202E), (0x2066, 0x206F)],  # direction: marks, overrides, isolates
    *[(0x200B, 0x200D), (0x2060, 0x2065), (0xFEFF, 0xFEFF)],  # zero width
    *[(0x00AD, 0x00AD), (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F)],  # soft hyphen,
    *[(0x3164, 0x3164), (0xFFA0, 0xFFA0), (0x2800, 0x2800)],  # and fillers: letters without a shape
    *[(0x00A0, 0x00A0), (0x1680, 0x1680), (0x2000, 0x200A), (0x202F, 0x202F), (0x205F, 0x205F)],  # blanks
    (0x3000, 0x3000),
    *[(0xFE00, 0xFE0F), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A)],  # variation selectors, controls of two notations
    *[(0x2028, 0x2029), (0xFFF0, 0xFFFB), (0xFFFE, 0xFFFF)],  # separators, annotations, no characters at all
    (0xD800, 0xDFFF),  # halves of characters, which cannot even be sent
    (0xE0000, 0xE0FFF),  # tags and variation selectors: whole messages for a model that no person sees
]
# A table, because a text may consist of nothing else, and two hundred thousand calls per text would be felt.
WRITTEN_OUT = {number: f"⟨U+{number:04X}⟩" for first, last in INVISIBLE for number in range(first, last + 1)}

# DEL is the one that `json.dumps` leaves as it is.
SPELLED = {number: json.dumps(chr(number))[1:-1] for number in WRITTEN_OUT} | {0x7F: "\\u007f"}
LOOK_ALIKE = {"LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE", "COPTIC", "FULLWIDTH", "MATHEMATICAL"}


def visible(text: str) -> str:
    """The text with everything that hides or reorders text written out, as in ⟨U+202E⟩."""
    return str(text).translate(WRITTEN_OUT)


def odd_words(text: str) -> list[str]:
    """Words with letters of more than one alphabet that look alike, as in a Cyrillic а between Latin letters."""
    words = {word for word in re.findall(r"\w+", text) if not word.isascii()}
    return sorted(visible(word) for word in words if len({_alphabet(letter) for letter in word} - {""}) > 1)


def _alphabet(letter: str) -> str:
    name = unicodedata.name(letter, "").partition(" ")[0]
    return name if name in LOOK_ALIKE else ""


def clipped(text: str | None, limit: int = LINE_CHARS) -> str:
    """The beginning of a text for a list, which says how much it left out."""
    if not text:
        return EMPTY
    left = len(text) - limit
    return visible(text) if left <= 0 else f"{visible(text[:limit])}… {left:,} more character{'s' * (left > 1)}"


def as_json(data: Any) -> str:
    """Indented, with letters of any script readable; to be shown like any other text of a client."""
    return json.dumps(data, indent=2, ensure_ascii=False)


def escaped_json(data: Any) -> str:
    """The same to be edited: what hides or reorders text is spelled as JSON spells it, which means the same."""
    return as_json(data).translate(SPELLED)


def moment(value: datetime | None) -> str:
    """To the second and in UTC: the admin's own format leaves the seconds out."""
    return EMPTY if value is None else f"{value:%Y-%m-%d %H:%M:%S}"


def duration(start: datetime | None, end: datetime | None) -> str:
    # Never below nothing: the database's clock and ours are not the same.
    return EMPTY if start is None or end is None else f"{max(0.0, (end - start).total_seconds()):.1f} s"


def box(text: str) -> SafeString:
    """A long text as a whole, in an element that scrolls."""
    return format_html('<pre class="said">{}</pre>', visible(text)) if text else format_html("{}", EMPTY)


def badge(text: str, colour: str = "default") -> SafeString:
    """A word on one of unfold's colours: default, info, primary, success, warning, danger."""
    return render_to_string("unfold/helpers/label.html", {"text": visible(text), "type": colour})


def _quoted(pk: Any) -> Any:
    """A key as the addresses of the admin write it."""
    # Imported late: the terminal client needs this module, and the admin would be a third of its start.
    from django.contrib.admin.utils import quote

    return quote(pk)


def link(view: str, pk: Any, text: str, *, query: dict[str, str] | None = None) -> SafeString:
    """A link to a page of the admin, named as in `sessions_app_session_change`."""
    address = reverse(f"admin:{view}", args=[_quoted(pk)], query=query)
    return format_html('<a class="text-link" href="{}">{}</a>', address, text)


class Shown:
    """A record under a safe name, for the templates of the admin that print the record itself as their heading."""

    def __init__(self, record: Any) -> None:
        self._record = record
        # The heading's link is built from `pk` as it stands, and an id with an underscore has to be quoted there.
        self.pk = _quoted(record.pk)

    def __str__(self) -> str:
        return clipped(str(self._record))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._record, name)
