"""The OpenAI-compatible client against a real server with every fault a provider is known for."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agents_app.keywords import classify
from agents_app.llm.base import CallWanted, FinishedStep, ModelError, ModelRequest, TextDelta, Usage
from agents_app.llm.breaker import Breaker
from agents_app.llm.demo import DemoModel
from agents_app.llm.openai import Answer, ClientSettings, EventSplitter, OpenAIModel
from tests.scripted_llm import (
    PATIENCE,
    Body,
    Gate,
    Say,
    ScriptedLLM,
    bad_json,
    call,
    calls,
    drop,
    empty,
    endless,
    endless_calls,
    history_problem,
    hold,
    html,
    raw,
    say,
    silence,
    slow_bytes,
    status,
    whole,
)

SECRET = "sk-very-secret"
SYSTEM = {"role": "system", "content": "You are the coder."}
HELLO = ModelRequest(model="test", messages=[SYSTEM, {"role": "user", "content": "Hello"}])


@pytest.fixture
def llm() -> Iterator[ScriptedLLM]:
    with ScriptedLLM() as server:
        yield server
    assert server.refused == []


@asynccontextmanager
async def client(url: str, *, breaker: Breaker | None = None, **changed: Any) -> AsyncIterator[OpenAIModel]:
    """A client that waits less long than a real one."""
    settings: dict[str, Any] = {"api_key": SECRET, "connect_timeout": 2, "first_token_timeout": 5, "token_timeout": 5}
    settings |= {"retry_delay": 0.001, **changed}
    model = OpenAIModel(ClientSettings(base_url=url, **settings), breaker=breaker)
    try:
        yield model
    finally:
        await model.aclose()


async def ask(model: OpenAIModel | DemoModel, request: ModelRequest = HELLO) -> tuple[list[str], FinishedStep]:
    """The deltas and the finished step."""
    async with asyncio.timeout(PATIENCE):
        *deltas, finished = [output async for output in model.stream(request)]
    assert isinstance(finished, FinishedStep)
    return [delta.text for delta in deltas if isinstance(delta, TextDelta)], finished


async def fail(model: OpenAIModel) -> tuple[str, str]:
    """The text that arrived before the step failed, and the code it failed with."""
    arrived = ""
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(ModelError) as caught:
            async for output in model.stream(HELLO):
                assert isinstance(output, TextDelta)
                arrived += output.text
    shown = f"{caught.value.code} {caught.value.message}"
    for secret in (SECRET, "127.0.0.1", "localhost", "http", "Error", "upstream", "Client"):
        assert secret not in shown
    return arrived, caught.value.code


@asynccontextmanager
async def raw_server(answer: bytes, *, stays: bool = False) -> AsyncIterator[str]:
    """A server that sends these bytes to every request, then closes the connection, or keeps it open in silence."""
    left = asyncio.Event()

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        if stays:
            await left.wait()
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        left.set()


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def tools(*names: str) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": name, "description": "", "parameters": {"type": "object"}}}
        for name in names
    ]


def event(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    return f"data: {json.dumps({'choices': [{'delta': delta, 'finish_reason': finish_reason}]})}\n\n".encode()


# A good answer


@pytest.mark.asyncio
async def test_text_comes_in_pieces_and_then_as_a_whole_with_its_usage(llm: ScriptedLLM) -> None:
    llm.script(say("Hi there, you!", usage=(12, 3)))

    async with client(llm.url) as model:
        deltas, finished = await ask(model)

    assert deltas == ["Hi", " there,", " you!"]
    assert finished == FinishedStep("Hi there, you!", finish_reason="stop", usage=Usage(12, 3, 15))


@pytest.mark.asyncio
async def test_the_request_is_what_providers_expect(llm: ScriptedLLM) -> None:
    async with client(llm.url + "/") as model:
        await ask(model, ModelRequest(model="gpt", messages=HELLO.messages, temperature=0.3))

    assert llm.requests == [
        {
            "model": "gpt",
            "messages": HELLO.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.3,
        }
    ]
    assert llm.headers[0]["Authorization"] == f"Bearer {SECRET}"
    assert llm.headers[0]["Content-Type"] == "application/json"


@pytest.mark.asyncio
async def test_the_tools_on_offer_are_sent(llm: ScriptedLLM) -> None:
    offered = tools("read_file", "write_file")

    async with client(llm.url) as model:
        await ask(model, ModelRequest(model="gpt", messages=HELLO.messages, tools=offered))
        await ask(model, ModelRequest(model="gpt", messages=HELLO.messages, tools=[]))

    assert llm.requests[0]["tools"] == offered
    assert "tools" not in llm.requests[1]


@pytest.mark.asyncio
async def test_without_a_key_none_is_sent(llm: ScriptedLLM) -> None:
    async with client(llm.url, api_key="") as model:
        await ask(model)

    assert "Authorization" not in llm.headers[0]


@pytest.mark.asyncio
async def test_steps_share_one_connection(llm: ScriptedLLM) -> None:
    async with client(llm.url) as model:
        for _ in range(5):
            await ask(model)

    assert len(llm.connections) == 1


@pytest.mark.asyncio
async def test_tool_calls_are_put_together_from_their_pieces(llm: ScriptedLLM) -> None:
    arguments = '{ "path":"a.md",  "content": "ünï\\n" }'
    llm.script(calls(call("write_file", arguments, id="c-1"), call("read_file", "{not json", id="c-2"), text="So:"))

    async with client(llm.url) as model:
        deltas, finished = await ask(model)

    assert deltas == ["So:"]
    assert finished.finish_reason == "tool_calls"
    assert finished.tool_calls == [
        CallWanted("c-1", "write_file", arguments),
        CallWanted("c-2", "read_file", "{not json"),
    ]


def piece(name: str | None, arguments: str, **ids: Any) -> dict[str, Any]:
    return ids | {"function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("deltas", "expected"),
    [
        pytest.param(
            [[piece("a", "{", index=1, id="x")], [piece("b", "1", index=0, id="y"), piece(None, "}", index=1)]],
            [("x", "a", "{}"), ("y", "b", "1")],
            id="interleaved",
        ),
        pytest.param(
            [[piece("a", "{", index=0, id="x")], [piece("a", "}", index=0, id="x")]],
            [("x", "a", "{}")],
            id="id and name repeated",
        ),
        pytest.param(
            [[piece("a", "{", index=0, id="x")], [piece("", "}", index=0, id="other")]],
            [("x", "a", "{}")],
            id="a new id with every piece",
        ),
        pytest.param(
            [[piece("a", "1", index=0, id="x")], [piece("a", "2", index=0, id="y")]],
            [("x", "a", "1"), ("y", "a", "2")],
            id="one index for all calls",
        ),
        pytest.param(
            [[piece("a", "1", id="x"), piece("b", "2", id="y")], [piece("c", "3", id="z")]],
            [("x", "a", "1"), ("y", "b", "2"), ("z", "c", "3")],
            id="no index",
        ),
        pytest.param(
            [[piece("a", "1", index=0, id="x"), piece("a", "1", index=1, id="x")]],
            [("x", "a", "1"), ("x", "a", "1")],
            id="one id for two calls",
        ),
        pytest.param(
            [[piece("a", "1", index=0), piece("a", "1", index=1)]],
            [("", "a", "1"), ("", "a", "1")],
            id="no ids",
        ),
        pytest.param(
            [[piece(None, "1", index=0, id="x"), piece("", "2", index=1, id="y")]],
            [("x", "", "1"), ("y", "", "2")],
            id="no names",
        ),
        pytest.param(
            [[piece("a", "", index=0, id="x")], [{"index": 1, "id": "y", "function": {"name": "b"}}]],
            [("x", "a", ""), ("y", "b", "")],
            id="no arguments",
        ),
        pytest.param([[{"index": 0}]], [("", "", "")], id="nothing at all"),
        pytest.param(
            [[piece("a", "\ud83d", index=0, id="x")], [piece(None, "\ude00", index=0)]],
            [("x", "a", "😀")],
            id="a character cut in two",
        ),
    ],
)
@pytest.mark.asyncio
async def test_tool_calls_come_out_whole_whatever_a_provider_makes_of_index_and_id(
    llm: ScriptedLLM, deltas: list[list[dict[str, Any]]], expected: list[tuple[str, str, str]]
) -> None:
    llm.script(raw(*[event({"tool_calls": delta}) for delta in deltas], event({}, "tool_calls")))

    async with client(llm.url) as model:
        _, finished = await ask(model)

    assert finished.tool_calls == [CallWanted(*one) for one in expected]


@pytest.mark.asyncio
async def test_a_server_that_does_not_stream_may_ask_for_tools(llm: ScriptedLLM) -> None:
    asks = calls(call("a", '{"x": 1}', id="i"), call("b", "", id="i"), call("", "{not json", id=""))
    llm.script(whole("So:", asks=asks), whole("", asks=asks))

    async with client(llm.url) as model:
        deltas, finished = await ask(model)
        no_deltas, without_text = await ask(model)

    assert (deltas, no_deltas) == (["So:"], [])
    assert finished.finish_reason == "tool_calls"
    assert finished.tool_calls == without_text.tool_calls
    assert finished.tool_calls == [
        CallWanted("i", "a", '{"x": 1}'),
        CallWanted("i", "b", ""),
        CallWanted("", "", "{not json"),
    ]


def streamed(reply: Say) -> Say:
    return reply


def not_streamed(reply: Say) -> Body:
    return whole(reply.text, asks=reply)


def in_one_event(reply: Say) -> Body:
    """Each call in a single piece, all in one delta."""
    pieces = [piece(one.name, one.arguments, index=index, id=one.id) for index, one in enumerate(reply.calls)]
    return raw(event({"content": reply.text, "tool_calls": pieces}, "tool_calls"))


EVERY_WAY = pytest.mark.parametrize("sent", [streamed, not_streamed, in_one_event])
KIB = 1024


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        pytest.param("x" * (256 * KIB - 1), 256 * KIB - 1, id="one under"),
        pytest.param("x" * 256 * KIB, 256 * KIB, id="at the limit"),
        pytest.param("x" * (256 * KIB + 1), 256 * KIB, id="one over"),
        pytest.param("x" * 1024 * KIB, 256 * KIB, id="1 MiB"),
        pytest.param("ü" * 128 * KIB, 128 * KIB, id="at the limit in bytes"),
        pytest.param("ü" * 128 * KIB + "x", 128 * KIB, id="one over in bytes"),
        pytest.param("x" + "ü" * 128 * KIB, 128 * KIB, id="the limit within a character"),
        pytest.param("\0" * 128 * KIB, 256 * KIB // 3, id="at the limit until it is cleaned"),
    ],
)
@EVERY_WAY
@pytest.mark.asyncio
async def test_arguments_beyond_256_kib_are_cut_and_the_other_calls_are_not(
    llm: ScriptedLLM, sent: Any, arguments: str, kept: int
) -> None:
    llm.script(sent(calls(call("write_file", arguments, id="big"), call("echo", "{}", id="small"), text="So:")))

    async with client(llm.url) as model:
        deltas, finished = await ask(model)

    expected = arguments.replace("\0", "\ufffd")
    big, small = finished.tool_calls
    assert deltas == ["So:"]
    assert big == CallWanted(
        "big", "write_file", expected[:kept], is_cut=kept < len(expected), is_damaged="\0" in arguments
    )
    assert small == CallWanted("small", "echo", "{}", is_cut=False)


@EVERY_WAY
@pytest.mark.asyncio
async def test_ids_and_names_are_cut_at_200_characters(llm: ScriptedLLM, sent: Any) -> None:
    llm.script(sent(calls(call("n" * 200, id="i" * 200), call("ñ" * 201, id="ï" * 201))))

    async with client(llm.url) as model:
        _, finished = await ask(model)

    assert finished.tool_calls == [
        CallWanted("i" * 200, "n" * 200, "{}"),
        CallWanted("ï" * 200, "ñ" * 200, "{}"),
    ]


@EVERY_WAY
@pytest.mark.asyncio
async def test_an_answer_may_ask_for_128_calls_and_no_more(llm: ScriptedLLM, sent: Any) -> None:
    many = [call("echo", id=f"c-{number}") for number in range(129)]
    llm.script(sent(calls(*many[:128])), sent(calls(*many)))

    async with client(llm.url) as model:
        _, finished = await ask(model)
        assert await fail(model) == ("", "output_limit")

    assert [one.provider_id for one in finished.tool_calls] == [f"c-{number}" for number in range(128)]


@EVERY_WAY
@pytest.mark.asyncio
async def test_all_calls_of_an_answer_may_have_4_mib_characters_together(llm: ScriptedLLM, sent: Any) -> None:
    """Quotation marks, because JSON makes them two bytes each."""
    one = call("n", '"' * (1024 * KIB - 2), id="i")
    last = call("n", '"' * (1024 * KIB - 1), id="i")
    llm.script(sent(calls(one, one, one, one)), sent(calls(one, one, one, last)))

    async with client(llm.url) as model:
        _, finished = await ask(model)
        assert await fail(model) == ("", "output_limit")

    assert [(len(one.arguments), one.is_cut) for one in finished.tool_calls] == [(256 * KIB, True)] * 4


@pytest.mark.asyncio
async def test_arguments_do_not_count_as_text(llm: ScriptedLLM) -> None:
    llm.script(call("write_file", "x" * 1000, text="So be it."))

    async with client(llm.url, max_output_chars=10) as model:
        _, finished = await ask(model)

    assert (finished.text, finished.tool_calls[0].arguments) == ("So be it.", "x" * 1000)


@pytest.mark.asyncio
async def test_a_server_that_does_not_stream_is_understood(llm: ScriptedLLM) -> None:
    llm.script(whole("All at once.", usage=(7, 4)))

    async with client(llm.url) as model:
        deltas, finished = await ask(model)

    assert deltas == ["All at once."]
    assert finished == FinishedStep("All at once.", finish_reason="stop", usage=Usage(7, 4, 11))


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None}])
@pytest.mark.asyncio
async def test_missing_usage_counts_as_zero(llm: ScriptedLLM, usage: Any) -> None:
    last = json.dumps({"choices": [], "usage": usage}).encode()
    llm.script(raw(event({"content": "Hi"}, "stop"), b"data: " + last + b"\n\n"))

    async with client(llm.url) as model:
        _, finished = await ask(model)

    assert finished.usage == Usage(0, 0, 0)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(event({"content": "Hi"}) + b"data: [DONE]\n\n", id="done, no finish reason"),
        pytest.param(event({"content": "Hi"}) + event({}, "stop"), id="finish reason, not done"),
        pytest.param(event({"content": "Hi"}) + event({}, "stop").rstrip(), id="no blank line at the end"),
        pytest.param((event({"content": "Hi"}) + event({}, "stop")).replace(b"\n", b"\r\n"), id="crlf"),
        pytest.param((event({"content": "Hi"}) + event({}, "stop")).replace(b"data: ", b"data:"), id="no space"),
        pytest.param(b": ping\n\nid: 1\n" + event({"content": "Hi"}) + b":\n" + event({}, "stop"), id="comments"),
        pytest.param(
            event({"content": "Hi"}).replace(b", ", b",\ndata: ") + event({}, "stop"), id="several data lines"
        ),
        pytest.param(event({"content": "Hi"}, "stop") + b"data: [DONE]\n\ndata: {junk\n\n", id="junk after done"),
    ],
)
@pytest.mark.asyncio
async def test_every_way_to_write_and_to_end_an_event_stream(llm: ScriptedLLM, body: bytes) -> None:
    llm.script(raw(body), slow_bytes(body, 0))

    async with client(llm.url) as model:
        in_one_piece, _ = await ask(model)
        byte_by_byte, _ = await ask(model)

    assert "".join(in_one_piece) == "".join(byte_by_byte) == "Hi"
    assert len(llm.requests) == 2


@given(
    pieces=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1),
    escaped=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n"]),
    cuts=st.lists(st.integers(0, 2000)),
)
@example(pieces=["😀"], escaped=False, newline="\r\n", cuts=list(range(2000)))
def test_any_text_in_any_chunking_comes_back_identical(
    pieces: list[str], escaped: bool, newline: str, cuts: list[int]
) -> None:
    answer = Answer(ClientSettings(base_url=""))
    lines = [json.dumps({"choices": [{"delta": {"content": piece}}]}, ensure_ascii=escaped) for piece in pieces]
    body = "".join(f"data: {line}{newline}{newline}" for line in [*lines, "[DONE]"]).encode()
    edges = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})

    got = [text for start, end in zip(edges, edges[1:], strict=False) for text in answer.feed(body[start:end])]

    assert [*got, *answer.close()] == pieces
    assert answer.done


LINES = [b"", b"", b"data: a", b"data: b", b"data:c", b"data:", b"data: ", b": ping", b"event: x", b"data: d\r", b"\r"]


@given(lines=st.lists(st.sampled_from(LINES)), cuts=st.lists(st.integers(0, 200)))
@example(lines=[b"data:", b"data: a", b"", b""], cuts=[6])
@example(lines=[b"data: a", b"", b": ping", b"", b"data: b", b"", b""], cuts=[])
def test_any_event_stream_is_split_alike_in_any_chunking(lines: list[bytes], cuts: list[int]) -> None:
    body = b"\n".join(lines)
    edges = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    in_chunks, by_byte = EventSplitter(1_000), EventSplitter(1_000)

    got = [event for start, end in zip(edges, edges[1:], strict=False) for event in in_chunks.feed(body[start:end])]

    expected = [event for index in range(len(body)) for event in by_byte.feed(body[index : index + 1])]
    assert got == expected
    assert [*in_chunks.end()] == [*by_byte.end()]


@given(text=st.text(st.characters(categories=["Cs", "Cc", "So", "L"]), min_size=1), data=st.data())
def test_surrogates_and_nul_become_replacement_characters_wherever_the_text_is_cut(
    text: str, data: st.DataObject
) -> None:
    units = text.encode("utf-16-le", "surrogatepass")
    expected = units.decode("utf-16-le", "replace").replace("\0", "\ufffd")
    halves = [units[i : i + 2].decode("utf-16-le", "surrogatepass") for i in range(0, len(units), 2)]
    edges = sorted({0, len(halves), *data.draw(st.lists(st.integers(0, len(halves))))})
    answer = Answer(ClientSettings(base_url=""))

    got: list[str] = []
    for start, end in zip(edges, edges[1:], strict=False):
        got += answer.feed(event({"content": "".join(halves[start:end])}))
    got += answer.feed(b"data: [DONE]\n\n")
    got += answer.close()

    assert "".join(got) == expected
    "".join(got).encode()


@pytest.mark.asyncio
async def test_nul_and_lone_surrogates_never_leave_the_client(llm: ScriptedLLM) -> None:
    nul = event(
        {"content": "a\0b \ud83d", "tool_calls": [{"id": "i\0", "function": {"name": "n", "arguments": "\ude00"}}]}
    )
    llm.script(raw(nul, event({"content": "\ude00 \ud83d"}, "stop")))

    async with client(llm.url) as model:
        deltas, finished = await ask(model)

    assert finished.text == "".join(deltas) == "a\ufffdb 😀 \ufffd"
    assert finished.tool_calls == [CallWanted("i\ufffd", "n", "\ufffd", is_damaged=True)]


# Faults


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504, 529])
@pytest.mark.asyncio
async def test_a_busy_or_broken_server_is_asked_again(llm: ScriptedLLM, code: int) -> None:
    llm.script(status(code), status(code), status(code), say("There you are."))

    async with client(llm.url) as model:
        _, finished = await ask(model)

    assert finished.text == "There you are."
    assert len(llm.requests) == 4


@pytest.mark.parametrize(
    ("code", "expected", "requests"),
    [
        (429, "model_rate_limited", 3),
        (500, "model_unavailable", 3),
        (501, "model_unavailable", 1),
        (400, "model_rejected", 1),
        (401, "model_rejected", 1),
        (404, "model_rejected", 1),
        (302, "model_rejected", 1),
    ],
)
@pytest.mark.asyncio
async def test_what_each_status_means(llm: ScriptedLLM, code: int, expected: str, requests: int) -> None:
    llm.default = status(code)

    async with client(llm.url, retries=2) as model:
        assert await fail(model) == ("", expected)

    assert len(llm.requests) == requests


@pytest.mark.asyncio
async def test_redirects_are_not_followed(llm: ScriptedLLM) -> None:
    llm.script(raw(status=307, headers={"Location": f"{llm.url}/chat/completions"}))

    async with client(llm.url) as model:
        assert await fail(model) == ("", "model_rejected")

    assert len(llm.requests) == 1


@pytest.mark.parametrize("as_date", [False, True])
@pytest.mark.asyncio
async def test_retry_after_is_honoured(llm: ScriptedLLM, as_date: bool) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    date = format_datetime(datetime.now(UTC) + timedelta(seconds=42), usegmt=True)
    llm.script(status(429, retry_after=date if as_date else 42))
    model = OpenAIModel(ClientSettings(llm.url, retry_delay=0.001), sleep=sleep)

    async with aclosing(model):
        _, finished = await ask(model)

    assert finished.text == "ok"
    assert len(slept) == 1
    assert 38 < slept[0] < 43


@pytest.mark.parametrize("retry_after", ["0", "-5", "soon", "nan", "Wed, 21 Oct 2015 07:28:00 GMT", ""])
@pytest.mark.asyncio
async def test_a_retry_after_that_asks_for_nothing_sensible_costs_no_time(llm: ScriptedLLM, retry_after: str) -> None:
    llm.script(status(503, retry_after=retry_after))

    async with client(llm.url) as model, asyncio.timeout(2):
        _, finished = await ask(model)

    assert finished.text == "ok"


@pytest.mark.parametrize("retry_after", ["61", "inf", "Wed, 21 Oct 2099 07:28:00 GMT"])
@pytest.mark.asyncio
async def test_a_server_that_asks_for_too_long_a_wait_is_given_up_at_once(llm: ScriptedLLM, retry_after: str) -> None:
    llm.script(status(429, retry_after=retry_after))

    async with client(llm.url) as model:
        assert await fail(model) == ("", "model_rate_limited")

    assert len(llm.requests) == 1


@pytest.mark.asyncio
async def test_waits_grow_and_differ(llm: ScriptedLLM) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    llm.default = status(500)
    model = OpenAIModel(ClientSettings(llm.url, retry_delay=1.0, retries=8), sleep=sleep)
    async with aclosing(model):
        assert await fail(model) == ("", "model_unavailable")

    assert len(set(slept)) == 8
    assert max(slept) > 1
    assert all(wait <= min(60, 2**attempt) for attempt, wait in enumerate(slept))


@pytest.mark.asyncio
async def test_nobody_listens() -> None:
    async with client(f"http://127.0.0.1:{unused_port()}/v1") as model:
        assert await fail(model) == ("", "model_unreachable")


@pytest.mark.asyncio
async def test_a_server_that_comes_back_is_reached() -> None:
    slept = asyncio.Event()
    back = asyncio.Event()

    async def sleep(seconds: float) -> None:
        slept.set()
        await back.wait()

    with ScriptedLLM() as llm:
        llm.stop()
        async with aclosing(OpenAIModel(ClientSettings(llm.url), sleep=sleep)) as model:
            step = asyncio.create_task(ask(model))
            await slept.wait()
            llm.start()
            back.set()
            _, finished = await step

    assert finished.text == "ok"


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "[", "127.0.0.1:99999"])
@pytest.mark.asyncio
async def test_a_host_that_does_not_exist(host: str) -> None:
    async with client(f"http://{host}/v1") as model:
        assert await fail(model) == ("", "model_unreachable")


@pytest.mark.asyncio
async def test_a_connection_that_is_never_accepted() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))

        async with client(f"http://127.0.0.1:{port}/v1", connect_timeout=0.1, retries=1) as model:
            assert await fail(model) == ("", "model_unreachable")

        for filler in fillers:
            filler.close()


@pytest.mark.asyncio
async def test_no_first_byte_is_a_timeout_and_not_tried_again(llm: ScriptedLLM) -> None:
    llm.script(silence(30))

    async with client(llm.url, first_token_timeout=0.1) as model:
        assert await fail(model) == ("", "model_timeout")

    assert len(llm.requests) == 1
    await llm.await_for(lambda llm: llm.aborted == 1)


@pytest.mark.asyncio
async def test_bytes_without_a_token_do_not_count_as_a_first_token(llm: ScriptedLLM) -> None:
    llm.script(slow_bytes(b": still thinking\n\n" * 1000, 0.02))

    async with client(llm.url, first_token_timeout=0.2, token_timeout=0.2) as model:
        assert await fail(model) == ("", "model_timeout")


@pytest.mark.asyncio
async def test_one_byte_at_a_time_is_too_slow_between_tokens_too(llm: ScriptedLLM) -> None:
    llm.script(slow_bytes(event({"content": "Hi"}) * 100, 0.005))

    async with client(llm.url, token_timeout=0.15) as model:
        assert await fail(model) == ("Hi", "model_timeout")


@pytest.mark.asyncio
async def test_silence_between_tokens_is_a_timeout(llm: ScriptedLLM) -> None:
    llm.script(silence(30, after="Well, let me"))

    async with client(llm.url, token_timeout=0.1) as model:
        assert await fail(model) == ("Well, let me", "model_timeout")

    assert len(llm.requests) == 1


@pytest.mark.asyncio
async def test_a_slow_reader_is_not_taken_for_a_slow_model(llm: ScriptedLLM) -> None:
    gate = Gate()
    llm.script(hold("Well,", " so be it.", gate=gate))
    arrived = ""

    async with client(llm.url, first_token_timeout=1, token_timeout=0.1) as model:
        async for output in model.stream(HELLO):
            if not arrived:
                gate.open()
                await asyncio.sleep(0.2)  # longer than the model may take
            arrived += output.text if isinstance(output, TextDelta) else ""

    assert arrived == "Well, so be it."


@pytest.mark.asyncio
async def test_thinking_shows_that_the_model_is_at_work(llm: ScriptedLLM) -> None:
    thinking = [event({"role": "assistant", "content": "", "reasoning_content": "hm"})] * 6
    llm.script(raw(*thinking, event({"content": "42"}, "stop"), pause=0.1))

    async with client(llm.url, first_token_timeout=0.4) as model:
        deltas, _ = await ask(model)

    assert deltas == ["42"]


@pytest.mark.asyncio
async def test_a_connection_dropped_before_any_text_is_tried_again(llm: ScriptedLLM) -> None:
    only_a_role = raw(event({"role": "assistant", "content": ""}))
    llm.script(drop(), only_a_role, raw(b""), say("At last."))

    async with client(llm.url) as model:
        deltas, _ = await ask(model)

    assert "".join(deltas) == "At last."
    assert len(llm.requests) == 4


@pytest.mark.parametrize(
    ("reply", "arrived"),
    [
        pytest.param(drop("Half an"), "Half an", id="mid-text"),
        pytest.param(drop(call=call("write_file", '{"path": "a"}')), "", id="mid-tool-call"),
        pytest.param(drop("I will", call=call("write_file")), "I will", id="text and half a call"),
        pytest.param(
            raw(event({"tool_calls": [piece("a", "{}", index=0, id="x")]})), "", id="end of body after a whole call"
        ),
        pytest.param(raw(event({"content": "Half an"})), "Half an", id="end of body, not of answer"),
        pytest.param(raw(event({"content": "Half an"}) + b'data: {"cho'), "Half an", id="cut within an event"),
        pytest.param(raw(event({"reasoning": "hm"})), "", id="mid-thought"),
    ],
)
@pytest.mark.asyncio
async def test_an_answer_that_breaks_off_is_never_begun_again(llm: ScriptedLLM, reply: Any, arrived: str) -> None:
    llm.script(reply)

    async with client(llm.url) as model:
        assert await fail(model) == (arrived, "model_interrupted")

    assert len(llm.requests) == 1


@pytest.mark.asyncio
async def test_a_connection_that_stays_dropped(llm: ScriptedLLM) -> None:
    llm.default = drop()

    async with client(llm.url, retries=1) as model:
        assert await fail(model) == ("", "model_interrupted")

    assert len(llm.requests) == 2


@pytest.mark.parametrize(
    ("reply", "arrived"),
    [
        pytest.param(html(), "", id="html"),
        pytest.param(bad_json(), "", id="no json"),
        pytest.param(bad_json(after="So"), "So", id="no json after text"),
        pytest.param(raw('data: {"choices":[{"delta":{"content":"ü'.encode()[:-1] + b'"}}]}\n\n'), "", id="half an ü"),
        pytest.param(raw(b'data: {"error": {"message": "upstream %s"}}\n\n' % SECRET.encode()), "", id="error event"),
        pytest.param(raw(b'{"error": "upstream"}', content_type="application/json"), "", id="error body"),
        pytest.param(raw(b'{"choices": [{"mess', content_type="application/json"), "", id="half a body"),
        pytest.param(raw(b"data: []\n\n"), "", id="a list"),
        pytest.param(raw(b"data: 7\n\n"), "", id="a number"),
        pytest.param(raw(b'data: {"choices": {"a": 1}}\n\n'), "", id="choices is no list"),
        pytest.param(raw(b'data: {"choices": [null]}\n\n'), "", id="choice is null"),
        pytest.param(raw(b'data: {"choices": [{"delta": "x"}]}\n\n'), "", id="delta is text"),
        pytest.param(raw(event({"content": ["x"]})), "", id="content is a list"),
        pytest.param(raw(event({"tool_calls": [{"index": [], "id": "x"}]})), "", id="index is a list"),
        pytest.param(raw(event({"tool_calls": [{"id": 7}]})), "", id="id is a number"),
        pytest.param(raw(event({"tool_calls": [{"function": {"arguments": {"a": 1}}}]}, "stop")), "", id="parsed args"),
        pytest.param(raw(b'data: {"usage": {"prompt_tokens": Infinity}}\n\n'), "", id="infinite usage"),
        pytest.param(raw(b"data: " + b"[" * 200_000 + b"\n\n"), "", id="nested"),
    ],
)
@pytest.mark.asyncio
async def test_an_answer_that_makes_no_sense(llm: ScriptedLLM, reply: Any, arrived: str) -> None:
    llm.script(reply)

    async with client(llm.url) as model:
        assert await fail(model) == (arrived, "model_bad_response")

    assert len(llm.requests) == 1


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "model_bad_response"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", "model_bad_response"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnot a size\r\n", "model_bad_response"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n\n\r\nno size\r\n", "model_bad_response"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 9\r\n\r\nnot gzip!", "model_interrupted"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\ndata: ", "model_interrupted"),
    ],
)
@pytest.mark.asyncio
async def test_a_server_that_speaks_something_else(answer: bytes, code: str) -> None:
    async with raw_server(answer) as url, client(url, retries=1) as model:
        assert await fail(model) == ("", code)


@pytest.mark.parametrize("end", [event({"content": "Hi"}, "stop"), event({"content": "Hi"}) + b"data: [DONE]\n\n"])
@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.asyncio
async def test_a_complete_answer_counts_however_the_connection_ends(end: bytes, stays: bool) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9000\r\n\r\n"

    async with raw_server(head + end, stays=stays) as url, client(url, token_timeout=0.1) as model:
        _, finished = await ask(model)

    assert finished.text == "Hi"


@pytest.mark.parametrize("reply", [empty(), say(" \n"), whole("")])
@pytest.mark.asyncio
async def test_an_empty_answer_is_an_error(llm: ScriptedLLM, reply: Any) -> None:
    llm.script(reply)

    async with client(llm.url) as model:
        _, code = await fail(model)

    assert code == "model_empty_answer"
    assert len(llm.requests) == 1


@pytest.mark.asyncio
async def test_a_text_that_never_ends_is_cut_off(llm: ScriptedLLM) -> None:
    llm.script(endless("again and "))

    async with client(llm.url, max_output_chars=25) as model:
        assert await fail(model) == ("again and again and ", "output_limit")

    await llm.await_for(lambda llm: llm.aborted == 1)


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([piece(None, "x" * 10_000, index=0)], id="arguments"),
        pytest.param([piece("n" * 10_000, "", index=0)], id="name"),
        pytest.param([piece(None, "", index=0, id="i" * 10_000)], id="id"),
        pytest.param([piece("a", "{}", index=0, id="x"), piece("a", "{}", index=0, id="y")], id="one after the other"),
    ],
)
@pytest.mark.asyncio
async def test_tool_calls_that_never_end_are_cut_off(llm: ScriptedLLM, pieces: list[dict[str, Any]]) -> None:
    llm.script(endless_calls(*pieces))

    async with client(llm.url) as model:
        assert await fail(model) == ("", "output_limit")

    await llm.await_for(lambda llm: llm.aborted == 1)


@pytest.mark.asyncio
async def test_empty_pieces_of_a_tool_call_do_not_come_for_ever(llm: ScriptedLLM) -> None:
    llm.script(endless_calls(piece("", "", index=0)))

    async with client(llm.url, max_call_chars=100) as model:
        assert await fail(model) == ("", "output_limit")

    await llm.await_for(lambda llm: llm.aborted == 1)


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(raw(*[b"data: " + b"x" * 50_000] * 30), id="line"),
        pytest.param(raw(*[b"data: xxxxxxxxxxx\n" * 5_000] * 30), id="event"),
        pytest.param(
            raw(
                *[b" " * 50_000] * 30, b'{"choices": [{"message": {"content": "x"}}]}', content_type="application/json"
            ),
            id="body",
        ),
    ],
)
@pytest.mark.asyncio
async def test_a_line_an_event_and_a_body_have_an_end(llm: ScriptedLLM, reply: Any) -> None:
    llm.script(reply)

    async with client(llm.url, max_event_bytes=1_000_000) as model:
        assert await fail(model) == ("", "output_limit")

    assert len(llm.requests) == 1


@pytest.mark.parametrize(
    "reply",
    [
        status(401, text=f"Incorrect API key: {SECRET}"),
        raw(f'data: {{"error": "Incorrect API key: {SECRET}"}}\n\n'.encode()),
    ],
)
@pytest.mark.asyncio
async def test_what_the_provider_said_is_logged_without_the_key(
    llm: ScriptedLLM, caplog: pytest.LogCaptureFixture, reply: Any
) -> None:
    llm.script(reply)

    with caplog.at_level(logging.DEBUG):
        async with client(llm.url) as model:
            await fail(model)

    assert "Incorrect API key: ***" in caplog.text
    assert SECRET not in caplog.text + repr(ClientSettings(llm.url, SECRET))


# Leaving early


@pytest.mark.parametrize("before_text", [True, False])
@pytest.mark.asyncio
async def test_cancelling_closes_the_connection_at_once(llm: ScriptedLLM, before_text: bool) -> None:
    gate = Gate()
    llm.script(hold("" if before_text else "Well,", " never", gate=gate))

    async with client(llm.url) as model:
        step = asyncio.create_task(ask(model))
        await gate.reached.await_()
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        await llm.await_for(lambda llm: llm.aborted == 1)


@pytest.mark.asyncio
async def test_a_reader_that_stops_closes_the_connection(llm: ScriptedLLM) -> None:
    llm.script(endless("and "))

    async with client(llm.url) as model:
        async with aclosing(model.stream(HELLO)) as outputs:
            assert await anext(outputs) == TextDelta("and ")
        await llm.await_for(lambda llm: llm.aborted == 1)
        _, finished = await ask(model)

    assert finished.text == "ok"


@pytest.mark.asyncio
async def test_many_streams_run_side_by_side(llm: ScriptedLLM) -> None:
    gate = Gate()
    llm.default = hold("Well,", " so be it.", gate=gate)

    async with client(llm.url) as model:
        steps = [asyncio.create_task(ask(model)) for _ in range(150)]
        await llm.await_for(lambda llm: len(llm.requests) == 150)
        gate.open()
        texts = {finished.text for _, finished in await asyncio.gather(*steps)}

    assert texts == {"Well, so be it."}


# The circuit breaker


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.asyncio
async def test_after_five_failed_steps_the_model_is_left_alone_until_a_probe_succeeds(llm: ScriptedLLM) -> None:
    clock = Clock()
    llm.default = status(500)
    async with client(llm.url, breaker=Breaker(clock=clock), retries=1) as model:
        for _ in range(5):
            assert await fail(model) == ("", "model_unavailable")
        assert len(llm.requests) == 10  # attempts do not count, steps do

        clock.now += 4.9
        assert await fail(model) == ("", "model_circuit_open")
        assert len(llm.requests) == 10

        clock.now += 0.1
        assert await fail(model) == ("", "model_unavailable")
        assert await fail(model) == ("", "model_circuit_open")

        clock.now += 5
        llm.default = say("Back.")
        await ask(model)
        llm.default = status(500)
        for _ in range(5):
            assert await fail(model) == ("", "model_unavailable")


async def _open_circuit(model: OpenAIModel, llm: ScriptedLLM, clock: Clock) -> None:
    llm.default = status(500)
    for _ in range(5):
        await fail(model)
    llm.default = say("ok")
    clock.now += 5


@pytest.mark.asyncio
async def test_only_one_probe_at_a_time(llm: ScriptedLLM) -> None:
    gate, clock = Gate(), Clock()
    async with client(llm.url, breaker=Breaker(clock=clock), retries=0) as model:
        await _open_circuit(model, llm, clock)
        llm.script(hold("Well,", " yes.", gate=gate))
        probe = asyncio.create_task(ask(model))
        await gate.reached.await_()

        assert await fail(model) == ("", "model_circuit_open")

        gate.open()
        await probe
        await ask(model)


@pytest.mark.asyncio
async def test_a_cancelled_probe_makes_room_for_the_next(llm: ScriptedLLM) -> None:
    gate, clock = Gate(), Clock()
    async with client(llm.url, breaker=Breaker(clock=clock), retries=0) as model:
        await _open_circuit(model, llm, clock)
        llm.script(hold("Well,", " yes.", gate=gate))
        probe = asyncio.create_task(ask(model))
        await gate.reached.await_()
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe

        await ask(model)
        await ask(model)


@pytest.mark.parametrize("reply", [status(400), status(404), empty()])
@pytest.mark.asyncio
async def test_failures_that_are_not_the_models_do_not_open_the_circuit(llm: ScriptedLLM, reply: Any) -> None:
    llm.default = reply
    async with client(llm.url, retries=0) as model:
        for _ in range(6):
            await fail(model)

    assert len(llm.requests) == 6


@pytest.mark.asyncio
async def test_cancelled_steps_do_not_open_the_circuit(llm: ScriptedLLM) -> None:
    llm.script(*[endless("and ")] * 6)
    async with client(llm.url) as model:
        for _ in range(6):
            async with aclosing(model.stream(HELLO)) as outputs:
                await anext(outputs)
        await ask(model)


@pytest.mark.asyncio
async def test_a_step_read_no_further_than_its_end_counts_as_a_success(llm: ScriptedLLM) -> None:
    async with client(llm.url, retries=0) as model:
        llm.script(*[status(500)] * 4, say("ok"), *[status(500)] * 4)
        for _ in range(9):
            async with aclosing(model.stream(HELLO)) as outputs:
                try:
                    while not isinstance(await anext(outputs), FinishedStep):
                        pass
                except ModelError as error:
                    assert error.code == "model_unavailable"
        await ask(model)


# The demo model and the keywords


@pytest.mark.asyncio
async def test_the_demo_model_says_what_it_is_and_who_speaks() -> None:
    system = {"role": "system", "content": "You are the architect. You plan."}
    request = ModelRequest(model="", messages=[system, {"role": "user", "content": "Plan my  shop"}])

    deltas, finished = await ask(DemoModel(delay=0), request)
    again, _ = await ask(DemoModel(delay=0), request)

    assert len(deltas) > 20 and "".join(deltas) == finished.text and deltas == again
    assert all(words in finished.text for words in ("demo model", "architect", "“Plan my shop”", "LLM_BASE_URL"))
    assert finished.tool_calls == [] and finished.usage.completion_tokens == len(deltas)


def demo_request(*messages: dict[str, Any], offered: list[dict[str, Any]], agent: str = "coder") -> ModelRequest:
    system = {"role": "system", "content": f"You are the {agent}: you work."}
    return ModelRequest(model="", messages=[system, *messages], tools=offered)


def asks_for(tool: str, **arguments: str) -> list[dict[str, Any]]:
    """The user's message, the call that answered it."""
    function = {"name": tool, "arguments": json.dumps(arguments)}
    tool_calls = [{"id": "call_1", "type": "function", "function": function}]
    return [{"role": "user", "content": "Do it."}, {"role": "assistant", "content": "", "tool_calls": tool_calls}]


