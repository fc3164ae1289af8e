"""Network randomization: the kernel, what it is applied to and when, the matching loss, and the Monte Carlo policy."""

import csv
import itertools
import unittest.mock

import numpy as np
import pytest
import torch
from conftest import TIMES, ScriptedEnvs, TinyAgent, load, replace, tiny_args, weights

netrand, mdpo = load("ppo_netrand"), load("mdpo")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def kernels(number, seed=0):
    rng = generator(seed)
    return torch.stack([netrand.random_kernel(rng) for _ in range(number)])


def images(number, seed=0, size=64):
    return torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8, generator=generator(seed))


def made_agent(tmp_path, seed=0, heads=1.0, **changes):
    """An agent of the script, its heads' weights `heads` times as large."""
    torch.manual_seed(seed)
    args = tiny_args("ppo_netrand", tmp_path, **changes)
    agent = netrand.Agent(ScriptedEnvs(args, "train"), args)
    with torch.no_grad():
        for head in (agent.actor, agent.critic):
            head.weight.mul_(heads)
    return agent, args


def made_batch(number, seed=0):
    """A minibatch whose numbers are of order 1."""
    rng = generator(seed)
    batch = {key: torch.randn(number, generator=rng) for key in ("values", "advantages", "returns")}
    batch["log_probs"] = -2.7 + 0.3 * torch.randn(number, generator=rng)
    batch["actions"] = torch.randint(0, 15, (number,), generator=rng)
    return batch | {"obs": images(number, seed)}


def metrics(runs_dir):
    """{key: {step: value}} of the one run there is."""
    (path,) = runs_dir.glob("*/metrics.csv")
    found = {}
    for row in csv.DictReader(path.open()):
        found.setdefault(row["key"], {})[int(row["step"])] = float(row["value"])
    return found


# ---- The kernel ----
def test_kernel_is_a_glorot_normal_cut_at_two_deviations():
    values = kernels(3000)
    std = (2 / (27 + 27)) ** 0.5
    assert values.shape[1:] == (3, 3, 3, 3)
    assert values.std().item() == pytest.approx(std, rel=0.005)
    assert values.mean().item() == pytest.approx(0, abs=0.002)
    assert values.abs().max() <= 2 * std / 0.8796 + 1e-6
    assert values.std(0).min() > 0.9 * std and values.std(0).max() < 1.1 * std  # each of the 81 weights
    inside = (values.abs() < std / 0.87962566).float().mean().item()
    assert inside == pytest.approx(0.6827 / 0.9545, abs=0.004)  # a normal's share within one of its two deviations


def test_kernel_follows_its_generator_alone():
    torch.manual_seed(1)
    first = netrand.random_kernel(generator(3))
    torch.manual_seed(2)
    assert torch.equal(first, netrand.random_kernel(generator(3)))
    assert not torch.equal(first, netrand.random_kernel(generator(4)))


def slow_randomise(obs, kernel, box):
    """Each output pixel by itself; box: (height, width) of what the convolution takes for black and leaves as it is."""
    result = torch.zeros_like(obs)
    channels, height, width = obs.shape[1:]
    for n, o, y, x in itertools.product(range(len(obs)), range(channels), range(height), range(width)):
        if y < box[0] and x < box[1]:
            result[n, o, y, x] = obs[n, o, y, x]
            continue
        for i, dy, dx in itertools.product(range(channels), (-1, 0, 1), (-1, 0, 1)):
            inside = 0 <= y + dy < height and 0 <= x + dx < width
            if inside and not (y + dy < box[0] and x + dx < box[1]):
                result[n, o, y, x] += kernel[o, i, 1 + dy, 1 + dx] * obs[n, i, y + dy, x + dx]
    return result


@pytest.mark.parametrize("keep_box, box", [(False, (0, 0)), (True, (13, 26))])
def test_randomise_is_a_convolution_around_the_box(keep_box, box):
    obs, kernel = torch.rand(2, 3, 15, 28, generator=generator(1), dtype=torch.float64), kernels(1)[0].double()
    before = obs.clone()
    result = netrand.randomise(obs, kernel, keep_box)
    assert torch.allclose(result, slow_randomise(obs, kernel, box), rtol=0, atol=1e-12)
    assert torch.equal(obs, before)
    assert result.min() < 0  # nothing is clipped


