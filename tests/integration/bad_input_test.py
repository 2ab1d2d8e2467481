#!/usr/bin/env python3
"""Every mistake of a user gives one sentence that names the cure, and a non-zero exit on every rank; nothing is lost."""
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import unittest

from program import WithCorpus, command, environment, losses, metrics, run


class BadInput(WithCorpus):
    def refused(self, arguments, code, *words, ranks=1):
        """The command fails with this code and says exactly one sentence, which has all of these words."""
        outcome = run(arguments, ranks)
        self.assertEqual(outcome.code, code, outcome.err)
        sentences = outcome.sentences()
        self.assertEqual(len(sentences), 1, outcome.err)
        for word in words:
            self.assertIn(word, sentences[0])

    def damaged_corpus(self, name, damage):
        """A copy of the training set with one file changed; returns its prefix."""
        prefix = self.folder.path / name
        for suffix in (".bin", ".idx"):
            shutil.copy(f"{self.folder.path}/corpus_train{suffix}", f"{prefix}{suffix}")
        damage(prefix)
        return prefix

    def train(self, name, **changes):
        return ["train", self.folder.config(name, **changes)]

    def test_unknown_key(self):
        config = self.folder.config("unknown", model__head_scal='"paper"')
        for ranks in (1, 2):
            self.refused(["train", config], 64, "head_scal", "head_scale", str(config), ranks=ranks)

    def test_missing_configuration(self):
        self.refused(["train", self.folder.path / "absent.toml"], 64, "absent.toml")

    def test_updates_to_trace_that_there_are_not(self):
        config = self.folder.config("profile", train__updates=12)
        self.refused(["train", config, "--profile", "5-3"], 64, "5-3", "10-12")
        self.refused(["train", config, "--profile", "10-13"], 64, "10-13", "12 updates", "train.updates", ranks=2)

    def test_layout_that_does_not_fit_the_ranks(self):
        self.refused(self.train("ranks", parallel__tensor=2, parallel__pipeline=2), 64, "2", ranks=3)

    def test_too_few_layers_for_the_stages(self):
        self.refused(self.train("stages", parallel__pipeline=4), 64, "layers", ranks=4)

    def test_truncated_index(self):
        def cut(prefix):
            index = prefix.with_suffix(".idx")
            index.write_bytes(index.read_bytes()[:-3])
        prefix = self.damaged_corpus("cut", cut)
        self.refused(self.train("run_cut", data__train=f'"{prefix}"', model__vocab=300), 65, "cut.idx", ranks=2)

    def test_foreign_index(self):
        prefix = self.damaged_corpus("foreign", lambda p: p.with_suffix(".idx").write_bytes(b"PK\x03\x04" * 40))
        self.refused(self.train("run_foreign", data__train=f'"{prefix}"', model__vocab=300), 65, "foreign.idx")

    def test_truncated_tokens(self):
        def cut(prefix):
            tokens = prefix.with_suffix(".bin")
            tokens.write_bytes(tokens.read_bytes()[: tokens.stat().st_size // 2])
        prefix = self.damaged_corpus("short", cut)
        self.refused(self.train("run_short", data__train=f'"{prefix}"', model__vocab=300), 65, "short")

    def test_tokens_beyond_the_vocabulary(self):
        def spoil(prefix):
            tokens = prefix.with_suffix(".bin")
            tokens.write_bytes(struct.pack("<H", 299) * (tokens.stat().st_size // 2))
        prefix = self.damaged_corpus("beyond", spoil)
        config = self.folder.config("run_beyond", data__train=f'"{prefix}"', model__vocab=200, data__valid="[]")
        self.refused(["train", config], 65, "299", "beyond", ranks=2)

    def test_empty_corpus(self):
        (self.folder.path / "empty.txt").write_text("")
        self.refused(["prepare", self.folder.path / "empty.txt", "--output", self.folder.path / "empty",
                      "--train-vocab", 300], 65, "empty.txt")

    def test_missing_corpus(self):
        self.refused(self.train("run_missing", data__train='"/nowhere/corpus"', model__vocab=300), 74, "/nowhere/corpus",
                     ranks=2)
        unknown = self.train("run_missing", data__train='"runs/none/corpus_train"')
        self.refused(unknown, 74, "runs/none/corpus_train.bin does not exist",
                     "normformer prepare TEXTS --output runs/none/corpus`", ranks=2)

    def test_invalid_utf8(self):
        path = self.folder.path / "latin.txt"
        path.write_bytes("très".encode("latin-1") * 50)
        arguments = ["prepare", path, "--output", self.folder.path / "latin", "--train-vocab", 300]
        self.refused(arguments, 65, "latin.txt", "2")
        for policy in ("replace", "bytes"):
            run([*arguments, "--invalid-utf8", policy], expect=0)

    def test_checkpoint_of_another_model(self):
        config = self.folder.config("other")
        run(["train", config, "--set", "train.updates=2"], expect=0)
        self.refused(["train", config, "--resume", "--set", "model.width=48"], 65, "model.width", "24", "48", ranks=2)
        run(["checkpoint", "verify", self.folder.path / "other"], expect=0)

    def test_folder_that_holds_a_run(self):
        config = self.folder.config("held")
        run(["train", config, "--set", "train.updates=2"], expect=0)
        before = losses(self.folder.path / "held")
        self.refused(["train", config], 64, "--resume", ranks=2)
        self.assertEqual(losses(self.folder.path / "held"), before)

    def test_damaged_newest_checkpoint_is_named_and_the_one_before_taken(self):
        config = self.folder.config("damaged", checkpoint__every=3, train__updates=9)
        run(["train", config], expect=0)
        checkpoints = sorted((self.folder.path / "damaged" / "checkpoints").glob("step-*"))
        data = max((f for f in checkpoints[-1].iterdir()), key=lambda f: f.stat().st_size)
        raw = bytearray(data.read_bytes())
        raw[len(raw) // 2] ^= 1
        data.write_bytes(bytes(raw))
        outcome = run(["train", config, "--resume", "--set", "train.updates=10"], 2, expect=0)
        self.assertIn(checkpoints[-1].name, outcome.err)
        self.assertIn("resumed after update 6", outcome.out)

    def test_full_disk_while_saving(self):
        """A tiny file system holds the first checkpoint and not the second: the run goes on and the first stays good."""
        disk = self.folder.path / "disk"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True).returncode:
            self.skipTest("a small file system cannot be mounted here")
        try:
            config = self.folder.config("disk/run", checkpoint__every=2, train__updates=4, checkpoint__keep=2)
            outcome = run(["train", config], 2)
            self.assertIn("no checkpoint was saved", outcome.err)
            run(["checkpoint", "verify", disk / "run"], expect=0)
        finally:
            subprocess.run(["umount", disk], check=True)

    def test_one_process_commands_refuse_ranks(self):
        outcome = run(["checkpoint", "inspect", self.folder.path], ranks=2)
        self.assertEqual(outcome.code, 64)
        self.assertIn("without mpirun", outcome.err)

    def test_training_that_explodes_ends_with_a_sentence(self):
        config = self.folder.config("explodes", optimizer__lr=1e30, optimizer__warmup_updates=0, train__max_skipped=2,
                                    optimizer__clip_norm=0.0)
        outcome = run(["train", config], 2)
        self.assertEqual(outcome.code, 77, outcome.err)
        self.assertEqual(len(outcome.sentences()), 1, outcome.err)

    def test_a_loss_scale_that_cannot_fall_further_ends_with_its_cure(self):
        config = self.folder.config("overflows", train__precision='"fp16"', train__max_skipped=1,
                                    train__loss_scale_init=2.0**30, train__loss_scale_min=2.0**28)
        outcome = run(["train", config], 2)
        self.assertEqual(outcome.code, 77, outcome.err)
        self.assertEqual(len(outcome.sentences()), 1, outcome.err)
        self.assertIn("after 3 overflows the loss scale fell below 268435456 (train.loss_scale_min)", outcome.err)
        self.assertIn("train.precision = \"bf16\"", outcome.err)
        lines = metrics(self.folder.path / "overflows")
        self.assertEqual([line["loss_scale"] for line in lines], [2.0**30, 2.0**29, 2.0**28])
        self.assertEqual([line["overflows"] for line in lines], [1, 2, 3])

    def test_a_failing_rank_ends_the_others(self):
        """A rank that dies is noticed; the others do not hang."""
        config = self.folder.config("killed", train__updates=100000, parallel__tensor=3)
        process = subprocess.Popen(command(["train", config], 3), env=environment(), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while not metrics(self.folder.path / "killed") and process.poll() is None:
            time.sleep(0.02)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[1]), signal.SIGKILL)
        self.assertNotEqual(process.wait(timeout=30), 0)


if __name__ == "__main__":
    sys.exit(unittest.main(verbosity=2))
