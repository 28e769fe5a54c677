"""Sample images with the labels of the validation images of one fold, to be scored by evaluate.py.

    python sample_ddp_val.py --ckpt RUN/checkpoints/best_ckpt.pt --data-path data/oct --fold 0 --sample-dir synthetic
    torchrun --nproc_per_node=4 sample_ddp_val.py --ckpt RUN/checkpoints/best_ckpt.pt --data-path data/oct

Writes SAMPLE_DIR/{name}/gen_samples_val/%06d.png, val_syn_{fold}.csv and val_syn_{fold}.npy.
"""

from core import runtime
from core.cli import run
from dataset.root import read_split
from generation import sampling


def labels_of(args, checkpoint):
    split = read_split(args.data_path, f"val_{args.fold}")
    return split.labels, split.label_names


def main():
    args = sampling.parser(__doc__, "data root with val_{fold}.csv").parse_args()
    sampling.run(args, labels_of, "gen_samples_val", "val_syn")


if __name__ == "__main__":
    run(main, runtime.stop)