@pytest.mark.parametrize("keep_box", [False, True])
def test_identity_kernel_changes_nothing(keep_box):
    obs = torch.rand(2, 3, 64, 64, generator=generator())
    assert torch.equal(netrand.randomise(obs, torch.nn.init.dirac_(torch.empty(3, 3, 3, 3)), keep_box), obs)


@pytest.mark.parametrize("painted", [(), ("paint_vel_info",), ("plain_look",)])
@pytest.mark.parametrize("keep_vel_info", [True, False])
def test_the_box_is_kept_only_where_it_is_painted(tmp_path, painted, keep_vel_info):
    agent, _ = made_agent(tmp_path, keep_vel_info=keep_vel_info, **dict.fromkeys(painted, True))
    obs, changed = images(4), images(4)
    changed[:, :, :13, :26] = 0
    kernel = kernels(1)[0]
    with unittest.mock.patch.object(netrand, "randomise", wraps=netrand.randomise) as call:
        agent.features(obs, kernel)
    assert call.call_args.args[2] == bool(painted and keep_vel_info)
    assert not torch.equal(agent.features(obs, kernel), agent.features(changed, kernel))  # it is seen either way


# ---- The losses ----
def test_feature_matching_is_a_mean_that_moves_the_random_side_alone():
    h_random, h_clean = (torch.randn(5, 7, generator=generator(seed), requires_grad=True) for seed in (1, 2))
    loss = netrand.feature_matching_loss(h_random, h_clean)
    pairs = zip(h_random.flatten().tolist(), h_clean.flatten().tolist(), strict=True)
    slow = sum((a - b) ** 2 for a, b in pairs) / 35
    assert loss.item() == pytest.approx(slow, rel=1e-5)
    loss.backward()
    assert torch.allclose(h_random.grad, 2 * (h_random - h_clean).detach() / 35)
    assert h_clean.grad is None


def slow_loss(agent, kernel, skip, clip_coef, batch, args):
    """The sum of the paper's terms, a sample at a time, both branches with gradients but for the stop."""
    total = 0.0
    for n in range(len(batch["obs"])):
        pixels = batch["obs"][n : n + 1] / 255
        h_clean = agent.encoder(pixels)
        h_random = agent.encoder(slow_conv(pixels, kernel))
        hidden = h_clean if skip else h_random
        probabilities = torch.softmax(agent.actor(hidden)[0], 0)
        value = agent.critic(hidden)[0, 0]
        old, advantage = batch["log_probs"][n].exp(), batch["advantages"][n]
        ratio = probabilities[batch["actions"][n]] / old
        bounded = min(max(ratio, torch.tensor(1 - clip_coef)), torch.tensor(1 + clip_coef))
        policy = -min(ratio * advantage, bounded * advantage)
        moved = min(max(value - batch["values"][n], torch.tensor(-clip_coef)), torch.tensor(clip_coef))
        errors = (value - batch["returns"][n]) ** 2, (batch["values"][n] + moved - batch["returns"][n]) ** 2
        entropy = -sum(p * p.log() for p in probabilities)
        matching = sum((a - b.detach()) ** 2 for a, b in zip(h_random[0], h_clean[0], strict=True)) / 256
        total = total + policy + 0.5 * 0.5 * max(errors) - 0.01 * entropy + args.fm_coef * matching
    return total / len(batch["obs"])


def slow_conv(pixels, kernel):
    """Nine shifted copies, weighted."""
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1))
    shifted = [(y, x, padded[:, :, y : y + 64, x : x + 64]) for y, x in itertools.product(range(3), range(3))]
    return sum(torch.einsum("oi,bihw->bohw", kernel[:, :, y, x], view) for y, x, view in shifted)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("fm_coef", [0.002, 3.0])
