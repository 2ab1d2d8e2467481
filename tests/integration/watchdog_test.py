#!/usr/bin/env python3
"""What a run says and does where a rank makes no progress, and what it tells those who watch from outside."""
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import time
import unittest

from program import WithCorpus, command, environment, losses, metrics, run

LIMIT = 3  # seconds without progress
BOUND = 60  # seconds in which a job must have ended: a bound, not a measurement


class Job:
    """A run under mpirun, or alone, on its way."""

    def __init__(self, folder, config, ranks):
        start = command(["train", config], ranks)
        if ranks > 1:
            start[1:1] = ["--mca", "odls_base_sigkill_timeout", "0"]
        self.folder, self.ranks = folder, ranks
        self.process = subprocess.Popen(start, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True, errors="replace")

    def wait_for(self, condition):
        deadline = time.monotonic() + BOUND
        while not condition() and time.monotonic() < deadline and self.process.poll() is None:
            time.sleep(0.02)
        if not condition():
            raise AssertionError(f"this never came to be; the job: {self.process.poll()}, {self.end()}")

    def wait_for_updates(self, count=3):
        self.wait_for(lambda: len(metrics(self.folder)) >= count)

    def ledger(self):
        return run(["ledger", self.folder, "--calls", 0], expect=0).out

    def processes(self):
        found = re.findall(r"^rank \d+ on \S+, process (\d+)", self.ledger(), re.MULTILINE)
        assert len(found) == self.ranks, found
        return [int(process) for process in found]

    def ask(self, number):
        """Sends a signal to all ranks by way of mpirun."""
        self.process.send_signal(number)

    def stop(self):
        """Has the run stopped cleanly. Returns stdout, stderr."""
        self.ask(signal.SIGUSR1)
        code, out, err = self.end()
        assert code == 75, (code, out, err)
        return out, err

    def end(self):
        """Waits for the job's own end. Returns exit status, stdout, stderr."""
        out, err = self.process.communicate(timeout=BOUND)
        return self.process.returncode, out, err


@contextlib.contextmanager
def job(folder, config, ranks):
    started = Job(folder, config, ranks)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.communicate()


def heartbeat(folder):
    path = pathlib.Path(folder) / "heartbeat.json"
    return json.loads(path.read_text()) if path.exists() else {}


def hang_reports(folder):
    return list(pathlib.Path(folder).glob("hang-*.txt"))


