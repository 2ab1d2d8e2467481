#!/usr/bin/env python3
"""`normformer generate`: many prompts at once, lines of JSON, the same under every layout, and what it refuses."""
import json
import subprocess
import sys
import unittest

from program import WithCorpus, command, environment, run

PROMPTS = ["The ", "", "On GPUs attention runs on kernels of its own, and so do the optimizer and the loss that it follows; ",
           "caf\u00e9 \u4e2d\u6587 ", "A", "   two\tspaces", "The "]
# What ranks are for, tensor x pipeline x data and whether tokens are dealt out.
LAYOUTS = [(1, 1, 1, False), (2, 1, 1, False), (3, 1, 1, True), (1, 3, 1, False), (1, 1, 3, False), (2, 1, 2, True)]


def layout_flags(tensor, pipeline, data, sequence):
    keys = {"tensor": tensor, "pipeline": pipeline, "data": data, "sequence": str(sequence).lower()}
    return [flag for key, value in keys.items() for flag in ("--set", f"parallel.{key}={value}")]


class Generation(WithCorpus):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.path = cls.folder.path
        cls.run_folder = cls.path / "trained"
        run(["train", cls.folder.config("trained", train__updates=40, train__precision='"fp64"', model__qkv_norm="true")],
            expect=0)
        cls.prompts = cls.path / "prompts.txt"
        cls.prompts.write_text("\n".join(PROMPTS) + "\n")

    def lines(self, *arguments, ranks=1):
        """What is written of all prompts."""
        return run(["generate", self.run_folder, "--prompts", self.prompts, *arguments], ranks, expect=0).out

    def test_the_same_bytes_under_every_layout_and_whatever_the_batch(self):
        options = ["--max-tokens", 24, "--temperature", 1.1, "--top-p", 0.97, "--seed", 4, "--samples", 2]
        expected = self.lines(*options)
        self.assertEqual(len(expected.splitlines()), 2 * len(PROMPTS))
        for degrees in LAYOUTS:
            for batch in (1, 4):
                found = self.lines(*options, "--batch", batch, *layout_flags(*degrees),
                                   ranks=degrees[0] * degrees[1] * degrees[2])
                self.assertEqual(found, expected, (degrees, batch))

    def test_lines_say_what_was_made_of_each_prompt_in_order(self):
        output = self.path / "made.jsonl"
        self.assertEqual(self.lines("--max-tokens", 9, "--samples", 3, "--output", output, ranks=2), "")
        made = [json.loads(line) for line in output.read_text().splitlines()]
        self.assertEqual([(line["prompt"], line["sample"]) for line in made],
                         [(prompt, sample) for prompt in PROMPTS for sample in range(3)])
        tokens = json.loads((self.run_folder / "tokenizer" / "vocab.json").read_text())
        for line in made:
            self.assertEqual(list(line), ["prompt", "sample", "text", "tokens"])
            self.assertLessEqual(len(line["tokens"]), 9)
            self.assertLess(max(line["tokens"], default=0), len(tokens))
        self.assertGreater(len({line["text"] for line in made}), len(PROMPTS))
        # A prompt that is given twice is two prompts, with draws of their own.
        self.assertNotEqual([line["text"] for line in made[:3]], [line["text"] for line in made[-3:]])

    def test_logits_are_those_that_tokens_were_drawn_from_under_every_layout(self):
        options = ["--max-tokens", 6, "--temperature", 0, "--logits"]
        expected = [json.loads(line) for line in self.lines(*options).splitlines()]
        vocabulary = len(json.loads((self.run_folder / "tokenizer" / "vocab.json").read_text()))
        for line in expected:
            self.assertEqual([len(row) for row in line["logits"]], [vocabulary] * len(line["tokens"]))
            self.assertEqual([row.index(max(row)) for row in line["logits"]], line["tokens"])
        for degrees in LAYOUTS:
            found = self.lines(*options, "--batch", 2, *layout_flags(*degrees), ranks=degrees[0] * degrees[1] * degrees[2])
            for line, other in zip(expected, found.splitlines(), strict=True):
                rows, others = line["logits"], json.loads(other)["logits"]
                self.assertLess(max((abs(a - b) for row, row_b in zip(rows, others, strict=True)
                                     for a, b in zip(row, row_b, strict=True)), default=0.0), 1e-11, degrees)

    def test_one_prompt_is_written_as_text_and_as_among_others(self):
        made = [json.loads(line) for line in self.lines("--max-tokens", 20, "--temperature", 0).splitlines()]
        for prompt, line in zip(PROMPTS, made):
            alone = run(["generate", self.run_folder, "--prompt", prompt, "--max-tokens", 20, "--temperature", 0], expect=0)
            self.assertEqual(alone.out, prompt + line["text"] + "\n")

    def test_prompts_come_from_the_command_line_from_text_and_from_json(self):
        options = ["--max-tokens", 5, "--seed", 3]
        expected = self.lines(*options)
        json_file = self.path / "prompts.jsonl"
        json_file.write_text("\n".join(json.dumps({"id": i, "prompt": p}) + "\n" for i, p in enumerate(PROMPTS)))
        crlf = self.path / "crlf.txt"
        crlf.write_bytes("\r\n".join(PROMPTS).encode())
        given = [flag for prompt in PROMPTS[:3] for flag in ("--prompt", prompt)]
        rest = self.path / "rest.txt"
        rest.write_text("\n".join(PROMPTS[3:]))
        for arguments in (["--prompts", json_file], ["--prompts", crlf], [*given, "--prompts", rest]):
            self.assertEqual(run(["generate", self.run_folder, *arguments, *options], expect=0).out, expected, arguments)

    def test_bytes_that_are_no_text_are_continued(self):
        raw = self.path / "raw.txt"
        raw.write_bytes(b"\xff\xfe\x80 abc\n")
        output = self.path / "raw.jsonl"
        run(["generate", self.run_folder, "--prompts", raw, "--max-tokens", 3, "--output", output], expect=0)
        self.assertEqual(json.loads(output.read_text())["prompt"], "\ufffd\ufffd\ufffd abc")

    def refused(self, code, *words, arguments, ranks=1):
        outcome = run(["generate", self.run_folder, *arguments], ranks)
        self.assertEqual(outcome.code, code, outcome.err)
        self.assertEqual(len(outcome.sentences()), 1, outcome.err)
        for word in words:
            self.assertIn(word, outcome.sentences()[0])

    def test_mistakes_get_one_sentence_and_lose_nothing(self):
        def file_of(name, content):
            (self.path / name).write_bytes(content)
            return ["--prompts", self.path / name]
        for ranks in (1, 2):
            self.refused(74, "absent.txt", arguments=["--prompts", self.path / "absent.txt"], ranks=ranks)
            self.refused(65, "empty.txt holds no prompt", arguments=file_of("empty.txt", b""), ranks=ranks)
            self.refused(65, "bad.jsonl line 3", "not valid JSON",
                         arguments=file_of("bad.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n'), ranks=ranks)
            self.refused(64, "made_before.jsonl exists already", ranks=ranks,
                         arguments=[*file_of("one.txt", b"a\n"), "--output", *file_of("made_before.jsonl", b"kept")[1:]])
            self.assertEqual((self.path / "made_before.jsonl").read_bytes(), b"kept")
            self.refused(74, "nowhere/made.jsonl", ranks=ranks,
                         arguments=[*file_of("one.txt", b"a\n"), "--output", self.path / "nowhere" / "made.jsonl"])
        for line in (b'["a"]', b'{"text": "a"}', b'{"prompt": 3}', b'"a"'):
            self.refused(65, "wrong.jsonl line 1", '{"prompt": "Once"}', arguments=file_of("wrong.jsonl", line))
        self.refused(65, "wrong.jsonl line 1", arguments=file_of("wrong.jsonl", b"[" * 100000))
        self.refused(65, "wrong.jsonl line 1", arguments=file_of("wrong.jsonl", b'{"prompt": "\xff"}'))

    def test_layouts_of_a_file_are_asked_for_as_those_of_keys(self):
        for name, key, said in (("context", "context = 2", "parallel.context = 1 only"), ("tensor", "tensor = 2", "1 rank")):
            file = self.path / f"{name}.toml"
            file.write_text(f"[parallel]\n{key}\n")
            told = []
            for layout in (f"@{file}", f"parallel.{name}=2"):
                outcome = run(["generate", self.run_folder, "--prompt", "a", "--set", layout], expect=64)
                self.assertIn(said, outcome.err)
                told.append(outcome.sentences())
            self.assertEqual(*told)

    def test_options_that_make_no_sense_are_refused(self):
        for wrong in (["--batch", 0], ["--samples", -1], ["--max-tokens", -1], ["--temperature", "nan"], ["--temperature", -1],
                      ["--top-p", 1.5], ["--top-p", "nan"], ["--top-k", -2]):
            outcome = run(["generate", self.run_folder, "--prompt", "a", *wrong], expect=64)
            self.assertIn(wrong[0], outcome.err)

    def test_no_tokens_are_a_text_too(self):
        for line in map(json.loads, self.lines("--max-tokens", 0).splitlines()):
            self.assertEqual((line["text"], line["tokens"]), ("", []))

    def test_a_full_disk_ends_it(self):
        with open("/dev/full", "w", encoding="utf-8") as full:
            process = subprocess.run(command(["generate", self.run_folder, "--prompts", self.prompts, "--max-tokens", 2]),
                                     stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), timeout=120)
        self.assertEqual(process.returncode, 74, process.stderr)
        self.assertIn("cannot write to stdout", process.stderr)


if __name__ == "__main__":
    sys.exit(unittest.main(verbosity=2))
