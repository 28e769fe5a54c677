"""What the rows of several sample folders say together: averages over seeds, and warnings."""

import math
import re
from dataclasses import asdict
from pathlib import Path

from dataset import leaks
from dataset.samples import seen_by
from evaluation.names import shared
from metrics.uncertainty import images_needed, over_runs

SEEDS = ("seed", "training_seed", "checkpoint", "seen_sha256")  # of `about`: what differs between runs of one method
TRAININGS = ("run", "weights_hash")  # and what two trainings cannot share
PRECISE = 10  # a score is known well if its standard error is a tenth of its distance to the noise floor


def method_of(folder, about):
    """What made a sample folder, but for its seeds: folders for which this is equal are runs of one method.

    Where the sampler says how the generator was trained, two trainings that differ in their seed alone are one method;
    where it does not, only samples of the very same weights are. Averaged and raw weights are two methods. Of a folder
    that says nothing, it is the name without the seed.
    """
    if not about:
        return re.sub(r"-seed-\d+", "", Path(folder).name)
    passed_over = SEEDS + (TRAININGS if about.get("training") else ())
    return tuple(sorted((key, str(value)) for key, value in about.items() if key not in passed_over))


def same_method(a, b):
    """Do two sets of images differ in their seeds alone?"""
    return method_of(a.folder, a.about) == method_of(b.folder, b.about)


def over_seeds(rows):
    """Folders that differ in the seed alone are one method: mean, standard deviation and interval of their scores."""
    groups = {}
    for row in rows:
        if row["kind"] == "generated":
            groups.setdefault(method_of(row["folder"], row["about"]), []).append(row)
    summaries = []
    for members in groups.values():
        if len(members) > 1:
            values = {f"KID[{space}]": [row["kid"][space]["mean"] for row in members] for space in members[0]["kid"]}
            values |= {f"FID[{space}]": [row["fid"][space] for row in members] for space in members[0]["fid"]}
            values["GG"] = [row["gg"]["gap"] for row in members]
            if all(row["lpips"] for row in members):
                values["LPIPS"] = [row["lpips"]["mean"] for row in members]
            summaries.append({"name": shared([row["name"] for row in members]), "runs": len(members),
                              "differ_in": [name for name in ("training_seed", "seed")
                                            if len({row["about"].get(name) for row in members}) > 1],
                              "values": {score: asdict(over_runs(v)) for score, v in values.items()}})
    return summaries


def few_images(rows, space, real):
    """Warnings of too few images to know the KIDs of these rows, as far above the noise floor as they are.

    real: the number of real images. Without a row of real images, the noise floor, nothing can be said.
    """
    floor = next((row["kid"][space] for row in rows if row["kind"] == "real"), None)
    unknown, needed = [], []
    for row in rows if floor else ():
        if row["kind"] == "real":
            continue
        score, images = row["kid"][space], min(row["images"], real)
        distance, error = score["mean"] - floor["mean"], score["standard_error"]
        if distance < 2 * math.hypot(error, floor["standard_error"]):
            unknown.append(row["name"])
        elif error > distance / PRECISE:
            needed.append(f"{row['name']} {images_needed(images, error, distance / PRECISE)}")
    warnings = []
    if unknown:
        warnings.append(f"KID[{space}] cannot be told from the noise floor: {'; '.join(unknown)}; only more images, or "
                        "another feature space, could tell")
    if needed:
        warnings.append(f"few images: to know how far KID[{space}] is above the noise floor to within a tenth, it "
                        f"takes about so many generated and as many real ones: {'; '.join(needed)}")
    return warnings


def leaks_of(sets, fold):
    """Sentences about sets that share images or patients, and generators that have, or may have, seen what they are
    scored against.
    """
    pairs = [(sets.training, sets.real), *([(sets.real, sets.floor)] if sets.floor else [])]
    lines = [line for a, b in pairs for line in leaks.shared(a, b)]
    for images in sets.generated:
        known = seen_by(images.folder)
        if known is not None:
            if count := leaks.seen(known, sets.real):
                lines.append(f"{images.name}: its generator was trained on {count} of the {len(sets.real)} real images "
                             "that it is scored against")
        elif images.about.get("trained_on_fold", fold) != fold:
            lines.append(f"{images.name}: its generator was trained on another fold, so it may have seen the images of "
                         f"val_{fold}")
    return [f"LEAK: {line}; scores flatter" for line in lines]


def leaks_of_classifier(classifier, sets):
    """Sentences about a classifier that judges samples and has learned from such, or from the validation images."""
    lines = []
    if classifier.synthetic:
        lines.append(f"it was trained with {classifier.synthetic} generated images (method {classifier.method})")
    if classifier.seen is None:
        lines.append("it does not say which images it was trained on")
    elif count := leaks.seen(classifier.seen, sets.real):
        lines.append(f"it was trained on {count} of the {len(sets.real)} validation images")
    return [f"LEAK: --classifier: {line}; AUC of labels flatters" for line in lines]
