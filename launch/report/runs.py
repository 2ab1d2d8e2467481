"""Reads runs' folders: configuration, metrics.jsonl and statistics.jsonl, also of runs that are torn or going on."""
import json
import pathlib
import re
import tomllib
from dataclasses import dataclass, field

import numpy as np

PAUSE = 60.0  # seconds between lines without "elapsed", beyond which a run stood still


class NoRun(Exception):
    """A folder that is no run's; one sentence."""


@dataclass
class Curve:
    """Values over updates; rows of all arrays belong together."""
    update: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray  # that the run has trained, without pauses
    value: np.ndarray


@dataclass
class Run:
    """One run as its folder tells it."""
    path: pathlib.Path
    name: str
    config: dict                  # "section.key" to value
    steps: list = field(default_factory=list)          # lines of metrics.jsonl that still count, in order
    validations: list = field(default_factory=list)
    about: dict = field(default_factory=dict)          # the line of kind "run"
    explosion: dict | None = None
    gradients: list = field(default_factory=list)      # lines of statistics.jsonl
    distributions: list = field(default_factory=list)

    @property
    def updates(self):
        return self.steps[-1]["update"] if self.steps else 0

    @property
    def is_complete(self):
        """Whether all updates were made."""
        return self.explosion is None and self.updates >= self.config.get("train.updates", 0)

    @property
    def state(self):
        """How far the run is."""
        if self.explosion:
            return f"exploded at update {self.explosion['update']}"
        return "complete" if self.is_complete else f"{self.updates} of {self.config['train.updates']} updates"

    @property
    def flops_per_token(self):
        """Model FLOPs of training on one token; None where nothing tells."""
        if self.about.get("flops_per_token"):
            return self.about["flops_per_token"]
        for step in reversed(self.steps):
            if step.get("tokens_per_second") and step.get("flops_per_second"):
                return step["flops_per_second"] / step["tokens_per_second"]
        return None

    def loss(self):
        return curve_of(self.steps, "loss", self.seconds_by_batch())

    def perplexity(self):
        return curve_of(self.validations, "perplexity", self.seconds_by_batch())

    def seconds_by_batch(self):
        """Seconds trained, by batch: as recorded, or from the lines' times without pauses."""
        seconds, known, before = 0.0, {}, None
        for line in sorted(self.steps + self.validations, key=lambda line: (line["batch"], line["kind"] != "step")):
            if "elapsed" in line:
                seconds = line["elapsed"]
            elif before is not None and 0 < line.get("time", 0.0) - before < PAUSE:
                seconds += line["time"] - before
            before = line.get("time", before)
            known[(line["kind"], line["batch"])] = seconds
        return known


def curve_of(lines, key, seconds):
    """A key of metrics lines as a Curve, without what is not a number; of several at an update, the last."""
    lines = list({line["update"]: line for line in lines if isinstance(line.get(key), (int, float))}.values())
    column = lambda values: np.array(list(values), dtype=float)  # noqa: E731
    return Curve(column(line["update"] for line in lines), column(line.get("tokens", 0) for line in lines),
                 column(seconds[(line["kind"], line["batch"])] for line in lines), column(line[key] for line in lines))


def read_lines(path):
    """The objects of a JSON-lines file; torn and foreign lines are left out, a missing file is empty."""
    found = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return found
    for line in text.splitlines():
        try:
            parsed = json.loads(line)
        except ValueError:
            continue
        whole = isinstance(parsed, dict) and all(isinstance(parsed.get(key), int) for key in ("batch", "update"))
        if whole or isinstance(parsed, dict) and parsed.get("kind") == "explosion":
            found.append(parsed)
    return found


def flat(table, prefix=""):
    """{"section.key": value} of nested tables."""
    found = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


def still_counts(lines):
    """Lines of metrics whose updates were not taken back by a later rollback."""
    kept = []
    for line in lines:
        if line.get("kind") == "rollback":
            kept = [before for before in kept if before["update"] <= line["update"]]
        kept.append(line)
    return kept


def read_run(path):
    """The run in a folder. NoRun where it is none."""
    path = pathlib.Path(path)
    file = path / "config.toml"
    try:
        config = flat(tomllib.loads(file.read_text(encoding="utf-8")))
    except OSError as e:
        raise NoRun(f"{path} is no run's folder: {file} cannot be read ({e.strerror})") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise NoRun(f"{file} is no configuration: {e}") from e
    run = Run(path, path.resolve().name, config)
    for line in still_counts(read_lines(path / "metrics.jsonl")):
        kind = line.get("kind")
        if kind == "step" and not line.get("skipped"):
            run.steps.append(line)
        elif kind == "validation":
            run.validations.append(line)
        elif kind == "run":
            run.about = line
        elif kind == "explosion":
            run.explosion = line
    for line in read_lines(path / "statistics.jsonl"):
        if isinstance(line.get("parameters"), dict):
            {"gradients": run.gradients, "distributions": run.distributions}.get(line.get("kind"), []).append(line)
    return run


def find_runs(paths):
    """The runs in folders: a folder that is no run's stands for the runs directly in it. Files beside folders, such as a
    sweep's tables in SWEEP/*, are passed over. NoRun where there is none."""
    found = []
    paths = [pathlib.Path(path) for path in paths]
    for path in [path for path in paths if not path.is_file()] or paths:
        inner = sorted(path.glob("*/config.toml")) if not (path / "config.toml").exists() else []
        found += [read_run(file.parent) for file in inner] if inner else [read_run(path)]
    return found


LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


def layer_of(parameter):
    """(layer, what it is there) of a parameter's name; None outside layers."""
    found = LAYER.search(parameter)
    return (int(found[1]), found[2]) if found else None
