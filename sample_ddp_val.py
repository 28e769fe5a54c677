"""Sample images with the labels of the validation images of one fold, to be scored by evaluate.py.

    python sample_ddp_val.py --ckpt RUN --data-path data/oct --sample-dir synthetic
    torchrun --nproc_per_node=4 sample_ddp_val.py --ckpt RUN/checkpoints/best_ckpt.pt --data-path data/oct

Writes SAMPLE_DIR/{name}/gen_samples_val/%06d.png, val_syn_{fold}.csv, val_syn_{fold}.npy and grid.png. Its flags are
those of sample_ddp.py. Stopped, the same command continues: images that are there are kept.
"""

import numpy as np

from core import runtime
from core.cli import run
from core.errors import UserError
from dataset.root import read_split
from sample_ddp import Request, parser, sample


def main():
    args = parser(__doc__, "data root with val_{fold}.csv").parse_args()
    if args.data_path is None:
        raise UserError("--data-path: is missing; give the data root whose validation labels are asked for")
    sample(args, requested)


def requested(args, checkpoint):
    """The Request for images with the labels of the validation images, times --expand-ratio."""
    split = read_split(args.data_path, f"val_{args.fold}")
    return Request(np.tile(split.labels, (args.expand_ratio, 1)), split.label_names, "gen_samples_val",
                   f"val_syn_{args.fold}")


if __name__ == "__main__":
    run(main, runtime.stop)
