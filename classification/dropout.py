"""Dropout that is a function of an image's place in the batch, whichever process computes it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core.errors import UserError

BERNOULLI, NATIVE_DROPOUT = torch.ops.aten.bernoulli_.float, torch.ops.aten.native_dropout.default


class DropoutByImage(TorchDispatchMode):
    """Within it, what a network drops of the i-th image is drawn by the i-th generator, layer by layer.

    Dropout and stochastic depth alike: torch draws their masks by one of two operations (dropout on a GPU by the
    second). The first dimension of a mask is that of the images, or of some rows of each, such as windows of attention;
    raises UserError for others. Not reached: dropout inside a fused attention kernel of a GPU. `drew` says whether
    there was anything to draw.
    """

    def __init__(self, generators):
        super().__init__()
        self.generators, self.drew = generators, False

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is BERNOULLI:
            mask, kept = (*arguments, 0.5)[:2]  # torch leaves out what is the default
            return mask.copy_(self.draw(mask.shape, kept))
        if function is NATIVE_DROPOUT:
            x, dropped, _ = arguments
            mask = self.draw(x.shape, 1 - dropped).to(x.device)
            return x * mask / (1 - dropped), mask
        return function(*arguments, **(options or {}))

    def draw(self, shape, kept):
        """A mask, bool, true with probability `kept`, on the CPU."""
        self.drew = True
        rows, rest = divmod(shape[0], len(self.generators))
        if rest:
            raise UserError(f"--backbone: drops parts of tensors of {shape[0]} rows for {len(self.generators)} images, "
                            "expected the same number of rows for each image; give another backbone")
        return torch.cat([torch.rand(rows, *shape[1:], generator=g) for g in self.generators]) < kept
