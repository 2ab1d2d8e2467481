"""The pictures of a report: each function returns a figure, or None where the runs tell nothing to draw."""
import math
import textwrap

import numpy as np

from report import measures
from report.style import COUNTS, TIMES, legend_above, panels, pyplot, scale_axis, with_prefixes

EARLY = 1000  # updates that the figure of gradients shows: "early in training" (NormFormer, figure 3)

# What a curve is drawn against: label, values of a Curve and its run.
AXES = (
    ("training tokens", lambda curve, run: curve.tokens),
    ("updates", lambda curve, run: curve.update),
    ("model FLOPs", lambda curve, run: curve.tokens * (run.flops_per_token or math.nan)),
    ("training time", lambda curve, run: curve.seconds),
)

SCALES = (("ffn_layernorm.weight", "FFN LayerNorm gain"), ("attn_ln.weight", "post-attention LayerNorm gain"),
          ("c_attn", "head scale"), ("w_resid", "residual scale"),
          ("self_attn_layer_norm.weight", "LayerNorm gain before attention"),
          ("final_layer_norm.weight", "LayerNorm gain before the FFN"))


def draw_over_all(groups, label, draw):
    """Four panels of the same curves over tokens, updates, FLOPs and time; draw(axes, group, x of a curve)."""
    figure, axes = panels(2, 2, 5.1, sharey=True)
    for i, (ax, (x_label, x_of)) in enumerate(zip(axes, AXES)):
        for group in groups:
            draw(ax, group, lambda curve, run, x_of=x_of: x_of(curve, run))
        if i % 2 == 0:
            ax.set_ylabel(label)
        scale_axis(ax, x_label, TIMES if x_label == "training time" else COUNTS)
    legend_above(figure, groups)
    return figure


