"""The denoisers. Every one is called as

    out, state = model(x, t, y, state=None, generator=None)

x (N, C, H, W) the noisy latent, t (N,) the original diffusion step 0..999, y (N, K) float multi-hot labels (the null
label is all zeros) -> out (N, 2C, H, W): noise prediction and variance interpolation. `state` is what a model
remembers between calls: GeCA's living cells; None for a model without memory.
"""

import math
from functools import partial

import torch
from torch import nn

from automaton import LocalRule
from automaton.rule import xavier_zero
from pipeline.seeds import per_image


class TimeEmbedder(nn.Module):
    """Diffusion step -> vector: 256 sinusoids, then Linear -> SiLU -> Linear."""

    def __init__(self, width, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        """t (N,) -> (N, D). First the cosines, then the sines, of t·10000^(-i/128)."""
        half = self.frequencies // 2
        rates = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
        angle = t[:, None].float() * rates
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Multi-hot labels (N, K) -> (N, D): two linear layers with nothing between, as published."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Sequential(nn.Linear(num_classes, width), nn.Linear(width, width))

    def forward(self, y):
        return self.embedding_table(y)


class GeCA(LocalRule):
    """Generative Cellular Automata (Elbatel et al., MICCAI 2024, Sec. 2).

    A cell holds C input channels, 2C output channels and `hidden` ones; each call grows the output from a single
    living cell (or from what the previous call left) in `steps` steps of one local rule.

    `generator` is a list of N CPU generators, one per image: which cells fire is a function of the image alone,
    not of its place in a batch. It is not needed where nothing is drawn: `update_rate` 0 or 1 and a given state.
    """

    def __init__(self, input_size=32, num_classes=11, in_channels=4, *, width, mlp_width, hidden, steps=12):
        super().__init__(in_channels, 2 * in_channels + hidden, width, mlp_width)
        self.input_size, self.num_classes = input_size, num_classes
        self.out_channels, self.hidden, self.steps = 2 * in_channels, hidden, steps
        self.update_rate = 0.5  # probability that a cell fires, in training and at inference (geca.py:412-414)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        xavier_zero(self)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x, t, y, state=None, generator=None):
        n, _, h, w = x.shape
        if state is None:
            state = self.initial_state(n, h, w, self.draw_seed(n, generator).to(x.device))
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        state = self.grow(x, state, c, self.draw_fire(n, h * w, generator))
        return state[:, : self.out_channels], state

    def draw_seed(self, n, generator):
        """Output channels of the centre cell, N(0, 1): (n, 2C)."""
        self._need(generator, n, "the seed cell")
        return per_image(torch.randn, (self.out_channels,), generator)

    def draw_fire(self, n, cells, generator):
        """Which cells fire at each step: (steps, n, cells) bool."""
        if self.update_rate in (0, 1):
            return torch.full((self.steps, n, cells), bool(self.update_rate))
        self._need(generator, n, "which cells fire")
        return (per_image(torch.rand, (self.steps, cells), generator) < self.update_rate).transpose(0, 1)

    @staticmethod
    def _need(generator, n, what):
        if generator is None or len(generator) != n:
            found = "none" if generator is None else len(generator)
            raise ValueError(f"to draw {what}, give one generator per image ({n}); found {found}")

    def initial_state(self, n, h, w, seed_noise):
        """A dead grid with one living cell: seed_noise (n, 2C) in the output channels of (h // 2, w // 2).

        Returns (n, 2C + hidden, h, w).
        """
        state = seed_noise.new_zeros(n, self.out_channels + self.hidden, h, w)
        state[:, : self.out_channels, h // 2, w // 2] = seed_noise
        return state

    def inherit(self, state, seed_noise):
        """Gene heredity: the hidden channels live on in the next denoising step, the output grows anew.

        state (n, 2C + hidden, h, w) of the previous step -> the state that the next one starts from. Published
        `forward_with_cfg` (geca.py:499-509) does this in guided sampling only; we always do.
        """
        fresh = self.initial_state(*state.shape[:1], *state.shape[2:], seed_noise)
        return torch.cat([fresh[:, : self.out_channels], state[:, self.out_channels:]], 1)


# Sizes of the paper and of the published code (models.py there); heads have 64 channels.
MODELS = {
    "GeCA-S": partial(GeCA, width=768, mlp_width=3072, hidden=64),
    "GeCA-XS": partial(GeCA, width=384, mlp_width=64, hidden=32),
}
