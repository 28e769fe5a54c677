"""The optimisers of train.py: AdamW, as published, or Muon."""

import torch
from timm.optim.muon import Muon

from models import LABEL_TABLE

OPTIMISERS = ("adamw", "muon")
MOMENTUM = 0.95  # of Muon, as in its authors' runs


def make_optimiser(net, name, lr, betas, edges):
    """`name` of OPTIMISERS -> torch.optim.Optimizer without weight decay; `betas` are AdamW's two decays.

    Muon (Jordan et al. 2024) replaces the update of a weight matrix by the nearest semi-orthogonal one, scaled to the
    size that AdamW's updates have (Liu et al. 2025, eq. 4), so that learning rates of the two can be compared.
    Convolutions are matrices with a row per output channel. Vectors, the label table and the first and last layer
    (names that start with one of `edges`) are NAdamW's: Muon's authors advise an Adam there, timm takes the one with
    Nesterov's momentum.
    """
    if name == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=lr, betas=betas, weight_decay=0)
    parameters = [(key, p) for key, p in net.named_parameters() if p.requires_grad]
    edges = (*edges, LABEL_TABLE)
    matrices = [p for key, p in parameters if p.ndim > 1 and not key.startswith(edges)]
    others = [p for key, p in parameters if p.ndim == 1 or key.startswith(edges)]
    return Muon([{"params": matrices}, {"params": others, "use_fallback": True}], lr=lr, betas=betas, weight_decay=0,
                momentum=MOMENTUM, nesterov=True, adjust_lr_fn="match_rms_adamw", conv_mode="flatten")
