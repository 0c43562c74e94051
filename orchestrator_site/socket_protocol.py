"""uvicorn's WebSocket protocol, where it would wait for ever, keep what nobody reads or log what any client sends."""

from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

# A message of MAX_BODY_BYTES in pieces of 2 KiB; each piece costs memory, even an empty one.
MAX_FRAGMENTS = 1024
LAST_SECONDS = 2.0
INVALID_DATA, TOO_BIG = 1007, 1009
BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class BoundedSocketProtocol(WebSocketsSansIOProtocol):
    """Answers every handshake, bounds what a client can make it keep, and lets go of those that do not read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Two origins are refused by the handshake, like a foreign one.
        self.conn.process_origin = lambda headers: None  # type: ignore[method-assign]

    # --- the handshake ---

    def shutdown(self) -> None:
        """Asked for twice when the process stops: by `web.Server`, and by uvicorn for those that are still there."""
        if not self.transport.is_closing():
            super().shutdown()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated and not self.transport.is_closing():
            # A head that HTTP allows and a handshake does not, because of its body or a line of 9 KiB.
            self.transport.write(b"".join(self.conn.data_to_send()) or BAD_REQUEST)
            self.transport.close()

    async def send(self, message: Any) -> None:
        await super().send(message)
        # uvicorn would log an error for each handshake that was answered by a refusal.
        if message["type"] == "websocket.http.response.body":
            self.handshake_complete = True

    # --- what comes in ---

    def handle_cont(self, event: Any) -> None:
        if self.close_sent:
            return
        if len(self.frames) >= MAX_FRAGMENTS:
            self._fail(TOO_BIG)
        else:
            super().handle_cont(event)

    def send_receive_event_to_app(self) -> None:
        # uvicorn would log a traceback.
        if not self.close_sent and self.curr_msg_data_type == "text" and not _is_utf_8(b"".join(self.frames)):
            self._fail(INVALID_DATA)
        else:
            super().send_receive_event_to_app()

    def _fail(self, code: int) -> None:
        self.frames = []
        self.conn.send_close(code)
        self.handle_parser_exception()

    # --- a client that does not read ---

    def handle_ping(self) -> None:
        """Whoever takes nothing gets no pong: each would be kept for it."""
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self._abort_soon()

    async def run_asgi(self) -> None:
        await super().run_asgi()
        self._abort_soon()

    def _abort_soon(self) -> None:
        """A closed connection waits for ever for its reader to take the rest."""
        self.loop.call_later(LAST_SECONDS, self.transport.abort)


def _is_utf_8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
