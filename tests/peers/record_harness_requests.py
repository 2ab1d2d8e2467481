#!/usr/bin/env python3
"""Records what lm-evaluation-harness makes of the task files in tests/fixtures/evaluation, as a fixture.

    record_harness_requests.py DATA > tests/fixtures/evaluation/harness.json

DATA holds gpt2-bpe/{encoder.json,vocab.bpe}. For each file: every item's requests and the choice that is right, and the
numbers that the harness tells when requests have made-up scores, which are recorded too. Beside them: how its Hugging Face
model encodes some requests. compare_lm_eval.py says what to install.
"""
import contextlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import sys
import tempfile

os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from harness_tasks import local_task  # noqa: E402

import transformers  # noqa: E402
from lm_eval import evaluator  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "evaluation"
FILES = [("hellaswag", "hellaswag.jsonl"), ("piqa", "piqa.jsonl", "piqa-labels.lst"), ("winogrande", "winogrande.jsonl"),
         ("openbookqa", "openbookqa.jsonl"), ("openbookqa", "openbookqa.llm-foundry.jsonl"), ("arc_easy", "arc.jsonl"),
         ("arc_challenge", "arc.jsonl"), ("storycloze_2016", "storycloze.csv"), ("storycloze_2018", "storycloze.csv"),
         ("copa", "copa.jsonl"), ("copa", "copa.llm-foundry.jsonl"), ("lambada_openai", "lambada.jsonl"),
         ("lambada_standard", "lambada.jsonl"), ("lambada_openai", "lambada.llm-foundry.jsonl")]
ENCODED = [["Question: How?\nAnswer:", " Like this."], ["", " alone"], ["ends with spaces  ", " and goes on"], ["a b\n\t", "c"],
           ["half a wo", "rd"], ["\u4e2d", "\u6587 \U0001f600"], ["caf\u00e9\u00a0", "x"], ["The cat sat", "  on two spaces"],
           ["<|endoftext|>It", " is<|endoftext|>"], ["don", "'t stop"]]


class MadeUpScores(LM):
    """Gives request i of a task a score that depends on i alone."""

    def loglikelihood(self, requests):
        return [(-(i * 7 % 11 + 1) / 8, i % 3 != 1) for i in range(len(requests))]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError


class Encoder(HFLM):
    """The harness' model without a model."""

    def __init__(self, data):
        with tempfile.TemporaryDirectory() as folder:
            for name, saved in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
                shutil.copy(data / "gpt2-bpe" / name, pathlib.Path(folder) / saved)
            self.tokenizer = transformers.GPT2TokenizerFast.from_pretrained(folder)
        self.seen = []

    AUTO_MODEL_CLASS = transformers.AutoModelForCausalLM
    add_bos_token = False

    def tok_encode(self, string, left_truncate_len=None, add_special_tokens=None):
        return self.tokenizer.encode(string, add_special_tokens=False)

    @property
    def eot_token_id(self):
        return self.tokenizer.eos_token_id

    def _loglikelihood_tokens(self, requests, **_):
        self.seen = [(context, continuation) for _, context, continuation in requests]


class Request:
    def __init__(self, arguments):
        self.args = tuple(arguments)


def right_choice(task, sample):
    choices = len(sample["arguments"])
    if choices == 1:
        return 0
    return next(i for i in range(choices)
                if task.process_results(sample["doc"], [(0.0 if i == j else -1.0, False) for j in range(choices)])["acc"] == 1)


def record(name, file, labels=None):
    task = local_task(name, FIXTURES / file, labels and FIXTURES / labels)
    found = evaluator.evaluate(lm=MadeUpScores(), task_dict={name: task}, log_samples=True)
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    numbers = {key: value for key, value in found["results"][name].items() if key != "alias"}
    return {
        "task": name, "file": file, **({"labels": labels} if labels else {}), "numbers": numbers,
        "items": [{"requests": [list(request) for request in sample["arguments"]], "gold": right_choice(task, sample),
                   "scores": [list(score) for score in sample["filtered_resps"]]} for sample in samples],
    }


def main():
    encoder = Encoder(pathlib.Path(sys.argv[1]))
    encoder.loglikelihood([Request(pair) for pair in ENCODED])
    encoded = [{"request": pair, "context": context, "continuation": continuation}
               for pair, (context, continuation) in zip(ENCODED, encoder.seen)]
    with contextlib.redirect_stdout(sys.stderr):  # where the harness tells how far it is
        recorded = [record(*file) for file in FILES]
    print(json.dumps({"recorded_with": f"lm_eval {importlib.metadata.version('lm_eval')}, "
                                       f"transformers {transformers.__version__}"})[:-1] + ',\n"encoded": [')
    print(",\n".join(map(json.dumps, encoded)) + '],\n"files": [')
    print(",\n".join(map(json.dumps, recorded)) + "]}")


if __name__ == "__main__":
    main()
