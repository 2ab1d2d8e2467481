#!/usr/bin/env python3
"""A checkpoint that an earlier version wrote (two ranks, fp64) goes on today as it did then, under other layouts too."""
import pathlib
import shutil
import tempfile
import unittest

from program import ROOT, metrics, run

STORED = ROOT / "tests" / "fixtures" / "checkpoints" / "run-1"
# What the version that wrote it came to: loss and gradient norm of updates 4 and 5.
EXPECTED = {4: (6.011159904146441, 1.5733729766860143), 5: (5.854489298631378, 3.2552954574757385)}


class Compatibility(unittest.TestCase):
    def test_a_stored_run_goes_on(self):
        for ranks, layout in ((1, []), (2, ["parallel.tensor=2"]), (2, ["parallel.pipeline=2"]), (3, [])):
            with self.subTest(ranks=ranks, layout=layout), tempfile.TemporaryDirectory() as folder:
                folder = pathlib.Path(folder)
                for name in ("text.txt", "config.toml"):
                    shutil.copy(STORED / name, folder)
                shutil.copytree(STORED / "checkpoints", folder / "run" / "checkpoints")
                run(["prepare", "text.txt", "--documents", "blank-lines", "--output", "corpus", "--train-vocab", 270,
                     "--valid-fraction", 0], expect=0, cwd=folder)
                sets = [argument for setting in layout for argument in ("--set", setting)]
                run(["train", "config.toml", "--resume", *sets], ranks, expect=0, cwd=folder)
                steps = [line for line in metrics(folder / "run") if line["kind"] == "step"]
                self.assertEqual([line["update"] for line in steps], sorted(EXPECTED))
                for line in steps:
                    for got, expected in zip((line["loss"], line["gradient_norm"]), EXPECTED[line["update"]]):
                        self.assertAlmostEqual(got, expected, delta=1e-11 * expected)


if __name__ == "__main__":
    unittest.main(verbosity=2)
