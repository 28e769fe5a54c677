"""Tables of numbers with footnotes: as Markdown, as LaTeX (booktabs) and as CSV."""

from dataclasses import dataclass, replace

import numpy as np

from core.text import csv_text, latex, markdown, p_value

NOT_RUN = "not run"


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
        return f"{self.shown}{spread}"

    @property
    def shown(self):
        """The number as it is shown, without its spread; no -0.00."""
        return f"{round(self.mean, self.digits) + 0.0:.{self.digits}f}"

    def parts(self):
        """The numbers of which a CSV has a column each: "" for the number itself -> value, "spread" -> value."""
        return {"": self.mean, "spread": self.spread}


@dataclass(frozen=True)
class PValue:
    """A p-value and its stars."""

    p: float
    stars: str

    def __str__(self):
        return f"{p_value(self.p)} {self.stars}".strip()

    def parts(self):
        return {"": self.p, "stars": self.stars or None}


@dataclass(frozen=True)
class Table:
    """Title, heads of the columns, rows (of text, Cell or PValue), footnotes, and the label that LaTeX refers to."""

    title: str
    heads: list
    rows: list
    notes: list
    label: str

    def markdown(self):
        def text(cell):
            shown = markdown(cell)
            return f"**{shown}**" if _best(cell) else shown

        lines = [f"**{markdown(self.title)}**", "", *("| " + " | ".join(map(text, row)) + " |"
                                                      for row in [self.heads, *self.rows])]
        lines.insert(3, "|---" * len(self.heads) + "|")
        return "\n".join([*lines, "", *(f"{i}. {text(note)}" for i, note in enumerate(self.notes, 1))]) + "\n"

    def latex(self):
        """A float as wide as the page; the document needs the packages booktabs and graphicx."""
        def text(cell):
            shown = latex(cell)
            return rf"\textbf{{{shown}}}" if _best(cell) else shown

        def line(row):
            return " & ".join(map(text, row)) + r" \\"

        notes = [rf"{i}. {text(note)}\par" for i, note in enumerate(self.notes, 1)]
        return "\n".join([
            r"% \usepackage{booktabs,graphicx}", r"\begin{table*}", r"\centering", rf"\caption{{{text(self.title)}}}",
            rf"\label{{{self.label}}}",
            r"\resizebox{\textwidth}{!}{%", rf"\begin{{tabular}}{{l{'r' * (len(self.heads) - 1)}}}", r"\toprule",
            line(self.heads), r"\midrule", *map(line, self.rows), r"\bottomrule", r"\end{tabular}}",
            r"\par\smallskip\footnotesize\raggedright", *notes, r"\end{table*}"]) + "\n"

    def csv(self):
        """Heads and rows, each number in a column of its own; no footnotes, which would not be a table.

        Nothing stands where there is no number. Numbers have all their digits.
        """
        columns = []
        for head, cells in zip(self.heads, zip(*self.rows, strict=True), strict=True):
            numbers = [cell.parts() if isinstance(cell, (Cell, PValue)) else {} for cell in cells]
            if not any(numbers):
                columns.append([head, *cells])
                continue
            for part in dict.fromkeys(name for parts in numbers for name in parts):
                values = [parts.get(part) for parts in numbers]
                if part == "" or any(value is not None for value in values):
                    columns.append([f"{head}, {part}" if part else head, *values])
        return csv_text(zip(*columns, strict=True))


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
    """The same rows; in `column` every Cell that shows the same number as the `best` (min or max) of all is marked."""
    numbers = {i: float(row[column].shown) for i, row in enumerate(rows)
               if isinstance(row[column], Cell) and row[column].mean is not None}
    if len(numbers) < 2:
        return rows
    top = best(numbers.values())
    return [[replace(cell, best=numbers[i] == top) if k == column and i in numbers else cell
             for k, cell in enumerate(row)] for i, row in enumerate(rows)]


def in_order(names, first):
    """The names of `first` that are there, in its order, then the others by name."""
    return [name for name in first if name in names] + sorted(name for name in names if name not in first)