class Hangs(WithCorpus):
    def start(self, name, ranks, **changes):
        config = self.folder.config(name, **{"health__watchdog_seconds": LIMIT, "train__updates": 1000000, **changes})
        return job(self.folder.path / name, config, ranks)

    def check_report(self, started, victim):
        """The whole job ends; the report names the stopped rank, its last call and the functions of others."""
        folder = started.folder
        code, _, err = started.end()
        self.assertEqual(code, 76, err)
        self.assertRegex(err, rf"normformer: rank \d+ has made no progress for \d+\.\d s \(health\.watchdog_seconds is "
                              rf"{LIMIT}\), training after update \d+; the job ends")
        self.assertEqual(re.findall(r"^missing: (?:rank )?(\d+|nobody)", err, re.MULTILINE), [str(victim)], err)
        self.assertRegex(err, rf"(?m)^missing: rank {victim} on \S+, process \d+ \(stopped\), in update \d+.*; its last "
                              r"call, at [\d:.]+, was \w+ of \d+ bytes, .*(done|not done)$")
        self.assertIn(f"\nrank {victim} is stopped\n", err)
        reports = hang_reports(folder)
        self.assertEqual(len(reports), 1)
        text = reports[0].read_text()
        self.assertIn(text.splitlines()[0], err)
        for rank in range(started.ranks):
            self.assertRegex(text, rf"(?m)^rank {rank} on ")
            stacks = folder / f"stacks-rank-{rank:05}.txt"
            self.assertEqual(stacks.exists(), rank != victim)
            if rank != victim:
                self.assertRegex(stacks.read_text(), r" normformer::(Group|CommRequest)::\w+\(.* \(normformer\+0x")
                self.assertIn(" normformer::run_training(", stacks.read_text())
        self.assertIn(" normformer::run_training(", err)
        if victim != 0:
            self.assertEqual(heartbeat(folder)["state"], "hang")

    def stop_at_random(self, name, ranks, victim, **layout):
        with self.subTest(name=name, victim=victim):
            with self.start(f"{name}{victim}", ranks, **layout) as started:
                started.wait_for_updates()
                processes = started.processes()
                time.sleep(random.random() / 2)
                os.kill(processes[victim], signal.SIGSTOP)
                self.check_report(started, victim)

    def test_each_rank_of_a_tensor_group(self):
        for victim in range(3):
            self.stop_at_random("tensor", 3, victim, parallel__tensor=3)

    def test_each_stage_of_a_pipeline(self):
        for victim in range(2):
            self.stop_at_random("pipeline", 2, victim, parallel__pipeline=2)

    def test_each_of_four_ranks_along_two_axes(self):
        for victim in range(4):
            self.stop_at_random("axes", 4, victim, parallel__pipeline=2, parallel__data=2)

    def test_a_rank_inside_a_call_that_all_have_begun(self):
        with self.start("inside", 2, parallel__data=2) as started:
            started.wait_for_updates()
            victim = started.processes()[1]
            inside = re.compile(r"(?m)^ranks 0-1 wait in .*; begun by all$")
            outside = re.compile(r"; not begun by ")
            for _ in range(100):
                os.kill(victim, signal.SIGSTOP)
                time.sleep(0.2)  # for the other rank to come to where it waits
                text = started.ledger()
                if inside.search(text) and not outside.search(text):
                    break
                os.kill(victim, signal.SIGCONT)
                time.sleep(0.05)
            else:
                self.fail(f"the rank was never inside:\n{text}")
            self.assertIn("missing: rank 1 ", text)
            self.check_report(started, 1)

    # A pipe that nobody writes to: whoever opens it waits for ever, as on a disk that does not answer.
    def test_a_file_that_does_not_answer_before_the_first_update(self):
        folder = self.folder.path / "disk"
        folder.mkdir()
        os.mkfifo(folder / "metrics.jsonl")
        with self.start("disk", 2, parallel__data=2) as started:
            code, _, err = started.end()
        self.assertEqual(code, 76, err)
        self.assertRegex(err, r"normformer: rank \d has made no progress for .*, (loading|training) after update 0; the job ends")
        self.assertIn("missing: rank 0 ", err)
        self.assertIn("normformer::MetricsFile::MetricsFile(", (folder / "stacks-rank-00000.txt").read_text())

    def test_a_run_that_is_slow_or_stopped_as_a_whole_goes_on(self):
        with self.start("slow", 2, parallel__data=2) as started:
            started.wait_for_updates()
            first, second = started.processes()
            for _ in range(4):  # one rank at a time, for less than the limit, for longer than the limit in all
                os.kill(second, signal.SIGSTOP)
                time.sleep(LIMIT / 3)
                os.kill(second, signal.SIGCONT)
                time.sleep(0.1)
            for process in (first, second):
                os.kill(process, signal.SIGSTOP)
            time.sleep(1.5 * LIMIT)
            for process in (first, second):
                os.kill(process, signal.SIGCONT)
            updates = len(metrics(started.folder))
            started.wait_for(lambda: len(metrics(started.folder)) > updates)
            time.sleep(LIMIT / 2)
            started.stop()
        self.assertEqual(hang_reports(started.folder), [])
        self.assertEqual(heartbeat(started.folder)["state"], "stopped")

    def test_never_means_never(self):
        with self.start("never", 2, parallel__data=2, health__watchdog_seconds=0) as started:
            started.wait_for_updates()
            os.kill(started.processes()[1], signal.SIGSTOP)
            time.sleep(2 * LIMIT)
            self.assertIsNone(started.process.poll())


