"""Label tables as people publish them: whatever delimiter, encoding and stray blanks, read without guessing values."""

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError
from core.text import one_line
from dataset import outside

ENCODINGS = ("utf-8-sig", "cp1252", "latin-1")  # the first that fits
DELIMITERS = ",;\t|"
SNIFFED = 4096  # characters of the header by which the delimiter is found
GRADES = ("NODR", "MILD", "MODERATE", "SEVERE", "PDR")  # of diabetic retinopathy, international scale 0 to 4


class Row(dict):
    """Column -> value, without blanks around; `where` names the line in messages."""

    where: str


@dataclass(frozen=True)
class Table:
    """The content of a file."""

    path: Path
    columns: tuple
    rows: list  # of Row

    def column(self, *names, required=True):
        """The column that is called as one of `names`, regardless of case, blanks and underscores; None if none is.

        Raises UserError for a missing column that is required.
        """
        wanted = [_plain(name) for name in names]
        for name in self.columns:
            if _plain(name) in wanted:
                return name
        if required:
            raise UserError(f"{self.path}: no column {' or '.join(names)} (found: {', '.join(self.columns)[:200]})")
        return None


def read_table(path):
    """A delimited text file with a header -> Table.

    Columns without a name and without a value are dropped. Raises UserError for what `read_cells` refuses, and for two
    columns of one name.
    """
    header, lines = read_cells(path)
    names = [one_line(name).strip() for name in header]
    if len(names) == 1 and not lines:
        raise UserError(f"{path}: holds a header and no row; check the file")
    kept = [i for i, name in enumerate(names) if name or any(cells[i].strip() for _, cells in lines)]
    named = [names[i] or f"column {i + 1}" for i in kept]
    refuse_twice(path, named)
    rows = []
    for number, cells in lines:
        row = Row({name: one_line(cells[i]).strip() for name, i in zip(named, kept, strict=True)})
        row.where = f"{path}, line {number}"
        rows.append(row)
    return Table(Path(path), tuple(named), rows)


