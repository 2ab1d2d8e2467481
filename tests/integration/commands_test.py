#!/usr/bin/env python3
"""Commands that read what training wrote, under other layouts than it was written with, and weights from elsewhere."""
import json
import math
import re
import shutil
import sys
import unittest
from xml.etree import ElementTree

from program import LAYOUTS, ROOT, Folder, layout_flags, losses, metrics, numbers, read_safetensors, run

FIXTURE = ROOT / "tests" / "fixtures" / "oracle" / "normformer"
ORACLE_MODEL = {
    "model__layers": 4, "model__width": 32, "model__heads": 8, "model__ffn": 128, "model__vocab": 320,
    "model__length": 32, "model__residual_scale": "false", "model__residual_dropout": 0.0,
    "model__attention_dropout": 0.0, "model__embedding_dropout": 0.0,
}


class Commands(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Folder().__enter__()
        cls.run_folder = cls.folder.path / "trained"
        run(["train", cls.folder.config("trained", train__updates=40)], expect=0)

    @classmethod
    def tearDownClass(cls):
        cls.folder.__exit__()

    def over_layouts(self, arguments, layouts=LAYOUTS):
        """The command's output under every layout of the trained run."""
        for degrees in layouts:
            ranks = math.prod(degrees)
            yield degrees, run([*arguments, *layout_flags(degrees)], ranks, expect=0).out

    def test_a_profile_traces_every_rank_and_changes_no_bit(self):
        settings = {"train__updates": 4, "parallel__tensor": 2, "parallel__pipeline": 2}
        run(["train", self.folder.config("plain", **settings)], 4, expect=0)
        run(["train", self.folder.config("traced", **settings), "--profile", "2-3"], 4, expect=0)
        self.assertEqual(losses(self.folder.path / "plain"), losses(self.folder.path / "traced"))
        trace = json.loads((self.folder.path / "traced" / "trace_2-3.json").read_text())["traceEvents"]
        for rank in range(4):
            spans = [event for event in trace if event["pid"] == rank and event["ph"] == "X"]
            steps = [span for span in spans if span["name"] == "step"]
            self.assertEqual(len(steps), 2)
            within = [span for span in spans if any(
                step["ts"] <= span["ts"] and span["ts"] + span["dur"] <= step["ts"] + step["dur"] for step in steps)]
            self.assertEqual(len(within), len(spans))
            count = lambda name: sum(span["name"] == name for span in spans)  # noqa: E731
            # Two updates of three micro-batches; layers 0 and 1 are on the first stage, 2 on the last.
            layer = 0 if rank < 2 else 2
            for part in ("self_attn", "feed_forward"):
                for direction in ("forward", "backward input", "backward weight"):
                    self.assertEqual(count(f"decoder.layers.{layer}.{part} {direction}"), 6, (rank, part, direction))
            self.assertEqual(count("send"), 6)
            self.assertEqual(count("receive"), 6)
            self.assertEqual(count("attention_forward"), 12 if rank < 2 else 6)
            products = [span for span in spans if span["name"] == "linear_forward"]
            self.assertTrue(all(span["args"]["FLOPs"] > 0 and span["args"]["GFLOP/s"] > 0 for span in products))

    def test_a_profile_draws_the_pipeline_as_it_ran_and_as_it_was_planned(self):
        for schedule in ("1f1b", "zb_v"):
            settings = {"train__updates": 3, "parallel__pipeline": 2, "parallel__data": 2, "model__layers": 4,
                        "parallel__schedule": f'"{schedule}"'}
            run(["train", self.folder.config(f"drawn_{schedule}", **settings), "--profile", "3"], 4, expect=0)
            boxes = []
            for how in ("measured", "simulated"):
                root = ElementTree.parse(self.folder.path / f"drawn_{schedule}" / f"pipeline_3_{how}.svg").getroot()
                titles = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
                boxes.append(sorted(t.split(":")[0].split(",")[0] for t in titles if "micro-batch" in t))
            # Two micro-batches of the first replica on two ranks: each part once forward and once back, in halves
            # where the schedule has halves.
            self.assertEqual(len(boxes[0]), {"1f1b": 2 * 2 * 2, "zb_v": 2 * 2 * 2 * 3}[schedule])
            self.assertEqual(boxes[0], boxes[1])

    def test_the_log_has_what_was_shown(self):
        log = (self.run_folder / "log.txt").read_text()
        for line in ("update 40/40  loss", "parameters, 1 ranks", "validation after update 40", "saved a checkpoint"):
            self.assertEqual(log.count(line), 1, line)

    def test_training_learns(self):
        losses = [line["loss"] for line in metrics(self.run_folder) if line["kind"] == "step"]
        self.assertLess(losses[-1], losses[0] - 0.5)

    def test_weights_come_back_as_they_were_imported(self):
        config = self.folder.config("imported", **ORACLE_MODEL)
        run(["checkpoint", "import", FIXTURE / "weights.safetensors", config], expect=0)
        out = self.folder.path / "back.safetensors"
        run(["checkpoint", "export", self.folder.path / "imported", out], expect=0)
        self.assertEqual(read_safetensors(out), read_safetensors(FIXTURE / "weights.safetensors"))

    def test_imported_weights_train_on(self):
        config = self.folder.config("goes_on", **ORACLE_MODEL)
        run(["checkpoint", "import", FIXTURE / "weights.safetensors", config], expect=0)
        run(["train", config, "--resume", "--set", "train.updates=3"], 2, expect=0)
        self.assertEqual(metrics(self.folder.path / "goes_on")[-1]["update"], 3)

    def test_import_of_another_model_names_tensor_and_shapes(self):
        config = self.folder.config("wrong", **dict(ORACLE_MODEL, model__ffn=64))
        outcome = run(["checkpoint", "import", FIXTURE / "weights.safetensors", config])
        self.assertEqual(outcome.code, 65, outcome.err)
        self.assertEqual(len(outcome.sentences()), 1, outcome.err)
        self.assertIn("fc1", outcome.err)

    def test_dumped_gradients_agree_between_layouts(self):
        expected = None
        for degrees in [(1, 1, 1, 1), (2, 1, 2, 1), (1, 1, 1, 3), (1, 2, 1, 1), (3, 2, 1, 1)]:
            config = self.folder.config("gradients", train__precision='"fp64"', data__document_mask="true")
            out = self.folder.path / "gradients.safetensors"
            run(["train", config, "--dump-gradients", out, *layout_flags(degrees)], math.prod(degrees), expect=0)
            found = read_safetensors(out)
            expected = expected or found
            self.assertEqual(found.keys(), expected.keys())
            for name, tensor in found.items():
                ours, theirs = numbers(tensor), numbers(expected[name])
                difference = math.sqrt(sum((a - b) ** 2 for a, b in zip(ours, theirs)))
                scale = math.sqrt(sum(b * b for b in theirs)) or 1.0
                self.assertLess(difference, 1e-11 * max(scale, 1e-3), name)

    def test_statistics_are_those_of_the_gradients_and_weights_under_every_layout(self):
        expected = None
        for degrees in [(1, 1, 1, 1), (2, 1, 3, 1), (1, 2, 1, 2), (3, 1, 1, 1)]:
            name = "statistics_" + "".join(map(str, degrees))
            config = self.folder.config(name, train__precision='"fp64"', train__updates=6, metrics__gradient_norms_every=1,
                                        metrics__distributions_every=4, parallel__sharding='"parameters"')
            run(["train", config, *layout_flags(degrees)], math.prod(degrees), expect=0)
            lines = [json.loads(line) for line in (self.folder.path / name / "statistics.jsonl").read_text().splitlines()]
            self.assertEqual([(line["kind"], line["update"]) for line in lines if line["kind"] == "distributions"],
                             [("distributions", 4), ("distributions", 6)])
            if expected is None:
                expected = lines
                gradients, weights = self.folder.path / "of_first.safetensors", self.folder.path / "of_last.safetensors"
                run(["train", config, "--dump-gradients", gradients], expect=0)
                run(["checkpoint", "export", self.folder.path / name, weights, "--dtype", "f64"], expect=0)
                self.check_statistics(lines, read_safetensors(gradients), read_safetensors(weights))
            self.assertEqual(len(lines), len(expected))
            for ours, theirs in zip(lines, expected):
                self.assert_same_statistics(ours, theirs)

    def check_statistics(self, lines, gradients, weights):
        """Against sums and percentiles that are taken here."""
        norms = lines[0]["parameters"]
        self.assertEqual(norms.keys(), gradients.keys())
        for name, tensor in gradients.items():
            values = numbers(tensor)
            self.assertAlmostEqual(norms[name]["l1"] / sum(map(abs, values)), 1, delta=1e-9, msg=name)
            self.assertAlmostEqual(norms[name]["l2"] / math.sqrt(sum(v * v for v in values)), 1, delta=1e-9, msg=name)
        scales = lines[-1]["parameters"]
        self.assertEqual(len(scales), 3 * 6 + 1)
        for name, scale in scales.items():
            values = sorted(numbers(weights[name]))
            self.assertEqual([scale["count"], scale["min"], scale["max"]], [len(values), values[0], values[-1]], name)
            self.assertAlmostEqual(scale["mean"], math.fsum(values) / len(values), delta=1e-12)
            self.assertEqual(sum(scale["counts"]), len(values))
            middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
            self.assertAlmostEqual(scale["p50"], middle, delta=1e-12)

    def assert_same_statistics(self, ours, theirs):
        self.assertEqual({k: v for k, v in ours.items() if k != "parameters"},
                         {k: v for k, v in theirs.items() if k != "parameters"})
        self.assertEqual(list(ours["parameters"]), list(theirs["parameters"]))
        for name, values in theirs["parameters"].items():
            if name.endswith("k_proj.bias"):  # rounding errors alone
                continue
            for key, value in values.items():
                if key in ("counts", "bins", "count"):  # a value may fall on an edge
                    continue
                self.assertAlmostEqual(ours["parameters"][name][key], value, delta=1e-9 * abs(value) + 1e-15,
                                       msg=f"{name} {key}")

    def test_perplexity_is_the_same_under_every_layout(self):
        text = self.folder.path / "text.txt"
        expected = None
        for degrees, _ in self.over_layouts(["eval", self.run_folder, text, "--nll", self.folder.path / "nll.jsonl"]):
            lines = [json.loads(line) for line in (self.folder.path / "nll.jsonl").read_text().splitlines()]
            expected = expected or lines
            self.assertEqual([line["token"] for line in lines], [line["token"] for line in expected])
            for mine, theirs in zip(lines, expected):
                self.assertAlmostEqual(mine["nll"], theirs["nll"], delta=1e-4, msg=str(degrees))
        ends = [0] + [line["end"] for line in expected]
        self.assertEqual(ends[:-1], [line["begin"] for line in expected])
        self.assertEqual(ends[-1], len(text.read_bytes()))

    def test_perplexity_is_the_exponential_of_the_mean(self):
        nll = self.folder.path / "mean.jsonl"
        out = run(["eval", self.run_folder, self.folder.path / "text.txt", "--nll", nll], expect=0).out
        values = [json.loads(line)["nll"] for line in nll.read_text().splitlines()]
        self.assertIn(f"{len(values)} tokens, loss {sum(values) / len(values):.6f}", out)
        self.assertIn(f"perplexity {math.exp(sum(values) / len(values)):.4f}", out)

    def test_scores_are_printed_though_their_file_cannot_be_written(self):
        refused = run(["eval", self.run_folder, self.folder.path / "text.txt", "--nll", self.folder.path / "nowhere" / "nll"], 2)
        self.assertEqual((refused.code, len(refused.sentences())), (74, 1), refused.err)
        self.assertRegex(refused.out, r"perplexity [\d.]+")

    def test_a_folder_is_no_text(self):
        refused = run(["eval", self.run_folder, self.folder.path], 2, expect=74)
        self.assertEqual(len(refused.sentences()), 1, refused.err)
        self.assertIn(f"{self.folder.path} is not a regular file", refused.err)

    def test_a_run_of_two_ranks_is_used_on_one(self):
        config = self.folder.config("of_two", parallel__tensor=2, train__updates=1)
        run(["train", config], 2, expect=0)
        arguments = ["eval", self.folder.path / "of_two", self.folder.path / "text.txt"]
        self.assertIn("perplexity", run(arguments, expect=0).out)
        refused = run([*arguments, *layout_flags((2, 1, 1, 1))], expect=64)
        self.assertIn("is not the number of ranks, 1", refused.err)

    def test_a_run_with_sharding_groups_goes_on_under_another_layout(self):
        settings = {"train__precision": '"fp64"', "train__updates": 6, "train__global_batch": 4}
        run(["train", self.folder.config("ungrouped", **settings)], expect=0)
        grouped = {"parallel__sharding": '"parameters"', "parallel__shard_group": 2, "train__updates": 3}
        config = self.folder.config("grouped", **{**settings, **grouped})
        refused = run(["train", config], 3, expect=64)
        self.assertIn("parallel.shard_group = 2 does not divide the number of replicas", refused.err)
        run(["train", config], 4, expect=0)
        other = [*layout_flags((2, 1, 1, 1)), "--set", "parallel.shard_group=0", "--set", "train.updates=6"]
        run(["train", config, "--resume", *other], 2, expect=0)
        steps = lambda name: [line["loss"] for line in metrics(self.folder.path / name) if line["kind"] == "step"]  # noqa: E731
        expected, found = steps("ungrouped"), steps("grouped")
        self.assertEqual(len(found), 6)
        for mine, theirs in zip(found, expected):
            self.assertAlmostEqual(mine, theirs, delta=1e-10)
        text = ["eval", self.folder.path / "grouped", self.folder.path / "text.txt"]
        scores = {run(text, ranks, expect=0).out.split("loss ")[1][:6] for ranks in (1, 3)}
        self.assertEqual(len(scores), 1, scores)

    def test_a_run_with_split_sequences_is_used_with_whole_ones(self):
        config = self.folder.config("split", parallel__context=2, train__updates=2)
        run(["train", config], 2, expect=0)
        split, text = self.folder.path / "split", self.folder.path / "text.txt"
        scores = {run(["eval", split, text], ranks, expect=0).out.split("loss ")[1][:6] for ranks in (1, 2, 3)}
        self.assertEqual(len(scores), 1, scores)
        generate = ["generate", split, "--prompt", "The ", "--max-tokens", 5, "--temperature", 0]
        texts = {run(generate, ranks, expect=0).out for ranks in (1, 2)}
        self.assertEqual(len(texts), 1, texts)
        refused = run([*generate, "--set", "parallel.context=2"], 2, expect=64)
        self.assertIn("texts are generated with parallel.context = 1 only", refused.err)

    def test_generation_is_the_same_under_every_layout(self):
        whole = [degrees for degrees in LAYOUTS if degrees[1] == 1]
        for options in (["--temperature", 0], ["--temperature", 0.8, "--top-p", 0.9, "--seed", 5]):
            texts = {out for _, out in self.over_layouts(
                ["generate", self.run_folder, "--prompt", "The ", "--max-tokens", 30, *options], whole)}
            self.assertEqual(len(texts), 1, texts)
            self.assertTrue(texts.pop().startswith("The "))

    def test_a_plan_knows_the_model_and_the_layout(self):
        config = self.folder.config("planned", parallel__tensor=3, parallel__pipeline=2, parallel__schedule='"zb_h1"',
                                    parallel__sharding='"gradients"', train__micro_batch=1, train__global_batch=8)
        out = run(["plan", config, "-n", 12], expect=0).out
        parameters = re.search(r"^parameters .*\(([\d,]+)\)", out, re.MULTILINE)[1].replace(",", "")
        self.assertIn(f"\n{parameters} parameters", run(["checkpoint", "inspect", self.run_folder], expect=0).out)
        self.assertIn('tensor 3 x pipeline 2 x data 2, schedule "zb_h1", sharding "gradients"', out)
        self.assertEqual(re.findall(r"^ +(\d)  (\d(?:-\d)?) .*\d\.\d\d$", out, re.MULTILINE), [("0", "0-1"), ("1", "2")])
        for line in (r"^  tensor +all_reduce +\d+ +\d", r"^  data +reduce_scatter +\d+ +\d",
                     r"^pipeline: the bubble is \d+\.\d % .* costs \d+\.\d % of the step$",
                     r"^sharding: .* [\d.]+ times what \"optimizer\" .* each of 4 micro-batches",
                     r"^order of calls: sound; the [\d,]+ calls of all 12 ranks fit together$"):
            self.assertRegex(out, re.compile(line, re.MULTILINE))
        self.assertFalse((self.folder.path / "planned").exists())

    def test_a_plan_counts_the_traffic_that_a_run_traces(self):
        config = self.folder.config("foretold", parallel__tensor=2, parallel__pipeline=2, train__updates=2)
        out = run(["plan", config, "-n", 4], expect=0).out
        rank = int(re.search(r"of the busiest rank, (\d)", out)[1])
        run(["train", config, "--profile", "2"], 4, expect=0)
        trace = json.loads((self.folder.path / "foretold" / "trace_2-2.json").read_text())["traceEvents"]
        for group, kind, calls in re.findall(r"^  (tensor|pipeline|embedding) +(\w+) +(\d+) ", out, re.MULTILINE):
            traced = [e for e in trace if e["pid"] == rank and e["name"] == kind and e["args"].get("group") == group]
            self.assertEqual(len(traced), int(calls), (group, kind))

    def test_a_plan_needs_no_corpus_and_refuses_what_train_refuses(self):
        nowhere = ["--set", f"data.train={self.folder.path}/nowhere"]
        config = self.folder.config("nothing")
        outcome = run(["plan", config, "-n", 2, *nowhere], expect=64)
        self.assertEqual(len(outcome.sentences()), 1, outcome.err)
        self.assertIn("--set model.vocab=N", outcome.err)
        run(["plan", config, "-n", 2, *nowhere, "--set", "model.vocab=300"], expect=0)
        for ranks, wrong in ((2, "parallel.tensor=3"), (3, "parallel.pipeline=2"), (1, "model.heads=7"), (1, "model.hats=1")):
            planned = run(["plan", config, "-n", ranks, "--set", wrong], expect=64)
            trained = run(["train", config, "--set", wrong], ranks, expect=64)
            self.assertEqual(planned.sentences(), trained.sentences())
            self.assertEqual(len(planned.sentences()), 1)

    def test_a_plan_of_a_big_world_runs_some_ranks_of_each_kind(self):
        big = {"model.layers": 32, "model.width": 2560, "model.heads": 32, "model.length": 2048, "model.vocab": 51200,
               "parallel.tensor": 8, "parallel.sequence": "true", "parallel.pipeline": 8, "train.global_batch": 512,
               "train.micro_batch": 1, "train.precision": "bf16"}
        flags = [flag for key, value in big.items() for flag in ("--set", f"{key}={value}")]
        out = run(["plan", self.folder.config("big"), "-n", 512, *flags], expect=0).out
        self.assertRegex(out, r"parameters  2\.65 G")
        self.assertIn("calls of 32 of 512 ranks", out)

    def reshard(self, name, ranks, *options):
        to = self.folder.path / name
        run(["checkpoint", "reshard", self.run_folder, to, *options], ranks, expect=0)
        return to

    def test_a_checkpoint_written_anew_is_the_same(self):
        to = self.reshard("resharded", 3)
        files = sorted(path.name for path in (to / "checkpoints" / "step-0000000040").iterdir())
        self.assertEqual(files, ["MANIFEST", *(f"rank-{r:05}-of-00003.bin" for r in range(3))])
        out = run(["checkpoint", "diff", self.run_folder, to], expect=0).out
        self.assertRegex(out, r"\A0 of \d+ tensors differ\n\Z")
        run(["train", to / "config.toml", "--resume", "--set", "train.updates=41"], expect=0)
        outcome = run(["checkpoint", "diff", self.run_folder, to], expect=1)
        self.assertIn("update_count: 40 and 41\n", outcome.out)
        self.assertIn("train.updates: 40 and 41\n", outcome.out)
        self.assertRegex(outcome.out, r"decoder.embed_tokens.weight \(moment1\): \d+ of \d+ elements differ, by at most ")
        outcome = run(["checkpoint", "reshard", self.run_folder, to], 2, expect=64)
        self.assertIn("already holds checkpoints", outcome.err)

    def test_a_checkpoint_written_anew_is_used_as_the_run_is(self):
        to = self.reshard("used", 2)
        for name in ("vocab.json", "merges.txt"):
            self.assertEqual((to / "tokenizer" / name).read_bytes(), (self.run_folder / "tokenizer" / name).read_bytes())
        self.assertFalse((to / "classes.json").exists())
        for command in (["eval", None, self.folder.path / "text.txt"], ["generate", None, "--prompt", "The ", "--max-tokens", 8]):
            mine, other = (run([folder if part is None else part for part in command], expect=0).out
                           for folder in (self.run_folder, to))
            self.assertEqual(mine, other)

    def test_a_damaged_tokenizer_is_told_before_a_checkpoint_is_written_anew(self):
        damaged = self.folder.path / "damaged_tokenizer"
        shutil.copytree(self.run_folder, damaged)
        (damaged / "tokenizer" / "vocab.json").write_text("{")
        outcome = run(["checkpoint", "reshard", damaged, self.folder.path / "unwritten"], 2, expect=65)
        self.assertEqual(len(outcome.sentences()), 1, outcome.err)
        self.assertIn("vocab.json", outcome.err)
        self.assertFalse((self.folder.path / "unwritten").exists())

    def test_a_checkpoint_of_another_precision_goes_on(self):
        to = self.reshard("fp64", 2, "--precision", "fp64")
        outcome = run(["checkpoint", "diff", self.run_folder, to], expect=1)
        self.assertIn("decoder.embed_tokens.weight (master): f32 300 x 24 and f64 300 x 24", outcome.out)
        run(["train", to / "config.toml", "--resume", "--set", "train.updates=42"], expect=0)
        refused = run(["train", to / "config.toml", "--resume", "--set", "train.updates=43", "--set",
                       "train.precision=fp32"], expect=65)
        self.assertIn("checkpoint reshard", refused.err)
        run(["checkpoint", "reshard", self.run_folder, self.folder.path / "x", "--precision", "fp8"], expect=64)

    def test_inspect_names_every_tensor(self):
        out = run(["checkpoint", "inspect", self.run_folder], expect=0).out
        for name in ("decoder.embed_tokens.weight", "decoder.layers.2.ffn_layernorm.bias", "decoder.layers.0.c_attn"):
            self.assertIn(name, out)
        self.assertIn("after 40 updates", out)


if __name__ == "__main__":
    sys.exit(unittest.main(verbosity=2))
