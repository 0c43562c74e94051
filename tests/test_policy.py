"""What may be called at all: the rules, each agent's tools and paths, each tool's arguments, what a hash binds."""

import hashlib
import itertools
import json
import math
import random
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents_app import policy, tools
from agents_app.binding import args_hash, canonical
from agents_app.llm import CallWanted
from agents_app.models import Agent, ApprovalRule, Tool
from agents_app.team import Team
from agents_app.tools import CallRefused, Toolbox
from orchestrator_site.http import read_json
from tests.factories import FITTING

pytestmark = pytest.mark.django_db


# --- what a hash binds (guarantees S7): 10,000 examples in all ---

ODD = [
    "",
    "\u2028",
    "\u2029",
    "\u0085",
    "\ufeff",
    "🦆",
    "é",
    "e\u0301",
    '"',
    "\\",
    "\x1f",
    "\x7f",
    "\u202e",
    "null",
    "1",
]
NUMBERS = [0, -0.0, 0.0, 1, 1.0, -1, 1e300, 5e-324, 0.1, 2**53, 2.0**53, 2**53 + 1, 10**400, -(10**40)]
KEYS = ["path", "a", "b", *ODD]


def made_up_text(chance: random.Random) -> str:
    letters = (chr(chance.choice([chance.randrange(1, 0xD800), chance.randrange(0xE000, 0x110000)])) for _ in range(3))
    return chance.choice(ODD) + "".join(letters)


def made_up_leaf(chance: random.Random) -> Any:
    kinds: list[Any] = [
        None,
        True,
        False,
        chance.choice(ODD),
        chance.choice(NUMBERS),
        chance.uniform(-1e9, 1e9),
        [],
        {},
    ]
    return chance.choice([*kinds, made_up_text(chance), chance.randrange(-(10**20), 10**20)])


def made_up(chance: random.Random, depth: int = 0) -> Any:
    """A JSON value, at the top an object; built by a seed, because hypothesis takes ten times as long to build it."""
    shape = chance.choice(["object", "list", "leaf", "leaf"]) if depth else "object"
    if shape == "leaf" or depth > 3:
        return made_up_leaf(chance)
    if shape == "list":
        return [made_up(chance, depth + 1) for _ in range(chance.randrange(3))]
    keys = [chance.choice(KEYS), made_up_text(chance), chance.choice(KEYS)][: chance.randint(1, 3)]
    return {key: made_up(chance, depth + 1) for key in keys}


CHANCE = st.randoms(use_true_random=True)


def hashed(arguments: dict[str, Any]) -> str:
    return args_hash("s", "call_1", "write_file", 1, canonical(arguments))


def reordered(value: Any, chance: random.Random) -> Any:
    if isinstance(value, dict):
        pairs = [(key, reordered(item, chance)) for key, item in value.items()]
        chance.shuffle(pairs)
        return dict(pairs)
    return [reordered(item, chance) for item in value] if isinstance(value, list) else value


def places(value: Any, *before: str | int) -> list[tuple[str | int, ...]]:
    """The path of each leaf; an empty list or object is one."""
    items: list[Any] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [place for key, item in items for place in places(item, *before, key)] or [before]


def replaced(value: Any, place: tuple[str | int, ...], by: Any) -> Any:
    if not place:
        return by
    if isinstance(value, dict):
        return {key: replaced(item, place[1:], by) if key == place[0] else item for key, item in value.items()}
    return [replaced(item, place[1:], by) if key == place[0] else item for key, item in enumerate(value)]


def times(number: int) -> Any:
    return settings(max_examples=number, deadline=None, database=None)


@times(2_500)
@given(CHANCE)
def test_the_order_of_keys_changes_neither_text_nor_hash(chance: random.Random) -> None:
    arguments = made_up(chance)
    other = reordered(arguments, chance)

    assert canonical(other) == canonical(arguments)
    assert hashed(other) == hashed(arguments)


