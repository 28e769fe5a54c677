"""The Triton attention against the plain one in float64: interpreted on the CPU, compiled where there is a GPU.

Triton decides at import whether its kernels are interpreted, and other tests may have imported it by then. So all
cases are computed once in a process of their own, and the tests look at what came out.
"""

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, succeeded

from automaton.attention import neighbourhood_attention

pytest.importorskip("triton")
FLOAT, HALVES = torch.float32, (torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """Shapes and layout of one call for two images; `select`: only about half of the cells, in no order."""

    grid: tuple
    heads: int
    d: int
    select: bool = False
    dtype: torch.dtype = FLOAT
    layout: str = "contiguous"
    size: float = 1  # of the queries

    def __str__(self):
        return "-".join(str(x).removeprefix("torch.").replace(", ", "x").strip("()") for x in self)


# Two images of 5 x 7 cells fill four blocks and a part of a fifth.
GRIDS = [Case(grid, heads, d, select) for grid, heads, d in (
    ((1, 1), 3, 3), ((1, 4), 2, 16), ((3, 2), 3, 3), ((3, 2), 1, 64), ((5, 7), 2, 64)
) for select in (False, True)]
LAYOUTS = [Case((3, 2), 2, 16, select, layout=layout) for layout, select in (
    ("sliced", False), ("sliced", True), ("heads first", False), ("strided", True), ("expanded", False))]
LARGE = [Case((3, 2), 2, 16, select, size=60) for select in (False, True)]  # logits that exp alone cannot hold
ROUNDED = [Case((3, 2), 2, 64, select, dtype) for dtype in HALVES for select in (False, True)]
CASES = GRIDS + LAYOUTS + LARGE + ROUNDED


def laid_out(x, layout, copies):
    """The same numbers at other strides; slices of as many copies differ in theirs."""
    return {"contiguous": lambda: x,
            "sliced": lambda: torch.cat(copies * [x], -2)[..., : x.shape[-2], :],  # as q, k, v of one projection
            "heads first": lambda: x.transpose(-3, -2).contiguous().transpose(-3, -2),
            "strided": lambda: torch.stack([x, x], -1)[..., 0],
            "expanded": lambda: x[..., :1, :1].expand(x.shape)}[layout]()  # not the same: those of one head and column


def inputs(case):
    """-> q, k, v, the gradient of the output, rows or None."""
    g = torch.Generator().manual_seed(2)
    shape = (2, *case.grid, case.heads, case.d)
    q, k, v, grad = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(4))
    rows, cells = None, shape[0] * shape[1] * shape[2]
    if case.select:
        rows = torch.randperm(cells, generator=g)[::2]
        rows = rows.to(torch.int32 if case.d == 16 else torch.int64)
        q, grad = q.flatten(0, 2)[rows], grad.flatten(0, 2)[rows]
    tensors = (x.to(case.dtype) for x in (case.size * q, k, v, grad))
    return *(laid_out(x, case.layout, copies) for copies, x in enumerate(tensors, 1)), rows


def computed(attention, q, k, v, grad, rows):
    """-> the output, the gradients of q, k and v, and how many numbers were kept for them."""
    kept = []
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        out = attention(*tensors, rows)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad), sum(kept)]


def plain(q, k, v, rows):
    if rows is None:
        return neighbourhood_attention(q, k, v)
    every_q = torch.zeros_like(k).flatten(0, 2).index_copy(0, rows.long(), q).view(k.shape)
    return neighbourhood_attention(every_q, k, v).flatten(0, 2)[rows]


def interpret(path):
    """In the process of its own: every case, and one in which no cell is selected."""
    from automaton.triton_attention import neighbourhood_attention_triton

    results = {str(case): computed(neighbourhood_attention_triton, *inputs(case)) for case in CASES}
    q, k, v, grad, rows = inputs(Case((3, 2), 2, 16, select=True))
    results["nobody"] = computed(neighbourhood_attention_triton, q[:0], k, v, grad[:0], rows[:0])
    torch.save(results, path)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"import test_triton_attention as t; t.interpret({str(path)!r})"]
    succeeded(subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True, timeout=300))
    return torch.load(path)


def check(case, found, rounding=0.3):
    """Output and gradients are those of the same numbers in float64.

    Half precision: all is rounded once, to the nearest; the error is a share of a unit (rms).
    """
    q, k, v, grad, rows = inputs(case)
    expected = computed(plain, *(x.double() for x in (q, k, v, grad)), rows)
    for name, a, b in zip(("out", "q", "k", "v"), found, expected, strict=False):
        assert a.dtype == case.dtype and a.shape == b.shape, name
        error = a.cpu().double() - b
        if case.dtype == FLOAT:
            assert error.abs().max() <= (1e-5 if case.size == 1 else 1e-4) * b.abs().max(), name
        else:
            assert error.norm() < rounding * torch.finfo(case.dtype).eps * b.norm(), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernels_agree_with_the_plain_attention(case, interpreted):
    # The interpreter cuts float32 off where a GPU rounds to bfloat16: up to a whole unit.
    check(case, interpreted[str(case)], rounding=0.6 if case.dtype == torch.bfloat16 else 0.3)


@pytest.mark.parametrize("case", [LAYOUTS[0], LAYOUTS[1]], ids=str)
def test_one_number_per_cell_and_head_is_kept_beside_the_inputs(case, interpreted):
    q, k, v, _, rows = inputs(case)
    expected = q.numel() + k.numel() + v.numel() + q.numel() // case.d + (0 if rows is None else len(rows))
    assert interpreted[str(case)][-1] == expected


def test_no_cell_selected(interpreted):
    out, grad_q, grad_k, grad_v, _ = interpreted["nobody"]
    assert out.shape == grad_q.shape == (0, 2, 16)
    assert not grad_k.any() and not grad_v.any() and grad_k.shape == grad_v.shape == (2, 3, 2, 2, 16)


def test_what_the_kernels_cannot_compute_is_refused():
    from automaton.triton_attention import neighbourhood_attention_triton

    q, k, v, _, rows = inputs(Case((3, 2), 2, 16, select=True))
    for wrong in ((q, k, v, None), (k[0], k[0], v[0], None), (k, k, v, rows), (q[1:], k, v, rows), (q, k, v[:1], rows),
                  (q, k, v, rows[:, None]), (q[:, None], k, v, rows[:, None])):
        with pytest.raises(ValueError, match="found q"):
            neighbourhood_attention_triton(*wrong)
    with pytest.raises(TypeError, match="float64"):
        neighbourhood_attention_triton(k.double(), k, v)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [*CASES, *(Case((32, 32), 6, d, True, dtype) for d in (64, 128)
                                            for dtype in (FLOAT, *HALVES))], ids=str)
def test_compiled_kernels_agree_with_the_plain_attention_and_repeat(case):
    from automaton.triton_attention import neighbourhood_attention_triton

    tensors = [x if x is None else x.cuda() for x in inputs(case)]
    first, second = (computed(neighbourhood_attention_triton, *tensors)[:-1] for _ in range(2))
    assert all(map(torch.equal, first, second))
    check(case, first)
