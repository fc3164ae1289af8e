"""What runs as a CUDA graph on a GPU, here with a stand-in for graphs on a CPU: the same operations on the same memory.

A recorded graph does again what its operations did, to the tensors they did it to; what Python computed, chose or read
meanwhile stays as it was. So a function that would not survive a capture gives other numbers here.
"""

import contextlib
import functools

import pytest
import torch
from conftest import ROOT, ScriptedEnvs, folder_in, load, make_agent_of, replace, tiny_args, weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CHANGING = {  # what of a script changes from one iteration to the next
    "mdpo": {"anneal_lr": True},
    "ppo_netrand": {"anneal_lr": True, "anneal_clip": True, "clean_prob": 0.5, "total_timesteps": 64},
}


def memory_of(values):
    """Tensors of the same memory, which stay with it when the `data` of those given become another tensor's."""
    return tree_map(lambda value: value.detach() if isinstance(value, torch.Tensor) else value, values)


class StandIn(TorchDispatchMode):
    """Records the operations within `with` for replay(). As with a real capture, nothing has happened when it ends."""

    def __init__(self, graph, pool=None):
        super().__init__()
        self.operations, self.before, self.rng_state = [], [], torch.get_rng_state()
        graph.operations = self.operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args, kwargs = memory_of(args), memory_of(kwargs or {})
        # Careful: the schema of batch normalisation does not say that it moves running statistics.
        if func._schema.is_mutable or "batch_norm" in func.__name__:
            values = [value for value in tree_leaves(args) if isinstance(value, torch.Tensor)]
            self.before.extend((value, value.clone()) for value in values)
        outputs = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, outputs))
        return outputs

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():
            for value, before in reversed(self.before):
                value.copy_(before)
        torch.set_rng_state(self.rng_state)


class Graph:
    replays = 0

    @torch.no_grad()
    def replay(self):
        Graph.replays += 1
        for func, args, kwargs, outputs in self.operations:
            again = func(*args, **kwargs)
            pairs = zip(outputs, again, strict=True) if isinstance(outputs, tuple | list) else [(outputs, again)]
            for old, new in pairs:
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def graphs(monkeypatch):
    """torch.cuda's part in a capture, on a CPU."""
    Graph.replays = 0
    stand_ins = {"CUDAGraph": Graph, "graph": StandIn, "Stream": Stream, "current_stream": Stream}
    stand_ins |= {"stream": lambda _: contextlib.nullcontext(), "graph_pool_handle": lambda: None}
    stand_ins |= {"get_rng_state": torch.get_rng_state, "set_rng_state": torch.set_rng_state}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


@pytest.fixture
def captured_script(script, graphs, monkeypatch):
    """A script that captures where it otherwise would not."""
    real = script.Captured
    monkeypatch.setattr(script, "Captured", lambda function, on, pool=None: real(function, True))
    return script


def trained(script, args):
    return weights(script.train(args, ScriptedEnvs, make_agent_of(script)))


# ---- The stand-in can fail ----
def doubled_in_python():
    """A function whose factor doubles at each call."""
    state = {"factor": 1.0}

    def call(x):
        state["factor"] *= 2
        return {"x": x * state["factor"]}

    return call


def doubled_on_the_device():
    factor = torch.ones(())
    return lambda x: {"x": x * factor.mul_(2)}


@pytest.fixture
def captured_of_mdpo(graphs):
    """`Captured` has one text in all scripts (test_copies.py)."""
    return load("mdpo").Captured


def test_what_python_computes_is_frozen_and_what_the_device_computes_is_not(captured_of_mdpo):
    frozen, alive = (captured_of_mdpo(made(), True) for made in (doubled_in_python, doubled_on_the_device))
    x = torch.ones(3)
    seen = [frozen(x)["x"][0].item() for _ in range(6)]
    assert seen == [2, 4, 8, 16, 16, 16]  # three plain calls, one to record and replay, two that replay
    assert [alive(x)["x"][0].item() for _ in range(6)] == [2, 4, 8, 16, 32, 64]
    assert Graph.replays == 6


# ---- Captured ----
def test_inputs_are_copied_in_and_outputs_are_the_callers(captured_of_mdpo):
    captured = captured_of_mdpo(lambda x, y: {"sum": x + y, "first": x}, True)
    for _ in range(3):
        captured(torch.zeros(2), torch.zeros(2))
    first = captured(torch.ones(2), torch.ones(2))
    second = captured(torch.full((2,), 3.0), torch.ones(2))
    assert Graph.replays == 2
    assert first["sum"].tolist() == [2, 2] and second["sum"].tolist() == [4, 4]
    assert first["first"].tolist() == [1, 1] and second["first"].tolist() == [3, 3]
    with pytest.raises(ValueError, match="zip"):
        captured(torch.ones(2))
    with pytest.raises(ValueError, match=r"recorded with torch.Size\(\[2\]\), called with torch.Size\(\[1\]\)"):
        captured(torch.ones(1), torch.ones(2))  # copy_ would repeat it


def test_switched_off_it_is_the_function(captured_of_mdpo):
    captured = captured_of_mdpo(lambda x: x.tolist(), False)
    assert captured(torch.ones(2)) == [1, 1] and captured(torch.ones(3)) == [1, 1, 1]


