"""What ranks print: on the terminal with the rank in front, and in a file for each rank."""
import os
import pathlib
import re
from typing import BinaryIO, Optional

# mpirun --tag-output writes a tag before every line, and before what goes on with a line.
_TAG_OR_NEWLINE = re.compile(rb"\[\d+,(\d+)\]<(?:stdout|stderr|stddiag)>:|\n")
# The beginning of a tag, at the end of what was read so far.
_PART_OF_TAG = re.compile(rb"\[(?:\d+(?:,(?:\d+(?:\](?:<(?:[a-z]{1,7}>?)?)?)?)?)?)?\Z")
# Clears the terminal's current line; the program's status line begins with it.
CLEAR = b"\r\033[K"

STDOUT, STDERR = 1, 2


class TagSplitter:
    """Splits a stream that mpirun has tagged into pieces (rank, text); rank None is mpirun itself."""

    def __init__(self) -> None:
        self._rest = b""
        self._rank: Optional[int] = None

    def feed(self, data: bytes, at_end: bool = False) -> list[tuple[Optional[int], bytes]]:
        """What is known with `data`; no piece goes on behind a newline. `at_end`: nothing will follow."""
        data = self._rest + data
        part = None if at_end else _PART_OF_TAG.search(data)
        end = part.start() if part else len(data)
        self._rest = data[end:]
        pieces: list[tuple[Optional[int], bytes]] = []
        begin = 0
        for found in _TAG_OR_NEWLINE.finditer(data, 0, end):
            is_newline = found[1] is None
            text = data[begin:found.end() if is_newline else found.start()]
            if text:
                pieces.append((self._rank, text))
            self._rank = None if is_newline else int(found[1])
            begin = found.end()
        if begin < end:
            pieces.append((self._rank, data[begin:end]))
        return pieces


def shown(rank: int, line: bytes) -> bytes:
    """A line of a rank as the terminal gets it: rank 0's as it is, others with their rank, said once."""
    if rank == 0 or b"[rank %d " % rank in line:
        return line
    return b"[rank %d] %s" % (rank, line)


def logged(line: bytes) -> bytes:
    """A line as a file gets it: what is left of it where parts were overwritten on the terminal."""
    text = line.rstrip(b"\r\n").rpartition(b"\r")[2]
    return text.removeprefix(b"\033[K") + b"\n"


class RankOutput:
    """Takes what mpirun prints during one attempt. Rank 0's bytes go to a terminal at once, for its status line;
    everything else goes by whole lines. Never fails: a run does not end because nobody reads it."""

    def __init__(self, log_folder: pathlib.Path, is_terminal: bool):
        self._folder = log_folder
        self._is_terminal = is_terminal
        self._splitters = {STDOUT: TagSplitter(), STDERR: TagSplitter()}
        self._lines: dict[tuple[int, Optional[int]], bytes] = {}
        self._files: dict[int, BinaryIO] = {}
        self._status_is_open = False  # rank 0 has left the terminal's line unfinished
        self.said_by_mpirun: list[str] = []

    def feed(self, stream: int, data: bytes, at_end: bool = False) -> None:
        """Takes bytes that mpirun wrote to STDOUT or STDERR."""
        for rank, text in self._splitters[stream].feed(data, at_end):
            self._take(stream, rank, text)
        if at_end:
            for key in [key for key in self._lines if key[0] == stream]:
                self._end_line(key[0], key[1], self._lines.pop(key))

    def _take(self, stream: int, rank: Optional[int], text: bytes) -> None:
        if rank == 0 and self._is_terminal:
            write(stream, text)
            self._status_is_open = not text.endswith(b"\n")
        line = self._lines.pop((stream, rank), b"") + text
        if line.endswith(b"\n"):
            self._end_line(stream, rank, line)
        else:
            self._lines[stream, rank] = line

    def _end_line(self, stream: int, rank: Optional[int], line: bytes) -> None:
        if rank is None:
            self.said_by_mpirun.append(line.decode(errors="replace").rstrip())
            self._show(stream, line)
            return
        self._log(rank, line)
        if rank != 0 or not self._is_terminal:
            self._show(stream, shown(rank, line))

    def _show(self, stream: int, line: bytes) -> None:
        write(stream, (CLEAR if self._status_is_open else b"") + line)
        self._status_is_open = False

    def _log(self, rank: int, line: bytes) -> None:
        try:
            if rank not in self._files:
                self._files[rank] = open(self._folder / f"rank.{rank}", "ab", buffering=0)
            self._files[rank].write(logged(line))
        except OSError:
            pass

    def say(self, sentence: str) -> None:
        """Prints a line of launch/run itself."""
        self._show(STDERR, f"launch/run: {sentence}\n".encode())

    def close(self) -> None:
        """Closes the ranks' files."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def write(stream: int, data: bytes) -> None:
    """Writes all of it, or drops it where nobody reads."""
    try:
        while data:
            data = data[os.write(stream, data):]
    except OSError:
        pass


def say(sentence: str) -> None:
    """Prints a line of launch/run where no job runs."""
    write(STDERR, f"launch/run: {sentence}\n".encode())
