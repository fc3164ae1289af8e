"""The same seed gives the same weights, and what only watches a run changes nothing in it."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import tyro
from conftest import (
    ROWS,
    ScriptedEnvs,
    TinyAgent,
    folder_in,
    load,
    make_agent_of,
    replace,
    state_of,
    tiny_args,
    weights,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PROCGEN = ["mdpo", "ppo_netrand"]


def trained(script, runs_dir, make_envs=ScriptedEnvs, **changes):
    """The weights that training on scripted environments ends with."""
    args = tiny_args(script.__name__, runs_dir, **changes)
    return weights(script.train(args, make_envs, make_agent_of(script)))


# ---- Seeds ----
def test_seed_decides_the_weights(script, tmp_path):
    def same_envs(args, split, start=0):
        return ScriptedEnvs(replace(args, seed=0), split, start)

    first, again, other = (trained(script, tmp_path, same_envs, seed=seed, eval_every=0) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.slow
def test_two_processes_learn_the_same_on_the_real_environment(script, tmp_path):
    """Whatever order sets have, and whether a run is evaluated and saved on the way or not."""
    once = ("--eval-episodes", "1", "--final-eval-episodes", "1")
    often = "0.01" if hasattr(script, "Replay") else "1e-9"  # one that may save at each step would be busy for minutes
    watched = start(script, tmp_path / "0", "0", "--save-minutes", often, *once)
    alone = start(script, tmp_path / "1", "1", "--save-minutes", "0", "--eval-every", "0")
    for process in (watched, alone):
        output, _ = process.communicate()
        assert process.returncode == 0, output
    assert torch.equal(*(saved(script, tmp_path / name) for name in "01"))


def start(script, runs_dir, hash_seed, *flags):
    command = [sys.executable, script.__file__, *ROWS[script.__name__]["flags"].split(), *flags]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, "--runs-dir", str(runs_dir)], env=environment, **pipes)


def saved(script, runs_dir):
    """The weights in the last checkpoint of the one run there is."""
    state = state_of(folder_in(runs_dir))
    names = [name for name in state if name.startswith(("agent.", "agents."))]
    return torch.cat([state[name].flatten().double() for name in names])


# ---- Watching a run ----
@pytest.mark.parametrize("changes", [{"eval_every": 16}, {"save_minutes": 1e-9}])
def test_evaluating_and_saving_change_nothing(script, tmp_path, changes):
    """Not the weights, and not what torch's own stream draws next."""
    neither = {"eval_every": 0, "save_minutes": 0.0, "exact_every": 0}
    alone, draws = trained(script, tmp_path, **neither), torch.rand(5)
    watched, watched_draws = trained(script, tmp_path, **neither | changes), torch.rand(5)
    assert torch.equal(alone, watched) and torch.equal(draws, watched_draws)


# ---- Levels ----
def procgen(name, split, steps=0, **changes):
    """Levels that some environments of a Procgen script come by: [steps + 1, num_envs]."""
    script = load(name)
    args = replace(tyro.cli(script.Args, args=ROWS[name]["flags"].split()), num_envs=32, **changes)
    args = script.check(replace(args, num_agents=1) if name == "mdpo" else args)
    envs, rng = script.make_envs(args, split), np.random.default_rng(1)
    infos = [envs.reset()[1], *(envs.step(rng.integers(0, 15, 32))[-1] for _ in range(steps))]
    envs.close()
    return np.array([info["level_seed"] for info in infos])


@pytest.mark.parametrize("name", PROCGEN)
@pytest.mark.parametrize(
    ("changes", "low", "high"),
    [
        ({"distribution_mode": "hard"}, 0, 500),
        ({"distribution_mode": "easy"}, 0, 200),
        ({"num_levels": 3, "start_level": 1000}, 1000, 1003),
    ],
)
def test_training_levels_are_those_asked_for_and_test_levels_any(name, changes, low, high):
    train, test = procgen(name, "train", 60, **changes), procgen(name, "test", **changes)
    assert low <= train.min() < train.max() < high
    assert train.max() >= low + 0.4 * (high - low)
    assert np.ptp(test) > 1e6


