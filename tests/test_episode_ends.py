"""Where episodes end, every number is worked out by hand."""

import csv

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import load, tiny_args

# Two environments, four steps: what is seen (the agent takes it for the value), the reward, and where an episode ends.
# Environment 0 is terminated by step 1, environment 1 truncated by step 2; a fifth image follows the rollout.
SEEN = np.array([[1, 0], [1, 2], [1, 4], [1, 0], [4, 2]])
REWARDS = np.array([[1, 0], [0, 3], [2, 0], [0, 1]])
DONES = np.array([[0, 0], [1, 0], [0, 1], [0, 0]], dtype=bool)
# With gamma = lambda = 1/2, from the last step back: delta = r + V'/2 - V (no V' at an end), A = delta + A'/4.
ADVANTAGES = np.array([[0.25, 1.5], [-1, 2], [1.75, -4], [1, 2]])
RETURNS = np.array([[1.25, 1.5], [0, 4], [2.75, 0], [2, 2]])


class FourSteps:
    """Replays the table above, again and again; `restart` r shows itself as r * 10 in the image after the rollout."""

    def __init__(self, args, split, restart=0):
        self.num_envs, self.t, self.restart = 2, 0, restart
        self.single_observation_space = gym.spaces.Box(0, 255, (3, 8, 8), np.uint8)
        self.single_action_space = gym.spaces.Discrete(5)

    def observe(self, seen):
        return np.broadcast_to(seen.astype(np.uint8)[:, None, None, None], (2, 3, 8, 8)).copy()

    def reset(self):
        return self.observe(SEEN[0]), {}

    def step(self, actions):
        assert actions.dtype == np.int64 and actions.shape == (2,)
        t, self.t = self.t, (self.t + 1) % 4
        terminated, truncated = DONES[t] & [True, False], DONES[t] & [False, True]
        return self.observe(SEEN[t + 1]), REWARDS[t].astype(np.float32), terminated, truncated, {}

    def close(self):
        pass


class Reader(nn.Module):
    """Takes the first pixel for the value, whatever the kernel; its policy is uniform."""

    def __init__(self, envs, args):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def features(self, obs, kernel=None):
        return obs[:, 0, 0, 0].float() * self.scale

    def heads(self, hidden):
        return torch.zeros(len(hidden), 5) * self.scale, hidden

    def forward(self, obs, kernel=None):
        return self.heads(self.features(obs, kernel))


def metrics(folder):
    with open(next(folder.glob("*/metrics.csv"))) as file:
        return [(int(row["step"]), row["key"], float(row["value"])) for row in csv.DictReader(file)]


@pytest.fixture(params=["mdpo", "ppo_netrand"])
def ppo(request, monkeypatch):
    """A PPO script with rewards left as they are."""
    module = load(request.param)
    monkeypatch.setattr(module.RewardNormaliser, "__call__", lambda self, rewards, dones: rewards)
    return module


def agents_in(script):
    """How many agents the script trains."""
    return getattr(script.Args(), "num_agents", 1)


def four_steps(script, tmp_path, **changes):
    settings = {"num_envs": 2, "num_steps": 4, "num_minibatches": 1, "update_epochs": 1, "gamma": 0.5, "eval_every": 0}
    settings |= {"gae_lambda": 0.5, "total_timesteps": 8, "exact_every": 0, "learning_rate": 0.0}
    return tiny_args(script.__name__, tmp_path, **settings | changes)