def test_loss_and_gradient_equal_the_slow_twin(tmp_path, skip, fm_coef):
    agent, args = made_agent(tmp_path, heads=20.0, fm_coef=fm_coef)
    batch, kernel = made_batch(6), kernels(1)[0]
    loss, parts = netrand.netrand_loss(agent, kernel, skip, torch.tensor(0.2, dtype=torch.float64), batch, args)
    gradients = torch.autograd.grad(loss, list(agent.parameters()))
    slow = slow_loss(agent, kernel, skip, 0.2, batch, args)
    slow_gradients = torch.autograd.grad(slow, list(agent.parameters()))
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    for ours, twin in zip(gradients, slow_gradients, strict=True):
        assert torch.allclose(ours, twin, rtol=1e-3, atol=1e-5 * twin.abs().max().item() + 1e-7)
    assert 0.2 < parts["clipfrac"] < 1  # the clip has something to do


@pytest.mark.parametrize("skip", [False, True])
def test_without_the_matching_the_loss_is_the_rest(tmp_path, skip):
    agent, args = made_agent(tmp_path)
    inputs = kernels(1)[0], skip, torch.tensor(0.2, dtype=torch.float64), made_batch(4)
    whole, parts = netrand.netrand_loss(agent, *inputs, args)
    rest, rest_parts = netrand.netrand_loss(agent, *inputs, replace(args, fm_coef=0.0))
    assert "feature_matching_loss" not in rest_parts
    assert parts["feature_matching_loss"] > 0
    assert (whole - rest).item() == pytest.approx(0.002 * parts["feature_matching_loss"].item(), rel=1e-2)


# ---- When: recorded trainings ----
def recorded(monkeypatch, tmp_path, **changes):
    """A training's calls in order: ("forward" or "features", kernel or None, the gradient is kept), and its log."""
    calls = []

    class Recorded(TinyAgent):
        def features(self, obs, kernel=None):
            calls.append(("features", None if kernel is None else kernel.clone(), torch.is_grad_enabled()))
            return super().features(obs, kernel)

        def forward(self, obs, kernel=None):
            hidden = super().forward(obs, kernel)
            calls[-1] = ("forward", *calls[-1][1:])
            return hidden

    args = tiny_args("ppo_netrand", tmp_path, eval_every=0, **{"total_timesteps": 64} | changes)
    agent = netrand.train(args, ScriptedEnvs, Recorded)
    length = len(calls) // (args.total_timesteps // (args.num_envs * args.num_steps))
    return args, [calls[i : i + length] for i in range(0, len(calls), length)], metrics(tmp_path), agent


