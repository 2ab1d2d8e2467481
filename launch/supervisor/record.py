"""What the supervisor keeps in a run's folder: its lock, the numbers of attempts, and what became of each."""
import datetime
import fcntl
import json
import os
import pathlib
import re
import socket
import time
from typing import Any, Optional

from .codes import Refusal

# mpirun needs up to so long to go once its supervisor was killed, and holds the lock meanwhile.
LOCK_PATIENCE = 3.0  # seconds

_CHECKPOINT = re.compile(r"step-(\d+)(?:-(\d+))?")


def newest_checkpoint(names: list[str]) -> Optional[str]:
    """The name of the newest checkpoint among the names of a folder."""
    found = [(int(match[1]), int(match[2] or 1), name) for name in names if (match := _CHECKPOINT.fullmatch(name))]
    return max(found)[2] if found else None


def write_durably(path: pathlib.Path, text: str) -> None:
    """Replaces a file so that after a power cut it is the old or the new one."""
    temporary = path.with_name(f"{path.name}.new")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lines_of(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without torn ones; none where there is no file."""
    try:
        text = path.read_text()
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def now() -> str:
    """The time, to the millisecond, with its zone."""
    return datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")


class RunRecord:
    """The run's folder, held by this supervisor alone while the object lives."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / "launch.lock", "a+")
        except OSError as error:
            raise Refusal(f"cannot make the run's folder {folder}: {error.strerror}", 74) from error
        self._take_lock()

    @property
    def lock_descriptor(self) -> int:
        """To be inherited by mpirun, so that the folder is locked as long as a job is at work in it."""
        return self._lock.fileno()

    def close(self) -> None:
        """Frees the folder."""
        self._lock.close()

    def _take_lock(self) -> None:
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= deadline:
                    self._lock.seek(0)
                    holder = self._lock.read().strip()
                    raise Refusal(f"another launch/run ({holder}) is at work in {self.folder}") from error
                time.sleep(0.05)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def newest(self) -> Optional[str]:
        """The newest checkpoint's name; None where there is none."""
        return newest_checkpoint(os.listdir(self.checkpoints))

    def last_attempt(self) -> int:
        """The number of the newest attempt; 0 before the first."""
        try:
            return int((self.checkpoints / "ATTEMPT").read_text())
        except (OSError, ValueError):
            return max((line.get("attempt", 0) for line in self.lines()), default=0)

    def begin_attempt(self) -> int:
        """Numbers the next attempt. From here on no older one may publish a checkpoint (checkpoints/ATTEMPT)."""
        number = self.last_attempt() + 1
        write_durably(self.checkpoints / "ATTEMPT", f"{number}\n")
        return number

    def lines(self) -> list[dict[str, Any]]:
        """What attempts.jsonl holds; a torn last line is left out."""
        return lines_of(self.folder / "attempts.jsonl")

    def write_line(self, **facts: Any) -> None:
        """Appends a line to attempts.jsonl, durably."""
        path = self.folder / "attempts.jsonl"
        is_new = not path.exists()
        torn = not is_new and not path.read_bytes().endswith(b"\n")
        with open(path, "a") as file:
            file.write(("\n" if torn else "") + json.dumps(facts) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            _sync_folder(self.folder)

    def log_folder(self, attempt: int) -> pathlib.Path:
        """The folder for what the ranks of an attempt print."""
        path = self.folder / "logs" / f"attempt-{attempt:03}"
        path.mkdir(parents=True, exist_ok=True)
        return path
