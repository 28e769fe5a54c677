"""CUDA graphs of the asynchronous engine: the few hundred kernels of a call, launched as one.

A graph repeats the same kernels on the same addresses. So it needs fixed shapes, and the number of firing cells differs
from call to call: every step is filled up with cells that rest to the next multiple of ROUND rows (`Step` in
engines.py), and there is a graph for each number of rows that comes up. Outputs are those of the engine up to rounding.
"""

from collections import OrderedDict
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch

ROUND = 64  # rows of a step are a multiple of it: more, and cells are computed in vain; fewer, and graphs are many
KEPT = 8  # graphs of a model that are kept, the latest used


class Graph:
    """A recorded call of `function(*inputs)`: called with inputs of the same shapes, it gives their result.

    The result is overwritten by the next call.
    """

    def __init__(self, function, inputs):
        device = inputs[0].device
        self.inputs = [t.clone() for t in inputs]
        # Without autocast's cache: a graph must not read weights whose copies in half precision belong to others.
        half = {"device_type": "cuda", "dtype": torch.get_autocast_dtype("cuda"),
                "enabled": torch.is_autocast_enabled("cuda"), "cache_enabled": False}
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.autocast(**half):
            with torch.cuda.stream(stream):
                for _ in range(2):  # kernels are compiled and libraries take their workspaces
                    function(*self.inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = function(*self.inputs)

    def __call__(self, *inputs):
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return self.output


_graphs = WeakKeyDictionary()  # model -> {what a graph is valid for: Graph}
_recording = False


@contextmanager
def recorded(device):
    """Within it, calls of automata without gradients on a GPU are recorded, and replayed when the shapes come again.

    For the many equal calls of sampling: a recording costs as much as several calls, and holds their memory.
    """
    global _recording
    before, _recording = _recording, torch.device(device).type == "cuda"
    try:
        yield
    finally:
        _recording = before


def wanted(x):
    """Is a call with the input x to be replayed?"""
    return _recording and x.is_cuda and not torch.is_grad_enabled()


def replay(model, settings, function, inputs):
    """`function(*inputs)` by a graph, recorded at the first call; it also reads `settings` and the model's weights."""
    graphs = _graphs.setdefault(model, OrderedDict())
    key = (settings, tuple((t.shape, t.dtype, t.device) for t in inputs),
           tuple(p.data_ptr() for p in model.parameters()),
           torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
           torch.backends.cuda.matmul.allow_tf32)
    if key not in graphs:
        graphs[key] = Graph(function, inputs)
        if len(graphs) > KEPT:
            graphs.popitem(last=False)
    graphs.move_to_end(key)
    return graphs[key](*inputs)
