#!/usr/bin/env python3
"""The memory of real ranks beside what the meta device foretells, under each way to save it, in one table.

    memory.py CONFIG [--ranks 2] [--program build/cpu/src/app/normformer] [--set section.key=value ...]

Each row is a run of two updates on data-parallel ranks. "measured" is the largest resident memory of any rank, less what a rank
with a tiny model takes; "meta" is what `normformer plan` foretells of the same configuration, blocks kept for reuse included. The
corpus must be prepared before, and model.vocab be set.
"""
import argparse
import pathlib
import sys
import tempfile

from launches import PROGRAM, mpirun, run_or_exit, set_words

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


def measured(options, settings):
    """MiB of the rank that took most."""
    with tempfile.TemporaryDirectory(prefix="normformer_memory_") as folder:
        run_or_exit([*mpirun("-n", str(options.ranks)), sys.executable, "-c", WATCH, f"{folder}/rank", options.program,
                     "train", options.config, *set_words([*settings, f"checkpoint.folder={folder}/run"])])
        return max(int(file.read_text()) for file in pathlib.Path(folder).glob("rank*")) / 1024


def foretold(options, settings):
    """MiB of the rank that needs most."""
    lines = run_or_exit([options.program, "plan", options.config, "-n", str(options.ranks),
                         *set_words(settings)]).splitlines()
    title = next(i for i, line in enumerate(lines) if line.startswith("peak memory in "))
    in_mib = {"KiB": 1 / 1024, "MiB": 1, "GiB": 1024}[lines[title].split()[3]]
    return in_mib * float(lines[title + 2].split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--ranks", default=2, type=int)
    parser.add_argument("--program", default=PROGRAM)
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
