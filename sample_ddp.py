"""Sample images with the labels of the training images of one fold, times --expand-ratio, to train with.

    python sample_ddp.py --ckpt RUN/checkpoints/best_ckpt.pt --data-path store/oct --fold 0 --expand-ratio 5
    torchrun --nproc_per_node=4 sample_ddp.py --ckpt RUN/checkpoints/best_ckpt.pt --data-path store/oct --fold 0

`--data-path` is a latent cache (as published) or a data root. Writes SAMPLE_DIR/{name}/gen_samples/%06d.png,
train_syn_{fold}.csv and train_syn_{fold}.npy.
"""

from core import runtime
from core.cli import run
from dataset import latents
from dataset.root import read_split
from generation import sampling


def labels_of(args, checkpoint):
    if (args.data_path / f"train_{args.fold}.csv").is_file():
        split = read_split(args.data_path, f"train_{args.fold}")
        return split.labels, split.label_names
    cache = latents.load(args.data_path, args.fold)
    found = cache.labels.shape[1]
    names = cache.manifest.get("label_names") or checkpoint["label_names"]  # the published layouts name none
    if names is None or len(names) != found:
        names = [f"label_{k}" for k in range(found)]
    return cache.labels.numpy(), names


def main():
    args = sampling.parser(__doc__, "latent cache or data root with the labels of the fold").parse_args()
    sampling.run(args, labels_of, "gen_samples", "train_syn")


if __name__ == "__main__":
    run(main, runtime.stop)