ALL_TOOLS = tools("read_file", "write_file", "list_files", "execute_command")


@pytest.mark.parametrize(
    ("said", "tool", "arguments"),
    [
        ("Run it", "execute_command", {"command": "ls"}),
        ("Please EXECUTE something", "execute_command", {"command": "ls"}),
        ("Any command will do", "execute_command", {"command": "ls"}),
        ("Do the tests pass?", "execute_command", {"command": "ls"}),
        ("Run `pytest -q`, please", "execute_command", {"command": "pytest -q"}),
        ("What does `git status` say?", "execute_command", {"command": "git status"}),
        ("In `a.py` run `pytest -q`", "execute_command", {"command": "pytest -q"}),
        ("Run `build.sh`", "execute_command", {"command": "build.sh"}),
        ("Create notes.md and run it", "execute_command", {"command": "ls"}),
        ("Read a.md", "read_file", {"path": "a.md"}),
        ("What is in docs/plan-2.txt?", "read_file", {"path": "docs/plan-2.txt"}),
        ("Explain `src/app.py`.", "read_file", {"path": "src/app.py"}),
        ("What does tests/run.py do", "read_file", {"path": "tests/run.py"}),
        ("Show me the file", "read_file", {"path": "README.md"}),
        ("Прочитай заметки.md", "read_file", {"path": "заметки.md"}),
    ],
)
@pytest.mark.asyncio
async def test_the_demo_model_runs_and_reads_what_the_message_speaks_of(
    said: str, tool: str, arguments: dict[str, str]
) -> None:
    request = demo_request({"role": "user", "content": said}, offered=ALL_TOOLS)

    deltas, finished = await ask(DemoModel(delay=0), request)
    again, _ = await ask(DemoModel(delay=0), request)

    [wanted] = finished.tool_calls
    assert (wanted.provider_id, wanted.name, json.loads(wanted.arguments)) == ("", tool, arguments)
    assert deltas == again and len(deltas) > 5 and "".join(deltas) == finished.text
    assert "demo model" in finished.text and all(value in finished.text for value in arguments.values())
    assert finished.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("said", "path"),
    [
        ("Write a file", "demo.md"),
        ("Create notes.md", "notes.md"),
        ("Save this as src/app.py.", "src/app.py"),
        ("Change `src/app.py`!", "src/app.py"),
        ("Write tests in tests/test_app.py", "tests/test_app.py"),
        ("Write `hello` to a.md", "a.md"),
    ],
)
@pytest.mark.asyncio
async def test_the_demo_model_writes_a_file_that_tells_why(said: str, path: str) -> None:
    request = demo_request({"role": "user", "content": said}, offered=ALL_TOOLS)

    _, finished = await ask(DemoModel(delay=0), request)

    [wanted] = finished.tool_calls
    arguments = json.loads(wanted.arguments)
    assert (wanted.name, arguments["path"]) == ("write_file", path)
    assert said in arguments["content"] and "demo model" in arguments["content"]
    assert path in finished.text and "in place of what it holds" in finished.text


