"""Trying again what may work the next time, without making a busy server busier.

Waits grow exponentially, with jitter so that many clients do not come back at once (https://aws.amazon.com/builders-library/
timeouts-retries-and-backoff-with-jitter), unless the server says how long to wait. Progress starts the count anew.
"""

import logging
import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from streamquant.errors import NetworkError

MAX_FAILURES = 10  # in a row, about two minutes
FIRST_WAIT_SECONDS = 0.25
MAX_WAIT_SECONDS = 30.0
MAX_ASKED_SECONDS = 600.0  # the Hub counts requests over five minutes
TOLD_SECONDS = 4.0  # waits from this on are worth a line

logger = logging.getLogger("streamquant")
T = TypeVar("T")


class Transient(Exception):
    """A failure that may not happen again. `after` is how long the server asks to wait, in seconds."""

    def __init__(self, said: str, *, after: float | None = None):
        super().__init__(said)
        self.after = after


class Attempts:
    """The attempts at one thing. `stop` ends any wait."""

    def __init__(self, what: str, stop: threading.Event):
        self._what, self._stop, self._num_failures = what, stop, 0

    def progress(self) -> None:
        """Something came of it."""
        self._num_failures = 0

    def wait(self, failure: Transient) -> None:
        """Wait until another attempt makes sense. Raises NetworkError if none does."""
        self._num_failures += 1
        if self._num_failures > MAX_FAILURES:
            raise NetworkError(f"{self._what}: {failure}, {self._num_failures} times in a row; the same command goes on where it was")
        if failure.after is not None and failure.after > MAX_ASKED_SECONDS:
            raise NetworkError(f"{self._what}: {failure} and asks to wait {failure.after:.0f} s; run the same command again then")
        longest = min(FIRST_WAIT_SECONDS * 2 ** (self._num_failures - 1), MAX_WAIT_SECONDS)
        seconds = random.uniform(longest / 2, longest) if failure.after is None else failure.after + random.uniform(0, FIRST_WAIT_SECONDS)
        if seconds >= TOLD_SECONDS:
            logger.warning("%s: %s; waiting %.0f s", self._what, failure, seconds)
        if self._stop.wait(seconds):
            raise NetworkError(f"{self._what}: stopped")


def persist(attempt: Callable[[], T], what: str, stop: threading.Event) -> T:
    """What `attempt` returns, once it does not raise Transient."""
    attempts = Attempts(what, stop)
    while True:
        try:
            return attempt()
        except Transient as failure:
            attempts.wait(failure)


def seconds_to_wait(retry_after: str | None) -> float | None:
    """What a Retry-After header says, in seconds or as a date (RFC 9110, section 10.2.3); None for nothing that makes sense."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        until = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max((until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)
