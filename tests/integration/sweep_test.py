#!/usr/bin/env python3
"""launch/sweep: what a sweep file asks for, how runs are told apart, trained, gone on with, and compared."""
import csv
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import unittest
from unittest import mock

from program import PROGRAM, ROOT, Folder, WithCorpus, environment, losses, metrics, run, wait_until

sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "launch"))

import sweeps.main  # noqa: E402
from supervisor.codes import Refusal  # noqa: E402
from sweeps.jobs import gpus_of_slot, threads_of_rank  # noqa: E402
from sweeps.outcome import Outcome, claim, look  # noqa: E402
from sweeps.plan import Run, Sweep, read_sweep, toml_text  # noqa: E402
from sweeps.table import as_csv, runs_table, summary_table, without_empty_columns  # noqa: E402

VARIANTS = """
[[axes]]
name = "model"
variants.baseline = {}
variants.plain = { model.ffn_norm = false, optimizer.lr = 1e-3 }
"""
SEEDS = """
[[axes]]
values.train.seed = [1, 2]
"""


class WithFolder(unittest.TestCase):
    def setUp(self):
        self.folder = Folder().__enter__()
        self.addCleanup(self.folder.__exit__)

    def write(self, text, name="sweep"):
        path = self.folder.path / f"{name}.toml"
        path.write_text(text)
        return path


class Files(WithFolder):
    def test_axes_are_crossed_and_lists_of_one_go_side_by_side(self):
        self.folder.config("base", optimizer__lr=0.5)
        path = self.write('base = "base.toml"\nfolder = "runs/x"\nranks = 2\n' + VARIANTS + """
[[axes]]
values.train.seed = [1, 2]
values.optimizer.eps = [1e-8, 1e-6]

[set]
train.updates = 3
optimizer.lr = 0.25
""")
        sweep = read_sweep(path)
        self.assertEqual((sweep.ranks, sweep.columns), (2, ("model", "train.seed", "optimizer.eps")))
        self.assertEqual([run.name for run in sweep.runs],
                         ["baseline_seed-1_eps-1e-08", "baseline_seed-2_eps-1e-06", "plain_seed-1_eps-1e-08",
                          "plain_seed-2_eps-1e-06"])
        # A variant outranks what all runs have, and that outranks the configuration.
        self.assertEqual([run.setting("optimizer.lr") for run in sweep.runs], [0.25, 0.25, 1e-3, 1e-3])
        self.assertEqual(sweep.runs[3].overrides(),
                         ["--set", "train.updates=3", "--set", "optimizer.lr=0.001", "--set", "model.ffn_norm=false",
                          "--set", "train.seed=2", "--set", "optimizer.eps=1e-06", "--set",
                          'checkpoint.folder="runs/x/plain_seed-2_eps-1e-06"'])

    def test_the_command_outranks_the_file_but_not_its_axes(self):
        self.folder.config("base")
        layout = self.write('[parallel]\npipeline = 3\n[train]\nmicro_batch = 1\nrecompute_layers = 2\n', "layout")
        path = self.write('base = "base.toml"\nranks = 2\n' + SEEDS + "[set]\ntrain.updates = 3\ntrain.micro_batch = 4\n")
        sweep = read_sweep(path, 6, [f"@{layout}", "train.updates=5", "data.tokenizer=x"])
        self.assertEqual(sweep.ranks, 6)
        self.assertEqual(sweep.runs[1].overrides(),
                         ["--set", "train.updates=5", "--set", "train.micro_batch=1", "--set", "train.seed=2",
                          "--set", "parallel.pipeline=3", "--set", "train.recompute_layers=2",
                          "--set", 'data.tokenizer="x"', "--set", 'checkpoint.folder="runs/sweep/seed-2"'])
        # What a layout sets does not make another run.
        other = read_sweep(path, of_command=["train.updates=5", "data.tokenizer=x"])
        self.assertEqual(sweep.runs[1].settings(), other.runs[1].settings())
        for given, sentence in (("train.seed=3", "its runs differ in train.seed, which --set cannot set"),
                                ("checkpoint.folder=x", "each run has a checkpoint.folder of its own"),
                                ("train.updates", "--set train.updates: write section.key=value"),
                                ("@nowhere.toml", "cannot read nowhere.toml")):
            with self.subTest(given=given), self.assertRaises(Refusal) as caught:
                read_sweep(path, of_command=[given])
            self.assertIn(sentence, str(caught.exception))

    def test_variants_may_have_bases_of_their_own(self):
        for name in ("small", "large"):
            self.folder.config(name)
        sweep = read_sweep(self.write('[[axes]]\nname = "size"\nvariants.a = { base = "small.toml" }\n'
                                      'variants.b = { base = "large.toml" }\n' + SEEDS))
        self.assertEqual([run.config.name for run in sweep.runs], ["small.toml"] * 2 + ["large.toml"] * 2)

    def test_values_are_written_as_toml(self):
        for value, text in ((True, "true"), (3, "3"), (1e-3, "0.001"), ('a"b', '"a\\"b"'), ([1, 2.5], "[1, 2.5]"),
                            ([{"prefix": "x", "weight": 2.0}], '[{prefix = "x", weight = 2.0}]')):
            self.assertEqual(toml_text(value), text)

    def test_what_makes_no_sense_gets_one_sentence(self):
        self.folder.config("base")
        for text, sentence in (
                ("base = 3\n" + SEEDS, "base = 3 is not a path in quotes"),
                (SEEDS, "it has no base"),
                ('base = "base.toml"\n', "it needs an [[axes]]"),
                ('base = "base.toml"\nrank = 2\n' + SEEDS, '"rank" means nothing here; there is axes, base'),
                ('base = "base.toml"\nranks = 0\n' + SEEDS, "ranks = 0 is not a number of ranks"),
                ('base = "base.toml"\n[[axes]]\nvalues.train.seed = 1\n', "axis 1: values.train.seed must be a list"),
                ('base = "base.toml"\n[[axes]]\nvalues.train.seed = [1]\nvalues.optimizer.lr = [1, 2]\n',
                 "axis 1: its lists go side by side and must be equally long"),
                ('base = "base.toml"\n[[axes]]\nname = "x"\n', "axis 1: it needs either a name and variants"),
                ('base = "base.toml"\n[[axes]]\nname = "x"\nvariants.a = 1\n', "variants.a must be a table of keys"),
                ('base = "base.toml"\n' + SEEDS.replace("2", "1"), "2 runs would be called seed-1"),
                ("base = \n", "is no TOML")):
            with self.subTest(sentence=sentence), self.assertRaises(Refusal) as caught:
                read_sweep(self.write(text))
            self.assertIn(sentence, str(caught.exception))
            self.assertIn("sweep.toml", str(caught.exception))
            self.assertEqual(caught.exception.code, 64)


