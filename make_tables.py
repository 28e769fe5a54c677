"""Tables 1 and 2 of the paper from results.json files, the paper's numbers beside ours: Markdown, LaTeX and CSV.

    python make_tables.py results --output tables
    python make_tables.py reports/fold-0/results.json classify/GeCA-S/results.json --output tables
    python make_tables.py results --no-paper --output tables

Results are files of evaluate.py and classify.py, or folders that are searched for them. A cell is mean ± standard
deviation over the results of a method (folds, seeds); a score of Table 1 that there is once has its own spread.
Results that cannot stand in one table (other data, other images in the same fold, another image size or feature space,
another test set, other folds for other methods, classifiers trained in another way) are refused. Writes table1.* from
results of evaluate.py and table2.* from those of classify.py; in CSV each number has a column of its own, its spread
another one. Bold in Markdown and LaTeX: what shows the best number of its column, all of them where several do.
"""

from argparse import BooleanOptionalAction
from pathlib import Path

from core.cli import Parser, run
from core.files import make_folder, text_writer, write_together
from evaluation.results import read
from evaluation.table1 import table_1
from evaluation.table2 import table_2


def main():
    args = parser().parse_args()
    results = {"generation": [], "classification": []}
    for result in read(args.results):
        results[result["kind"]].append(result)
    tables = {}
    if results["generation"]:
        tables["table1"] = table_1(results["generation"], args.paper)
    if results["classification"]:
        tables["table2"] = table_2(results["classification"], args.level, args.threshold, args.paper)
    make_folder(args.output, "--output")
    texts = {f"{name}.{suffix}": content for name, table in tables.items() for suffix, content in
             (("md", table.markdown()), ("tex", table.latex()), ("csv", table.csv()))}
    write_together({args.output / name: text_writer(content) for name, content in texts.items()})
    for table in tables.values():
        print(table.markdown())
    print(f"{args.output}: " + ", ".join(f"{name}.md, .tex, .csv" for name in tables))


def parser():
    p = Parser(__doc__)
    p.add_argument("results", type=Path, nargs="+", metavar="RESULTS", help="results.json files, or folders with them")
    p.add_argument("--output", type=Path, default=Path("tables"), metavar="DIR", help="where the tables go")
    p.add_argument("--paper", action=BooleanOptionalAction, default=True, help="show the paper's numbers beside ours, "
                   "and its rows also where there is nothing of ours")
    g = p.add_argument_group("Table 2")
    g.add_argument("--level", choices=("auto", "image", "eye"), default="auto",
                   help="what is scored; auto: eyes, where all results know them, else images")
    g.add_argument("--threshold", choices=("0.5", "validation"), default="0.5", help="above which a label is there: as "
                   "in the paper, or chosen on the validation images")
    return p


if __name__ == "__main__":
    run(main)
