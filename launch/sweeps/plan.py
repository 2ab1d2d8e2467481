"""What a sweep file asks for: the runs, each a configuration with some keys replaced."""
import dataclasses
import itertools
import json
import pathlib
import re
from typing import Any, Iterator, Mapping, Optional, Sequence

from supervisor.codes import Refusal
from supervisor.settings import overrides_of, read_table

SEED = "train.seed"
FOLDER = "checkpoint.folder"
# What a run computes does not depend on these, but for rounding: a run may go on under another layout.
IRRELEVANT = ("device.threads", "train.micro_batch", "train.recompute", "train.recompute_layers", FOLDER)
IRRELEVANT_SECTION = "parallel."

_KNOWN = {"base", "folder", "ranks", "axes", "set"}
_KNOWN_OF_AXIS = {"name", "variants", "values"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """One place on an axis: what it is called, and the keys that it sets."""
    labels: dict[str, Any]  # by column of the table
    keys: dict[str, Any]
    base: Optional[str] = None

    @property
    def name(self) -> str:
        """The choice as a part of a folder's name."""
        return "_".join(_word_of(column, value) for column, value in self.labels.items())


@dataclasses.dataclass(frozen=True)
class Run:
    name: str
    labels: dict[str, Any]  # by column of the table
    config: pathlib.Path
    folder: pathlib.Path
    keys: dict[str, Any]  # that replace the configuration's

    def overrides(self) -> list[str]:
        """The keys as options of `normformer train`."""
        keys = dict(self.keys, **{FOLDER: str(self.folder)})
        return [word for key, value in keys.items() for word in ("--set", f"{key}={toml_text(value)}")]

    def settings(self) -> dict[str, Any]:
        """All keys that decide what the run computes, as they are written down."""
        return relevant(flattened(read_table(self.config)) | self.keys)

    def setting(self, key: str) -> Any:
        """What is written for a key; None where nothing is."""
        return (flattened(read_table(self.config)) | self.keys).get(key)


@dataclasses.dataclass(frozen=True)
class Sweep:
    path: pathlib.Path
    folder: pathlib.Path
    ranks: int
    columns: tuple[str, ...]
    runs: tuple[Run, ...]


def flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Tables within tables as "section.key" of their values."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def relevant(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that decide what a run computes."""
    return {key: value for key, value in keys.items() if key not in IRRELEVANT and not key.startswith(IRRELEVANT_SECTION)}


def toml_text(value: Any) -> str:
    """A value as TOML; what is no number, truth value, string or list of these cannot be."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_text, value)) + "]"
    return json.dumps(value) if isinstance(value, (bool, int, str)) else repr(value)


def _word_of(column: str, value: Any) -> str:
    word = re.sub(r"[^A-Za-z0-9.+-]+", "-", f"{value:g}" if isinstance(value, float) else str(value)).strip("-")
    return f"{column.rpartition('.')[2]}-{word}" if "." in column else word


class _Reader:
    """A sweep file; every complaint names it."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.table = read_table(path)
        self._refuse_unknown("", self.table, _KNOWN)

    def refuse(self, sentence: str) -> Refusal:
        return Refusal(f"{self.path}: {sentence}")

    def _refuse_unknown(self, where: str, table: Mapping[str, Any], known: set[str]) -> None:
        for key in table:
            if key not in known:
                raise self.refuse(f"{where}\"{key}\" means nothing here; there is {', '.join(sorted(known))}")

    def text(self, key: str) -> Optional[str]:
        value = self.table.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            raise self.refuse(f"{key} = {toml_text(value)} is not a path in quotes")
        return value

    def ranks(self) -> int:
        value = self.table.get("ranks", 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refuse(f"ranks = {toml_text(value)} is not a number of ranks")
        return value

    def keys(self) -> dict[str, Any]:
        value = self.table.get("set", {})
        if not isinstance(value, dict):
            raise self.refuse("[set] must be a table of the keys that all runs have, such as train.updates = 100")
        return flattened(value)

    def axes(self) -> list[list[Choice]]:
        axes = self.table.get("axes", [])
        if not isinstance(axes, list) or not axes or not all(isinstance(axis, dict) for axis in axes):
            raise self.refuse("it needs an [[axes]] at least, which says what the runs differ in")
        return [self._axis(axis, f"axis {number}: ") for number, axis in enumerate(axes, 1)]

    def _axis(self, axis: Mapping[str, Any], where: str) -> list[Choice]:
        self._refuse_unknown(where, axis, _KNOWN_OF_AXIS)
        variants, values = axis.get("variants"), axis.get("values")
        if isinstance(variants, dict) and variants and values is None:
            return list(self._variants(axis.get("name", "variant"), variants, where))
        if isinstance(values, dict) and values and variants is None and "name" not in axis:
            return list(self._values(flattened(values), where))
        raise self.refuse(f"{where}it needs either a name and variants.NAME = {{ section.key = value, ... }}, or "
                          "values.section.key = [value, ...]")

    def _variants(self, column: str, variants: Mapping[str, Any], where: str) -> Iterator[Choice]:
        for name, keys in variants.items():
            if not isinstance(keys, dict):
                raise self.refuse(f"{where}variants.{name} must be a table of keys, {{}} for none")
            yield Choice({column: name}, flattened({k: v for k, v in keys.items() if k != "base"}), keys.get("base"))

    def _values(self, values: Mapping[str, Any], where: str) -> Iterator[Choice]:
        for key, choices in values.items():
            if not isinstance(choices, list) or not choices:
                raise self.refuse(f"{where}values.{key} must be a list of what {key} is in turn")
        if len({len(choices) for choices in values.values()}) > 1:
            raise self.refuse(f"{where}its lists go side by side and must be equally long; lists to be crossed are axes "
                              "of their own")
        for together in zip(*values.values()):
            keys = dict(zip(values, together))
            yield Choice(dict(keys), keys)


def _config_of(reader: _Reader, choices: Sequence[Choice]) -> pathlib.Path:
    named = [choice.base for choice in choices if choice.base is not None]
    base = named[-1] if named else reader.text("base")
    if not isinstance(base, str):
        raise reader.refuse("it has no base = \"CONFIG.toml\", neither for all runs nor in every variant")
    return reader.path.parent / base


def _keys_of_command(texts: Sequence[str]) -> dict[str, Any]:
    """What the command's `--set` say. Raises Refusal where one says nothing."""
    for text in texts:
        if not text.startswith("@") and "=" not in text:
            raise Refusal(f"--set {text}: write section.key=value, or @FILE for all that a TOML file sets")
    return dict(overrides_of([f"--set={text}" for text in texts]))


def _refuse_wrong_places(reader: _Reader, keys: Mapping[str, Any], of_command: Mapping[str, Any],
                         choices: Sequence[Choice]) -> None:
    if FOLDER in keys:
        raise reader.refuse(f"each run has a {FOLDER} of its own, below what the sweep's folder = \"...\" says")
    for key in (key for choice in choices for key in choice.keys):
        if key in of_command:
            raise reader.refuse(f"its runs differ in {key}, which --set cannot set for all of them")


def read_sweep(path: pathlib.Path, ranks: Optional[int] = None, of_command: Sequence[str] = ()) -> Sweep:
    """Reads a sweep file; configurations are named relative to it. `ranks` stands for the file's; `of_command`,
    "section.key=value" or "@FILE", outranks its keys. Raises Refusal where it makes no sense; whether the keys mean
    something is the program's part."""
    reader = _Reader(path)
    folder = pathlib.Path(reader.text("folder") or f"runs/{path.stem}")
    command_keys = _keys_of_command(of_command)
    runs = []
    for choices in itertools.product(*reader.axes()):
        labels = {column: value for choice in choices for column, value in choice.labels.items()}
        keys = reader.keys()
        for choice in choices:
            keys |= choice.keys
        keys |= command_keys
        _refuse_wrong_places(reader, keys, command_keys, choices)
        name = "_".join(choice.name for choice in choices)
        runs.append(Run(name, labels, _config_of(reader, choices), folder / name, keys))
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise reader.refuse(f"{names.count(name)} runs would be called {name}")
    return Sweep(path, folder, ranks or reader.ranks(), tuple(runs[0].labels), tuple(runs))
