"""Make one small mistake at a time in a copy of the program and see which test notices.

    python tests/mutants.py                  all of them, as the table of docs/FIDELITY.md (about five minutes)
    python tests/mutants.py --only guidance  those whose description contains a word

Exit code 1 if a mistake goes unnoticed.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.cli import Parser, integer, run  # noqa: E402
from core.errors import UserError  # noqa: E402

TESTS = ["tests/test_parity.py", "tests/test_automaton.py", "tests/test_diffusion.py", "tests/test_training.py"]
MUTANTS = [  # description, file, what stands there, the mistake
    ("attention: scale 64^½ instead of 64^-½", "automaton/attention.py", "(q * q.shape[-1] ** -0.5, k, index)",
     "(q * q.shape[-1] ** 0.5, k, index)"),
    ("attention: a cell does not see itself", "automaton/attention.py", "& (x >= 0) & (x < w)",
     "& (x >= 0) & (x < w) & ((dy != 0) | (dx != 0)).flatten()"),
    ("attention: a neighbour's weight for the opposite one's value", "automaton/attention.py",
     "index, inside, sums), v, index)", "index, inside, sums).flip(-1), v, index)"),
    ("attention: places outside the grid left out of the softmax", "automaton/attention.py",
     "k, index) * inside[:, None]  # outside", "k, index).masked_fill(~inside[:, None], -1e9)  # outside"),
    ("attention: border repeated in the values", "automaton/attention.py",
     "return sums.softmax(logits) * inside[:, None]", "return sums.softmax(logits)"),
    ("attention, backward: the mean of the softmax left out", "automaton/attention.py",
     "(grad_weights - (weights * grad_weights).sum(-1, keepdim=True))", "grad_weights"),
    ("attention, backward: who looks at a cell mistaken for whom it looks at", "automaton/attention.py",
     "(t.flip(1) for t in neighbours", "(t for t in neighbours"),
    ("position code: sine and cosine exchanged", "automaton/rule.py", "angle.sin(), angle.cos()).float()",
     "angle.cos(), angle.sin()).float()"),
    ("position code: frequency shared by sine and cosine", "automaton/rule.py", "10000 ** (-column / width)",
     "10000 ** (-(column - column % 2) / width)"),
    ("modulation: scale without the 1", "automaton/rule.py", "torch.addcmul(shift, x, 1 + scale)",
     "torch.addcmul(shift, x, scale)"),
    ("modulation: shift and scale of the last layer exchanged", "automaton/rule.py",
     "    shift3: torch.Tensor\n    scale3: torch.Tensor", "    scale3: torch.Tensor\n    shift3: torch.Tensor"),
    ("last norm: eps 1e-5 instead of 1e-6", "automaton/rule.py", "eps=1e-6", "eps=1e-5"),
    ("norms: eps 1e-2 instead of 1e-5",
     "automaton/rule.py", "nn.LayerNorm(width)  # affine, eps 1e-5", "nn.LayerNorm(width, eps=1e-2)"),
    ("GELU by tanh instead of exact", "automaton/rule.py", "nn.GELU()", "nn.GELU(approximate='tanh')"),
    ("time: sines before cosines", "models.py", "torch.cat([angle.cos(), angle.sin()], -1)",
     "torch.cat([angle.sin(), angle.cos()], -1)"),
    ("time: 127 in place of 128 in the frequencies", "models.py", "-math.log(10000) / half *",
     "-math.log(10000) / (half - 1) *"),
    ("fire: all cells at inference", "models.py", "< self.update_rate)", "< 1)"),
    ("fire: one mask for all steps", "models.py", "per_image(torch.rand, (self.steps, cells), generator)",
     "per_image(torch.rand, (1, cells), generator).expand(-1, self.steps, -1)"),
    ("asynchronous engine: cells that fired before are not renewed", "automaton/engines.py",
     "fired.put_(part, value)", "pass"),
    ("recomputation: the old state is not put back", "automaton/engines.py",
     "steps[i].put_(self.state, moved[i].old_state)", "pass"),
    ("recomputation: products replayed in another order", "automaton/engines.py", "return self[1:]",
     "return self[:0:-1]"),
    ("recomputation: renewed rows keep the gradient of what they held before", "automaton/engines.py",
     "fired.clear_(grad)", "pass"),
    ("seed: one cell off the centre", "models.py", "h // 2, w // 2] = seed_noise",
     "(h - 1) // 2, w // 2] = seed_noise"),
    ("heredity: output inherited, hidden renewed", "models.py",
     "torch.cat([fresh[:, : self.out_channels], state[:, self.out_channels:]], 1)",
     "torch.cat([state[:, : self.out_channels], fresh[:, self.out_channels:]], 1)"),
    ("schedule: betas to 0.2", "diffusion/schedule.py", "scale * 0.02, steps", "scale * 0.2, steps"),
    ("respacing: steps cut instead of rounded", "diffusion/schedule.py", "round(stride * k)", "int(stride * k)"),
    ("posterior: coefficient with ᾱ of this step", "diffusion/gaussian.py",
     "betas * np.sqrt(self.alphas_cumprod_prev)", "betas * np.sqrt(self.alphas_cumprod)"),
    ("posterior: variance at step 0 unclipped", "diffusion/gaussian.py",
     "self.posterior_variance[min(1, len(betas) - 1)]", "1e-20"),
    ("variance: fraction v instead of (v + 1) / 2", "diffusion/gaussian.py", "fraction = (v + 1) / 2", "fraction = v"),
    ("variance: β and β̃ exchanged", "diffusion/gaussian.py", "fraction * high + (1 - fraction) * low",
     "fraction * low + (1 - fraction) * high"),
    ("loss: ε not detached in the bound", "diffusion/gaussian.py", "eps.detach(), v", "eps, v"),
    ("loss: bound in nats", "diffusion/gaussian.py", "p.mean, p.log_variance).mean((1, 2, 3)) / math.log(2)",
     "p.mean, p.log_variance).mean((1, 2, 3))"),
    ("loss: KL with the sign of the log-ratio turned", "diffusion/gaussian.py", "torch.exp(-ratio)",
     "torch.exp(ratio)"),
    ("loss: bins of 1/255 instead of 2/255", "diffusion/gaussian.py", "(x - mean + 1 / 255)", "(x - mean + 0 / 255)"),
    ("loss: likelihood at step 1 instead of 0", "diffusion/gaussian.py", "(i == 0).to(kl.device",
     "(i == 1).to(kl.device"),
    ("guidance: around the labelled half", "generation/guidance.py", "eps_null + scale * (eps - eps_null)",
     "eps + scale * (eps - eps_null)"),
    ("guidance: variance of the null half", "generation/guidance.py", "(eps, variance), (eps_null, _)",
     "(eps, _), (eps_null, variance)"),
    ("guidance: halves in the other order", "generation/guidance.py", "torch.cat([self.y, torch.zeros_like(self.y)])",
     "torch.cat([torch.zeros_like(self.y), self.y])"),
    ("ancestral step: noise at step 0 too", "diffusion/samplers.py", "(i != 0).view(-1, 1, 1, 1)",
     "(i > -1).view(-1, 1, 1, 1)"),
    ("ancestral step: variance in place of deviation", "diffusion/samplers.py", "torch.exp(0.5 * p.log_variance)",
     "torch.exp(p.log_variance)"),
    ("multistep solver: extrapolation by the whole ratio of the steps", "diffusion/samplers.py",
     "h[k] / (2 * h[k + 1])", "h[k] / h[k + 1]"),
    ("DDIM: ᾱ of this step for the one before", "diffusion/samplers.py", "torch.sqrt(previous) * p.pred_xstart",
     "torch.sqrt(1 - previous) * p.pred_xstart"),
    ("training: labels dropped all at once", "generation/training.py", "torch.rand(label.shape, generator=g)",
     "torch.rand((1,), generator=g)"),
    ("training: 1 − decay and decay exchanged in the average", "generation/training.py",
     "net.parameters()], 1 - decay)", "net.parameters()], decay)"),
    ("training: the average never forgets what it started from", "generation/training.py",
     "ema_decay(limit, self.step, self.options.ema_warmup)", "limit"),
    ("training: the state inherited in training is not the first pass's", "generation/training.py",
     "state[on] = next_state(net, first.to(state.dtype), seeds[on], grid)", "pass"),
    ("training: Min-SNR weight without the division", "generation/training.py", "snr.clip(max=gamma) / snr",
     "snr.clip(max=gamma)"),
    ("heredity: inherited above T instead of below", "generation/guidance.py", "return t < int(", "return t >= int("),
    ("the model sees the index of the respaced step", "diffusion/gaussian.py",
     "torch.as_tensor(self.timestep_map)[i.cpu()].to(", "i.to("),
]


def first_failure(folder):
    """Name of the first test that fails in this copy, or None."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    if done.returncode and not found:
        raise RuntimeError(done.stdout + done.stderr)
    return found[1] if found else None


def main():
    p = Parser(__doc__)
    p.add_argument("--only", default="", metavar="WORD", help="mistakes whose description contains this")
    p.add_argument("--skip", type=integer(0), default=0, help="leave out the first so many")
    args = p.parse_args()
    unnoticed = 0
    print("| mistake | in | caught by |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "results*", "data", "store", "docs"))
        if first_failure(copy):
            raise UserError(f"without any mistake {first_failure(copy)} fails; mend it first")
        for description, file, right, wrong in MUTANTS[args.skip:]:
            if args.only not in description:
                continue
            text = (copy / file).read_text(encoding="utf-8")
            if text.count(right) != 1:
                raise RuntimeError(f"{file}: {right!r} stands there {text.count(right)} times, expected once")
            (copy / file).write_text(text.replace(right, wrong), encoding="utf-8")
            caught = first_failure(copy)
            (copy / file).write_text(text, encoding="utf-8")
            unnoticed += caught is None
            print(f"| {description} | `{file}` | {f'`{caught}`' if caught else '**none**'} |", flush=True)
    sys.exit(bool(unnoticed))


if __name__ == "__main__":
    run(main)
