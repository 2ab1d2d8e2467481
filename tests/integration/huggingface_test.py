#!/usr/bin/env python3
"""Folders for Hugging Face's transformers: out of this program and into it, and held against transformers itself where it is
installed (with torch and safetensors; else those tests are skipped)."""
import json
import pathlib
import random
import shutil
import struct
import sys
import tempfile
import unittest

from program import ROOT, WithCorpus, run

try:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    MISSING = ""
except ImportError as error:
    MISSING = f"transformers is not installed ({error})"

BASELINE = {"model__head_scale": '"none"', "model__post_attention_norm": "false", "model__ffn_norm": "false",
            "model__residual_scale": "false", "model__positions": '"learned"', "model__embedding_scale": "false",
            "model__init": '"gpt2"'}
GPT2 = {
    "gelu": BASELINE,
    "gelu_tanh": {**BASELINE, "model__activation": '"gelu_tanh"', "model__ffn": 40},
    "relu_squared": {**BASELINE, "model__activation": '"relu_squared"', "model__norm_eps": 1e-3},
}
NORMFORMER = {
    "paper": {},
    "fairseq": {"model__head_scale": '"fairseq"', "model__residual_scale": "false"},
    "sinusoidal_baseline": {**BASELINE, "model__positions": '"sinusoidal"'},
    "scaled_embeddings": {**BASELINE, "model__embedding_scale": "true"},
    "post_ln": {**BASELINE, "model__norm_position": '"post"'},
    "post_ln_normformer": {"model__norm_position": '"post"', "model__head_scale": '"fairseq"'},
    "learned_relu": {"model__positions": '"learned"', "model__activation": '"relu_squared"', "model__norm_eps": 1e-3},
    "gelu_tanh_ffn_norm": {"model__head_scale": '"none"', "model__post_attention_norm": "false",
                           "model__activation": '"gelu_tanh"'},
    "qkv_norm": {"model__qkv_norm": "true"},
    "qkv_norm_alone": {**BASELINE, "model__qkv_norm": "true"},
    "residual_scale_alone": {**BASELINE, "model__residual_scale": "true"},
}
TEXTS = ["Once upon a time", "  two spaces,\n\nlines\tand tabs  ", "don't I'LL we've 'tis ''s", "1,234.5 e\u0301 \u00bd \u2167",
         "\u00e4\u00f6\u00fc \u4e2d\u6587 \U0001f600", " ", "\n", "def f(x):\n    return x**2\n", "\u00a0\u00a0x \u200bx"]


def read_safetensors(path):
    """The bytes behind the header, by name: a reader of the format that is not the program's own."""
    raw = pathlib.Path(path).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + size])
    header.pop("__metadata__", None)
    data = raw[8 + size:]
    return {name: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for name, t in header.items()}


def jitter(path):
    """Adds noise to all weights of a file of f32, so that no gain is 1, no bias 0 and no two channels alike."""
    raw = path.read_bytes()
    begin = 8 + struct.unpack("<Q", raw[:8])[0]
    values = struct.unpack(f"<{(len(raw) - begin) // 4}f", raw[begin:])
    noise = random.Random(path.parent.name)
    path.write_bytes(raw[:begin] + struct.pack(f"<{len(values)}f", *(v + noise.gauss(0.0, 0.2) for v in values)))


def nlls(lines):
    return [json.loads(line)["nll"] for line in lines.splitlines()]