@times(2_500)
@given(CHANCE)
def test_canonical_text_survives_a_round_trip(chance: random.Random) -> None:
    text = canonical(made_up(chance))

    assert canonical(json.loads(text)) == text
    assert canonical(read_json(text.encode(), "application/json")) == text


@times(2_500)
@given(CHANCE)
def test_another_leaf_is_another_hash(chance: random.Random) -> None:
    arguments, leaf = made_up(chance), made_up_leaf(chance)
    place = chance.choice(places(arguments))
    old = arguments
    for key in place:
        old = old[key]

    is_same = type(leaf) is type(old) and repr(leaf) == repr(old)
    assert (hashed(replaced(arguments, place, leaf)) == hashed(arguments)) is is_same


@times(1_000)
@given(CHANCE)
def test_another_key_is_another_hash(chance: random.Random) -> None:
    arguments = made_up(chance)
    old, new = chance.choice(list(arguments)), chance.choice([*KEYS, made_up_text(chance)])
    other = {(new if name == old else name): value for name, value in arguments.items()}

    assert (hashed(other) == hashed(arguments)) is (new == old)


@times(1_500)
@given(CHANCE)
def test_another_session_call_tool_version_or_text_is_another_hash(chance: random.Random) -> None:
    def bound() -> tuple[str, str, str, int, str]:
        session, call, tool, text = ("".join(chance.choices('ab"\\,[]é🦆', k=chance.randrange(4))) for _ in range(4))
        return session, call, tool, chance.randrange(3), text

    one, other = bound(), bound()

    for index in range(len(one)):
        mixed = (*one[:index], other[index], *one[index + 1 :])
        assert (args_hash(*mixed) == args_hash(*one)) is (mixed == one)  # type: ignore[arg-type]
    assert (args_hash(*one) == args_hash(*other)) is (one == other)


def test_no_part_of_what_is_bound_borrows_from_its_neighbour() -> None:
    parts = ["s", "s1", "1", "", '"', ",", '","', "s,1"]

    hashes = {args_hash(a, b, c, 1, d) for a, b, c, d in itertools.product(parts, repeat=4)}

    assert len(hashes) == len(parts) ** 4


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_json_has_no_canonical_text(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"deep": [{"number": number}]})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "{}"),
        ({"b": 1, "a": [1, 1.0, -0.0, 1e300]}, '{"a":[1,1.0,-0.0,1e+300],"b":1}'),
        ({"é": "\u2028🦆\n"}, '{"é":"\u2028🦆\\n"}'),
    ],
)
def test_canonical_text_is_sorted_dense_and_readable(arguments: dict[str, Any], text: str) -> None:
    assert canonical(arguments) == text


def test_a_hash_is_the_same_on_every_day_and_machine() -> None:
    text = '["s","call_1","write_file",1,"{\\"content\\":\\"h\\u00e9\\",\\"path\\":\\"a.md\\"}"]'

    assert hashed({"path": "a.md", "content": "hé"}) == hashlib.sha256(text.encode()).hexdigest()


# --- rules (protocol 6.4) ---


def rule(tool: str, outcome: str, **more: Any) -> ApprovalRule:
    return ApprovalRule.objects.create(tool=tool, outcome=outcome, **more)


def ruling(tool: str, agent: str = "coder") -> policy.Ruling:
    return policy.rule_on(policy.rules_in_force(), tool=tool, agent=agent)


@pytest.mark.parametrize("order", list(itertools.permutations(["allow", "ask", "deny"])))
@pytest.mark.parametrize("positions", [(1, 2, 3), (3, 2, 1), (1, 1, 1)])
def test_the_strongest_outcome_wins_whatever_the_order(order: tuple[str, ...], positions: tuple[int, ...]) -> None:
    for outcome, position in zip(order, positions, strict=True):
        rule("deploy", outcome, position=position, reason=outcome)

    assert (ruling("deploy").outcome, ruling("deploy").reason) == ("deny", "deny")
    ApprovalRule.objects.filter(tool="deploy", outcome="deny").delete()
    assert (ruling("deploy").outcome, ruling("deploy").reason) == ("ask", "ask")
    ApprovalRule.objects.filter(tool="deploy", outcome="ask").delete()
    assert (ruling("deploy").outcome, ruling("deploy").reason) == ("allow", "allow")


