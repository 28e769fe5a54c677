"""Who is who: names of patients that were written in different ways, and pictures that several patients share."""

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components


def same_name(name):
    """A patient's name as it is compared: without blanks around, in lower case; whole numbers by value.

    `7`, `7.0`, `007` and ` 7` are one patient.
    """
    name = str(name).strip().casefold()
    try:
        number = float(name)
    except ValueError:
        return name
    return str(int(number)) if number.is_integer() else name


def join_identical(patients, digests):
    """Patients and hashes of pixels (n,) -> (n,): one name, their first, for all patients that share a picture.

    Public collections hold the same picture under several patients; one of them in the training set and another in the
    test set would be a leak.
    """
    names, patient = np.unique(patients, return_inverse=True)
    _, picture = np.unique(digests, return_inverse=True)
    both = coo_matrix((np.ones(len(patient)), (patient, picture + patient.max() + 1)),
                      shape=(patient.max() + picture.max() + 2,) * 2)
    together = connected_components(both, directed=False)[1][:len(names)]
    return names[np.unique(together, return_index=True)[1][together]][patient]


def duplicates(digests):
    """Lists of indices of images that are the same to the pixel."""
    found = {}
    for i, digest in enumerate(digests):
        found.setdefault(digest, []).append(i)
    return [same for same in found.values() if len(same) > 1]


def conflicts(digests, labels):
    """Those of `duplicates` whose labels (n, K) differ."""
    return [same for same in duplicates(digests) if len({tuple(labels[i]) for i in same}) > 1]


def across(keys, sides):
    """Keys (n,) and names of sides (n,) -> {(side, side): keys that are on both}, the keys in order of appearance."""
    where = {}
    for key, side in zip(keys, sides, strict=True):
        where.setdefault(key, {})[side] = None
    pairs = {}
    for key, found in where.items():
        names = sorted(found)
        for i, a in enumerate(names):
            for b in names[i + 1:]:
                pairs.setdefault((a, b), []).append(key)
    return pairs
