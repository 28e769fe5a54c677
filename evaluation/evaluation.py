"""The scores of sets of images in one place: which network sees which set, and what a row of results.json holds."""

import itertools
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from classification.network import load_classifier
from core.errors import UserError
from dataset.images import load_images
from evaluation.features import PUBLISHED, extract, open_features
from metrics import classification, memorisation
from metrics import uncertainty as trust
from metrics.fid import fid
from metrics.fld import fld
from metrics.kid import SUBSETS, kid
from metrics.lpips import check_image_size, diversity, open_lpips
from metrics.prdc import prdc

PRECISE = 10  # a score is known well if its standard error is a tenth of its distance to the noise floor
CLOSEST = 16  # pairs of sample and training image in the picture
PAIRS = 4_000_000  # of training and generated images, up to which GG is fitted often enough for an interval
CANDIDATES = 3  # training images per sample that are compared by LPIPS


class Networks:
    """Everything that looks at images, opened before any slow work: feature spaces, LPIPS, a classifier."""

    def __init__(self, args, devices, label_names):
        names = args.features or ["inception"]
        gg = args.gg_extractor or ("dino" if args.features is None else names[0])
        self.devices, self.spaces = devices, {}  # name -> copies, one per device
        self.compared = [self._open(name, devices, "--features") for name in names]
        if len(set(self.compared)) < len(self.compared):
            twice = next(name for name in self.compared if self.compared.count(name) > 1)
            raise UserError(f"--features: two spaces are called {twice}; remove or rename one")
        self.gg = self._open(PUBLISHED.get(gg, gg), devices, "--gg-extractor")
        self.lpips, self.classifier = None, None
        if args.lpips != "none":
            file = _weights_of(args.lpips)
            check_image_size(args.image_size)
            self.lpips = open_lpips(devices[0], file)
        if args.classifier:
            self.classifier = load_classifier(args.classifier, devices[0])
            if self.classifier.label_names != tuple(label_names):
                raise UserError(f"--classifier {args.classifier}: knows {' '.join(self.classifier.label_names)}, "
                                f"expected the labels of --real: {' '.join(label_names)}")

    def _open(self, name, devices, flag):
        try:
            copies = [open_features(name, device) for device in devices]
        except UserError as error:
            raise UserError(str(error).replace("--features", flag)) from None
        known = self.spaces.setdefault(copies[0].name, copies)
        if known[0].identity != copies[0].identity:
            raise UserError(f"{flag} {name}: another network is called {copies[0].name} too; rename one of the files")
        return copies[0].name

    def about(self):
        """Name -> identity and preprocessing, for results.json."""
        found = {name: {"identity": copies[0].identity, "preprocessing": copies[0].preprocessing}
                 for name, copies in self.spaces.items()}
        if self.lpips:
            found["lpips"] = {"identity": self.lpips.identity, "preprocessing": "values in [-1, 1]"}
        if self.classifier:
            found["classifier"] = {"identity": self.classifier.identity,
                                   "preprocessing": f"central crop to {self.classifier.image_size} pixels"}
        return found


def _weights_of(text):
    """`alex` or `alex=FILE` -> the file, or None."""
    net, equals, file = text.partition("=")
    if net != "alex" or (equals and not file):
        raise UserError(f"--lpips {text}: expected alex, alex=FILE or none")
    return file or None


