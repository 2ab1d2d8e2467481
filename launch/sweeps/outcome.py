"""What became of a run, as its folder tells."""
import dataclasses
import datetime
import json
import pathlib
from typing import Any, Optional

from supervisor import codes
from supervisor.codes import Refusal
from supervisor.record import lines_of, write_durably

from .plan import Run, relevant

WAITING, RUNNING, COMPLETE, EXPLODED, STOPPED, FAILED = "waiting", "unfinished", "complete", "exploded", "stopped", "failed"


@dataclasses.dataclass(frozen=True)
class Outcome:
    state: str
    code: Optional[int] = None  # of the last attempt
    update: int = 0  # made
    loss: Optional[float] = None  # of the last validation
    perplexity: Optional[float] = None  # of language models
    accuracy: Optional[float] = None  # of classifiers
    exploded_at: Optional[int] = None  # updates
    exploded_lr: Optional[float] = None
    highest_lr: Optional[float] = None  # of its batches
    seconds: float = 0.0  # that attempts took which have ended

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to train."""
        return self.state in (COMPLETE, EXPLODED)


def claim(run: Run) -> None:
    """Writes down what the run's folder is for. Raises Refusal where it is for something else."""
    path = run.folder / "sweep.json"
    settings = json.loads(json.dumps(run.settings()))
    try:
        saved = relevant(json.loads(path.read_text()))
    except OSError:
        saved = None
    except ValueError as error:
        raise Refusal(f"{path} cannot be read: {error}", codes.BAD_DATA) from error
    if saved is None:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps(settings, indent=1) + "\n")
        except OSError as error:
            raise Refusal(f"cannot make the run's folder {run.folder}: {error.strerror}", codes.IO_FAILURE) from error
        return
    differing = [key for key in {**saved, **settings} if saved.get(key) != settings.get(key)]
    if differing:
        key = differing[0]
        raise Refusal(f"{run.folder} was begun with {key} = {saved.get(key)}, and now it is {settings.get(key)}: remove "
                      "it, or choose another folder for the sweep")


def _seconds(attempts: list[dict[str, Any]]) -> float:
    begun = {line["attempt"]: line["time"] for line in attempts if line.get("event") == "start"}
    time = datetime.datetime.fromisoformat
    return sum((time(line["time"]) - time(begun[line["attempt"]])).total_seconds() for line in attempts
               if line.get("event") == "end" and line["attempt"] in begun)


def _state(attempts: list[dict[str, Any]], exploded: bool) -> tuple[str, Optional[int]]:
    if not attempts:
        return WAITING, None
    code = attempts[-1].get("code")
    if code is None:
        return RUNNING, None
    if code == codes.SUCCESS:
        return (EXPLODED if exploded else COMPLETE), code
    return (STOPPED if code == codes.STOPPED else FAILED), code


def look(folder: pathlib.Path) -> Outcome:
    """What there is of the run in `folder`."""
    attempts, metrics = lines_of(folder / "attempts.jsonl"), lines_of(folder / "metrics.jsonl")
    last = {line.get("kind"): line for line in metrics}
    explosion, validation = last.get("explosion"), last.get("validation", {})
    state, code = _state(attempts, explosion is not None)
    rates = [line["lr"] for line in metrics if line.get("kind") == "step"]
    return Outcome(state, code, update=max((line.get("update", 0) for line in metrics), default=0),
                   loss=validation.get("loss"), perplexity=validation.get("perplexity"), accuracy=validation.get("accuracy"),
                   exploded_at=explosion["update"] if explosion else None,
                   exploded_lr=explosion["lr"] if explosion else None, highest_lr=max(rates, default=None),
                   seconds=_seconds(attempts))
