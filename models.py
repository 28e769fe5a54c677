"""The denoisers. Every one is called as

    out, state = model(x, t, y, state=None, generator=None)

x (N, C, H, W) the noisy latent, t (N,) the original diffusion step 0..999, y (N, K) float multi-hot labels (the null
label is all zeros) -> out (N, 2C, H, W): noise prediction and variance interpolation. `state` is what a model
remembers between calls: GeCA's living cells; None for a model without memory.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
from diffusers import UNet2DModel
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from automaton import LocalRule, grow
from automaton.rule import modulate
from core.random import on_device, per_image


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


LABEL_TABLE = "y_embedder.embedding_table.0.weight"  # (D, K): in every model


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

    any_grid = True  # one rule for every cell: the same weights work on any H × W
    edges = ("cell_to_embedding", "final_layer.linear")  # first and last layer

    def __init__(self, input_size=32, num_classes=11, in_channels=4, *, width, mlp_width, hidden, steps=12,
                 position_code="published"):
        super().__init__(in_channels, 2 * in_channels + hidden, width, mlp_width, position_code)
        self.input_size, self.num_classes = input_size, num_classes
        self.out_channels, self.hidden, self.steps = 2 * in_channels, hidden, steps
        self.engine = "auto"  # of automaton/engines.py
        self.update_rate = 0.5  # probability that a cell fires, in training and at inference (geca.py:412-414)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self._initialise()

    def _initialise(self):
        """Xavier-uniform linears, zero biases; time MLP N(0, 0.02); modulation and last linear zero."""
        xavier_uniform(self)
        normal_time_embedder(self.t_embedder)
        zero(self.transformer.adaLN_modulation[1], self.final_layer.adaLN_modulation[1], self.final_layer.linear)

    @staticmethod
    def sizes(shapes):
        """What to build a GeCA with so that weights of these shapes fit; None if they are another model's."""
        if not {"cell_to_embedding.weight", "final_layer.linear.weight", LABEL_TABLE} <= shapes.keys():
            return None
        channels = shapes["cell_to_embedding.weight"][1] - shapes["final_layer.linear.weight"][0]  # cell − state
        return {"num_classes": shapes[LABEL_TABLE][1], "in_channels": channels}

    def forward(self, x, t, y, state=None, generator=None):
        n, _, h, w = x.shape
        if state is None:
            seed = on_device(self.draw_seed(n, generator), x.device).to(x.dtype)  # (N, 2C)
            state = self.initial_state(n, h, w, seed)  # (N, S, H, W), S = 2C + hidden
        fire = self.draw_fire(n, h * w, generator)  # (steps, N, H·W)
        if x.is_cuda:
            fire = fire.pin_memory()  # then the host need not wait while it is copied to the GPU
        state = grow(self, x, state, self.condition(t, y), fire, self.engine)  # (N, S, H, W)
        return state[:, : self.out_channels], state

    def condition(self, t, y):
        """t (N,), y (N, K) -> (N, D), the same at all steps of a call."""
        return self.t_embedder(t) + self.y_embedder(y)

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


class Memoryless(nn.Module):
    """What the baselines have in common: a fixed grid, no state, and one call that is compiled as a whole."""

    any_grid = False
    checkpoint_steps = False  # in training, compute each block again in backward instead of keeping it

    def compile_parts(self):
        """Fuse kernels with torch.compile."""
        self.forward = torch.compile(self.forward)