def test_the_first_calls_are_plain_ones_and_count(captured_of_mdpo):
    """Weights, a buffer, Adam's state and the random stream go on as without a capture, from the first call on."""

    def made():
        torch.manual_seed(0)
        network = torch.nn.Linear(4, 4)
        network.register_buffer("seen", torch.zeros(()))
        optimizer = torch.optim.Adam(network.parameters(), lr=torch.tensor(0.1), fused=True)

        def step(x):
            optimizer.zero_grad()
            network.seen += x.mean()
            loss = (network(x) - network.seen).pow(4).sum()
            loss.backward()
            optimizer.step()
            return {"loss": loss.detach()}

        return network, step

    def followed(network, step):
        return [(step(x)["loss"], weights([network])) for x in torch.arange(192.0).view(6, 8, 4) / 192]

    (network, step), (twin, twin_step) = made(), made()
    eager, captured = followed(network, step), followed(twin, captured_of_mdpo(twin_step, True))
    assert all(torch.equal(a, b) for pair in zip(eager, captured, strict=True) for a, b in zip(*pair, strict=True))
    assert Graph.replays == 3


# ---- Training ----
def test_captured_training_is_eager_training(captured_script, tmp_path):
    """The same weights bit for bit, whatever changes from one iteration to the next."""
    script = captured_script
    args = tiny_args(script.__name__, tmp_path / "captured", eval_every=0, **CHANGING.get(script.__name__, {}))
    args = replace(args, total_timesteps=2 * args.total_timesteps)
    captured = trained(script, args)
    assert Graph.replays > 10
    script.Captured = lambda function, on, pool=None: function
    eager = trained(script, replace(args, runs_dir=str(tmp_path / "eager")))
    assert torch.equal(captured, eager)


def test_a_captured_run_resumes_exactly(captured_script, tmp_path):
    script = captured_script
    changes = {key: value for key, value in CHANGING.get(script.__name__, {}).items() if "anneal" not in key}
    args = tiny_args(script.__name__, tmp_path / "whole", eval_every=0, **changes)
    whole = trained(script, replace(args, total_timesteps=2 * args.total_timesteps))
    trained(script, replace(args, runs_dir=str(tmp_path / "part")))
    part = folder_in(tmp_path / "part")
    resumed = replace(args, total_timesteps=2 * args.total_timesteps, resume=str(part))
    assert torch.equal(whole, trained(script, resumed))


@pytest.mark.slow
def test_a_model_of_timm_can_be_captured(graphs, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmark" / "suites")
    import networks

    script, found = load("drqv2_pieg"), []
    make_agent, real = networks.timm_encoder("test_efficientnet")(script), script.Captured
    for on in (False, True):
        monkeypatch.setattr(script, "Captured", lambda function, _, pool=None, on=on: real(function, on))
        args = tiny_args("drqv2_pieg", tmp_path / str(on), eval_every=0)
        found.append(weights(script.train(args, ScriptedEnvs, make_agent)))
    assert Graph.replays > 10 and torch.equal(*found)


# ---- On a GPU ----
def on_a_gpu(script, args, **changes):
    return weights(script.train(replace(args, cuda=True, eval_every=0, **changes), ScriptedEnvs))


@pytest.fixture
def live_inputs(monkeypatch):
    """torch says so if a graph would read memory that was freed."""
    monkeypatch.setattr(torch.cuda, "graph", functools.partial(torch.cuda.graph, check_input_liveness=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_captured_is_eager_on_a_gpu(script, precision, live_inputs, tmp_path):
    """In one go, with all that changes over time, bit for bit."""
    args = tiny_args(script.__name__, tmp_path, precision=precision, **CHANGING.get(script.__name__, {}))
    args = replace(args, total_timesteps=2 * args.total_timesteps)
    eager = on_a_gpu(script, args, cuda_graphs=False)
    assert torch.equal(eager, on_a_gpu(script, args, cuda_graphs=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_run_resumes_exactly_on_a_gpu(script, live_inputs, tmp_path):
    changes = {key: value for key, value in CHANGING.get(script.__name__, {}).items() if "anneal" not in key}
    args = tiny_args(script.__name__, tmp_path / "part", precision="fp32", **changes)
    total = 2 * args.total_timesteps
    eager = on_a_gpu(script, args, cuda_graphs=False, total_timesteps=total, runs_dir=str(tmp_path / "eager"))
    on_a_gpu(script, args)
    folder = folder_in(tmp_path / "part")
    assert torch.equal(eager, on_a_gpu(script, args, total_timesteps=total, resume=str(folder)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_default_sizes_on_a_gpu(script, precision, live_inputs, tmp_path):
    """One rollout with its updates, or twenty updates."""
    names = vars(script.Args())
    sizes = {"total_timesteps": 1} if "num_steps" in names else {"learning_starts": 600, "total_timesteps": 640}
    if "encoder_weights" in names:
        sizes["encoder_weights"] = "random"
    args = script.Args(runs_dir=str(tmp_path), precision=precision, **sizes)
    eager = on_a_gpu(script, args, cuda_graphs=False)
    assert torch.equal(eager, on_a_gpu(script, args, cuda_graphs=True))