class HuggingFace(WithCorpus):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.path = cls.folder.path
        cls.text = cls.path / "short.txt"
        cls.text.write_text((cls.path / "text.txt").read_text()[:1500])
        for name, settings in {**GPT2, **NORMFORMER}.items():
            run(["train", cls.folder.config(f"{name}-trained", train__updates=2, **settings)], expect=0)
            cls.export(f"{name}-trained", f"{name}-hf")
            jitter(cls.path / f"{name}-hf/model.safetensors")
            run(["checkpoint", "import", cls.path / f"{name}-hf", "--output", cls.path / name], expect=0)

    @classmethod
    def export(cls, name, folder, expect=0):
        return run(["checkpoint", "export", cls.path / name, "--output", cls.path / folder, "--format", "huggingface"],
                   expect=expect)

    def model_of(self, folder):
        model, found = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        self.assertEqual((found["missing_keys"], found["unexpected_keys"], found["mismatched_keys"]), ([], [], []))
        return model.eval()

    def nll_of(self, run_folder):
        path = self.path / "nll.jsonl"
        run(["eval", run_folder, self.text, "--nll", path], expect=0)
        return nlls(path.read_text())

    def their_nll(self, folder):
        """Each token of the text predicted as `eval` does it: in blocks of the model's length, each behind the token before."""
        model, tokenizer = self.model_of(folder), AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(self.text.read_text())["input_ids"]
        length, inputs, found = 16, [tokenizer.eos_token_id, *ids[:-1]], []
        with torch.no_grad():
            for begin in range(0, len(ids), length):
                logits = model(torch.tensor([inputs[begin:begin + length]])).logits[0]
                targets = torch.tensor(ids[begin:begin + length])
                found += torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
        return found

    @unittest.skipIf(MISSING, MISSING)
    def test_transformers_gives_the_same_likelihoods(self):
        for name in {**GPT2, **NORMFORMER}:
            ours, theirs = self.nll_of(self.path / name), self.their_nll(self.path / f"{name}-hf")
            self.assertEqual(len(ours), len(theirs))
            largest = max(abs(a - b) for a, b in zip(ours, theirs))
            print(f"{name}: {len(ours)} tokens, largest difference {largest:.2e}", file=sys.stderr)
            self.assertLess(largest, 1e-4, name)

    @unittest.skipIf(MISSING, MISSING)
    def test_the_baseline_is_a_plain_gpt2(self):
        for name in GPT2:
            folder = self.path / f"{name}-hf"
            model = AutoModelForCausalLM.from_pretrained(folder)
            self.assertEqual(type(model).__name__, "GPT2LMHeadModel")
            self.assertEqual(list(folder.glob("*.py")), [])

    @unittest.skipIf(MISSING, MISSING)
    def test_the_tokenizers_give_the_same_ids(self):
        path, folder = self.path / "texts.txt", self.path / "paper-hf"
        for fast in (True, False):
            tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=fast)
            for text in [*TEXTS, self.text.read_text()]:
                path.write_text(text)
                run(["eval", self.path / "paper", path, "--nll", self.path / "ids.jsonl"], expect=0)
                ours = [json.loads(line)["token"] for line in (self.path / "ids.jsonl").read_text().splitlines()]
                self.assertEqual(tokenizer(text)["input_ids"], ours, text[:80])
                self.assertEqual(tokenizer.decode(ours, clean_up_tokenization_spaces=False), text)

    @unittest.skipIf(MISSING, MISSING)
    def test_generation_writes_the_same_text_with_and_without_a_cache(self):
        for name in ("paper", "post_ln_normformer", "learned_relu", "gelu"):
            folder = self.path / f"{name}-hf"
            model, tokenizer = self.model_of(folder), AutoTokenizer.from_pretrained(folder)
            prompt = tokenizer("The ", return_tensors="pt")
            ours = run(["generate", self.path / name, "--prompt", "The ", "--max-tokens", 8, "--temperature", 0], expect=0).out
            for cache in (True, False):
                ids = model.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=0)
                self.assertEqual(tokenizer.decode(ids[0], clean_up_tokenization_spaces=False) + "\n", ours, (name, cache))
            beams = [model.generate(**prompt, max_new_tokens=8, num_beams=3, use_cache=cache, pad_token_id=0).tolist()
                     for cache in (True, False)]
            self.assertEqual(beams[0], beams[1], name)

    @unittest.skipIf(MISSING, MISSING)
    def test_texts_that_are_generated_together_have_transformers_tokens_and_logits(self):
        prompts = ["The ", "A rank", "On GPUs", "of", "LayerNorm", "x"]
        (self.path / "prompts.txt").write_text("\n".join(prompts))
        compared, largest = 0, 0.0
        for name in {**GPT2, **NORMFORMER}:
            folder = self.path / f"{name}-hf"
            model, tokenizer = self.model_of(folder), AutoTokenizer.from_pretrained(folder)
            made = run(["generate", self.path / name, "--prompts", self.path / "prompts.txt", "--batch", 4, "--max-tokens", 8,
                        "--temperature", 0, "--logits"], 2, expect=0).out.splitlines()
            for prompt, line in zip(prompts, made, strict=True):
                ids = tokenizer(prompt, return_tensors="pt")
                theirs = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
                theirs = [token for token in theirs[ids["input_ids"].shape[1]:] if token != tokenizer.eos_token_id]
                ours = json.loads(line)
                self.assertEqual(ours["tokens"], theirs, (name, prompt))
                with torch.no_grad():
                    rows = model(torch.tensor([[*ids["input_ids"][0].tolist(), *theirs]])).logits[0, -len(theirs) - 1:-1]
                difference = (rows - torch.tensor(ours["logits"])).abs().max().item()
                self.assertLess(difference, 1e-4, (name, prompt))
                compared, largest = compared + len(theirs), max(largest, difference)
        print(f"{compared} tokens are transformers', largest difference of a logit {largest:.2e}", file=sys.stderr)

    @unittest.skipIf(MISSING, MISSING)
    def test_padding_on_the_left_changes_no_logits(self):
        model = self.model_of(self.path / "paper-hf")
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
        with torch.no_grad():
            plain, left = model(ids).logits, model(padded, attention_mask=mask).logits[:, 3:]
        self.assertLess((plain - left).abs().max().item(), 1e-5)

    @unittest.skipIf(MISSING, MISSING)
    def test_labels_make_a_loss_that_trains(self):
        model = self.model_of(self.path / "paper-hf")
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        out = model(ids, labels=torch.tensor([[5, 6, -100, 8, 9]]))
        nll = -out.logits[0].log_softmax(-1)
        self.assertAlmostEqual(out.loss.item(), ((nll[0, 6] + nll[2, 8] + nll[3, 9]) / 3).item(), places=5)
        model.train()
        model(ids, labels=ids).loss.backward()
        self.assertEqual([n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()], [])

    @unittest.skipIf(MISSING, MISSING)
    def test_what_transformers_saves_comes_back(self):
        for name in ("paper", "gelu"):
            saved = self.path / f"{name}-saved"
            model = self.model_of(self.path / f"{name}-hf")
            model.save_pretrained(saved, max_shard_size="20KB")
            self.assertGreater(len(list(saved.glob("model-*.safetensors"))), 1)
            run(["checkpoint", "import", saved, "--output", self.path / f"{name}-again"], expect=0)
            self.assertEqual(self.weights(self.path / f"{name}-again"), self.weights(self.path / name))
            model.save_pretrained(self.path / f"{name}-bin", safe_serialization=False)
            refused = run(["checkpoint", "import", self.path / f"{name}-bin", "--output", self.path / "x"], expect=65)
            self.assertEqual(len(refused.sentences()), 1, refused.err)
            self.assertIn("safe_serialization=True", refused.err)

    def weights(self, run_folder):
        path = pathlib.Path(f"{run_folder}.weights")
        run(["checkpoint", "export", run_folder, path], expect=0)
        return read_safetensors(path)

    def test_weights_come_back_bit_for_bit(self):
        for name in {**GPT2, **NORMFORMER}:
            trained, plain, back = self.path / f"{name}-trained", f"{name}-plain", self.path / f"{name}-back"
            self.export(trained, plain)
            run(["checkpoint", "import", self.path / plain, "--output", back], expect=0)
            self.assertEqual(self.weights(back), self.weights(trained), name)
            self.assertEqual(self.nll_of(back), self.nll_of(trained), name)
            # And the other way round.
            self.export(name, f"{name}-hf-again")
            self.assertEqual(*(read_safetensors(self.path / folder / "model.safetensors")
                               for folder in (f"{name}-hf", f"{name}-hf-again")), name)

    def test_an_imported_folder_trains_on(self):
        config = self.folder.config("goes_on", **BASELINE)
        run(["checkpoint", "import", self.path / "gelu-hf", config], expect=0)
        run(["train", config, "--resume", "--set", "train.updates=2"], 2, expect=0)
        again = run(["checkpoint", "import", self.path / "gelu-hf", config], expect=64)
        self.assertIn("already holds checkpoints", again.err)

    def test_a_configuration_of_another_model_is_told_the_key(self):
        for key, wrong, said in (("model__heads", 2, "model.heads = 2"), ("model__layers", 4, "model.layers = 4"),
                                 ("model__activation", '"gelu_tanh"', 'model.activation = "gelu_tanh"'),
                                 ("model__ffn", 40, "model.ffn = 40"), ("model__ffn_norm", "true", "model.ffn_norm = true")):
            config = self.folder.config("other", **{**BASELINE, key: wrong})
            refused = run(["checkpoint", "import", self.path / "gelu-hf", config], expect=64)
            self.assertEqual(len(refused.sentences()), 1, refused.err)
            self.assertIn(said, refused.err)

    def test_masked_models_are_refused(self):
        masked = {**BASELINE, "model__attention": '"bidirectional"', "model__head": '"masked_language"'}
        run(["train", self.folder.config("masked", train__updates=1, **masked)], expect=0)
        refused = self.export("masked", "masked-hf", expect=64)
        self.assertEqual(len(refused.sentences()), 1, refused.err)
        self.assertIn('is "masked_language"; --format safetensors writes any', refused.err)
        self.assertFalse((self.path / "masked-hf").exists())

    def test_sizes_that_the_weights_have_not_are_refused_at_once(self):
        for name, key, said in (("gelu", "vocab_size", "'transformer.wte.weight'"),
                                ("gelu", "n_positions", "'transformer.wpe.weight'"),
                                ("gelu", "n_inner", "c_fc.weight'"), ("paper", "vocab", "'decoder.embed_tokens.weight'"),
                                ("paper", "ffn", "fc1.weight'"), ("paper", "layers", "has no tensor 'decoder.layers.")):
            claims = self.path / "claims"
            shutil.copytree(self.path / f"{name}-hf", claims)
            config = json.loads((claims / "config.json").read_text())
            (claims / "config.json").write_text(json.dumps({**config, key: 2**30}))
            refused = run(["checkpoint", "import", claims, "--output", self.path / "claimed"], expect=65)
            self.assertEqual(len(refused.sentences()), 1, refused.err)
            self.assertIn(said, refused.err)
            self.assertFalse((self.path / "claimed").exists())
            shutil.rmtree(claims)

    def test_types_are_as_asked_for(self):
        for dtype, stored, name in (("bf16", "BF16", "bfloat16"), ("f16", "F16", "float16"), ("f64", "F64", "float64")):
            folder = self.path / f"as-{dtype}"
            run(["checkpoint", "export", self.path / "gelu", folder, "--format", "huggingface", "--dtype", dtype], expect=0)
            self.assertEqual({t[0] for t in read_safetensors(folder / "model.safetensors").values()}, {stored})
            self.assertEqual(json.loads((folder / "config.json").read_text())["torch_dtype"], name)

    def test_a_folder_that_exists_is_left_alone(self):
        refused = run(["checkpoint", "export", self.path / "gelu", self.path / "gelu-hf", "--format", "huggingface"], expect=64)
        self.assertIn("exists already", refused.err)
        self.assertEqual(list(self.path.glob(".tmp-*")), [])


class Recorded(unittest.TestCase):
    """A folder that transformers itself has written, and the likelihoods that it has recorded
    (tests/tools/record_huggingface.py)."""

    def test_a_gpt2_of_transformers_gives_its_likelihoods(self):
        recorded = ROOT / "tests/fixtures/huggingface/gpt2"
        expected = json.loads((recorded / "expected.json").read_text())
        with tempfile.TemporaryDirectory() as name:
            path = pathlib.Path(name)
            (path / "text.txt").write_text(expected.pop("text"))
            for activation, theirs in expected.items():
                folder, imported, nll = (path / f"{activation}{what}" for what in ("", "-run", ".jsonl"))
                shutil.copytree(recorded, folder)
                config = json.loads((folder / "config.json").read_text())
                (folder / "config.json").write_text(json.dumps({**config, "activation_function": activation}))
                run(["checkpoint", "import", folder, "--output", imported], expect=0)
                run(["eval", imported, path / "text.txt", "--nll", nll], expect=0)
                for mine, other in zip(nlls(nll.read_text()), theirs, strict=True):
                    self.assertAlmostEqual(mine, other, delta=1e-5)


if __name__ == "__main__":
    sys.exit(unittest.main(verbosity=2))
