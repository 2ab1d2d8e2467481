#!/usr/bin/env python3
"""What checkpoints, what a run watches itself for and what it records of its gradients cost of its time, as ratios within runs
and between runs side by side.

    run_costs.py CONFIG [--ranks 2] [--every 50] [--windows 4] [--rounds 3] [--program ...] [--set section.key=value ...]

Checkpoints: in one run that saves every 2N updates, the N updates behind each save are held against the N after those, with
checkpoint.async and without. Health: runs with the watchdog, comparisons of replicas every N updates and spikes looked for, in turn
with runs without. The ledger is in both: it cannot be turned off. Gradients' norms: in one run that records them every fourth
update, an update that records and the one behind it, which has waited for the file, against the two between. The corpus must be
prepared before.
"""
import argparse
import statistics
import tempfile

from launches import PROGRAM, mpirun, run_or_exit, set_words, steps_of

OFF = ["health.watchdog_seconds=0", "health.replica_check_every=0", "health.straggler_factor=0"]


def train(options, settings):
    """The time at which each update ended, from the first on, and what was printed."""
    with tempfile.TemporaryDirectory(prefix="normformer_costs_", dir=options.folder) as folder:
        printed = run_or_exit([*mpirun("-n", str(options.ranks)), options.program, "train", options.config,
                               *set_words([*options.set, "train.valid_sequences=1", "device.threads=1", "checkpoint.keep=1",
                                           *settings, f"checkpoint.folder={folder}/run"])])
        return [step["time"] for step in steps_of(f"{folder}/run")], printed


def cost_of_checkpoints(options, how):
    """The time of updates behind a save over that of as many others, for each window."""
    every = options.every
    times, printed = train(options, [f"train.updates={2 * every * (options.windows + 1)}", f"checkpoint.every={2 * every}",
                                     f"checkpoint.async={how}", *OFF])
    saves = [line for line in printed.splitlines() if line.startswith("saved a checkpoint")]
    print(f"  {saves[0]}")
    ratios = []
    for window in range(1, options.windows + 1):
        begin = 2 * every * window - 1  # the update that is saved
        behind = times[begin + every] - times[begin]
        others = times[begin + 2 * every] - times[begin + every]
        ratios.append(behind / others)
    return ratios


def cost_of_health(options):
    watched = ["health.watchdog_seconds=600", f"health.replica_check_every={options.every}", "health.straggler_factor=1.5",
               "health.spike_zscore=8"]
    seconds = {"watched": [], "not": []}
    for _ in range(options.rounds):
        for name, settings in (("watched", watched), ("not", OFF)):
            times, _ = train(options, [f"train.updates={4 * options.every}", *settings])
            seconds[name].append((times[-1] - times[options.every - 1]) / (3 * options.every))
    return [a / b for a, b in zip(seconds["watched"], seconds["not"])]


def cost_of_gradient_norms(options):
    """The time of an update that records each parameter's gradient norms over that of one that does not."""
    ratios = []
    for _ in range(options.rounds):
        times, _ = train(options, [f"train.updates={8 * options.every}", "metrics.gradient_norms_every=4", *OFF])
        # times[i] ends update i + 1. Behind a first stretch, whole groups of four from one that records on.
        seconds = [after - before for before, after in zip(times, times[1:])]  # seconds[i]: of update i + 2
        groups = range(4 * (options.every // 4) + 2, len(seconds) - 3, 4)
        of_groups = [(seconds[i] + seconds[i + 1]) / (seconds[i + 2] + seconds[i + 3]) for i in groups]
        ratios.append(1 + 2 * (statistics.median(of_groups) - 1))
    return ratios


def show(title, ratios):
    print(f"{title:<40} {statistics.median(ratios):.4f}   ({', '.join(f'{r:.3f}' for r in ratios)})", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--ranks", default=2, type=int)
    parser.add_argument("--every", default=50, type=int)
    parser.add_argument("--windows", default=4, type=int)
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--folder", default=None, help="where runs are made: a folder of the disk that is meant")
    parser.add_argument("--program", default=PROGRAM)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    print(f"{options.ranks} ranks; time over time without, medians")
    show(f"a checkpoint in {options.every} updates, async", cost_of_checkpoints(options, "true"))
    show(f"a checkpoint in {options.every} updates, waited for", cost_of_checkpoints(options, "false"))
    show("watchdog, replicas, spikes", cost_of_health(options))
    show("gradient norms of every update", cost_of_gradient_norms(options))


if __name__ == "__main__":
    main()
