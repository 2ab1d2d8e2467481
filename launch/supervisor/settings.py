"""What launch/run has to know of a run's configuration; judging it is the program's part."""
import dataclasses
import pathlib
import tomllib
from typing import Any, Sequence

from .codes import Refusal


@dataclasses.dataclass(frozen=True)
class Settings:
    folder: pathlib.Path
    device: str = "cpu"
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    data: int = 0  # 0: what is left over
    shard_group: int = 0  # 0: all replicas
    datasets: tuple[str, ...] = ()

    @property
    def ranks_of_replica(self) -> int:
        """Ranks that hold one copy of the model's work: data-parallel replicas have so many each."""
        return self.tensor * self.context * self.pipeline


def _set_words(train_options: Sequence[str]) -> list[str]:
    """What follows each `--set`."""
    found = []
    for at, word in enumerate(train_options):
        if word == "--set" and at + 1 < len(train_options):
            found.append(train_options[at + 1])
        elif word.startswith("--set="):
            found.append(word.removeprefix("--set="))
    return found


def overrides_of(train_options: Sequence[str]) -> list[tuple[str, Any]]:
    """The `--set section.key=value` of the program's options, in order; `--set @FILE` is all that a TOML file sets."""
    return [override for text in _set_words(train_options) for override in _overrides_in(text)]


def overlays_of(train_options: Sequence[str]) -> list[str]:
    """The files of `--set @FILE`."""
    return [text.removeprefix("@") for text in _set_words(train_options) if text.startswith("@")]


def _overrides_in(text: str) -> list[tuple[str, Any]]:
    if text.startswith("@"):
        table = read_table(pathlib.Path(text[1:]))
        return [(f"{section}.{key}", value) for section, keys in table.items() if isinstance(keys, dict)
                for key, value in keys.items()]
    key, separator, value = text.partition("=")
    return [(key, _value_of(value))] if separator else []


def _value_of(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def read_table(config: pathlib.Path) -> dict[str, Any]:
    """Reads a TOML file. Raises Refusal where it is none."""
    try:
        return tomllib.loads(config.read_text())
    except OSError as error:
        raise Refusal(f"cannot read {config}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Refusal(f"{config} is no TOML: {error}") from error


def _degree(table: dict[str, Any], key: str, default: int) -> int:
    value = table.get(key, default)
    return value if isinstance(value, int) and value >= default else default


def _datasets(value: Any) -> list[str]:
    sources = value if isinstance(value, list) else [value]
    names = [source.get("prefix") if isinstance(source, dict) else source for source in sources]
    return [name for name in names if isinstance(name, str) and name]


def read_settings(config: pathlib.Path, train_options: Sequence[str] = ()) -> Settings:
    """Reads the configuration with its overrides. Raises Refusal where the file is no TOML."""
    table = read_table(config)
    for key, value in overrides_of(train_options):
        section, _, field = key.partition(".")
        fields = table.setdefault(section, {})
        if isinstance(fields, dict):
            fields[field] = value
    sections = {name: value for name, value in table.items() if isinstance(value, dict)}
    parallel, data = sections.get("parallel", {}), sections.get("data", {})
    return Settings(
        folder=pathlib.Path(str(sections.get("checkpoint", {}).get("folder", "runs/run"))),
        device=str(sections.get("device", {}).get("kind", "cpu")), tensor=_degree(parallel, "tensor", 1),
        context=_degree(parallel, "context", 1), pipeline=_degree(parallel, "pipeline", 1),
        data=_degree(parallel, "data", 0), shard_group=_degree(parallel, "shard_group", 0),
        datasets=tuple(_datasets(data.get("train", [])) + _datasets(data.get("valid", []))))
