#!/usr/bin/env python3
"""Masked language models by the whole program: pre-training, validation, evaluation, and runs that start from weights."""
import json
import re
import shutil
import sys
import unittest

from program import WithCorpus, losses, metrics, numbers, read_safetensors, run

MASKED = {
    "model__attention": '"bidirectional"', "model__head": '"masked_language"', "model__init": '"bert"',
    "model__positions": '"learned"', "model__embedding_scale": "false", "train__updates": 8, "train__valid_every": 4,
}


def of_kind(folder, kind):
    return [line for line in metrics(folder) if line.get("kind") == kind]


class MaskedModels(WithCorpus):
    def train(self, name, ranks=1, resume=False, expect=0, **changes):
        config = self.folder.config(name, **{**MASKED, **changes})
        return run(["train", config, *(["--resume"] if resume else [])], ranks, expect=expect)

    def weights_of(self, name):
        path = self.folder.path / f"{name}.safetensors"
        run(["checkpoint", "export", self.folder.path / name, path, "--dtype", "f64"], expect=0)
        return read_safetensors(path)

    def assert_same_weights(self, got, want):
        """But for an update of next to nothing."""
        self.assertEqual(got.keys(), want.keys())
        for name in want:
            for mine, other in zip(numbers(got[name]), numbers(want[name]), strict=True):
                self.assertAlmostEqual(mine, other, delta=1e-20)

    def test_any_layout_trains_the_same_model(self):
        self.train("alone", train__precision='"fp64"')
        alone = losses(self.folder.path / "alone")
        layouts = {"tensor": 3, "context": 2, "pipeline": 2, "data": 3}
        for axis, degree in layouts.items():
            name = f"over_{axis}"
            self.train(name, degree, train__precision='"fp64"', **{f"parallel__{axis}": degree})
            for mine, other in zip(alone, losses(self.folder.path / name), strict=True):
                self.assertAlmostEqual(mine["loss"], other["loss"], delta=1e-12 * mine["loss"])
                self.assertEqual(mine.get("tokens"), other.get("tokens"))

    def test_the_loss_is_over_masked_tokens_and_falls(self):
        self.train("longer", train__updates=60, train__valid_every=0)
        steps = of_kind(self.folder.path / "longer", "step")
        # 60 batches of 5 samples of 16 tokens, the first of which is never predicted.
        self.assertAlmostEqual(steps[-1]["tokens"] / (60 * 5 * 15), 0.15, delta=0.03)
        first, last = (sum(s["loss"] for s in part) for part in (steps[:10], steps[-10:]))
        self.assertLess(last, 0.95 * first)

    def test_a_resumed_run_has_the_bits_of_one_that_was_not(self):
        self.train("whole")
        self.train("halves", train__updates=4)
        self.train("halves", resume=True)
        self.assertEqual(losses(self.folder.path / "whole")[-3:], losses(self.folder.path / "halves")[-3:])
        self.assertEqual(self.weights_of("whole"), self.weights_of("halves"))

    def test_the_vocabulary_has_a_mask(self):
        self.train("vocabulary", train__updates=1)
        config = (self.folder.path / "vocabulary" / "config.toml").read_text()
        tokens = len(json.loads((self.folder.path / "vocabulary" / "tokenizer" / "vocab.json").read_text()))
        self.assertIn(f"\nvocab = {tokens + 1}\n", config)
        self.assertIn(f"\nmask_token = {tokens}\n", config)
        out = self.train("small", expect=64, model__vocab=tokens)
        self.assertIn("data.mask_token", out.err)

    def test_eval_scores_masked_tokens_alike_on_any_layout_and_generate_refuses(self):
        self.train("scored")
        text = self.folder.path / "text.txt"
        one = run(["eval", self.folder.path / "scored", text], expect=0).out
        masked = re.search(r": (\d+) tokens, (\d+) of them masked, loss ([\d.]+), perplexity", one)
        self.assertAlmostEqual(int(masked[2]) / int(masked[1]), 0.15, delta=0.02)
        two = run(["eval", self.folder.path / "scored", text, "--set", "parallel.tensor=2"], 2, expect=0).out
        again = re.search(r": (\d+) tokens, (\d+) of them masked, loss ([\d.]+), perplexity", two)
        self.assertEqual(again.groups()[:2], masked.groups()[:2])
        self.assertAlmostEqual(float(again[3]), float(masked[3]), places=4)
        refused = run(["eval", self.folder.path / "scored", text, "--nll", self.folder.path / "nll"])
        self.assertNotEqual(refused.code, 0)
        self.assertIn("--nll", refused.err)
        refused = run(["generate", self.folder.path / "scored", "--prompt", "a"])
        self.assertNotEqual(refused.code, 0)
        self.assertEqual(len(refused.sentences()), 1, refused.err)
        self.assertIn("does not continue texts", refused.err)

    def test_a_run_starts_from_weights_in_any_layout_and_precision(self):
        self.train("source")
        source = self.weights_of("source")
        start = dict(train__init_from=f'"{self.folder.path}/source"', optimizer__lr=1e-30, train__updates=1,
                     optimizer__weight_decay=0)
        self.train("taken", 2, parallel__tensor=2, train__precision='"fp64"', **start)
        self.assert_same_weights(self.weights_of("taken"), source)
        # A causal model takes all but the head.
        out = self.train("causal", 2, parallel__pipeline=2, model__attention='"causal"', model__head='"language"',
                         model__vocab=source["decoder.embed_tokens.weight"][1][0], **start).out
        self.assertRegex(out, r"starting from the weights of .*source/checkpoints/step-0+8")
        self.assertRegex(out, r"its decoder\.lm_head\.bias, .* are not used")
        self.assert_same_weights(self.weights_of("causal"), {name: t for name, t in source.items() if ".lm_head." not in name})
        # The other way round the head is drawn.
        out = self.train("back", train__init_from=f'"{self.folder.path}/causal"', train__updates=1).out
        self.assertRegex(out, r"it lacks decoder\.lm_head\.bias, .*, which are drawn")

    def test_what_does_not_fit_is_named(self):
        self.train("base")
        shape = self.train("wider", expect=65, model__width=48, train__init_from=f'"{self.folder.path}/base"')
        self.assertEqual(len(shape.sentences()), 1, shape.err)
        self.assertRegex(shape.err, r"has decoder\.[\w.]+ as \[.*\], but this run's model as \[.*\]")
        empty = self.train("empty", expect=65, train__init_from=f'"{self.folder.path}/nowhere"')
        self.assertIn("holds no checkpoint", empty.err)

    def test_a_resumed_run_does_not_start_again(self):
        self.train("origin")
        start = dict(train__init_from=f'"{self.folder.path}/origin"')
        self.train("child", train__updates=4, **start)
        shutil.rmtree(self.folder.path / "origin")
        out = self.train("child", resume=True, **start).out
        self.assertIn("resumed after update 4", out)


if __name__ == "__main__":
    unittest.main(argv=sys.argv)
