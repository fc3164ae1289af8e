"""A GPU that is not there. Each tensor on it is a FakeTensor, which has a shape and a device and no numbers.

So `train` runs in seconds, and what a GPU would refuse is refused here: operands on two devices and, while a CUDA graph
is recorded, copies between devices, values that are read back, and operands on the CPU. What is allowed is counted.

It rests on private parts of torch, so it goes with the version in requirements.txt and may need work for another.

    python tests/fake_gpu.py '[["algos/mdpo.py", {}], ["algos/mdpo.py", {"num_agents": 1, "resumed": true}]]'

prints a line of counts for each pair of a script and changed arguments.
"""

import collections
import contextlib
import importlib.util
import json
import sys
import tempfile
import traceback
import unittest.mock
from pathlib import Path

import numpy as np
import torch
from conftest import ScriptedEnvs, folder_in, replace, tiny_args
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
# Operations that launch no kernel.
VIEWS = ("view", "expand", "select", "slice", "permute", "transpose", "unsqueeze", "squeeze", "detach", "as_strided")
VIEWS += ("split", "chunk", "unbind", "alias", "t.default", "_reshape_alias", "unfold", "diagonal", "_unsafe_view")
VIEWS += ("lift", "empty", "device")
counts = collections.Counter()
recording = False


def devices(values):
    return {value.device.type for value in tree_leaves(values) if isinstance(value, torch.Tensor)}


