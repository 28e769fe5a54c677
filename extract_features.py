"""Encode the training images of one fold: data root -> latent cache.

    python extract_features.py --data-path data/oct --features-path store/oct --fold 0 --image-size 64 --vae retina
    torchrun --nproc_per_node=4 extract_features.py --data-path data/oct --features-path store/oct --fold 0

Writes FEATURES/features_{fold}/ (dataset/latents.py): posterior mean and std of each image and of its mirror
image, from any number of processes. The folder appears when it is complete; an extraction that was stopped goes on
where it was.
"""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from core import claims, locks, runtime
from core.cli import Parser, integer, run
from core.errors import UserError
from core.files import make_folder, remove_leftovers
from core.progress import progress_bar
from core.runtime import Interruption, by_first
from dataset import latents, outside
from dataset.images import check_images, load_images
from dataset.root import read_split
from dataset.vae import cells_per_side, open_codec
from presets import PAPER_SPACE, PAPER_TRAINING, presets_of


def main():
    args = parser().parse_args()
    split = read_split(args.data_path, f"train_{args.fold}", args.num_classes)
    process = runtime.start()
    if args.global_batch_size % process.num_processes:
        raise UserError(f"--global-batch-size {args.global_batch_size}: expected a multiple of the "
                        f"{process.num_processes} processes")
    codec = open_codec(args.vae, args.image_space, process.device)
    cells_per_side(args.image_size, codec)
    target = latents.folder(args.features_path, args.fold)
    manifest = latents.manifest_of(split, codec, args.image_size)
    if complete(target, manifest, args):
        return say(process, f"{target}: complete already, {len(split)} images")

    temporary = target.with_name(f".{target.name}.tmp")
    missing = still_missing(temporary, manifest)
    if len(missing) < len(split):
        say(process, f"{target}: continuing, {len(split) - len(missing)} of {len(split)} images are there")
    mine = missing[slice(*share(len(missing), process.process_index, process.num_processes))]
    check_images([split.paths[i] for i in mine], args.num_workers)
    process.wait_for_everyone()  # every process has looked before one of them writes
    by_first(process, lambda: begin(temporary, manifest))
    with Interruption() as interruption:
        encode(args, split, codec, mine, temporary, process, interruption)
    process.wait_for_everyone()
    if process.is_main_process:
        latents.write_manifest(temporary, manifest)
        (temporary / claims.FILE).unlink()
        os.replace(temporary, target)
    process.wait_for_everyone()
    say(process, f"{target}: {len(split)} images and their mirror images, VAE {codec.identity}")


def complete(target, manifest, args):
    """Whether these very latents are there, whole. Raises UserError for others, and for damaged ones."""
    stored = latents.read_manifest(target)
    if stored is not None and not latents.differences(stored, manifest):
        latents.load(args.features_path, args.fold)
        return True
    if target.exists():
        wrong = f"its {latents.differences(stored, manifest)[0]} differs" if stored else "it has no manifest.json"
        raise UserError(f"{target}: holds other features ({wrong}); remove it or give another path")
    return False


def still_missing(folder, manifest):
    """(m,) the images that an extraction that stopped has left to do: all of them where there is none, or another."""
    done = np.zeros(len(manifest["filenames"]), bool)
    if begun(folder, manifest):
        done = latents.finished(folder, len(done))
    return np.flatnonzero(~done)


def begun(folder, manifest):
    """Whether this very extraction has begun in a folder; that of other images or with another VAE does not count."""
    stored = claims.read_settings(folder)
    return stored is not None and not latents.differences(stored, manifest)


def begin(folder, manifest):
    """A folder for this extraction, no other job's from now on; what another one left there goes."""
    make_folder(folder.parent, "--features-path")
    locks.hold(folder.with_suffix(".lock"))  # beside the folder, which gets another name at the end
    if not begun(folder, manifest):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        claims.write_settings(folder, manifest)
    remove_leftovers(folder)
    latents.remove_damaged(folder)


def share(n, rank, processes):
    """First and last + 1 of the indices 0 … n − 1 that a process works on: contiguous, disjoint, complete."""
    return n * rank // processes, n * (rank + 1) // processes


def encode(args, split, codec, ids, folder, process, interruption):
    """Encode the images `ids` (n,), ascending, in batches; write a shard whenever one is full, or when asked to stop.

    Then this process ends.
    """
    batch = args.global_batch_size // process.num_processes
    with progress_bar(total=len(ids), unit="images", title="encoding", active=process.is_main_process) as bar:
        for run in np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1):  # images that follow each other
            for first in range(0, len(run), latents.SHARD):
                shard = run[first:first + latents.SHARD]
                parts = []
                for start in range(0, len(shard), batch):
                    parts.append(moments(codec, split, shard[start:start + batch], args))
                    bar.update(len(parts[-1][0]))
                    if interruption.asked:
                        break
                if parts:
                    mean, std = map(torch.cat, zip(*parts, strict=True))
                    labels = torch.tensor(split.labels[shard[:len(mean)]])
                    latents.write_shard(folder, int(shard[0]), mean, std, labels)
                if interruption.asked:
                    print("stopped; the same command continues")
                    sys.exit(interruption.exit_code)


def moments(codec, split, ids, args):
    """Mean and std of the latents of images `ids` and of their mirror images: (n, 2, C, h, w) each."""
    images = torch.as_tensor(load_images([split.paths[i] for i in ids], args.image_size, args.num_workers))
    both = [codec.moments(variant) for variant in (images, images.flip(2))]  # (n, H, W, 3): flip W
    mean, std = (torch.stack(values, 1).cpu() for values in zip(*both, strict=True))
    wrong = ~(mean.isfinite() & std.isfinite()).flatten(1).all(1)
    if wrong.any():
        raise UserError(f"{split.paths[ids[int(wrong.nonzero()[0])]]}: its latents are not finite; check the weights "
                        "of --vae")
    return mean, std


def say(process, text):
    if process.is_main_process:
        print(text)


def parser():
    p = Parser(__doc__, presets=presets_of("extract"))
    p.add_argument("--data-path", type=Path, required=True, metavar="ROOT", help="prepared data root")
    outside.add_flag(p)
    p.add_argument("--features-path", type=Path, required=True, metavar="DIR", help="where the cache goes")
    p.add_argument("--fold", type=integer(0), default=0, help="encode train_{fold}.csv")
    p.add_argument("--image-size", type=integer(8, 2048), help="side of the square crop, in pixels")
    p.add_argument("--vae", help="ema, mse (stabilityai/sd-vae-ft-*), retina or retina-2 (bundled) or a folder")
    p.add_argument("--image-space", action="store_true", help="no VAE: store pixels")
    p.add_argument("--global-batch-size", type=integer(1), default=PAPER_TRAINING["global_batch_size"],
                   help="images per step over all processes")
    p.add_argument("--num-classes", type=integer(1), help="labels expected in the CSV (default: what it has)")
    p.add_argument("--model", metavar="NAME", help="accepted as published and ignored: latents serve every model")
    p.add_argument("--num-workers", type=integer(1), default=4, help="threads per process that read images")
    p.add_argument("--global-seed", type=integer(0), default=0,
                   help="accepted as published; the moments need no draw")
    p.set_defaults(**PAPER_SPACE)
    return p


if __name__ == "__main__":
    run(main, runtime.stop)
