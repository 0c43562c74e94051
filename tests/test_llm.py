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
from agents_app.llm.base import FinishedStep, ModelError, ModelRequest, TextDelta, Usage
from agents_app.llm.breaker import Breaker
from agents_app.llm.demo import DemoModel
from agents_app.llm.openai import Answer, ClientSettings, OpenAIModel
from tests.scripted_llm import (
    PATIENCE,
    Gate,
    ScriptedLLM,
    bad_json,
    call,
    calls,
    drop,
    empty,
    endless,
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
        {"id": "c-1", "type": "function", "function": {"name": "write_file", "arguments": arguments}},
        {"id": "c-2", "type": "function", "function": {"name": "read_file", "arguments": "{not json"}},
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
    ],
)
@pytest.mark.asyncio
async def test_tool_calls_come_out_whole_whatever_a_provider_makes_of_index_and_id(
    llm: ScriptedLLM, deltas: list[list[dict[str, Any]]], expected: list[tuple[str, str, str]]
) -> None:
    llm.script(raw(*[event({"tool_calls": delta}) for delta in deltas], event({}, "tool_calls")))

    async with client(llm.url) as model:
        _, finished = await ask(model)

    got = [(one["id"], one["function"]["name"], one["function"]["arguments"]) for one in finished.tool_calls]
    assert got == expected


@pytest.mark.asyncio
async def test_a_call_without_an_id_gets_one(llm: ScriptedLLM) -> None:
    llm.script(call("echo", id=""))

    async with client(llm.url) as model:
        _, finished = await ask(model)

    assert finished.tool_calls[0]["id"].startswith("call_")


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
    assert finished.tool_calls == [
        {"id": "i\ufffd", "type": "function", "function": {"name": "n", "arguments": "\ufffd"}}
    ]


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
        pytest.param(raw(*[b"data: " + b"x" * 50_000] * 30), "", id="endless line"),
        pytest.param(raw(*[b"data: xxxxxxxxxxx\n" * 5_000] * 30), "", id="endless event"),
        pytest.param(
            raw(
                *[b" " * 50_000] * 30, b'{"choices": [{"message": {"content": "x"}}]}', content_type="application/json"
            ),
            "",
            id="endless body",
        ),
    ],
)
@pytest.mark.asyncio
async def test_an_answer_that_makes_no_sense(llm: ScriptedLLM, reply: Any, arrived: str) -> None:
    llm.script(reply)

    async with client(llm.url, max_event_bytes=1_000_000) as model:
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


@pytest.mark.asyncio
async def test_arguments_count_towards_the_limit(llm: ScriptedLLM) -> None:
    llm.script(call("write_file", "x" * 1024 * 1024))

    async with client(llm.url) as model:
        assert await fail(model) == ("", "output_limit")


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


@pytest.mark.asyncio
async def test_the_demo_model_routes_by_keywords() -> None:
    messages = [
        {"role": "system", "content": "Classify the message."},
        {"role": "user", "content": "Why does it crash?"},
    ]

    _, finished = await ask(DemoModel(delay=0), ModelRequest(model="", messages=messages, purpose="routing"))

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
