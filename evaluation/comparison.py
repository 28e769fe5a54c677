"""What the rows of several sample folders say together: averages over seeds, and warnings."""

import math
import re
from dataclasses import asdict
from pathlib import Path

from metrics.uncertainty import images_needed, over_runs

PRECISE = 10  # a score is known well if its standard error is a tenth of its distance to the noise floor


def method_of(folder, about):
    """What made a sample folder: its name without the seed of sampling, and its settings but for seed and run."""
    settings = tuple(sorted((key, str(value)) for key, value in about.items() if key not in ("seed", "run")))
    return re.sub(r"-seed-\d+", "", Path(folder).name), settings


def same_method(a, b):
    """Do two sets of images differ in their seed alone?"""
    return method_of(a.folder, a.about) == method_of(b.folder, b.about)


def over_seeds(rows):
    """Folders that differ in the seed alone are one method: mean, standard deviation and interval of their scores."""
    groups = {}
    for row in rows:
        if row["kind"] == "generated":
            groups.setdefault(method_of(row["folder"], row["about"]), []).append(row)
    summaries = []
    for (name, _), members in groups.items():
        if len(members) > 1:
            values = {f"KID[{space}]": [row["kid"][space]["mean"] for row in members] for space in members[0]["kid"]}
            values |= {f"FID[{space}]": [row["fid"][space] for row in members] for space in members[0]["fid"]}
            values["GG"] = [row["gg"]["gap"] for row in members]
            if all(row["lpips"] for row in members):
                values["LPIPS"] = [row["lpips"]["mean"] for row in members]
            summaries.append({"name": name, "runs": len(members),
                              "values": {score: asdict(over_runs(v)) for score, v in values.items()}})
    return summaries


def few_images(rows, space, real):
    """Warnings of too few images to know the KIDs of these rows, as far above the noise floor (row 0) as they are.

    real: the number of real images.
    """
    floor, unknown, needed = rows[0]["kid"][space], [], []
    for row in rows[1:]:
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


def of_another_fold(generated, fold):
    """Warnings of generators that may have seen the validation images."""
    foreign = [images.name for images in generated if images.about.get("trained_on_fold", fold) != fold]
    return [f"{name}: its generator was trained on another fold, so it may have seen the images of val_{fold}; its "
            "scores flatter" for name in foreign]
