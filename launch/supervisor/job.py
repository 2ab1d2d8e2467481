"""One start of mpirun, from its first line to its last process."""
import ctypes
import dataclasses
import os
import pathlib
import re
import selectors
import signal
import subprocess
import time
from typing import Callable, Mapping, Optional, Sequence

from . import codes
from .output import STDERR, STDOUT, RankOutput
from .signals import Signals

# mpirun must be gone so long after it has said that its job is over.
PATIENCE = 15.0  # seconds

# Kill at once what survives a failure, and notice a lost host in seconds: 480 unless told otherwise.
MPIRUN = ["mpirun", "--mca", "odls_base_sigkill_timeout", "0", "--mca", "oob_tcp_keepalive_time", "5", "--mca",
          "oob_tcp_keepalive_intvl", "1", "--mca", "oob_tcp_keepalive_probes", "3", "--mca",
          "orte_abort_on_non_zero_status", "1"]

_IS_OVER = re.compile(r"noticed that process rank|lost communication with a remote daemon|MPI_ABORT was invoked|"
                      r"non-zero exit code|exited improperly|non-zero status")
_LOST_HOST = re.compile(r"Remote daemon: .* on node (\S+)")

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def mpirun_command() -> list[str]:
    """mpirun with what every start of it needs."""
    return MPIRUN + (["--allow-run-as-root"] if os.getuid() == 0 else [])


def end_with_parent() -> None:
    """For a new process: SIGTERM, where the one that started it is gone."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def processes_of_session(session: int) -> list[int]:
    """The processes whose session has this number. Ranks have process groups of their own, but mpirun's session."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = pathlib.Path(f"/proc/{entry}/stat").read_text()
        except OSError:
            continue
        # pid (name, which may hold anything) state parent group session
        state, _, _, its_session = stat.rpartition(")")[2].split()[:4]
        if int(its_session) == session and state != "Z":
            found.append(int(entry))
    return found


def kill_session(session: int) -> bool:
    """SIGKILLs all of a session; whether there was something."""
    found = processes_of_session(session)
    for process in found:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return bool(found)


@dataclasses.dataclass(frozen=True)
class JobEnd:
    code: int
    lost_hosts: tuple[str, ...]  # that mpirun has named


def lost_hosts(said: Sequence[str]) -> tuple[str, ...]:
    """The hosts that mpirun says it has lost."""
    names = [match[1] for line in said if (match := _LOST_HOST.search(line))]
    return tuple(dict.fromkeys(names))


class Job:
    """mpirun, in a session of its own, so that a terminal's Ctrl-C reaches only launch/run."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], output: RankOutput, signals: Signals,
                 inherited: Sequence[int]):
        self._output = output
        self._signals = signals
        self._stops_passed_on = 0
        self._stops_told = 0
        self._saves_passed_on = signals.saves
        self._deadline: Optional[float] = None
        self._lines_read = 0
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE, start_new_session=True, pass_fds=inherited,
                                         preexec_fn=end_with_parent)
        signals.listener = self._pass_signals_on
        self._pass_signals_on()

    def wait(self) -> JobEnd:
        """Passes output and signals on until the job has ended; nothing of it is left then on this machine."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._signals.descriptor, selectors.EVENT_READ)
            for stream, pipe in ((STDOUT, self._process.stdout), (STDERR, self._process.stderr)):
                selector.register(pipe, selectors.EVENT_READ, stream)
            while self._process.poll() is None:
                self._turn(selector)
            self._signals.listener = None
            kill_session(self._process.pid)
            self._drain(selector)
        self._output.close()
        return JobEnd(self._exit_code(), lost_hosts(self._output.said_by_mpirun))

    def _exit_code(self) -> int:
        if self._signals.stops > 1:
            return codes.ENDED_AT_ONCE
        status = self._process.returncode
        return status if status >= 0 else codes.of_signal(-status)

    def _turn(self, selector: selectors.BaseSelector) -> None:
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        self._read(selector, left)
        self._signals.drain()
        self._tell_of_stops()
        self._look_for_the_end()

    def _read(self, selector: selectors.BaseSelector, timeout: Optional[float]) -> bool:
        """Reads what there is; whether a pipe was still open."""
        is_open = False
        for key, _ in selector.select(timeout):
            if key.data is None:
                continue
            data = os.read(key.fd, 65536)
            self._output.feed(key.data, data, at_end=not data)
            if data:
                is_open = True
            else:
                selector.unregister(key.fileobj)
        return is_open

    def _drain(self, selector: selectors.BaseSelector) -> None:
        # Something that left the session could hold the pipes open for ever.
        end = time.monotonic() + 1.0
        while len(selector.get_map()) > 1 and time.monotonic() < end:
            self._read(selector, 0.1)
            self._signals.drain()
        for stream in (STDOUT, STDERR):
            self._output.feed(stream, b"", at_end=True)
        self._process.stdout.close()
        self._process.stderr.close()

    def _pass_signals_on(self) -> None:
        if self._signals.stops > self._stops_passed_on:
            self._stops_passed_on = self._signals.stops
            if self._signals.stops == 1:
                self._process.send_signal(signal.SIGUSR1)
            else:
                kill_session(self._process.pid)
        if self._signals.saves > self._saves_passed_on:
            self._saves_passed_on = self._signals.saves
            self._process.send_signal(signal.SIGUSR2)

    def _tell_of_stops(self) -> None:
        if self._signals.stops > self._stops_told:
            self._stops_told = self._signals.stops
            self._output.say("stopping after the current step; once more to end at once" if self._stops_told == 1 else
                             "ending at once")

    def _look_for_the_end(self) -> None:
        said = self._output.said_by_mpirun
        if self._deadline is None and any(_IS_OVER.search(line) for line in said[self._lines_read:]):
            self._deadline = time.monotonic() + PATIENCE
        self._lines_read = len(said)
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._output.say(f"mpirun is still there {PATIENCE:g} s after its job was over: killing it")
            kill_session(self._process.pid)
            self._deadline = time.monotonic() + PATIENCE


def run_all(commands: Sequence[Sequence[str]], seconds: float, at_once: int,
            is_stopped: Callable[[], bool]) -> list[Optional[subprocess.CompletedProcess[str]]]:
    """Runs commands beside each other, `at_once` at a time, each in a session of its own. None for those that took
    longer than `seconds` and were killed, and for all that had not ended when `is_stopped`."""
    results: list[Optional[subprocess.CompletedProcess[str]]] = [None] * len(commands)
    running: dict[int, tuple[subprocess.Popen[str], float]] = {}
    waiting = list(range(len(commands)))
    while (waiting or running) and not is_stopped():
        while waiting and len(running) < at_once:
            at = waiting.pop(0)
            process = subprocess.Popen(commands[at], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True)
            running[at] = (process, time.monotonic() + seconds)
        for at, (process, deadline) in list(running.items()):
            if process.poll() is not None:
                out, err = process.communicate()
                results[at] = subprocess.CompletedProcess(commands[at], process.returncode, out, err)
                del running[at]
            elif time.monotonic() >= deadline:
                _end(process)
                del running[at]
        time.sleep(0.02)
    for process, _ in running.values():
        _end(process)
    return results


def _end(process: subprocess.Popen[str]) -> None:
    kill_session(process.pid)
    process.wait()
    process.stdout.close()
    process.stderr.close()
