"""Tables as plain text."""


def aligned(rows, left=1):
    """m rows of n cells each -> m lines whose columns stand below each other, two spaces apart.

    The first `left` columns are flush left, the others flush right. Cells may be of any type; a line has no spaces
    at its end. Raises ValueError where the rows have different lengths.
    """
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{width}}" if i < left else f"{cell:>{width}}" for i, (cell, width) in
                               enumerate(zip(row, widths, strict=True))).rstrip() for row in rows)
