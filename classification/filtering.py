"""Which generated images to train with: those that look, to a classifier of real images, like what was asked for.

Two numbers for each image, of a classifier that was trained on the real training images of the same fold alone: the
log-likelihood of its labels, and the distance of its features from those of the nearest real training image. How far
both may go is read off the validation images, which that classifier has not been trained on either: a generated image
is left out where it is worse than all but a share of them. (On training images a classifier is surer of itself than
on any other.) Nearness is no sign of quality below that: copies of training images stay; evaluate.py counts those.
"""

from dataclasses import dataclass

import numpy as np

from classification import network as classifiers
from classification.batches import ImageStore
from classification.report import fold_folder
from core.errors import UserError
from dataset import leaks
from metrics.blocks import blocks
from metrics.memorisation import nearest

TINY = 1e-7  # smallest probability, so that one label cannot decide alone


@dataclass(frozen=True)
class Limits:
    """What a generated image must reach: log-likelihood per label (nats) at least, distance (of features) at most."""

    likelihood: float
    distance: float


def label_likelihood(scores, labels):
    """Mean log-likelihood per label, in nats: probabilities (n, K), labels (n, K) from 0 to 1 -> (n,)."""
    scores = np.clip(np.asarray(scores, np.float64), TINY, 1 - TINY)
    return (labels * np.log(scores) + (1 - labels) * np.log(1 - scores)).mean(1)


def limits(likelihood, distance, quantile):
    """What all but a share `quantile` of the validation images, (n,) and (n,), reach in each of the two."""
    return Limits(float(np.quantile(likelihood, quantile)), float(np.quantile(distance, 1 - quantile)))


def classifier_file(results, fold):
    """The network of a fold in an output folder of classify.py. Raises UserError."""
    file = fold_folder(results, fold) / "checkpoints" / "best_ckpt.pt"
    if not file.is_file():
        raise UserError(f"--filter {results}: holds no {file.relative_to(results)}, expected the output of classify.py "
                        f"on real images; run it with --fold {fold} first")
    return file


def open_filter(file, fold, device):
    """The classifier in a file, if it may judge the images of this fold. Raises UserError."""
    classifier = classifiers.load_classifier(file, device, "--filter")
    if classifier.label_names != fold.label_names:
        raise UserError(f"--filter {file}: knows the labels {' '.join(classifier.label_names)}, expected "
                        f"{' '.join(fold.label_names)}; train it on the same data and labels")
    if classifier.synthetic:
        raise UserError(f"--filter {file}: was trained with {classifier.synthetic} generated images, expected real "
                        "ones alone; give the output of a run without --synthetic")
    if classifier.seen is None:
        raise UserError(f"--filter {file}: does not say which images it was trained on; train it anew with classify.py")
    for split in (fold.validation, fold.test):
        if count := leaks.seen(classifier.seen, split):
            raise UserError(f"--filter {file}: was trained on {count} of the {len(split)} images of {split.csv.name}, "
                            f"expected none; give a run on fold {fold.number}")
    return classifier


def sift(classifier, fold, quantile, batch):
    """Judge all generated images of a fold -> (indices that are kept, for each of its pools; a report for JSON)."""
    def judged(images, labels):
        store, features, scores = ImageStore(images.paths, classifier.image_size, 0), [], []
        for rows in blocks(len(images), batch):
            part = store.stack(range(len(images))[rows])
            features.append(classifier.features(part))
            scores.append(classifier.scores(part))
        return np.concatenate(features), label_likelihood(np.concatenate(scores), labels)

    real = fold.training.take(range(fold.real))
    training = judged(real, real.labels)[0]
    features, likelihood = judged(fold.validation, fold.validation.labels)
    bounds = limits(likelihood, nearest(features, training)[1], quantile)
    kept, report = [], []
    for source, (split, labels) in zip(fold.synthetic, fold.pools, strict=True):
        features, likelihood = judged(split, labels)
        likely, near = likelihood >= bounds.likelihood, nearest(features, training)[1] <= bounds.distance
        kept.append(np.flatnonzero(likely & near).tolist())
        report.append({"folder": source.folder.name, "images": len(split), "kept": len(kept[-1]),
                       "unlikely": int((~likely).sum()), "far": int((~near).sum()),
                       "kept_of_label": {name: [int(labels[kept[-1], k].sum()), int(labels[:, k].sum())]
                                         for k, name in enumerate(fold.label_names)}})
    return kept, {"classifier": classifier.identity, "quantile": quantile, "likelihood_at_least": bounds.likelihood,
                  "distance_at_most": bounds.distance, "folders": report}


def sentence(report):
    """A report of `sift` as a line of the log."""
    images, kept, unlikely, far = (sum(folder[key] for folder in report["folders"])
                                   for key in ("images", "kept", "unlikely", "far"))
    return (f"filter: {kept} of {images} generated images kept ({kept / images:.0%}); {unlikely} do not show their "
            f"labels, {far} are far from every training image, as seen by {report['classifier']}")
