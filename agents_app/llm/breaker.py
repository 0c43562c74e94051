"""Stops asking a model that keeps failing, so that sessions fail fast instead of queueing up behind it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .base import ModelError

# These steps failed, but they tell nothing about whether the model is up.
NOT_COUNTED = frozenset({"model_rejected", "model_empty_answer", "output_limit"})


class Breaker:
    """After `failures` failed steps in a row, refuses every step for `rest` seconds; then one probe decides.

    Steps are counted, not attempts: a step that succeeds on its third attempt is a success.
    """

    def __init__(self, *, failures: int = 5, rest: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._threshold = failures
        self._rest = rest
        self._clock = clock
        self._failures_in_a_row = 0
        self._open_until = 0.0
        self._probing = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Hold one model step, and learn from how it ends. Raises `ModelError` while the circuit is open."""
        probe = self._admit()
        try:
            yield
        except ModelError as error:
            if error.code not in NOT_COUNTED:
                self._failures_in_a_row += 1
                self._open_until = self._clock() + self._rest
            raise
        else:
            self._failures_in_a_row = 0
        finally:
            # A cancelled probe decided nothing: the next step is the probe then.
            if probe:
                self._probing = False

    def _admit(self) -> bool:
        """Whether the step that may start now is the probe."""
        if self._failures_in_a_row < self._threshold:
            return False
        if self._probing or self._clock() < self._open_until:
            raise ModelError("model_circuit_open", "The model failed several times in a row. Try again in a moment.")
        self._probing = True
        return True