@pytest.mark.asyncio
async def test_what_the_demo_model_writes_is_short_and_clean() -> None:
    request = demo_request({"role": "user", "content": "Write a file \0\ud83d " + "😀" * 200_000}, offered=ALL_TOOLS)

    _, finished = await ask(DemoModel(delay=0), request)

    content = json.loads(finished.tool_calls[0].arguments)["content"]
    assert "Write a file \ufffd\ufffd 😀" in content and len(content) < 300


@pytest.mark.parametrize(
    "said",
    [
        "Please explain what you can do",
        "This is a test of the prune",
        "Write a plan",
        "Change your mind",
        "Show me what you know",
        "Where are my files",
        "Read notes.md.bak",
        "Read https://example.org/readme.md, e.g. with os.path of Python 3.11 from example.com",
        "`",
        "",
    ],
)
@pytest.mark.asyncio
async def test_the_demo_model_answers_in_words_what_speaks_of_no_tool(said: str) -> None:
    message = {"role": "user", "content": said}

    _, with_tools = await ask(DemoModel(delay=0), demo_request(message, offered=ALL_TOOLS, agent="ask"))
    _, without = await ask(DemoModel(delay=0), demo_request(message, offered=[], agent="ask"))

    assert with_tools == without
    assert with_tools.tool_calls == [] and with_tools.finish_reason == "stop"
    assert "LLM_BASE_URL" in with_tools.text