def limit_to_late(axes, values):
    """Leaves out of sight what stands above all that comes after the first eighth of the curves, where there are any."""
    if not values:
        return
    late = np.concatenate([value[-(-len(value) // 8):] if len(value) > 8 else value for value in values])
    room = 0.05 * max(late.max() - late.min(), 0.01 * abs(late.max()))
    for ax in axes:
        ax.set_ylim(late.min() - room, late.max() + room)


def training_loss(groups):
    groups = [group for group in groups if any(len(run.loss().value) > 1 for run in group.runs)]
    if not groups:
        return None
    seen = []

    def draw(ax, group, x):
        for run in group.runs:
            raw = measures.thinned(run.loss())
            ax.plot(x(raw, run), raw.value, color=group.colour, alpha=0.18, linewidth=0.6)
        mean = measures.mean_curve([run.loss() for run in group.runs])[0]
        if not len(mean.value):
            return  # seeds that share no update
        mean.value = measures.smooth(mean.value, len(mean.value) // 40)
        mean = measures.thinned(mean)
        seen.append(mean.value)
        ax.plot(x(mean, group.runs[0]), mean.value, color=group.colour, linestyle=group.line)

    figure = draw_over_all(groups, "training loss (nats a token)", draw)
    limit_to_late(figure.axes, seen)
    return figure


def validation_perplexity(groups):
    groups = [group for group in groups if len(measures.perplexity_curve(group).value)]
    if not groups:
        return None

    def draw(ax, group, x):
        mean, low, high = measures.mean_curve([run.perplexity() for run in group.runs])
        at = x(mean, group.runs[0])
        ax.fill_between(at, low, high, color=group.colour, alpha=0.2, linewidth=0)
        ax.plot(at, mean.value, color=group.colour, linestyle=group.line, marker="o", markersize=2.5 if len(at) > 1 else 5)
        seen.append(mean.value)

    seen = []
    figure = draw_over_all(groups, "validation perplexity", draw)
    limit_to_late(figure.axes, seen)
    return figure


def speed(rows, target, owner):
    """Bars: what part of the baseline's updates, FLOPs and time each group needed to its perplexity."""
    whole = rows[0][2]
    if whole is None:
        return None
    measured = [("updates", "updates"), ("FLOPs", "flops"), ("training time", "seconds")]
    figure, axes = panels(1, 3, 0.9 + 0.34 * len(rows), sharey=True)
    for ax, (title, name) in zip(axes, measured):
        for i, (group, reached, _) in enumerate(rows):
            part = measures.part_of(reached, whole, name)
            if part is None:
                ax.text(2, i, "not reached", va="center", fontsize=8, color="#555555",
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
                continue
            ax.barh(i, part, color=group.colour, height=0.62)
            ax.text(part + 2, i, f"{part:.0f} %", va="center", fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        ax.set_xlim(0, 1.22 * max([100] + [measures.part_of(reached, whole, name) or 0 for _, reached, _ in rows]))
        ax.set_xlabel(f"{title} (%)")
        ax.set_yticks(range(len(rows)), [group.label for group, _, _ in rows])
        ax.axvline(100, color="#555555", linewidth=0.8)
        ax.grid(axis="y", visible=False)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle(f"to validation perplexity {target:.4g}, in % of what {owner.label} needs", fontsize=9)
    return figure


def gradient_norms(groups):
    """The L1 norm of fc2.weight's gradient in each layer, a panel for each group."""
    found = [(group, *measures.mean_layer_norms(group, EARLY)) for group in groups]
    found = [(group, updates, norms) for group, updates, norms in found if len(updates)]
    if not found:
        return None
    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    figure, axes = panels(rows, columns, 0.4 + 2.6 * rows, sharey=True, sharex=True)
    drawn = [(ax, updates, draw_layers(ax, updates, norms)) for ax, (_, updates, norms) in zip(axes, found)]
    top = max(ax.get_ylim()[1] for ax, _, _ in drawn)
    last = max(updates[-1] for _, updates, _ in drawn)
    for (ax, updates, ends), (group, _, _) in zip(drawn, found):
        tell_layers(ax, updates, ends, top)
        ax.set_title(textwrap.fill(group.label, 24, break_on_hyphens=False), color=group.colour, fontweight="bold")
    # The panels share their axes, on which there is room for the names of layers.
    axes[0].set_ylim(0, top)
    axes[0].set_xlim(0, 1.34 * last)
    axes[0].set_xticks([tick for tick in pyplot.MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0, last) if tick <= last])
    for ax in axes[len(found):]:
        ax.set_visible(False)
    for i, ax in enumerate(axes[:len(found)]):
        ax.set_xlabel("updates")
        ax.tick_params(labelbottom=True)
        if i % columns == 0:
            ax.set_ylabel("L1 norm of the\ngradient to fc2.weight")
    return figure


def shown_layers(layers):
    """Of many layers the first two, the middle one and the last two, as in the paper's figure 3."""
    layers = sorted(layers)
    return layers if len(layers) <= 5 else [*layers[:2], layers[len(layers) // 2], *layers[-2:]]


def draw_layers(ax, updates, norms):
    """A line for each layer shown, dark to light, told at its end."""
    shown = shown_layers(norms)
    colours = pyplot.get_cmap("viridis")(np.linspace(0.0, 0.88, len(shown)))
    ends = []
    for layer, line_colour in zip(shown, colours):
        values = measures.smooth(norms[layer], max(1, len(updates) // 20))
        ax.plot(updates, values, color=line_colour, linewidth=1.3)
        ends.append((values[-1], layer, line_colour))
    ends.sort()
    return ends


def tell_layers(ax, updates, ends, top):
    """The layers' names at the ends of their lines, none over another."""
    gap = 0.065 * top
    places = spread([end[0] for end in ends], gap)
    # None reaches down to the axis' numbers.
    places = [max(place, (i + 0.5) * gap) for i, place in enumerate(places)]
    for place, (_, layer, line_colour) in zip(places, ends):
        ax.annotate(f"layer {layer}", (updates[-1], place), xytext=(4, 0), textcoords="offset points",
                    color=line_colour, fontsize=7.5, va="center", annotation_clip=False)


def spread(places, gap):
    """Ascending places moved apart, so that neighbours are at least `gap` apart: those that would touch, as a block
    about their middle."""
    blocks = []  # [sum of what each member would have the block's first stand at, members]
    for place in places:
        blocks.append([place, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] + gap * blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            upper = blocks.pop()
            blocks[-1][0] += upper[0] - gap * upper[1] * blocks[-1][1]
            blocks[-1][1] += upper[1]
    return [total / members + gap * i for total, members in blocks for i in range(members)]


def gradient_ratio(groups):
    """Largest over smallest layer of the same norms."""
    found = [(group, *measures.mean_layer_norms(group, EARLY)) for group in groups]
    found = [(group, updates, norms) for group, updates, norms in found if len(updates) and len(norms) > 1]
    if not found:
        return None
    figure, (ax,) = panels(1, 1, 2.6)
    for group, updates, norms in found:
        ax.plot(updates, measures.smooth(measures.layer_ratio(norms), max(1, len(updates) // 20)), color=group.colour,
                linestyle=group.line)
    ax.set_xlabel("updates")
    ax.set_ylabel("largest / smallest layer's\nL1 norm (fc2.weight)")
    if ax.get_ylim()[1] > 30:
        ax.set_yscale("log")
    ax.set_ylim(bottom=1)
    legend_above(figure, [group for group, _, _ in found])
    return figure


def learned_scales(groups):
    """Boxes of the learned scales of each layer: quartiles, whiskers from the 5th to the 95th percentile."""
    kinds = [(what, title) for what, title in SCALES if any(measures.last_scales(group.runs[0], what) for group in groups)]
    if not kinds:
        return None
    columns = min(2, len(kinds))
    rows = -(-len(kinds) // columns)
    figure, axes = panels(rows, columns, 0.4 + 2.3 * rows)
    drawn = []
    for ax, (what, title) in zip(axes, kinds):
        here = [(group, measures.last_scales(group.runs[0], what)) for group in groups]
        here = [(group, scales) for group, scales in here if scales]
        for i, (group, scales) in enumerate(here):
            draw_boxes(ax, group, scales, (i - (len(here) - 1) / 2) * 0.8 / len(here), 0.68 / len(here))
        drawn += [group for group, _ in here if group not in drawn]
        layers = sorted({layer for _, scales in here for layer, _ in scales})
        every = -(-len(layers) // 12)
        ax.set_xticks(layers[::every], layers[::every])
        ax.set_title(title)
        ax.set_xlabel("layer")
        ax.axhline(1.0, color="#777777", linewidth=0.8, zorder=1)
        ax.grid(axis="x", visible=False)
    for ax in axes[len(kinds):]:
        ax.set_visible(False)
    legend_above(figure, [group for group in groups if group in drawn])
    return figure


def draw_boxes(ax, group, scales, offset, width):
    boxes = [{"med": values["p50"], "q1": values["p25"], "q3": values["p75"], "whislo": values["p5"],
              "whishi": values["p95"]} for _, values in scales]
    line = {"color": group.colour, "linewidth": 0.9}
    ax.bxp(boxes, positions=[layer + offset for layer, _ in scales], widths=width, showfliers=False, patch_artist=True,
           manage_ticks=False, boxprops={"facecolor": group.colour, "alpha": 0.45, **{"edgecolor": group.colour}},
           medianprops={"color": "#111111", "linewidth": 1.2}, whiskerprops=line, capprops=line)


def explosion(groups):
    """Updates and learning rate at which runs exploded: a point each run, a bar at the median; an open arrow where a run
    lasted."""
    found = [(group, measures.stability_ends(group)) for group in groups]
    found = [(group, ends) for group, ends in found if ends]
    if not found:
        return None
    figure, axes = panels(1, 2, 0.9 + 0.42 * len(found), sharey=True)
    for ax, name, label in zip(axes, ("update", "lr"), ("updates before explosion", "learning rate at explosion")):
        for i, (group, ends) in enumerate(found):
            draw_ends(ax, i, group.colour, ends, name)
        ax.set_xlabel(label)
        ax.xaxis.set_major_locator(pyplot.MaxNLocator(4))
        ax.set_xlim(0, 1.15 * max(getattr(end, name) for _, ends in found for end in ends))
        ax.set_yticks(range(len(found)), [group.label for group, _ in found])
        ax.grid(axis="y", visible=False)
    axes[0].set_ylim(len(found) - 0.5, -0.75)
    return figure


def draw_ends(ax, row, colour, ends, name):
    """One group's runs of a stability test, and their median."""
    for exploded, marker, face in ((True, "o", colour), (False, ">", "none")):
        values = [getattr(end, name) for end in ends if end.exploded == exploded]
        ax.plot(values, [row] * len(values), marker, color=colour, markerfacecolor=face, alpha=0.55 if exploded else 1,
                markersize=4.5 if exploded else 6, markeredgewidth=0 if exploded else 1)
    middle, beyond = measures.stable_until(ends, name)
    if not beyond:
        ax.plot([middle, middle], [row - 0.28, row + 0.28], color=colour, linewidth=2.5)
    ax.annotate(f"over {middle:.4g}" if beyond else f"{middle:.4g}", (middle, row - 0.3), ha="center", va="bottom",
                fontsize=8)


def throughput(groups):
    """Bars of tokens and model FLOPs a second and of memory; means over a group's runs."""
    kinds = [("tokens a second", "", lambda run: measures.throughput(run)[0]),
             ("model FLOP/s", "", lambda run: measures.throughput(run)[1]),
             ("peak memory of a rank", "B", measures.peak_memory)]
    columns = [(label, unit, [[value for value in map(of, group.runs) if value] for group in groups])
               for label, unit, of in kinds]
    columns = [column for column in columns if any(column[2])]
    if not columns:
        return None
    figure, axes = panels(1, len(columns), 0.8 + 0.34 * len(groups), sharey=True)
    for ax, (label, unit, values) in zip(axes, columns):
        means = [float(np.mean(told)) if told else 0.0 for told in values]
        for i, (group, mean) in enumerate(zip(groups, means)):
            ax.barh(i, mean, color=group.colour, height=0.62)
            text = with_prefix(mean, unit) if mean else "not recorded"
            ax.text(mean + 0.02 * max(means), i, text, va="center", fontsize=8)
        ax.set_xlim(0, 1.38 * max(means))
        ax.xaxis.set_major_locator(pyplot.MaxNLocator(4))
        with_prefixes(ax.xaxis, unit)
        ax.set_xlabel(label)
        ax.set_yticks(range(len(groups)), [group.label for group in groups])
        ax.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return figure


def with_prefix(value, unit=""):
    """12.3 k, 4.56 MB: three digits and a prefix."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 999.5 or prefix == "E":
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}".strip()
