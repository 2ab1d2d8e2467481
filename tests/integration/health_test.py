#!/usr/bin/env python3
"""What a run watches itself for: spikes that it goes back behind, and ranks that compute slowly."""
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import unittest

from program import WithCorpus, command, environment, losses, metrics, run

SPIKY = {"train__updates": 60, "health__spike_zscore": 6.0, "health__spike_window": 16, "checkpoint__every": 8,
         "checkpoint__keep": 100, "health__max_rollbacks": 1000, "optimizer__lr": 0.01}


def even_text():
    """Documents that are easily learnt, and one, a spike then, that cannot be."""
    rng = random.Random(5)
    words = [["the", "a"], ["red", "old", "small"], ["cat", "house", "tree"], ["sees", "likes"], ["you", "me"]]
    easy = [" ".join(" ".join(rng.choice(some) for some in words) + "." for _ in range(8)) for _ in range(200)]
    easy[40] = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(60))
    return "\n\n".join(easy)


def steps(lines):
    return [line for line in lines if line["kind"] == "step"]


def rollbacks(lines):
    return [line for line in lines if line["kind"] == "rollback"]


def log(folder):
    return (folder / "log.txt").read_text()


class GoingBack(WithCorpus):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        text = cls.folder.path / "even.txt"
        text.write_text(even_text())
        run(["prepare", text, "--documents", "blank-lines", "--output", cls.folder.path / "even", "--train-vocab", 300],
            expect=0)

    def config(self, name, **settings):
        train = next(self.folder.path.glob("even*.bin")).with_suffix("")
        return self.folder.config(name, **dict({"data__train": f'"{train}"', "data__valid": "[]"}, **settings))

    def path(self, name):
        return self.folder.path / name

    def weights(self, name):
        file = self.path(f"{name}.safetensors")
        run(["checkpoint", "export", self.path(name), file, "--dtype", "f32"], expect=0)
        return file.read_bytes()

    def resumed_from(self, name, keep, settings, ranks):
        """A copy of a run's folder with the checkpoints that `keep` (of an update) is true for, resumed to its end."""
        copy = self.path(f"{name}_resumed")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.path(name), copy)
        for checkpoint in (copy / "checkpoints").glob("step-*"):
            if not keep(int(checkpoint.name.split("-")[1])):
                shutil.rmtree(checkpoint)
        run(["train", self.config(copy.name, **settings), "--resume"], ranks, expect=0)
        return copy

    def check(self, name, ranks, **settings):
        settings = dict(SPIKY, **settings, health__on_spike='"rollback"')
        run(["train", self.config(name, **settings)], ranks, expect=0)
        lines = metrics(self.path(name))
        back = rollbacks(lines)
        with self.subTest(name=name, rollbacks=[(line["from_update"], line["update"]) for line in back]):
            self.assertGreater(len(back), 0)
            # Batches are never taken twice; a spike's number is the rollback's, whose updates are a checkpoint's.
            batches = [line["batch"] for line in steps(lines)]
            self.assertEqual(batches, list(range(1, len(batches) + 1)))
            for line in back:
                spike = steps(lines)[line["batch"] - 1]
                self.assertEqual((spike["reason"], spike["skipped"], spike["spike"]), ("spike", True, True))
                self.assertEqual(spike["update"], line["from_update"])
                self.assertEqual(line["update"] % 8, 0)
                self.assertLessEqual(line["update"], line["from_update"])
                following = steps(lines)[line["batch"]:]
                if following and not following[0]["skipped"]:
                    self.assertEqual(following[0]["update"], line["update"] + 1)
                self.assertIn(f"went back from update {line['from_update']} to ", log(self.path(name)))
            self.assertEqual(lines[-1]["update"], 60)
            self.resume_everywhere(name, ranks, settings, back)
        return lines

    def resume_everywhere(self, name, ranks, settings, back):
        """Behind the last rollback, and before the first, which is then made again."""
        saved = sorted(int(p.name.split("-")[1]) for p in self.path(name).glob("checkpoints/step-*"))
        before = max([u for u in saved if u <= back[0]["update"]], default=None)
        behind = min(u for u in saved if u > back[-1]["update"])
        for newest in {before, behind} - {None}:
            copy = self.resumed_from(name, lambda update, newest=newest: update <= newest, settings, ranks)
            self.assertEqual(losses(copy), losses(self.path(name)), newest)
            self.assertEqual(self.weights(copy.name), self.weights(name))

    def test_behind_a_spike(self):
        lines = self.check("one", 1)
        self.check("data", 2, parallel__data=2)
        optimistic = self.check("optimistic", 1, optimizer__optimistic="true")
        keys = ("kind", "batch", "update", "tokens", "loss", "gradient_norm", "lr", "reason", "from_update")
        self.assertEqual([[line.get(k) for k in keys] for line in lines],
                         [[line.get(k) for k in keys] for line in optimistic])
        pipeline = {"parallel__pipeline": 2, "parallel__data": 2, "parallel__schedule": '"zb_h2"'}
        self.check("pipeline", 4, **pipeline, train__precision='"bf16"')

    def test_to_the_initial_weights_where_nothing_was_saved(self):
        settings = dict(SPIKY, checkpoint__every=0, health__on_spike='"rollback"', health__max_rollbacks=1000)
        run(["train", self.config("unsaved", **settings)], expect=0)
        back = rollbacks(metrics(self.path("unsaved")))
        self.assertGreater(len(back), 0)
        self.assertEqual([(line["update"], line["tokens"], line["first_left_out"]) for line in back],
                         [(0, 0, 1)] * len(back))
        self.assertIn("the initial weights, there being no checkpoint", log(self.path("unsaved")))

    def test_skipping_and_telling(self):
        for policy, name in (('"skip"', "skips"), ('"log"', "tells")):
            run(["train", self.config(name, **SPIKY, health__on_spike=policy)], expect=0)
            lines = steps(metrics(self.path(name)))
            spikes = [line for line in lines if line.get("spike")]
            self.assertGreater(len(spikes), 0)
            self.assertEqual([line["skipped"] for line in spikes], [policy == '"skip"'] * len(spikes))
            self.assertEqual(log(self.path(name)).count(" is a spike: loss "), len(spikes))
            self.assertEqual(len(lines), 60 + (len(spikes) if policy == '"skip"' else 0))
        self.assertIn("SKIPPED: spike", log(self.path("skips")))

    def test_the_run_ends_where_going_back_does_not_help(self):
        settings = {"optimizer__lr": 1e37, "optimizer__warmup_updates": 0, "health__on_nonfinite": '"rollback"',
                    "health__max_rollbacks": 2}
        for ranks, more in ((1, {}), (2, {"parallel__data": 2, "optimizer__optimistic": "true"})):
            outcome = run(["train", self.config(f"diverges{ranks}", **settings, **more)], ranks, expect=77)
            self.assertIn("went back 2 times without coming to a new checkpoint", outcome.err)
            back = rollbacks(metrics(self.path(f"diverges{ranks}")))
            self.assertEqual([line["reason"] for line in back], ["nonfinite"] * 2)

    def test_overflows_of_a_scaled_loss_are_skipped_all_the_same(self):
        run(["train", self.config("overflows", train__precision='"fp16"', train__loss_scale_init=2.0**24,
                                         health__on_nonfinite='"rollback"')], expect=0)
        lines = metrics(self.path("overflows"))
        self.assertEqual({line["reason"] for line in steps(lines) if line["skipped"]}, {"overflow"})
        self.assertEqual(rollbacks(lines), [])