@pytest.mark.parametrize(
    ("said", "tool"), [("Write a.md", "write_file"), ("Run `ls`", "execute_command"), ("Read a.md", "read_file")]
)
@pytest.mark.asyncio
async def test_the_demo_model_asks_for_no_tool_that_it_is_not_offered(said: str, tool: str) -> None:
    message = {"role": "user", "content": said}
    others = [one for one in ALL_TOOLS if one["function"]["name"] != tool]

    _, finished = await ask(DemoModel(delay=0), demo_request(message, offered=others, agent="ask"))
    _, without_any = await ask(DemoModel(delay=0), demo_request(message, offered=[], agent="ask"))

    assert finished.tool_calls == without_any.tool_calls == []
    assert tool in finished.text and "a coder would do it" in finished.text
    assert tool not in without_any.text and "LLM_BASE_URL" in without_any.text


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("It is about cats.", "The call has its result: “It is about cats.”"),
        ("one\n two\0", "The call has its result: “one two\ufffd”"),
        ("", "The call has its result, which is empty."),
        ("x" * 200, f"“{'x' * 200}”"),
        ("x" * 201, f"“{'x' * 199}…”"),
        ("Error: no such file", "The call failed: “Error: no such file”"),
        (
            '{"status": "rejected", "feedback": "Not today"}',
            "was rejected, so nothing was done. The feedback: “Not today”",
        ),
        ('{"status": "rejected", "feedback": "\\u0000\\ud83d"}', "The feedback: “\ufffd\ufffd”"),
        ('{"status": "rejected", "feedback": null}', "The call was rejected, so nothing was done."),
        (
            '{"status": "approved_with_edits", "result": "Done."}',
            "with edited arguments. The call has its result: “Done.”",
        ),
        (
            '{"status": "approved_with_edits", "result": "Error: full"}',
            "with edited arguments. The call failed: “Error: full”",
        ),
        (
            '{"status": "approved_with_edits", "result": {"a": 1}}',
            'with edited arguments. The call has its result: “{"status"',
        ),
        (
            '{"status": "timed_out", "message": "No result came."}',
            "No result came.",
        ),
        ('{"status": "in_doubt", "message": "Given up."}', "Given up."),
        ('{"status": ["rejected"]}', 'The call has its result: “{"status": ["rejected"]}”'),
        ('["rejected"]', 'The call has its result: “["rejected"]”'),
        ('{"status": "rej', 'The call has its result: “{"status": "rej”'),
        ("[" * 100_000, "The call has its result: “[[["),
        ("9" * 100_000, "The call has its result: “999"),
    ],
)
@pytest.mark.asyncio
async def test_the_demo_model_tells_what_became_of_its_call_and_asks_for_nothing_more(content: str, told: str) -> None:
    answer = {"role": "tool", "tool_call_id": "call_1", "content": content}
    request = demo_request(*asks_for("read_file", path="run.md"), answer, offered=ALL_TOOLS)

    deltas, finished = await ask(DemoModel(delay=0), request)

    assert told in finished.text and "demo model" in finished.text and len(finished.text) < 400
    assert "".join(deltas) == finished.text
    assert finished.tool_calls == [] and finished.finish_reason == "stop"


