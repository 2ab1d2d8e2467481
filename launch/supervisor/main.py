"""The supervisor: checks the hosts, starts mpirun, and decides by how it ended whether to start again."""
import dataclasses
import os
import pathlib
import shutil
from typing import Mapping, Sequence

from . import codes
from .codes import Refusal
from .hosts import Host, place
from .job import Job, JobEnd, mpirun_command
from .options import Options, parse_options
from .output import RankOutput, say
from .policy import Decision, History, Shape, after_job, after_silence, cores_per_rank, shrink
from .probe import Report, differences, probe, probe_here
from .record import RunRecord, now
from .settings import Settings, overlays_of, read_settings
from .signals import Signals

FORWARDED_PREFIXES = ("NORMFORMER_", "NCCL_", "CUDA_", "CUDNN_", "CUBLAS_", "UCX_", "DNNL_", "ONEDNN_")
FORWARDED = ("LD_LIBRARY_PATH", "XDG_CACHE_HOME")
OWN = ("NORMFORMER_ATTEMPT", "NORMFORMER_LAUNCHER", "NORMFORMER_TERMINAL")
ROOT = pathlib.Path(__file__).resolve().parents[2]


def find_program(device: str) -> str:
    """The program that ranks of a run on this device ("cpu", "cuda") run: what NORMFORMER names, else the build for the
    device, else the other build, which says itself what it lacks, else PATH's."""
    presets = ("cuda", "cpu") if device == "cuda" else ("cpu", "cuda")
    named = os.environ.get("NORMFORMER")
    if named:
        found = shutil.which(named)
        if not found:
            raise Refusal(f"NORMFORMER={named} is no program")
        return os.path.abspath(found)
    for built in (ROOT / f"build/{preset}/src/app/normformer" for preset in presets):
        if os.access(built, os.X_OK):
            return str(built)
    found = shutil.which("normformer")
    if not found:
        raise Refusal(f"no normformer program: build it with 'cmake --preset {presets[0]} && cmake --build --preset "
                      f"{presets[0]}', or name it in NORMFORMER")
    return os.path.abspath(found)


def require_mpirun() -> None:
    """Refuses to go on without mpirun."""
    if not shutil.which("mpirun"):
        raise Refusal("no mpirun: run launch/install-dependencies, or put Open MPI on PATH")


@dataclasses.dataclass(frozen=True)
class Start:
    """Where and in what shape the next attempt runs."""
    hosts: tuple[Host, ...]  # empty: this machine
    shape: Shape
    cores: dict[str, int]  # of each host, that ranks can be bound to

    def placed(self) -> list[tuple[Host, int]]:
        """Ranks of each host."""
        return place(self.hosts, self.shape.ranks) if self.hosts else [(Host("", self.shape.ranks), self.shape.ranks)]


def placement_options(start: Start, settings: Settings) -> list[str]:
    """mpirun's options that say where ranks go. Each gets as many cores of its own as there are for all alike, and
    none is bound where they are too few; ranks with GPUs bind themselves, beside theirs."""
    placed = start.placed()
    options = ["--host", ",".join(f"{host.name}:{ranks}" for host, ranks in placed)] if start.hosts else []
    each = cores_per_rank(placed, start.cores)
    if each > 0 and settings.device == "cpu":
        return [*options, "--map-by", f"slot:PE={each}", "--bind-to", "core"]
    options += ["--bind-to", "none"]
    # Ranks that share cores must not spin.
    return options if each > 0 else [*options, "--oversubscribe", "--mca", "mpi_yield_when_idle", "1"]


def forwarded(environment: Mapping[str, str]) -> list[str]:
    """The variables that ranks on other hosts need too: what the supervisor tells them, the program's own, those of the
    libraries that it uses, and where these are found."""
    return sorted({*OWN, *(name for name in environment if name.startswith(FORWARDED_PREFIXES) or name in FORWARDED)})