class Watch(TorchDispatchMode):
    """Counts what reaches the GPU. While a graph is recorded, refuses what CUDA would refuse or freeze."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        if func is torch.ops.aten.exponential_.default:  # its fake takes no generator
            return args[0]
        before = devices((args, kwargs))
        fused = name.startswith("_fused_adam")  # it has no fake
        if fused and before != {"cuda"}:
            raise RuntimeError(f"Adam on {before}")
        output = None if fused else func(*args, **kwargs)
        seen = before | devices(output)
        if func in COPIES and len(seen) == 2:
            source, target = (args[1], args[0]) if func is COPIES[0] else (args[0], output)
            way = "to_gpu" if source.device.type == "cpu" else "to_cpu"
            if recording:
                raise RuntimeError(f"a copy {way} while a graph is recorded: {tuple(target.shape)}")
            counts[f"{way}_copies"] += 1
            counts[f"{way}_bytes"] += target.numel() * target.element_size()
        elif recording and "cpu" in seen and not name.startswith(("lift_fresh", "fill_", "device")):
            raise RuntimeError(f"{name} on the CPU while a graph is recorded")  # its value would be frozen
        elif "cuda" in seen and not name.startswith(VIEWS):
            counts["recorded_launches" if recording else "launches"] += 1
        return output


class Graph:
    def replay(self):
        counts["replays"] += 1


@contextlib.contextmanager
def record(graph, pool=None):
    global recording
    counts["graphs"] += 1
    recording = True
    yield
    recording = False


class Stream:
    def wait_stream(self, other):
        pass

    def is_capturing(self):
        return recording


def read(self):
    """What a value that is read back is: true, 1 or 0.5."""
    if recording:
        raise RuntimeError("a value is read back while a graph is recorded")
    counts["read_backs"] += self.device.type == "cuda"
    return True if self.dtype == torch.bool else 0.5 if self.dtype.is_floating_point else 1


def as_array(self, *_, **__):
    assert self.device.type == "cpu", "numpy() of a tensor on the GPU"
    return np.zeros(tuple(self.shape), str(self.dtype).removeprefix("torch."))


READS = {"item": read, "__bool__": read, "__float__": read, "__int__": read, "numpy": as_array, "__array__": as_array}
READS["tolist"] = lambda self: np.full(tuple(self.shape), read(self)).tolist()


def of_fakes(name, instead):
    """A method of tensors, with another one in its place for fakes."""
    real = getattr(torch.Tensor, name)

    def method(self, *args, **kwargs):
        return (instead if isinstance(self, FakeTensor) else real)(self, *args, **kwargs)

    return method


def move(self, function, recurse=True):
    """Module._apply, which otherwise swaps data that fakes do not have."""
    for child in self.children():
        child._apply(function)
    for name, param in self._parameters.items():
        if param is not None:
            self._parameters[name] = torch.nn.Parameter(function(param.detach()), param.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


def copied(self, memo, real=torch.Tensor.__deepcopy__):
    """A deep copy. Of a fake, the real one would copy the mode that all fakes share."""
    if not isinstance(self, FakeTensor):
        with unset_fake_temporarily():
            return real(self, memo)
    memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
    memo[id(self)]._is_param = isinstance(self, torch.nn.Parameter)
    return memo[id(self)]


def load_real(*args, real=torch.load, **kwargs):
    """torch.load, with numbers: the states of random streams have to have some."""
    with unset_fake_temporarily():
        return real(*args, **kwargs)


def backward(self, gradient=None, retain_graph=None, create_graph=False, inputs=None):
    """Gives each leaf a gradient. The engine itself asks for a driver, even for fakes."""
    assert devices(self) == {"cuda"} and self.dim() == 0
    leaves, seen, nodes = [], set(), [self.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves.extend([node.variable] if hasattr(node, "variable") else [])
            nodes.extend(following for following, _ in node.next_functions)
    wanted = {id(leaf) for leaf in leaves if inputs is None} | {id(leaf) for leaf in inputs or ()}
    for leaf in leaves:
        if id(leaf) in wanted:
            leaf.grad = torch.empty_like(leaf) if leaf.grad is None else leaf.grad + torch.empty_like(leaf)
    assert all(leaf.grad is not None for leaf in inputs or ()), "an input without a gradient"


@contextlib.contextmanager
def fake_gpu():
    """torch with a GPU, as long as it lasts."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    cuda = {"is_available": lambda: True, "get_device_name": lambda *_: "a fake GPU", "device_count": lambda: 1}
    cuda |= {"CUDAGraph": Graph, "graph": record, "Stream": Stream, "current_stream": Stream}
    cuda |= {"stream": lambda _: contextlib.nullcontext(), "graph_pool_handle": lambda: (0, 1)}
    cuda |= {"is_bf16_supported": lambda *_, **__: True, "mem_get_info": lambda *_: (80 << 30, 80 << 30)}
    nothing = ("synchronize", "empty_cache", "reset_peak_memory_stats")
    cuda |= {name: lambda: None for name in nothing} | {"max_memory_reserved": lambda: 1 << 30}
    accelerator = {"current_accelerator": lambda *_, **__: torch.device("cuda"), "current_stream": lambda *_: Stream()}
    with contextlib.ExitStack() as stack:

        def patch(owner, names):
            for name, value in names.items():
                stack.enter_context(unittest.mock.patch.object(owner, name, value))

        patch(torch.cuda, cuda)
        patch(torch.accelerator, accelerator)
        patch(FakeTensorMode, {"avoid_device_init": True})
        patch(torch.Tensor, {name: of_fakes(name, instead) for name, instead in READS.items()} | {"backward": backward})
        patch(torch.Tensor, {"__deepcopy__": copied})
        patch(torch.nn.Module, {"_apply": move})
        patch(torch.nn.init, {"trunc_normal_": lambda tensor, *_, **__: tensor})  # it draws until all numbers fit
        patch(torch, {"save": lambda state, file: None, "load": load_real})
        stack.enter_context(mode)
        stack.enter_context(Watch())
        yield


def train(path, resumed=False, **changes):
    """What reached the GPU while a script trained with tiny arguments, by name; or the error that ended it.

    resumed: the run goes on from a checkpoint that was made on the CPU.
    """
    global recording
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with tempfile.TemporaryDirectory() as folder:
        args = tiny_args(name, folder, **changes)
        if resumed:
            args = replace(args, precision="fp32")
            script.train(args, ScriptedEnvs)
            args = replace(args, total_timesteps=2 * args.total_timesteps, resume=str(folder_in(folder)))
        counts.clear()
        recording = False
        try:
            with fake_gpu():
                script.train(replace(args, cuda=True), ScriptedEnvs)
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}
    return dict(counts)


if __name__ == "__main__":
    for path, changes in json.loads(sys.argv[1]):
        with contextlib.redirect_stdout(sys.stderr):
            found = train(path, **changes)
        print(json.dumps(found), flush=True)