def test_one_kernel_serves_a_whole_iteration(monkeypatch, tmp_path):
    """Acting, the value after the rollout and every minibatch see the same one; the next iteration another one."""
    args, iterations, _, _ = recorded(monkeypatch, tmp_path, clean_prob=0.0)
    drawn = []
    for calls in iterations:
        acting, learning = calls[: args.num_steps + 1], calls[args.num_steps + 1 :]
        assert all(name == "forward" and kernel is not None and not grad for name, kernel, grad in acting)
        assert [grad for _, _, grad in learning] == [True, False] * (args.update_epochs * args.num_minibatches)
        assert [kernel is None for _, kernel, _ in learning] == [False, True] * (len(learning) // 2)
        used = [kernel for _, kernel, _ in calls if kernel is not None]
        assert all(torch.equal(used[0], kernel) for kernel in used)
        drawn.append(used[0])
    assert len(torch.stack(drawn).unique(dim=0)) == len(iterations) == 4


def test_a_skipped_kernel_is_still_matched(monkeypatch, tmp_path):
    """Acting, values and losses are clean, the matching is against that iteration's kernel, with its gradient."""
    args, iterations, log, _ = recorded(monkeypatch, tmp_path, clean_prob=1.0)
    for calls in iterations:
        acting, learning = calls[: args.num_steps + 1], calls[args.num_steps + 1 :]
        assert all(name == "forward" and kernel is None for name, kernel, _ in acting)
        assert [kernel is None for _, kernel, _ in learning] == [True, False] * (len(learning) // 2)
        assert all(grad for _, _, grad in learning)
    assert all(value > 0 for value in log["losses/feature_matching_loss"].values())
    assert set(log["charts/clean"].values()) == {1.0}
    assert "charts/episodic_return_clean" in log and "charts/episodic_return" not in log


def test_the_identity_mode_shows_the_policy_what_there_is(monkeypatch, tmp_path):
    _, iterations, log, _ = recorded(monkeypatch, tmp_path, clean_prob=1.0, clean_mode="identity")
    dirac = torch.nn.init.dirac_(torch.empty(3, 3, 3, 3))
    assert all(torch.equal(kernel, dirac) for calls in iterations for _, kernel, _ in calls if kernel is not None)
    assert set(log["losses/feature_matching_loss"].values()) == {0.0}
    assert set(log["charts/clean"].values()) == {1.0}


@pytest.mark.slow
def test_clean_iterations_come_as_often_as_asked_and_are_told_apart(monkeypatch, tmp_path):
    short = {"update_epochs": 1, "num_minibatches": 1, "total_timesteps": 16 * 100}
    _, iterations, log, _ = recorded(monkeypatch, tmp_path, clean_prob=0.3, **short)
    clean = np.array(list(log["charts/clean"].values()))
    assert clean.mean() == pytest.approx(0.3, abs=0.14)  # three deviations of 100 draws
    assert clean.tolist() == [float(calls[0][1] is None) for calls in iterations]
    for key, kind in (("charts/episodic_return", 0), ("charts/episodic_return_clean", 1)):
        assert list(log[key]) == [step for step, value in log["charts/clean"].items() if value == kind]


def test_how_often_is_clean_shifts_no_kernel(monkeypatch, tmp_path):
    def drawn(name, **changes):
        _, iterations, _, _ = recorded(monkeypatch, tmp_path / name, **changes)
        return torch.stack([next(kernel for _, kernel, _ in calls if kernel is not None) for calls in iterations])

    assert torch.equal(drawn("never", clean_prob=0.0), drawn("always", clean_prob=1.0))
    assert not torch.equal(drawn("one", seed=1), drawn("two", seed=2))


def test_finished_episodes_count_for_the_kind_they_end_in(tmp_path):
    """Rollouts of two steps, by turns clean and not, and episodes of three and four steps that outlast them."""

    ended = []  # (step, return, length) of each training episode

    class Envs(ScriptedEnvs):
        def __init__(self, args, split, start=0):
            super().__init__(args, split, start)
            self.step_number = start

        def step(self, actions):
            obs, reward, terminated, truncated, info = super().step(actions)
            self.step_number += 2
            ended.extend((self.step_number, *episode[1:]) for episode in info["episodes"])
            return obs, reward, terminated, truncated, info

    tiny = {"num_steps": 2, "num_minibatches": 1, "total_timesteps": 80, "eval_every": 0, "exact_every": 0}
    netrand.train(tiny_args("ppo_netrand", tmp_path, clean_prob=0.5, **tiny), Envs, TinyAgent)
    log, seen = metrics(tmp_path), {0.0: 0, 1.0: 0}
    for step, clean in log["charts/clean"].items():
        returns = [value for at, value, _ in ended if step - 4 < at <= step]
        lengths = [value for at, _, value in ended if step - 4 < at <= step]
        own, other = ("_clean", "") if clean else ("", "_clean")
        assert step not in log[f"charts/episodic_return{other}"] and step not in log[f"charts/episodic_length{other}"]
        assert log[f"charts/episodic_return{own}"].get(step) == (np.mean(returns) if returns else None)
        assert log[f"charts/episodic_length{own}"].get(step) == (np.mean(lengths) if lengths else None)
        seen[clean] += len(returns)
    assert min(seen.values()) >= 5 and sum(seen.values()) == len(ended)


# ---- Switched off ----
@pytest.mark.parametrize(
    "changes", [{}, {"anneal_lr": True, "clip_coef": 0.13, "norm_adv": False, "clip_vloss": False}]
)
def test_switched_off_it_is_the_ppo_of_mdpo(tmp_path, changes):
    """The same weights bit for bit, evaluations and returns too, from the same seed and the scripts' own networks."""
    changes = {"seed": 3, "env_id": "coinrun"} | changes
    ppo = mdpo.train(tiny_args("mdpo", tmp_path / "mdpo", num_agents=1, **changes), ScriptedEnvs)[0]
    off = netrand.train(tiny_args("ppo_netrand", tmp_path / "off", netrand=False, **changes), ScriptedEnvs)
    on = netrand.train(tiny_args("ppo_netrand", tmp_path / "on", **changes), ScriptedEnvs)
    assert torch.equal(weights(ppo), weights(off))
    assert not torch.equal(weights(ppo), weights(on))
    logged, other = metrics(tmp_path / "mdpo"), metrics(tmp_path / "off")
    assert other.keys() - logged.keys() == {"charts/clean"}
    assert all(logged[key] == other[key] for key in logged if key not in TIMES)


def test_the_clip_range_falls_linearly(monkeypatch, tmp_path):
    seen, update = [], netrand.update
    monkeypatch.setattr(netrand, "update", lambda *inputs: seen.append(inputs[4].item()) or update(*inputs))
    recorded(monkeypatch, tmp_path, anneal_clip=True, num_minibatches=1, update_epochs=1)
    assert seen == pytest.approx([0.2, 0.15, 0.1, 0.05])


def test_rewards_are_left_alone_on_demand(monkeypatch, tmp_path):
    seen, gae = [], netrand.compute_gae
    monkeypatch.setattr(netrand, "compute_gae", lambda *inputs: seen.append(inputs[0].clone()) or gae(*inputs))
    recorded(monkeypatch, tmp_path / "off", norm_reward=False)
    assert set(torch.stack(seen).unique().tolist()) <= {0.0, 1.0}
    seen.clear()
    recorded(monkeypatch, tmp_path / "on")
    assert not set(torch.stack(seen).unique().tolist()) <= {0.0, 1.0}


# ---- Test time ----
def test_the_monte_carlo_policy_is_the_mean_of_its_parts(tmp_path):
    agent, _ = made_agent(tmp_path, heads=1000.0)
    obs, some = images(3), kernels(4)
    mixed = netrand.monte_carlo_policy(agent, obs, some)
    parts = [torch.softmax(agent(obs, kernel)[0], -1) for kernel in some]
    assert mixed.shape == (3, 15) and not mixed.requires_grad
    assert torch.allclose(mixed.sum(-1), torch.ones(3))
    assert torch.allclose(mixed, (parts[0] + parts[1] + parts[2] + parts[3]) / 4, atol=1e-6)
    assert (parts[0] - parts[1]).abs().max() > 0.01  # the kernels matter
    assert torch.equal(netrand.monte_carlo_policy(agent, obs, some[:1]), parts[0])


def test_evaluation_samples_from_the_policy_it_is_asked_for(monkeypatch, tmp_path):
    """New kernels at each step, the same ones in each evaluation; with 0 samples the clean policy, without kernels."""
    args, seen, real = tiny_args("ppo_netrand", tmp_path, mc_samples=3), [], netrand.monte_carlo_policy
    agent = TinyAgent(ScriptedEnvs(args, "test"), args)
    monkeypatch.setattr(netrand, "monte_carlo_policy", lambda *inputs: seen.append(inputs[2]) or real(*inputs))
    first = netrand.evaluate(agent, args, ScriptedEnvs, "test")
    drawn = torch.stack(seen)  # [steps, 3, 3, 3, 3, 3]
    assert drawn.shape[1:] == (3, 3, 3, 3, 3)
    assert len(drawn.flatten(0, 1).unique(dim=0)) == drawn.shape[0] * drawn.shape[1]
    seen.clear()
    assert np.array_equal(first, netrand.evaluate(agent, args, ScriptedEnvs, "test"))
    assert torch.equal(drawn, torch.stack(seen))
    seen.clear()
    assert netrand.evaluate(agent, replace(args, mc_samples=0), ScriptedEnvs, "test").shape == (4,)
    assert seen == []


def test_monte_carlo_actions_follow_their_probabilities(monkeypatch, tmp_path):
    """Chi-square with 4 degrees of freedom, beyond 18.5 once in 1000."""
    wanted, steps, chosen = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05]), 5000, []

    class Envs(ScriptedEnvs):
        def __init__(self, args, split, start=0):
            super().__init__(args, split, start, num_actions=5, obs_shape=(3, 2, 2))

        def step(self, actions):
            chosen.extend(actions.tolist())
            end = np.full(self.num_envs, len(chosen) >= steps)
            episodes = [(n, 0.0, 1) for n in np.flatnonzero(end)]
            return self.observe(), np.zeros(self.num_envs), end, end, {"episodes": episodes}

    monkeypatch.setattr(netrand, "monte_carlo_policy", lambda agent, obs, kernels: wanted.expand(len(obs), 5))
    args = tiny_args("ppo_netrand", tmp_path, eval_episodes=2, mc_samples=1)
    netrand.evaluate(TinyAgent(ScriptedEnvs(args, "test"), args), args, Envs, "test")
    expected = len(chosen) * wanted
    assert (torch.tensor(chosen).bincount(minlength=5) - expected).square().div(expected).sum() < 18.5


