"""Arguments are checked in bounded time, whatever the schema and whatever the arguments."""

import re
import time
from typing import Any

import pytest

from agents_app import schemas
from agents_app.models import Tool
from agents_app.patterns import PatternRefused, ensure_bounded
from agents_app.schemas import BUDGET_SECONDS, SchemaBroken
from sessions_app.models import ToolCall
from tests.factories import act, make_session, make_turn, run, wanted

# May be stored, for arguments have an end; takes three times as long with each level of them.
ENDLESS: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"anyOf": [{"$ref": "#", "minProperties": 9}] * 3}},
}
DEEP: dict[str, Any] = {"x": 1}
for _ in range(60):
    DEEP = {"a": DEEP}


def of_items(**keywords: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"type": "array", **keywords}}}


def test_a_check_that_takes_too_long_is_stopped() -> None:
    schemas.ensure_usable(ENDLESS)
    started = time.thread_time()

    with pytest.raises(SchemaBroken):
        schemas.complaint(ENDLESS, DEEP)

    assert time.thread_time() - started < 2 * BUDGET_SECONDS


@pytest.mark.django_db
def test_all_calls_of_an_answer_share_the_time_and_the_model_is_told() -> None:
    Tool.objects.filter(pk="read_file").update(parameters=ENDLESS)
    running = run(make_turn(make_session()))
    started = time.thread_time()

    act(running, *[wanted("read_file", DEEP)] * 5, wanted("list_files"))

    assert time.thread_time() - started < 2 * BUDGET_SECONDS
    answers = list(ToolCall.objects.order_by("position").values_list("answer", flat=True))
    assert answers[:5] == ["Error: The schema of read_file cannot be used."] * 5


@pytest.mark.parametrize(
    ("schema", "arguments"),
    [
        (of_items(uniqueItems=True), {"a": [{"i": i} for i in range(9_000)]}),
        (of_items(uniqueItems=True), {"a": [i * (2**61 - 1) for i in range(11_000)]}),
        (of_items(items={"type": "integer", "minimum": 0}), {"a": [1] * 60_000}),
    ],
    ids=["objects", "numbers that hash alike", "many"],
)
def test_large_arguments_that_fit_are_taken(schema: dict[str, Any], arguments: dict[str, Any]) -> None:
    schemas.ensure_usable(schema)

    assert schemas.complaint(schema, arguments) is None


@pytest.mark.parametrize(
    ("items", "are_unique"),
    [
        ([1, 1], False),
        ([1, 1.0], False),
        ([1, True], True),
        ([0, False, None, "", [], {}], True),
        (["1", 1], True),
        ([{"a": 1, "b": 2}, {"b": 2.0, "a": 1}], False),
        ([[1, 2], [2, 1]], True),
        ([[{"a": [1]}], [{"a": [True]}]], True),
        ([1e300, 10**300], True),
        ([], True),
    ],
)
def test_items_are_unique_as_json_schema_means_it(items: list[Any], are_unique: bool) -> None:
    assert (schemas.complaint(of_items(uniqueItems=True), {"a": items}) is None) is are_unique


def test_a_number_that_a_schema_cannot_divide_breaks_the_tool_and_nothing_else() -> None:
    with pytest.raises(SchemaBroken):
        schemas.complaint({"type": "object", "properties": {"a": {"multipleOf": 0.1}}}, {"a": 10**400})


def test_of_very_many_complaints_a_few_are_enough() -> None:
    started = time.thread_time()

    found = schemas.complaint(of_items(items={"type": "string"}), {"a": [1] * 100_000})

    assert found is not None and found.text == "1 is not of type 'string'"
    assert time.thread_time() - started < BUDGET_SECONDS / 2


@pytest.mark.parametrize(
    ("pattern", "longest", "is_searched"),
    [
        (r".*\.md$", 1_000, False),
        (r"src/.*/test_.*\.py", 1_000, False),
        (r"^[a-z]{1,20}(\.[a-z]{1,20}){0,3}$", 200, True),
        (r"^.*.*x", 3_000, True),
        (r"a*x", 3_000, True),
        (r"(.+)\1x", 200, True),
        (r"a{1,3000}b", 3_000, True),
        (r"^docs/", 262_144, True),
        (r"docs/", 262_144, True),
        ("a?" * 20 + "a" * 20, 1_000, False),
        (r"(((a{1,2}){1,2}){1,2}){1,2}b", 100, True),
    ],
)
def test_a_pattern_that_is_taken_is_quick_on_the_worst_text(pattern: str, longest: int, is_searched: bool) -> None:
    ensure_bounded(pattern, longest=longest, is_searched=is_searched)
    match = re.search if is_searched else re.fullmatch

    for text in ("a" * longest, "a" * (longest - 1) + "!", "ab" * (longest // 2), "a" * 40):
        started = time.thread_time()
        match(pattern, text)
        assert time.thread_time() - started < 1


@pytest.mark.parametrize(
    ("pattern", "longest", "is_searched"),
    [
        (r"(a+)+$", 1_000, False),
        (r"(a*)*", 100, False),
        (r"(a|a)*b", 1_000, False),
        (r"(?:a|b|ab){0,12}c", 1_000, True),
        (r"^[a-z]+(\.[a-z]+)*$", 200, True),
        (r".*.*.*x", 1_000, False),
        (r".*x", 262_144, True),
        ("a?" * 30 + "a" * 30, 1_000, False),
        ("(a?){30}a{30}", 1_000, False),
        ("a{50000}x", 262_144, True),
        ("(?=a{500}x)", 262_144, True),
        (r"(?=(a+))\1+x", 200, False),
        ("(", 10, True),
        ("a{2,1}", 10, True),
        ("(?P<n>a)(?P<n>b)", 10, True),
        ("x" * 1_001, 10, True),
    ],
)
def test_a_pattern_that_may_be_slow_is_refused(pattern: str, longest: int, is_searched: bool) -> None:
    with pytest.raises(PatternRefused):
        ensure_bounded(pattern, longest=longest, is_searched=is_searched)


@pytest.mark.parametrize(
    "reference", ["#/allOf/x", "#/allOf/9", "#/properties/a/b", "#/type/x", "#/required/-1", "#/~2"]
)
def test_a_reference_to_nowhere_is_refused(reference: str) -> None:
    schema = {"type": "object", "allOf": [{}], "required": ["a"], "properties": {"a": True}, "$ref": reference}

    with pytest.raises(schemas.SchemaRefused):
        schemas.ensure_usable(schema)
    with pytest.raises(schemas.SchemaBroken):
        schemas.complaint(schema, {"a": 1})
