"""What an approval is bound to: canonical arguments and their hash (guarantees 3.3)."""

import hashlib
import json
from typing import Any


def canonical(arguments: dict[str, Any]) -> str:
    """The one text of these arguments: sorted keys, no blanks, numbers as Python writes what JSON said."""
    return json.dumps(arguments, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def args_hash(session_id: str, call_id: str, tool_name: str, tool_version: int, text: str) -> str:
    """SHA-256, as 64 hex digits, over what exactly may run; `text` is canonical."""
    # A JSON list of texts, so that no part can borrow characters of its neighbour.
    bound = json.dumps([session_id, call_id, tool_name, tool_version, text], separators=(",", ":"))
    return hashlib.sha256(bound.encode("ascii")).hexdigest()
