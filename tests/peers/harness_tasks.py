"""The tasks of lm-evaluation-harness over local files: its own definitions (YAML files and functions) with a data set that comes
from a file as it is published, instead of one that is fetched.

Needs lm_eval 0.4.2; compare_lm_eval.py says what to install.
"""
import csv
import functools
import json

import datasets
import evaluate

# One of the harness' metrics is fetched when it is imported. No task here uses it.
evaluate.load = lambda name: None

from lm_eval import utils  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


def json_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def with_choices(row, question, out):
    choices = row[question]["choices"]
    return {out: row[question]["stem"], "answerKey": row["answerKey"],
            "choices": {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]}}


def openbookqa(row):
    if "query" in row:
        letters = "ABCDEFGH"[:len(row["choices"])]
        return {"question_stem": row["query"], "answerKey": letters[row["gold"]],
                "choices": {"text": row["choices"], "label": list(letters)}}
    return with_choices(row, "question", "question_stem")


def copa(row):
    if "query" not in row:
        return row
    connector = row["query"].split(" ")[-1]
    return {"premise": row["query"][:-len(f", {connector}")] + ".", "choice1": row["choices"][0], "choice2": row["choices"][1],
            "question": {"because": "cause", "therefore": "effect"}[connector], "label": row["gold"]}


def lambada(row):
    return {"text": row["context"] + " " + row["continuation"] if "continuation" in row else row["text"]}


def storycloze(path):
    """As the data set's loader reads it."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.reader(file, quotechar='"', delimiter=",", quoting=csv.QUOTE_ALL, skipinitialspace=True)
        next(rows)
        names = ["story_id", *(f"input_sentence_{i}" for i in (1, 2, 3, 4)), "sentence_quiz1", "sentence_quiz2"]
        return [{**dict(zip(names, row)), "answer_right_ending": int(row[-1])} for row in rows if row]


def documents(name, file, labels=None):
    """The rows of the data set that a task's file holds, as the harness sees them."""
    if name.startswith("storycloze"):
        return storycloze(file)
    rows = json_lines(file)
    if name == "hellaswag":
        return [{**row, "label": str(row["label"])} for row in rows]
    if name == "piqa":
        with open(labels, encoding="utf-8") as lines:
            return [{**row, "label": int(label)} for row, label in zip(rows, lines)]
    if name.startswith("arc"):
        return [with_choices(row, "question", "question") for row in rows]
    make = {"openbookqa": openbookqa, "copa": copa, "lambada_openai": lambada, "lambada_standard": lambada}
    return [make[name](row) for row in rows] if name in make else rows


class LocalTask(ConfigurableTask):
    """A task whose every split is the given rows."""

    def __init__(self, config, rows):
        self.rows = rows
        super().__init__(config=config)

    def download(self, dataset_kwargs=None):
        rows = datasets.Dataset.from_list(self.rows)
        self.dataset = datasets.DatasetDict({split: rows for split in ("train", "validation", "test")})


@functools.cache
def all_tasks():
    return TaskManager().task_index


def local_task(name, file, labels=None):
    """The harness' task of that name over a local file."""
    config = utils.load_yaml_config(all_tasks()[name]["yaml_path"], mode="full")
    config.pop("dataset_kwargs", None)
    return LocalTask(config, documents(name, file, labels))
