"""Where episodes end, every number is worked out by hand."""

import csv

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import load, replace, tiny_args

# Two environments, four steps: what is seen (the agent takes it for the value), the reward, and where an episode ends.
# Environment 0 is terminated by step 1, environment 1 truncated by step 2; a fifth image follows the rollout.
SEEN = np.array([[1, 0], [1, 2], [1, 4], [1, 0], [4, 2]])
REWARDS = np.array([[1, 0], [0, 3], [2, 0], [0, 1]])
DONES = np.array([[0, 0], [1, 0], [0, 1], [0, 0]], dtype=bool)
# With gamma = lambda = 1/2, from the last step back: delta = r + V'/2 - V (no V' at an end), A = delta + A'/4.
ADVANTAGES = np.array([[0.25, 1.5], [-1, 2], [1.75, -4], [1, 2]])
RETURNS = np.array([[1.25, 1.5], [0, 4], [2.75, 0], [2, 2]])


class FourSteps:
    """Replays the table above, again and again, for each agent."""

    def __init__(self, args, split, start=0):
        self.agents, self.t = getattr(args, "num_agents", 1), 0
        self.num_envs, self.returns, self.lengths = 2 * self.agents, np.zeros(2), np.zeros(2)
        self.single_observation_space = gym.spaces.Box(0, 255, (3, 8, 8), np.uint8)
        self.single_action_space = gym.spaces.Discrete(5)

    def observe(self, seen):
        seen = np.tile(seen.astype(np.uint8), self.agents)
        return np.broadcast_to(seen[:, None, None, None], (self.num_envs, 3, 8, 8)).copy()

    def reset(self):
        return self.observe(SEEN[0]), {}

    def step(self, actions):
        assert actions.dtype == np.int64 and actions.shape == (self.num_envs,)
        t, self.t = self.t, (self.t + 1) % 4
        return self.outcome(SEEN[t + 1], REWARDS[t], DONES[t])

    def outcome(self, seen, rewards, dones):
        """What a step returns. Environment 0 is terminated, environment 1 truncated."""
        self.returns, self.lengths = self.returns + rewards, self.lengths + 1
        ended = [(n, self.returns[n], self.lengths[n]) for n in np.flatnonzero(dones)]
        episodes = [(2 * agent + n, *rest) for agent in range(self.agents) for n, *rest in ended]
        self.returns[dones], self.lengths[dones] = 0, 0
        terminated, truncated = np.tile(dones & [True, False], self.agents), np.tile(dones & [False, True], self.agents)
        rewards = np.tile(rewards.astype(np.float32), self.agents)
        return self.observe(seen), rewards, terminated, truncated, {"episodes": episodes}

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
    assert len(batches) == agents_in(ppo) and len(rollouts) == 1  # one minibatch, one rollout of all agents
    for number, batch in enumerate(batches):
        rewards, values, dones = (table.reshape(-1, 4, 2)[number] for table in rollouts[0][:3])
        assert rewards.tolist() == REWARDS.tolist()
        assert dones.tolist() == DONES.tolist()
        assert values.flatten().tolist() == batch["values"].tolist()
        assert batch["obs"][:, 0, 0, 0].tolist() == SEEN[:4].flatten().tolist()
        assert batch["advantages"].tolist() == ADVANTAGES.flatten().tolist()
        assert batch["returns"].tolist() == RETURNS.flatten().tolist()
        assert batch["log_probs"].tolist() == pytest.approx([-np.log(5)] * 8)


def test_whole_episodes_are_counted_once(ppo, tmp_path):
    """Two rollouts: environment 0 plays 1, 2+0+1, environment 1 plays 3, 1+0+3; the unfinished ones do not count.

    An episode counts in the rollout in which it ends.
    """
    ppo.train(four_steps(ppo, tmp_path, total_timesteps=16), FourSteps, Reader)
    rows = metrics(tmp_path)
    assert (8, "charts/episodic_return", (1 + 3) / 2) in rows
    assert (8, "charts/episodic_length", (2 + 3) / 2) in rows
    assert (16, "charts/episodic_return", (3 + 4) / 2) in rows
    assert (16, "charts/episodic_length", (4 + 4) / 2) in rows
    assert (16, "charts/frames", 16.0 * agents_in(ppo)) in rows


def test_fresh_environments_cut_episodes_without_counting_them(ppo, monkeypatch, tmp_path):
    """With an exact checkpoint after each rollout, the episodes that it cuts are bootstrapped and never counted."""
    starts, returns = [], []
    gae = ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda *inputs: returns.append(gae(*inputs)[1]) or gae(*inputs))

    def make_envs(args, split, start=0):
        starts.append(start)
        return FourSteps(args, split, start)

    ppo.train(four_steps(ppo, tmp_path, total_timesteps=16, exact_every=8), make_envs, Reader)
    assert starts == [0, 8, 16]
    assert len(returns) == 2
    assert all(table.tolist() == RETURNS.tolist() for rollout in returns for table in rollout.reshape(-1, 4, 2))
    assert (16, "charts/episodic_return", (1 + 3) / 2) in metrics(tmp_path)


class UnequalEpisodes(FourSteps):
    """Environment 0 earns 1 per episode of one step, environment 1 earns 2 in four: short episodes are the poor ones.

    All later episodes earn 9.
    """

    def __init__(self, args, split, start=0):
        super().__init__(args, split)
        assert args.num_envs == 2
        self.time, self.first = np.zeros(2, dtype=int), np.ones(2, dtype=bool)

    def step(self, actions):
        self.time += 1
        done = self.time == [1, 4]
        rewards = np.where(done, np.where(self.first, [1, 2], 9), 0)
        self.time[done], self.first[done] = 0, False
        return self.outcome(SEEN[0], rewards, done)


def test_evaluation_counts_one_episode_of_each_environment(ppo, tmp_path):
    """The first two episodes to finish would be 1 and 9."""
    args = four_steps(ppo, tmp_path, eval_episodes=2)
    assert ppo.evaluate(Reader(None, None), args, UnequalEpisodes, "test").tolist() == [1, 2]


def test_a_step_ends_one_episode_and_begins_the_next_on_real_procgen(ppo):
    """EnvPool left alone needs a step more at each end, with an action that does nothing; the rest is the same."""
    args = ppo.check(ppo.Args(env_id="bigfish", distribution_mode="easy", num_envs=2, num_minibatches=1))
    args = replace(args, num_envs=1, **{"num_agents": 1} if ppo.__name__ == "mdpo" else {})
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
