#!/usr/bin/env python3
"""Trainings on a GPU against the same on the CPU, against themselves, and over ranks that share the GPU.

Each test prints a line "figures: ..." with the largest differences that it saw. Skipped where there is no GPU.
NORMFORMER_TEST_TINY=1 takes sizes for a build that emulates the GPU.
"""
import math
import os
import subprocess
import sys
import unittest

from program import PROGRAM, Folder, environment, losses, metrics, run

TINY = os.environ.get("NORMFORMER_TEST_TINY") == "1"
LIMIT = 900  # seconds of one training

# Largest relative differences of losses and of gradient norms. Both sides round each product and sum, in different
# orders; in bf16 that is 2^-9 for each number, of which a mean over thousands of tokens keeps little.
TOLERANCE = {"fp64": (1e-9, 1e-9), "fp32": (1e-4, 1e-3), "bf16": (5e-3, 5e-2)}

NORMFORMER = {"model__head_scale": '"paper"', "model__post_attention_norm": "true", "model__ffn_norm": "true",
              "model__residual_scale": "true"}
BASELINE = {"model__head_scale": '"none"', "model__post_attention_norm": "false", "model__ffn_norm": "false",
            "model__residual_scale": "false"}
SHORT = {"train__updates": 5, "train__global_batch": 4, "train__micro_batch": 2, "train__valid_sequences": 4,
         "optimizer__lr": 6e-4, "optimizer__warmup_updates": 1, "device__threads": 0}
if TINY:
    SIZE_125M = {"model__layers": 2, "model__width": 24, "model__heads": 3, "model__length": 16, **SHORT}
    SIZE_1300M = {"model__layers": 1, "model__width": 64, "model__heads": 2, "model__length": 32, **SHORT}
    SIZE_LAYOUTS = {"model__layers": 2, "model__width": 24, "model__heads": 3, "model__length": 16, **SHORT}
else:
    SIZE_125M = {"model__layers": 12, "model__width": 768, "model__heads": 12, "model__length": 1024,
                 "model__vocab": 51200, **SHORT}
    SIZE_1300M = {"model__layers": 2, "model__width": 2048, "model__heads": 32, "model__length": 512,
                  "model__vocab": 51200, **SHORT}
    SIZE_LAYOUTS = {"model__layers": 4, "model__width": 256, "model__heads": 8, "model__length": 128, **SHORT,
                    "train__updates": 8}

# What NCCL needs to take two ranks on one GPU for ranks of two hosts that talk over TCP.
SHARED_GPU = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_MNNVL_ENABLE": "0", "NCCL_P2P_DISABLE": "1",
              "NCCL_SHM_DISABLE": "1", "NCCL_MAX_NCHANNELS": "1", "NCCL_DEBUG": "WARN"}
NOT_SUPPORTED = ("this build has no NCCL", "Duplicate GPU")


def quoted(precision):
    return {"train__precision": f'"{precision}"'}


def layout(degrees, transport):
    tensor, context, pipeline, data = degrees
    return {"parallel__tensor": tensor, "parallel__context": context, "parallel__pipeline": pipeline,
            "parallel__data": data, "device__transport": f'"{transport}"', "device__threads": 1}


def name_of(degrees):
    return " ".join(f"{axis}{degree}" for axis, degree in zip(("TP", "CP", "PP", "DP"), degrees))


def differences(reference, other):
    """The largest relative differences of losses and of gradient norms between two runs' metrics."""
    loss = norm = 0.0
    assert len(reference) == len(other) and reference, f"{len(reference)} and {len(other)} lines of metrics"
    for a, b in zip(reference, other):
        assert (a["kind"], a["update"], a["tokens"]) == (b["kind"], b["update"], b["tokens"]), (a, b)
        assert math.isfinite(a["loss"]) and math.isfinite(b["loss"]), (a, b)
        loss = max(loss, abs(a["loss"] - b["loss"]) / abs(a["loss"]))
        if a["kind"] == "step":
            norm = max(norm, abs(a["gradient_norm"] - b["gradient_norm"]) / a["gradient_norm"])
    return loss, norm


def has_gpu():
    """Whether the program finds a GPU, and what it says where it does not."""
    with Folder() as folder:
        config = folder.config("probe", device__kind='"cuda"', train__updates=1)
        outcome = run(["train", config], timeout=LIMIT)
        return outcome.code == 0, (outcome.sentences() or [outcome.err.strip()])[0]


