"""sac_sam_reset.py: each formula against a slow twin, the replay against a list, and what a run promises."""

import copy
import math
import os
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import (
    ScriptedEnvs,
    TinySac,
    assert_resumes_exactly,
    folder_in,
    load,
    metrics_of,
    ready_rows,
    replace,
    same,
    state_of,
)

sac = load("sac_sam_reset")
CPU = torch.device("cpu")


class Envs(ScriptedEnvs):
    """Frames of 12 x 12 in stacks of 3; episodes of 5 steps, each second of which fails; what ends one is shown."""

    def __init__(self, args, split, start=0):
        super().__init__(args, split, start, obs_shape=(3, 12, 12))
        self.number = 0

    def step(self, actions):
        reward = actions.sum(1)
        self.time += 1
        self.returns += reward
        ended, obs, episodes = self.time == 5, self.observe(), []
        failed = ended & (self.number % 2 == 1)
        for n in np.flatnonzero(ended):
            episodes.append((int(n), float(self.returns[n]), 5))
        self.time[ended], self.returns[ended] = 0, 0
        self.number += int(ended[0])
        following = self.observe() if ended.any() else obs
        return following, reward, failed, ended & ~failed, {"final_obs": obs, "episodes": episodes}


class Space:
    single_observation_space = gym.spaces.Box(0, 255, (3, 12, 12), np.uint8)
    single_action_space = gym.spaces.Box(-1, 1, (2,), np.float32)


def tiny(runs_dir, **changes):
    sizes = {"total_timesteps": 48, "learning_starts": 12, "batch_size": 6, "buffer_size": 30, "action_repeat": 2}
    often = {"exact_every": 12, "reset_every": 20, "eval_every": 16, "sam_rho": 0.3}
    rest = {"eval_episodes": 2, "final_eval_episodes": 2, "runs_dir": str(runs_dir), "cuda": False}
    return sac.Args(**sizes | often | rest | changes)


def go(args, make_envs=Envs, make_agent=TinySac):
    return sac.train(args, make_envs, make_agent)


# ---- Formulas ----
def test_log_probability_is_torchs_with_the_tanh_correction():
    torch.manual_seed(0)
    mean, log_std, normal = 0.5 * torch.randn(3, 64, 6, dtype=torch.float64)  # torch's inverse is lost near 1
    actions, log_probs = sac.squashed_gaussian(mean, log_std, normal)
    base = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(base, torch.distributions.TanhTransform())
    torch.testing.assert_close(actions, (mean + log_std.exp() * normal).tanh())
    torch.testing.assert_close(log_probs, squashed.log_prob(actions).sum(-1), atol=1e-6, rtol=1e-6)


def test_log_probability_is_finite_where_tanh_is_one():
    mean = torch.tensor([[40.0, -40.0]], requires_grad=True)
    actions, log_probs = sac.squashed_gaussian(mean, torch.zeros(1, 2), torch.zeros(1, 2))
    assert actions.tolist() == [[1, -1]]
    # log(1 - tanh(u)^2) is log 4 - 2 |u| there.
    assert log_probs.item() == pytest.approx(-math.log(2 * math.pi) + 2 * (80 - math.log(4)), rel=1e-6)
    log_probs.backward()
    assert mean.grad.isfinite().all()


def test_the_density_of_actions_sums_to_one():
    """By the change of variables, over a grid of actions of one dimension."""
    actions = torch.linspace(-1, 1, 200_003, dtype=torch.float64)[1:-1, None]
    mean, log_std = torch.full_like(actions, 0.3), torch.full_like(actions, -0.5)
    _, log_probs = sac.squashed_gaussian(mean, log_std, (actions.atanh() - mean) / log_std.exp())
    assert log_probs.exp().sum().item() * 2 / 200_002 == pytest.approx(1, abs=1e-4)


def test_targets_by_hand():
    """min of two, entropy, and nothing behind a failure."""
    rewards, bootstrap = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.9, 0.9, 0.0])
    next_q = torch.tensor([[10.0, 20.0, 30.0], [11.0, 18.0, 7.0]])
    log_probs, alpha = torch.tensor([-2.0, 4.0, 5.0]), torch.tensor(0.5)
    targets = sac.critic_targets(rewards, bootstrap, next_q, log_probs, alpha)
    assert targets.tolist() == pytest.approx([1 + 0.9 * (10 + 1), 2 + 0.9 * (18 - 2), 3])


