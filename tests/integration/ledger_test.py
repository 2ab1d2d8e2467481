#!/usr/bin/env python3
"""What ranks leave in their run's folder: who is missing while one is stopped, and after it was killed."""
import os
import re
import signal
import subprocess
import time
import unittest

from program import WithCorpus, command, environment, metrics, run


def ledger(folder):
    return run(["ledger", folder, "--calls", 6], expect=0).out


def missing(text):
    return re.findall(r"^missing: (?:rank )?(\d+|nobody)", text, re.MULTILINE)


class Ledger(WithCorpus):
    def stop(self, process, run_folder, rank):
        """Stops a rank where others have to wait for it: not inside a call that all have begun, where it is named, too,
        but by its process's state."""
        waits = re.compile(rf"(?m)^ranks? .* waits? in .*, in [\w. ]+; not begun by rank {rank}$")
        for _ in range(60):
            os.kill(process, signal.SIGSTOP)
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                text = ledger(run_folder)
                if missing(text) == [str(rank)] and waits.search(text):
                    return text
                time.sleep(0.05)
            os.kill(process, signal.SIGCONT)
            time.sleep(0.1)
        self.fail(f"rank {rank} was never named:\n{text}")

    def check(self, name, ranks, victim, **layout):
        config = self.folder.config(name, train__updates=1000000, **layout)
        run_folder = self.folder.path / name
        job = subprocess.Popen(command(["train", config], ranks), env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 60
            while not metrics(run_folder) and time.monotonic() < deadline:
                time.sleep(0.05)
            found = re.findall(r"^rank (\d+) on \S+, process (\d+), in update \d+", ledger(run_folder), re.MULTILINE)
            self.assertEqual([int(rank) for rank, _ in found], list(range(ranks)))
            text = self.stop(int(found[victim][1]), run_folder, victim)
            self.assertIn(f"\nrank {victim} is stopped\n", text)
            process = found[victim][1]
            self.assertIn(f"process {process} (stopped), in update", text)
            self.assertEqual(text.count("(stopped)"), 2)  # in its own line and as missing
            os.kill(int(process), signal.SIGKILL)
            self.assertNotEqual(job.wait(timeout=60), 0)
        finally:
            if job.poll() is None:
                job.kill()
        text = ledger(run_folder)
        self.assertEqual(missing(text), [str(victim)])
        self.assertIn(f"process {process} (not running), in update", text)

    def test_a_stopped_and_killed_rank_of_a_tensor_group(self):
        self.check("tensor", 3, 1, parallel__tensor=3)

    def test_a_stopped_and_killed_stage_of_a_pipeline(self):
        self.check("pipeline", 2, 1, parallel__pipeline=2)

    def test_a_run_that_has_ended_waits_for_nobody(self):
        config = self.folder.config("ended", parallel__data=2)
        run(["train", config], 2, expect=0)
        text = ledger(self.folder.path / "ended")
        self.assertEqual(text.count("has ended in good order"), 2)
        self.assertEqual(missing(text), ["nobody"])
        self.assertNotIn("NOT DONE", text)
        self.assertIn("reduce_scatter of", run(["ledger", self.folder.path / "ended", "--calls", 256], expect=0).out)
        run(["train", config, "--resume", "--set", "train.updates=13", "--set", "parallel.data=1"], expect=0)
        self.assertIn("1 of 1 ranks", ledger(self.folder.path / "ended"))

    def test_damage_gets_one_sentence(self):
        run(["train", self.folder.config("damaged", train__updates=1)], expect=0)
        path = self.folder.path / "damaged" / "ledger" / "rank-00000.ledger"
        whole = path.read_bytes()
        for bytes_, sentence in ((whole[:-1], "is damaged"), (b"", "is no ledger"), (b"x" + whole[1:], "is no ledger"),
                                 (whole[:8] + b"\x09" + whole[9:], "its version is 9")):
            path.write_bytes(bytes_)
            outcome = run(["ledger", self.folder.path / "damaged"], expect=65)
            self.assertEqual(len(outcome.sentences()), 1, outcome.err)
            self.assertIn(sentence, outcome.err)
            self.assertEqual(outcome.out, "")
        outcome = run(["ledger", self.folder.path], expect=65)
        self.assertEqual(len(outcome.sentences()), 1, outcome.err)


if __name__ == "__main__":
    unittest.main(verbosity=2)
