"""The runs of a sweep side by side: as CSV, as Markdown, and on the terminal."""
import csv
import io
import math
import pathlib
import statistics
from typing import Any, Callable, Iterable, Optional, Sequence

from supervisor.record import write_durably

from .outcome import Outcome
from .plan import SEED, Run, Sweep

Rows = list[list[str]]
LR = "optimizer.lr"


def shown(value: Any, digits: int = 4) -> str:
    """A value as a table has it; nothing for None."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def runs_table(sweep: Sweep, outcomes: Sequence[Outcome]) -> Rows:
    """A row for each run."""
    rows = [[*sweep.columns, "state", "updates", "loss", "perplexity", "accuracy", "exploded after", "at lr",
             "minutes"]]
    for run, outcome in zip(sweep.runs, outcomes):
        state = outcome.state if outcome.state != "failed" else f"failed with {outcome.code}"
        rows.append([*(_label(run.labels.get(column)) for column in sweep.columns), state, str(outcome.update),
                     shown(outcome.loss), shown(outcome.perplexity, 3), shown(outcome.accuracy), shown(outcome.exploded_at),
                     _label(outcome.exploded_lr) if outcome.exploded_lr is not None else "",
                     shown(outcome.seconds / 60.0, 1)])
    return rows


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def _stable_until(over: Sequence[Outcome], exploded: Callable[[Outcome], Optional[float]],
                  lasted: Callable[[Outcome], Optional[float]]) -> str:
    """The median over runs that are over. Those that did not explode count as infinitely stable: of a median among them
    only the least that they came to is known."""
    if not over:
        return ""
    middle = statistics.median(math.inf if (value := exploded(outcome)) is None else value for outcome in over)
    if math.isfinite(middle):
        return f"{middle:g}"
    reached = _present((outcome for outcome in over if exploded(outcome) is None), lasted)
    return f"over {min(reached):g}" if reached else ""


def _present(outcomes: Iterable[Outcome], what: Callable[[Outcome], Optional[float]]) -> list[float]:
    return [value for outcome in outcomes if (value := what(outcome)) is not None and math.isfinite(value)]


def summary_table(sweep: Sweep, outcomes: Sequence[Outcome]) -> Rows:
    """A row for all runs that differ in their seed only: means with the standard deviation of the runs, medians of
    explosions (where some run exploded; one that did not counts as infinitely stable). "best" marks the learning rate of the lowest loss
    among rows that are otherwise alike, of those rows whose runs are all complete."""
    columns = [column for column in sweep.columns if column != SEED]
    groups: dict[tuple[Any, ...], list[Outcome]] = {}
    for run, outcome in zip(sweep.runs, outcomes):
        groups.setdefault(tuple(run.labels.get(column) for column in columns), []).append(outcome)
    best = _best_rates(columns, groups)
    has_explosions = any(outcome.exploded_at is not None for outcome in outcomes)
    rows = [[*columns, "complete", "loss", "perplexity", "accuracy", "exploded after", "at lr", "best"]]
    for labels, members in groups.items():
        over = [outcome for outcome in members if outcome.is_over]
        complete = [outcome for outcome in over if outcome.exploded_at is None]
        rows.append([*map(_label, labels), f"{len(over)} of {len(members)}",
                     _spread(_present(complete, lambda o: o.loss), 4),
                     _spread(_present(complete, lambda o: o.perplexity), 3),
                     _spread(_present(complete, lambda o: o.accuracy), 4),
                     _stable_until(over, lambda o: o.exploded_at, lambda o: o.update) if has_explosions else "",
                     _stable_until(over, lambda o: o.exploded_lr, lambda o: o.highest_lr) if has_explosions else "",
                     "best" if labels in best else ""])
    return rows


def _best_rates(columns: Sequence[str], groups: dict[tuple[Any, ...], list[Outcome]]) -> set[tuple[Any, ...]]:
    if LR not in columns:
        return set()
    at = columns.index(LR)
    best: dict[tuple[Any, ...], tuple[float, tuple[Any, ...]]] = {}
    for labels, members in groups.items():
        losses = _present((outcome for outcome in members if outcome.state == "complete"), lambda o: o.loss)
        if len(losses) < len(members):
            continue
        others = labels[:at] + labels[at + 1:]
        mean = statistics.fmean(losses)
        if others not in best or mean < best[others][0]:
            best[others] = (mean, labels)
    return {labels for _, labels in best.values()}


def without_empty_columns(rows: Rows) -> Rows:
    """The table without columns that say nothing in any row."""
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def as_text(rows: Rows) -> str:
    """Columns one under another, for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() + "\n" for row in rows)


def as_markdown(rows: Rows) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(row) + " |\n" for row in lines)


def as_csv(rows: Rows) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_tables(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[Rows]:
    """Writes runs.csv, summary.csv and table.md into the sweep's folder; returns what is for the terminal."""
    runs, summary = runs_table(sweep, outcomes), summary_table(sweep, outcomes)
    tables = [without_empty_columns(runs)]
    if len(summary) < len(runs) or any(row[-1] for row in summary[1:]):
        tables.append(without_empty_columns(summary))
    sweep.folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("runs.csv", as_csv(runs)), ("summary.csv", as_csv(summary)),
                       ("table.md", "\n".join(map(as_markdown, tables)))):
        write_durably(pathlib.Path(sweep.folder / name), text)
    return tables