def checkpoints(folder):
    return sorted(path.name for path in (pathlib.Path(folder) / "checkpoints").glob("step-*"))


class Outside(WithCorpus):
    """What a run tells those outside, and what they can ask it for."""

    def start(self, name, ranks, **changes):
        config = self.folder.config(name, **{"train__updates": 1000000, "checkpoint__every": 0, **changes})
        return job(self.folder.path / name, config, ranks)

    def test_a_heartbeat_from_the_first_update_to_the_last(self):
        with self.start("beats", 2, parallel__data=2) as started:
            started.wait_for(lambda: heartbeat(started.folder).get("update", 0) > 0)
            first = heartbeat(started.folder)
            started.wait_for(lambda: heartbeat(started.folder)["update"] > first["update"])
            second = heartbeat(started.folder)
            self.assertEqual((first["state"], first["updates"]), ("running", 1000000))
            self.assertEqual(first["pid"], started.processes()[0])
            self.assertGreater(second["time"], first["time"])
            made = {line["update"]: line["loss"] for line in metrics(started.folder) if line["kind"] == "step"}
            self.assertEqual(first["loss"], made[first["update"]])
            os.kill(started.processes()[1], signal.SIGUSR1)  # one rank is enough
            code, _, err = started.end()
        self.assertEqual(code, 75, err)
        self.assertEqual((heartbeat(started.folder)["state"], heartbeat(started.folder)["phase"]), ("stopped", "ending"))
        self.assertNotIn("attempt", first)

    def test_a_heartbeat_says_how_a_run_ended(self):
        config = self.folder.config("ended")
        run(["train", config], expect=0)
        self.assertEqual(heartbeat(self.folder.path / "ended")["state"], "finished")
        self.assertEqual(heartbeat(self.folder.path / "ended")["update"], 12)
        config = self.folder.config("failed", optimizer__lr=1e30, train__max_skipped=1)
        run(["train", config], expect=77)
        self.assertEqual(heartbeat(self.folder.path / "failed")["state"], "failed")

    def test_one_request_is_one_checkpoint_and_changes_no_bit(self):
        for optimistic in ("false", "true"):
            layout = {"parallel__data": 2, "checkpoint__keep": 9, "optimizer__optimistic": optimistic}
            with self.subTest(optimistic=optimistic):
                with self.start(f"asked{optimistic}", 2, **layout) as asked:
                    asked.wait_for_updates()
                    for count in (1, 2):
                        asked.ask(signal.SIGUSR2)
                        asked.wait_for(lambda: len(checkpoints(asked.folder)) == count)
                        asked.wait_for_updates(len(metrics(asked.folder)) + 20)
                    out, _ = asked.stop()
                self.assertEqual(len(checkpoints(asked.folder)), 3, out)
                made = losses(asked.folder)
                with self.start(f"straight{optimistic}", 2, **layout) as straight:
                    straight.wait_for_updates(len(made))
                    straight.stop()
                self.assertEqual(len(checkpoints(straight.folder)), 1)
                self.assertEqual(made, losses(straight.folder)[:len(made)])

    # Each rank hears of its request at another moment; that is what counting them is for.
    def test_ranks_that_hear_of_one_request_at_different_moments_save_once(self):
        with self.start("apart", 3, parallel__data=3, train__global_batch=6, checkpoint__keep=9) as started:
            started.wait_for_updates()
            processes = started.processes()
            os.kill(processes[2], signal.SIGUSR2)
            started.wait_for(lambda: len(checkpoints(started.folder)) == 1)
            for process in processes[:2]:
                os.kill(process, signal.SIGUSR2)
                updates = len(metrics(started.folder))
                started.wait_for(lambda: len(metrics(started.folder)) > updates + 3)
            self.assertEqual(len(checkpoints(started.folder)), 1)
            out, _ = started.stop()
        self.assertEqual(len(checkpoints(started.folder)), 2, out)


if __name__ == "__main__":
    unittest.main(verbosity=2)