class Supervisor:
    """Everything from the first check of the hosts to the exit code."""

    def __init__(self, options: Options, settings: Settings, record: RunRecord, signals: Signals, program: str):
        self._options = options
        self._settings = settings
        self._record = record
        self._signals = signals
        self._program = program
        self._history = History(options.max_restarts, options.restart_pause)
        self._is_restart = False

    def run(self) -> int:
        """Runs the job to its end; returns the exit code."""
        while True:
            decision = self._attempt()
            say(decision.reason)
            if not decision.restart:
                return decision.code
            self._signals.pause(decision.pause)

    def _attempt(self) -> Decision:
        start = self._look_at_hosts()
        if self._signals.stops:
            return Decision(False, codes.STOPPED, 0, "stopped while no job was running; `-- --resume` goes on")
        if isinstance(start, str):
            return after_silence(self._history, start)
        before = self._record.newest()
        attempt = self._record.begin_attempt()
        end = self._run_job(start, attempt)
        newest = self._record.last_attempt()
        if newest != attempt:
            return Decision(False, end.code, 0, f"the job ended with {end.code}; attempt {newest} of this run has begun "
                            f"elsewhere, and this was attempt {attempt}: leaving the run to it")
        after = self._record.newest()
        progress = after is not None and after != before
        decision = after_job(self._history, end.code, self._signals.stops > 0, progress)
        if end.lost_hosts:
            self._history.note_losses(end.lost_hosts)
            named = f"lost {' and '.join(end.lost_hosts)}: {decision.reason}"
            decision = dataclasses.replace(decision, reason=named)
        return decision

    def _look_at_hosts(self) -> Start | str:
        """Where the next attempt can run; a sentence where it cannot now. Raises Refusal where it never can."""
        if not self._options.hosts:
            return Start((), Shape(self._options.ranks), {"": probe_here().bindable_cores})
        configs = [str(self._options.config), *overlays_of(self._options.train)]
        reports = probe(self._options.hosts, self._program, configs, self._settings.datasets, self._options.host_timeout,
                        lambda: self._signals.stops > 0)
        if different := differences(reports):
            raise Refusal("; ".join(different))
        return self._start_on(reports)

    def _start_on(self, reports: Sequence[Report]) -> Start | str:
        silent = [f"{report.host} {report.problem}" for report in reports if not report.is_reached]
        bad = [f"{report.host} was lost again and again" for report in reports
               if self._options.elastic and report.is_reached and self._history.is_bad(report.host)]
        if silent and not self._options.elastic:
            return "; ".join(silent)
        hosts = tuple(Host(host.name, host.slots or report.cores)
                      for host, report in zip(self._options.hosts, reports)
                      if report.is_reached and not (self._options.elastic and self._history.is_bad(host.name)))
        slots = sum(host.slots for host in hosts)
        missing = "; ".join(silent + bad)
        if not missing and slots < self._options.ranks:
            raise Refusal(f"the hosts take {slots} ranks, not {self._options.ranks}: name more, or give them more slots "
                          "(--hosts NAME:SLOTS)")
        shape = shrink(self._settings, self._options.ranks, slots)
        if shape is None:
            return f"{missing}; a replica takes {self._settings.ranks_of_replica} ranks, and the others have {slots}"
        if missing:
            say(f"{missing}: going on without, with {shape.ranks} of {self._options.ranks} ranks")
        return Start(hosts, shape, {report.host: report.bindable_cores for report in reports})

    def _train_options(self, shape: Shape) -> list[str]:
        options = [*self._options.train, *shape.options]
        return options if not self._is_restart or "--resume" in options else [*options, "--resume"]

    def _command(self, start: Start) -> list[str]:
        passed_on = forwarded(os.environ)
        return [*mpirun_command(), "--tag-output", *placement_options(start, self._settings),
                *(word for name in passed_on for word in ("-x", name)), "-n", str(start.shape.ranks), self._program,
                "train", str(self._options.config), *self._train_options(start.shape)]

    def _environment(self, attempt: int) -> Mapping[str, str]:
        return dict(os.environ, NORMFORMER_LAUNCHER="run", NORMFORMER_ATTEMPT=str(attempt),
                    NORMFORMER_TERMINAL="1" if os.isatty(1) else "0")

    def _run_job(self, start: Start, attempt: int) -> JobEnd:
        placed = [f"{host.name or 'this machine'}:{ranks}" for host, ranks in start.placed()]
        facts = {"attempt": attempt, "ranks": start.shape.ranks, "hosts": placed}
        self._record.write_line(event="start", time=now(), checkpoint=self._record.newest(), **facts)
        output = RankOutput(self._record.log_folder(attempt), os.isatty(1))
        job = Job(self._command(start), self._environment(attempt), output, self._signals,
                  [self._record.lock_descriptor])
        self._is_restart = True
        end = job.wait()
        self._record.write_line(event="end", time=now(), checkpoint=self._record.newest(), code=end.code,
                                lost_hosts=list(end.lost_hosts), **facts)
        return end


def supervise(options: Options) -> int:
    """Trains as the options say; returns the exit code."""
    settings = read_settings(options.config, options.train)
    program = find_program(settings.device)
    require_mpirun()
    signals = Signals()
    record = RunRecord(settings.folder)
    if os.getuid() == 0:
        say("running as root, so mpirun is told --allow-run-as-root")
    return Supervisor(options, settings, record, signals, program).run()


def main(arguments: Sequence[str]) -> int:
    """launch/run."""
    try:
        return supervise(parse_options(arguments))
    except Refusal as refusal:
        say(str(refusal))
        return refusal.code
