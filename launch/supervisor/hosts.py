"""Which hosts there are, and how many ranks each takes."""
import dataclasses
import os
import pathlib
import re
import subprocess
from typing import Iterable, Sequence

from .codes import Refusal


@dataclasses.dataclass(frozen=True)
class Host:
    name: str
    slots: int  # ranks that it takes; 0: as many as it has cores

    def __str__(self) -> str:
        return f"{self.name}:{self.slots}"


def merged(hosts: Iterable[Host]) -> tuple[Host, ...]:
    """Hosts in the order of their first mention, the slots of repeated ones added up, as mpirun takes them."""
    slots: dict[str, int] = {}
    for host in hosts:
        slots[host.name] = slots.get(host.name, 0) + host.slots
    return tuple(Host(name, count) for name, count in slots.items())


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Reads "a:8,b:8"; a host without a number takes one rank."""
    hosts = []
    for part in text.split(","):
        match = re.fullmatch(r"([^:\s]+)(?::([1-9]\d*))?", part.strip())
        if not match:
            raise Refusal(f"--hosts {text}: \"{part}\" is not NAME or NAME:RANKS")
        hosts.append(Host(match[1], int(match[2] or 1)))
    return merged(hosts)


def read_hostfile(path: pathlib.Path) -> tuple[Host, ...]:
    """Reads lines like "name slots=8"; `#` begins a comment."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"--hostfile {path}: cannot be read: {error}") from error
    hosts = []
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        match = re.fullmatch(r"(\S+?)(?:\s+slots\s*=\s*([1-9]\d*))?(?:\s+max[-_]slots\s*=\s*\d+)?", " ".join(words))
        if not match:
            raise Refusal(f"--hostfile {path}:{number}: \"{line.strip()}\" is not NAME or NAME slots=N")
        hosts.append(Host(match[1], int(match[2] or 0)))
    if not hosts:
        raise Refusal(f"--hostfile {path}: names no host")
    return merged(hosts)


def tasks_per_node(text: str) -> list[int]:
    """Reads Slurm's "2(x3),1": 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise Refusal(f"SLURM_TASKS_PER_NODE={text} cannot be read")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def hosts_of_allocation() -> tuple[Host, ...]:
    """The hosts of the Slurm allocation that this process runs in, with the tasks of each; none outside of one."""
    nodes, tasks = os.environ.get("SLURM_JOB_NODELIST"), os.environ.get("SLURM_TASKS_PER_NODE")
    if not nodes or not tasks:
        return ()
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    names = shown.stdout.split()
    counts = tasks_per_node(tasks)
    if shown.returncode != 0 or len(names) != len(counts):
        raise Refusal(f"scontrol cannot tell the hosts of SLURM_JOB_NODELIST={nodes}: {shown.stderr.strip()}")
    return merged(Host(name, count) for name, count in zip(names, counts))


def place(hosts: Sequence[Host], ranks: int) -> list[tuple[Host, int]]:
    """How many ranks mpirun puts on each host, which it fills in order; hosts that get none are left out."""
    placed = []
    for host in hosts:
        here = min(host.slots, ranks)
        if here > 0:
            placed.append((host, here))
        ranks -= here
    return placed

