"""What `read_json` takes for JSON: exactly what RFC 8259 calls so, in one reading, and nothing that hurts."""

import json
from typing import Any

import pytest
from django.http import QueryDict
from hypothesis import given
from hypothesis import strategies as st

from orchestrator_site.errors import APIError, Invalid, TooLarge, UnsupportedMedia
from orchestrator_site.http import MAX_DEPTH, MAX_KEYS, InvalidJSON, read_json, whole_number

JSON = "application/json"
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
# What a scanner for brackets could trip over.
TRICKY = st.text(st.sampled_from('"\\[]{}:,/ u0041\n\u2028é')).filter(lambda text: "\0" not in text)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS | TRICKY
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS | TRICKY, inner), max_leaves=30)


def nested(levels: int, core: Any) -> Any:
    for level in range(levels):
        core = {"[": core} if level % 2 else ["]]", core]
    return core


@given(value=VALUES, ascii_only=st.booleans(), indent=st.none() | st.integers(0, 3))
def test_valid_json_is_read_as_everybody_reads_it(value: Any, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)

    assert read_json(text.encode(), JSON) == json.loads(text)


@given(value=VALUES, data=st.data())
def test_mutated_json_is_read_like_that_or_refused(value: Any, data: st.DataObject) -> None:
    body = bytearray(json.dumps(value, ensure_ascii=False).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(body)))
        end = data.draw(st.integers(start, min(start + 3, len(body))))
        body[start:end] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b'"', b"\\", b"[", b"}", b"\\u0000", b"1e999"])
        )

    try:
        read = read_json(bytes(body), JSON)
    except APIError:
        return
    assert read == json.loads(bytes(body).decode())


@given(body=st.binary(max_size=300), content_type=st.just(JSON) | st.text(max_size=50))
def test_no_bytes_whatsoever_are_a_failure(body: bytes, content_type: str) -> None:
    try:
        read_json(body, content_type)
    except APIError as error:
        assert 400 <= error.status < 500


@given(levels=st.integers(MAX_DEPTH - 5, MAX_DEPTH + 5), core=SCALARS)
def test_depth_is_counted_outside_of_texts(levels: int, core: Any) -> None:
    body = json.dumps(nested(levels, core)).encode()

    if levels <= MAX_DEPTH:
        assert read_json(body, JSON) == json.loads(body)
    else:
        with pytest.raises(InvalidJSON):
            read_json(body, JSON)


@pytest.mark.parametrize(
    "wide", [b"[" + b"[[]]," * 1000 + b"[]]", b'["' + b"[" * 1000 + b'"]', b'["\\"' + b"[" * 1000 + b'"]']
)
def test_width_is_no_depth(wide: bytes) -> None:
    assert read_json(wide, JSON) == json.loads(wide)


@pytest.mark.parametrize(
    "body",
    [b"[" * 1_000_000, b'{"a":' * 300_000, b'"' + b'\\"' * 1_000_000 + b"[" * 65, b'"' * 1_000_000 + b"[" * 65],
    ids=["arrays", "objects", "escaped quotes", "quotes"],
)
def test_hostile_depth_is_refused_in_passing(body: bytes) -> None:
    # In squared time one of these would outlast the whole suite.
    with pytest.raises(InvalidJSON):
        read_json(body, JSON)


@given(name=TEXTS, first=SCALARS, second=SCALARS)
def test_a_repeated_key_has_no_meaning(name: str, first: Any, second: Any) -> None:
    key = json.dumps(name)

    with pytest.raises(Invalid):
        read_json(f"[{{{key}: {json.dumps(first)}, {key}: {json.dumps(second)}}}]".encode(), JSON)


@pytest.mark.parametrize("spelled", ["\\u0000", "\\ud800", "\\udc00\\ud800", "\\uD83Dx"])
@pytest.mark.parametrize(
    "form", ['"{}"', '["x{}"]', '{{"a": "{}x"}}', '{{"{}": 1}}', '[[[{{"a": [{{"b{}": null}}]}}]]]']
)
def test_what_no_database_can_hold_is_refused_wherever_it_stands(form: str, spelled: str) -> None:
    with pytest.raises(Invalid):
        read_json(form.format(spelled).encode(), JSON)


def test_an_escaped_pair_of_surrogates_is_a_character() -> None:
    assert read_json(b'"\\ud83d\\ude00"', JSON) == "\U0001f600"


@pytest.mark.parametrize(
    "number", ["1e999", "-1e999", "NaN", "Infinity", "-Infinity", "9" * 4301, "01", "+1", ".5", "1."]
)
def test_what_is_no_number_is_refused(number: str) -> None:
    with pytest.raises(InvalidJSON):
        read_json(f'{{"a": [{number}]}}'.encode(), JSON)


def test_keys_are_counted_over_all_objects() -> None:
    fits = [{"a": 1, "b": 2}] * (MAX_KEYS // 2)

    assert read_json(json.dumps(fits).encode(), JSON) == fits
    with pytest.raises(TooLarge):
        read_json(json.dumps([*fits, {"c": 3}]).encode(), JSON)


@pytest.mark.parametrize(
    "content_type",
    [
        JSON,
        "Application/JSON",
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
        " application/json ;x=1",
    ],
)
def test_json_in_utf_8_is_taken(content_type: str) -> None:
    assert read_json(b'{"a": "\xc3\xa4"}', content_type) == {"a": "ä"}


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/json",
        "application/jsonp",
        "application/json+xml",
        "application/json; charset=latin-1",
        "charset=utf-8",
    ],
)
def test_anything_else_is_not(content_type: str) -> None:
    with pytest.raises(UnsupportedMedia):
        read_json(b"{}", content_type)


@given(raw=st.text(max_size=40) | st.integers().map(str))
def test_a_query_number_is_in_its_bounds_or_refused(raw: str) -> None:
    query = QueryDict(mutable=True)
    query["limit"] = raw

    try:
        number = whole_number(query, "limit", 100, at_least=1, at_most=1000)
    except APIError as error:
        assert error.status in (400, 422)
    else:
        assert number == int(raw)
        assert 1 <= number <= 1000
