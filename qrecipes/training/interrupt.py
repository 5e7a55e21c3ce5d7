"""Ctrl-C and SIGTERM end a run after the step at hand, with everything saved."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

from qrecipes.parallel.process import Process

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While entered, the first SIGINT or SIGTERM is only remembered; a second SIGINT interrupts at once."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or number
        if self._process.is_main:
            name = signal.Signals(number).name
            print(
                f"\n{name}: finishing this step, then saving; press Ctrl-C again to stop at once",
                file=sys.stderr,
            )

    def received(self) -> int:
        """The signal that any rank has received, or 0. A collective."""
        return self._process.largest(self._received)
