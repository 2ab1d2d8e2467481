"""Looks at every host before a start: is it there, and are the program, the configuration and the data the same?"""
import dataclasses
import subprocess
from typing import Callable, Optional, Sequence

from .hosts import Host
from .job import mpirun_command, run_all

AT_ONCE = 16

# Needs nothing but a POSIX shell and coreutils on the host. Arguments: the program, configurations, --, data sets.
# Lines say "normformer-probe KEY VALUE"; keys with a path end in it.
SCRIPT = r"""
tell() { printf 'normformer-probe\t%s\t%s\n' "$1" "$2"; }
hash_of() { if [ -r "$1" ]; then sha256sum <"$1" | cut -d' ' -f1; else echo missing; fi; }
size_of() { if [ -r "$1" ]; then stat -Lc %s "$1"; else echo missing; fi; }
numbers() { tr ',' '\n' | while IFS=- read -r first last; do seq "$first" "${last:-$first}"; done; }
cpus=/sys/devices/system/cpu
allowed=$(sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status)
siblings() { while read -r p; do cat $cpus/cpu"$p"/topology/thread_siblings_list; done; }
tell cores "$(echo "$allowed" | numbers | siblings | sort -u | wc -l)"
tell allowed "$allowed"
tell online "$(cat $cpus/online)"
tell "program $1" "$(hash_of "$1")"
shift
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  tell "configuration $1" "$(hash_of "$1")"
  shift
done
[ $# -eq 0 ] || shift
for data in "$@"; do
  base=${data%.bin}; base=${base%.idx}
  tell "data $base.idx" "$(size_of "$base.idx") $(hash_of "$base.idx")"
  tell "data $base.bin" "$(size_of "$base.bin")"
done
"""

_MARK = "normformer-probe\t"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a host has said. Not reached: `facts` is empty, and `problem` says why."""
    host: str
    facts: dict[str, str]
    problem: str = ""

    @property
    def is_reached(self) -> bool:
        return bool(self.facts)

    @property
    def cores(self) -> int:
        return int(self.facts.get("cores", "0"))

    @property
    def bindable_cores(self) -> int:
        """Cores that mpirun can bind ranks to; 0 where processes may use only some, which mpirun does not look at."""
        return self.cores if self.facts.get("allowed") == self.facts.get("online") else 0


def read_facts(text: str) -> dict[str, str]:
    """The facts in what the script has printed."""
    facts = {}
    for line in text.splitlines():
        _, mark, rest = line.partition(_MARK)
        if mark:
            key, _, value = rest.partition("\t")
            facts[key] = value
    return facts


def probe_here() -> Report:
    """Counts this machine's cores; the program itself says what it misses."""
    done = subprocess.run(["sh", "-c", SCRIPT, "probe", ""], capture_output=True, text=True, errors="replace",
                          stdin=subprocess.DEVNULL)
    return Report("this machine", read_facts(done.stdout), done.stderr.strip())


def probe(hosts: Sequence[Host], program: str, configs: Sequence[str], datasets: Sequence[str], seconds: float,
          is_stopped: Callable[[], bool]) -> list[Report]:
    """Looks at every host by the way that the job will take, each within `seconds`."""
    commands = [[*mpirun_command(), "--bind-to", "none", "--host", f"{host.name}:1", "-n", "1", "sh", "-c", SCRIPT,
                 "probe", program, *configs, "--", *datasets] for host in hosts]
    done = run_all(commands, seconds, AT_ONCE, is_stopped)
    return [_report(host.name, result, seconds) for host, result in zip(hosts, done)]


def _report(host: str, result: Optional[subprocess.CompletedProcess[str]], seconds: float) -> Report:
    if result is None:
        return Report(host, {}, f"did not answer within {seconds:g} s")
    facts = read_facts(result.stdout)
    if facts:
        return Report(host, facts)
    said = [line.strip() for line in result.stderr.splitlines() if line.startswith("ssh:") or host in line]
    return Report(host, {}, f"cannot be reached ({said[0] if said else f'mpirun ended with {result.returncode}'})")


def differences(reports: Sequence[Report]) -> list[str]:
    """A sentence for each way in which a host that answers differs from the first one."""
    reached = [report for report in reports if report.is_reached]
    sentences = []
    for report in reached[1:]:
        first = reached[0]
        for key, value in first.facts.items():
            kind, _, path = key.partition(" ")
            if path and report.facts.get(key) != value:
                sentences.append(_difference(kind, path, first, report, key))
    return sentences


def _difference(kind: str, path: str, first: Report, other: Report, key: str) -> str:
    if other.facts.get(key, "missing").startswith("missing"):
        return f"{other.host} has no {path}, which {first.host} has"
    if first.facts[key].startswith("missing"):
        return f"{first.host} has no {path}, which {other.host} has"
    what = {"program": "another build of the program", "configuration": "another configuration",
            "data": "other data"}[kind]
    return f"{other.host} has {what} than {first.host} in {path}"
