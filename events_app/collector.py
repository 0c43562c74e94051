"""When Python looks for garbage that only its collector finds."""

import gc

# New objects, more than have gone since, before they are looked through; how often that is done before what it left is
# looked through as well; and how often that, before everything. By Python's own measure (700, 10, 10) a thousand open
# streams had everything looked through every few seconds, in vain, and each time no token came for 100 to 290 ms.
THRESHOLDS = (2_000, 5, 50)


def settle() -> None:
    """Once the process has started: what there is by now stays, and is never looked through again.

    Left to the collector, each full collection walked all of it and stopped every stream for 57 to 76 ms. The few
    thousand objects of it that are garbage may stay too.
    """
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    gc.enable()  # `serve` starts without it
