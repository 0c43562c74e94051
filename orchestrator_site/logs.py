"""What every log line carries (imports nothing of ours)."""

import logging
from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id", default="")


class WithRequest(logging.Filter):
    """Adds the id of the request that is being answered, so that a client's report finds its lines."""

    def filter(self, record: logging.LogRecord) -> bool:
        if shown := request_id.get():
            record.request_id = shown
        return True