# ---- Networks ----
class Task:
    single_observation_space = gym.spaces.Box(0, 255, (3, 64, 64), np.uint8)
    single_action_space = gym.spaces.Box(-1, 1, (6,), np.float32)


@pytest.fixture(scope="module")
def agent():
    torch.manual_seed(0)
    return sac.Agent(Task, sac.Args())


def count(module):
    return sum(param.numel() for param in module.parameters())


def test_parameters_are_as_many_as_the_references(agent):
    assert (count(agent.encoder), count(agent.critic), count(agent.actor)) == (388_416, 366_232, 286_882)
    assert count(agent) == 1_041_530 + 1


def test_initial_weights(agent):
    def gains(weight):
        return torch.linalg.svdvals(weight.flatten(1)).detach()

    for layer in (*agent.encoder, *agent.critic.q1, *agent.critic.q2, *agent.actor.head[:-1]):
        if hasattr(layer, "weight"):
            torch.testing.assert_close(gains(layer.weight), torch.full((min(layer.weight.flatten(1).shape),), 2**0.5))
            assert layer.bias.abs().sum() == 0
    mean, log_std = agent.actor.head[-1].weight.chunk(2)
    torch.testing.assert_close(gains(mean), torch.full((6,), 2**0.5))
    torch.testing.assert_close(gains(log_std), torch.ones(6))
    for head in (agent.critic, agent.actor):
        weight = head.project[0].weight.detach()
        assert weight.std().item() == pytest.approx(4096**-0.5, rel=0.01)
        assert weight.abs().max() < 2.28 * 4096**-0.5
        assert head.project[1].eps == 1e-6
    assert agent.log_alpha.exp().item() == pytest.approx(0.1)


def test_encoder_pads_behind_as_flax_does(agent):
    """Beside Flax's SAME written out, with kernels and the last layer's places turned round."""
    image = torch.rand(2, 3, 64, 64)
    hidden = image
    for layer in agent.encoder:
        if isinstance(layer, nn.Conv2d):
            padded = nn.functional.pad(hidden, (0, 1, 0, 1))
            hidden = nn.functional.conv2d(padded, layer.weight.flip(2, 3), layer.bias, stride=2).relu()
    assert hidden.shape == (2, 256, 4, 4)
    torch.testing.assert_close(agent.encoder(image), hidden.flip(2, 3).flatten(1), atol=1e-5, rtol=1e-4)


def test_log_std_stays_in_its_range(agent):
    hidden = 100 * torch.randn(32, 4096)
    agent = copy.deepcopy(agent)
    agent.actor.head[-1].bias.data[6:] = torch.tensor([-1e3, 1e3, 0, 0, 0, 0])
    mean, log_std = agent.actor(hidden)
    assert mean.shape == log_std.shape == (32, 6)
    assert log_std[:, 0].unique().tolist() == [-10] and log_std[:, 1].unique().tolist() == [2]


def test_greedy_actions_are_the_mean(agent):
    obs = torch.randint(0, 256, (4, 3, 64, 64)).byte()
    mean, log_std = agent.actor(agent.encoder(sac.to_pixels(obs)))
    normal = torch.randn(4, 6)
    assert torch.equal(sac.act(agent, obs)["actions"], mean.tanh())
    torch.testing.assert_close(sac.act(agent, obs, normal)["actions"], (mean + log_std.exp() * normal).tanh())


# ---- Update ----
def filled(args, steps=24):
    rng = np.random.default_rng(0)
    replay = sac.Replay(args.buffer_size, (3, 12, 12), 2, args, CPU, Path(args.runs_dir) / "replay.bin")
    replay.begin(rng.integers(0, 256, (12, 12), dtype=np.uint8))
    for step in range(steps):
        frame, action = rng.integers(0, 256, (12, 12), dtype=np.uint8), rng.uniform(-1, 1, 2).astype(np.float32)
        replay.add(action, float(rng.normal()), step % 8 == 7, frame)
        if step % 4 == 3:
            replay.begin(frame)
    return replay


def parts_of(args, make_agent=TinySac):
    torch.manual_seed(0)
    agent = make_agent(Space, args)
    target = nn.ModuleDict({"encoder": agent.encoder, "critic": agent.critic})
    target = copy.deepcopy(target).requires_grad_(False)
    for value in target.parameters():
        value.add_(0.1 * torch.randn_like(value))
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True)
    return agent, target, optimizer, filled(args)


