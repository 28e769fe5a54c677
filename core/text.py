"""Text for people and programs: tables, and names from outside made harmless in the formats that we write.

Every name that comes from data or from a command line passes through one of the escapes here (HTML: `html.escape`).
"""

import csv
import io
import re

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")  # line breaks too
# What spreadsheets take for the start of a formula (OWASP, "CSV injection"), also after a ' that stands there already.
FORMULA = re.compile("'*[-=+@\t\r＝＋－＠]")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)
LATEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
         "$": r"\$", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "±": r"$\pm$", "↓": r"$\downarrow$",
         "↑": r"$\uparrow$", "–": "--", "−": "$-$", "×": r"$\times$", "<": "$<$", ">": "$>$", "|": "$|$",
         "[": "{[}", "]": "{]}", "*": "{*}"}  # [ and * mean something after a \\


def one_line(text):
    """A text without line breaks and other control characters: each run of them becomes a blank."""
    return CONTROL.sub(" ", str(text))


def markdown(text):
    """A text within a line of Markdown: no row, heading, picture, link, tag or formula of its own."""
    return re.sub(r"([\\`*_\[\]<>|#~&$])", r"\\\1", one_line(text))


def latex(text):
    """A text within a line of LaTeX."""
    return "".join(LATEX.get(c, c) for c in one_line(text))


def csv_text(rows):
    """Rows of cells -> CSV. A text that a spreadsheet would compute gets a ' before it; numbers stay as they are."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)
    return file.getvalue()


def _cell(value):
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) and not NUMBER.fullmatch(value) else value


def uncelled(text):
    """The text that `csv_text` wrote as this cell."""
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text


def p_value(p, digits=4):
    """A p-value as text: 0.0312, or < 0.0001 where it would be shown as 0, which no p-value is."""
    smallest = 10**-digits
    return f"{p:.{digits}f}" if p >= smallest else f"< {smallest:.{digits}f}"


def p_is(p, digits=4):
    """The same in a sentence: p = 0.0312, or p < 0.0001."""
    shown = p_value(p, digits)
    return f"p {shown}" if shown.startswith("<") else f"p = {shown}"


def aligned(rows, left=1):
    """m rows of n cells each -> m lines whose columns stand below each other, two spaces apart.

    The first `left` columns are flush left, the others flush right. Cells may be of any type; a line has no spaces
    at its end. Raises ValueError where the rows have different lengths.
    """
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{width}}" if i < left else f"{cell:>{width}}" for i, (cell, width) in
                               enumerate(zip(row, widths, strict=True))).rstrip() for row in rows)