@pytest.mark.parametrize("name", PROCGEN)
def test_levels_follow_the_seed(name):
    first, again, other = (procgen(name, "test", 60, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("name", PROCGEN)
def test_each_evaluation_is_on_the_same_levels(name):
    """Whoever is evaluated and whatever the run's seed; the same agent gets the same returns."""
    script, levels = load(name), []
    args = script.check(tyro.cli(script.Args, args=ROWS[name]["flags"].split()))

    def make_envs(args, split):
        envs = script.make_envs(args, split)
        obs, info = envs.reset()
        levels.append(info["level_seed"].tolist())
        envs.reset = lambda: (obs, info)
        return envs

    def returns(seed, run_seed):
        torch.manual_seed(seed)
        agent = TinyAgent(ScriptedEnvs(args, "test"), args)
        run_args = replace(args, seed=run_seed, eval_episodes=4, **{"mc_samples": 0} if name == "ppo_netrand" else {})
        return script.evaluate(agent, run_args, make_envs, "test").tolist()

    first, again, _ = returns(1, 1), returns(1, 2), returns(2, 1)
    assert first == again
    assert levels[0] == levels[1] == levels[2] == procgen(name, "test", seed=args.eval_seed)[0][:4].tolist()


# ---- Streams ----
def recorded_run(monkeypatch, tmp_path, **changes):
    """mdpo.py's initial weights of each agent, and for each act the noise and the actions [A, N, ...]."""
    script, initial, acts = load("mdpo"), [], []
    act = script.act

    def make_agent(*args):
        agent = TinyAgent(*args)
        initial.append(weights(agent))
        return agent

    def recorded(agents, obs, noise):
        row = act(agents, obs, noise)
        acts.append((noise.clone(), row["actions"].clone()))
        return row

    with monkeypatch.context() as patch:
        patch.setattr(script, "act", recorded)
        script.train(tiny_args("mdpo", tmp_path, eval_every=0, **changes), agents_apart, make_agent)
    return initial, acts


def agents_apart(args, split, start=0):
    """Scripted environments in which an agent sees the same, whether there is another one or not."""
    envs = ScriptedEnvs(args, split, start)
    draw, alone = envs.observe, replace(args, num_agents=1)
    first = ScriptedEnvs(alone, split, start)
    envs.observe = lambda: np.concatenate([first.observe(), draw()])[: envs.num_envs]
    return envs


def test_initial_weights_and_noise_follow_the_seed(monkeypatch, tmp_path):
    (initial, acts), (other_initial, other_acts) = (recorded_run(monkeypatch, tmp_path, seed=seed) for seed in (1, 2))
    assert not torch.equal(initial[0], other_initial[0])
    assert not torch.equal(acts[0][0], other_acts[0][0])


def test_more_epochs_shift_no_noise(monkeypatch, tmp_path):
    _, few = recorded_run(monkeypatch, tmp_path, update_epochs=1)
    _, many = recorded_run(monkeypatch, tmp_path, update_epochs=3)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(few, many, strict=True))
    noises = torch.stack([noise for noise, _ in few])
    assert len(noises.unique()) > 0.99 * noises.numel()  # no two agents or steps share theirs


def test_a_second_agent_shifts_nothing_of_the_first(monkeypatch, tmp_path):
    initial_one, one = recorded_run(monkeypatch, tmp_path, num_agents=1)
    initial_two, two = recorded_run(monkeypatch, tmp_path, num_agents=2)
    assert torch.equal(initial_one[0], initial_two[0])
    assert not torch.equal(initial_two[0], initial_two[1])
    assert all(torch.equal(a[0], b[0]) for (a, _), (b, _) in zip(one, two, strict=True))
    rollout = tiny_args("mdpo", tmp_path).num_steps
    assert all(torch.equal(a[0], b[0]) for (_, a), (_, b) in zip(one[:rollout], two[:rollout], strict=True))


# ---- What is captured ----
class NoReadBack(TorchDispatchMode):
    """Refuses what reads a value back from the device or makes a shape from data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            refused = any(index is not None and index.dtype == torch.bool for index in args[1])
        else:
            refused = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if refused:
            raise RuntimeError(f"{func} depends on data")
        return func(*args, **kwargs or {})


class NoCopyOut(TorchFunctionMode):
    """Refuses what on a CPU reads a tensor's memory without an operation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.cpu):
            raise RuntimeError(f"{func} depends on data")
        return func(*args, **kwargs or {})


READ_BACKS = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: 1 if x.sum() > 0 else 0,
    "float": lambda x: float(x.sum()),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "asarray": np.asarray,
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "index": lambda x: x[x > 0],
    "index_put": lambda x: x.index_put_((x > 0,), torch.zeros(())),
    "unique": lambda x: x.unique(),
    "allclose": lambda x: torch.allclose(x, x),
}


