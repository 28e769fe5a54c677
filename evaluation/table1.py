"""Table 1, quality of generated images: results of evaluate.py beside the paper's numbers."""

from core.errors import UserError
from evaluation import paper
from evaluation.names import way_of
from evaluation.results import agree, agree_in_folds, agree_per_fold, listed
from evaluation.tables import Cell, Table, in_order, mark_best, over

SCORES = ("KID ↓", "LPIPS ↑", "GG")


def table_1(results, with_paper=True):
    """Results of evaluate.py -> Table: parameters, KID, LPIPS and GG, for each data set that results are of.

    with_paper: the paper's numbers beside ours, and its methods also where nothing of ours is. Raises UserError for
    results that cannot stand in one table.
    """
    agree(results, "image size", lambda r: r["image_size"])
    agree(results, "feature space of GG", lambda r: _identity(r, r["gg_space"]))
    agree(results, "feature space of KID", lambda r: _identity(r, r["spaces"][0]))
    agree(results, "number of KID subsets", lambda r: r["subsets"])
    rows = {name: rows_of(name, results) for name in sorted({r["data"]["name"] for r in results})}
    methods = {method for rows_of_data in rows.values() for method in rows_of_data}
    methods = in_order(methods | {*paper.PARAMETERS} if with_paper else methods, paper.PARAMETERS)
    published = paper.TABLE_1 if with_paper else {}
    space, gg_space = results[0]["spaces"][0], results[0]["gg_space"]
    heads = ["Method", "Params (M)", *(f"paper, {data}: {score}" for data in published for score in SCORES),
             *(f"{name}: {score}" for name in rows for score in (f"KID[{space}] ↓", "LPIPS ↑", f"GG[{gg_space}]"))]
    body = [[method, _parameters(method, rows), *_paper_cells(published, method),
             *(cell for rows_of_data in rows.values() for cell in _our_cells(rows_of_data.get(method, [])))]
            for method in methods]
    for column, head in enumerate(heads):
        if "KID" in head or "LPIPS" in head:
            body = mark_best(body, column, min if "KID" in head else max)
    return Table("Table 1. Image generation", heads, body, _notes(results, rows, with_paper), "tab:generation")


def _identity(result, space):
    return result["networks"][space]["identity"]


def rows_of(name, results):
    """Method -> its generated rows on this data set, each with its fold and KID space; checked to be comparable."""
    on_data = [r for r in results if r["data"]["name"] == name]
    agree(on_data, "label names", lambda r: r["data"]["labels"])
    for part in ("validation", "training"):
        agree_per_fold([(r["path"], r["data"]["fold"], r["data"][f"{part}_sha256"]) for r in on_data],
                       f"the {part} images")
    rows = {}
    for r in on_data:
        for row in r["rows"]:
            if row["kind"] == "generated":
                known = rows.setdefault(row["about"].get("model") or row["name"], [])
                if row["sha256"] not in [other["sha256"] for other in known]:  # the same images count once
                    known.append({**row, "fold": r["data"]["fold"], "space": r["spaces"][0]})
    for method, known in rows.items():
        ways = {way_of(row["about"]): row["folder"] for row in known}
        if len(ways) > 1:
            raise UserError(f"{method} is sampled in {len(ways)} ways: " + " and ".join(
                f"{way} ({folder})" for way, folder in ways.items()) + "; give results of one of them")
    agree_in_folds({method: [row["fold"] for row in known] for method, known in rows.items()}, f"results on {name}")
    return rows


def _parameters(method, rows):
    counts = {row["about"]["parameters"] for rows_of_data in rows.values() for row in rows_of_data.get(method, [])
              if "parameters" in row["about"]}
    return Cell(counts.pop() / 1e6 if len(counts) == 1 else paper.PARAMETERS.get(method), digits=1)


def _paper_cells(published, method):
    for scores in published.values():
        row = scores.get(method)
        for key in ("kid", "lpips", "gg"):
            yield Cell(*row[key]) if row else "–"


def _our_cells(rows):
    kid = [row["kid"][row["space"]] for row in rows]
    lpips = [row["lpips"] for row in rows if row["lpips"]]
    return (over([k["mean"] for k in kid], kid[0]["std"] if kid else None, 1e3),
            over([v["mean"] for v in lpips], lpips[0]["std"] if lpips else None),
            over([row["gg"]["gap"] for row in rows if row["gg"]]))


def _notes(results, rows, with_paper):
    notes = [f"Paper: {paper.SOURCE}, Table 1; KID × 1e-3 on Inception features, GG on DINOv2 features, its own "
             "Fundus and OCT data at 256 pixels."] * with_paper
    space = results[0]["spaces"][0]
    if space != "inception":
        notes.append(f"Our KID × 1e-3 is measured in the space {space}: its numbers must not be compared with the "
                     "paper's.")
    elif not with_paper:
        notes.append("KID × 1e-3.")
    for name, rows_of_data in rows.items():
        counts = "; ".join(_images_of(method, rows_of_data[method])
                           for method in in_order(rows_of_data, paper.PARAMETERS))
        floors = ", ".join(_noise_floors(name, results, space)) or "not known, there were too few test images"
        notes.append(f"{name}, {results[0]['image_size']} pixels: {counts}. Noise floor, real against real: KID "
                     f"{floors}.")
    notes += dict.fromkeys(line for r in results for line in r.get("warnings", ()) if line.startswith("LEAK"))
    notes.append("Several runs: mean ± standard deviation over them. One run: KID ± standard deviation over its "
                 f"{results[0]['subsets']} subsets, LPIPS ± standard deviation over pairs.")
    return notes


def _images_of(method, rows):
    """How many images of a method were scored, and which."""
    seeds = listed(str(row["about"].get("seed", "?")) for row in rows)
    return (f"{method}: {sum(row['images'] for row in rows)} images ({way_of(rows[0]['about'])}), folds "
            f"{listed(row['fold'] for row in rows)}, sampling seeds {seeds}")


def _noise_floors(name, results, space):
    """The KIDs of real against real images, as texts, each once."""
    floors = [f"{1e3 * row['kid'][space]['mean']:.1f}" for r in results if r["data"]["name"] == name
              for row in r["rows"] if row["kind"] == "real"]
    return dict.fromkeys(floors)