class Slots(WithFolder):
    def test_runs_beside_each_other_share_cores_and_gpus(self):
        config = self.folder.config("free", device__threads=0, device__kind='"cuda"')
        job = Run("a", {}, config, pathlib.Path("a"), {})
        sweep = Sweep(pathlib.Path("s"), pathlib.Path("."), 2, (), (job,))
        self.assertEqual(threads_of_rank(sweep, job, 1, 16), [])
        self.assertEqual(threads_of_rank(sweep, job, 3, 16), ["--set", "device.threads=2"])
        self.assertEqual(threads_of_rank(sweep, job, 3, 2), ["--set", "device.threads=1"])
        self.assertEqual(gpus_of_slot(sweep, job, 1, 0, {}), {})
        self.assertEqual(gpus_of_slot(sweep, job, 2, 1, {}), {"CUDA_VISIBLE_DEVICES": "2,3"})
        self.assertEqual(gpus_of_slot(sweep, job, 2, 1, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}),
                         {"CUDA_VISIBLE_DEVICES": "6,7"})
        fixed = Run("b", {}, config, pathlib.Path("b"), {"device.threads": 5, "device.kind": "cpu"})
        self.assertEqual(threads_of_rank(sweep, fixed, 3, 16), [])
        self.assertEqual(gpus_of_slot(sweep, fixed, 2, 1, {}), {})


class Looks(WithFolder):
    def look(self, **of_validation):
        (self.folder.path / "metrics.jsonl").write_text(
            '{"kind":"step","update":1,"lr":0.5}\n{"kind":"step","update":2,"lr":0.25}\n'
            + json.dumps({"kind": "validation", "update": 2, "loss": 1.0, **of_validation}) + "\n")
        return look(self.folder.path)

    def test_a_language_model_has_the_perplexity_and_a_classifier_the_accuracy_of_its_last_validation(self):
        model, classifier = self.look(perplexity=2.5), self.look(accuracy=0.75)
        self.assertEqual((model.loss, model.perplexity, model.accuracy), (1.0, 2.5, None))
        self.assertEqual((classifier.loss, classifier.perplexity, classifier.accuracy), (1.0, None, 0.75))
        self.assertEqual((model.update, model.highest_lr), (2, 0.5))
        self.assertIsNone(look(self.folder.path / "none").loss)


