"""The command: reads runs, draws figures, writes index.html and one PNG for each figure."""
import argparse
import math
import pathlib
import sys

from report import figures, measures, page, style
from report.runs import NoRun, find_runs

USAGE, DATA, FILES = 64, 65, 74  # exit codes, as those of normformer (core/error.h)
TOLD_IN_WORDS = 3  # models whose speed is told in sentences too; of more the table alone is easier to read


class Arguments(argparse.ArgumentParser):
    """Says what is wrong with a command line in one sentence, and ends with the program's exit code for it."""

    def error(self, message):
        self.exit(USAGE, f"normformer: report: {message}; normformer report --help lists the options\n")


def read_arguments(words):
    parser = Arguments(prog="normformer report", description="Compares runs on one page, with a PNG of each figure.")
    parser.add_argument("runs", nargs="+", help="runs' folders; a folder that is none stands for the runs in it")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("report"), help="folder to write to (report)")
    parser.add_argument("--target-perplexity", type=float,
                        help="perplexity to measure the speed to, instead of each baseline's final one")
    parser.add_argument("--names", help="names of the runs, separated by commas; runs named alike are seeds of one")
    arguments = parser.parse_args(words)
    target = arguments.target_perplexity
    if target is not None and not (target > 1 and math.isfinite(target)):
        parser.error(f"--target-perplexity {target:g}: a perplexity is a number above 1")
    return arguments


class Pictures:
    """Writes figures: into the page, and as files for print."""

    def __init__(self, folder):
        self.folder = folder

    def add(self, name, figure, caption):
        """The figure as a part of a section; nothing where there is none."""
        if figure is None:
            return []
        style.png(figure, self.folder / f"{name}.png")
        part = page.figure(style.svg(figure, name, caption.partition(":")[0]), caption)
        style.pyplot.close(figure)
        return [part]


def curves(groups, pictures):
    parts = pictures.add("training-loss", figures.training_loss(groups),
                         "Training loss: thin, of each run; thick, smoothed over a fortieth of the run and averaged over "
                         "seeds. Time is that of training, without pauses between starts.")
    parts += pictures.add("validation-perplexity", figures.validation_perplexity(groups),
                          "Validation perplexity: the mean over seeds; the band goes from the lowest to the highest.")
    return parts or [page.paragraph("No run has made an update yet.")]


def number(value, form="{:.4g}"):
    return "–" if value is None else form.format(value)