def test_among_equally_strong_rules_the_first_gives_reason_and_self_approval() -> None:
    rule("deploy", "ask", position=7, reason="later", self_approval=True)
    first = rule("dep*", "ask", position=3, reason="first", self_approval=False)
    rule("deploy", "allow", position=1, reason="weaker", self_approval=True)

    said = ruling("deploy")

    assert (said.rule, said.reason, said.self_approval) == (first, "first", False)
    ApprovalRule.objects.filter(pk=first.pk).update(position=9)
    assert (ruling("deploy").reason, ruling("deploy").self_approval) == ("later", True)


def test_of_two_rules_in_one_place_the_older_gives_the_reason() -> None:
    rule("deploy", "ask", position=5, reason="older")
    rule("deploy", "ask", position=5, reason="newer")

    assert ruling("deploy").reason == "older"
    assert policy.rule_on(reversed(policy.rules_in_force()), tool="deploy", agent="coder").reason == "older"


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("deploy", ["deploy"], ["deploy_v2", "xdeploy", "Deploy", "deploy\n", "", "deplo"]),
        ("deploy_*", ["deploy_", "deploy_all", "deploy_a\nb"], ["deploy", "xdeploy_all", "DEPLOY_all"]),
        ("*_all", ["_all", "deploy_all"], ["deploy_all2", "deploy_all\n"]),
        ("deploy_?", ["deploy_1"], ["deploy_", "deploy_12"]),
        ("*", ["deploy", "anything", ""], []),
        ("*deploy*", ["deploy", "xdeployx"], ["deplox"]),
        ("d.ploy", ["d.ploy"], ["deploy"]),
    ],
)
def test_a_pattern_matches_the_whole_name_only(pattern: str, matching: list[str], others: list[str]) -> None:
    ApprovalRule.objects.all().delete()
    rule(pattern, "deny")

    assert {name for name in [*matching, *others] if ruling(name).outcome == "deny"} == set(matching)


def test_a_rule_may_be_for_one_agent_alone() -> None:
    rule("deploy", "deny", agent="debug", reason="not you")

    assert ruling("deploy", "debug").reason == "not you"
    assert ruling("deploy", "coder").outcome == ruling("deploy", "debugger").outcome == "allow"


def test_a_rule_that_is_switched_off_says_nothing() -> None:
    rule("deploy", "deny", is_active=False)

    assert ruling("deploy").outcome == "allow"


def test_what_no_rule_speaks_of_is_allowed_without_a_person() -> None:
    said = ruling("search_in_code")

    assert (said.outcome, said.rule, said.reason, said.self_approval) == ("allow", None, "", False)


def test_the_rules_of_the_beginning_are_the_contracts() -> None:
    seeded = ApprovalRule.objects.values_list("tool", "outcome", "reason", "agent", "self_approval", "is_active")

    assert list(seeded) == [
        (tool, outcome, reason, "", True, True)
        for tool, outcome, reason in (
            ("write_file", "ask", "File modification requires user approval"),
            ("delete_file", "ask", "File deletion requires user approval"),
            ("execute_command", "ask", "Command execution requires user approval"),
            ("create_directory", "ask", "Directory creation requires user approval"),
            ("move_file", "ask", "File move requires user approval"),
            ("read_file", "allow", ""),
            ("list_files", "allow", ""),
            ("search_files", "allow", ""),
        )
    ]


def test_a_rule_allows_self_approval_only_when_it_says_so() -> None:
    assert rule("deploy", "ask").self_approval is False


# --- which agent may use what (protocol 6.1, 6.2) ---