class Tables(unittest.TestCase):
    def sweep(self, labels):
        runs = tuple(Run(str(at), label, pathlib.Path("c"), pathlib.Path("f"), {}) for at, label in enumerate(labels))
        return Sweep(pathlib.Path("s"), pathlib.Path("."), 1, tuple(labels[0]), runs)

    def summary(self, labels, outcomes):
        return summary_table(self.sweep(labels), outcomes)

    def test_classifiers_have_accuracies_in_place_of_perplexities(self):
        labels = [{"train.seed": seed} for seed in (1, 2)]
        outcomes = [Outcome("complete", 0, 9, 0.5, accuracy=accuracy) for accuracy in (0.75, 0.875)]
        rows = without_empty_columns(runs_table(self.sweep(labels), outcomes))
        self.assertEqual(rows, [["train.seed", "state", "updates", "loss", "accuracy", "minutes"],
                                ["1", "complete", "9", "0.5000", "0.7500", "0.0"],
                                ["2", "complete", "9", "0.5000", "0.8750", "0.0"]])
        self.assertEqual(without_empty_columns(self.summary(labels, outcomes)),
                         [["complete", "loss", "accuracy"],
                          ["2 of 2", "0.5000 ± 0.0000", f"0.8125 ± {statistics.stdev([0.75, 0.875]):.4f}"]])

    def test_seeds_are_means_with_their_spread_and_the_best_rate_is_marked(self):
        labels = [{"model": m, "optimizer.lr": lr, "train.seed": s} for m in "ab" for lr in (0.1, 0.2) for s in (1, 2)]
        values = [4.0, 4.5, 3.0, 3.5, 2.0, 2.5, 3.0, 3.0]
        rows = self.summary(labels, [Outcome("complete", 0, 9, loss, 2 * loss) for loss in values])
        self.assertEqual([row[:5] for row in rows[1:3]],
                         [["a", "0.1", "2 of 2", f"4.2500 ± {statistics.stdev([4, 4.5]):.4f}",
                           f"8.500 ± {statistics.stdev([8, 9]):.3f}"],
                          ["a", "0.2", "2 of 2", f"3.2500 ± {statistics.stdev([3, 3.5]):.4f}",
                           f"6.500 ± {statistics.stdev([6, 7]):.3f}"]])
        self.assertEqual([row[-1] for row in rows[1:]], ["", "best", "best", ""])

    def test_a_rate_whose_runs_failed_is_not_the_best(self):
        labels = [{"optimizer.lr": lr, "train.seed": s} for lr in (0.1, 0.2) for s in (1, 2)]
        states = [("complete", 4.0), ("complete", 4.0), ("complete", 3.0), ("failed", 3.0)]
        rows = self.summary(labels, [Outcome(state, 0, 9, loss, loss) for state, loss in states])
        self.assertEqual([(row[1], row[-1]) for row in rows[1:]], [("2 of 2", "best"), ("1 of 2", "")])

    def test_explosions_are_medians_where_a_run_that_lasted_counts_as_longest(self):
        labels = [{"model": m, "train.seed": s} for m in "abc" for s in (1, 2, 3)]
        at = [10, 30, 20, 40, None, 50, None, None, None]
        rows = self.summary(labels, [Outcome("complete" if n is None else "exploded", 0, 99, exploded_at=n,
                                             exploded_lr=None if n is None else n / 100, highest_lr=0.75) for n in at])
        self.assertEqual([row[5:7] for row in rows[1:]], [["20", "0.2"], ["50", "0.5"], ["over 99", "over 0.75"]])
        # Where nothing exploded there is no stability test to tell of.
        rows = self.summary(labels, [Outcome("complete", 0, 99, highest_lr=0.75)] * 9)
        self.assertEqual([row[5:7] for row in rows[1:]], [["", ""]] * 3)

    def test_csv_quotes_what_it_must(self):
        self.assertEqual(as_csv([["a", "b"], ['1,2', 'say "x"']]), 'a,b\n"1,2","say ""x"""\n')


