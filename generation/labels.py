"""Labels that images are asked for with: by name, between two kinds, or to top up the rare ones of a data set.

Labels are rows of K values: 1 where a label is asked for, 0 where it is not, and between them a soft label: the label
embedder is linear in them (models.py), so that 0.5 stands half-way. All zeros are the null label.
"""

import numpy as np

from core.errors import UserError

NULL = "null"


def values_of(asked, label_names, where):
    """Labels asked for by name -> float32 (K,), in the order of `label_names`.

    `asked`: "DR,FLD=0.5", "null", a list of such names, name -> value, or None for the null label. `where` names the
    request in errors. Raises UserError for a label that is not among the names, and for a value outside of [0, 1].
    """
    row = np.zeros(len(label_names), np.float32)
    for name, value in _pairs(asked, label_names, where):
        if name not in label_names:
            raise UserError(f"{where}: the model knows no {name!r}, it knows {' '.join(label_names)} (or {NULL})")
        row[label_names.index(name)] = value
    return row


def _pairs(asked, label_names, where):
    """(name, value) of everything that is asked for."""
    if asked is None or (isinstance(asked, str) and asked.strip() == NULL):
        return []
    if isinstance(asked, dict):
        return [(name, _value(value, where)) for name, value in asked.items()]
    parts = asked.split(",") if isinstance(asked, str) else asked
    return [_pair(str(part).strip(), label_names, where) for part in parts]


def _pair(text, label_names, where):
    """"DR" or "DR=0.5" -> (name, value); a label whose own name holds a = comes first."""
    name, equals, value = text.rpartition("=")
    return (text, 1.0) if text in label_names or not equals else (name.strip(), _value(value, where))


def _value(value, where):
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not 0 <= number <= 1:  # nan neither
        raise UserError(f"{where}: found the value {str(value)[:60]!r}, expected a number from 0 to 1")
    return number


def between(first, last, count):
    """`count` labels on the straight way from one (K,) to another, both ends among them -> float32 (count, K)."""
    share = np.linspace(0, 1, count, dtype=np.float32)[:, None]
    return (1 - share) * first + share * last


def top_up(labels, wanted):
    """Rows (m, K) to add to the labels (n, K), of 0 and 1, so that every label that occurs has `wanted` images.

    One row at a time for the label that has the fewest: a combination of labels as it occurs in the data, with that
    label in it. Combinations take turns, each as often as its share in the data. Where they bring more common labels
    with them, those get more than `wanted`.
    """
    combinations, occurrences = np.unique(labels, axis=0, return_counts=True)
    counts, used, added = labels.sum(0), np.zeros(len(combinations)), []
    while (lacking := (counts > 0) & (counts < wanted)).any():
        rarest = np.where(lacking, counts, np.inf).argmin()
        turn = np.where(combinations[:, rarest] == 1, (used + 1) / occurrences, np.inf).argmin()
        used[turn] += 1
        counts = counts + combinations[turn]
        added.append(combinations[turn])
    return np.array(added, np.float32).reshape(-1, labels.shape[1])
