"""Several runs beside each other, each under a launch/run of its own."""
import os
import pathlib
import signal
import subprocess
import time
from typing import Callable, Mapping, Optional, Sequence

from supervisor import codes
from supervisor.job import end_with_parent
from supervisor.signals import Signals

from .plan import Run, Sweep

RUN = pathlib.Path(__file__).resolve().parents[1] / "run"


def train_options(run: Run) -> list[str]:
    """What launch/run passes on to the program."""
    return ["--resume", *run.overrides()]


def threads_of_rank(sweep: Sweep, run: Run, at_once: int, cores: int) -> list[str]:
    """Runs beside each other share the machine's cores, where their configuration does not say otherwise."""
    if at_once == 1 or run.setting("device.threads"):
        return []
    return ["--set", f"device.threads={max(1, cores // (at_once * sweep.ranks))}"]


def gpus_of_slot(sweep: Sweep, run: Run, at_once: int, slot: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Runs beside each other on GPUs take those of their slot: as many as they have ranks."""
    if at_once == 1 or run.setting("device.kind") != "cuda":
        return {}
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    all_gpus = visible.split(",") if visible else [str(gpu) for gpu in range(at_once * sweep.ranks)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(all_gpus[slot * sweep.ranks:(slot + 1) * sweep.ranks])}


class Jobs:
    """Trains runs, at most `at_once` at a time."""

    def __init__(self, sweep: Sweep, at_once: int, signals: Signals, told: Callable[[Run, Optional[int]], None]):
        self._sweep = sweep
        self._at_once = at_once
        self._signals = signals
        self._told = told  # of each run that begins (None) and ends (exit code)
        self._running: dict[int, tuple[Run, subprocess.Popen[bytes]]] = {}  # by slot
        self._stops_passed_on = 0

    def train(self, runs: Sequence[Run]) -> bool:
        """Trains them all to their ends, or until a stop is asked for; whether all have ended with success."""
        waiting = list(runs)
        good = True
        while self._running or (waiting and not self._signals.stops):
            while waiting and len(self._running) < self._at_once and not self._signals.stops:
                self._start(waiting.pop(0))
            self._pass_stops_on()
            good = self._collect() and good
            time.sleep(0.05)
        return good and not waiting

    def _start(self, run: Run) -> None:
        slot = min(set(range(self._at_once)) - set(self._running))
        options = [*train_options(run), *threads_of_rank(self._sweep, run, self._at_once, len(os.sched_getaffinity(0)))]
        command = [str(RUN), str(run.config), "-n", str(self._sweep.ranks), "--", *options]
        environment = dict(os.environ, **gpus_of_slot(self._sweep, run, self._at_once, slot, os.environ))
        with open(run.folder / "sweep.log", "ab") as log:
            # In a session of its own: a terminal's Ctrl-C reaches launch/sweep alone, which passes it on once.
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                       start_new_session=True, preexec_fn=end_with_parent)
        self._running[slot] = (run, process)
        self._told(run, None)

    def _pass_stops_on(self) -> None:
        while self._stops_passed_on < self._signals.stops:
            self._stops_passed_on += 1
            for _, process in self._running.values():
                process.send_signal(signal.SIGTERM)

    def _collect(self) -> bool:
        good = True
        for slot, (run, process) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[slot]
            good = good and code == codes.SUCCESS
            self._told(run, code if code >= 0 else codes.of_signal(-code))
        return good
