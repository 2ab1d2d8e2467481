"""The command line of launch/run."""
import argparse
import dataclasses
import pathlib
import sys
from typing import NoReturn, Sequence

from . import codes
from .hosts import Host, hosts_of_allocation, parse_hosts, read_hostfile


PROGRAM_ORDER = ("The program is the one that NORMFORMER names, else the first that there is: of a run with device.kind "
                 "\"cuda\" build/cuda, build/cpu, PATH; of others build/cpu, build/cuda, PATH.")


@dataclasses.dataclass(frozen=True)
class Options:
    config: pathlib.Path
    ranks: int
    hosts: tuple[Host, ...]  # empty: this machine alone
    elastic: bool
    max_restarts: int
    restart_pause: float  # seconds
    host_timeout: float  # seconds
    train: tuple[str, ...]  # what follows `--`


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print(f"launch/run: {message}", file=sys.stderr)
        sys.exit(codes.BAD_USAGE)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of ranks")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="launch/run", allow_abbrev=False,
                     usage="launch/run CONFIG -n RANKS [OPTION ...] [-- OPTION of `normformer train` ...]",
                     description="Trains on several ranks under mpirun, stops cleanly on Ctrl-C, SIGTERM and SIGUSR1, "
                     "and starts a failed job again from its newest checkpoint.", epilog=PROGRAM_ORDER)
    parser.add_argument("config", metavar="CONFIG", help="the run's configuration, a TOML file")
    parser.add_argument("-n", dest="ranks", metavar="RANKS", type=_positive, required=True, help="number of ranks")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hosts", metavar="a:8,b:8", help="hosts, each with its number of ranks (1 where none is said)")
    where.add_argument("--hostfile", metavar="FILE", type=pathlib.Path,
                       help="a line for each host, `name slots=N`; without slots as many as the host has cores")
    parser.add_argument("--elastic", action="store_true",
                        help="go on with fewer data-parallel replicas where a host cannot be reached")
    parser.add_argument("--max-restarts", metavar="N", type=_count, default=10,
                        help="restarts of a failed job in all (10); 0: never start again")
    parser.add_argument("--restart-pause", metavar="SECONDS", type=_seconds, default=1.0,
                        help="pause before the first restart (1); doubles up to 60 s while no new checkpoint appears")
    parser.add_argument("--host-timeout", metavar="SECONDS", type=_seconds, default=30.0,
                        help="time in which a host must answer before a start (30)")
    return parser


def parse_options(arguments: Sequence[str]) -> Options:
    """Reads the command line; ends the process with 64 where it is wrong."""
    arguments = list(arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    given = _parser().parse_args(arguments[:split])
    hosts: tuple[Host, ...] = hosts_of_allocation()
    if given.hosts is not None:
        hosts = parse_hosts(given.hosts)
    elif given.hostfile is not None:
        hosts = read_hostfile(given.hostfile)
    return Options(pathlib.Path(given.config), given.ranks, hosts, given.elastic, given.max_restarts,
                   given.restart_pause, given.host_timeout, tuple(arguments[split + 1:]))
