#!/usr/bin/env python3
"""The memory of real ranks beside what the meta device foretells, under each way to save it, in one table.

    memory.py CONFIG [--ranks 2] [--program build/cpu/src/app/normformer] [--set section.key=value ...]

Each row is a run of two updates on data-parallel ranks. "measured" is the largest resident memory of any rank, less what a rank
with a tiny model takes; "meta" is what `normformer plan` foretells of the same configuration, blocks kept for reuse included. The
corpus must be prepared before, and model.vocab be set.
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile

WAYS = [("ZeRO-1", []),
        ("ZeRO-2", ["parallel.sharding=gradients"]),
        ("ZeRO-3", ["parallel.sharding=parameters"]),
        ("selective recomputation", ["train.recompute=selective"]),
        ("full recomputation", ["train.recompute=full"])]
TINY = ["model.layers=1", "model.width=32", "model.heads=2", "model.ffn=32", "model.length=16", "train.micro_batch=1"]

# Runs a program and leaves its peak resident memory, in KiB, in a file of the rank's.
WATCH = ("import os, resource, subprocess, sys\n"
         "code = subprocess.run(sys.argv[2:], stdout=subprocess.DEVNULL).returncode\n"
         "with open(sys.argv[1] + os.environ['OMPI_COMM_WORLD_RANK'], 'w') as file:\n"
         "    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))\n"
         "sys.exit(code)\n")


def words(settings):
    return [word for setting in settings for word in ("--set", setting)]


def measured(options, settings):
    """MiB of the rank that took most."""
    with tempfile.TemporaryDirectory(prefix="normformer_memory_") as folder:
        done = subprocess.run(["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n",
                               str(options.ranks), sys.executable, "-c", WATCH, f"{folder}/rank", options.program,
                               "train", options.config, *words(settings), "--set", f"checkpoint.folder={folder}/run"],
                              capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(done.stderr[-2000:])
        return max(int(file.read_text()) for file in pathlib.Path(folder).glob("rank*")) / 1024


def foretold(options, settings):
    """MiB of the rank that needs most."""
    done = subprocess.run([options.program, "plan", options.config, "-n", str(options.ranks), *words(settings)],
                          capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    lines = done.stdout.splitlines()
    table = next(i for i, line in enumerate(lines) if line.startswith("stage "))
    return 1024 * float(lines[table + 1].split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--ranks", default=2, type=int)
    parser.add_argument("--program", default=str(pathlib.Path(__file__).resolve().parents[1] / "build/cpu/src/app/normformer"))
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    common = [f"parallel.data={options.ranks}", "device.threads=1", *options.set, "train.updates=2",
              "train.valid_sequences=1"]
    base = measured(options, [*common, *TINY])
    print(f"{options.ranks} ranks; a rank with a tiny model takes {base:.0f} MiB")
    print(f"{'':<24} {'measured MiB':>12} {'meta MiB':>9} {'ratio':>6}")
    for name, settings in WAYS:
        taken = measured(options, [*common, *settings]) - base
        meta = foretold(options, [*common, *settings])
        print(f"{name:<24} {taken:>12.0f} {meta:>9.0f} {taken / meta:>6.3f}", flush=True)


if __name__ == "__main__":
    main()
