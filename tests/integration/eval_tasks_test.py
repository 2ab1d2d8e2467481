#!/usr/bin/env python3
"""Zero-shot tasks of a trained model: the same scores under every layout, numbers that follow from them, files that others read."""
import json
import math
import re
import statistics
import sys
import unittest

from program import LAYOUTS, ROOT, WithCorpus, layout_flags, run

FIXTURES = ROOT / "tests" / "fixtures" / "evaluation"
TASKS = {
    "hellaswag": "hellaswag.jsonl", "piqa": f"piqa.jsonl,{FIXTURES}/piqa-labels.lst", "winogrande": "winogrande.jsonl",
    "openbookqa": "openbookqa.jsonl", "arc_easy": "arc.jsonl", "storycloze_2016": "storycloze.csv", "copa": "copa.jsonl",
    "lambada_openai": "lambada.jsonl",
}


def task_flags(tasks):
    return [f"--task={name}={FIXTURES}/{files}" for name, files in tasks.items()]


class EvalTasks(WithCorpus):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.path = cls.folder.path
        cls.run_folder = cls.path / "trained"
        run(["train", cls.folder.config("trained", model__length=160, train__updates=30, train__precision='"fp64"')], expect=0)

    def evaluate(self, name, *options, tasks=TASKS, ranks=1):
        """The table, results.json and the samples of each task."""
        out = self.path / name
        table = run(["eval-tasks", self.run_folder, *task_flags(tasks), "--output", out, "--log-samples", *options], ranks,
                    expect=0).out
        samples = {task: [json.loads(line) for line in (out / f"samples_{task}.jsonl").read_text().splitlines()]
                   for task in tasks}
        return table, json.loads((out / "results.json").read_text()), samples

    def test_scores_are_the_same_under_every_layout(self):
        expected = None
        for degrees in [*LAYOUTS, (1, 1, 1, 3), (2, 1, 2, 1)]:
            name = "layout_" + "".join(map(str, degrees))
            found = self.evaluate(name, *layout_flags(degrees), ranks=math.prod(degrees))
            expected = expected or found
            self.assertEqual(found[0], expected[0], degrees)
            for task, samples in expected[2].items():
                for ours, theirs in zip(found[2][task], samples, strict=True):
                    self.assertEqual({k: v for k, v in ours.items() if "resps" not in k},
                                     {k: v for k, v in theirs.items() if "resps" not in k})
                    for (a, a_greedy), (b, b_greedy) in zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True):
                        self.assertAlmostEqual(a, b, delta=1e-12 * max(1, abs(b)), msg=str(degrees))
                        self.assertEqual(a_greedy, b_greedy)

    def test_numbers_follow_from_the_samples(self):
        table, results, samples = self.evaluate("numbers")
        for task, numbers in results["results"].items():
            rows = samples[task]
            self.assertEqual(results["n-samples"][task]["effective"], len(rows))
            if task != "lambada_openai":
                for row in rows:
                    likelihoods = [score for score, _ in row["filtered_resps"]]
                    self.assertEqual(row["acc"], float(likelihoods.index(max(likelihoods)) == row["target"]))
                    self.assertEqual(row["resps"], [[score] for score in row["filtered_resps"]])
                    if "acc_norm" in row:
                        scaled = [score / len(text[1:]) for score, (_, text) in zip(likelihoods, row["arguments"])]
                        self.assertEqual(row["acc_norm"], float(scaled.index(max(scaled)) == row["target"]))
            for metric in ("acc", "acc_norm"):
                if metric not in rows[0]:
                    self.assertNotIn(f"{metric},none", numbers)
                    continue
                values = [row[metric] for row in rows]
                self.assertAlmostEqual(numbers[f"{metric},none"], statistics.mean(values), places=12)
                error = statistics.stdev(values) / math.sqrt(len(values))
                self.assertAlmostEqual(numbers[f"{metric}_stderr,none"], error, places=12)
                self.assertRegex(table, rf"\|{metric} +\| +{statistics.mean(values):.4f}\|±  \|{error:.4f}\|")
        likelihoods = [row["filtered_resps"][0][0] for row in samples["lambada_openai"]]
        perplexity = results["results"]["lambada_openai"]["perplexity,none"]
        self.assertAlmostEqual(perplexity / math.exp(-statistics.mean(likelihoods)), 1, places=12)
        self.assertEqual(results["config"]["checkpoint"], "step-0000000030")

    def test_a_limit_takes_the_first_items(self):
        _, results, samples = self.evaluate("limited", "--limit", 1, tasks={"lambada_openai": "lambada.jsonl"})
        _, _, everything = self.evaluate("unlimited", tasks={"lambada_openai": "lambada.jsonl"})
        self.assertEqual(len(samples["lambada_openai"]), 1)
        (ours, _), (theirs, _) = (found["lambada_openai"][0]["filtered_resps"][0] for found in (samples, everything))
        self.assertAlmostEqual(ours, theirs, delta=1e-12 * abs(theirs))
        self.assertEqual(results["results"]["lambada_openai"]["acc_stderr,none"], "N/A")
        self.assertEqual(results["config"]["limit"], 1)

    def refused(self, code, said, *arguments, ranks=1):
        outcome = run(["eval-tasks", *arguments], ranks, expect=code)
        self.assertEqual(len(outcome.sentences()), 1, outcome.err)
        self.assertRegex(outcome.err, said)

    def test_what_cannot_be_is_said_in_one_sentence(self):
        copa = task_flags({"copa": "copa.jsonl"})
        trained = self.run_folder
        self.refused(64, 'no task is named "swag"; there are hellaswag, piqa', trained, "--task", "swag=x", ranks=2)
        self.refused(64, "--task copa stands twice", trained, *copa, *copa)
        self.refused(64, "name their folder with --output", trained, *copa, "--log-samples")
        self.refused(74, "nowhere.jsonl", trained, f"--task=copa={self.path}/nowhere.jsonl", ranks=2)
        broken = self.path / "broken.jsonl"
        broken.write_text((FIXTURES / "copa.jsonl").read_text() + '{"premise": "a."}\n')
        self.refused(65, rf'{re.escape(str(broken))} line 4 has no "question"', trained, f"--task=copa={broken}", ranks=2)
        self.refused(65, "copa.jsonl line 1 has a continuation of [0-9]+ tokens, and the model reads 3", self.short_run(), *copa)
        self.evaluate("twice", tasks={"copa": "copa.jsonl"})
        self.refused(64, "a results.json is there already", trained, *copa, "--output", self.path / "twice")

    def short_run(self):
        run(["train", self.folder.config("short", model__length=3, train__updates=1)], expect=0)
        return self.path / "short"

    def test_a_masked_model_continues_no_texts(self):
        config = self.folder.config("masked", model__attention='"bidirectional"', model__head='"masked_language"', train__updates=1,
                                    model__head_scale='"none"')
        run(["train", config], expect=0)
        self.refused(64, 'eval-tasks needs a run with model.head = "language"', self.path / "masked",
                     *task_flags({"copa": "copa.jsonl"}), ranks=2)


if __name__ == "__main__":
    sys.exit(unittest.main(verbosity=2))
