"""The diffusion process: what noise does to x_0 (q), what the model undoes (p), and the training loss.

It knows "a function of (x, t, state)" and nothing of automata, labels, wrappers or devices.
References: DDPM (Ho et al. 2020), iDDPM (Nichol & Dhariwal 2021), DDIM (Song et al. 2020).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Prediction:
    """p(x_{i-1} | x_i): each (N, C, H, W)."""

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor
    pred_xstart: torch.Tensor


class GaussianDiffusion:
    """Tables (float64, one entry per visited step) and the formulas that use them.

    Index i counts the visited steps; `timestep_map[i]` is the original step that the model is told. Indices (N,) are
    best kept on the CPU, where the tables are: looking up an index that lies on a GPU makes the host wait for it.
    """

    def __init__(self, betas, timestep_map):
        self.betas = betas = np.asarray(betas, np.float64)
        self.timestep_map = np.asarray(timestep_map)
        self.num_timesteps = len(betas)
        alphas = 1 - betas
        self.alphas_cumprod = np.cumprod(alphas)  # ᾱ_i
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        # q(x_{i-1} | x_i, x_0), DDPM eq. 7. Its variance is 0 at i = 0: the log takes the value of i = 1 there.
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        first = self.posterior_variance[min(1, len(betas) - 1)] or betas[0]  # a single step has only its beta
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1 - self.alphas_cumprod)

    @staticmethod
    def at(table, i, like):
        """Entries i (N,) of a table as float32 (N, 1, 1, 1) on the device of `like`; looked up in float64."""
        values = torch.as_tensor(np.asarray(table))[i.cpu()].float()
        return values.to(like.device, non_blocking=True).view(-1, 1, 1, 1)

    def original(self, i, device=None):
        """The step (N,) in 0..999 that the model sees at index i (N,), on `device` (default: that of i)."""
        return torch.as_tensor(self.timestep_map)[i.cpu()].to(device or i.device, non_blocking=True)

    # q: from x_0 towards noise

    def q_sample(self, x_start, t, noise):
        """x_t = sqrt(ᾱ) x_0 + sqrt(1 − ᾱ) ε (DDPM eq. 4)."""
        signal, sigma = np.sqrt(self.alphas_cumprod), np.sqrt(1 - self.alphas_cumprod)
        return self.at(signal, t, x_start) * x_start + self.at(sigma, t, x_start) * noise

    def q_posterior(self, x_start, x, i):
        """Mean and log-variance of q(x_{i-1} | x_i, x_0) (DDPM eqs. 6-7)."""
        mean = self.at(self.posterior_mean_coef1, i, x) * x_start + self.at(self.posterior_mean_coef2, i, x) * x
        return mean, self.at(self.posterior_log_variance_clipped, i, x)

    # p: what the model makes of x_i

    def predict_xstart(self, x, i, eps):
        """x_0 from x_i and ε: q_sample solved for x_0."""
        inverse = 1 / self.alphas_cumprod
        return self.at(np.sqrt(inverse), i, x) * x - self.at(np.sqrt(inverse - 1), i, x) * eps

    def predict_eps(self, x, i, xstart):
        """ε from x_i and x_0."""
        inverse = 1 / self.alphas_cumprod
        return (self.at(np.sqrt(inverse), i, x) * x - xstart) / self.at(np.sqrt(inverse - 1), i, x)

    def p_mean_variance(self, model_output, x, i, clip_denoised=False):
        """Model output (N, 2C, H, W) -> Prediction. The variance lies between β̃ and β (iDDPM eq. 15)."""
        eps, v = model_output.float().chunk(2, dim=1)
        low = self.at(self.posterior_log_variance_clipped, i, x)
        high = self.at(np.log(self.betas), i, x)
        fraction = (v + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low
        xstart = self.predict_xstart(x, i, eps)
        if clip_denoised:
            xstart = xstart.clamp(-1, 1)
        mean, _ = self.q_posterior(xstart, x, i)
        return Prediction(mean, log_variance.exp(), log_variance, xstart)

    # Training

    def training_losses(self, denoise, x_start, t, noise):
        """MSE of ε plus the variational bound of the variance, not rescaled (iDDPM eq. 16): dict of (N,).

        `denoise(x_t, t)` -> (N, 2C, H, W) with the original step t. In the bound ε is detached, so that it
        trains the variance alone.
        """
        x = self.q_sample(x_start, t, noise)
        out = denoise(x, self.original(t, x.device)).float()
        eps, v = out.chunk(2, dim=1)
        mse = (noise - eps).square().mean((1, 2, 3))
        vb = self.variational_bound(torch.cat([eps.detach(), v], 1), x_start, x, t)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def variational_bound(self, model_output, x_start, x, i):
        """One term of the bound, in bits per dimension: KL of posteriors, at i = 0 the likelihood of x_0; (N,)."""
        true_mean, true_log_variance = self.q_posterior(x_start, x, i)
        p = self.p_mean_variance(model_output, x, i)
        kl = gaussian_kl(true_mean, true_log_variance, p.mean, p.log_variance).mean((1, 2, 3)) / math.log(2)
        nll = -discretised_log_likelihood(x_start, p.mean, 0.5 * p.log_variance).mean((1, 2, 3)) / math.log(2)
        return torch.where((i == 0).to(kl.device, non_blocking=True), nll, kl)


def gaussian_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N₁ ‖ N₂) of diagonal Gaussians, elementwise, in nats."""
    ratio = log_variance2 - log_variance1
    return 0.5 * (ratio - 1 + torch.exp(-ratio) + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretised_log_likelihood(x, mean, log_scale):
    """log of the Gaussian mass in the bin of width 2/255 around x (DDPM eq. 13), elementwise, in nats.

    The outermost bins, beyond ±0.999, reach to infinity. The published code does the same to latents, which
    are neither in [-1, 1] nor discrete; kept, since it defines the loss.
    """
    inverse = torch.exp(-log_scale)
    upper = _normal_cdf((x - mean + 1 / 255) * inverse)
    lower = _normal_cdf((x - mean - 1 / 255) * inverse)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x):
    """Φ(x) by the tanh approximation that the published loss uses (largest error 3e-4)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