class Evaluation:
    """Scores of generated sets against the real images of one fold."""

    def __init__(self, args, networks, real, training, floor, label_names):
        self.args, self.networks, self.label_names = args, networks, label_names
        self.real, self.training, self.floor = real, training, floor
        self.held_out = {*floor.paths}.isdisjoint(training.paths)  # else it cannot serve for copies
        self.device = networks.devices[0]
        self.baseline, self.real_gaps = None, None  # of the real images alone: computed once, for all rows
        self.known = {}  # (space, name of the set) -> features
        self.hashes, self.closest = {}, {}  # name of the set -> hashes of its pixels; its pairs nearest to training

    # ---- what networks see

    def features(self, space, images):
        """Features (n, D) of a set; each device takes one stretch of its files."""
        key = space, images.name
        if key not in self.known:
            copies, args = self.networks.spaces[space], self.args
            stretches = [[str(p) for p in part] for part in np.array_split(images.paths, len(copies))]
            with ThreadPoolExecutor(len(copies)) as pool:
                parts = pool.map(lambda f, paths: extract(f, paths, args.image_size, args.batch_size,
                                                          f"{images.name} [{space}]", args.cache.expanduser()),
                                 copies, stretches)
                self.known[key] = np.concatenate(list(parts))
        return self.known[key]

    def probabilities(self, images):
        """What the classifier says of a set: (n, K)."""
        paths, size = images.paths, self.args.image_size  # real images as small as generated ones
        parts = [self.networks.classifier.scores(load_images(paths[i:i + self.args.batch_size], size))
                 for i in range(0, len(paths), self.args.batch_size)]
        return np.concatenate(parts)

    # ---- a row

    def row(self, images):
        """All scores of one set against the real images, as numbers, strings and dicts."""
        generated = images is not self.floor
        subset = self.args.subset_size or len(images) // 4  # ⌊n/4⌋ as in the paper
        found = {"name": images.name, "folder": str(images.folder), "kind": "generated" if generated else "real",
                 "images": len(images), "sha256": images.digest, "about": images.about,
                 "kid": {}, "fid": {}, "fid_interval": {}, "fidelity": {}, "gg": None, "lpips": None,
                 "memorisation": None, "conditioning": None, "label_share": self.label_share(images)}
        for space in self.networks.compared:
            x, y = self.features(space, self.real), self.features(space, images)
            found["kid"][space] = self.kid(x, y, min(subset, len(x), len(y)))
            found["fid"][space] = fid(x, y)
            found["fid_interval"][space] = self.interval(fid, x, y)
            found["fidelity"][space] = asdict(prdc(x, y))
        if generated or self.held_out:
            found["gg"] = self.gap(images)
            found["memorisation"] = self.copies(images)
        if self.networks.lpips:
            found["lpips"] = self.lpips(images)
        if self.networks.classifier and images.labels is not None:
            found["conditioning"] = self.conditioning(images)
        return found

    def label_share(self, images):
        if images.labels is None:
            return None
        return dict(zip(self.label_names, images.labels.mean(0).tolist(), strict=True))

    def kid(self, x, y, subset):
        mean, std = kid(x, y, subset, SUBSETS, self.args.global_seed)
        return {"mean": mean, "std": std, "subset_size": subset,
                **trust.kid_interval(x, y, self.args.resamples, self.args.global_seed)}

    def interval(self, statistic, *sets):
        """95 % over the images of these sets; with a tenth of the half-samples of KID, as each costs a whole score."""
        draws, seed = max(2, self.args.resamples // 10), self.args.global_seed
        return trust.bootstrap(statistic, *sets, draws=draws, seed=seed)["interval"]

    def gap(self, images):
        """GG and FLD; the interval of GG is over validation and generated images, for these training images."""
        train, test, made = (self.features(self.networks.gg, s) for s in (self.training, self.real, images))
        seed, interval = self.args.global_seed, None
        found = fld(train, test, made, seed, self.device, self.baseline)
        self.baseline = found.baseline
        if len(train) * len(made) <= PAIRS:
            interval = self.interval(lambda x, y: fld(train, x, y, seed, self.device, 0.0).gap, test, made)
        return asdict(found) | {"gap": found.gap, "fld": found.fld, "gap_interval": interval}

    def copies(self, images):
        """Are the samples copies of training images? And of each other?"""
        train, test, made = (self.features(self.networks.gg, s) for s in (self.training, self.real, images))
        found = memorisation.memorisation(train, test, made, CLOSEST, self.args.global_seed)
        if self.networks.lpips:
            closest = memorisation.with_lpips(found.closest, self.networks.lpips, images.paths, self.training.paths,
                                              self.args.image_size, self.args.batch_size)
            found = replace(found, closest=closest)
        self.closest[images.name] = found.closest
        pixels = (self.pixels(s) for s in (images, self.training))
        return asdict(found) | {"exact_duplicates": asdict(memorisation.exact_duplicates(*pixels)),
                                "close_by_lpips": self.close_by_lpips(images, train, test, made)}

    def close_by_lpips(self, images, train, test, made):
        """`close` with LPIPS as the distance, to the nearest of a few candidates that the feature space proposes."""
        if not self.networks.lpips:
            return None
        if self.real_gaps is None:
            self.real_gaps = self.lpips_gaps(self.real, train, test)
        return asdict(memorisation.close_share(self.lpips_gaps(images, train, made), self.real_gaps))

    def lpips_gaps(self, images, train, features):
        """LPIPS of each image of a set to its nearest training image (n,)."""
        candidates, _ = memorisation.nearest(features, train, CANDIDATES)
        _, gaps = memorisation.nearest_by_lpips(self.networks.lpips, images.paths, self.training.paths, candidates,
                                                self.args.image_size, self.args.batch_size, f"{images.name}, copies")
        return gaps

    def pixels(self, images):
        """Hashes of the decoded pixels of a set."""
        if images.name not in self.hashes:
            self.hashes[images.name] = memorisation.pixel_hashes(images.paths, self.args.image_size)
        return self.hashes[images.name]

    def lpips(self, images):
        found = diversity(self.networks.lpips, images.paths, self.args.image_size, images.labels,
                          seed=self.args.global_seed, batch_size=self.args.batch_size, progress=images.name)
        views = {name: spread and asdict(spread) for name, spread in vars(found).items()}  # None: no such pair
        return views["consecutive"] and {**views.pop("consecutive"), **views}

    def conditioning(self, images):
        """Does the classifier see the labels that were asked for? Beside it in the table: the labels of real images."""
        return classification.all_scores(self.probabilities(images), images.labels, self.label_names)

    # ---- everything together

    def report(self, rows, generated):
        """results.json: the rows, what they were measured with, and what several folders say together."""
        data = {"root": str(self.args.real), "name": self.args.real.resolve().name, "fold": self.args.fold,
                "validation_images": len(self.real), "training_images": len(self.training),
                "validation_sha256": self.real.digest, "training_sha256": self.training.digest,
                "labels": list(self.label_names)}
        return {"kind": "generation", "format_version": 1, "data": data, "image_size": self.args.image_size,
                "seed": self.args.global_seed, "subsets": SUBSETS, "spaces": self.networks.compared,
                "gg_space": self.networks.gg, "networks": self.networks.about(), "rows": rows,
                "paired": self.paired(generated), "over_seeds": over_seeds(rows),
                "warnings": self.warnings(rows, generated)}

    def paired(self, generated):
        """For every two methods on the same labels and with the same seed: the difference of their KID, a p-value."""
        found = []
        for a, b in itertools.combinations(generated, 2):
            alike = method(a.folder, a.about) == method(b.folder, b.about) or a.about.get("seed") != b.about.get("seed")
            if alike or a.labels is None or not np.array_equal(a.labels, b.labels):
                continue
            for space in self.networks.compared:
                difference, p = trust.paired_difference(*(self.features(space, s) for s in (self.real, a, b)))
                found.append({"a": a.name, "b": b.name, "space": space, "images": len(a),
                              "difference": difference, "p": p})
        return found

    def warnings(self, rows, generated):
        """What a reader should doubt."""
        foreign = [s.name for s in generated if s.about.get("trained_on_fold", self.args.fold) != self.args.fold]
        found = [line for space in self.networks.compared for line in few(rows, space, len(self.real))]
        if not self.held_out:
            found.append(f"{self.args.real}: has no test.csv; the noise floor is made of training images, so GG and "
                         "copies have none")
        return found + [f"{name}: its generator was trained on another fold, so it may have seen the images of "
                        f"val_{self.args.fold}; its scores flatter" for name in foreign]

    def closest_pairs(self, images):
        """Picture: the samples nearest to a training image, each below it."""
        return memorisation.picture(self.closest[images.name], images.paths, self.training.paths,
                                    self.args.image_size)


def few(rows, space, real):
    """Warnings of too few images to know the KIDs of these rows, as far above the noise floor as they are."""
    floor, unknown, needed = rows[0]["kid"][space], [], []
    for row in rows[1:]:
        score, images = row["kid"][space], min(row["images"], real)
        distance, error = score["mean"] - floor["mean"], score["standard_error"]
        if distance < 2 * math.hypot(error, floor["standard_error"]):
            unknown.append(row["name"])
        elif error > distance / PRECISE:
            needed.append(f"{row['name']} {trust.images_needed(images, error, distance / PRECISE)}")
    found = [f"KID[{space}] cannot be told from the noise floor: {'; '.join(unknown)}; only more images, or another "
             "feature space, could tell"] if unknown else []
    return found + ([f"few images: to know how far KID[{space}] is above the noise floor to within a tenth, it takes "
                     f"about so many generated and as many real ones: {'; '.join(needed)}"] if needed else [])


def method(folder, about):
    """What made a sample folder: its name without the seed of sampling, and what it says but for seed and run."""
    said = tuple(sorted((key, str(value)) for key, value in about.items() if key not in ("seed", "run")))
    return re.sub(r"-seed-\d+", "", Path(folder).name), said


def over_seeds(rows):
    """Folders whose names differ in the seed alone are one method: mean and deviation of their scores."""
    groups = {}
    for row in rows:
        if row["kind"] == "generated":
            groups.setdefault(method(row["folder"], row["about"]), []).append(row)
    found = []
    for (name, _), members in groups.items():
        if len(members) > 1:
            values = {f"KID[{space}]": [r["kid"][space]["mean"] for r in members] for space in members[0]["kid"]}
            values |= {f"FID[{space}]": [r["fid"][space] for r in members] for space in members[0]["fid"]}
            values["GG"] = [r["gg"]["gap"] for r in members]
            if all(r["lpips"] for r in members):
                values["LPIPS"] = [r["lpips"]["mean"] for r in members]
            found.append({"name": name, "runs": len(members),
                          "values": {key: asdict(trust.over_runs(v)) for key, v in values.items()}})
    return found
