#!/usr/bin/env python3
"""Holds `normformer eval-tasks` against lm-evaluation-harness, item by item.

    compare_lm_eval.py RUN HUGGINGFACE_FOLDER DATA [--dtype float64] [--limit N] [--work FOLDER]

RUN is a run of this program over GPT-2's vocabulary, HUGGINGFACE_FOLDER what `normformer checkpoint export RUN --format
huggingface` made of it, DATA a folder with hellaswag/, piqa/, openbookqa/, lambada/ and copa/, their published files in them.
The program is the environment's NORMFORMER_PROGRAM. The harness runs its own definitions of the tasks (harness_tasks.py) and
its own Hugging Face model of that type. Prints, and fails where they are not met: that all requests are equal, that
log-likelihoods differ by at most 1e-4, that the same continuations are greedy, and that every number of both results.json,
standard errors too, is the same to 1e-4 of it.

What was installed beside Debian 12's python3-torch 1.13 and python3-numpy 1.24, none of it with torch of its own:

    python3 -m venv --system-site-packages VENV
    pip install --no-deps lm_eval==0.4.2 transformers==4.38.2 tokenizers==0.15.2 huggingface_hub==0.20.3 datasets==2.16.1 \\
        pyarrow==14.0.2 multiprocess==0.70.15 dill==0.3.7 xxhash evaluate==0.4.1 peft==0.5.0 accelerate==0.24.1 \\
        pandas==2.1.4 'fsspec<2024' scikit-learn joblib threadpoolctl narwhals responses pyarrow-hotfix aiohttp \\
        aiohappyeyeballs aiosignal frozenlist multidict yarl propcache zstandard numexpr tqdm_multiprocess
    pip install jinja2 safetensors sacrebleu rouge_score sqlitedict jsonlines pytablewriter more_itertools word2number \\
        regex requests tqdm pyyaml
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys

os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from harness_tasks import json_lines, local_task  # noqa: E402

from lm_eval import evaluator  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

LARGEST_DIFFERENCE = 1e-4


def split_hellaswag(source, out):
    """The published file has the last sentence, which is not finished, apart from the others; some copies have not."""
    with open(out, "w", encoding="utf-8") as file:
        for row in json_lines(source):
            if "ctx_a" not in row:
                begin = row["ctx"].rfind(". ") + 2
                cut = begin if begin > 1 and row["ctx"][begin:begin + 1].islower() else len(row["ctx"])
                row["ctx_a"], row["ctx_b"] = row["ctx"][:cut].rstrip(" "), row["ctx"][cut:]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return out


def task_files(data, work):
    return {
        "hellaswag": [split_hellaswag(data / "hellaswag" / "hellaswag_val.jsonl", work / "hellaswag.jsonl")],
        "piqa": [data / "piqa" / "valid.jsonl", data / "piqa" / "valid-labels.lst"],
        "openbookqa": [data / "openbookqa" / "openbook_qa.llm-foundry.jsonl"],
        "lambada_openai": [data / "lambada" / "lambada_openai.llm-foundry.jsonl"],
        "copa": [data / "copa" / "copa.llm-foundry.jsonl"],
    }


def run_ours(run, tasks, limit, out):
    flags = [f"--task={name}={','.join(map(str, files))}" for name, files in tasks.items()]
    subprocess.run([os.environ["NORMFORMER_PROGRAM"], "eval-tasks", run, *flags, "--limit", str(limit), "--output", out,
                    "--log-samples"], check=True)
    samples = {name: json_lines(out / f"samples_{name}.jsonl") for name in tasks}
    return json.loads((out / "results.json").read_text())["results"], samples


def run_harness(folder, dtype, tasks, limit):
    model = HFLM(pretrained=str(folder), dtype=dtype, device="cpu", batch_size=8, trust_remote_code=True)
    found = evaluator.evaluate(lm=model, task_dict={name: local_task(name, *files) for name, files in tasks.items()},
                               limit=limit, log_samples=True)
    return found["results"], found["samples"]


def requests_of(sample):
    return [list(map(str, request)) for request in sample["arguments"]]


def compare_items(name, ours, theirs, problems):
    theirs = sorted(theirs, key=lambda sample: sample["doc_id"])
    largest, greedy = 0.0, 0
    if len(ours) != len(theirs):
        problems.append(f"{name}: {len(ours)} items and {len(theirs)}")
    for mine, their in zip(ours, theirs):
        if requests_of(mine) != requests_of(their):
            problems.append(f"{name} item {mine['doc_id']}: requests {requests_of(mine)} and {requests_of(their)}")
        for (likelihood, is_greedy), (their_likelihood, their_greedy) in zip(mine["filtered_resps"], their["filtered_resps"]):
            largest = max(largest, abs(likelihood - float(their_likelihood)))
            greedy += is_greedy
            if is_greedy != (str(their_greedy) == "True"):
                problems.append(f"{name} item {mine['doc_id']}: greedy {is_greedy} and {their_greedy}")
        for metric in ("acc", "acc_norm"):
            if mine.get(metric) != (float(their[metric]) if metric in their else None):
                problems.append(f"{name} item {mine['doc_id']}: {metric} {mine.get(metric)} and {their.get(metric)}")
    if largest > LARGEST_DIFFERENCE:
        problems.append(f"{name}: log-likelihoods differ by {largest:.3g}")
    requests = sum(len(mine["arguments"]) for mine in ours)
    print(f"{name}: {len(ours)} items, {requests} requests, {greedy} greedy; largest difference {largest:.2e}")


def compare_numbers(name, ours, theirs, problems):
    for key, value in ours.items():
        if key == "alias":
            continue
        print(f"    {key:24} {value:<22.12g} {theirs[key]:.12g}")
        if abs(value - theirs[key]) > LARGEST_DIFFERENCE * abs(theirs[key]):
            problems.append(f"{name}: {key} {value} and {theirs[key]}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int, default=150)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("compare_lm_eval"))
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    tasks = task_files(options.data, options.work)
    our_numbers, our_samples = run_ours(options.run, tasks, options.limit, options.work / "ours")
    their_numbers, their_samples = run_harness(options.folder, options.dtype, tasks, options.limit)
    problems = []
    for name in tasks:
        compare_items(name, our_samples[name], their_samples[name], problems)
        compare_numbers(name, our_numbers[name], their_numbers[name], problems)
    print("\n".join(problems) or "all the same")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
