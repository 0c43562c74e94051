"""Ids of rows that come in great numbers."""

import secrets
import time
import uuid


def in_order() -> uuid.UUID:
    """A UUID of version 7, which begins with the time. New rows stand beside each other in an index of such ids; among
    millions of random ones each would be a page of its own, to be read and written back.
    """
    milliseconds = time.time_ns() // 1_000_000
    return uuid.UUID(int=milliseconds << 80 | 7 << 76 | secrets.randbits(12) << 64 | 2 << 62 | secrets.randbits(62))