def answered(tool: str, said: str, *contents: str) -> list[dict[str, Any]]:
    """The user's message, and calls of one tool with these results."""
    user, asks = asks_for(tool, path="any.md")
    answers = [{"role": "tool", "tool_call_id": "call_1", "content": content} for content in contents]
    return [{**user, "content": said}, *(part for answer in answers for part in (asks, answer))]


READ = json.dumps({"success": True, "content": "# Cats\n\nThey purr.\n\n## Dogs\n", "lines_read": 5})


@pytest.mark.parametrize(
    ("said", "source", "target"),
    [
        ("Read README.md and write a summary to notes.md", "README.md", "notes.md"),
        ("Write a summary of README.md to notes.md", "README.md", "notes.md"),
        ("Create docs/b.md from `src/a.py`", "src/a.py", "docs/b.md"),
        ("Look at the contents of a.md, then update b.md", "a.md", "b.md"),
    ],
)
@pytest.mark.asyncio
async def test_the_demo_model_reads_one_file_and_then_writes_another(said: str, source: str, target: str) -> None:
    _, first = await ask(DemoModel(delay=0), demo_request({"role": "user", "content": said}, offered=ALL_TOOLS))
    after_reading = demo_request(*answered("read_file", said, READ), offered=ALL_TOOLS)
    deltas, second = await ask(DemoModel(delay=0), after_reading)
    after_writing = demo_request(*answered("read_file", said, READ, '{"success": true}'), offered=ALL_TOOLS)
    _, third = await ask(DemoModel(delay=0), after_writing)

    assert [(one.name, json.loads(one.arguments)) for one in first.tool_calls] == [("read_file", {"path": source})]
    [wanted] = second.tool_calls
    arguments = json.loads(wanted.arguments)
    assert (wanted.name, arguments["path"]) == ("write_file", target)
    assert all(part in arguments["content"] for part in (source, "They purr.", "- Cats", "- Dogs", "demo model"))
    assert "".join(deltas) == second.text and "“# Cats They purr." in second.text and target in second.text
    assert third.tool_calls == [] and "has its result" in third.text