class Losses(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        found, reason = has_gpu()
        if not found:
            raise unittest.SkipTest(reason)

    def setUp(self):
        self.folder = Folder().__enter__()  # enterContext is newer than Python 3.10
        self.addCleanup(self.folder.__exit__)

    def train(self, name, device="cuda", ranks=1, **settings):
        """Trains in a folder of this name and returns its metrics."""
        config = self.folder.config(name, device__kind=f'"{device}"', **settings)
        run(["train", config], ranks, expect=0, timeout=LIMIT)
        return metrics(self.folder.path / name)

    def compare(self, label, precision, reference, other):
        loss, norm = differences(reference, other)
        most_loss, most_norm = TOLERANCE[precision]
        print(f"figures: {label} {precision}: losses to {loss:.1e} (at most {most_loss:.0e}), "
              f"gradient norms to {norm:.1e} (at most {most_norm:.0e})", flush=True)
        with self.subTest(label=label, precision=precision):
            self.assertLessEqual(loss, most_loss)
            self.assertLessEqual(norm, most_norm)

    def check_cpu(self, label, precision, **settings):
        settings.update(quoted(precision))
        reference = self.train("cpu", "cpu", **settings)
        other = self.train("gpu", **settings)
        self.compare(label, precision, reference, other)
        for name in ("cpu", "gpu"):
            subprocess.run(["rm", "-rf", self.folder.path / name], check=True)

    def test_125m_fp32(self):
        self.check_cpu("baseline", "fp32", **SIZE_125M, **BASELINE)
        self.check_cpu("normformer", "fp32", **SIZE_125M, **NORMFORMER)

    def test_125m_bf16(self):
        self.check_cpu("baseline", "bf16", **SIZE_125M, **BASELINE)
        self.check_cpu("normformer", "bf16", **SIZE_125M, **NORMFORMER)

    def test_1300m_widths_fp32(self):
        self.check_cpu("normformer", "fp32", **SIZE_1300M, **NORMFORMER)

    def test_1300m_widths_bf16(self):
        self.check_cpu("normformer", "bf16", **SIZE_1300M, **NORMFORMER)

    def test_small_fp64(self):
        self.check_cpu("normformer", "fp64", **SIZE_LAYOUTS, **NORMFORMER)

    def test_same_bits(self):
        for precision in ("fp32", "bf16"):
            weights = []
            runs = []
            for name in ("first", "second"):
                self.train(name, **SIZE_125M, **NORMFORMER, **quoted(precision))
                runs.append(losses(self.folder.path / name))
                exported = self.folder.path / f"{name}.safetensors"
                run(["checkpoint", "export", self.folder.path / name, exported, "--dtype", "f32"], expect=0, timeout=LIMIT)
                weights.append(exported.read_bytes())
                subprocess.run(["rm", "-rf", self.folder.path / name], check=True)
            same = runs[0] == runs[1] and weights[0] == weights[1]
            print(f"figures: {precision}: {len(weights[0])} bytes of weights and {len(runs[0])} lines of metrics "
                  f"{'equal' if same else 'DIFFER'}", flush=True)
            with self.subTest(precision=precision):
                self.assertEqual(runs[0], runs[1])
                self.assertEqual(weights[0], weights[1])

    def test_graphs_have_the_same_bits(self):
        settings = dict(SIZE_LAYOUTS, **NORMFORMER, train__global_batch=5, train__valid_every=3)
        for precision in ("fp32", "bf16"):
            for dropout in (0.0, 0.1):
                runs = []
                for graphs in ("false", "true"):
                    name = f"graphs-{precision}-{dropout}-{graphs}"
                    self.train(name, **settings, **quoted(precision), model__residual_dropout=dropout,
                               model__attention_dropout=dropout, device__cuda_graphs=graphs)
                    runs.append(losses(self.folder.path / name))
                with self.subTest(precision=precision, dropout=dropout):
                    self.assertEqual(runs[0], runs[1])

    def test_ranks_by_way_of_hosts(self):
        for precision in ("fp64", "fp32", "bf16"):
            settings = dict(SIZE_LAYOUTS, **NORMFORMER, **quoted(precision), train__micro_batch=1)
            alone = self.train(f"alone-{precision}", **settings)
            for degrees in [(2, 1, 2, 1), (1, 2, 1, 1)] if TINY else [
                    (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2), (2, 1, 2, 2)]:
                many = self.train(f"many-{precision}-" + "-".join(map(str, degrees)), ranks=math.prod(degrees),
                                  **dict(settings, **layout(degrees, "host")))
                self.compare(name_of(degrees), precision, alone, many)

    def test_ranks_by_nccl(self):
        for degrees in [(1, 1, 1, 2), (2, 1, 2, 1), (2, 1, 1, 2), (1, 2, 1, 1), (1, 4, 1, 1)]:
            ranks = math.prod(degrees)
            settings = dict(SIZE_LAYOUTS, **NORMFORMER, **quoted("fp32"), train__micro_batch=1)
            alone = self.train("alone-" + "-".join(map(str, degrees)), **settings)
            name = "nccl-" + "-".join(map(str, degrees))
            config = self.folder.config(name, **dict(settings, **layout(degrees, "nccl")),
                                        device__kind='"cuda"')
            each = 'NCCL_HOSTID=rank$OMPI_COMM_WORLD_RANK exec "$0" "$@"'
            command = ["timeout", "-k", "10", "180", "mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(ranks),
                       "bash", "-c", each, PROGRAM, "train", str(config)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                                  env=dict(environment(), **SHARED_GPU))
            said = done.stdout + done.stderr
            if done.returncode != 0:
                for reason in NOT_SUPPORTED:
                    if reason in said:
                        self.skipTest(next(line for line in said.splitlines() if reason in line).strip())
                self.fail(f"exit {done.returncode} on {ranks} ranks\n{said[-4000:]}")
            self.assertIn("tensors travel by NCCL", said)
            self.compare(name_of(degrees), "fp32", alone, metrics(self.folder.path / name))


if __name__ == "__main__":
    sys.exit(unittest.main(verbosity=2))