class DiTAttention(nn.Module):
    """Self-attention over all tokens, with biases; weight names of the published DiT."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        """(N, T, D) -> (N, T, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (N, heads, T, d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: shift, scale and gate of both halves come from the condition."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = DiTAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width), act=nn.GELU(approximate="tanh"), fc2=nn.Linear(4 * width, width)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        """x (N, T, D), c (N, D) -> (N, T, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiTFinalLayer(nn.Module):
    """From tokens to patches: (N, T, D) -> (N, T, patch² · out_channels)."""

    def __init__(self, width, values):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(Memoryless):
    """Diffusion transformer (Peebles & Xie, ICCV 2023), the paper's baseline, with GeCA's label embedder.

    Sees the latent as `patch` × `patch` tiles. It draws nothing: `state` and `generator` are there because every
    denoiser is called alike.
    """

    edges = ("x_embedder", "final_layer.linear")  # first and last layer

    def __init__(self, input_size=32, num_classes=11, in_channels=4, *, width, depth, heads, patch):
        super().__init__()
        if input_size % patch:
            raise ValueError(f"input_size {input_size}: expected a multiple of the patch size {patch}")
        self.input_size, self.num_classes, self.in_channels = input_size, num_classes, in_channels
        self.out_channels, self.patch = 2 * in_channels, patch
        self.x_embedder = nn.Module()  # published name of the weights: x_embedder.proj
        self.x_embedder.proj = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        # A parameter that is never trained, as published: it is in the checkpoints and in the paper's 32.7 M.
        self.pos_embed = nn.Parameter(position_table(input_size // patch, width)[None], requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock(width, heads) for _ in range(depth)])
        self.final_layer = DiTFinalLayer(width, patch * patch * self.out_channels)
        self._initialise()

    def _initialise(self):
        """Xavier-uniform linears, zero biases; time MLP N(0, 0.02); modulation and last linear zero."""
        xavier_uniform(self)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(len(self.x_embedder.proj.weight), -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        normal_time_embedder(self.t_embedder)
        zero(*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1],
             self.final_layer.linear)

    @staticmethod
    def sizes(shapes):
        """What to build a DiT with so that weights of these shapes fit; None if they are another model's."""
        if not {"pos_embed", "x_embedder.proj.weight", LABEL_TABLE} <= shapes.keys():
            return None
        _, channels, patch, _ = shapes["x_embedder.proj.weight"]
        return {"num_classes": shapes[LABEL_TABLE][1], "in_channels": channels,
                "input_size": patch * math.isqrt(shapes["pos_embed"][1])}

    def forward(self, x, t, y, state=None, generator=None):
        side = x.shape[-1] // self.patch  # T = side² tokens
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        again = self.checkpoint_steps and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, c, use_reentrant=False) if again else block(x, c)  # (N, T, D)
        x = self.final_layer(x, c)  # (N, T, patch · patch · 2C)
        x = x.unflatten(-1, (self.patch, self.patch, self.out_channels))  # (N, T, patch, patch, 2C)
        x = x.unflatten(1, (side, side))  # (N, side, side, patch, patch, 2C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3), None  # (N, 2C, H, W)


def position_table(side, width):
    """Fixed sine-cosine code of a square grid, row by row: (side², width).

    The first half of the places codes the column, the second the row; each half holds sines, then cosines, of the
    coordinate times 10000^(-4i/width).
    """
    rates = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * rates
    code = torch.cat([angle.sin(), angle.cos()], 1)  # (side, width / 2)
    column, row = code.expand(side, -1, -1), code[:, None].expand(-1, side, -1)
    return torch.cat([column, row], -1).flatten(0, 1).float()


class LDM(Memoryless):
    """A latent-diffusion UNet (Rombach et al., CVPR 2022), the paper's other baseline, on diffusers' UNet2DModel.

    The label embedding is added to the time embedding. What of it is a choice, and why, is in docs/FIDELITY.md: the
    paper gives 17.3 M parameters and no more.
    """

    edges = ("unet.conv_in", "unet.conv_out")  # first and last layer

    def __init__(self, input_size=32, num_classes=11, in_channels=4, *, widths, layers, attention):
        super().__init__()
        if input_size % 2 ** (len(widths) - 1):
            raise ValueError(f"input_size {input_size}: expected a multiple of {2 ** (len(widths) - 1)}")
        self.input_size, self.num_classes, self.in_channels = input_size, num_classes, in_channels
        self.out_channels = 2 * in_channels
        self.y_embedder = LabelEmbedder(num_classes, 4 * widths[0])
        self.unet = UNet2DModel(
            in_channels=in_channels, out_channels=self.out_channels, block_out_channels=widths,
            layers_per_block=layers, class_embed_type="identity", attention_head_dim=32,
            down_block_types=["AttnDownBlock2D" if here else "DownBlock2D" for here in attention],
            up_block_types=["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)])
        self.unet.conv_out.weight.data.zero_()  # predicts nothing at first, as the other models do
        self.unet.conv_out.bias.data.zero_()

    @staticmethod
    def sizes(shapes):
        """What to build an LDM with so that weights of these shapes fit; None if they are another model's."""
        if not {"unet.conv_in.weight", LABEL_TABLE} <= shapes.keys():
            return None
        return {"num_classes": shapes[LABEL_TABLE][1], "in_channels": shapes["unet.conv_in.weight"][1]}

    def forward(self, x, t, y, state=None, generator=None):
        if self.unet.is_gradient_checkpointing != self.checkpoint_steps:
            (self.unet.enable_gradient_checkpointing if self.checkpoint_steps
             else self.unet.disable_gradient_checkpointing)()
        return self.unet(x, t, class_labels=self.y_embedder(y)).sample, None  # (N, 2C, H, W)


def xavier_uniform(model):
    """Xavier-uniform linears with zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def normal_time_embedder(embedder):
    for layer in (embedder.mlp[0], embedder.mlp[2]):
        nn.init.normal_(layer.weight, std=0.02)


def zero(*linears):
    for linear in linears:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


@dataclass(frozen=True)
class Spec:
    """A row of MODELS: called with `input_size`, `num_classes` and `in_channels`, it builds the model.

    GeCA also takes a `position_code` (automaton/rule.py).
    """

    kind: type  # the class
    sizes: dict  # what distinguishes this model from others of its class

    def __call__(self, input_size=32, num_classes=11, in_channels=4, **more):
        return self.kind(input_size, num_classes, in_channels, **self.sizes, **more)

    @property
    def any_grid(self):
        """Do the same weights work on a grid of any size?"""
        return self.kind.any_grid

    def sizes_of(self, shapes):
        """What to call this row with so that weights of these shapes (name -> shape) fit; None if they never can."""
        return self.kind.sizes(shapes)


# Sizes of the paper and of the published code (models.py there); heads have 64 channels.
MODELS = {
    "GeCA-S": Spec(GeCA, {"width": 768, "mlp_width": 3072, "hidden": 64}),
    "GeCA-XS": Spec(GeCA, {"width": 384, "mlp_width": 64, "hidden": 32}),
}
# Sizes of the DiT paper (Table 1); a name without a patch size means patches of 2.
for size, (width, depth, heads) in {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16),
                                    "XL": (1152, 28, 16)}.items():
    for patch in (2, 4, 8):
        MODELS[f"DiT-{size}/{patch}"] = Spec(DiT, {"width": width, "depth": depth, "heads": heads, "patch": patch})
    MODELS[f"DiT-{size}"] = MODELS[f"DiT-{size}/2"]
# Never published: 17.2 M parameters by widths, residual blocks and attention of the smaller two of its three grids.
MODELS["LDM-B"] = Spec(LDM, {"widths": (128, 192, 192), "layers": 2, "attention": (False, True, True)})
