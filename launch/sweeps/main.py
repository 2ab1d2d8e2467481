"""A sweep from its file to its table: reads it, checks every run without training, trains what is not complete."""
import argparse
import pathlib
import shlex
import shutil
import subprocess
import sys
from typing import NoReturn, Optional, Sequence

from supervisor import codes
from supervisor.codes import Refusal
from supervisor.main import ROOT, find_program, require_mpirun
from supervisor.options import PROGRAM_ORDER
from supervisor.signals import Signals

from . import outcome
from .jobs import Jobs, train_options
from .plan import Run, Sweep, read_sweep
from .table import as_text, shown, write_tables

SLURM_SCRIPT = ROOT / "launch/slurm/sweep.sbatch"


def say(sentence: str) -> None:
    """Prints a line of launch/sweep itself."""
    print(f"launch/sweep: {sentence}", file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        say(message)
        sys.exit(codes.BAD_USAGE)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def parse_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and what follows `--`; ends the process with 64 where they are wrong."""
    arguments = list(arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = _Parser(prog="launch/sweep", allow_abbrev=False,
                     description="Trains many runs that differ in some settings, and tells how they compare.",
                     epilog=PROGRAM_ORDER)
    parser.add_argument("sweep", metavar="SWEEP.toml", type=pathlib.Path, help="what to train (docs/sweeps.md)")
    parser.add_argument("-n", dest="ranks", metavar="RANKS", type=_positive, help="ranks of a run, instead of the file's")
    parser.add_argument("--set", dest="keys", metavar="KEY=VALUE", action="append", default=[],
                        help="a key for all runs, instead of the file's; @FILE: all that a TOML file sets, such as a layout")
    parser.add_argument("--jobs", metavar="N", type=_positive, default=1, help="runs at a time (1)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="check every run and print its command; train nothing")
    what.add_argument("--list", action="store_true", help="print and write the table of what there is; train nothing")
    what.add_argument("--slurm", action="store_true",
                      help="submit the runs as an array of jobs; what follows -- goes to sbatch")
    what.add_argument("--of-array", metavar="N", type=_positive,
                      help="for launch/slurm/sweep.sbatch: print the words of run N for launch/run, one a line")
    given = parser.parse_args(arguments[:split])
    rest = arguments[split + 1:]
    if rest and not given.slurm:
        parser.error("options for sbatch need --slurm")
    return given, rest


def check(sweep: Sweep, runs: Sequence[Run]) -> None:
    """Has the program judge each run's configuration on its ranks. Raises Refusal with the program's own sentence."""
    for run in runs:
        program = find_program(run.setting("device.kind") or "cpu")
        planned = subprocess.run([program, "plan", str(run.config), "-n", str(sweep.ranks), *run.overrides()],
                                 capture_output=True, text=True, errors="replace")
        if planned.returncode != 0:
            said = planned.stderr.strip().removeprefix("normformer: ")
            raise Refusal(f"run {run.name}: {said or f'the program ended with {planned.returncode}'}", planned.returncode)


def unfinished(sweep: Sweep) -> list[Run]:
    """Runs with something left to train. Raises Refusal where a run's folder is for something else."""
    for run in sweep.runs:
        if run.folder.exists():
            outcome.claim(run)
    return [run for run in sweep.runs if not outcome.look(run.folder).is_over]


def show_tables(sweep: Sweep) -> None:
    """Prints the tables, and writes them into the sweep's folder."""
    tables = write_tables(sweep, [outcome.look(run.folder) for run in sweep.runs])
    print("\n".join(map(as_text, tables)), flush=True)
    say(f"the same in {sweep.folder}/runs.csv, summary.csv and table.md")


def _tell(sweep: Sweep, run: Run, code: Optional[int]) -> None:
    at = f"{sweep.runs.index(run) + 1}/{len(sweep.runs)} {run.name}"
    if code is None:
        say(f"{at}: begins; its output is in {run.folder}/sweep.log")
        return
    now = outcome.look(run.folder)
    if code == codes.SUCCESS:
        result = (f"exploded after update {now.exploded_at} at lr {now.exploded_lr:g}" if now.exploded_at is not None
                  else f"loss {shown(now.loss)}" if now.loss is not None else "not validated")
        say(f"{at}: {result}; {now.seconds / 60.0:.1f} minutes")
        return
    say(f"{at}: ended with {code} ({codes.meaning(code)}); see {run.folder}/sweep.log")


def train(sweep: Sweep, at_once: int) -> int:
    """Trains what is not complete and shows the tables; returns the exit code."""
    require_mpirun()
    runs = unfinished(sweep)
    check(sweep, runs)
    for run in runs:
        outcome.claim(run)
    say(f"{len(runs)} of {len(sweep.runs)} runs to train, {min(at_once, max(1, len(runs)))} at a time")
    signals = Signals()
    good = Jobs(sweep, at_once, signals, lambda run, code: _tell(sweep, run, code)).train(runs)
    show_tables(sweep)
    if signals.stops:
        say("stopped; the same command goes on from here")
        return codes.STOPPED
    if not good:
        say("some runs failed; the same command tries them again")
    return codes.SUCCESS if good else codes.SWEEP_INCOMPLETE


def dry_run(sweep: Sweep) -> None:
    """Prints the command of every run that is not complete, after the program has judged them."""
    runs = unfinished(sweep)
    check(sweep, runs)
    for run in runs:
        print(shlex.join(["launch/run", str(run.config), "-n", str(sweep.ranks), "--", *train_options(run)]))


def submit(sweep: Sweep, keys: Sequence[str], options: Sequence[str]) -> int:
    """Hands the runs that are not complete to Slurm, which asks for their words with the same `--set`; returns sbatch's
    exit code."""
    if not shutil.which("sbatch"):
        raise Refusal("no sbatch here: submit where Slurm is")
    runs = unfinished(sweep)
    check(sweep, runs)
    if not runs:
        say("every run is complete")
        return codes.SUCCESS
    for run in runs:
        outcome.claim(run)
    numbers = ",".join(str(sweep.runs.index(run) + 1) for run in runs)
    command = ["sbatch", f"--array={numbers}", f"--ntasks={sweep.ranks}", *options, str(SLURM_SCRIPT), str(sweep.path),
               *(f"--set={text}" for text in keys)]
    say(shlex.join(command))
    return subprocess.run(command).returncode


def words_of_array(sweep: Sweep, number: int) -> None:
    """What launch/slurm/sweep.sbatch asks for."""
    if number > len(sweep.runs):
        raise Refusal(f"{sweep.path} has {len(sweep.runs)} runs, none with number {number}")
    run = sweep.runs[number - 1]
    outcome.claim(run)
    print("\n".join([str(run.config), "--", *run.overrides()]))


def main(arguments: Sequence[str]) -> int:
    """launch/sweep."""
    given, sbatch_options = parse_options(arguments)
    try:
        sweep = read_sweep(given.sweep, given.ranks, given.keys)
        if given.list:
            show_tables(sweep)
        elif given.dry_run:
            dry_run(sweep)
        elif given.slurm:
            return submit(sweep, given.keys, sbatch_options)
        elif given.of_array:
            words_of_array(sweep, given.of_array)
        else:
            return train(sweep, given.jobs)
        return codes.SUCCESS
    except Refusal as refusal:
        say(str(refusal))
        return refusal.code
