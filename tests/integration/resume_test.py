#!/usr/bin/env python3
"""A run stopped at a random step and resumed has the same bits in every later loss and in the final weights."""
import os
import random
import signal
import subprocess
import sys
import time
import unittest

from program import Folder, command, environment, losses, metrics, run

LAYOUTS = [(1, 1, 1, {}), (2, 2, 1, {}), (1, 1, 3, {"parallel__sharding": '"gradients"'}), (2, 1, 2, {}), (3, 1, 1, {}),
           (1, 2, 2, {"parallel__sharding": '"parameters"', "parallel__schedule": '"zb_v"', "model__layers": 5,
                      "train__recompute": '"full"', "train__recompute_layers": 1}),
           (2, 1, 1, {"parallel__context": 2, "parallel__sharding": '"parameters"'}),
           (1, 1, 4, {"parallel__sharding": '"parameters"', "parallel__shard_group": 2})]


def layout(tensor, pipeline, data):
    return dict(parallel__tensor=tensor, parallel__sequence="true" if tensor == 3 else "false",
                parallel__pipeline=pipeline, parallel__data=data)


def stop_at(config, ranks, folder, update):
    """Starts a run, stops it cleanly once its metrics show `update`, and returns its exit code."""
    process = subprocess.Popen(command(["train", config], ranks), env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        if any(line["update"] >= update for line in metrics(folder)):
            process.send_signal(signal.SIGUSR1)
            break
        time.sleep(0.005)
    return process.wait(timeout=100)


class Resume(unittest.TestCase):
    def check(self, folder, degrees, precision, updates, rng):
        tensor, pipeline, data, more = degrees
        ranks = tensor * pipeline * data * more.get("parallel__context", 1)
        settings = dict(layout(tensor, pipeline, data), **more, train__precision=f'"{precision}"', train__updates=updates,
                        metrics__gradient_norms_every=3, metrics__distributions_every=10)
        if precision.startswith("fp16"):  # falls, and rises until it overflows again
            settings.update(train__loss_scale_init=2.0**24, train__loss_scale_window=4)
        straight = folder.config("straight", **settings)
        run(["train", straight], ranks, expect=0)
        stopped = folder.config("stopped", **settings)
        wanted = rng.randrange(1, updates - 1)
        for _ in range(6):
            code = stop_at(stopped, ranks, folder.path / "stopped", wanted)
            if code != 0:
                break
            # On a busy machine the run may end before the signal comes: aim earlier.
            subprocess.run(["rm", "-rf", folder.path / "stopped"], check=True)
            wanted //= 2
        with self.subTest(layout=degrees, precision=precision, stopped=wanted):
            self.assertEqual(code, 75)
            self.assertLess(metrics(folder.path / "stopped")[-1]["update"], updates)
            run(["train", stopped, "--resume"], ranks, expect=0)
            self.assertEqual(losses(folder.path / "straight"), losses(folder.path / "stopped"))
            self.assertEqual((folder.path / "straight" / "statistics.jsonl").read_text(),
                             (folder.path / "stopped" / "statistics.jsonl").read_text())
            if precision.startswith("fp16"):
                overflows = [line["update"] for line in metrics(folder.path / "straight") if line.get("skipped")]
                self.assertGreater(sum(update > wanted for update in overflows), 0)
            for name in ("straight", "stopped"):
                run(["checkpoint", "export", folder.path / name, folder.path / f"{name}.safetensors", "--dtype",
                     "f64" if precision == "fp64" else "f32"], expect=0)
            self.assertEqual((folder.path / "straight.safetensors").read_bytes(),
                             (folder.path / "stopped.safetensors").read_bytes())
        for name in ("straight", "stopped"):
            subprocess.run(["rm", "-rf", folder.path / name], check=True)

    def test_same_bits(self):
        soak = os.environ.get("NORMFORMER_SOAK") == "1"
        seed = random.randrange(1 << 30) if soak else 7
        print("seed", seed)
        rng = random.Random(seed)
        with Folder() as folder:
            for degrees in LAYOUTS:
                for precision in ("fp32", "bf16", "fp64") if soak else (rng.choice(["fp32", "bf16"]),):
                    for _ in range(5 if soak else 1):
                        self.check(folder, degrees, precision, 60, rng)
            optimistic = {"optimizer__optimistic": "true", "optimizer__clip_norm": 0.6}
            self.check(folder, (1, 2, 2, dict(optimistic, parallel__schedule='"zb_h2"')), "bf16", 60, rng)
            self.check(folder, (1, 3, 1, dict(optimistic, parallel__schedule='"zb_h2"')), "fp16", 60, rng)
            for degrees, precision in (((2, 1, 1, {}), "fp16"), ((1, 2, 1, {}), "fp16_memory_efficient")):
                self.check(folder, degrees, precision, 60, rng)

    def test_optimistic_updates_have_the_bits_of_those_that_wait(self):
        def without(lines, *keys):
            return [{k: v for k, v in line.items() if k not in keys} for line in lines]

        with Folder() as folder:
            settings = dict(layout(1, 2, 1), parallel__schedule='"zb_h2"', train__updates=30, train__precision='"fp16"',
                            train__loss_scale_init=2.0**24, train__loss_scale_window=4, checkpoint__every=7)
            runs = {}
            for name, optimistic in (("waits", "false"), ("optimistic", "true")):
                run(["train", folder.config(name, **settings, optimizer__optimistic=optimistic)], 2, expect=0)
                runs[name] = metrics(folder.path / name)
            speeds = ("time", "elapsed", "peak_memory", "tokens_per_second", "flops_per_second", "compute_median",
                      "compute_max", "slowest_rank")
            self.assertEqual(without(runs["waits"], *speeds), without(runs["optimistic"], "redone", *speeds))
            steps = [line for line in runs["optimistic"] if line["kind"] == "step"]
            redone = sum(line.get("redone", False) for line in steps)
            self.assertGreater(redone, 0)
            log = (folder.path / "optimistic" / "log.txt").read_text()
            self.assertIn(f"{redone} of {len(steps)} updates were wrong", log)


if __name__ == "__main__":
    sys.exit(unittest.main(verbosity=2))