@pytest.mark.parametrize("read_back", READ_BACKS)
def test_read_backs_are_refused(read_back):
    x = torch.arange(8.0)
    with pytest.raises(RuntimeError, match="depends on data"), NoReadBack(), NoCopyOut():
        READ_BACKS[read_back](x)


def test_update_and_act_read_nothing_back(script, tmp_path, monkeypatch):
    """The whole update and acting's forward pass could be captured, and use kernels that repeat bit for bit."""
    calls = []

    def guarded(name, function):
        def call(*args):
            assert torch.are_deterministic_algorithms_enabled()
            calls.append(name)
            with NoReadBack(), NoCopyOut():
                return function(*args)

        return call

    for name in ("update", "act"):
        monkeypatch.setattr(script, name, guarded(name, getattr(script, name)))
    script.train(tiny_args(script.__name__, tmp_path, eval_every=0, total_timesteps=16), ScriptedEnvs)
    assert {"update", "act"} == set(calls)


# ---- Sampling ----
def test_act_samples_from_the_policy():
    """Frequencies of the actions are the policy's: chi-square with 4 degrees of freedom, beyond 18.5 once in 1000."""
    act, logits, draws = load("mdpo").act, torch.tensor([0.0, 1.0, -2.0, 0.5, -1.0]), 200_000

    def policy(obs):
        return logits.expand(len(obs), 5), obs

    obs, noise = torch.arange(draws), torch.empty(draws, 5).exponential_(generator=torch.Generator().manual_seed(1))
    row = {key: value[0] for key, value in act([policy], obs[None], noise[None]).items()}
    expected = draws * logits.softmax(0)
    assert (row["actions"].bincount(minlength=5) - expected).square().div(expected).sum() < 18.5
    assert torch.equal(row["log_probs"], logits.log_softmax(0)[row["actions"]])
    assert torch.equal(row["values"], obs)
    assert torch.equal(act([policy], obs[None], noise[None])["actions"][0], row["actions"])
    assert not torch.equal(act([policy], obs[None], noise.flip(0)[None])["actions"][0], row["actions"])


# ---- Precision ----
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp32"])
def test_tf32_is_for_all_products_or_none(precision):
    """The switches can be read by anyone: torch raises where its older and its newer ones disagree."""
    mdpo = load("mdpo")
    mdpo.set_up_torch(mdpo.Args(precision=precision))
    wanted, backends = precision == "tf32", torch.backends
    assert backends.cudnn.allow_tf32 == backends.cuda.matmul.allow_tf32 == wanted
    assert torch.get_float32_matmul_precision() == ("high" if wanted else "highest")
    for operation in (backends.cudnn.conv, backends.cuda.matmul):
        assert (operation.fp32_precision == "tf32") == wanted
    mdpo.set_up_torch(mdpo.Args(precision="fp32"))
