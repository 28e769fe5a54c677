"""What a data root holds, for people and for programs: report.json, report.txt, report.png."""

from collections import Counter

import matplotlib
import numpy as np

from core.files import write_json, write_text
from core.text import aligned
from dataset.patients import across, conflicts, duplicates, same_name

matplotlib.use("Agg")  # no screen needed

SHOWN = 5  # examples of a kind in report.txt


def facts(stored, splits, collection):
    """Stored images, {split: (n,) bool} and their Collection -> dict of plain values: the content of report.json."""
    known = stored.patients != ""
    counts = {name: _counts(stored.take(chosen), collection.labels) for name, chosen in
              {**splits, "total": np.ones(len(stored), bool)}.items()}
    per_patient = Counter(Counter(stored.patients[known].tolist()).values())
    sizes = Counter(f"{w}x{h}" for w, h in stored.sizes.tolist())
    same = duplicates(stored.digests)
    return {"counts": counts, "patients_known": int(known.sum()),
            "images_per_patient": dict(sorted(per_patient.items())),
            "sizes": dict(sizes.most_common(20)), "different_sizes": len(sizes),
            "identical_pictures": [_names(stored, group) for group in same],
            "identical_with_different_labels": [_names(stored, group) for group in
                                                conflicts(stored.digests, stored.labels)],
            "across_published_split": _across_published(stored),
            "stated": stated(collection.stated, counts["total"]), "remarks": list(collection.remarks),
            "linked": int(stored.linked.sum())}


def _counts(stored, label_names):
    """Images, patients, images and patients per label, unlabelled images."""
    known = stored.patients != ""
    per_label = {name: {"images": int(stored.labels[:, k].sum()),
                        "patients": len(set(stored.patients[known & (stored.labels[:, k] > 0)]))}
                 for k, name in enumerate(label_names)}
    return {"images": len(stored), "patients": len(set(stored.patients[known])), "labels": per_label,
            "unlabelled": int((stored.labels.sum(1) == 0).sum())}


def _names(stored, indices):
    return [str(stored.filenames[i]) for i in indices]


def _across_published(stored):
    """Patients, and pictures, that the authors' split has on two sides: {"train and test": {"patients": n, …}}."""
    inside, found = stored.splits != "", {}
    keys = {"patients": np.array([same_name(p) for p in stored.patients]), "pictures": stored.digests}
    for kind, values in keys.items():
        chosen = inside & (values != "")
        for (a, b), both in across(values[chosen], stored.splits[chosen]).items():
            found.setdefault(f"{a} and {b}", {})[kind] = len(both)
    return found


def stated(numbers, total):
    """The authors' counts beside ours -> {what: [stated, found]}."""
    own = {"images": total["images"], "patients": total["patients"],
           **{name: count["images"] for name, count in total["labels"].items()}}
    return {name: [value, own.get(name, 0)] for name, value in numbers.items()}


def sentences(report):
    """What a reader should know beside the table, in sentences."""
    counts = report["counts"]["total"]
    yield from report["remarks"]
    if report["patients_known"] < counts["images"]:
        unknown = counts["images"] - report["patients_known"]
        yield (f"{unknown} of {counts['images']} images have no patient: each counts as a patient of its own, and "
               "nothing can say whether one patient is on two sides of a split")
    for what, (theirs, ours) in report["stated"].items():
        if theirs != ours:
            yield f"{what}: the authors state {theirs:,}, found {ours:,}"
    if same := report["identical_pictures"]:
        yield f"{len(same)} sets of pictures are the same to the pixel: {_some(same)}"
    if same := report["identical_with_different_labels"]:
        yield f"{len(same)} of them have different labels: {_some(same)}"
    for sides, found in report["across_published_split"].items():
        yield (f"the published split has {' and '.join(f'{n} {kind}' for kind, n in found.items())} in {sides}; "
               "--resplit joins them")


def _some(groups):
    shown = "; ".join(" = ".join(group) for group in groups[:SHOWN])
    return shown + (f"; … ({len(groups) - SHOWN} more in report.json)" if len(groups) > SHOWN else "")


def table(report):
    """Images per label (rows) and split (columns), then patients, as text."""
    splits = report["counts"]
    rows = [["", *splits]]
    rows += [[name, *(s["labels"][name]["images"] for s in splits.values())] for name in splits["total"]["labels"]]
    rows += [[title, *(s[key] for s in splits.values())]
             for title, key in (("no label", "unlabelled"), ("images", "images"), ("patients", "patients"))]
    return aligned(rows, left=0)


def write(report, root):
    """Write report.json, report.txt and report.png into the data root."""
    write_json(root / "report.json", report)
    lines = [table(report), *(f"- {sentence}" for sentence in sentences(report))]
    write_text(root / "report.txt", "\n".join(lines) + "\n")
    plot(report, root / "report.png")


def plot(report, file):
    """Images per label and split, images per patient, sizes."""
    from matplotlib import pyplot as plt  # slow to import, and wanted here only

    figure, (labels, patients, sizes) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained",
                                                     gridspec_kw={"width_ratios": [2, 1, 1]})
    counts = report["counts"]
    sides = [name for name in ("train_0", "val_0", "test") if name in counts]
    names = [*counts["total"]["labels"], "no label"]
    places = np.arange(len(names))
    for i, side in enumerate(sides):
        heights = [value["images"] for value in counts[side]["labels"].values()] + [counts[side]["unlabelled"]]
        bars = labels.bar(places + (i - 1) * 0.27, heights, 0.27, label=f"{side}: {counts[side]['images']} images")
        labels.bar_label(bars, fontsize=6)
    labels.set(title="images per label", yscale="symlog")
    labels.set_xticks(places, names, rotation=60 if len(names) > 8 else 0, fontsize=8)
    labels.legend(fontsize=8)
    per_patient = report["images_per_patient"]
    patients.bar([str(n) for n in per_patient], list(per_patient.values()))
    patients.set(title="patients by number of images" if per_patient else "patients: unknown")
    common = list(report["sizes"].items())[:8]
    sizes.barh([size for size, _ in common], [count for _, count in common])
    sizes.invert_yaxis()
    sizes.set(title=f"images by size ({report['different_sizes']} sizes)")
    figure.savefig(file, dpi=80)
    plt.close(figure)
