#!/usr/bin/env python3
"""What overlapping communication with computing saves between two hosts with a slow link, in one table.

    overlap.py CONFIG [--mbit 200] [--updates 8] [--repeats 3] [--layouts "tensor 2" ...]
               [--program build/cpu/src/app/normformer] [--set section.key=value ...]

The two hosts are network namespaces of this machine, joined by a link whose rate `tc tbf` limits, and one rank runs on each, with
one thread and a processor of its own. Every layout is run with all overlaps off, with the one that the layout is for, and with all on; the ratio is time over time
with all off, of the medians of the repeats, which take turns. The same updates must give the same losses to the last digit.
Needs root, iproute2 and Open MPI. The corpus must be prepared before.
"""
import argparse
import contextlib
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from launches import PROGRAM, mpirun, run_or_exit, set_words, steps_of

NODES = {"10.79.0.11": "nfoverlap1", "10.79.0.12": "nfoverlap2"}
BRIDGE = "nfoverlap0"
OVERLAPS = ["gradients", "parameters", "pipeline", "context", "tensor"]
LAYOUTS = [("data 2, ZeRO-1", ["parallel.data=2"], ["gradients", "parameters"]),
           ("data 2, ZeRO-3", ["parallel.data=2", "parallel.sharding=parameters"], ["gradients", "parameters"]),
           ("pipeline 2, 1F1B", ["parallel.pipeline=2"], ["pipeline"]),
           ("context 2", ["parallel.context=2"], ["context"]),
           ("tensor 2", ["parallel.tensor=2"], ["tensor"])]


def ip(*words):
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def two_hosts(mbit):
    """Yields the path of what Open MPI is to start its daemons with."""
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", "10.79.0.1/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for i, (address, node) in enumerate(NODES.items()):
            ip("netns", "add", node)
            ip("link", "add", f"nfov{i}", "type", "veth", "peer", "name", "eth0", "netns", node)
            ip("link", "set", f"nfov{i}", "master", BRIDGE, "up")
            ip("-n", node, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", node, "link", "set", "eth0", "up")
            ip("-n", node, "link", "set", "lo", "up")
            subprocess.run(["ip", "netns", "exec", node, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate",
                            f"{mbit}mbit", "burst", "256kb", "latency", "50ms"], check=True)
        with tempfile.TemporaryDirectory(prefix="normformer_overlap_") as folder:
            agent = pathlib.Path(folder) / "agent"
            cases = "".join(f"{address}) node={node} ;;\n" for address, node in NODES.items())
            agent.write_text("#!/bin/bash\nwhile [[ \"${1:-}\" == -* ]]; do shift; done\n"
                             f"case \"$1\" in\n{cases}esac\nshift\n"
                             "exec ip netns exec $node unshare --uts bash -c \"hostname $node; $*\"\n")
            agent.chmod(0o755)
            yield agent
    finally:
        for node in NODES.values():
            subprocess.run(["ip", "netns", "del", node], capture_output=True)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


def run(options, agent, settings):
    """Tokens per second as the metrics of the last update have them, and the losses of all updates."""
    with tempfile.TemporaryDirectory(prefix="normformer_overlap_") as folder:
        launcher = mpirun("--mca", "plm_rsh_agent", str(agent), "--mca", "btl", "tcp,self", "--mca",
                          "btl_tcp_if_include", "10.79.0.0/24", "--mca", "oob_tcp_if_include", "10.79.0.0/24", "-H",
                          ",".join(f"{address}:1" for address in NODES), "-n", "2")
        run_or_exit([*launcher, "bash", "-c", 'exec taskset -c "$OMPI_COMM_WORLD_RANK" "$0" "$@"',
                     str(pathlib.Path(options.program).resolve()), "train", options.config,
                     *set_words(["device.threads=1", *options.set, *settings, f"train.updates={options.updates}",
                                 f"checkpoint.folder={folder}", "train.valid_sequences=1", "train.log_every=1000"])])
        steps = steps_of(folder)
        return steps[-1]["tokens_per_second"], [s["loss"] for s in steps]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--mbit", default=200, type=int, help="rate of each host's link")
    parser.add_argument("--updates", default=8, type=int)
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--layouts", nargs="+", default=[name for name, _, _ in LAYOUTS])
    parser.add_argument("--program", default=PROGRAM)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    if os.getuid() != 0:
        sys.exit("network namespaces need root")
    print(f"{os.cpu_count()} processors, one rank on each of two hosts, {options.mbit} Mbit/s between them")
    print(f"{'layout':<18} {'overlap':<22} {'tok/s':>9} {'time':>6}")
    with two_hosts(options.mbit) as agent:
        for name, layout, own in LAYOUTS:
            if name not in options.layouts:
                continue
            cases = {"none": [], "+".join(own): own, "all": OVERLAPS}
            speeds = {case: [] for case in cases}
            losses = {case: None for case in cases}
            for _ in range(options.repeats):
                for case, on in cases.items():
                    switches = [f"parallel.overlap_{o}={'true' if o in on else 'false'}" for o in OVERLAPS]
                    speed, losses[case] = run(options, agent, layout + switches)
                    speeds[case].append(speed)
            if any(l != losses["none"] for l in losses.values()):
                sys.exit(f"{name}: overlapping changed the losses: {losses}")
            base = statistics.median(speeds["none"])
            for case in cases:
                median = statistics.median(speeds[case])
                print(f"{name:<18} {case:<22} {median:>9.0f} {base / median:>6.3f}", flush=True)


if __name__ == "__main__":
    main()