def test_compute_gae_by_hand(ppo):
    tables = (torch.as_tensor(table).float() for table in (REWARDS, SEEN[:4], DONES))
    advantages, returns = ppo.compute_gae(*tables, torch.tensor([4.0, 2.0]), gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == ADVANTAGES.tolist()
    assert returns.tolist() == RETURNS.tolist()


def test_the_rollout_holds_real_transitions_and_hand_made_targets(ppo, monkeypatch, tmp_path):
    batches, update, rollouts, gae = [], ppo.update, [], ppo.compute_gae

    def recorded(*inputs):
        *_, batch, _ = inputs  # of one agent, or a list of theirs
        batches.extend(batch if isinstance(batch, list) else [batch])
        return update(*inputs)

    monkeypatch.setattr(ppo, "update", recorded)
    monkeypatch.setattr(ppo, "compute_gae", lambda *inputs: rollouts.append(inputs) or gae(*inputs))
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    ppo.train(four_steps(ppo, tmp_path), FourSteps, Reader)
    assert len(batches) == len(rollouts) == agents_in(ppo)  # one minibatch
    for batch, (rewards, values, dones, *_) in zip(batches, rollouts, strict=True):
        assert rewards.tolist() == REWARDS.tolist()
        assert dones.tolist() == DONES.tolist()
        assert values.flatten().tolist() == batch["values"].tolist()
        assert batch["obs"][:, 0, 0, 0].tolist() == SEEN[:4].flatten().tolist()
        assert batch["advantages"].tolist() == ADVANTAGES.flatten().tolist()
        assert batch["returns"].tolist() == RETURNS.flatten().tolist()
        assert batch["log_probs"].tolist() == pytest.approx([-np.log(5)] * 8)


def test_whole_episodes_are_counted_once(ppo, tmp_path):
    """Two rollouts: environment 0 plays 1, 2+0+1, environment 1 plays 3, 1+0+3; the unfinished ones do not count."""
    ppo.train(four_steps(ppo, tmp_path, total_timesteps=16), FourSteps, Reader)
    rows = metrics(tmp_path)
    assert (8, "charts/episodic_return", (1 + 3) / 2) in rows
    assert (8, "charts/episodic_length", (2 + 3) / 2) in rows
    assert (16, "charts/episodic_return", (1 + 3 + 3 + 4) / 4) in rows
    assert (16, "charts/episodic_length", (2 + 3 + 4 + 4) / 4) in rows
    assert (16, "charts/frames", 16.0 * agents_in(ppo)) in rows


def test_fresh_environments_cut_episodes_without_counting_them(ppo, monkeypatch, tmp_path):
    """With an exact checkpoint after each rollout, the episodes that it cuts are bootstrapped and never counted."""
    restarts, returns = [], []
    gae = ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda *inputs: returns.append(gae(*inputs)[1]) or gae(*inputs))

    def make_envs(args, split, restart=0):
        restarts.append(restart)
        return FourSteps(args, split, restart)

    ppo.train(four_steps(ppo, tmp_path, total_timesteps=16, exact_every=8), make_envs, Reader)
    assert restarts == sorted([0, 1, 2] * agents_in(ppo))
    assert all(table.tolist() == RETURNS.tolist() for table in returns)
    assert (16, "charts/episodic_return", (1 + 3 + 1 + 3) / 4) in metrics(tmp_path)


class UnequalEpisodes(FourSteps):
    """Environment n earns n + 1 an episode, in (n + 1) ** 2 steps: short episodes are the poor ones."""

    def __init__(self, args, split, restart=0):
        super().__init__(args, split)
        self.time = np.zeros(2, dtype=int)

    def step(self, actions):
        self.time += 1
        done = self.time == [1, 4]
        self.time[done] = 0
        return self.observe(SEEN[0]), np.where(done, [1, 2], 0).astype(np.float32), done, np.zeros(2, dtype=bool), {}


def test_evaluation_counts_the_same_number_of_episodes_of_each_environment(ppo, tmp_path):
    """Six episodes, three of each environment: 1 1 1 and 2 2 2. The first six to finish would be 1 1 1 1 2 1."""
    returns = ppo.evaluate(Reader(None, None), four_steps(ppo, tmp_path), UnequalEpisodes, "test", 6)
    assert returns.tolist() == [1, 1, 1, 2, 2, 2]


def test_a_step_ends_one_episode_and_begins_the_next_on_real_procgen(ppo):
    """EnvPool left alone needs a step more at each end, with an action that does nothing; the rest is the same."""
    args = ppo.Args(env_id="bigfish", distribution_mode="easy", num_envs=1)
    ours, alone = ppo.make_envs(args, "train"), ppo.make_envs(args, "train").envs
    rng, ends, kept = np.random.default_rng(0), 0, []
    obs, alone_obs = ours.reset()[0], alone.reset()[0]
    for _ in range(300):
        assert np.array_equal(obs, alone_obs)
        kept.append((obs, obs.copy()))
        actions = rng.integers(0, 15, 1)
        obs, *outcome, _ = ours.step(actions)
        alone_obs, *alone_outcome, _ = alone.step(actions)
        assert outcome == alone_outcome
        if outcome[1] or outcome[2]:
            assert not np.array_equal(obs, alone_obs)  # the new episode's first image, not the old one's last
            alone_obs, reward, terminated, truncated, _ = alone.step(rng.integers(0, 15, 1))
            assert (reward, terminated, truncated) == (0, False, False)
            ends += 1
    assert ends > 0
    assert all(np.array_equal(image, copy) for image, copy in kept)  # later steps leave earlier images alone
