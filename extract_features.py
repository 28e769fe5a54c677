"""Encode the training images of one fold: data root -> latent cache.

    python extract_features.py --data-path data/oct --features-path store/oct --fold 0 --image-size 64 --vae retina
    torchrun --nproc_per_node=4 extract_features.py --data-path data/oct --features-path store/oct --fold 0

Writes FEATURES/features_{fold}/ (dataset/latents.py): posterior mean and std of each image and of its mirror
image, from any number of processes. The folder appears when it is complete.
"""

import os
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from core import runtime
from core.cli import Parser, integer, run
from core.errors import UserError
from dataset import latents
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
    stored = latents.read_manifest(target)
    if stored is not None and not latents.differences(stored, manifest):
        return say(process, f"{target}: complete already, {len(split)} images")
    if target.exists():
        wrong = f"its {latents.differences(stored, manifest)[0]} differs" if stored else "it has no manifest.json"
        raise UserError(f"{target}: holds other features ({wrong}); remove it or give another path")

    ids = range(*share(len(split), process.process_index, process.num_processes))
    check_images(split.paths[ids.start:ids.stop], args.num_workers)
    temporary = target.with_name(f".{target.name}.tmp")
    if process.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
        temporary.mkdir(parents=True)
    process.wait_for_everyone()
    encode(args, split, codec, ids, temporary, process)
    process.wait_for_everyone()
    if process.is_main_process:
        latents.write_manifest(temporary, manifest)
        os.replace(temporary, target)
    process.wait_for_everyone()
    say(process, f"{target}: {len(split)} images and their mirror images, VAE {codec.identity}")


def share(n, rank, processes):
    """First and last + 1 of the indices 0 … n − 1 that a process works on: contiguous, disjoint, complete."""
    return n * rank // processes, n * (rank + 1) // processes


def encode(args, split, codec, ids, folder, process):
    """Encode the images `ids` in batches and write them as this process's shard."""
    if not ids:
        return
    batch = args.global_batch_size // process.num_processes
    means, stds = [], []
    for start in tqdm(range(0, len(ids), batch), "encoding", unit="batch", disable=not process.is_main_process):
        part = ids[start:start + batch]
        images = load_images(split.paths[part.start:part.stop], args.image_size, args.num_workers)
        images = torch.as_tensor(images)
        moments = [codec.moments(variant) for variant in (images, images.flip(2))]  # (N, H, W, 3): flip W
        means.append(torch.stack([mean for mean, _ in moments], 1).cpu())
        stds.append(torch.stack([std for _, std in moments], 1).cpu())
    labels = torch.tensor(split.labels[ids.start:ids.stop])
    latents.write_shard(folder, process.process_index, ids.start, torch.cat(means), torch.cat(stds), labels)


def say(process, text):
    if process.is_main_process:
        print(text)


def parser():
    p = Parser(__doc__, presets=presets_of("extract"))
    p.add_argument("--data-path", type=Path, required=True, metavar="ROOT", help="prepared data root")
    p.add_argument("--features-path", type=Path, required=True, metavar="DIR", help="where the cache goes")
    p.add_argument("--fold", type=integer(0), default=0, help="encode train_{fold}.csv")
    p.add_argument("--image-size", type=integer(8, 2048), help="side of the square crop, in pixels")
    p.add_argument("--vae", help="ema, mse (stabilityai/sd-vae-ft-*), retina (bundled) or a folder")
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
