"""The decisions of the supervisor, as functions of what is known: nothing here looks at the world."""
import dataclasses
import math
import signal
from typing import Optional, Sequence

from . import codes
from .hosts import Host
from .settings import Settings

BARREN_RESTARTS = 3
LONGEST_PAUSE = 60.0  # seconds
LOSSES_OF_A_BAD_HOST = 2


@dataclasses.dataclass(frozen=True)
class Decision:
    """What to do after a job has ended: end with `code`, or start again after `pause` seconds."""
    restart: bool
    code: int
    pause: float
    reason: str


@dataclasses.dataclass
class History:
    """What the supervisor remembers of the attempts so far."""
    max_restarts: int
    first_pause: float
    restarts: int = 0
    barren: int = 0  # restarts in a row without a new checkpoint
    failures: int = 0  # in a row without a new checkpoint, the first start and waiting for hosts included
    losses: dict[str, int] = dataclasses.field(default_factory=dict)  # how often each host was lost, in a row

    def pause(self) -> float:
        """Seconds before the next start: doubled with each failure in a row."""
        return min(self.first_pause * 2.0 ** min(self.failures - 1, 30), LONGEST_PAUSE)

    def is_spent(self) -> bool:
        return self.restarts >= self.max_restarts

    def note_losses(self, lost: Sequence[str]) -> None:
        self.losses = {host: self.losses.get(host, 0) + 1 for host in lost}

    def is_bad(self, host: str) -> bool:
        """Whether a host that answers was lost so often in a row that jobs should do without it."""
        return any(_same_host(host, name) and count >= LOSSES_OF_A_BAD_HOST for name, count in self.losses.items())


def _same_host(one: str, other: str) -> bool:
    if one == other:
        return True
    short = one.split(".")[0]
    return short == other.split(".")[0] and not short.isdigit()


def after_job(history: History, code: int, stop_asked: bool, progress: bool) -> Decision:
    """Decides what follows a job that ended with `code`, and enters it into the history. `progress`: whether a new
    checkpoint appeared while it ran."""
    if stop_asked and code == codes.of_signal(signal.SIGUSR1):
        return Decision(False, codes.STOPPED, 0, "stopped before the ranks could take the signal; nothing is lost")
    what = f"the job ended with {code} ({codes.meaning(code)})"
    if code in codes.FINAL or stop_asked:
        return Decision(False, code, 0, what)
    if history.max_restarts == 0:
        return Decision(False, code, 0, f"{what}; --max-restarts 0: not starting again")
    history.failures = 1 if progress else history.failures + 1
    if progress:
        history.barren = 0
        history.losses.clear()
    elif history.restarts > 0:
        history.barren += 1
    if history.barren >= BARREN_RESTARTS:
        return Decision(False, code, 0, f"{what}; giving up: {BARREN_RESTARTS} restarts in a row made no new checkpoint")
    if history.is_spent():
        return Decision(False, code, 0, f"{what}; giving up after {history.restarts} restarts (--max-restarts)")
    return _restart(history, code, what)


def after_silence(history: History, what: str) -> Decision:
    """Decides what follows where a start was not possible because hosts do not answer, and enters it."""
    history.failures += 1
    if history.is_spent():
        return Decision(False, codes.HOST_UNAVAILABLE, 0,
                        f"{what}; giving up after {history.restarts} restarts (--max-restarts)")
    return _restart(history, codes.HOST_UNAVAILABLE, what)


def _restart(history: History, code: int, what: str) -> Decision:
    history.restarts += 1
    pause = history.pause()
    return Decision(True, code, pause,
                    f"{what}; trying again in {pause:g} s (restart {history.restarts} of {history.max_restarts})")


@dataclasses.dataclass(frozen=True)
class Shape:
    """How many ranks train, and what must be told to the program so that they fit."""
    ranks: int
    options: tuple[str, ...] = ()


def shrink(settings: Settings, ranks: int, slots: int) -> Optional[Shape]:
    """As many whole data-parallel replicas of the run as `slots` hold, at most those of `ranks`; None where not even
    one fits. The global batch stays as it is, so that the same training goes on."""
    if slots >= ranks:
        return Shape(ranks)
    replicas = slots // settings.ranks_of_replica
    if replicas == 0:
        return None
    options: list[str] = []
    if settings.data > 0:
        options += ["--set", f"parallel.data={replicas}"]
    # Groups that divided the replicas there were keep to whole parts of themselves.
    sharing = replicas * settings.context
    if settings.shard_group > 0 and sharing % settings.shard_group != 0:
        options += ["--set", f"parallel.shard_group={math.gcd(settings.shard_group, sharing)}"]
    return Shape(replicas * settings.ranks_of_replica, tuple(options))


def cores_per_rank(placed: Sequence[tuple[Host, int]], cores: dict[str, int]) -> int:
    """Cores that each rank can have to itself on every host; 0 where some host has fewer cores than ranks, or where it
    is not known."""
    return min((cores.get(host.name, 0) // ranks for host, ranks in placed), default=0)