READ = {"read_file", "list_files", "search_in_code"}
MAY_USE = {
    "orchestrator": READ,
    "coder": READ | {"write_file", "create_directory", "execute_command"},
    "architect": READ | {"write_file", "switch_mode"},
    "debug": READ | {"execute_command", "switch_mode"},
    "ask": READ | {"switch_mode"},
    "universal": READ | {"write_file", "create_directory", "execute_command"},
}
# Those with words of their own.
ADVISED = {("debug", "write_file"), ("ask", "write_file"), ("ask", "execute_command")}


def toolbox(agent: str) -> Toolbox:
    return Team.now().toolbox(agent)


@pytest.mark.parametrize("agent", MAY_USE)
@pytest.mark.parametrize("tool", FITTING)
def test_an_agent_uses_its_own_tools_and_is_told_so_of_others(agent: str, tool: str) -> None:
    box = toolbox(agent)
    if tool in MAY_USE[agent]:
        assert box.tool_named(tool).name == tool
        return

    with pytest.raises(CallRefused) as refused:
        box.tool_named(tool)

    text = f"Tool '{tool}' is not allowed for {agent.capitalize()} agent"
    assert (refused.value.code, refused.value.is_shown) == ("tool_not_allowed", True)
    if (agent, tool) in ADVISED:
        assert refused.value.message.startswith(text)
        assert "Switch to the Coder agent" in refused.value.message
    else:
        assert refused.value.message == text


@pytest.mark.parametrize("agent", MAY_USE)
def test_a_model_is_offered_what_its_agent_may_use_and_nothing_else(agent: str) -> None:
    offered = toolbox(agent).offered()

    assert {tool["function"]["name"] for tool in offered} == MAY_USE[agent]
    assert all(tool["type"] == "function" and tool["function"]["parameters"]["type"] == "object" for tool in offered)


def test_the_team_lists_the_tools_of_the_contract_in_its_order() -> None:
    everything = ["read_file", "write_file", "list_files", "search_in_code", "create_directory", "execute_command"]
    ends = ["attempt_completion", "ask_followup_question"]

    assert dict(Agent.objects.values_list("name", "allowed_tools")) == {
        "orchestrator": ["read_file", "list_files", "search_in_code"],
        "coder": everything + ends,
        "architect": ["read_file", "write_file", "list_files", "search_in_code", *ends, "switch_mode"],
        "debug": ["read_file", "list_files", "search_in_code", "execute_command", *ends, "switch_mode"],
        "ask": ["read_file", "search_in_code", "list_files", "attempt_completion", "switch_mode"],
        "universal": everything + ends,
    }


def test_a_tool_that_nobody_knows_is_told_to_the_model_alone_with_those_there_are() -> None:
    with pytest.raises(CallRefused) as refused:
        toolbox("ask").tool_named("calculator" + "x" * 500)

    assert (refused.value.code, refused.value.is_shown) == ("unknown_tool", False)
    assert "calculator" in refused.value.message
    assert "read_file" in refused.value.message
    assert "write_file" not in refused.value.message, "only what this agent may use"
    assert len(refused.value.message) < 300


def test_a_listed_tool_without_a_schema_is_unknown() -> None:
    with pytest.raises(CallRefused) as refused:
        toolbox("coder").tool_named("attempt_completion")

    assert refused.value.code == "unknown_tool"


def test_a_denied_call_is_refused_with_the_rules_reason_and_shown() -> None:
    rule("read_file", "deny", reason="Not on a Friday")
    box = toolbox("coder")

    with pytest.raises(CallRefused) as refused:
        box.judge(box.tools["read_file"], {"path": "a"})

    assert (refused.value.code, refused.value.message, refused.value.is_shown) == (
        "denied_by_policy",
        "Not on a Friday",
        True,
    )


def test_a_denial_without_a_reason_says_something() -> None:
    rule("read_file", "deny")
    box = toolbox("coder")

    with pytest.raises(CallRefused, match="not allowed"):
        box.judge(box.tools["read_file"], {"path": "a"})