def draws_of(args, replay):
    torch.manual_seed(1)
    rows = replay.sample(torch.rand(args.batch_size, dtype=torch.float64))
    offsets = torch.randint(9, (2, args.batch_size, 2))
    return {"rows": rows, "offsets": offsets, "normal": torch.randn(2, args.batch_size, 2)}


def plain_sac(agent, target, replay, draws, args):
    """What an update does, in the order of the reference, with torch's own distributions and plain gradients.

    -> {name: gradient that Adam is given}, losses; the agent's weights move by a copy of Adam's first step.
    """
    rows, (obs_at, next_at), (normal, next_normal) = draws["rows"].tolist(), draws["offsets"], draws["normal"]
    batch = replay.gather(draws["rows"])

    def crops(key, offsets):
        padded = nn.functional.pad(batch[key].double(), (4, 4, 4, 4), mode="replicate")
        return torch.stack([x[:, i : i + 12, j : j + 12] for x, (i, j) in zip(padded, offsets.tolist(), strict=True)])

    obs, next_obs = crops("obs", obs_at) / 255, crops("next_obs", next_at) / 255
    alpha = agent.log_alpha.exp().item()

    def policy(hidden, noise):
        mean, log_std = agent.actor(hidden)
        base = torch.distributions.Normal(mean, log_std.exp())
        squashed = torch.distributions.TransformedDistribution(base, torch.distributions.TanhTransform(cache_size=1))
        actions = squashed.transforms[0](mean + log_std.exp() * noise)
        return actions, squashed.log_prob(actions).sum(-1)

    with torch.no_grad():
        actions, log_probs = policy(agent.encoder(next_obs), next_normal)
        q1, q2 = target.critic(target.encoder(next_obs), actions)
        failed = torch.tensor([bool(replay.rows["dones"][row % args.buffer_size]) for row in rows])
        y = batch["rewards"] + args.gamma * (~failed) * (torch.minimum(q1, q2) - alpha * log_probs)

    def critic_loss():
        q1, q2 = agent.critic(agent.encoder(obs), batch["actions"])
        return ((q1 - y) ** 2 + (q2 - y) ** 2).mean()

    def actor_loss():
        with torch.no_grad():
            hidden = agent.encoder(obs)
        actions, log_probs = policy(hidden, normal)
        q1, q2 = agent.critic(hidden, actions)
        entropies.append(-log_probs.mean().item())
        return (alpha * log_probs - torch.minimum(q1, q2)).mean()

    def gradients(loss_of, params, sam):
        gradient = torch.autograd.grad(loss_of(), params)
        if sam:
            before = [param.detach().clone() for param in params]
            norm = torch.cat([part.flatten() for part in gradient]).norm()
            for param, part in zip(params, gradient, strict=True):
                param.data = param.data + args.sam_rho * part / norm
            gradient = torch.autograd.grad(loss_of(), params)
            for param, old in zip(params, before, strict=True):
                param.data = old
        return gradient

    def adam(params, gradient):
        for param, part in zip(params, gradient, strict=True):
            param.data = param.data - args.learning_rate * part / (part.abs() + args.adam_eps)
        return [0.1 * part for part in gradient]

    entropies, moments = [], {}
    critic = [*agent.encoder.parameters(), *agent.critic.parameters()]
    moments["critic"] = adam(critic, gradients(critic_loss, critic, args.sam and args.sam_on in ("both", "critic")))
    for old, new in zip(target.parameters(), critic, strict=True):
        old.copy_(args.tau * new.detach() + (1 - args.tau) * old)
    actor = list(agent.actor.parameters())
    moments["actor"] = adam(actor, gradients(actor_loss, actor, args.sam and args.sam_on in ("both", "actor")))
    surplus = torch.tensor(alpha * (entropies[-1] + 2))  # d/d log alpha of alpha (entropy - target)
    moments["alpha"] = adam([agent.log_alpha], [surplus])
    return moments


SAM = [{"sam": False}, {"sam_on": "both"}, {"sam_on": "critic"}, {"sam_on": "actor"}]


