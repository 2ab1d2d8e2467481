#!/usr/bin/env python3
"""launch/gpu-check without a GPU: nvidia-smi and the bundle's programs are scripts that write what real ones would.

gpu_check_test.py ROOT
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest

ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
NAME = "normformer-gpu-check"
STEP = "size model batch length drop params/M tok/s TFLOP/s of 989 ms/step p10 p90 peak GiB meta GiB loss\n"


def step_line(size, model, batch, speed, tflops, gib):
    return (f"{size:<6} {model:<11} {batch:>6}   2048     0     124.4 {speed:>9} {tflops:>8}  40.0%    100.00    99.00   "
            f"101.00 {gib:>9}      9.00  10.8000\n")


def step_lines(size, baseline, normformer):
    return step_line(size, "baseline", "8x4", *baseline) + step_line(size, "normformer", "8x4", *normformer)


PASSING = "[==========] 3 tests ran.\n[  PASSED  ] 3 tests.\n"
FAILING = "[  PASSED  ] 2 tests.\n[  FAILED  ] 1 test, listed below:\n"
MODELS = step_lines("125M", (500000, 412.5, 10.0), (490000, 401.0, 10.4))
SLOW = step_lines("355M", (100000, 399.0, 20.0), (96000, 380.0, 20.2))
PYTORCH = step_lines("125M", (400000, 330.0, 11.0), (450000, 371.0, 12.0))
KERNELS = ("\nbf16 16384 x 2048\n  layer_norm_forward                       0.05 ms 2700.0 GB/s, copy 3000.0 GB/s:   90 %\n"
           "  sublayer_output_forward all              0.10 ms 1500.0 GB/s, copy 3000.0 GB/s:   50 %\n"
           "  adamw                                    0.10 ms 2850.0 GB/s, copy 3000.0 GB/s:   95 %\n")
LOSSES = '''
import sys
class Losses:
    def test_good(self): pass
    def test_small_fp64(self): pass
    def test_ranks_by_nccl(self): pass
    def test_no_gpu(self): pass
    def test_wrong(self): pass
if sys.argv[1].endswith("good"):
    print("test_good (Losses.test_good) ...", end=" ")
    print("figures: baseline fp32: losses to 1.0e-06 (at most 1e-04), gradient norms to 2.0e-05 (at most 1e-03)")
    print("figures: normformer fp32: losses to 3.0e-06 (at most 1e-04), gradient norms to 1.0e-05 (at most 1e-03)")
elif sys.argv[1].endswith("fp64"):
    print("figures: bf16: 100 bytes of weights and 5 lines of metrics equal")
elif sys.argv[1].endswith("nccl"):
    print("test_ranks_by_nccl ... skipped 'Duplicate GPU'\\nRan 1 test in 1s\\n\\nOK (skipped=1)")
elif sys.argv[1].endswith("gpu"):
    print("setUpClass ... skipped 'the probe failed'\\nRan 0 tests in 1s\\n\\nOK (skipped=1)")
else:
    print("figures: baseline bf16: losses to 2.0e-01 (at most 5e-03), gradient norms to 1.0e-02 (at most 5e-02)\\nFAILED")
    sys.exit(1)
'''


class Stand:
    """A bundle of scripts, and a folder of tools that goes first in PATH."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.bundle, self.tools, self.output = self.folder / NAME, self.folder / "tools", self.folder / "out"
        self.script(self.bundle / "run", 'exec python3 "$(dirname "$0")/launch/gpu_check.py" "$(dirname "$0")" "$@"')
        (self.bundle / "launch").mkdir()
        shutil.copy(ROOT / "launch" / "gpu_check.py", self.bundle / "launch")
        self.gpu("echo 'NVIDIA H200, 580.1, 143771 MiB'")
        self.script(self.tools / "compute-sanitizer", 'echo "========= ERROR SUMMARY: 0 errors"\n'
                                                      'while [ ! -x "$1" ]; do shift; done\nexec "$@"')
        for name in ("oracle_test", "ops_attention_test", "ops_norm_test", "ops_embedding_test"):
            self.says(name, PASSING)
        self.says("bench_gpu_step", STEP + MODELS)
        self.says("bench_ops_elementwise", KERNELS)
        self.text("benchmarks/torch_step.py", f"import sys\nprint({(STEP + PYTORCH)!r}, sys.argv)")
        self.text("torch/torch.py", "__version__ = '2.11'\nclass cuda:\n    def is_available(): return True")
        self.text("tests/integration/gpu_losses_test.py", LOSSES)
        self.tests([])

    def script(self, path, body):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def text(self, name, body):
        path = self.bundle / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body)

    def gpu(self, body):
        self.script(self.tools / "nvidia-smi", body)

    def says(self, program, text, status=0):
        self.script(self.bundle / "bin" / program, f"cat <<'END'\n{text}END\nexit {status}")

    def tests(self, entries, commit="abc"):
        tests = [{"name": name, "command": [f"bin/{program}"], "limit": limit,
                  "environment": {"NORMFORMER_TEST_DEVICE": "cuda"}} for name, program, limit in entries]
        self.text("checks.json", json.dumps({"commit": commit, "built": "for 90", "cuda_libraries": ["libnot_there.so.1"],
                                             "tests": tests}))

    def environment(self):
        return dict(os.environ, PATH=f"{self.tools}:{os.environ['PATH']}", PYTHONPATH=str(self.bundle / "torch"))

    def check(self, *arguments, program=None):
        command = [*(program or [self.bundle / "run"]), *arguments, "--output", self.output]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment(), timeout=120)
        self.said = done.stdout + done.stderr
        return done.returncode

    def rows(self):
        """Result, figures and seconds of each line of results.md."""
        lines = (self.output / "results.md").read_text().splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        return {cell[0]: tuple(cell[1:]) for cell in cells if len(cell) == 4 and "/" in cell[0]}


