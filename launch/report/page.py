"""The page of a report: sections of figures and tables, well-formed and of itself, so that it needs nothing else."""
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; max-width: 52rem; }
figcaption, .note { color: #444; font-size: 0.9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; margin: 0.8rem 0; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th:first-child, td:first-child, .left { text-align: left; }
thead th { border-bottom: 1.5px solid #666; vertical-align: bottom; white-space: normal; }
.swatch { display: inline-block; width: 0.75em; height: 0.75em; margin-right: 0.45em; border-radius: 2px; }
@media print { body { max-width: none; margin: 0; } section { break-inside: avoid; } }
"""


def paragraph(text):
    return f'<p class="note">{escape(text)}</p>'


def figure(svg, caption):
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def swatch(group):
    """A group's name behind its colour, as the first cell of a row."""
    return f'<span class="swatch" style="background:{group.colour}"></span>{escape(group.label)}'


def table(head, rows):
    """A table; cells of rows are HTML, those of the head text."""
    kind = lambda name: ' class="left"' if name in ("model", "state") else ""  # noqa: E731
    top = "".join(f"<th{kind(name)}>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td{kind(name)}>{cell}</td>" for name, cell in zip(head, row)) + "</tr>"
                   for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def section(name, title, parts):
    return f'<section id="{name}"><h2>{escape(title)}</h2>\n' + "\n".join(parts) + "\n</section>"


def page(title, sections):
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
            + "\n".join(sections) + "\n</body></html>\n")
