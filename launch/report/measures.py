"""The numbers of a report: groups of runs, means over seeds, speed to a perplexity, ratios of layers."""
import math
from dataclasses import dataclass

import numpy as np

from report.runs import Curve, layer_of

# Beginnings of keys that do not make a run another experiment: where it lies, what it writes down, and which seed it has.
INDIFFERENT = ("train.seed", "checkpoint.", "metrics.", "train.log_every")
FC2 = "fc2.weight"


@dataclass
class Group:
    """Runs that differ in nothing but their seed."""
    label: str
    runs: list
    is_baseline: bool
    colour: str = "#000000"
    line: str = "-"


@dataclass
class Reach:
    """What one run needed to reach a perplexity; None where it did not."""
    updates: float
    tokens: float
    flops: float | None
    seconds: float


@dataclass
class StabilityEnd:
    """How far one run of a stability test came: to its explosion, or to its end without one."""
    update: int
    lr: float  # the last one, or the highest of a run that lasted
    exploded: bool


def is_pre_norm(config):
    return config.get("model.norm_position", "pre") == "pre"


def is_baseline(config):
    """Whether a configuration is Pre-LN with none of NormFormer's additions."""
    return is_pre_norm(config) and config.get("model.head_scale", "none") == "none" and not any(
        config.get(f"model.{key}", False) for key in ("post_attention_norm", "ffn_norm", "residual_scale", "qkv_norm"))


def model_name(config):
    """The model of a configuration, in the paper's words."""
    if is_baseline(config):
        return "Pre-LN baseline"
    has = {"head scale": config.get("model.head_scale", "none") != "none",
           "post-attention LN": bool(config.get("model.post_attention_norm")),
           "FFN LN": bool(config.get("model.ffn_norm"))}
    parts = [part for part, there in has.items() if there]
    if len(parts) == 3:
        name = "NormFormer" if is_pre_norm(config) else "Post-LN NormFormer"
    else:
        name = " + ".join(["Pre-LN" if is_pre_norm(config) else "Post-LN", *parts])
    extras = [("residual_scale", "ResScale"), ("qkv_norm", "QKV LN")]
    return " + ".join([name, *(text for key, text in extras if config.get(f"model.{key}"))])


def identity(config):
    """What of a configuration tells experiments apart."""
    return tuple(sorted((key, repr(value)) for key, value in config.items() if not key.startswith(INDIFFERENT)))


def differing_keys(runs):
    """The configuration's keys that differ among runs, sorted; a key that one lacks differs."""
    keys = sorted({key for run in runs for key in run.config})
    return [key for key in keys if len({repr(run.config.get(key)) for run in runs}) > 1]


MODEL_KEYS = ("model.norm_position", "model.head_scale", "model.post_attention_norm", "model.ffn_norm",
              "model.residual_scale", "model.qkv_norm")  # what a model's name says


def labelled(groups):
    """Tells groups of one model apart by the keys in which they differ, or by their first run's name."""
    for label in sorted({group.label for group in groups}):
        same = [group for group in groups if group.label == label]
        if len(same) == 1:
            continue
        keys = [key for key in differing_keys([group.runs[0] for group in same])
                if not key.startswith(INDIFFERENT) and key not in MODEL_KEYS]
        for group in same:
            config = group.runs[0].config
            told = ", ".join(f"{key.partition('.')[2]} {config.get(key)}" for key in keys)
            group.label = f"{label}, {told if 0 < len(keys) <= 2 else group.runs[0].name}"
    return groups


def group_runs(runs, names=None):
    """Groups, baselines first, in the order of their first runs. With names, one for each run, those named alike."""
    groups = {}
    for i, run in enumerate(runs):
        key = names[i] if names else identity(run.config)
        if key not in groups:
            groups[key] = Group(names[i] if names else model_name(run.config), [], is_baseline(run.config))
        groups[key].runs.append(run)
    found = list(groups.values())
    return sorted(found if names else labelled(found), key=lambda group: not group.is_baseline)


def smooth(values, window):
    """Means over `window` neighbours, fewer at both ends; the window is made odd."""
    if not len(values):
        return values
    window = max(1, min(window, len(values))) // 2 * 2 + 1
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same")[:len(values)] / np.convolve(np.ones(len(values)), kernel,
                                                                          "same")[:len(values)]


def thinned(curve, points=1000):
    """A curve of at most so many points, each the mean of its neighbours: for pictures."""
    n = len(curve.value)
    if n <= points:
        return curve
    edges = np.linspace(0, n, points + 1).astype(int)
    mean = lambda column: np.add.reduceat(column, edges[:-1]) / np.diff(edges)  # noqa: E731
    return Curve(*(mean(column) for column in (curve.update, curve.tokens, curve.seconds, curve.value)))


def mean_curve(curves):
    """(mean, lowest, highest) over curves, at the updates that all of them have; Curve and two arrays."""
    curves = [curve for curve in curves if len(curve.value)]
    if not curves:
        empty = np.array([])
        return Curve(empty, empty, empty, empty), empty, empty
    common = curves[0].update
    for curve in curves[1:]:
        common = np.intersect1d(common, curve.update)
    pick = lambda curve, column: column[np.searchsorted(curve.update, common)]  # noqa: E731
    stack = lambda name: np.array([pick(curve, getattr(curve, name)) for curve in curves])  # noqa: E731
    values = stack("value")
    return (Curve(common, stack("tokens").mean(0), stack("seconds").mean(0), values.mean(0)), values.min(0),
            values.max(0))


