"""Signals to launch/run, noted for its loops to act on."""
import os
import select
import signal
import time
from typing import Callable, Optional

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Signals:
    """Takes over the signals of this process."""

    def __init__(self) -> None:
        # Called from within the handlers, so that a terminal that takes no output delays no stop.
        self.listener: Optional[Callable[[], None]] = None
        self.stops = 0  # how often the run was asked to stop
        self.saves = 0  # how often a checkpoint was asked for
        self.descriptor, self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number in _STOPS:
            # nohup and its like stay in force.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._stop)
        signal.signal(signal.SIGUSR2, self._save)
        # A job's end wakes the loops.
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def _stop(self, number: int, _: object) -> None:
        # A scheduler may send one request several ways; a person's second Ctrl-C means now.
        if self.stops == 0 or number != signal.SIGUSR1:
            self.stops += 1
        self._tell()

    def _save(self, *_: object) -> None:
        self.saves += 1
        self._tell()

    def _tell(self) -> None:
        if self.listener:
            self.listener()

    def drain(self) -> None:
        """Empties the pipe that wakes loops; the counters tell what came."""
        try:
            while os.read(self.descriptor, 4096):
                pass
        except BlockingIOError:
            pass

    def pause(self, seconds: float) -> None:
        """Waits, no longer than until a stop is asked for."""
        end = time.monotonic() + seconds
        while self.stops == 0 and (left := end - time.monotonic()) > 0:
            select.select([self.descriptor], [], [], left)
            self.drain()
