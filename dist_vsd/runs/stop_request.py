"""Signals that ask a run to stop: it finishes its update, saves everything and says how to go on."""

from __future__ import annotations

import signal
import types

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that one of STOP_SIGNALS came. A second Ctrl-C stops at once, at the price of the updates since the last save."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> StopRequest:
        """Catch the signals from now on."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        return self

    def ignore(self) -> None:
        """Ignore the signals from now on, when everything is saved: a launcher that sees one rank end sends SIGTERM to the others."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, number: int, _frame: types.FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signal_name is not None
