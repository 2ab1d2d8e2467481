"""What the benchmarks of whole runs share: starting one under mpirun, and reading its metrics."""
import json
import os
import pathlib
import subprocess
import sys

PROGRAM = str(pathlib.Path(__file__).resolve().parents[1] / "build/cpu/src/app/normformer")


def set_words(settings):
    """The command line's words for settings "section.key=value"."""
    return [word for setting in settings for word in ("--set", setting)]


def run_or_exit(command):
    """Runs to the end and returns what was printed; where it fails, prints why and ends."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def mpirun(*options):
    """The launcher's words, for a root too."""
    allowed = ["--allow-run-as-root"] if os.getuid() == 0 else []
    return ["mpirun", *allowed, "--bind-to", "none", "--oversubscribe", *options]


def steps_of(folder):
    """The lines of a run's metrics that are steps, in order."""
    lines = [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]