def perplexity_curve(group):
    """The mean of the validation perplexities of a group's runs."""
    return mean_curve([run.perplexity() for run in group.runs])[0]


def final_perplexity(group):
    """At the last validation that all of the group's runs have, their mean; None without one."""
    curve = perplexity_curve(group)
    return float(curve.value[-1]) if len(curve.value) else None


def reach(curve, target, flops_per_token=None):
    """What it took until a perplexity curve came down to `target`: linear between validations, in the logarithm of
    the perplexity. None where it did not come there."""
    below = np.flatnonzero(curve.value <= target)
    if len(below) == 0:
        return None
    i = int(below[0])
    part = 1.0
    if i > 0:
        high, low = math.log(curve.value[i - 1]), math.log(curve.value[i])
        part = (high - math.log(target)) / (high - low)
    at = lambda column: float(column[i] if i == 0 else column[i - 1] + part * (column[i] - column[i - 1]))  # noqa: E731
    tokens = at(curve.tokens)
    return Reach(at(curve.update), tokens, tokens * flops_per_token if flops_per_token else None, at(curve.seconds))


def group_reach(group, target):
    """reach() of the mean of a group's runs."""
    return reach(perplexity_curve(group), target, group.runs[0].flops_per_token)


def targets_of(groups, asked):
    """[(perplexity, group whose last one it is, or None)]: as asked for, else each baseline's."""
    if asked is not None:
        return [(asked, None)]
    found = [(final_perplexity(group), group) for group in groups if group.is_baseline]
    return [(perplexity, group) for perplexity, group in found if perplexity is not None]


def speed_rows(groups, targets):
    """For each target its rows (group, Reach or None, Reach of the baseline that it is compared with or None)."""
    return [[(group, group_reach(group, target), group_reach(owner, target) if owner else None) for group in groups]
            for target, owner in targets]


def layer_norms(run, norm="l1", what=FC2):
    """{layer: {update: norm of the gradient}} as statistics.jsonl tells it."""
    found = {}
    for line in run.gradients:
        for name, norms in line["parameters"].items():
            place = layer_of(name)
            if place and place[1] == what and isinstance(norms.get(norm), (int, float)):
                found.setdefault(place[0], {})[line["update"]] = norms[norm]
    return found


def mean_layer_norms(group, last_update):
    """(updates, {layer: norms}), means over the group's runs where all have a record, up to an update."""
    all_of_them = [found for found in (layer_norms(run) for run in group.runs) if found]
    if not all_of_them:
        return np.array([]), {}
    layers = sorted(set.intersection(*(set(found) for found in all_of_them)))
    updates = sorted(set.intersection(*(set(found[layer]) for found in all_of_them for layer in layers)))
    updates = [update for update in updates if update <= last_update]
    return np.array(updates), {layer: np.array([np.mean([found[layer][update] for found in all_of_them])
                                                for update in updates]) for layer in layers}


def layer_ratio(norms):
    """Largest over smallest layer, at each update; infinite where a layer has none."""
    table = np.array(list(norms.values()))
    with np.errstate(divide="ignore", invalid="ignore"):
        return table.max(0) / table.min(0)


def last_scales(run, what):
    """[(layer, distribution)] of a kind of parameter at the last record, by layer."""
    if not run.distributions:
        return []
    found = [(layer_of(name), values) for name, values in run.distributions[-1]["parameters"].items()]
    return sorted(((place[0], values) for place, values in found if place and place[1] == what),
                  key=lambda pair: pair[0])


def is_stability_test(run):
    """Whether the run was to end where it explodes, or did."""
    return run.explosion is not None or run.config.get("health.explosion_rise", 0.0) > 0


def end_of_test(run):
    """How a stability test ended, a StabilityEnd; None of other runs and of those that are going on."""
    if run.explosion:
        rate = run.explosion.get("lr")
        return StabilityEnd(run.explosion["update"], rate, True) if isinstance(rate, (int, float)) else None
    rates = [step["lr"] for step in run.steps if isinstance(step.get("lr"), (int, float))]
    return StabilityEnd(run.updates, max(rates), False) if is_stability_test(run) and run.is_complete and rates else None


def stability_ends(group):
    """The StabilityEnd of each of the group's runs that has one."""
    return [end for end in map(end_of_test, group.runs) if end]


def median(values):
    return float(np.median(values)) if len(values) else None


def stable_until(ends, name):
    """(median of "update" or "lr" over runs, whether it lies beyond): a run that lasted counts as infinitely stable, so
    that of a median among those only the least of them is known. (None, False) without a run."""
    middle = median([getattr(end, name) if end.exploded else math.inf for end in ends])
    if middle is None or math.isfinite(middle):
        return middle, False
    return float(min(getattr(end, name) for end in ends if not end.exploded)), True


def throughput(run):
    """(tokens a second, FLOP a second): medians over the run's second half; None where nothing tells."""
    half = run.steps[len(run.steps) // 2:]
    pick = lambda key: median([step[key] for step in half if step.get(key)])  # noqa: E731
    return pick("tokens_per_second"), pick("flops_per_second")


def peak_memory(run):
    """The most bytes that a rank's tensors took; None where nothing tells."""
    told = [line["peak_memory"] for line in run.validations if line.get("peak_memory")]
    return max(told) if told else None


def part_of(reached, whole, name):
    """What per cent one Reach is of another; None where either is not known."""
    ours, theirs = (getattr(one, name) if one else None for one in (reached, whole))
    return 100 * ours / theirs if ours is not None and theirs else None