@pytest.mark.parametrize(
    ("said", "contents", "offered"),
    [
        ("Read a.md and write b.md", ["Error: there is no a.md"], ALL_TOOLS),
        ("Read a.md and write b.md", ['{"status": "rejected", "feedback": "No"}'], ALL_TOOLS),
        ("Read a.md and write b.md", ['{"status": "timed_out", "message": "None came."}'], ALL_TOOLS),
        ("Read a.md and write b.md", [READ], tools("read_file")),
        ("Read a.md and b.md", [READ], ALL_TOOLS),
        ("Read a.md and write it to a.md", [READ], ALL_TOOLS),
        ("Read a.md, write b.md and run it", [READ], ALL_TOOLS),
        ("Read a.md and write b.md", [READ] * 25, ALL_TOOLS),
    ],
)
@pytest.mark.asyncio
async def test_the_demo_model_writes_nothing_where_it_was_not_asked_or_could_not_read(
    said: str, contents: list[str], offered: list[dict[str, Any]]
) -> None:
    request = demo_request(*answered("read_file", said, *contents), offered=offered)

    _, finished = await ask(DemoModel(delay=0), request)

    assert finished.tool_calls == [] and finished.finish_reason == "stop"


@pytest.mark.asyncio
async def test_what_the_demo_model_summarizes_is_short_and_clean() -> None:
    read = json.dumps({"content": "# \ud83d\0 " + "x" * 500_000 + "\n# y" * 1_000})
    messages = answered("read_file", "Read a.md and write b.md", read)

    _, finished = await ask(DemoModel(delay=0), demo_request(*messages, offered=ALL_TOOLS))

    content = json.loads(finished.tool_calls[0].arguments)["content"]
    assert "\ufffd\ufffd x" in content and len(content) < 1_000