def read_cells(path, encodings=ENCODINGS, delimiters=DELIMITERS):
    """A delimited text file -> names of its columns, [(line number, cells)] of all other lines that are not empty.

    Raises UserError, with the line, for a missing, empty or binary file, another encoding, quotes that are not closed,
    fields above 131,072 characters, and for rows that are longer or shorter than the header.
    """
    text, lines, start = _text(path, encodings), [], 1
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text, delimiters), strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                lines.append((reader.line_num, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {start}: is no table ({error}); check its quotes") from None
    if not lines:
        raise UserError(f"{path}: is empty; check the file")
    (_, names), *lines = lines
    for i, (number, cells) in enumerate(lines):
        if not any(cell.strip() for cell in cells[len(names):]):
            cells = cells[:len(names)]  # spreadsheets leave empty ones at the end
        if len(cells) != len(names):
            raise UserError(f"{path}, line {number}: {len(cells)} cells, expected {len(names)} as in the header; check "
                            "its quotes")
        lines[i] = number, cells
    return names, lines


def refuse_twice(path, names):
    """Raise UserError where two columns of a table have one name."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: has two columns {twice[:60]!r}; rename or remove one")


def _text(path, encodings):
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if b"\0" in raw:
        raise UserError(f"{path}, line {_line_of(raw, raw.index(0))}: is no text (holds a NUL byte); save it as CSV in "
                        "UTF-8")
    for encoding in encodings:
        try:
            text = raw.decode(encoding)
            break
        except UnicodeDecodeError as error:
            place = error.start
    else:
        raise UserError(f"{path}, line {_line_of(raw, place)}: is not UTF-8 (byte 0x{raw[place]:02x}); save it "
                        "as CSV in UTF-8")
    if not text.strip():
        raise UserError(f"{path}: is empty; check the file")
    return text


def _line_of(raw, place):
    """The number of the line that a byte stands in."""
    return raw.count(b"\n", 0, place) + 1


def _delimiter(text, delimiters):
    """The delimiter that is in the header most often; outside of quotes, as far as csv's sniffer can tell."""
    header = next(line for line in text.splitlines() if line.strip())[:SNIFFED]
    found = [d for d in delimiters if d in header]
    if len(found) < 2:
        return (found or [","])[0]
    try:
        return csv.Sniffer().sniff(header, delimiters).delimiter
    except csv.Error:
        return max(delimiters, key=header.count)


def _plain(name):
    return "".join(name.casefold().split()).replace("_", "").replace("-", "")


def binary(row, column):
    """0 or 1 from `0`, `1`, `0.0`, `1.0`. Raises UserError for anything else."""
    value = row[column]
    if value not in ("0", "1", "0.0", "1.0"):
        raise UserError(f"{row.where}: {column} is {value!r}, expected 0 or 1; correct it")
    return int(float(value))


def one_hot(row, column, values):
    """Which of `values`, texts, the column has: a tuple of 0 and 1. `2.0` counts as `2`. Raises UserError."""
    value = row[column].removesuffix(".0")
    if value not in values:
        raise UserError(f"{row.where}: {column} is {row[column]!r}, expected one of {', '.join(values)}; "
                        "correct it")
    return tuple(int(value == v) for v in values)


def grade(row, column):
    """A grade 0 to 4 -> one of GRADES, one-hot. Raises UserError."""
    return one_hot(row, column, ("0", "1", "2", "3", "4"))


def find_image(folder, name, suffixes):
    """The file FOLDER/NAME, or NAME with one of `suffixes` in lower or upper case; None if there is none.

    Raises UserError for a name that leads out of the folder.
    """
    relative = Path(name.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts:  # whatever is allowed: records are named by their place in it
        raise UserError(f"{name}: leads out of {folder}; give a path below it")
    if not relative.name:
        return None
    exact = folder / relative
    stem = exact.with_suffix("") if exact.suffix.lower() in suffixes else exact
    spelt = [spelt for suffix in suffixes for spelt in (suffix, suffix.upper(), suffix.title())]
    found = next(filter(os.path.isfile, (exact, *(stem.with_name(stem.name + suffix) for suffix in spelt))), None)
    if found is not None:
        outside.refuse(folder, [found.relative_to(folder)], name)
    return found


def find_images(rows, column, folder, suffixes):
    """`find_image` for the names in a column; a name that leads out of the folder is refused with its line."""
    found = []
    for row in rows:
        try:
            found.append(find_image(folder, row[column], suffixes))
        except UserError as error:
            raise UserError(f"{row.where}: {column} {error}") from None
    return found


def column_of_images(rows, columns, folder, suffixes):
    """That of `columns` of which most values in `rows` are images of the folder; None where none has any."""
    def is_image(name):
        try:
            return bool(name) and find_image(folder, name, suffixes) is not None
        except (UserError, OSError, ValueError):  # not every column holds names
            return False

    hits = {column: sum(is_image(row[column]) for row in rows) for column in columns}
    best = max(hits, key=hits.get, default=None)
    return best if hits.get(best) else None


def match_images(rows, images, table):
    """Rows and their images (None where missing) -> (row, image) of those that have one, remarks.

    Raises UserError if none has, and for an image that two rows name.
    """
    present = [(row, image) for row, image in zip(rows, images, strict=True) if image is not None]
    first_rows = {}
    for row, image in present:
        first = first_rows.setdefault(image, row)
        if first is not row:
            raise UserError(f"{row.where}: {image.name} is listed a second time, the first is {first.where}; keep one "
                            "row for each image")
    if rows and not present:
        raise UserError(f"{table.path}: none of its {len(rows)} images is there; check --input")
    missing = [row for row, image in zip(rows, images, strict=True) if image is None]
    first = f"{missing[0].where}" if missing else ""
    return present, [f"{len(missing)} of {len(rows)} rows of {table.path.name} have no image and were left out, the "
                     f"first is {first}"] * bool(missing)


def unlisted(folder_images, used, folder):
    """A sentence about image files that no row names, or none."""
    others = sorted(set(folder_images) - set(used))
    return [f"{len(others)} image(s) are in no table and were left out, the first is {file.relative_to(folder)}"
            for file in others[:1]]
