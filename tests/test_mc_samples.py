"""benchmark/analyses/mc_samples.py: the same evaluation again and again, but for its kernels."""

import common
import mc_samples
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ScriptedEnvs, TinyAgent
from runs import assert_refuses, run, tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_run("ppo_netrand", tmp_path_factory.mktemp("runs"), "--plain-look")


def test_kernels_alone_differ_between_repeats(folder, monkeypatch):
    """In the script's evaluation: its own kernels again give its own return, others give others."""
    made = common.load_run(folder)
    seen, own = [], made.script.monte_carlo_policy

    def policy(agent, obs, kernels):
        seen.append((obs.clone(), kernels))
        return own(agent, obs, kernels)

    monkeypatch.setattr(made.script, "monte_carlo_policy", policy)
    made.args.mc_samples, made.args.eval_episodes = 3, 4
    made.make_envs = lambda args, split, start=0: ScriptedEnvs(args, split, start, obs_shape=(3, 64, 64))
    agent = TinyAgent(made.make_envs(made.args, "test"), made.args)
    wanted = made.script.evaluate(agent, made.args, made.make_envs, "test").mean()
    runs = [seen.copy()]
    for seed in (made.args.eval_seed, 0, 1, 1):
        seen.clear()
        found = mc_samples.mean_return(made, agent, made.args, "test", seed)
        runs.append(seen.copy())
        assert seed != made.args.eval_seed or found == wanted
    script, again, zero, one, same_one = runs
    assert all(torch.equal(obs, other) for (obs, _), (other, _) in zip(zero, one, strict=True))
    assert all(torch.equal(kernels, other) for (_, kernels), (_, other) in zip(script, again, strict=True))
    assert all(torch.equal(kernels, other) for (_, kernels), (_, other) in zip(one, same_one, strict=True))
    assert not any(torch.equal(kernels, other) for (_, kernels), (_, other) in zip(zero, one, strict=True))
    assert {len(kernels) for _, kernels in zero} == {3}


def test_a_run_becomes_a_table(folder, monkeypatch, tmp_path):
    returns = {("test", 1): [2.0, 4.0], ("test", 6): [5.0, 5.0], ("full_look", 1): [0.0, 1.0], ("full_look", 6): [3, 3]}

    def mean_return(made, agent, args, split, seed):
        assert args.eval_episodes == 7
        return returns[split, args.mc_samples][seed]

    monkeypatch.setattr(mc_samples, "mean_return", mean_return)
    flags = ["--samples", 1, 6, "--repeats", 2, "--episodes", 7, "--no-cuda", "--out", tmp_path / "x.csv"]
    run(mc_samples, monkeypatch, f"A={folder}", *flags)
    table = pd.read_csv(tmp_path / "x.csv")
    assert list(zip(table["split"], table["mc_samples"], strict=True)) == list(returns)
    assert list(table["mean"]) == [3, 5, 0.5, 3]
    np.testing.assert_allclose(table["std"], [2**0.5, 0, 0.5**0.5, 0])
    assert set(table["method"]) == {"A"} and set(table["episodes"]) == {7} and set(table["repeats"]) == {2}


@pytest.mark.slow
def test_it_plays_the_real_game(folder, monkeypatch, capsys):
    run(mc_samples, monkeypatch, folder, "--samples", 1, "--repeats", 2, "--episodes", 2, "--no-cuda")
    assert "full_look" in capsys.readouterr().out


def test_wrong_input_says_so_in_one_line(folder, tmp_path, monkeypatch, capsys):
    clean = tiny_run("ppo_netrand", tmp_path / "clean", "--no-netrand")
    for flags, says in (
        ((folder, "--samples", 0), "--samples: at least 1"),
        ((folder, "--repeats", 1), "--repeats: at least 2"),
        ((clean,), "with its method on"),
        ((folder, "--out", tmp_path / "x.png"), "not a .csv file"),
    ):
        assert_refuses(mc_samples, monkeypatch, capsys, flags, says)