@pytest.mark.asyncio
async def test_the_demo_model_asks_for_a_tool_in_every_turn_anew() -> None:
    answer = {"role": "tool", "tool_call_id": "call_1", "content": "It is about cats."}
    earlier = [*asks_for("read_file", path="a.md"), answer, {"role": "assistant", "content": "Cats."}]
    request = demo_request(*earlier, {"role": "user", "content": "Read b.md"}, offered=ALL_TOOLS)

    _, finished = await ask(DemoModel(delay=0), request)

    assert [one.arguments for one in finished.tool_calls] == ['{"path": "b.md"}']


@pytest.mark.asyncio
async def test_the_demo_model_counts_its_call() -> None:
    _, finished = await ask(DemoModel(delay=0), demo_request({"role": "user", "content": "Run it"}, offered=ALL_TOOLS))

    words = len(finished.text.split()) + 3  # execute_command {"command": "ls"}
    assert finished.usage == Usage(8, words, 8 + words)


@pytest.mark.asyncio
async def test_the_demo_model_routes_by_keywords() -> None:
    messages = [
        {"role": "system", "content": "Classify the message."},
        {"role": "user", "content": "Why does `ls` crash?"},
    ]

    _, finished = await ask(DemoModel(delay=0), ModelRequest("", messages, "routing", tools=ALL_TOOLS))

    assert finished.tool_calls == []
    assert json.loads(finished.text)["agent"] == "debug"
    assert json.loads(finished.text)["confidence"] == "high"