# --- which paths the architect may write (protocol 6.2) ---

MARKDOWN = [
    "ok.md",
    ".md",
    "docs/ok.md",
    "./a.md",
    "a//b/./c.md",
    "docs\\plan.md",
    "with space.md",
    "план.md",
    "a.py.md",
    "..md",
    "...md",
    "a..b/c.md",
]
OUTSIDE = [
    "a.py",
    "a.MD",
    "a.md.py",
    "a.mdx",
    "amd",
    "md",
    "",
    ".",
    "docs/",
    "../a.md",
    "docs/../../a.md",
    "docs/../a.md",
    "..",
    "../",
    "..\\a.md",
    "docs\\..\\..\\a.md",
    "/abs.md",
    "//host/a.md",
    "\\\\host\\a.md",
    "C:\\a.md",
    "c:/a.md",
    "C:a.md",
    "~/a.md",
    "~root/a.md",
    "a.md\n",
    "a.md\nb.py",
    "a\n.md",
    "a.md/../b.py",
    "a.md/b.py",
    "a.md\\..\\b.py",
    "a.md ",
]


def write(agent: str, path: Any) -> str:
    box = toolbox(agent)
    try:
        return box.judge(box.tools["write_file"], {"path": path, "content": ""}).outcome
    except CallRefused as refused:
        return refused.code


@pytest.mark.parametrize("path", MARKDOWN)
def test_an_architect_writes_markdown_inside_the_workspace(path: str) -> None:
    assert write("architect", path) == "ask"


@pytest.mark.parametrize("path", OUTSIDE)
def test_an_architect_writes_nothing_else(path: str) -> None:
    assert write("architect", path) == ("path_not_allowed" if path else "invalid_arguments")


def test_a_path_that_is_forbidden_is_shown_with_advice() -> None:
    box = toolbox("architect")

    with pytest.raises(CallRefused) as refused:
        box.judge(box.tools["write_file"], {"path": "src/" + "x" * 500, "content": ""})

    assert refused.value.message.startswith("Tool 'write_file' is not allowed for Architect agent on 'src/xxx")
    assert "Switch to the Coder agent" in refused.value.message
    assert (refused.value.is_shown, refused.value.path) == (True, ("path",))
    assert len(refused.value.message) < 600


@pytest.mark.parametrize("path", ["a.py", "/etc/hosts", "../a"])
def test_an_agent_without_a_restriction_writes_where_the_client_lets_it(path: str) -> None:
    assert write("coder", path) == "ask"


def test_only_writing_is_restricted_to_paths() -> None:
    box = toolbox("architect")

    assert box.judge(box.tools["read_file"], {"path": "/etc/hosts"}).outcome == "allow"


def test_the_path_is_judged_before_the_rules() -> None:
    rule("write_file", "deny", reason="never")

    assert write("architect", "a.py") == "path_not_allowed"
    assert write("architect", "a.md") == "denied_by_policy"


# --- which arguments a tool takes (protocol 6.3) ---

