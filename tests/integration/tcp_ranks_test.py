#!/usr/bin/env python3
"""Ranks that no mpirun started: they meet by what the environment says, and talk over TCP."""
import signal
import socket
import subprocess
import time
import unittest

from program import Folder, Outcome, command, environment, losses, metrics, run

LAUNCHERS = ("OMPI_", "PMI_", "PMIX_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "NORMFORMER_RENDEZVOUS")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torch_settings(rank, size, port):
    return {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def start(arguments, settings):
    bare = {key: value for key, value in environment().items() if not key.startswith(LAUNCHERS)}
    return subprocess.Popen(command(arguments), env=bare | {key: str(value) for key, value in settings.items()},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")


def finish(processes, timeout=120):
    """What each has said and returned; none outlives its time."""
    outcomes = []
    try:
        for process in processes:
            process.stdout, process.stderr = process.communicate(timeout=timeout)
            outcomes.append(Outcome(process))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return outcomes


class TcpRanks(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Folder().__enter__()
        run(["train", cls.folder.config("mpi")], 2, expect=0)

    @classmethod
    def tearDownClass(cls):
        cls.folder.__exit__()

    def expect_same_run(self, name, settings):
        config = self.folder.config(name)
        outcomes = finish([start(["train", config], settings(rank)) for rank in range(2)])
        for outcome in outcomes:
            self.assertEqual(outcome.code, 0, outcome.err)
        self.assertEqual(outcomes[1].out, "")
        self.assertTrue(losses(self.folder.path / name))
        self.assertEqual(losses(self.folder.path / name), losses(self.folder.path / "mpi"))

    def test_torchruns_variables(self):
        port = free_port()
        self.expect_same_run("torch", lambda rank: torch_settings(rank, 2, port))

    def test_slurms_variables_and_a_shared_file(self):
        meeting = self.folder.path / "meeting"
        self.expect_same_run("slurm", lambda rank: {
            "SLURM_PROCID": rank, "SLURM_NTASKS": 2, "SLURM_LOCALID": rank, "SLURM_JOB_ID": 17,
            "NORMFORMER_RENDEZVOUS": f"file://{meeting}"})
        self.assertFalse(meeting.exists())

    def test_a_killed_rank_ends_the_others(self):
        config = self.folder.config("killed", train__updates=100000, parallel__tensor=3)
        port = free_port()
        processes = [start(["train", config], torch_settings(rank, 3, port)) for rank in range(3)]
        while not metrics(self.folder.path / "killed") and processes[0].poll() is None:
            time.sleep(0.02)
        processes[1].send_signal(signal.SIGKILL)
        outcomes = finish(processes, timeout=20)
        for rank in (0, 2):
            self.assertEqual(outcomes[rank].code, 70, outcomes[rank].err)
            self.assertIn("rank 1 (host", outcomes[rank].err)
            self.assertIn("closed its connection", outcomes[rank].err)

    def test_a_mistake_that_all_ranks_know_of_is_said_once(self):
        config = self.folder.config("mistake", parallel__tensor=5)
        port = free_port()
        outcomes = finish([start(["train", config], torch_settings(rank, 2, port)) for rank in range(2)])
        self.assertEqual([outcome.code for outcome in outcomes], [64, 64], outcomes[0].err)
        self.assertEqual(sum(len(outcome.sentences()) for outcome in outcomes), 1)

    def test_incomplete_settings_end_with_a_sentence(self):
        config = self.folder.config("incomplete")
        outcome, = finish([start(["train", config], {"RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1})])
        self.assertEqual(outcome.code, 64)
        self.assertIn("RANK is set, but WORLD_SIZE is not", outcome.err)
        self.assertEqual(len(outcome.sentences()), 1, outcome.err)


if __name__ == "__main__":
    unittest.main()
