"""SIGINT and SIGTERM: the first one may wait for the state to be saved, the second one ends."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Answers SIGINT and SIGTERM while entered; a context manager, for the main thread.

    Ends the process with 128 + the signal's number and one line. Inside `deferred`, the first
    signal only sets `number`, so that the step can be finished and saved; the second one ends it.

    A thread answers: Python's own handlers run in the main thread, and it may be inside a
    compilation for minutes. Ending needs no clean-up. Whatever the run writes is whole after a
    SIGKILL too.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal that asks to stop; 0 for none."""
        self.is_silent = False
        """Say nothing; for all processes of a run but the first."""
        self._is_deferred = False

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._earlier_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # With a handler in Python, even one that does nothing, the signal's number goes to the pipe
        # at once, whatever the main thread is doing.
        self._earlier = {number: signal.signal(number, _do_nothing) for number in SIGNALS}
        self._thread = threading.Thread(target=self._answer, name="interrupt", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._earlier_writer)
        os.close(self._writer)  # The thread reads the end of the pipe.
        self._thread.join()
        os.close(self._reader)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Leaves it to the body to look at `number` and to stop when it can."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def _answer(self) -> None:
        while received := os.read(self._reader, 1):
            number = received[0]
            if number not in SIGNALS:
                continue
            name = signal.Signals(number).name
            if self._is_deferred and not self.number:
                self.number = number
                self._say(f"{name}: finishing this step and saving; once more to stop at once")
            else:
                self._say(f"{name}: stopped; run the same command to go on")
                os._exit(128 + number)

    def _say(self, line: str) -> None:
        if not self.is_silent:
            with contextlib.suppress(OSError):  # The terminal may be gone.
                print(f"\n{line}", flush=True)


def _do_nothing(number: int, frame: object) -> None:
    del number, frame