class GpuCheck(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="gpu_check_test_")
        self.addCleanup(folder.cleanup)
        self.stand = Stand(folder.name)

    def result(self, name):
        return self.stand.rows()[name][0]

    def figures(self, name):
        return self.stand.rows()[name][1]

    def test_without_a_gpu_nothing_is_checked(self):
        self.stand.gpu("echo 'No devices were found'; exit 6")
        self.assertEqual(self.stand.check(), 0)
        self.assertIn("no GPU", self.stand.said)
        self.assertFalse(self.stand.output.exists())

    def test_says_what_was_found(self):
        self.assertEqual(self.stand.check("--only", "bandwidth"), 0)
        for text in ("NVIDIA H200, 580.1, 143771 MiB", "2.11 sees the GPU", "compute-sanitizer", "commit abc"):
            self.assertIn(text, self.stand.said)
        self.assertRegex(self.stand.said, r"libnot_there.so.1 +not found")
        self.assertIn("## NVIDIA H200, ", (self.stand.output / "results.md").read_text())

    def test_goes_on_after_failures_and_hangs(self):
        self.stand.says("failing", FAILING, 1)
        self.stand.says("empty", "")
        self.stand.says("without_gpu", "skipped: no GPU (no driver)\n", 77)
        self.stand.script(self.stand.bundle / "bin" / "hanging", "echo '[  PASSED  ] 1 test.'; sleep 60 & sleep 60")
        self.stand.script(self.stand.bundle / "bin" / "device",
                          'test "$NORMFORMER_TEST_DEVICE" = cuda && echo "[  PASSED  ] 4 tests."')
        self.stand.tests([(name, name, 60) for name in ("failing", "empty", "without_gpu", "missing", "device")] +
                         [("hanging", "hanging", 1)])
        self.assertEqual(self.stand.check("--only", "unit"), 1)
        self.assertEqual(self.result("unit/failing"), "failed")
        self.assertEqual(self.figures("unit/failing"), "exit status 1; 2 tests passed, 1 failed")
        self.assertEqual(self.result("unit/hanging"), "failed")
        self.assertIn("stopped after 1 s", self.figures("unit/hanging"))
        self.assertEqual(self.stand.rows()["unit/empty"][:2], ("failed", "no test ran"))
        self.assertEqual(self.stand.rows()["unit/without_gpu"][:2], ("failed", "no GPU (no driver)"))
        self.assertEqual(self.result("unit/missing"), "failed")
        self.assertEqual(self.stand.rows()["unit/device"][:2], ("passed", "4 tests passed"))
        self.assertIn("1 passed, 5 failed, 0 skipped, 0 missed a goal", self.stand.said)
        self.assertIn("1 test, listed below", (self.stand.output / "unit-failing.log").read_text())

    def test_sanitizer(self):
        self.assertEqual(self.stand.check("--only", "memcheck"), 0)
        self.assertEqual(self.stand.rows()["memcheck/models"][:2], ("passed", "0 errors; 3 tests passed"))
        self.stand.script(self.stand.tools / "compute-sanitizer",
                          f"echo '{PASSING}'; echo 'RACECHECK SUMMARY: 2 hazards displayed'")
        self.assertEqual(self.stand.check("--only", "racecheck/models"), 1)
        self.assertEqual(self.stand.rows()["racecheck/models"][:2], ("failed", "2 errors; 3 tests passed"))
        self.stand.script(self.stand.tools / "compute-sanitizer", "echo 'Error: Device not supported'; exit 1")
        self.assertEqual(self.stand.check("--only", "racecheck/models"), 0)
        self.assertEqual(self.result("racecheck/models"), "skipped")

    def test_losses(self):
        self.assertEqual(self.stand.check("--only", "losses"), 1)
        self.assertEqual(self.stand.rows()["losses/test_good"][:2],
                         ("passed", "fp32: losses to 3.0e-06, gradient norms to 2.0e-05"))
        self.assertEqual(self.figures("losses/test_small_fp64"),
                         "bf16: 100 bytes of weights and 5 lines of metrics equal")
        self.assertEqual(self.stand.rows()["losses/test_ranks_by_nccl"][:2], ("skipped", "Duplicate GPU"))
        self.assertEqual(self.stand.rows()["losses/test_no_gpu"][:2], ("failed", "the probe failed"))
        self.assertEqual(self.stand.rows()["losses/test_wrong"][:2],
                         ("failed", "exit status 1; bf16: losses to 2.0e-01, gradient norms to 1.0e-02"))

    def test_steps_beside_goals_and_pytorch(self):
        step, torch = "125M length 2048 dropout 0", "torch/125M length 2048 dropout 0"
        self.assertEqual(self.stand.check("--only", f"step/{step}"), 0)
        self.assertEqual(self.stand.rows()[f"step/{step}"][:2],
                         ("passed", "baseline 412.5 TFLOP/s (goal 360), 10.0 GiB; NormFormer 401.0 TFLOP/s, 10.4 GiB; "
                                    "time +2.0 % (goal at most +3 %); memory +4.0 % (goal at most +5 %)"))
        # A later run finds what the earlier one measured, and runs PyTorch on the same batches.
        self.assertEqual(self.stand.check("--only", torch), 0)
        self.assertEqual(self.stand.rows()[torch][:2],
                         ("goal missed", "baseline: PyTorch 330.0 TFLOP/s, ours 1.25 x that (goal 1.1); "
                                         "normformer: PyTorch 371.0 TFLOP/s, ours 1.09 x that (goal 1.1)"))
        self.assertIn("'--micro-batch', '8', '--micro-batches', '4'",
                      (self.stand.output / "torch-125M-length-2048-dropout-0.log").read_text())
        self.assertEqual(self.result(f"step/{step}"), "passed")
        # Another commit's are not taken over.
        self.stand.tests([], commit="def")
        self.assertEqual(self.stand.check("--only", torch), 0)
        self.assertEqual(list(self.stand.rows()), [torch])
        self.assertIn("ours was not measured", self.figures(torch))

    def test_missed_goals_and_variants_that_do_not_fit(self):
        self.stand.says("bench_gpu_step", STEP + SLOW)
        self.assertEqual(self.stand.check("--only", "step/355M length 2048 dropout 0"), 0)
        self.assertEqual(self.result("step/355M length 2048 dropout 0"), "goal missed")
        self.assertIn("time +4.2 %", self.figures("step/355M length 2048 dropout 0"))
        self.assertIn("0 failed, 0 skipped, 1 missed a goal", self.stand.said)
        fails = "2.7B   normformer  failed: out of memory\n"
        self.stand.says("bench_gpu_step", STEP + MODELS.splitlines(True)[0] + fails, 1)
        self.assertEqual(self.stand.check("--only", "step/2.7B*dropout 0"), 1)
        self.stand.says("bench_gpu_step", STEP + MODELS.replace("490000", "0     "))
        self.assertEqual(self.stand.check("--only", "step/125M length 2048 dropout 0,bandwidth/width 768"), 1)
        self.assertIn("its output is not understood", self.figures("step/125M length 2048 dropout 0"))
        self.assertEqual(self.result("bandwidth/width 768"), "passed")
        self.assertIn("normformer  failed: out of memory", self.figures("step/2.7B length 2048 dropout 0"))

    def test_bandwidth(self):
        self.assertEqual(self.stand.check("--only", "bandwidth", "--quick"), 0)
        self.assertEqual(self.stand.rows()["bandwidth/width 2048"][:2],
                         ("passed", "90 % of a copy's 3000 GB/s in the median of 3; lowest: "
                                    "sublayer_output_forward all bf16 50 %, layer_norm_forward bf16 90 %, adamw bf16 95 %"))
        self.assertEqual(len(self.stand.rows()), 1)

    def test_choosing(self):
        self.assertEqual(self.stand.check("--only", "nothing"), 2)
        self.assertIn("no check is named nothing", self.stand.said)
        self.assertEqual(self.stand.check("--only", "step,bandwidth", "--skip", "step/*2.7B*,bandwidth", "--quick"), 0)
        self.assertEqual(list(self.stand.rows()), ["step/125M length 2048 dropout 0", "step/125M length 2048 dropout 0.1",
                                                   "step/1.3B length 2048 dropout 0"])

    def test_another_machine(self):
        """ssh and scp that stay here; the home folder there is a folder of ours."""
        there = self.stand.folder / "there"
        there.mkdir()
        self.stand.script(self.stand.tools / "ssh", f'cd {there} && export TMPDIR={there} && exec sh -c "$2"')
        self.stand.script(self.stand.tools / "scp", 'for a; do shift; test "$a" = -q || set -- "$@" "${a#me@there:}"; done\n'
                                                    'exec cp "$@"')
        packed = self.stand.folder / "bundle.tar.gz"
        with tarfile.open(packed, "w:gz") as tar:
            tar.add(self.stand.bundle, NAME)
        program = [sys.executable, ROOT / "launch" / "gpu-check"]
        self.assertEqual(self.stand.check("--host", "me@there", "--run", packed, "--only", "step/125M*,losses/test_wrong",
                                          program=program), 1)
        self.assertEqual(self.result("losses/test_wrong"), "failed")
        self.assertEqual(self.stand.check("--host", "me@there", "--run", packed, "--only", "bandwidth", program=program), 0)
        self.assertIn("bandwidth/width 768", self.stand.rows())
        self.assertEqual(self.result("losses/test_wrong"), "failed")
        self.assertEqual(list(there.iterdir()), [])
        self.assertEqual(self.stand.check("--run", packed, "--only", "bandwidth/width 768", program=program), 0)
        self.assertEqual(self.stand.check("--run", self.stand.bundle, "--pack", packed, program=program), 2)


if __name__ == "__main__":
    unittest.main()
