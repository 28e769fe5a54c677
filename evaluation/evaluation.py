"""The scores of sets of images in one place: which network sees which set, and what a row of results.json holds."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dataset import leaks
from dataset.images import load_image, load_images, pixel_hash
from evaluation.comparison import few_images, leaks_of, leaks_of_classifier, over_seeds, same_method
from evaluation.features import extract
from evaluation.lpips import distances, diversity
from metrics.classification import all_scores
from metrics.fid import fid
from metrics.fld import fld
from metrics.kid import SUBSETS, kid
from metrics.memorisation import exact_copies, memorisation
from metrics.prdc import prdc
from metrics.uncertainty import kid_interval, paired_difference, subsample_interval

CLOSEST = 16  # pairs of sample and training image in the picture
BOUND = 1e5  # of GG, FLD and likelihoods: exact copies of training images have no lowest GG
LABELLED = 10  # images of a label, real and generated, from which on its KID is measured
PAIRS = 4_000_000  # of training and generated images, up to which GG is fitted often enough for an interval


@dataclass(frozen=True)
class EvaluationSettings:
    """What a row depends on, beside the images and the networks."""

    fold: int
    image_size: int  # pixels
    seed: int = 0  # of all choices
    subset_size: int | None = None  # images per KID subset; None: a fourth of the generated images, as in the paper
    resamples: int = 1000  # half-samples for the interval of KID; a tenth of it for FID and GG
    batch_size: int = 32
    cache: Path | None = None  # folder that keeps features


class Evaluation:
    """Scores of generated sets against the real images of one fold; see evaluation/sets.py and networks.py."""

    def __init__(self, settings, networks, sets):
        self.settings, self.networks, self.sets = settings, networks, sets
        self.device = networks.devices[0]
        # A noise floor made of training images cannot say what GG and copies are without memorisation.
        self.held_out = sets.floor is None or {*sets.floor.paths}.isdisjoint(sets.training.paths)
        self.known_features = {}  # (space, name of the set) -> (n, D)
        self.fld_baseline = None  # of the real images alone: computed once, for all rows

    # ---- what networks see

    def features(self, space, images):
        """Features (n, D) of a set; each device takes one stretch of its files."""
        key = space, images.name
        if key not in self.known_features:
            copies, s = self.networks.spaces[space], self.settings
            stretches = [[str(path) for path in part] for part in np.array_split(images.paths, len(copies))]
            with ThreadPoolExecutor(len(copies)) as pool:
                parts = pool.map(lambda copy, paths: extract(copy, paths, s.image_size, s.batch_size,
                                                             f"{images.name} [{space}]", s.cache), copies, stretches)
                self.known_features[key] = np.concatenate(list(parts))
        return self.known_features[key]

    def probabilities(self, images):
        """What the classifier says of a set: (n, K). It sees real images as small as generated ones."""
        paths, size, step = images.paths, self.settings.image_size, self.settings.batch_size
        return np.concatenate([self.networks.classifier.scores(load_images(paths[i:i + step], size))
                               for i in range(0, len(paths), step)])

    @cached_property
    def training_hashes(self):
        return pixel_hashes(self.sets.training.paths, self.settings.image_size)

    # ---- a row

    def rows(self):
        """The noise floor, where there are images for it, then every generated set."""
        return [self.row(images) for images in (self.sets.floor, *self.sets.generated) if images]

    def row(self, images):
        """All scores of one set against the real images, as numbers, strings and dicts."""
        generated, networks = images is not self.sets.floor, self.networks
        row = {"name": images.name, "folder": str(images.folder), "kind": "generated" if generated else "real",
               "images": len(images), "sha256": images.digest, "about": images.about,
               "kid": {}, "fid": {}, "fid_interval": {}, "fidelity": {}, "gg": None, "lpips": None,
               "memorisation": None, "conditioning": None, "label_share": self.label_share(images),
               "kid_of_labels": self.kid_of_labels(images)}
        for space in networks.compared:
            real, made = self.features(space, self.sets.real), self.features(space, images)
            row["kid"][space] = self.kid(real, made)
            row["fid"][space] = fid(real, made)
            row["fid_interval"][space] = self.interval(fid, real, made)
            row["fidelity"][space] = asdict(prdc(real, made))
        if generated or self.held_out:
            row["gg"] = self.gap(images)
            row["memorisation"] = self.copies(images)
        if networks.lpips:
            row["lpips"] = self.diversity(images)
        if networks.classifier and images.labels is not None:
            row["conditioning"] = all_scores(self.probabilities(images), images.labels, self.sets.label_names)
        return row

    def label_share(self, images):
        """Label -> share of the images that have it."""
        if images.labels is None:
            return None
        return dict(zip(self.sets.label_names, images.labels.mean(0).tolist(), strict=True))

    def kid_of_labels(self, images):
        """Label -> KID of the images that have it against the real ones that do, in the first space; None if unknown.

        None for a label that fewer than LABELLED images of either set have.
        """
        if images.labels is None:
            return None
        space, scores = self.networks.compared[0], {}
        real, made = self.features(space, self.sets.real), self.features(space, images)
        for k, name in enumerate(self.sets.label_names):
            have, asked = (s.labels[:, k] > 0.5 for s in (self.sets.real, images))
            enough = min(have.sum(), asked.sum()) >= LABELLED
            scores[name] = {"images": int(asked.sum()), "real_images": int(have.sum()), "kid": kid_interval(
                real[have], made[asked], self.settings.resamples, self.settings.seed) if enough else None}
        return scores

    def kid(self, real, made):
        """KID over subsets, and the unbiased estimate from all images with its interval."""
        s = self.settings
        size = min(s.subset_size or len(made) // 4, len(real), len(made))
        mean, std = kid(real, made, size, SUBSETS, s.seed)
        return {"mean": mean, "std": std, "subset_size": size, **kid_interval(real, made, s.resamples, s.seed)}

    def interval(self, statistic, *sets):
        """95 % over the images of these sets; with a tenth of the half-samples of KID, as each costs a whole score."""
        draws = max(2, self.settings.resamples // 10)
        return subsample_interval(statistic, *sets, draws=draws, seed=self.settings.seed)["interval"]

    def gap(self, images):
        """GG and FLD; the interval of GG is over validation and generated images, for these training images."""
        train, test, made = self.train_test_made(images)
        seed, interval = self.settings.seed, None
        scores = fld(train, test, made, seed, self.device, self.fld_baseline)
        self.fld_baseline = scores.baseline
        if len(train) * len(made) <= PAIRS:  # the baseline has no part in GG
            interval = self.interval(lambda x, y: fld(train, x, y, seed, self.device, baseline=0.0).gap, test, made)
        bounded = {name: max(-BOUND, min(BOUND, value)) for name, value in asdict(scores).items()}
        return bounded | {"gap_interval": interval and [max(-BOUND, min(BOUND, value)) for value in interval]}

    def train_test_made(self, images):
        """Features in the space of GG: of the training images, the validation images, and this set."""
        return [self.features(self.networks.gg, s) for s in (self.sets.training, self.sets.real, images)]

    def copies(self, images):
        """Are the samples copies of training images? See metrics/memorisation.py."""
        scores = asdict(memorisation(*self.train_test_made(images), CLOSEST))
        for pair, value in zip(scores["closest"], self.lpips_of_pairs(scores["closest"], images), strict=True):
            pair["lpips"] = value
        hashes = pixel_hashes(images.paths, self.settings.image_size)
        return scores | {"exact_duplicates": {"copies": exact_copies(hashes, self.training_hashes)}}

    def lpips_of_pairs(self, pairs, images):
        """LPIPS of each pair of sample and training image; None where LPIPS is left out."""
        if not self.networks.lpips:
            return [None] * len(pairs)
        samples = [images.paths[pair["sample"]] for pair in pairs]
        originals = [self.sets.training.paths[pair["training"]] for pair in pairs]
        return distances(self.networks.lpips, samples, originals, self.settings.image_size,
                         self.settings.batch_size).tolist()

    def diversity(self, images):
        """LPIPS between samples: consecutive ones of a shuffled list, and pairs by label."""
        s = self.settings
        views = asdict(diversity(self.networks.lpips, images.paths, s.image_size, images.labels, s.seed, s.batch_size,
                                 progress=images.name))
        return views.pop("consecutive") | views

    # ---- everything together

    def report(self, rows):
        """results.json: the rows, what they were measured with, and what several folders say together."""
        sets, networks, s = self.sets, self.networks, self.settings
        root = sets.real.folder
        data = {"root": str(root), "name": root.resolve().name, "fold": s.fold,
                "validation_images": len(sets.real), "training_images": len(sets.training),
                "validation_sha256": sets.real.digest, "training_sha256": sets.training.digest,
                "labels": list(sets.label_names)}
        return {"kind": "generation", "format_version": 1, "data": data, "image_size": s.image_size,
                "seed": s.seed, "subsets": SUBSETS, "spaces": networks.compared, "gg_space": networks.gg,
                "networks": networks.about(), "rows": rows, "paired": self.paired(), "over_seeds": over_seeds(rows),
                "warnings": self.warnings(rows), "remarks": self.sets.remarks}

    def paired(self):
        """For every two methods on the same labels and with the same seed: the difference of their KID, a p-value."""
        comparisons = []
        for a, b in itertools.combinations(self.sets.generated, 2):
            same_labels = a.labels is not None and np.array_equal(a.labels, b.labels)
            if same_method(a, b) or a.about.get("seed") != b.about.get("seed") or not same_labels:
                continue
            for space in self.networks.compared:
                found = paired_difference(*(self.features(space, s) for s in (self.sets.real, a, b)))
                comparisons.append({"a": a.name, "b": b.name, "space": space, "images": len(a),
                                    "difference": found.value, "p": found.p, "interval": [found.low, found.high]})
        return comparisons

    def warnings(self, rows):
        """What a reader should doubt."""
        lines = [line for space in self.networks.compared for line in few_images(rows, space, len(self.sets.real))]
        if self.sets.without_floor:
            lines.append(self.sets.without_floor)
        if not self.held_out:
            lines.append(f"{self.sets.real.folder}: has no test.csv; the noise floor is made of training images, so GG "
                         "and copies have none")
        lines += leaks.unknown_patients(self.sets.real)
        if self.networks.classifier:
            lines += leaks_of_classifier(self.networks.classifier, self.sets)
        return leaks_of(self.sets, self.settings.fold) + lines


def pixel_hashes(paths, image_size, workers=4):
    """SHA-256 of the pixels of each image file, as this program sees it: cropped to image_size, 8-bit RGB."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda path: pixel_hash(load_image(path, image_size)), paths))
