"""Is it the one shared rule that limits GeCA-XS? Three rules of four steps each beside one rule of twelve.

    python scripts/study_weight_tying.py --data data/oct --output runs/learning

Trains both as the 720-step rows of scripts/study_learning.py (Muon at 4e-3), on the latents that it has extracted into
OUTPUT/latents, and prints held-out error and KID. Both cost the same arithmetic; one has three times the weights.
"""

import sys
from pathlib import Path

from accelerate import Accelerator
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from automaton import grow
from core.cli import Parser, integer, run
from core.random import on_device
from dataset import latents, outside
from dataset.root import read_split
from generation.sampling import SamplingOptions
from generation.training import Training, TrainingOptions
from scripts.study_learning import BATCH, SAMPLING_SEEDS, Options, Study

STEPS = 720
TIED, UNTIED = "GeCA-XS", "GeCA-XS, 3 rules"


class Untied(models.GeCA):
    """GeCA whose rule changes twice on the way: `more` holds the second and the third."""

    def __init__(self, *sizes, **more):
        super().__init__(*sizes, **more)
        self.more = nn.ModuleList(models.GeCA(*sizes, **more) for _ in range(2))
        for rule in self.more:
            del rule.t_embedder, rule.y_embedder

    def forward(self, x, t, y, state=None, generator=None):
        n, _, h, w = x.shape
        if state is None:
            state = self.initial_state(n, h, w, on_device(self.draw_seed(n, generator), x.device).to(x.dtype))
        c = self.t_embedder(t) + self.y_embedder(y)
        fire = self.draw_fire(n, h * w, generator).chunk(3)
        for rule, part in zip([self, *self.more], fire, strict=True):
            state = grow(rule, x, state, c, part, self.engine)
        return state[:, : self.out_channels], state


def main():
    p = Parser(__doc__)
    p.add_argument("--data", type=Path, required=True, metavar="ROOT", help="data root")
    outside.add_flag(p)
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of study_learning.py")
    p.add_argument("--fold", type=integer(0), default=0, help="train on train_{fold}, score against val_{fold}")
    p.add_argument("--only", choices=("tied", "untied"), help="one of the two")
    args = p.parse_args()
    models.MODELS[UNTIED] = models.Spec(Untied, models.MODELS[TIED].sizes)
    split, cache = read_split(args.data, f"train_{args.fold}"), latents.load(args.output / "latents", args.fold)
    study = Study(Options(args.data, args.output, args.fold, len(split)))
    options = TrainingOptions(
        batch=BATCH, epochs=STEPS // (len(split) // BATCH), optimizer="muon", lr=4e-3, lr_schedule="linear", warmup=50,
        adam_betas=(0.9, 0.999), clip_norm=1, min_snr=0, train_heredity=0, ema_decay=0.999, checkpoint_steps=False)
    for name in {"tied": [TIED], "untied": [UNTIED], None: [TIED, UNTIED]}[args.only]:
        training = Training(name, cache, list(split.label_names), options, Accelerator(cpu=True))
        while training.step < training.total_steps:
            training.train_step()
        error, bins = study.held_out_error(training.ema)
        kids = [study.score(training.ema, SamplingOptions(steps=25, sampler="ddim", seed=seed, batch_size=74))
                for seed in SAMPLING_SEEDS]
        print(f"{name}: {sum(q.numel() for q in training.ema.parameters()):,} parameters, held-out error {error:.4f} "
              f"({', '.join(f'{b:.4f}' for b in bins)}), KID {' '.join(f'{kid:.0f}e-3' for kid in kids)}", flush=True)


if __name__ == "__main__":
    run(main)
