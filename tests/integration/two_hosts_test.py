#!/usr/bin/env python3
"""launch/run over two hosts, made of network namespaces: training across them, and one of them lost in the middle.

Needs root and `ip netns`; skipped without. The hosts share this machine's disk, as clusters share a file system.
"""
import json
import os
import pathlib
import shutil
import signal
import subprocess
import unittest

from program import PROGRAM, ROOT, Folder, checkpoints, metrics, run, wait_until

# Stands in for ssh: runs its command inside the namespace named like the host, under that name. Like ssh it outlives its
# command a little, so that mpirun hears of a dead daemon by its connection.
AGENT = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1
shift
exec ip netns exec "$host" unshare --uts sh -c 'hostname "$0"; sh -c "$1"; code=$?; sleep 0.5; exit $code' "$host" "$*"
"""


def ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


def why_not():
    """Why namespaces cannot be made here; "" where they can."""
    if os.getuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return "needs root, ip and unshare"
    name = f"nfprobe{os.getpid()}"
    made = ip("netns", "add", name, check=False)
    if made.returncode != 0:
        return f"ip netns add: {made.stderr.strip()}"
    ip("netns", "del", name)
    return ""


class TwoHosts:
    """Two namespaces on a bridge, in a network of their own that this process's number picks."""

    def __init__(self, folder):
        number = os.getpid() % 200
        self.network = f"10.{50 + os.getpid() // 200 % 200}.{number}"
        self.bridge = f"nfb{os.getpid()}"
        self.names = [f"nfa{os.getpid()}", f"nfb{os.getpid()}x"]
        self.agent = folder / "agent"
        self.agent.write_text(AGENT)
        self.agent.chmod(0o755)

    def __enter__(self):
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{self.network}.1/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        for number, name in enumerate(self.names, 11):
            ip("netns", "add", name)
            ip("link", "add", self.veth(number), "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", self.veth(number), "master", self.bridge, "up")
            ip("-n", name, "addr", "add", f"{self.network}.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_):
        for number, name in enumerate(self.names, 11):
            for process in ip("netns", "pids", name, check=False).stdout.split():
                os.kill(int(process), signal.SIGKILL)
            # A connection that was cut can keep the namespace, and the link into it, for minutes.
            ip("link", "del", self.veth(number), check=False)
            ip("netns", "del", name, check=False)
        ip("link", "del", self.bridge, check=False)

    def veth(self, number):
        return f"nfv{os.getpid()}{number}"

    def processes(self, name):
        return ip("netns", "pids", name).stdout.split()

    def environment(self):
        network = f"{self.network}.0/24"
        return dict(os.environ, NORMFORMER=PROGRAM, OMPI_MCA_plm_rsh_agent=str(self.agent), OMPI_MCA_btl="tcp,self",
                    OMPI_MCA_btl_tcp_if_include=network, OMPI_MCA_oob_tcp_if_include=network)


class Hosts(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        if reason := why_not():
            raise unittest.SkipTest(reason)
        cls.folder = Folder().__enter__()
        cls.hosts = TwoHosts(cls.folder.path).__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.hosts.__exit__()
        cls.folder.__exit__()

    def start(self, config, *options, slots=1):
        names = ",".join(f"{name}:{slots}" for name in self.hosts.names)
        return subprocess.Popen([ROOT / "launch" / "run", config, "-n", str(2 * slots), "--hosts", names, "--host-timeout",
                                 "20", "--restart-pause", "0.5", *map(str, options)], env=self.hosts.environment(),
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")

    def config(self, name, **changes):
        settings = dict(train__precision='"fp64"', train__updates=600, checkpoint__every=20, train__log_every=100)
        return self.folder.config(name, **{**settings, **changes})

    def finish(self, launch):
        text, _ = launch.communicate(timeout=240)
        return launch.returncode, text

    def attempts(self, name):
        text = (self.folder.path / name / "attempts.jsonl").read_text()
        return [line for line in map(json.loads, text.splitlines()) if line["event"] == "end"]

    def assert_same_losses(self, name, straight):
        ours, theirs = metrics(self.folder.path / name), metrics(self.folder.path / straight)
        self.assertEqual([line["update"] for line in ours], [line["update"] for line in theirs])
        for one, other in zip(ours, theirs):
            self.assertAlmostEqual(one["loss"], other["loss"], delta=1e-12 * abs(other["loss"]))

    def cut_after(self, name, update, host):
        """Takes a host's link down once a checkpoint of that update is there."""
        self.assertTrue(wait_until(lambda: max(checkpoints(self.folder.path / name), default=0) >= update, 120))
        ip("-n", host, "link", "set", "eth0", "down")

    def join(self, host):
        ip("-n", host, "link", "set", "eth0", "up")

    def test_ranks_on_two_hosts_train_as_on_one(self):
        run(["train", self.config("one", train__updates=30)], expect=0)
        code, text = self.finish(self.start(self.config("two", train__updates=30, parallel__tensor=2), slots=2))
        self.assertEqual(code, 0, text)
        self.assert_same_losses("two", "one")
        self.assertEqual(self.attempts("two")[0]["hosts"], [f"{name}:2" for name in self.hosts.names])

    def start_where_the_second_host_has(self, other, path, config, *options):
        """Runs launch/run where a mount namespace of its own gives the second host another file in a place."""
        agent = self.hosts.agent.read_text()
        try:
            self.hosts.agent.write_text(agent.replace(
                'exec ip', f'[ "$host" = {self.hosts.names[0]} ] || set -- "mount --bind {other} {path}; $*"\nexec ip')
                .replace("unshare --uts", "unshare --uts --mount"))
            return self.finish(self.start(config, *options))
        finally:
            self.hosts.agent.write_text(agent)

    def test_hosts_that_differ_are_named(self):
        config = self.config("differ", train__updates=3)
        other, overlay = self.folder.path / "other.toml", self.folder.path / "overlay.toml"
        other.write_text(config.read_text() + "\n")
        overlay.write_text("[train]\nlog_every = 2\n")
        for path in (config, overlay):
            code, text = self.start_where_the_second_host_has(other, path, config, "--", "--set", f"@{overlay}")
            self.assertEqual(code, 64, text)
            self.assertIn(f"{self.hosts.names[1]} has another configuration than {self.hosts.names[0]} in {path}", text)
            self.assertFalse((self.folder.path / "differ" / "attempts.jsonl").exists())

    def test_a_lost_host_is_named_and_waited_for(self):
        config = self.config("waits", train__updates=1000000)
        host = self.hosts.names[1]
        launch = self.start(config, "--max-restarts", 2, "--host-timeout", 5)
        try:
            self.cut_after("waits", 40, host)
            code, text = self.finish(launch)
        finally:
            self.join(host)
        self.assertEqual(code, 69, text)
        self.assertRegex(text, f"launch/run: {host} .*; giving up after 2 restarts")
        self.assertEqual(len(self.attempts("waits")), 1)
        self.assertTrue(wait_until(lambda: not self.hosts.processes(host)))

    def test_a_host_whose_daemon_dies_is_named(self):
        config = self.config("dies", train__updates=1000000)
        launch = self.start(config, "--max-restarts", 0)
        self.assertTrue(wait_until(lambda: checkpoints(self.folder.path / "dies"), 120))
        for process in self.hosts.processes(self.hosts.names[1]):
            if pathlib.Path(f"/proc/{process}/comm").read_text() == "orted\n":
                os.kill(int(process), signal.SIGKILL)
        code, text = self.finish(launch)
        self.assertEqual(code, 205, text)
        self.assertIn(f"lost {self.hosts.names[1]}: the job ended with 205", text)
        self.assertEqual(self.attempts("dies")[0]["lost_hosts"], [self.hosts.names[1]])

    def test_an_elastic_run_goes_on_without_a_lost_host(self):
        run(["train", self.config("straight")], expect=0, timeout=300)
        config = self.config("elastic", parallel__data=2, parallel__sharding='"parameters"')
        host = self.hosts.names[0]  # of rank 0, which publishes checkpoints
        launch = self.start(config, "--elastic", "--host-timeout", 5)
        try:
            self.cut_after("elastic", 60, host)
            code, text = self.finish(launch)
        finally:
            self.join(host)
        self.assertEqual(code, 0, text)
        self.assertRegex(text, f"launch/run: {host} .*: going on without, with 1 of 2 ranks")
        self.assertEqual([attempt["ranks"] for attempt in self.attempts("elastic")], [2, 1])
        self.assert_same_losses("elastic", "straight")


if __name__ == "__main__":
    unittest.main(verbosity=2)
