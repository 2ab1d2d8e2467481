"""How pictures look: one colour for each group of runs in all of them, sizes for print, files with the same bytes."""
import io
import math
import re

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot, ticker  # noqa: E402

# Okabe and Ito, "Color Universal Design", 2008, without yellow, which is faint on white; then darker ones of Tol, "Colour
# Schemes", 2021.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#999933", "#777777",
           "#332288", "#A5652A")
LEGEND_CHARACTERS = 112  # of labels and what stands before them, in a line as wide as the picture
LINES = ("-", "--", ":", "-.")
WIDTH = 7.0  # inches: the whole text width of a paper; text in pictures has 8 or 9 points

matplotlib.rcParams.update({
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8.5,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.linewidth": 0.8,
    "lines.linewidth": 1.5, "legend.frameon": False, "figure.constrained_layout.use": True,
    "svg.hashsalt": "normformer", "svg.fonttype": "path", "savefig.dpi": 200, "axes.formatter.useoffset": False,
})


def colour(groups):
    """Gives each group its colour, and another kind of line once colours are used up."""
    for i, group in enumerate(groups):
        group.colour = COLOURS[i % len(COLOURS)]
        group.line = LINES[i // len(COLOURS) % len(LINES)]


# From how much on an axis has which unit: (least, what is one of it, how it is written).
TIMES = ((3 * 3600.0, 3600.0, "hours"), (180.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))
COUNTS = (*((10.0 ** e, 10.0 ** e, f"$10^{{{e}}}$") for e in range(24, 5, -3)), (1e5, 1e3, "$10^{3}$"), (0.0, 1.0, ""))


def scale_axis(ax, label, units):
    """Numbers of at most a few digits along x, from 0 on, with their unit in the label."""
    largest = ax.dataLim.x1
    if 0 < largest < math.inf:
        ax.set_xlim(-0.02 * largest, 1.04 * largest)
    _, one, unit = next(entry for entry in units if largest >= entry[0] or entry[0] == 0.0)
    ax.xaxis.set_major_locator(ticker.MultipleLocator(one * nice_step(largest / one / 5)))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value / one:g}"))
    ax.set_xlabel(f"{label} ({unit})" if unit else label)


def nice_step(step):
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(power * factor for factor in (1, 2, 5, 10) if step <= power * factor * (1 + 1e-9))


def with_prefixes(axis, unit=""):
    """Ticks as 10 k, 2.5 M, 3 T."""
    axis.set_major_formatter(ticker.EngFormatter(unit, sep=" "))


def panels(rows, columns, height, **options):
    """(figure, flat list of axes) with room for a legend above."""
    figure, axes = pyplot.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, **options)
    return figure, list(axes.flat)


def legend_columns(labels):
    """As many columns as fit, each as wide as its longest label; labels fill them one by one, evenly."""
    def width(columns):
        return sum(max(map(len, part)) + 8 for part in np.array_split(labels, columns))
    return next((columns for columns in range(len(labels), 1, -1) if width(columns) <= LEGEND_CHARACTERS), 1)


def legend_above(figure, groups):
    """One legend for all panels, in the groups' colours, for which the figure grows."""
    handles = [matplotlib.lines.Line2D([], [], color=group.colour, linestyle=group.line, linewidth=2) for group in groups]
    labels = [group.label for group in groups]
    columns = legend_columns(labels)
    rows = -(-len(groups) // columns)
    inches = 0.2 * rows + 0.1
    figure.set_figheight(figure.get_figheight() + inches)
    height = inches / figure.get_figheight()
    figure.legend(handles, labels, loc="upper center", ncol=columns, borderaxespad=0.2)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - height))


def png(figure, path):
    """Writes a picture for print, the same bytes each time."""
    figure.savefig(path, metadata={"Software": None})


def svg(figure, name, title):
    """A picture as an <svg> element that may stand in a page beside others."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
