"""Exit codes: the program's own (include/normformer/core/error.h), mpirun's, and those of launch/run."""
import signal

SUCCESS = 0
SWEEP_INCOMPLETE = 1
BAD_USAGE = 64
BAD_DATA = 65
HOST_UNAVAILABLE = 69
INTERNAL = 70
IO_FAILURE = 74
STOPPED = 75
HANG = 76
NUMERIC = 77
CORRUPT = 78
HOST_LOST = 205
ENDED_AT_ONCE = 130

# What would end in the same way again, or has ended well.
FINAL = {SUCCESS, BAD_USAGE, BAD_DATA, STOPPED, NUMERIC}

_MEANINGS = {
    SUCCESS: "the run is complete",
    BAD_USAGE: "the command line or configuration cannot run",
    BAD_DATA: "a corpus, tokenizer or checkpoint cannot be read",
    INTERNAL: "a bug, or a broken connection between ranks",
    IO_FAILURE: "the system refused a read or a write",
    STOPPED: "stopped cleanly",
    HANG: "a rank stopped making progress",
    NUMERIC: "training diverged",
    CORRUPT: "ranks held different copies of the same weights",
    HOST_LOST: "mpirun lost a host",
}


class Refusal(Exception):
    """One sentence for a person, and the exit code that it leads to."""

    def __init__(self, sentence: str, code: int = BAD_USAGE):
        super().__init__(sentence)
        self.code = code


def of_signal(number: int) -> int:
    """The shell's exit code of a process that a signal ended."""
    return 128 + number


def meaning(code: int) -> str:
    """What an exit code of a job says, for a person."""
    if code in _MEANINGS:
        return _MEANINGS[code]
    try:
        return f"a process was ended by {signal.Signals(code - 128).name}"
    except ValueError:
        return "mpirun or a rank failed"