@pytest.mark.parametrize(
    ("text", "agent"),
    [
        ("Write a plan", "coder"),
        ("Why is my code slow?", "coder"),  # the first list that has a word of the message wins
        ("Planning the architecture", "architect"),
        ("It crashes with an ERROR", "debug"),
        ("debugging", "debug"),
        ("What  is a monad", "ask"),
        ("explained", "ask"),
        ("What a planet to decode!", "coder"),  # no keyword as a word
        ("How does a planet decode", "ask"),
        ("", "coder"),
    ],
)
def test_the_agent_for_a_message(text: str, agent: str) -> None:
    assert classify(text) == agent


# The scripted model itself, because other tests trust it


def _said(role: str, *, calls: list[str] | None = None, answers: str | None = None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": role, "content": "text"}
    if calls is not None:
        function = {"name": "echo", "arguments": "{}"}
        message["tool_calls"] = [{"id": one, "type": "function", "function": function} for one in calls]
    if answers is not None:
        message["tool_call_id"] = answers
    return message


USER, ASSISTANT, ASKS = _said("user"), _said("assistant"), _said("assistant", calls=["a", "b"])
A, B = _said("tool", answers="a"), _said("tool", answers="b")


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [USER, ASSISTANT, USER],
        [USER, ASKS, B, A],
        [USER, ASKS, A, B, USER],
        [USER, ASKS, A, B, ASSISTANT, USER],
    ],
)
def test_a_strict_provider_takes_a_valid_history(messages: list[dict[str, Any]]) -> None:
    assert history_problem([SYSTEM, *messages]) is None


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [USER, USER],
        [ASSISTANT, USER],
        [USER, ASSISTANT, ASSISTANT, USER],
        [USER, ASSISTANT],
        [USER, ASKS],
        [USER, ASKS, A],
        [USER, ASKS, A, USER],
        [USER, ASKS, A, A, B],
        [USER, A],
        [USER, ASKS, A, B, ASSISTANT, A],
        [USER, SYSTEM],
        [USER, _said("assistant", calls=["a", "a"]), A],
        [USER | {"content": None}],
        [USER, ASSISTANT | {"content": None}, USER],
        [USER | {"role": "narrator"}],
    ],
)
def test_a_strict_provider_refuses_an_invalid_history(messages: list[dict[str, Any]]) -> None:
    assert history_problem([SYSTEM, *messages])
