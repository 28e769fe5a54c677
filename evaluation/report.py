"""How evaluate.py shows its numbers as text; evaluation/page.py makes a page of them, for people.

Both are made from the dict that is written to results.json; nothing is computed here.
"""

from core.text import aligned, p_is
from evaluation.names import way_of, weights_in_words

NONE = "–"
SEEDS = {"training_seed": "training seed", "seed": "sampling seed"}  # what runs of a method may differ in, in words


def columns(report):
    """(heading, row -> text) for every column that some row has a value for."""
    shown = [("set", lambda row: row["name"]), ("images", lambda row: str(row["images"]))]
    for space in report["spaces"]:
        shown += _columns_of(space)
    shown += [("LPIPS", lambda row: _spread(row["lpips"])),
              (f"GG[{report['gg_space']}]", lambda row: _gap(row["gg"])),
              ("95 % interval of GG", lambda row: _gap_interval(row["gg"])),
              ("copies", lambda row: _copies(row["memorisation"])),
              ("AuthPct", lambda row: _authentic(row["memorisation"])),
              ("AUC of labels", lambda row: _auc(row["conditioning"]))]
    return [(head, text_of) for head, text_of in shown if any(text_of(row) != NONE for row in report["rows"])]


def _columns_of(space):
    """The columns that each feature space has."""
    return [(f"KID[{space}] ×1e-3", lambda row: _kid(row["kid"][space])),
            ("95 % interval of KID", lambda row: _interval(row["kid"][space]["interval"], 1e3)),
            (f"FID[{space}]", lambda row: number(row["fid"][space], 2)),
            ("precision, recall", lambda row: _two(row["fidelity"][space], "precision", "recall")),
            ("density, coverage", lambda row: _two(row["fidelity"][space], "density", "coverage"))]


def number(value, digits):
    """A number as text; the huge ones that copies lead to, with an exponent."""
    return NONE if value is None else f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.1e}"


def _kid(score):
    return f"{1e3 * score['mean']:.2f} ± {1e3 * score['std']:.2f}"


def _interval(bounds, scale):
    return NONE if bounds is None else " to ".join(number(scale * value, 1) for value in bounds)


def _two(scores, first, second):
    return f"{scores[first]:.2f}, {scores[second]:.2f}"


def _spread(score):
    return NONE if score is None else f"{score['mean']:.3f} ± {score['std']:.3f}"


def _gap(score):
    return NONE if score is None else number(score["gap"], 2)


def _gap_interval(score):
    return NONE if score is None else _interval(score["gap_interval"], 1)


def _copies(memorisation):
    """Share of samples that are near training images, what would be expected, and how many are exact copies."""
    if memorisation is None:
        return NONE
    near, exact = memorisation["close"], len(memorisation["exact_duplicates"]["copies"])
    return f"{100 * near['value']:.0f} % ({100 * near['expected']:.0f} %)" + (f", {exact} exact" if exact else "")


def _authentic(memorisation):
    return NONE if memorisation is None else number(memorisation["authentic_percent"], 1)


def _auc(conditioning):
    return NONE if conditioning is None else number(conditioning["macro"]["auc"], 3)


def text(report):
    """The table, how each set was made, and what several folders say together."""
    shown = columns(report)
    table = aligned([[head for head, _ in shown], *([text_of(row) for _, text_of in shown] for row in report["rows"])])
    return "\n".join([heading(report), table, *made(report), *remarks(report)])


def heading(report):
    data = report["data"]
    return (f"{data['root']}, fold {data['fold']}, {report['image_size']} pixels, seed {report['seed']}; against the "
            f"{data['validation_images']} images of val_{data['fold']}; KID over {report['subsets']} subsets")


def made(report):
    """One line for each generated set whose sampler says how it was made."""
    return [f"{row['name']}: {', '.join(filter(None, [way_of(row['about']), weights_in_words(row['about'])]))}; "
            f"{row['folder']}" for row in report["rows"] if row["about"]]


def remarks(report):
    """One line for each comparison of two folders and each group of folders that differ in their seed."""
    return [*map(paired, report["paired"]), *map(averaged, report["over_seeds"])]


def paired(pair):
    """A paired comparison in one line."""
    return (f"{pair['a']} against {pair['b']}: KID[{pair['space']}] differs by {1e3 * pair['difference']:.1f}e-3, 95 % "
            f"interval {_interval(pair['interval'], 1e3)}, {p_is(pair['p'])} ({pair['images']} pairs of one label)")


def averaged(group):
    """The scores of one method over its seeds, in one line."""
    values = ", ".join(f"{name}{' ×1e-3' * (scale > 1)} {scale * v['mean']:.4g} ± {scale * v['std']:.2g}"
                       for name, v in group["values"].items()
                       for scale in [1e3 if name.startswith("KID") else 1])
    return f"{group['name']}, {group['runs']} runs {differing(group)}: {values}"


def differing(group):
    """In what the runs of a method differ."""
    names = [SEEDS[name] for name in group["differ_in"]]
    return f"that differ in their {' and '.join(names) or 'seed'}"
