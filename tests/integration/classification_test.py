#!/usr/bin/env python3
"""Classifiers by the whole program: pre-trained, fine-tuned on labelled texts, evaluated, and told what is wrong."""
import collections
import json
import math
import re
import shutil
import sys
import unittest

from program import WithCorpus, losses, metrics, read_safetensors, run

MASKED = {
    "model__attention": '"bidirectional"', "model__head": '"masked_language"', "model__init": '"bert"',
    "model__positions": '"learned"', "model__embedding_scale": "false", "train__updates": 8,
}
GOOD = ["good", "fine", "nice", "best"]
BAD = ["bad", "dull", "poor", "odd"]
THINGS = ["a", "it", "one", "all", "this", "our run"]


def toy_texts():
    """Texts of several lengths whose class one word tells."""
    return [(f"{thing} is {word}" if i % 3 else word, label)
            for label, words in (("pos", GOOD), ("neg", BAD)) for word in words for i, thing in enumerate(THINGS)]


def tsv(rows, head=("sentence", "label")):
    return "".join("\t".join(map(str, row)) + "\n" for row in [head, *rows])


def of_kind(folder, kind):
    return [line for line in metrics(folder) if line.get("kind") == kind]


class Classification(WithCorpus):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.path = cls.folder.path
        texts = toy_texts()
        (cls.path / "train.tsv").write_text(tsv(texts))
        (cls.path / "valid.tsv").write_text(tsv(texts[::5]))
        run(["train", cls.folder.config("masked", **MASKED)], expect=0)
        run(["train", cls.folder.config("causal", train__updates=8)], expect=0)

    def config(self, name, source="masked", train="train.tsv", valid="valid.tsv", **changes):
        keys = {
            **(MASKED if source == "masked" else {}), "model__head": '"classification"', "data__train": "[]", "data__valid": "[]",
            "data__train_labelled": f'"{self.path / train}"', "data__valid_labelled": f'"{self.path / valid}"',
            "train__init_from": f'"{self.path / source}"', "train__updates": 6, "train__valid_every": 3,
            "train__valid_sequences": 0, **changes}
        return self.folder.config(name, **keys)

    def train(self, name, ranks=1, resume=False, expect=0, **changes):
        return run(["train", self.config(name, **changes), *(["--resume"] if resume else [])], ranks, expect=expect)

    def refused(self, code, *words, ranks=2, **changes):
        outcome = self.train("refused", ranks, expect=code, **changes)
        self.assertEqual(len(outcome.sentences()), 1, outcome.err)
        for word in words:
            self.assertIn(word, outcome.sentences()[0])

    def test_fine_tuning_learns_the_classes(self):
        for source in ("masked", "causal"):
            name = f"tuned_{source}"
            out = self.train(name, source=source, train__updates=150, train__valid_every=50, train__global_batch=8,
                             optimizer__lr=0.005).out
            self.assertRegex(out, rf"starting from the weights of .*{source}/checkpoints/step-0+8; it lacks "
                                  r"decoder\.classification_head\.dense\.bias, .*, which are drawn")
            self.assertEqual("its decoder.lm_head.bias" in out, source == "masked")
            self.assertRegex(out, r"validation after update 150: loss [\d.]+, accuracy 1\.0000 over 10 sequences")
            self.assertRegex(out, r"update 100/150  loss [\d.]+  accuracy [\d.]+  grad norm")
            lines = of_kind(self.path / name, "validation")
            self.assertEqual([line["update"] for line in lines], [50, 100, 150])
            self.assertEqual(lines[-1]["accuracy"], 1.0)
            self.assertNotIn("perplexity", lines[-1])
            steps = of_kind(self.path / name, "step")
            self.assertLess(sum(line["accuracy"] for line in steps[:10]) / 10, 0.8)
            self.assertGreater(sum(line["accuracy"] for line in steps[-10:]) / 10, 0.95)
            self.assertEqual(steps[-1]["tokens"], 150 * 8)
            self.assertEqual(json.loads((self.path / name / "classes.json").read_text()), ["neg", "pos"])

    def test_any_layout_trains_the_same_classifier(self):
        exact = dict(train__precision='"fp64"', train__valid_every=2)
        for source in ("masked", "causal"):
            self.train(f"alone_{source}", source=source, **exact)
            alone = losses(self.path / f"alone_{source}")
            for name, ranks, layout in (
                    ("tensor", 3, dict(parallel__tensor=3)), ("context", 2, dict(parallel__context=2)),
                    ("pipeline", 2, dict(parallel__pipeline=2)), ("data", 3, dict(parallel__data=3)),
                    ("all", 8, dict(parallel__tensor=2, parallel__sequence="true", parallel__context=2, parallel__pipeline=2))):
                self.train(f"{source}_{name}", ranks, source=source, **exact, **layout)
                for mine, other in zip(alone, losses(self.path / f"{source}_{name}"), strict=True):
                    self.assertEqual(mine["kind"], other["kind"])
                    if mine["loss"] is not None:
                        self.assertAlmostEqual(mine["loss"], other["loss"], delta=1e-12 * mine["loss"])
                accuracies = [[line.get("accuracy") for line in metrics(self.path / run_name)]
                              for run_name in (f"alone_{source}", f"{source}_{name}")]
                self.assertEqual(*accuracies)

    def test_a_resumed_run_has_the_bits_of_one_that_was_not(self):
        self.train("whole")
        shutil.copytree(self.path / "masked", self.path / "origin")
        self.train("halves", source="masked", train__init_from=f'"{self.path}/origin"', train__updates=3)
        shutil.rmtree(self.path / "origin")  # what it came from is in its own folder
        self.train("halves", resume=True, train__init_from=f'"{self.path}/origin"')
        self.assertEqual(losses(self.path / "whole")[-4:], losses(self.path / "halves")[-4:])
        weights = []
        for name in ("whole", "halves"):
            run(["checkpoint", "export", self.path / name, self.path / f"{name}.safetensors"], expect=0)
            weights.append(read_safetensors(self.path / f"{name}.safetensors"))
        self.assertEqual(*weights)
        self.assertIn("decoder.classification_head.out_proj.weight", weights[0])

    def evaluated(self, arguments, ranks=1):
        out = run(["eval", *arguments], ranks, expect=0).out
        found = re.search(r": (\d+) texts, loss ([\d.]+), accuracy ([\d.]+) \((\d+) right\), Matthews correlation ([-\d.]+), "
                          r"F1 of '(?:pos|1)' ([\d.]+)\n", out)
        self.assertTrue(found, out)
        return int(found[1]), float(found[2]), float(found[3]), int(found[4]), float(found[5]), float(found[6])

    def test_eval_is_the_run_s_validation_on_any_layout(self):
        self.train("scored")
        last = of_kind(self.path / "scored", "validation")[-1]
        alone = self.evaluated([self.path / "scored", self.path / "valid.tsv", "--predictions", self.path / "one.jsonl"])
        self.assertEqual(alone[0], 10)
        self.assertAlmostEqual(alone[1], last["loss"], places=5)
        self.assertAlmostEqual(alone[2], last["accuracy"], places=4)
        over = self.evaluated([self.path / "scored", self.path / "valid.tsv", "--set", "parallel.tensor=2", "--set",
                               "parallel.context=2", "--predictions", self.path / "four.jsonl"], 4)
        self.assertAlmostEqual(alone[1], over[1], places=5)
        self.assertEqual((alone[0], *alone[2:]), (over[0], *over[2:]))
        one, four = ([json.loads(line) for line in (self.path / f"{name}.jsonl").read_text().splitlines()]
                     for name in ("one", "four"))
        self.assertEqual(len(one), 10)
        right, nll, counts = 0, 0.0, collections.Counter()
        for number, (mine, other) in enumerate(zip(one, four, strict=True)):
            self.assertEqual(mine["line"], number + 2)
            self.assertAlmostEqual(sum(mine["probabilities"].values()), 1.0, places=6)
            self.assertEqual(mine["prediction"], max(mine["probabilities"], key=mine["probabilities"].get))
            self.assertEqual(mine["prediction"], other["prediction"])
            self.assertAlmostEqual(mine["probabilities"]["pos"], other["probabilities"]["pos"], places=5)
            right += mine["prediction"] == mine["label"]
            nll -= math.log(mine["probabilities"][mine["label"]])
            counts[mine["label"], mine["prediction"]] += 1
        self.assertEqual(right, alone[3])
        found, wrong, missed, other = (counts[pair] for pair in (("pos", "pos"), ("neg", "pos"), ("pos", "neg"), ("neg", "neg")))
        spread = (found + wrong) * (found + missed) * (other + wrong) * (other + missed)
        self.assertAlmostEqual(alone[4], (found * other - wrong * missed) / math.sqrt(spread) if spread else 0.0, places=4)
        self.assertAlmostEqual(alone[5], 2 * found / (2 * found + wrong + missed) if found else 0.0, places=4)
        self.assertAlmostEqual(nll / 10, alone[1], places=5)

    def test_a_checkpoint_written_anew_classifies_alike(self):
        self.train("first")
        run(["checkpoint", "reshard", self.path / "first" / "checkpoints" / "step-0000000006", self.path / "anew"], 2, expect=0)
        told = []
        for name in ("first", "anew"):
            numbers = self.evaluated([self.path / name, self.path / "valid.tsv", "--predictions", self.path / f"{name}.jsonl"])
            told.append((numbers, (self.path / f"{name}.jsonl").read_text(), (self.path / name / "classes.json").read_text()))
        self.assertEqual(*told)
        shutil.rmtree(self.path / "first")
        run(["train", self.path / "anew" / "config.toml", "--resume", "--set", "train.updates=7"], expect=0)

    def test_texts_without_labels_get_predictions(self):
        self.train("predicts")
        (self.path / "test.tsv").write_text(tsv([(0, "a run is good"), (1, "a run is bad")], ("index", "sentence")))
        arguments = ["eval", self.path / "predicts", self.path / "test.tsv"]
        out = run([*arguments, "--unlabelled", "--predictions", self.path / "p.jsonl"], expect=0).out
        self.assertIn(": 2 texts\n", out)
        lines = [json.loads(line) for line in (self.path / "p.jsonl").read_text().splitlines()]
        self.assertEqual([line["line"] for line in lines], [2, 3])
        self.assertNotIn("label", lines[0])
        for more, word in (((), "data.label_field"), (("--unlabelled",), "--predictions"), (("--nll", "x"), "--nll")):
            outcome = run([*arguments, *more], 2)
            self.assertNotEqual(outcome.code, 0)
            self.assertEqual(len(outcome.sentences()), 1, outcome.err)
            self.assertIn(word, outcome.err)

    def test_without_names_of_classes_nothing_is_classified(self):
        self.train("nameless")
        classes = self.path / "nameless" / "classes.json"
        for content, word in ((None, "copy it"), ('["one"]', "names 1 classes, but the model has 2"), ("{", "classes.json")):
            classes.unlink() if content is None else classes.write_text(content)
            outcome = run(["eval", self.path / "nameless", self.path / "valid.tsv"], 2, expect=65)
            self.assertEqual(len(outcome.sentences()), 1, outcome.err)
            self.assertIn(word, outcome.err)

    def test_other_commands_refuse_with_a_sentence(self):
        self.train("refuses")
        question = {"premise": "It ran.", "choice1": "It was on.", "choice2": "It was off.", "question": "cause", "label": 0}
        (self.path / "copa.jsonl").write_text(json.dumps(question))
        task = f"copa={self.path / 'copa.jsonl'}"
        for arguments, word in ((["generate", self.path / "refuses", "--prompt", "a"], "does not continue texts"),
                                (["eval-tasks", self.path / "refuses", "--task", task], "does not continue texts"),
                                (["eval", self.path / "masked", self.path / "text.txt", "--predictions", "x"], "--predictions"),
                                (["checkpoint", "export", self.path / "refuses", self.path / "hf", "--format", "huggingface"],
                                 "classification")):
            outcome = run(arguments)
            self.assertNotEqual(outcome.code, 0)
            self.assertEqual(len(outcome.sentences()), 1, outcome.err)
            self.assertIn(word, outcome.err)

    def test_pairs_and_jsonl(self):
        rows = [{"a": text, "b": other, "same": int(label == right)} for (text, label), (other, right)
                in zip(toy_texts(), toy_texts()[::-1])]
        rows += [{"a": row["a"], "b": row["a"], "same": 1} for row in rows]
        (self.path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs = dict(train="pairs.jsonl", valid="pairs.jsonl", data__text_fields='["a", "b"]', data__label_field='"same"',
                     model__classes=2)
        self.train("pairs", **pairs)
        self.assertEqual(json.loads((self.path / "pairs" / "classes.json").read_text()), ["0", "1"])
        texts, loss, *_ = self.evaluated([self.path / "pairs", self.path / "pairs.jsonl"])
        self.assertEqual(texts, len(rows))
        self.assertAlmostEqual(loss, of_kind(self.path / "pairs", "validation")[-1]["loss"], places=5)

    def test_mistakes_are_told(self):
        write = lambda name, text: (self.path / name).write_text(text)  # noqa: E731
        write("torn.tsv", tsv(toy_texts()) + "no label\n")
        self.refused(65, "torn.tsv line 50", "1 columns", train="torn.tsv")
        write("other.tsv", tsv([("x", "pos"), ("y", "neutral")]))
        self.refused(65, "other.tsv line 3", '"neutral"', "neg, pos", valid="other.tsv")
        write("empty.tsv", tsv([("x", "pos"), ("", "neg")]))
        self.refused(65, "empty.tsv line 3 has nothing", train="empty.tsv")
        self.refused(65, "names no column", "data.text_fields", data__text_fields='"text"')
        self.refused(65, "model.classes is 5", model__classes=5)
        self.refused(74, "none.tsv", train="none.tsv")
        self.refused(64, ".tsv or a .jsonl", train="text.txt")
        self.refused(64, "data.train_labelled", data__train_labelled='""')
        self.refused(64, "data.tokenizer", train__init_from='""')
        self.refused(64, "data.train_labelled", data__train=f'"{self.path}/corpus_train"')
        self.refused(64, "data.valid_labelled", data__valid_labelled='""')
        self.refused(64, "model.head", model__head='"masked_language"')
        self.refused(65, "decoder.", "give the model the same sizes", model__length=32, model__ffn=48)
        self.assertFalse((self.path / "refused" / "checkpoints" / "step-0000000001").exists())

    def test_a_plan_needs_no_texts(self):
        config = self.config("planned", data__train_labelled='"/nowhere.tsv"', model__classes=3, model__vocab=301)
        out = run(["plan", config, "-n", 4, "--set", "parallel.pipeline=2"], expect=0).out
        self.assertIn("fit together", out)
        refused = run(["plan", self.config("planned", data__train_labelled='"/nowhere.tsv"', model__vocab=301), "-n", 1])
        self.assertEqual(len(refused.sentences()), 1, refused.err)
        self.assertIn("--set model.classes=N", refused.err)


if __name__ == "__main__":
    unittest.main(argv=sys.argv)
