"""Tables of numbers with footnotes: as Markdown, as LaTeX (booktabs) and as CSV."""

import csv
import io
from dataclasses import dataclass, replace

import numpy as np

NOT_RUN = "not run"
LATEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
         "$": r"\$", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "±": r"$\pm$", "↓": r"$\downarrow$",
         "↑": r"$\uparrow$", "–": "--", "−": "$-$", "×": r"$\times$", "<": "$<$", ">": "$>$", "|": "$|$"}
MARKDOWN = {"\\": r"\\", "*": r"\*", "|": r"\|", "<": r"\<"}


@dataclass(frozen=True)
class Cell:
    """One number of a table, shown with `digits` decimals, and whether it is the best of its column."""

    mean: float | None
    spread: float | None = None
    digits: int = 2
    best: bool = False

    def __str__(self):
        if self.mean is None:
            return NOT_RUN
        spread = "" if self.spread is None else f" ± {self.spread:.{self.digits}f}"
        return f"{self.mean:.{self.digits}f}{spread}"


@dataclass(frozen=True)
class Table:
    """Title, heads of the columns, rows (of text or Cell) and footnotes."""

    title: str
    heads: list
    rows: list
    notes: list

    def markdown(self):
        def text(cell):
            shown = _escaped(cell, MARKDOWN)
            return f"**{shown}**" if _best(cell) else shown

        lines = [f"**{_escaped(self.title, MARKDOWN)}**", "", *("| " + " | ".join(map(text, row)) + " |"
                                                               for row in [self.heads, *self.rows])]
        lines.insert(3, "|---" * len(self.heads) + "|")
        return "\n".join([*lines, "", *(f"{i}. {text(note)}" for i, note in enumerate(self.notes, 1))]) + "\n"

    def latex(self):
        """A float as wide as the page; the document needs the packages booktabs and graphicx."""
        def text(cell):
            shown = _escaped(cell, LATEX)
            return rf"\textbf{{{shown}}}" if _best(cell) else shown

        def line(row):
            return " & ".join(map(text, row)) + r" \\"

        notes = [rf"{i}. {text(note)}\par" for i, note in enumerate(self.notes, 1)]
        return "\n".join([
            r"% \usepackage{booktabs,graphicx}", r"\begin{table*}", r"\centering", rf"\caption{{{text(self.title)}}}",
            r"\resizebox{\textwidth}{!}{%", rf"\begin{{tabular}}{{l{'r' * (len(self.heads) - 1)}}}", r"\toprule",
            line(self.heads), r"\midrule", *map(line, self.rows), r"\bottomrule", r"\end{tabular}}",
            r"\par\smallskip\footnotesize\raggedright", *notes, r"\end{table*}"]) + "\n"

    def csv(self):
        """Heads and rows; no footnotes, which would not be a table."""
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([self.heads, *([str(c) for c in row] for row in self.rows)])
        return file.getvalue()


def _escaped(cell, signs):
    return "".join(signs.get(c, c) for c in str(cell))


def _best(cell):
    return isinstance(cell, Cell) and cell.best


def over(values, spread=None, scale=1.0, digits=2):
    """Scores of one method -> Cell: mean ± standard deviation (n − 1) of several, or the one with its own spread."""
    values = [scale * v for v in values if v is not None]
    if not values:
        return Cell(None)
    if len(values) > 1:
        return Cell(float(np.mean(values)), float(np.std(values, ddof=1)), digits)
    return Cell(values[0], None if spread is None else scale * spread, digits)


def mark_best(rows, column, best):
    """The same rows; in `column` every Cell whose mean is shown as `best` (min or max) of all is marked."""
    numbers = [row[column] for row in rows if isinstance(row[column], Cell) and row[column].mean is not None]
    if len(numbers) < 2:
        return rows
    top = best(round(cell.mean, cell.digits) for cell in numbers)
    return [[replace(c, best=round(c.mean, c.digits) == top) if i == column and c in numbers else c
             for i, c in enumerate(row)] for row in rows]


def in_order(names, first):
    """The names of `first` that are there, in its order, then the others by name."""
    return [name for name in first if name in names] + sorted(name for name in names if name not in first)