GOOD: list[tuple[str, dict[str, Any]]] = [
    *FITTING.items(),
    ("read_file", {"path": "a", "encoding": "utf-8", "start_line": 1, "end_line": 9}),
    ("write_file", {"path": "a", "content": "", "encoding": "latin-1", "create_dirs": True, "backup": False}),
    ("list_files", {"path": ".", "recursive": True, "include_hidden": False, "pattern": "*.py"}),
    ("create_directory", {"path": "a", "recursive": False}),
    ("execute_command", {"command": "ls", "cwd": "src", "timeout": 300, "shell": True}),
    ("execute_command", {"command": "ls", "timeout": 1}),
    ("search_in_code", {"query": "x", "path": "src", "file_pattern": "*.py", "regex": True, "max_results": 1000}),
    ("search_in_code", {"query": "x", "case_sensitive": True, "max_results": 1}),
    *[("switch_mode", {"mode": mode, "reason": "r"}) for mode in MAY_USE if mode != "universal"],
    ("read_file", {"path": "a", "something": "new"}),
]
BAD: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    *[(tool, {}, ()) for tool in FITTING],
    ("read_file", {"path": 1}, ("path",)),
    ("read_file", {"path": None}, ("path",)),
    ("read_file", {"path": ["a"]}, ("path",)),
    ("read_file", {"path": "a", "start_line": 0}, ("start_line",)),
    ("read_file", {"path": "a", "end_line": "1"}, ("end_line",)),
    ("read_file", {"path": "a", "start_line": 1.5}, ("start_line",)),
    ("read_file", {"path": "a", "start_line": True}, ("start_line",)),
    ("read_file", {"path": "a", "encoding": 8}, ("encoding",)),
    ("write_file", {"path": "a"}, ()),
    ("write_file", {"content": "a"}, ()),
    ("write_file", {"path": "a", "content": {"text": "a"}}, ("content",)),
    ("write_file", {"path": "a", "content": "", "backup": "yes"}, ("backup",)),
    ("write_file", {"path": "a", "content": "", "create_dirs": 1}, ("create_dirs",)),
    ("list_files", {"path": ".", "recursive": "true"}, ("recursive",)),
    ("list_files", {"path": ".", "include_hidden": 0}, ("include_hidden",)),
    ("list_files", {"path": ".", "pattern": 1}, ("pattern",)),
    ("create_directory", {"path": "a", "recursive": None}, ("recursive",)),
    ("execute_command", {"command": ["rm", "-rf", "/"]}, ("command",)),
    ("execute_command", {"command": "ls", "timeout": 301}, ("timeout",)),
    ("execute_command", {"command": "ls", "timeout": 0}, ("timeout",)),
    ("execute_command", {"command": "ls", "cwd": 1}, ("cwd",)),
    ("execute_command", {"command": "ls", "shell": "sh"}, ("shell",)),
    ("search_in_code", {"query": 1}, ("query",)),
    ("search_in_code", {"query": "x", "max_results": 1001}, ("max_results",)),
    ("search_in_code", {"query": "x", "max_results": 0}, ("max_results",)),
    ("search_in_code", {"query": "x", "path": 1}, ("path",)),
    ("search_in_code", {"query": "x", "file_pattern": []}, ("file_pattern",)),
    ("search_in_code", {"query": "x", "case_sensitive": 1}, ("case_sensitive",)),
    ("search_in_code", {"query": "x", "regex": "x"}, ("regex",)),
    ("switch_mode", {"mode": "universal"}, ("mode",)),
    ("switch_mode", {"mode": "Coder"}, ("mode",)),
    ("switch_mode", {"mode": "coder", "reason": 1}, ("reason",)),
]


def judge(tool: str, arguments: dict[str, Any]) -> policy.Ruling:
    box = toolbox("coder")
    return box.judge(Tool.objects.get(pk=tool), arguments)


@pytest.mark.parametrize(("tool", "arguments"), GOOD)
def test_arguments_that_fit_are_taken(tool: str, arguments: dict[str, Any]) -> None:
    assert judge(tool, arguments).outcome in ("allow", "ask")


@pytest.mark.parametrize(("tool", "arguments", "where"), BAD)
def test_arguments_that_do_not_fit_are_refused_with_the_place(
    tool: str, arguments: dict[str, Any], where: tuple[str, ...]
) -> None:
    with pytest.raises(CallRefused) as refused:
        judge(tool, arguments)

    assert (refused.value.code, refused.value.path, refused.value.is_shown) == ("invalid_arguments", where, False)
    assert tool in refused.value.message
    assert all(name in refused.value.message for name in where)


def test_a_complaint_about_arguments_is_short() -> None:
    with pytest.raises(CallRefused) as refused:
        judge("read_file", {"path": ["x" * 10_000]})

    assert len(refused.value.message) < 500