def process_of_rank(rank, folder):
    """The process whose environment says that it is that rank of the run in `folder`."""
    for entry in pathlib.Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or str(folder).encode() not in (entry / "cmdline").read_bytes():
                continue
            if f"OMPI_COMM_WORLD_RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except OSError:
            continue
    return None


class Stragglers(WithCorpus):
    def test_a_rank_that_is_stopped_now_and_then_is_named(self):
        name = self.folder.path / "slow"
        config = self.folder.config("slow", parallel__data=3, train__updates=100000, train__global_batch=6,
                                    data__valid="[]", train__log_every=100000)
        process = subprocess.Popen(command(["train", config], 3), env=environment(), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        ended = threading.Event()
        slow = 1

        def hold_back():
            victim = None
            while not ended.is_set():
                victim = victim or (process_of_rank(slow, config) if metrics(name) else None)
                if victim is None:
                    time.sleep(0.05)
                    continue
                os.kill(victim, signal.SIGSTOP)
                time.sleep(0.02)
                os.kill(victim, signal.SIGCONT)
                time.sleep(0.005)

        thread = threading.Thread(target=hold_back)
        thread.start()
        named = f"rank {slow} on host "
        try:
            deadline = time.monotonic() + 200
            while time.monotonic() < deadline and process.poll() is None:
                if (name / "log.txt").exists() and named in log(name):
                    break
                time.sleep(0.1)
        finally:
            ended.set()
            thread.join()
            process.send_signal(signal.SIGUSR1)
            code = process.wait(timeout=100)
        self.assertEqual(code, 75)
        self.assertRegex(log(name), named + r"\S+ computes \d+\.\d times as long as the median .* over the last 32 steps")
        line = steps(metrics(name))[-1]
        self.assertIn(line["slowest_rank"], (0, 1, 2))
        self.assertGreaterEqual(line["compute_max"], line["compute_median"])


class Explosions(WithCorpus):
    RISING = {"train__updates": 400, "optimizer__lr": 20.0, "optimizer__warmup_updates": 400, "health__explosion_rise": 1.0,
              "train__log_every": 1000, "checkpoint__every": 3, "optimizer__clip_norm": 0.0}

    def explode(self, name, ranks=1, options=(), **settings):
        """A run with a rising learning rate; its lines, without times, the last of which is the explosion's."""
        run(["train", self.folder.config(name, **dict(self.RISING, **settings)), *options], ranks, expect=0)
        lines = [{key: value for key, value in line.items() if key != "time"}
                 for line in metrics(self.folder.path / name)]
        self.assertEqual([line["kind"] for line in lines[-2:]], ["step", "explosion"])
        return lines

    def check_rise(self, lines):
        """The rule of docs/health.md, computed anew from the losses."""
        made = [line["loss"] for line in lines if line["kind"] == "step"]
        means = [sum(made[at - 5:at]) / 5 for at in range(5, len(made) + 1)]
        rises = [mean - min(means[:at + 1]) for at, mean in enumerate(means)]
        self.assertTrue(all(rise < 1.0 for rise in rises[:-1]))
        self.assertGreaterEqual(rises[-1], 1.0)

    def test_a_rising_rate_ends_in_good_order(self):
        lines = self.explode("rises")
        self.check_rise(lines)
        end = lines[-1]
        self.assertEqual((end["reason"], end["batch"]), ("rise", end["update"]))
        self.assertAlmostEqual(end["lr"], 0.05 * end["update"], places=9)
        self.assertEqual(end["loss"], lines[-2]["loss"])
        said = log(self.folder.path / "rises").splitlines()[-1]
        self.assertIn(f"exploded after update {end['update']} at lr {end['lr']:.4g}: ", said)
        self.assertNotIn("validation", {line["kind"] for line in lines})

    def test_a_resumed_run_explodes_where_the_whole_one_does(self):
        whole = losses(self.folder.path / "whole") if self.explode("whole") else []
        saved = sorted((self.folder.path / "whole/checkpoints").glob("step-*"))
        for newest in saved[1:]:
            shutil.rmtree(newest)
        self.explode("whole", options=["--resume"])
        self.assertEqual(losses(self.folder.path / "whole"), whole)

    def test_layouts_and_optimistic_updates_explode_alike(self):
        one = self.explode("one")[-1]
        for ranks, name, settings in ((2, "two", {"parallel__data": 2}), (1, "optimistic", {"optimizer__optimistic": "true"})):
            other = self.explode(name, ranks, **settings)[-1]
            self.assertEqual((other["update"], other["reason"]), (one["update"], one["reason"]))

    def test_what_is_not_finite_explodes(self):
        end = self.explode("nonfinite", optimizer__lr=1e37, optimizer__warmup_updates=0)[-1]
        self.assertEqual((end["reason"], end["loss"]), ("nonfinite", None))

    def test_a_spent_loss_scale_explodes(self):
        end = self.explode("spent", train__precision='"fp16"', train__loss_scale_init=2.0**40,
                           train__loss_scale_min=2.0**39)[-1]
        self.assertEqual((end["reason"], end["update"]), ("loss_scale", 0))


if __name__ == "__main__":
    sys.exit(unittest.main(verbosity=2))