@pytest.mark.parametrize("changes", SAM, ids=str)
def test_update_is_the_plain_one(tmp_path, monkeypatch, changes):
    """In double precision, or rounding would hide what is small."""
    monkeypatch.setattr(sac, "to_pixels", lambda obs: obs.double() / 255)
    args = tiny(tmp_path, **changes)
    (agent, target, optimizer, replay), (twin, twin_target, _, _) = parts_of(args), parts_of(args)
    for network in (agent, target, twin, twin_target):
        network.double()
    draws = draws_of(args, replay)
    draws["normal"] = draws["normal"].double()
    sac.update(agent, target, optimizer, replay, draws, args)
    moments = plain_sac(twin, twin_target, replay, draws, args)
    own = [*agent.encoder.parameters(), *agent.critic.parameters(), *agent.actor.parameters(), agent.log_alpha]
    expected = [*moments["critic"], *moments["actor"], *moments["alpha"]]
    for param, moment in zip(own, expected, strict=True):
        assert optimizer.state[param]["step"] == 1
        assert (optimizer.state[param]["exp_avg"] - moment).norm() <= 1e-6 * moment.norm()
    for one, two in ((agent, twin), (target, twin_target)):
        for (name, value), other in zip(one.named_parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(value, other, atol=1e-6, rtol=1e-6, msg=name)


def test_no_gradient_of_the_actor_reaches_the_encoder(tmp_path):
    """With the critic's loss switched off, what the actor learns leaves encoder and critic as they are."""
    args = tiny(tmp_path)
    agent, target, optimizer, replay = parts_of(args)
    draws, seen = draws_of(args, replay), []
    for param in (*agent.encoder.parameters(), *agent.critic.parameters()):
        param.register_hook(lambda gradient: seen.append(1) or gradient * 0)
    before = copy.deepcopy(agent)
    sac.update(agent, target, optimizer, replay, draws, args)
    assert len(seen) == 2 * len([*agent.encoder.parameters(), *agent.critic.parameters()])  # SAM's two passes
    for name, value in agent.named_parameters():
        assert torch.equal(value, before.get_parameter(name)) == (not name.startswith(("actor", "log_alpha"))), name


def test_temperature_falls_when_the_entropy_is_above_its_target(tmp_path):
    args = tiny(tmp_path, learning_rate=0.01, sam=False)
    for falls in (True, False):
        agent, target, optimizer, replay = parts_of(args)
        agent.actor.head[-1].weight.data.zero_()
        agent.actor.head[-1].bias.data[2:] = math.atanh(4 / 6 - 0.1) if falls else -100.0  # std e^-0.6 or e^-10
        before = agent.log_alpha.item()
        logged = sac.update(agent, target, optimizer, replay, draws_of(args, replay), args)
        assert (logged["entropy"].item() > -2) == falls
        assert (agent.log_alpha.item() < before) == falls


def test_reset_touches_what_it_lists(tmp_path):
    args = tiny(tmp_path)
    agent, target, optimizer, replay = parts_of(args)
    sac.update(agent, target, optimizer, replay, draws_of(args, replay), args)
    before = copy.deepcopy((agent, target, optimizer.state_dict()))
    fresh = TinySac(Space, args)
    sac.reset_agent(agent, target, optimizer, fresh)
    assert agent.log_alpha.exp().item() == pytest.approx(0.1)
    for i, (name, value) in enumerate(agent.named_parameters()):
        kept = name.startswith("encoder")
        assert torch.equal(value, (before[0] if kept else fresh).get_parameter(name)), name
        for key, moment in optimizer.state_dict()["state"][i].items():
            assert torch.equal(moment, before[2]["state"][i][key] if kept else torch.zeros_like(moment)), (name, key)
    for name, value in target.named_parameters():
        kept = name.startswith("encoder")
        assert torch.equal(value, before[1].get_parameter(name) if kept else fresh.get_parameter(name)), name


def test_resets_come_on_schedule_and_not_with_the_last_step(tmp_path, monkeypatch):
    calls, updates, reset, update = [], [], sac.reset_agent, sac.update
    monkeypatch.setattr(sac, "reset_agent", lambda *args: (calls.append(len(updates)), reset(*args)))
    monkeypatch.setattr(sac, "update", lambda *args: (updates.append(1), update(*args))[1])
    go(tiny(tmp_path / "1", reset_every=12))
    assert len(updates) == 48 - 12 and calls == [12, 24]
    calls.clear(), updates.clear()
    go(tiny(tmp_path / "2", reset_every=24, replay_ratio=2))
    assert len(updates) == 2 * (48 - 12) and calls == [24, 48]


# ---- Replay ----
@pytest.mark.parametrize("capacity", [200, 40, 23])
def test_replay_is_a_list_of_transitions(capacity, tmp_path, monkeypatch):
    """The newest ones, their stacks and bootstraps, through ends of both kinds, a break, and the file in blocks."""
    monkeypatch.setattr(sac, "BLOCK", 4)
    rng, args = np.random.default_rng(1), sac.Args(gamma=0.9)
    path, rows = tmp_path / "replay.bin", []
    replay = sac.Replay(capacity, (3, 6, 6), 2, args, CPU, path)

    def frame():
        return rng.integers(0, 256, (6, 6), dtype=np.uint8)

    def check(replay):
        held = {row: about for row, about in rows if row >= replay.size + 3 - capacity}
        found = replay.sample((torch.arange(4 * capacity, dtype=torch.float64) + 0.5) / (4 * capacity))
        assert sorted(set(found.tolist())) == sorted(held)
        counts = found.bincount()[found.unique()]
        assert counts.max() - counts.min() <= 1  # each as likely
        batch = replay.gather(torch.tensor(sorted(held)))
        for i, row in enumerate(sorted(held)):
            obs, action, reward, failed, next_obs = held[row]
            assert np.array_equal(batch["obs"][i], obs) and np.array_equal(batch["next_obs"][i], next_obs)
            assert np.array_equal(batch["actions"][i], action) and batch["rewards"][i] == reward
            assert batch["bootstrap"][i].item() == pytest.approx(0 if failed else 0.9)

    size = 0
    for number in range(14):
        stack = np.repeat(frame()[None], 3, axis=0)
        replay.begin(stack[-1])
        for time in range(length := int(rng.integers(1, 12))):
            action, reward = rng.uniform(-1, 1, 2).astype(np.float32), float(np.float32(rng.normal()))
            failed, following = bool(time == length - 1 and number % 2), np.concatenate([stack[1:], frame()[None]])
            replay.add(action, reward, failed, following[-1])
            rows.append((size, (stack, action, reward, failed, following)))
            size, stack = size + 1, following
            check(replay)
        if number in (4, 9):  # saved in the middle of an episode; what is under way ends there
            other = sac.Replay(capacity, (3, 6, 6), 2, args, CPU, path)
            other.load_state_dict(replay.state_dict())
            assert np.array_equal(ready_rows(other), ready_rows(replay))
            replay = other
            check(replay)
        size += 1  # the last observation's row
    assert replay.size == size - 1
    replay.begin(frame())
    replay.begin(frame())  # of environments made anew: nothing was under way yet
    assert replay.size == size
    check(replay)


def test_a_replay_that_is_shorter_than_its_checkpoint_is_refused(tmp_path, capsys):
    replay = filled(tiny(tmp_path))
    state = replay.state_dict()
    for path, rows in ((replay.path, 1), (tmp_path / "nowhere.bin", 0)):
        replay.path = path
        with pytest.raises(SystemExit, match=r"^2$"):
            replay.load_state_dict({**state, "size": state["size"] + rows})
        assert capsys.readouterr().err.count("\n") == 1


def test_what_a_failed_save_left_behind_is_written_over(tmp_path):
    """Rows of no checkpoint are cut off; the row that was under way is there at any time."""
    replay = filled(tiny(tmp_path), steps=10)
    state, content = replay.state_dict(), replay.path.read_bytes()
    replay.path.write_bytes(content + b"torn")
    again = sac.Replay(30, (3, 12, 12), 2, tiny(tmp_path), CPU, replay.path)
    again.load_state_dict(state)
    assert again.state_dict() == state and replay.path.read_bytes() == content
    again.add(np.zeros(2, np.float32), 1.0, False, np.zeros((12, 12), np.uint8))
    again.state_dict()
    assert len(replay.path.read_bytes()) == len(content) + replay.row.itemsize
    replay.load_state_dict(state)  # a kill here leaves the older checkpoint, which still finds its rows


def test_a_reward_that_is_not_finite_is_never_saved(tmp_path, capsys):
    class Broken(Envs):
        def step(self, actions):
            obs, reward, *rest = super().step(actions)
            return obs, reward * np.nan, *rest

    args = tiny(tmp_path, learning_starts=40, eval_every=0)
    with pytest.raises(SystemExit) as ended:
        go(args, Broken)
    assert "is nan" in ended.value.code or "not finite" in ended.value.code
    folder = folder_in(tmp_path)
    assert not (folder / "replay.bin").exists() and not (folder / "checkpoint.pt").exists()
    replay = filled(args)
    replay.state_dict()
    before = replay.path.read_bytes()
    replay.add(np.zeros(2, np.float32), math.inf, False, np.zeros((12, 12), np.uint8))
    with pytest.raises(SystemExit, match="a reward is not finite"):
        replay.state_dict()
    assert replay.path.read_bytes() == before


# ---- Runs ----
def test_time_limits_bootstrap_and_failures_do_not(tmp_path, monkeypatch):
    """Each transition is the one that was played: its last observation is not the next episode's first."""
    replays, init = [], sac.Replay.__init__
    monkeypatch.setattr(sac.Replay, "__init__", lambda self, *args: (replays.append(self), init(self, *args))[1])
    played = []

    class Seen(Envs):
        def step(self, actions):
            outcome = super().step(actions)
            played.append((actions[0], outcome[1][0], outcome[2][0], outcome[4]["final_obs"][0, -1]))
            return outcome

    go(tiny(tmp_path, buffer_size=100, eval_every=0, exact_every=0), Seen)
    replay = replays[0]
    rows = torch.from_numpy(ready_rows(replay))
    batch = replay.gather(rows)
    assert len(rows) == len(played) == 48
    for i, (action, reward, failed, frame) in enumerate(played):
        assert np.array_equal(batch["actions"][i], action) and batch["rewards"][i] == reward
        assert batch["bootstrap"][i].item() == pytest.approx(0 if failed else 0.99)
        assert np.array_equal(batch["next_obs"][i, -1], frame)
    assert [i + 1 for i in range(48) if batch["bootstrap"][i] == 0] == [10, 20, 30, 40]


def test_resumed_bit_for_bit(tmp_path):
    assert_resumes_exactly(tmp_path, go, tiny, Envs, exact_step=25)


def test_what_is_off_changes_nothing(tmp_path):
    """Without SAM its settings mean nothing, and a reset that never comes is none: SAC, whose twin is above."""
    go(tiny(tmp_path / "off", sam=False, reset_every=0))
    go(tiny(tmp_path / "never", sam=False, sam_rho=3.0, sam_on="actor", reset_every=10**6))
    off, never = folder_in(tmp_path / "off"), folder_in(tmp_path / "never")
    assert same(state_of(off), state_of(never)) and metrics_of(off) == metrics_of(never)


def test_each_update_draws_anew(tmp_path, monkeypatch):
    """Rows, offsets of both observations and noise; what is drawn covers its range."""
    drawn, update = [], sac.update
    monkeypatch.setattr(sac, "update", lambda *args: (drawn.append(args[4]), update(*args))[1])
    go(tiny(tmp_path, total_timesteps=112, eval_every=0, exact_every=0, batch_size=16, sam=False))
    offsets, normal = (torch.stack([draws[key] for draws in drawn]) for key in ("offsets", "normal"))
    assert offsets.shape == (100, 2, 16, 2) and offsets.unique().tolist() == list(range(2 * sac.PAD + 1))
    assert normal.shape == (100, 2, 16, 2)
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05
    for values in (offsets.double(), normal):  # neither update nor observation repeats another's
        assert values.flatten(2).unique(dim=0).shape[0] == 100
        assert abs(torch.corrcoef(values.transpose(0, 1).flatten(1))[0, 1]) < 0.1
    assert not torch.equal(drawn[0]["rows"], drawn[1]["rows"])


def test_training_samples_actions_and_evaluation_does_not(tmp_path, monkeypatch):
    """Evaluated are the same ten test episodes, whatever the run's seed."""
    noise, act, evaluated = [], sac.act, []
    monkeypatch.setattr(sac, "act", lambda agent, obs, *normal: (noise.append(normal), act(agent, obs, *normal))[1])

    class Seen(Envs):
        def __init__(self, args, split, start=0):
            super().__init__(args, split, start)
            if split == "test":
                evaluated.append((args.seed, args.num_envs))

    for seed in (1, 2):
        go(tiny(tmp_path / str(seed), seed=seed, total_timesteps=40, eval_every=40, exact_every=0), Seen)
    assert evaluated == [(42, 1)] * 2
    sampled = [normal for (normal,) in filter(None, noise)]
    assert len(sampled) == 2 * (40 - 12) and noise.count(()) == 2 * 2 * 5  # evaluations, episodes, steps
    assert torch.cat(sampled).unique(dim=0).shape[0] == len(sampled)
    assert abs(torch.cat(sampled).std() - 1) < 0.2


def test_the_random_steps_fill_the_range(tmp_path):
    seen = []

    class Seen(Envs):
        def step(self, actions):
            seen.append(actions[0])
            assert actions.dtype == np.float32 and actions.shape == (1, 2)
            return super().step(actions)

    args = tiny(tmp_path, total_timesteps=220, learning_starts=210, eval_every=0, exact_every=0)
    go(args, Seen)
    random = np.array(seen[:210])
    assert np.abs(random).max() <= 1 and np.abs(random.mean(0)).max() < 0.15
    assert np.abs(random.var(0) - 1 / 3).max() < 0.06


def test_an_agent_can_add_weight_decay_by_hooks(tmp_path):
    class Decayed(TinySac):
        def __init__(self, *args):
            super().__init__(*args)
            for param in self.parameters():
                param.register_hook(lambda gradient, param=param: gradient + 0.5 * param)

    args, moments = tiny(tmp_path, sam=False), []
    for make_agent in (TinySac, Decayed):
        agent, target, optimizer, replay = parts_of(args, make_agent)
        before = [param.detach().clone() for param in agent.critic.parameters()]
        sac.update(agent, target, optimizer, replay, draws_of(args, replay), args)
        moments.append([optimizer.state[param]["exp_avg"] for param in agent.critic.parameters()])
    for plain, decayed, w in zip(*moments, before, strict=True):
        torch.testing.assert_close(decayed - plain, 0.1 * 0.5 * w, atol=1e-6, rtol=1e-4)


# ---- Tasks ----
DMC_M = "acrobot-swingup cartpole-swingup_sparse cheetah-run finger-turn_easy finger-turn_hard hopper-hop quadruped-run"
DMC_M += " quadruped-walk reacher-easy reacher-hard walker-run"


def test_the_papers_settings(tmp_path):
    """Frames per step, rho and steps of DMC-M, of PlaNet's other tasks and of the rest; flags come first."""

    def of(env_id, **changes):
        args = sac.check(sac.Args(env_id=env_id, runs_dir=str(tmp_path), **changes))
        assert sac.check(args) == args and args.env_id in sac.TASKS.split()
        return args.action_repeat, args.sam_rho, args.total_timesteps

    assert of("cheetah-run") == of("cheetah_run") == (4, 0.002, 500_000)
    assert of("reacher-easy") == (4, 0.01, 500_000)
    assert len(DMC_M.split()) == 11
    for task in {*DMC_M.split()} - {"cheetah-run", "reacher-easy"}:
        assert of(task) == of(task.replace("-", "_")) == of(task.replace("_", "-").upper()) == (2, 0.01, 1_000_000)
    assert of("cartpole-swingup") == (8, 0.01, 250_000) and of("ball_in_cup_catch") == (4, 0.01, 500_000)
    assert of("walker-walk") == (2, 0.01, 1_000_000)
    assert of("cheetah-run", action_repeat=2, sam_rho=0.1, total_timesteps=7) == (2, 0.1, 7)
    assert of("cheetah-run", action_repeat=2) == (2, 0.002, 1_000_000)


def test_the_papers_table():
    """Table 5 and the reference's values, number by number."""
    table = {"batch_size": 512, "learning_rate": 3e-4, "adam_eps": 1e-8, "gamma": 0.99, "tau": 0.005}
    table |= {"initial_alpha": 0.1, "learning_starts": 999, "buffer_size": 100_000, "replay_ratio": 1}
    table |= {"reset_every": 100_000, "sam": True, "sam_on": "both", "eval_every": 5000, "eval_episodes": 10}
    assert table.items() <= vars(sac.Args()).items()


@pytest.fixture(scope="module")
def suite():
    return sac.import_suite()


def test_the_tasks_are_the_suites(suite):
    ours = {tuple(task.split("-")) for task in sac.TASKS.split()}
    assert ours == {(domain, task) for domain, task in suite.ALL_TASKS if domain != "lqr"}
    assert {*sac.ACTION_REPEAT, *sac.SAM_RHO, *DMC_M.split()} <= {*sac.TASKS.split()}


@pytest.mark.parametrize(("env_id", "camera"), [("reacher_easy", 0), ("quadruped-walk", 2)])
def test_an_episode_of_the_suite(suite, env_id, camera):
    """Beside the same task without the wrapper: gray frames, sums of rewards, scaled actions, the end.

    The last action is repeated 100 times only, as the episode's 1,000 frames are over.
    """
    args = sac.check(sac.Args(env_id=env_id, action_repeat=300, seed=3, num_envs=1))
    envs, rng = sac.make_envs(args, "train", 2), np.random.default_rng(0)
    seed = int(np.random.SeedSequence((3, 0, 2)).generate_state(1)[0])
    bare = suite.load(*args.env_id.split("-"), task_kwargs={"random": seed})

    def gray():
        pixels = bare.physics.render(64, 64, camera_id=camera).astype(float)
        return (0.299 * pixels[..., 0] + 0.587 * pixels[..., 1] + 0.114 * pixels[..., 2]).astype(np.uint8)

    def close(one, two):
        assert np.abs(one.astype(int) - two.astype(int)).max() <= 1  # some drivers round otherwise now and then

    bare.reset()
    obs, _ = envs.reset()
    close(obs[0], np.stack([gray()] * 3))
    kept, copies, rewards = [obs], [obs.copy()], []
    for step in range(1, 5):
        actions = rng.uniform(-1, 1, (1, *envs.single_action_space.shape)).astype(np.float32)
        before = obs
        obs, reward, terminated, truncated, info = envs.step(actions)
        spec, total = bare.action_spec(), 0.0
        scaled = spec.minimum + (actions[0].astype(float) + 1) / 2 * (spec.maximum - spec.minimum)
        for _ in range(300 if step < 4 else 100):
            moment = bare.step(scaled)
            total += moment.reward
        assert reward[0] == pytest.approx(total, abs=1e-4) and reward.dtype == np.float32
        rewards.append(float(reward[0]))
        assert not terminated[0] and truncated[0] == moment.last() == (step == 4)
        assert info["episodes"] == ([] if step < 4 else [(0, pytest.approx(sum(rewards)), 4)])
        close(info["final_obs"][0, -1], gray())
        assert np.array_equal(info["final_obs"][0, :2], before[0, 1:])
        kept.append(obs), copies.append(obs.copy())
    bare.reset()
    close(obs[0], np.stack([gray()] * 3))
    assert all(np.array_equal(image, copied) for image, copied in zip(kept, copies, strict=True))
    envs.close()


def test_gray_loses_its_fractions():
    pixels = np.broadcast_to(np.uint8([10, 1, 0]), (64, 64, 3))  # 2.99 + 0.587
    physics = SimpleNamespace(render=lambda height, width, camera_id: pixels)
    spec = SimpleNamespace(minimum=-np.ones(2), maximum=np.ones(2), shape=(2,))
    env = SimpleNamespace(physics=physics, action_spec=lambda: spec)
    assert np.array_equal(sac.ControlEnvs([env], 1, camera=0).frame(env), np.full((64, 64), 3))


def test_the_first_renderer_that_works_is_taken(suite, monkeypatch, capsys):
    """The one that MUJOCO_GL names, or EGL, or OSMesa, looked for once; with none, one line says what to do."""
    tried, working = [], set()

    class Probe:
        def __init__(self, command, env, **_):
            tried.append(env["MUJOCO_GL"])
            self.returncode, self.stderr = env["MUJOCO_GL"] not in working, "Traceback\nno display\n"

    monkeypatch.setattr(sac.subprocess, "run", Probe)
    assert sac.import_suite() is suite and not tried
    sac.import_suite.cache_clear()
    for wanted, says in (("", "MUJOCO_GL=egl: no display; MUJOCO_GL=osmesa"), ("GLFW", "MUJOCO_GL=glfw: no display")):
        monkeypatch.setenv("MUJOCO_GL", wanted)
        with pytest.raises(SystemExit, match=r"^2$"):
            sac.import_suite()
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    working |= {"osmesa"}
    monkeypatch.delenv("MUJOCO_GL")
    assert sac.import_suite() is suite
    assert os.environ["MUJOCO_GL"] == "osmesa" and tried == ["egl", "osmesa", "glfw", "egl", "osmesa"]


def test_wrong_flags_say_so_in_one_line(tmp_path, capsys):
    for changes in ({"env_id": "cheetah-rum"}, {"num_envs": 2}, {"buffer_size": 7}, {"learning_starts": 0}):
        with pytest.raises(SystemExit) as refused:
            go(replace(tiny(tmp_path), **changes))
        assert refused.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())
