"""Batch normalisation over the batches of all processes, so that two processes train as one does."""

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise(net, device):
    """Make every batch norm of `net` use the whole batch: on GPUs with torch's kernels, else (they have none) ours."""
    from timm.layers import convert_sync_batchnorm  # here, as everywhere: it takes seconds

    if torch.device(device).type == "cuda":
        return convert_sync_batchnorm(net)
    for name, child in net.named_children():
        setattr(net, name, BatchNorm(child) if isinstance(child, _BatchNorm) else synchronise(child, device))
    return net


class BatchNorm(nn.Module):
    """Takes the place, the weights and the names of a batch norm, timm's with an activation included."""

    def __init__(self, norm):
        super().__init__()
        self.eps, self.momentum = norm.eps, norm.momentum
        self.weight, self.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.drop, self.act = getattr(norm, "drop", nn.Identity()), getattr(norm, "act", nn.Identity())
        self.train(norm.training)

    def forward(self, x):
        """x (n, C, ...) -> the same shape."""
        if not self.training:
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
            return self.act(self.drop(x))
        dims, shape = [d for d in range(x.ndim) if d != 1], [1, -1] + [1] * (x.ndim - 2)
        count = total(torch.full((1,), x.numel() / x.shape[1], device=x.device))
        mean = total(x.float().sum(dims)) / count  # (C,)
        centred = x.float() - mean.view(shape)  # in a second step: the squares of large values would cancel
        var = total(centred.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, rate)
            self.running_var.lerp_(var * count / (count - 1), rate)
        scale = (var + self.eps).rsqrt() * (1 if self.weight is None else self.weight)
        x = (centred * scale.view(shape) + (0 if self.bias is None else self.bias.view(shape))).to(x.dtype)
        return self.act(self.drop(x))


def total(x):
    """The sum of `x` over all processes; gradients are summed likewise."""
    return _Total.apply(x) if distributed.is_initialized() else x


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        distributed.all_reduce(gradient)
        return gradient
