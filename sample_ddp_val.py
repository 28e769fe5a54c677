"""Sample images with the labels of the validation images of one fold, to be scored by evaluate.py.

    python sample_ddp_val.py --ckpt RUN/checkpoints/best_ckpt.pt --data-path data/oct --fold 0 --sample-dir synthetic
    torchrun --nproc_per_node=4 sample_ddp_val.py --ckpt RUN/checkpoints/best_ckpt.pt --data-path data/oct

Writes SAMPLE_DIR/{name}/gen_samples_val/%06d.png, val_syn_{fold}.csv, val_syn_{fold}.npy and grid.png. Its flags are
those of sample_ddp.py. Stopped, the same command continues: images that are there are kept.
"""

from core import runtime
from core.cli import run
from core.errors import UserError
from dataset.root import read_split
from sample_ddp import parser, sample


def main():
    args = parser(__doc__, "data root with val_{fold}.csv").parse_args()
    if args.data_path is None:
        raise UserError("--data-path: is missing; give the data root whose validation labels are asked for")
    sample(args, validation_labels, "gen_samples_val", f"val_syn_{args.fold}")


def validation_labels(args, label_names):
    """Labels (n, K) of the validation images and their names."""
    split = read_split(args.data_path, f"val_{args.fold}")
    return split.labels, split.label_names


if __name__ == "__main__":
    run(main, runtime.stop)
