#!/usr/bin/env python3
"""Weak and strong scaling of a configuration over ranks, and one model beside another, in one table.

    scaling.py CONFIG --ranks 1,2,4 [--axis data|tensor|pipeline|context] [--mode strong|weak|both] [--updates 12]
               [--beside CONFIG] [--repeats 3] [--others 1] [--hosts a:8,b:8] [--program build/cpu/src/app/normformer]
               [--set section.key=value ...]

Strong scaling keeps the global batch, weak scaling multiplies it by the ranks (and with it the work). Ranks go along one
axis of the mesh; other degrees are the configuration's. Efficiency is the speed of N ranks over N times that of the
first number of ranks in the list, scaled to it. Speeds are the best of the repeats, which take turns, so that what else the
machine does falls on all alike; each rank has one thread unless the configuration says otherwise (device.threads). With --beside the
last column is the speed of CONFIG over that of the other one, under the same layout. Corpora must be prepared before.
"""
import argparse
import os
import pathlib
import tempfile

try:
    import tomllib
except ImportError:  # Python below 3.11
    tomllib = None

from launches import PROGRAM, mpirun, run_or_exit, set_words, steps_of


def read_global_batch(config, overrides):
    for key, _, value in (o.partition("=") for o in reversed(overrides)):
        if key.strip() == "train.global_batch":
            return int(value)
    text = pathlib.Path(config).read_text()
    if tomllib:
        return tomllib.loads(text).get("train", {}).get("global_batch", 8)
    lines = [line.split("=")[1] for line in text.splitlines() if line.strip().startswith("global_batch")]
    return int(lines[0].split("#")[0]) if lines else 8


def speed_of(options, config, ranks, global_batch, folder):
    """And FLOP/s, as the metrics of the last update have them: over the updates before, the latest most."""
    settings = [*options.set, f"parallel.{options.axis}={ranks}", f"train.global_batch={global_batch}",
                f"train.updates={options.updates}", f"checkpoint.folder={folder}", "train.valid_sequences=1",
                "train.log_every=1000"]
    if not any(s.startswith("device.threads") for s in options.set):
        settings.insert(0, "device.threads=1")
    hosts = ["--host", options.hosts] if options.hosts else []
    run_or_exit([*mpirun("-n", str(ranks * options.others), *hosts), options.program, "train", config,
                 *set_words(settings)])
    steps = steps_of(folder)
    return steps[-1]["tokens_per_second"], steps[-1]["flops_per_second"]


def measure(options, mode, ranks):
    """Best (tokens/s, FLOP/s) of each configuration."""
    configs = [options.config] + ([options.beside] if options.beside else [])
    best = [(0.0, 0.0)] * len(configs)
    for _ in range(options.repeats):
        for i, config in enumerate(configs):
            batch = read_global_batch(config, options.set) * (ranks if mode == "weak" else 1)
            with tempfile.TemporaryDirectory(prefix="normformer_scaling_") as folder:
                best[i] = max(best[i], speed_of(options, config, ranks, batch, folder))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--ranks", default="1,2", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--axis", default="data", choices=["data", "tensor", "pipeline", "context"])
    parser.add_argument("--mode", default="both", choices=["strong", "weak", "both"])
    parser.add_argument("--updates", default=12, type=int)
    parser.add_argument("--beside")
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--others", default=1, type=int, help="product of the configuration's other degrees")
    parser.add_argument("--hosts")
    parser.add_argument("--program", default=PROGRAM)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    print(f"{os.cpu_count()} processors here; ranks along {options.axis}, best of {options.repeats}")
    print(f"{'mode':<7} {'ranks':>5} {'tok/s':>10} {'GFLOP/s':>9} {'speed-up':>9} {'efficiency':>10}"
          + (f" {'beside':>10} {'ratio':>6}" if options.beside else ""))
    for mode in ("strong", "weak") if options.mode == "both" else (options.mode,):
        first = None
        for ranks in options.ranks:
            best = measure(options, mode, ranks)
            tokens, flops = best[0]
            first = first or (ranks, tokens)
            speed_up = tokens / first[1]
            row = (f"{mode:<7} {ranks:>5} {tokens:>10.0f} {flops / 1e9:>9.1f} {speed_up:>9.2f} "
                   f"{100 * speed_up * first[0] / ranks:>9.0f}%")
            if options.beside:
                row += f" {best[1][0]:>10.0f} {tokens / best[1][0]:>6.3f}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
