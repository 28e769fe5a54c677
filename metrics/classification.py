"""Scores of a multi-label classifier, for each label and averaged over the labels: the columns of the paper's Table 2.

At a threshold: Sen = TP / (TP + FN), Spe = TN / (TN + FP), their harmonic mean F1(sen/spe) (0 where both are 0),
ordinary F1. Over all thresholds: area under the ROC curve, average precision (averaged over labels: mAP).
A label of which a set has no positive or no negative image cannot be scored there: all its scores are None, and it is
left out of the averages, which say over how many labels they run.
"""

import numpy as np
from sklearn.metrics import average_precision_score, f1_score, recall_score, roc_auc_score, roc_curve

from core.errors import UserError

SCORES = ("sen", "spe", "auc", "f1", "f1_sen_spe", "ap")
THRESHOLD = 0.5  # a probability from here on means that the label is there, as in the paper


def label_scores(scores, labels, threshold=THRESHOLD):
    """One label: probabilities (n,) and truth (n,) of 0/1 -> SCORES, and how many images have it and have not."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels).astype(int)
    counts = {"positives": int(labels.sum()), "negatives": int((1 - labels).sum())}
    if not all(counts.values()):
        return counts | dict.fromkeys(SCORES)
    predicted = (scores >= threshold).astype(int)
    sen, spe = recall_score(labels, predicted), recall_score(labels, predicted, pos_label=0)
    return counts | {"sen": float(sen), "spe": float(spe), "auc": float(roc_auc_score(labels, scores)),
                     "f1": float(f1_score(labels, predicted, zero_division=0)),
                     "f1_sen_spe": float(harmonic_mean(sen, spe)),
                     "ap": float(average_precision_score(labels, scores))}


def harmonic_mean(a, b):
    """2ab / (a + b), element by element; 0 where both are 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    total = a + b
    return np.where(total == 0, 0.0, 2 * a * b / np.where(total == 0, 1, total))


def all_scores(scores, labels, label_names, thresholds=None):
    """Probabilities (n, K), truth (n, K) -> {"labels": {name: scores}, "macro": their means}.

    `thresholds`: one for each label, None = THRESHOLD. "macro" has `labels`, the number of labels averaged; where
    that is 0 the means are None.
    """
    thresholds = thresholds or [None] * len(label_names)
    rows = {name: label_scores(scores[:, k], labels[:, k], THRESHOLD if t is None else t)
            for k, (name, t) in enumerate(zip(label_names, thresholds, strict=True))}
    defined = [row for row in rows.values() if row["ap"] is not None]
    macro = {key: float(np.mean([row[key] for row in defined])) if defined else None for key in SCORES}
    return {"labels": rows, "macro": macro | {"labels": len(defined)}}


def choose_thresholds(scores, labels):
    """The threshold of each label that maximises F1(sen/spe) on these (validation) images: K numbers.

    Half-way between two neighbouring scores; of several best ones that nearest to 0.5. None for a label that has no
    positive or no negative image, or where every threshold gives 0.
    """
    return [_best_threshold(np.asarray(scores[:, k], np.float64), np.asarray(labels[:, k]))
            for k in range(np.shape(labels)[1])]


def _best_threshold(scores, labels):
    if len(np.unique(labels)) < 2:
        return None
    fpr, tpr, values = roc_curve(labels, scores, drop_intermediate=False)  # values: inf, then the scores, descending
    reached = harmonic_mean(tpr, 1 - fpr)
    if reached.max() == 0:  # all scores are equal, or every negative image scores above every positive one
        return None
    between = np.append((values[:-1] + values[1:]) / 2, values[-1])
    best = between[reached == reached.max()]  # neither inf nor the lowest score: there one of the two is 0
    return float(best[np.argmin(abs(best - THRESHOLD))])


def eyes(scores, labels, eye_ids):
    """From images to eyes: (n, K), (n, K), n names -> (m, K), (m, K), m names in order of their first image.

    An eye has the highest score of its images (as in the same group's classifier, FDDM), and each label that one of
    them has.
    """
    if len(eye_ids) != len(scores):
        raise UserError(f"{len(eye_ids)} names of eyes, expected one for each of {len(scores)} images")
    names = list(dict.fromkeys(eye_ids))
    places = {name: i for i, name in enumerate(names)}
    owner = np.array([places[name] for name in eye_ids])  # (n,): the eye of each image
    highest = [np.full((len(names), array.shape[1]), -np.inf) for array in (scores, labels)]
    for maximum, array in zip(highest, (scores, labels), strict=True):
        np.maximum.at(maximum, owner, array)
    return *highest, names
