#!/usr/bin/env python3
"""Disks that are full or read-only while a run saves: it goes on or stops, as told, and loses no checkpoint."""
import contextlib
import subprocess
import time
import unittest

from program import WithCorpus, command, environment, losses, metrics, run


def mount(*arguments):
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)


@contextlib.contextmanager
def small_disk(at, kib):
    at.mkdir(parents=True, exist_ok=True)
    outcome = mount("-t", "tmpfs", "-o", f"size={kib}k", "none", at)
    if outcome.returncode != 0:
        raise unittest.SkipTest(f"no file system can be mounted here: {outcome.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", at], check=True)


def names(run_folder):
    return sorted(path.name for path in (run_folder / "checkpoints").iterdir())


class Disks(WithCorpus):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        run(["train", cls.folder.config("size", train__updates=1)], expect=0)
        files = (cls.folder.path / "size" / "checkpoints" / "step-0000000001").iterdir()
        cls.checkpoint_kib = sum(path.stat().st_size + 4095 for path in files) // 1024

    def settings(self, **more):
        return dict(**{"train__updates": 12, "checkpoint__every": 4, "parallel__data": 2, "checkpoint__keep": 9, **more})

    def test_a_full_disk_does_not_end_a_run_and_loses_nothing(self):
        run(["train", self.folder.config("straight", **self.settings())], 2, expect=0)
        config = self.folder.config("full", **self.settings())
        run_folder = self.folder.path / "full"
        with small_disk(run_folder / "checkpoints", int(1.6 * self.checkpoint_kib)) as disk:
            outcome = run(["train", config], 2, expect=74)
            self.assertRegex(outcome.err, r"no checkpoint was saved after update 8: rank \d: cannot .*No space left on device"
                                          r".*; earlier ones are as they were")
            self.assertIn("its last updates are in no checkpoint", outcome.err)
            self.assertEqual(metrics(run_folder)[-1]["update"], 12)
            self.assertEqual(names(run_folder), ["step-0000000004"])
            run(["checkpoint", "verify", run_folder], expect=0)
            self.assertEqual(mount("-o", "remount,size=64m", disk).returncode, 0)
            run(["train", config, "--resume"], 2, expect=0)
            self.assertEqual(names(run_folder), ["step-0000000004", "step-0000000008", "step-0000000012"])
        self.assertEqual(losses(self.folder.path / "straight"), losses(run_folder))

    def test_a_full_disk_ends_a_run_that_is_told_so(self):
        config = self.folder.config("stops", **self.settings(checkpoint__on_failure='"stop"'))
        run_folder = self.folder.path / "stops"
        with small_disk(run_folder / "checkpoints", int(1.6 * self.checkpoint_kib)):
            outcome = run(["train", config], 2, expect=74)
            self.assertEqual(len(outcome.sentences()), 1, outcome.err)
            self.assertIn("no checkpoint was saved after update 8", outcome.err)
            self.assertEqual(names(run_folder), ["step-0000000004"])

    def test_a_disk_that_becomes_read_only(self):
        config = self.folder.config("ro", **self.settings(train__updates=400))
        run_folder = self.folder.path / "ro"
        with small_disk(run_folder / "checkpoints", 65536) as disk:
            job = subprocess.Popen(command(["train", config], 2), env=environment(), stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
            deadline = time.monotonic() + 60
            while not any(name.startswith("step-") for name in names(run_folder)) and time.monotonic() < deadline:
                time.sleep(0.01)
            while mount("-o", "remount,ro", disk).returncode != 0 and job.poll() is None:
                time.sleep(0.001)
            kept = [name for name in names(run_folder) if name.startswith("step-")]
            _, err = job.communicate(timeout=120)
            self.assertEqual(job.returncode, 74, err)
            self.assertIn("Read-only file system", err)
            self.assertEqual(metrics(run_folder)[-1]["update"], 400)
            self.assertEqual([name for name in names(run_folder) if name.startswith("step-")], kept)
            run(["checkpoint", "verify", run_folder], expect=0)

    def test_a_read_only_target_is_told_before_training(self):
        with small_disk(self.folder.path / "target", 4096) as disk:
            self.assertEqual(mount("-o", "remount,ro", disk).returncode, 0)
            config = self.folder.config("readonly", checkpoint__folder=f'"{disk}/run"', parallel__data=2)
            outcome = run(["train", config], 2, expect=74)
            self.assertEqual(len(outcome.sentences()), 1, outcome.err)
            self.assertIn("Read-only file system", outcome.err)
            self.assertNotIn("update 1/", outcome.out)


if __name__ == "__main__":
    unittest.main(verbosity=2)