def duration(seconds):
    """12.3 s, 4 min 5 s, 3 h 12 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    total = round(seconds)
    return f"{total // 60} min {total % 60} s" if total < 3600 else f"{total // 3600} h {total % 3600 // 60} min"


def speed_sentence(group, owner, reached, whole):
    """What a figure of speed says, in words; empty where there is nothing to say."""
    if group is owner or group.is_baseline:
        return []
    if reached is None:
        return [f"{group.label} does not reach the final perplexity of {owner.label}."]
    text = f"{group.label} reaches the final perplexity of {owner.label} in " \
           f"{measures.part_of(reached, whole, 'updates'):.0f} % of the updates"
    flops, seconds = (measures.part_of(reached, whole, name) for name in ("flops", "seconds"))
    told = [f"{part:.0f} % of the {what}" for part, what in ((flops, "FLOPs"), (seconds, "training time")) if part]
    return [" and ".join([", ".join([text, *told[:-1]]), *told[-1:]]) + "."]


def speed_table(rows):
    head = ["", "updates", "tokens", "model FLOPs", "training time", "of the baseline's updates"]
    cells = []
    for group, reached, whole in rows:
        if reached is None:
            cells.append([page.swatch(group), "not reached", *"––––"])
            continue
        part = measures.part_of(reached, whole, "updates")
        cells.append([page.swatch(group), number(reached.updates, "{:.0f}"), figures.with_prefix(reached.tokens),
                      figures.with_prefix(reached.flops) if reached.flops else "–", duration(reached.seconds),
                      number(part, "{:.1f} %")])
    return page.table(head, cells)


def speed(groups, pictures, asked):
    targets = measures.targets_of(groups, asked)
    if not targets:
        return [page.paragraph("There is no baseline with a validation among these runs (data.valid and "
                               "train.valid_every make them); --target-perplexity sets a perplexity to reach.")]
    parts = []
    for i, ((target, owner), rows) in enumerate(zip(targets, measures.speed_rows(groups, targets))):
        title = f"Validation perplexity {target:.4g}" + (f", the final one of {owner.label}" if owner else "")
        parts.append(f"<h3>{page.escape(title)}</h3>")
        sentences = [text for group, reached, whole in rows if owner
                     for text in speed_sentence(group, owner, reached, whole)]
        if 0 < len(sentences) <= TOLD_IN_WORDS:
            parts.append(page.paragraph(" ".join(sentences)))
        parts.append(speed_table(rows))
        if owner and len(rows) > 1:
            parts += pictures.add(f"speed-{i + 1}", figures.speed(rows, target, owner),
                                  "Speed to the baseline's final perplexity: linear between validations, in the "
                                  "logarithm of the perplexity.")
    return parts


def gradients(groups, pictures):
    parts = pictures.add("gradient-norms", figures.gradient_norms(groups),
                         "Gradients by layer early in training: L1 norm of the gradient to fc2.weight after its "
                         "reduction, before clipping (the paper's figure 3).")
    parts += pictures.add("gradient-ratio", figures.gradient_ratio(groups),
                          "Largest over smallest layer: of the same norms; 1 means equal gradients in all layers.")
    return parts or [page.paragraph("No run has recorded its gradients: metrics.gradient_norms_every records them "
                                    "in statistics.jsonl.")]


def scales(groups, pictures):
    parts = pictures.add("learned-scales", figures.learned_scales(groups),
                         "Learned scales by layer at the last record: quartiles with the median, whiskers from the 5th "
                         "to the 95th percentile; of several seeds, the first (the paper's figure 4).")
    return parts or [page.paragraph("No run has recorded its learned scales: metrics.distributions_every records "
                                    "them in statistics.jsonl.")]


def stability(groups, pictures):
    parts = pictures.add("stability", figures.explosion(groups),
                         "Where runs exploded while the learning rate rose: a point for each run, a bar at the median "
                         "over seeds (the paper's figure 5); an open arrow for each run that lasted, which counts as "
                         "infinitely stable.")
    tests = [group for group in groups if any(map(measures.is_stability_test, group.runs))]
    if not tests:
        return [page.paragraph("No run is a stability test: health.explosion_rise makes it one.")]
    head = ["", "runs exploded", "lasted", "going on", "median update", "median learning rate"]
    return parts + [page.table(head, list(map(stability_row, tests)))]


def stability_row(group):
    ends = measures.stability_ends(group)
    exploded = sum(end.exploded for end in ends)
    medians = [number(middle, "over {:.4g}" if beyond else "{:.4g}")
               for middle, beyond in (measures.stable_until(ends, name) for name in ("update", "lr"))]
    return [page.swatch(group), f"{exploded} of {len(group.runs)}", str(len(ends) - exploded),
            str(len(group.runs) - len(ends)), *medians]


def speeds(groups, pictures):
    parts = pictures.add("throughput", figures.throughput(groups),
                         "Throughput and memory: medians over the second half of a run, over all its ranks; memory is "
                         "what rank 0's tensors took at most.")
    return parts or [page.paragraph("No run has made an update yet.")]


def configurations(groups):
    runs = [(group, run) for group in groups for run in group.runs]
    keys = [key for key in measures.differing_keys([run for _, run in runs]) if key != "checkpoint.folder"]
    head = ["run", "model", "state", "parameters", "last loss", "last perplexity", *keys]
    rows = []
    for group, run in runs:
        loss, perplexity, parameters = run.loss().value, run.perplexity().value, run.about.get("parameters")
        rows.append([page.escape(run.name), page.swatch(group), page.escape(run.state),
                     figures.with_prefix(parameters) if parameters else "–",
                     number(loss[-1] if len(loss) else None), number(perplexity[-1] if len(perplexity) else None),
                     *(page.escape(str(run.config.get(key, "–"))) for key in keys)])
    return [page.table(head, rows), page.paragraph("Shown are only the keys in which runs differ.")]


def write_report(groups, arguments):
    arguments.output.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(arguments.output)
    style.colour(groups)
    sections = [
        page.section("configurations", "Runs", configurations(groups)),
        page.section("curves", "Loss and perplexity", curves(groups, pictures)),
        page.section("speed", "Speed to a perplexity", speed(groups, pictures, arguments.target_perplexity)),
        page.section("gradients", "Gradients by layer", gradients(groups, pictures)),
        page.section("scales", "Learned scales", scales(groups, pictures)),
        page.section("stability", "Stability", stability(groups, pictures)),
        page.section("throughput", "Throughput and memory", speeds(groups, pictures)),
    ]
    file = arguments.output / "index.html"
    file.write_text(page.page("Comparison of runs", sections), encoding="utf-8")
    return file


def main(words):
    arguments = read_arguments(words)
    try:
        runs = find_runs(arguments.runs)
        names = [name.strip() for name in arguments.names.split(",")] if arguments.names else None
        if names and len(names) != len(runs):
            print(f"normformer: report: --names has {len(names)} names for {len(runs)} runs: "
                  f"{', '.join(run.name for run in runs)}", file=sys.stderr)
            return USAGE
        print(f"wrote {write_report(measures.group_runs(runs, names), arguments)}")
        return 0
    except NoRun as e:
        print(f"normformer: {e}", file=sys.stderr)
        return DATA
    except OSError as e:
        print(f"normformer: cannot write the report: {e}", file=sys.stderr)
        return FILES