def test_the_last_evaluation_has_both_policies_and_the_others_the_clean_one(tmp_path):
    args = tiny_args("ppo_netrand", tmp_path / "on", plain_look=True)
    netrand.train(args, ScriptedEnvs, TinyAgent)
    log, last = metrics(tmp_path / "on"), args.total_timesteps
    for split in ("test", "train", "full_look"):
        assert list(log[f"eval/{split}_return"]) == [last // 2, last]
        assert list(log[f"eval/mc_{split}_return"]) == [last]
    off = replace(args, netrand=False, plain_look=False, runs_dir=str(tmp_path / "off"))
    netrand.train(off, ScriptedEnvs, TinyAgent)
    log = metrics(tmp_path / "off")
    assert not any("mc_" in key or "full_look" in key for key in log) and "eval/train_return" in log


def test_what_compare_logs(monkeypatch, tmp_path):
    returns = {"test": np.array([1.0, 2.0]), "train": np.array([3.0, 6.0]), "full_look": np.array([7.0, 8.0])}
    monkeypatch.setattr(
        netrand, "evaluate", lambda agent, args, make_envs, split, tick: returns[split] + 10 * args.mc_samples
    )
    args = tiny_args("ppo_netrand", tmp_path, plain_look=True, mc_samples=2)
    clean = {"eval/test_return": 1.5, "eval/train_return": 4.5, "eval/full_look_return": 7.5, "eval/gap": 3.0}
    mixed = {"eval/mc_test_return": 21.5, "eval/mc_train_return": 24.5, "eval/mc_full_look_return": 27.5}
    assert netrand.compare([None], args, None) == clean | mixed | {"eval/mc_gap": 3.0}
    assert netrand.compare([None], replace(args, mc_samples=0), None) == clean
    assert netrand.compare([None], replace(args, netrand=False), None) == clean
    del clean["eval/full_look_return"]
    assert netrand.compare([None], replace(args, netrand=False, plain_look=False), None) == clean


# ---- Looks ----
def played(split, **changes):
    """Some steps of real CoinRun: frames [T, N, 3, 64, 64] and (level, reward, end) of each."""
    args = netrand.Args(num_envs=8, **changes)
    envs, rng, frames, facts = netrand.make_envs(args, split), np.random.default_rng(0), [], []
    frames.append(envs.reset()[0].copy())
    for _ in range(150):
        obs, reward, terminated, truncated, info = envs.step(rng.integers(0, 15, 8))
        frames.append(obs.copy())
        facts.append((info["level_seed"].tolist(), reward.tolist(), (terminated | truncated).tolist()))
    envs.close()
    return np.stack(frames), facts


def test_the_full_look_is_the_same_levels_with_other_pixels():
    plain, facts = played("train", plain_look=True)
    full, full_facts = played("full_look", plain_look=True)
    assert facts == full_facts and any(any(ends) for _, _, ends in facts)
    assert (plain != full).mean() > 0.3
    assert np.array_equal(plain[:, :, :, :13, :26], full[:, :, :, :13, :26])  # the velocity box


def test_the_plain_look_and_the_box_are_what_they_are_called():
    default, facts = played("train")
    painted, painted_facts = played("train", paint_vel_info=True)
    plain, plain_facts = played("train", plain_look=True)
    assert facts == painted_facts == plain_facts
    changed = (default != painted).any((0, 1, 2))
    assert changed[:13, :26].all() and changed.sum() == 13 * 26
    assert np.array_equal(painted[0], played("full_look", plain_look=True)[0][0])
    unseen, _ = played("test", plain_look=True)
    corner = slice(14, 18)  # sky
    assert len(np.unique(plain[0, :, :, corner, 60:])) < len(np.unique(default[0, :, :, corner, 60:]))
    assert len(np.unique(unseen[0, :, :, corner, 60:])) < len(np.unique(default[0, :, :, corner, 60:]))
