#!/usr/bin/env python3
"""Records a small GPT-2 as Hugging Face's transformers save it, and what it says of a text, as a fixture.

    pip install torch transformers==4.45.2 safetensors
    record_huggingface.py tests/fixtures/huggingface/gpt2

The folder gets weights in several files, their configuration, a tokenizer of single bytes, and expected.json: a text, and for
each activation that GPT-2 may have here the negative log-likelihood of each byte of it, in fp64, in blocks of the model's
length that each have the token before at their beginning, <|endoftext|> at the text's.
"""
import json
import pathlib
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

TEXT = "It is a truth universally acknowledged, that a na\u00efve model in possession of 2,048 tokens must be in want of 4\u00d7 more.\n"
ACTIVATIONS = ("gelu_new", "gelu", "relu2")
END = "<|endoftext|>"


def make_model(activation="gelu_new"):
    """The same weights for each activation; no gain is 1 and no bias 0."""
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=16, n_embd=12, n_layer=2, n_head=3, n_inner=20,
                                       activation_function=activation, bos_token_id=256, eos_token_id=256))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def save_tokenizer(folder):
    tokens = {character: byte for byte, character in sorted(bytes_to_unicode().items())}
    (folder / "vocab.json").write_text(json.dumps({**tokens, END: 256}, ensure_ascii=False) + "\n")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return GPT2Tokenizer(folder / "vocab.json", folder / "merges.txt")


def likelihoods(model, ids):
    inputs, found, length = [256, *ids[:-1]], [], model.config.n_positions
    with torch.no_grad():
        for begin in range(0, len(ids), length):
            logits = model(torch.tensor([inputs[begin:begin + length]])).logits[0]
            targets = torch.tensor(ids[begin:begin + length])
            found += torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
    return found


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True)
    make_model().save_pretrained(folder, max_shard_size="12KB")
    ids = save_tokenizer(folder)(TEXT)["input_ids"]
    assert ids == list(TEXT.encode())
    nll = {activation: likelihoods(make_model(activation).double(), ids) for activation in ACTIVATIONS}
    (folder / "expected.json").write_text(json.dumps({"text": TEXT, **nll}, indent=1) + "\n")


if __name__ == "__main__":
    main()
