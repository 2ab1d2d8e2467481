#!/usr/bin/env python3
"""Runs killed at random moments, a third of them while a checkpoint is written, lose nothing that was reported as saved,
and end with the bits of a run that was never killed.

NORMFORMER_SOAK=1 kills 300 times instead of 10, with a seed of its own; NORMFORMER_KILLS and NORMFORMER_SEED say
otherwise.
"""
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import unittest

from program import PROGRAM, ROOT, Folder, checkpoints, environment, last_update, losses, rank_processes, run, weights

sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "launch"))

from supervisor.codes import FINAL  # noqa: E402

LAYOUTS = [dict(parallel__tensor=3), dict(parallel__pipeline=3), dict(parallel__data=3),
           dict(parallel__data=3, parallel__sharding='"parameters"'), dict(parallel__tensor=2),
           dict(parallel__context=3, parallel__sharding='"gradients"'),
           dict(parallel__pipeline=2, parallel__schedule='"zb_h1"')]
UPDATES = 300
EVERY = 4


def parent_of(process):
    with open(f"/proc/{process}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


class KilledRun:
    """A run that is started again and again, and killed each time, until it is through."""

    def __init__(self, folder, name, settings, rng):
        self.folder = folder.path / name
        self.config = folder.config(name, **settings)
        self.rng = rng
        self.ranks = 1
        for axis in ("tensor", "pipeline", "data", "context"):
            self.ranks *= settings.get(f"parallel__{axis}", 1)
        self.reported = 0  # the newest update of which a rank has said that it is saved
        self.newest = 0
        self.attempts = 0

    def start(self):
        self.attempts += 1
        return subprocess.Popen([ROOT / "launch" / "run", self.config, "-n", str(self.ranks), "--max-restarts", "0", "--",
                                 "--resume"], env=dict(environment(), NORMFORMER=PROGRAM), stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE, text=True, errors="replace")

    def poll(self, launch, condition, seconds):
        """Waits until the condition holds, the time is over or the run has ended; whether it goes on."""
        deadline = time.monotonic() + seconds
        while launch.poll() is None:
            if condition() or time.monotonic() >= deadline:
                return True
            time.sleep(0.0005)
        return False

    def is_saving(self):
        return any(name.startswith(".tmp-") for name in os.listdir(self.folder / "checkpoints"))

    def wait_for_ranks(self, launch):
        """The processes of the ranks; fewer than all where the run has ended meanwhile."""
        found = {}

        def all_are_there():
            found.update(rank_processes(self.config))
            return len(found) == self.ranks

        self.poll(launch, all_are_there, 60)
        return found

    def wait_for_the_moment(self, launch):
        """Waits until a random moment: in a save, behind some updates, or at any time from the start on."""
        kind = self.rng.choice(["save", "update", "time"])
        if kind == "save":
            self.poll(launch, self.is_saving, 60)
            time.sleep(self.rng.choice([0, 0.001, 0.002, 0.004]))
        elif kind == "update":
            wanted = self.newest + self.rng.randrange(1, 40)
            self.poll(launch, lambda: last_update(self.folder) >= wanted, 60)
        else:
            self.poll(launch, lambda: False, self.rng.uniform(0, 0.5))
        return kind

    def kill(self, processes):
        """Kills one rank; sometimes all, or mpirun."""
        ranks = list(processes.values())
        chance = self.rng.random()
        try:
            if chance < 0.1:
                victims = [parent_of(ranks[0])]
            else:
                victims = ranks if chance < 0.2 else [self.rng.choice(ranks)]
            for process in victims:
                os.kill(process, signal.SIGKILL)
        except (OSError, IndexError):
            pass  # the run has ended meanwhile

    def attempt(self):
        """Starts the run, kills it, and returns its exit code, the kind of moment and what launch/run said."""
        launch = self.start()
        processes = self.wait_for_ranks(launch)
        kind = self.wait_for_the_moment(launch)
        self.kill(processes)
        _, said = launch.communicate(timeout=120)
        return launch.returncode, kind, said

    def read_reports(self):
        """Updates of which the last attempt has said that they are saved."""
        path = self.folder / "logs" / f"attempt-{self.attempts:03}" / "rank.0"
        text = path.read_text(errors="replace") if path.exists() else ""
        return [int(update) for update in re.findall(r"saved a checkpoint after update (\d+)\n", text)]


class Killed(unittest.TestCase):
    def check_attempt(self, killed, code, said):
        """Nothing that was there, or was reported, may be lost; what is left half-written is one save at most."""
        self.assertTrue(code == 0 or code not in FINAL, said)  # a supervisor would start it again
        killed.reported = max([killed.reported, *killed.read_reports()])
        newest = max(checkpoints(killed.folder), default=0)
        self.assertGreaterEqual(newest, killed.reported, said)
        self.assertGreaterEqual(newest, killed.newest, said)
        killed.newest = newest
        names = os.listdir(killed.folder / "checkpoints")
        self.assertLessEqual(sum(name.startswith(".tmp-") for name in names), 1, names)

    def check_end(self, killed, straight):
        self.assertEqual(losses(killed.folder), losses(straight))
        self.assertEqual(weights(killed.folder), weights(straight))
        names = os.listdir(killed.folder / "checkpoints")
        self.assertFalse([name for name in names if name.startswith((".tmp-", ".del-"))], names)

    def straight(self, folder, at):
        """The folder of a layout's undisturbed run."""
        name = f"straight{at}"
        if not (folder.path / name).exists():
            config = folder.config(name, **self.settings(at))
            run(["train", config], KilledRun(folder, name, self.settings(at), None).ranks, expect=0, timeout=600)
        return folder.path / name

    def settings(self, at):
        return dict(LAYOUTS[at], train__updates=UPDATES, checkpoint__every=EVERY, train__log_every=UPDATES,
                    model__length=8, train__valid_sequences=4)

    def test_killed_runs(self):
        soak = os.environ.get("NORMFORMER_SOAK") == "1"
        kills = int(os.environ.get("NORMFORMER_KILLS", "300" if soak else "10"))
        seed = int(os.environ.get("NORMFORMER_SEED", random.randrange(1 << 30) if soak else 11))
        print(f"{kills} kills, seed {seed}", flush=True)
        rng = random.Random(seed)
        done = {"save": 0, "update": 0, "time": 0}
        begun, series = time.monotonic(), 0
        with Folder() as folder:
            while sum(done.values()) < kills:
                at = rng.randrange(len(LAYOUTS)) if soak else (3, 0, 1)[series % 3]
                straight = self.straight(folder, at)
                killed = KilledRun(folder, f"killed{series}", self.settings(at), rng)
                code, left = 137, min(8 if soak else 4, kills - sum(done.values()))
                while code != 0 and left > 0:
                    code, kind, said = killed.attempt()
                    self.check_attempt(killed, code, said)
                    if code != 0:
                        done[kind] += 1
                        left -= 1
                if code != 0:
                    launch = killed.start()
                    _, said = launch.communicate(timeout=600)
                    self.assertEqual(launch.returncode, 0, said)
                self.check_end(killed, straight)
                shutil.rmtree(killed.folder)
                killed.folder.with_name(f"{killed.folder.name}.safetensors").unlink()
                series += 1
        print(f"killed {done} in {series} runs, {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    unittest.main(verbosity=2)