def test_the_schema_is_that_of_the_row_at_this_moment() -> None:
    judge("read_file", {"path": "a"})
    Tool.objects.filter(pk="read_file").update(parameters={"type": "object", "required": ["file"]})

    with pytest.raises(CallRefused, match="'file' is a required property"):
        judge("read_file", {"path": "a"})


@pytest.mark.parametrize(
    "schema",
    [
        None,
        [],
        {"type": "nonsense"},
        {"type": 5},
        {"properties": []},
        {"required": "path"},
        {"$ref": "#"},
        {"$ref": "#/nowhere"},
        {"properties": {"path": {"pattern": "("}}},
    ],
)
def test_a_tool_with_a_broken_schema_is_called_by_nobody(schema: Any) -> None:
    box = toolbox("coder")
    box.tools["read_file"].parameters = schema

    with pytest.raises(CallRefused) as refused:
        box.judge(box.tools["read_file"], {"path": "a"})

    assert (refused.value.code, refused.value.is_shown) == ("tool_broken", False)


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_a_schema_that_refers_to_another_place_is_never_fetched(scheme: str, tmp_path: Any) -> None:
    asked: list[str] = []

    class Recorder(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    stranger = HTTPServer(("127.0.0.1", 0), Recorder)
    threading.Thread(target=stranger.serve_forever, args=(0.01,), daemon=True).start()
    (tmp_path / "schema.json").write_text("{}")
    address = {
        "http": f"http://127.0.0.1:{stranger.server_port}/schema.json",
        "file": (tmp_path / "schema.json").as_uri(),
    }
    Tool.objects.filter(pk="read_file").update(parameters={"$ref": address[scheme]})

    with pytest.raises(CallRefused, match="schema"):
        judge("read_file", {"path": "a"})

    stranger.shutdown()
    stranger.server_close()
    assert asked == []


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ("", {}),
        ("  \n", {}),
        ("{}", {}),
        (' {"path": "a"} ', {"path": "a"}),
        ('{"n": [1, 1.0, 1e300, "\\u2028"]}', {"n": [1, 1.0, 1e300, "\u2028"]}),
    ],
)
def test_arguments_are_read_as_the_model_wrote_them(written: str, arguments: dict[str, Any]) -> None:
    assert tools.read_arguments(CallWanted("", "read_file", written)) == arguments


@pytest.mark.parametrize(
    "written",
    [
        "[]",
        "null",
        '"{}"',
        "1",
        "{",
        '{"path": "a"',
        "{'path': 'a'}",
        '{"path": "a",}',
        '{"path": "a"} {}',
        '{"path": NaN}',
        '{"path": Infinity}',
        '{"path": 1e999}',
        '{"path": "a", "path": "b"}',
        '{"path": "\\u0000"}',
        '{"path": "\\ud800"}',
        '{"path": ' + "[" * 100 + "]" * 100 + "}",
        '{"path": ' + "9" * 5_000 + "}",
        "{" + ",".join(f'"{number}":1' for number in range(10_001)) + "}",
    ],
)
def test_arguments_that_cannot_be_read_are_never_carried_out(written: str) -> None:
    with pytest.raises(CallRefused) as refused:
        tools.read_arguments(CallWanted("", "read_file", written))

    assert (refused.value.code, refused.value.is_shown) == ("invalid_arguments", False)
    assert "body" not in refused.value.message.lower(), "the model knows of no body"


def test_arguments_that_were_damaged_are_never_carried_out() -> None:
    with pytest.raises(CallRefused) as refused:
        tools.read_arguments(CallWanted("", "read_file", '{"path": "\ufffd"}', is_damaged=True))

    assert refused.value.code == "invalid_arguments"


def test_arguments_that_were_cut_are_never_carried_out() -> None:
    with pytest.raises(CallRefused) as refused:
        tools.read_arguments(CallWanted("", "read_file", '{"path": "a"}', is_cut=True))

    assert refused.value.code == "arguments_too_large"