class Sweeps(WithCorpus):
    def path(self, name):
        return self.folder.path / name

    def write(self, name, text, **settings):
        self.folder.config(f"{name}-base", train__updates=6, **settings)
        path = self.path(f"{name}.toml")
        path.write_text(f'base = "{name}-base.toml"\nfolder = "{self.path(name)}"\n{text}')
        return path

    def command(self, *arguments, program=PROGRAM):
        return [sys.executable, ROOT / "launch/sweep", *map(str, arguments)], dict(environment(), NORMFORMER=str(program))

    def sweep(self, *arguments, expect=0, program=PROGRAM):
        words, variables = self.command(*arguments, program=program)
        done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=300)
        self.assertEqual(done.returncode, expect, done.stdout + done.stderr)
        return done

    def table(self, name, file="runs.csv"):
        with open(self.path(name) / file, newline="") as lines:
            return list(csv.DictReader(lines))

    def test_runs_are_those_of_the_program_alone_and_are_trained_once(self):
        path = self.write("once", VARIANTS + SEEDS)
        self.sweep(path, "--jobs", 2)
        rows = self.table("once")
        self.assertEqual([(row["model"], row["train.seed"], row["state"], row["updates"]) for row in rows],
                         [(model, seed, "complete", "6") for model in ("baseline", "plain") for seed in "12"])
        alone = self.folder.config("alone", train__updates=6, model__ffn_norm="false", optimizer__lr=1e-3, train__seed=2)
        run(["train", alone], expect=0)
        self.assertEqual(losses(self.path("once") / "plain_seed-2"), losses(self.path("alone")))
        self.assertEqual(rows[3]["loss"], f"{metrics(self.path('alone'))[-1]['loss']:.4f}")
        means = self.table("once", "summary.csv")
        self.assertRegex(means[0]["loss"], r"^\d\.\d{4} ± \d\.\d{4}$")
        before = (self.path("once") / "plain_seed-2/attempts.jsonl").read_text()
        self.assertIn("0 of 4 runs to train", self.sweep(path).stderr)
        self.assertEqual((self.path("once") / "plain_seed-2/attempts.jsonl").read_text(), before)

    def test_a_stopped_sweep_goes_on_with_the_same_bits(self):
        path = self.write("stopped", SEEDS, checkpoint__every=50)
        path.write_text(path.read_text() + "\n[set]\ntrain.updates = 1500\ndata.valid = []\n")
        words, variables = self.command(path)
        process = subprocess.Popen(words, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        first = self.path("stopped") / "seed-1"
        self.assertTrue(wait_until(lambda: len(metrics(first)) > 20, 100))
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=100)[1]
        self.assertEqual(process.returncode, 75, said)
        self.assertIn("stopped; the same command goes on from here", said)
        self.assertEqual([row["state"] for row in self.table("stopped")], ["stopped", "waiting"])
        self.assertLess(len(metrics(first)), 1500)
        self.sweep(path, "--jobs", 2)
        self.assertEqual([row["state"] for row in self.table("stopped")], ["complete"] * 2)
        whole = self.folder.config("whole", train__updates=1500, data__valid="[]", train__seed=1, checkpoint__every=50)
        run(["train", whole], expect=0)
        self.assertEqual(losses(first), losses(self.path("whole")))

    def test_a_run_that_fails_is_reported_and_the_rest_goes_on(self):
        path = self.write("fails", "[[axes]]\nvalues.optimizer.lr = [1e37, 1e-3]\n", optimizer__warmup_updates=0,
                          train__max_skipped=2)
        said = self.sweep(path, expect=1).stderr
        self.assertIn("1/2 lr-1e+37: ended with 77 (training diverged)", said)
        self.assertIn("some runs failed", said)
        self.assertEqual([row["state"] for row in self.table("fails")], ["failed with 77", "complete"])

    def test_a_key_that_is_none_is_refused_by_the_program_before_anything_is_trained(self):
        path = self.write("unknown", "[[axes]]\nvalues.optimizer.lr = [1e-3]\n[[axes]]\nvalues.train.sead = [1]\n")
        said = self.sweep(path, expect=64).stderr
        self.assertIn("launch/sweep: run lr-0.001_sead-1: ", said)
        self.assertRegex(said, "sead.*seed")
        self.assertFalse(self.path("unknown").exists())
        path = self.write("late", "[[axes]]\nvalues.model.heads = [3, 5]\n")
        self.assertIn("run heads-5: ", self.sweep(path, "--dry-run", expect=64).stderr)

    def test_a_folder_of_other_settings_is_refused(self):
        path = self.write("other", SEEDS)
        self.sweep(path)
        path.write_text(path.read_text() + "[set]\noptimizer.lr = 0.5\n")
        said = self.sweep(path, expect=64).stderr
        self.assertIn("seed-1 was begun with optimizer.lr = 0.003, and now it is 0.5: remove it", said)

    def test_a_folder_that_names_a_layout_is_gone_on_with(self):
        path = self.write("older", SEEDS)
        sweep = read_sweep(path)
        claim(sweep.runs[0])
        kept = sweep.runs[0].folder / "sweep.json"
        kept.write_text(json.dumps({**json.loads(kept.read_text()), "train.recompute_layers": 2}))
        claim(sweep.runs[0])

    def test_each_run_is_judged_by_the_program_for_its_device(self):
        self.folder.config("device-base")
        path = self.path("device.toml")
        path.write_text(f'base = "device-base.toml"\nfolder = "{self.path("device")}"\n[[axes]]\n'
                        'values.device.kind = ["cpu", "cuda"]\n')
        asked = []
        with mock.patch.object(sweeps.main, "find_program", lambda device: asked.append(device) or "true"):
            sweep = read_sweep(path)
            sweeps.main.check(sweep, sweep.runs)
            path.write_text(path.read_text().replace('values.device.kind = ["cpu", "cuda"]', "values.train.seed = [1]"))
            for given in ([], ["device.kind=cuda"]):
                sweep = read_sweep(path, of_command=given)
                sweeps.main.check(sweep, sweep.runs)
        self.assertEqual(asked, ["cpu", "cuda", "cpu", "cuda"])

    def test_dry_runs_and_lists_train_nothing(self):
        path = self.write("dry", SEEDS)
        lines = self.sweep(path, "--dry-run").stdout.splitlines()
        self.assertEqual(len(lines), 2)
        self.assertIn("--set train.seed=2", lines[1])
        self.assertFalse(self.path("dry").exists())
        self.assertIn("waiting", self.sweep(path, "--list").stdout)
        self.assertFalse((self.path("dry") / "seed-1").exists())

    def test_explosions_are_results(self):
        path = self.write("explodes", SEEDS, checkpoint__every=0)
        path.write_text(path.read_text() + "\n[set]\nhealth.explosion_rise = 1.0\noptimizer.lr = 20.0\n"
                        "optimizer.warmup_updates = 400\ntrain.updates = 400\n")
        self.assertIn("exploded after update", self.sweep(path).stderr)
        rows = self.table("explodes")
        ends = [metrics(self.path("explodes") / f"seed-{seed}")[-1] for seed in (1, 2)]
        self.assertEqual([(row["state"], row["exploded after"]) for row in rows],
                         [("exploded", str(end["update"])) for end in ends])
        self.assertEqual(self.table("explodes", "summary.csv")[0]["exploded after"],
                         f"{statistics.median(end['update'] for end in ends):g}")

    def test_slurm_is_given_what_is_not_complete(self):
        path = self.write("slurm", SEEDS)
        bin_folder = self.path("bin")
        bin_folder.mkdir(exist_ok=True)
        (bin_folder / "sbatch").write_text(f"#!/bin/sh\necho \"$@\" > {bin_folder}/said\n")
        os.chmod(bin_folder / "sbatch", 0o755)
        words, variables = self.command(path, "--set", "train.log_every=3", "--slurm", "--", "--time=1:00:00")
        variables["PATH"] = f"{bin_folder}:{variables['PATH']}"
        self.assertEqual(subprocess.run(words, env=variables, capture_output=True).returncode, 0)
        self.assertEqual((bin_folder / "said").read_text().split(),
                         ["--array=1,2", "--ntasks=1", "--time=1:00:00", str(ROOT / "launch/slurm/sweep.sbatch"), str(path),
                          "--set=train.log_every=3"])
        # What a job of the array does, without Slurm.
        done = subprocess.run(["bash", ROOT / "launch/slurm/sweep.sbatch", path, "--set=train.log_every=3"],
                              capture_output=True, text=True,
                              env=dict(variables, SLURM_ARRAY_TASK_ID="2", SLURM_NTASKS="1", NORMFORMER_ROOT=str(ROOT)))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.sweep(path, "--list")
        self.assertEqual([row["state"] for row in self.table("slurm")], ["waiting", "complete"])
        self.assertIn("log_every = 3\n", (self.path("slurm") / "seed-2/config.toml").read_text())


if __name__ == "__main__":
    sys.exit(unittest.main(verbosity=2))
