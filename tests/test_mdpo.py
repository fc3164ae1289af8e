"""Each formula of mdpo.py against a slow twin written from the paper, and the method against its baselines."""

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ScriptedEnvs, TinyAgent, load, tiny_args, weights

mdpo = load("mdpo")


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def batch_of(size, seed=0):
    """A minibatch whose ratios and values lie on both sides of their clips."""
    rng = torch.Generator().manual_seed(seed)
    keys = ("log_probs", "values", "advantages", "returns")
    batch = {key: draw(size, seed=10 * seed + i) for i, key in enumerate(keys)}
    batch["log_probs"] = batch["log_probs"] * 0.5 - 2.7
    batch["obs"] = torch.randint(0, 256, (size, 3, 64, 64), generator=rng, dtype=torch.uint8)
    batch["actions"] = torch.randint(0, 15, (size,), generator=rng)
    return batch


def make_agents(count, args, make_agent=TinyAgent):
    torch.manual_seed(0)
    return [make_agent(ScriptedEnvs(args, "train"), args) for _ in range(count)]


def adam(agents, lr=5e-4, **settings):
    return torch.optim.Adam([p for agent in agents for p in agent.parameters()], lr=lr, eps=1e-5, **settings)


def gradient(agent):
    return torch.cat([p.grad.flatten() for p in agent.parameters()])


# The formulas.
def test_distillation_loss_is_the_kl_of_the_peer_to_oneself():
    logits, peer_logits = draw(6, 4, seed=1), draw(6, 4, seed=2)
    own, peer = (np.exp(x.double().numpy()) for x in (logits, peer_logits))
    total = 0.0
    for q, p in zip(own, peer, strict=True):
        q, p = q / q.sum(), p / p.sum()
        total += sum(p[a] * np.log(p[a] / q[a]) for a in range(4))
    assert mdpo.distillation_loss(logits, peer_logits).item() == pytest.approx(total / 6, rel=1e-5)


def test_the_gradient_of_each_kl_reaches_both_agents():
    logits, peer_logits = draw(6, 4, seed=1).requires_grad_(), draw(6, 4, seed=2).requires_grad_()
    mdpo.distillation_loss(logits, peer_logits).backward()
    q, p = logits.detach().softmax(-1), peer_logits.detach().softmax(-1)
    log_ratio = p.log() - q.log()
    assert torch.allclose(logits.grad, (q - p) / 6, atol=1e-6)
    assert torch.allclose(peer_logits.grad, p * (log_ratio - (p * log_ratio).sum(-1, keepdim=True)) / 6, atol=1e-6)


def test_identical_agents_have_nothing_to_teach():
    agent, peer = make_agents(2, mdpo.Args(), mdpo.Agent)
    peer.load_state_dict(agent.state_dict())
    obs = batch_of(8)["obs"]
    loss = mdpo.distillation_loss(agent(obs)[0], peer(obs)[0])
    loss.backward()
    assert loss.item() == 0
    for network in (agent, peer):
        assert max(p.grad.norm() for p in network.parameters() if p.grad is not None) < 1e-7


def test_policy_losses():
    log_probs, old, advantages = draw(200, seed=3), draw(200, seed=4), draw(200, seed=5)
    clipped = spo = 0.0
    for new, before, advantage in zip(log_probs.tolist(), old.tolist(), advantages.tolist(), strict=True):
        ratio = np.exp(new - before)
        clipped -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage) / 200
        spo -= (ratio * advantage - abs(advantage) * (ratio - 1) ** 2 / (2 * 0.2)) / 200
    assert mdpo.clipped_policy_loss(log_probs, old, advantages, 0.2).item() == pytest.approx(clipped, rel=1e-5)
    assert mdpo.spo_policy_loss(log_probs, old, advantages, 0.2).item() == pytest.approx(spo, rel=1e-5)


def test_spo_is_content_at_the_clipping_range():
    """Its gradient vanishes at ratio 1 + epsilon for a good action and at 1 - epsilon for a bad one."""
    log_probs = torch.tensor([1.2, 0.8]).log().requires_grad_()
    mdpo.spo_policy_loss(log_probs, torch.zeros(2), torch.tensor([3.0, -3.0]), 0.2).backward()
    assert log_probs.grad.abs().max() < 1e-5


def test_clipped_value_loss():
    values, old, returns = draw(200, seed=6), draw(200, seed=7), draw(200, seed=8)
    total = 0.0
    for value, before, target in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
        near = before + min(max(value - before, -0.2), 0.2)
        total += 0.5 * max((value - target) ** 2, (near - target) ** 2) / 200
    assert mdpo.clipped_value_loss(values, old, returns, 0.2).item() == pytest.approx(total, rel=1e-5)
    plain = 0.5 * (values - returns).square().mean()
    assert mdpo.clipped_value_loss(values, old, returns, float("inf")).item() == pytest.approx(plain.item())


def test_gae_is_the_weighted_sum_of_all_later_errors():
    T, N, gamma, lam = 12, 3, 0.99, 0.9
    rewards, values, last = draw(T, N, seed=9), draw(T, N, seed=10), draw(N, seed=11)
    dones = (draw(T, N, seed=12) > 0.5).float()
    assert 3 < dones.sum() < 20
    expected = torch.zeros(T, N)
    for n in range(N):
        for t in range(T):
            for k in range(t, T):
                following = last[n] if k == T - 1 else values[k + 1, n]
                delta = rewards[k, n] + gamma * following * (1 - dones[k, n]) - values[k, n]
                expected[t, n] += (gamma * lam) ** (k - t) * delta
                if dones[k, n]:
                    break
    advantages, returns = mdpo.compute_gae(rewards, values, dones, last, gamma, lam)
    assert torch.allclose(advantages, expected, atol=1e-5)
    assert torch.allclose(returns, expected + values, atol=1e-5)


def test_reward_normaliser_divides_by_the_deviation_of_all_discounted_returns_so_far():
    """A prior of weight 1e-4 with mean 0 and variance 1, then each return of each environment with weight 1."""
    rng, normaliser, running, seen = np.random.default_rng(0), mdpo.RewardNormaliser(2, 4, 0.9), np.zeros(4), []
    for _ in range(50):
        rewards, dones = rng.normal(0, 3, 4) * (rng.random(4) < 0.5), rng.random(4) < 0.2
        running = running * 0.9 + rewards
        seen.extend(running)
        weight = len(seen) + 1e-4
        mean = sum(seen) / weight
        variance = (sum((x - mean) ** 2 for x in seen) + 1e-4 * (1 + mean**2)) / weight
        expected = [min(max(r / (variance + 1e-8) ** 0.5, -10), 10) for r in rewards]
        other = rng.normal(0, 100, 4)  # a second agent's, which shifts nothing of the first one's
        assert normaliser(np.stack([rewards, other]), np.stack([dones, dones]))[0] == pytest.approx(expected, rel=1e-9)
        running[dones] = 0


def test_rewards_are_clipped_at_ten():
    normaliser = mdpo.RewardNormaliser(1, 100, 0.9)
    rewards, dones = np.zeros((1, 100)), np.zeros((1, 100), dtype=bool)
    rewards[0, :2] = 1000, -1000
    assert normaliser(rewards, dones)[0].tolist() == pytest.approx([7.0710678, -7.0710678] + [0] * 98)
    rewards[0, 0] = 1e5
    assert normaliser(rewards, dones)[0, 0] == 10


@pytest.mark.parametrize("game", mdpo.GAMES)
def test_every_game_by_name_and_by_envpool_id(game):
    """Whatever is typed, the arguments name the game and its mode in one way."""
    spellings = {
        (game, "hard"): "hard",
        (game.upper(), "easy"): "easy",
        (f"{game.capitalize()}-v0", "easy"): "easy",
        (f"{game.capitalize()}Easy-v0", "hard"): "easy",
        (f"{game.capitalize()}Hard-v0", "easy"): "hard",
    }
    for (env_id, mode), expected in spellings.items():
        args = mdpo.check(mdpo.Args(env_id=env_id, distribution_mode=mode))
        assert (args.env_id, args.distribution_mode) == (game, expected)
        assert mdpo.check(args) == args
    mdpo.make_envs(mdpo.Args(env_id=game, num_envs=1), "test").close()


# The network.
def plain_impala(agent, obs):
    """The network of agent.py and model.py with the operations spelled out, in the default memory layout."""
    w = {name: value.contiguous() for name, value in agent.state_dict().items()}

    def conv(x, name):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)

    x = obs.float() / 255
    for block in ("encoder.0", "encoder.1", "encoder.2"):
        x = F.max_pool2d(conv(x, f"{block}.conv"), kernel_size=3, stride=2, padding=1)
        for residual in (f"{block}.residual.0", f"{block}.residual.1"):
            x = x + conv(F.relu(conv(F.relu(x), f"{residual}.conv0")), f"{residual}.conv1")
    hidden = F.relu(F.linear(F.relu(x.reshape(len(x), -1)), w["encoder.5.weight"], w["encoder.5.bias"]))
    logits = F.linear(hidden, w["actor.weight"], w["actor.bias"])
    return logits, F.linear(hidden, w["critic.weight"], w["critic.bias"])[:, 0]


def test_network():
    (agent,) = make_agents(1, mdpo.Args(), mdpo.Agent)
    assert sum(p.numel() for p in agent.parameters()) == 626_256
    nn.init.normal_(agent.actor.weight)
    obs = batch_of(5)["obs"]
    for ours, plain in zip(agent(obs), plain_impala(agent, obs), strict=True):
        assert torch.allclose(ours, plain, atol=1e-4)


def test_heads_start_orthogonal_and_small():
    (agent,) = make_agents(1, mdpo.Args(), mdpo.Agent)
    actor, critic = agent.actor.weight, agent.critic.weight
    assert torch.allclose(actor @ actor.T, 1e-4 * torch.eye(15), atol=1e-9)
    assert torch.allclose(critic @ critic.T, torch.eye(1))
    assert not agent.actor.bias.any() and not agent.critic.bias.any()


def test_bf16_changes_the_encoder_and_little_else():
    obs = batch_of(5)["obs"]
    exact, rough = (make_agents(1, mdpo.Args(precision=p), mdpo.Agent)[0](obs) for p in ("fp32", "bf16"))
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.float32
        assert 0 < (a - b).abs().max() < 0.03 * a.abs().max()


# The update.
def mdpo_step_as_in_the_paper(agents, optimizer, batches, args):
    """Algorithm 1 without slices, helpers or shared terms: one loss, one backward pass, one step."""
    losses = []
    for i, (agent, batch) in enumerate(zip(agents, batches, strict=True)):
        logits, values = agent(batch["obs"])
        policy = torch.distributions.Categorical(logits=logits)
        advantages = batch["advantages"]
        if args.norm_adv:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        ratio = (policy.log_prob(batch["actions"]) - batch["log_probs"]).exp()
        if args.policy_loss == "ppo":
            objective = torch.minimum(
                ratio * advantages, torch.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef) * advantages
            )
        else:
            objective = ratio * advantages - advantages.abs() * (ratio - 1) ** 2 / (2 * args.clip_coef)
        error = (values - batch["returns"]) ** 2
        if args.clip_vloss:
            near = batch["values"] + torch.clip(values - batch["values"], -args.clip_coef, args.clip_coef)
            error = torch.maximum(error, (near - batch["returns"]) ** 2)
        loss = -objective.mean() + args.vf_coef * 0.5 * error.mean() - args.ent_coef * policy.entropy().mean()
        if len(agents) == 2:
            peer = torch.distributions.Categorical(logits=agents[1 - i](batch["obs"])[0])
            loss = loss + args.distill_coef * torch.distributions.kl_divergence(peer, policy).mean()
        losses.append(loss)
    optimizer.zero_grad()
    (sum(losses) / len(losses)).backward()
    for agent in agents:
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_agents": 1},
        {"distill_coef": 0.0},
        {"distill_coef": 3.0, "max_grad_norm": 1e-3},
        {"policy_loss": "spo"},
        {"policy_loss": "spo", "num_agents": 1, "norm_adv": False},
        {"clip_vloss": False, "ent_coef": 0.1, "clip_coef": 0.1, "vf_coef": 1.0},
    ],
    ids=str,
)
def test_update_is_the_papers(changes, monkeypatch):
    """Three steps, sliced unevenly on our side."""
    monkeypatch.setattr(mdpo, "CPU_BATCH", 5)
    args = mdpo.Args(**changes)
    ours, papers = make_agents(args.num_agents, args), make_agents(args.num_agents, args)
    ours_adam, papers_adam = adam(ours, fused=True), adam(papers)
    for step in range(3):
        batches = [batch_of(12, seed=10 * step + i) for i in range(args.num_agents)]
        scalars = mdpo.update(ours, ours_adam, batches, args)
        mdpo_step_as_in_the_paper(papers, papers_adam, batches, args)
        assert all(value.shape == (args.num_agents,) and not value.requires_grad for value in scalars.values())
    assert torch.allclose(weights(ours), weights(papers), atol=1e-6)
    assert not torch.allclose(weights(ours), weights(make_agents(args.num_agents, args)), atol=1e-4)


def test_update_reports_its_losses():
    args = mdpo.Args(norm_adv=False)
    agents, batches = make_agents(2, args), [batch_of(8, seed=i) for i in range(2)]
    logits, values = agents[1](batches[1]["obs"])
    peer_logits, log_probs = agents[0](batches[1]["obs"])[0], logits.log_softmax(-1)[range(8), batches[1]["actions"]]
    ratio = (log_probs - batches[1]["log_probs"]).exp().detach()
    expected = {
        "policy_loss": mdpo.clipped_policy_loss(log_probs, batches[1]["log_probs"], batches[1]["advantages"], 0.2),
        "value_loss": mdpo.clipped_value_loss(values, batches[1]["values"], batches[1]["returns"], 0.2),
        "entropy": torch.distributions.Categorical(logits=logits).entropy().mean(),
        "distillation_loss": mdpo.distillation_loss(logits, peer_logits),
        "approx_kl": (ratio - 1 - ratio.log()).mean(),
        "clipfrac": ((ratio - 1).abs() > 0.2).float().mean(),
    }
    scalars = mdpo.update(agents, adam(agents, fused=True), batches, args)
    assert scalars.keys() == expected.keys() | {"grad_norm"}
    for key, value in expected.items():
        assert scalars[key][1].item() == pytest.approx(value.item(), rel=1e-5), key
    assert 0 < scalars["clipfrac"][1] < 1


def test_weight_zero_is_two_independent_ppo_updates_with_the_loss_halved():
    """Bit for bit, with the real network: half of each gradient, and with twice the rate the same weights."""
    together, apart = (make_agents(2, mdpo.Args(), mdpo.Agent) for _ in range(2))
    batches = [batch_of(16, seed=i) for i in range(2)]
    off, ppo = mdpo.Args(distill_coef=0.0, max_grad_norm=1e9), mdpo.Args(num_agents=1, max_grad_norm=1e9)
    parameters = [parameter for agent in together for parameter in agent.parameters()]
    mdpo.update(together, torch.optim.SGD(parameters, lr=2.0), batches, off)
    for i in range(2):
        mdpo.update([apart[i]], torch.optim.SGD(apart[i].parameters(), lr=1.0), [batches[i]], ppo)
        assert torch.equal(2 * gradient(together[i]), gradient(apart[i]))
        assert torch.equal(weights([together[i]]), weights([apart[i]]))


def test_with_weight_zero_no_agent_knows_of_the_other(tmp_path):
    """The first agent's weights at the end are the same bits, whoever the second one is; with a weight they are not."""

    def strange_second_agent(envs, args):
        agent = TinyAgent(envs, args)
        strange_second_agent.made += 1
        if strange_second_agent.made == 2:
            nn.init.normal_(agent.actor.weight)
        return agent

    def first_agent(make_agent, distill_coef):
        strange_second_agent.made = 0
        args = tiny_args("mdpo", tmp_path, distill_coef=distill_coef, eval_every=0)
        return weights(mdpo.train(args, ScriptedEnvs, make_agent)[:1])

    assert torch.equal(first_agent(TinyAgent, 0.0), first_agent(strange_second_agent, 0.0))
    assert not torch.equal(first_agent(TinyAgent, 1.0), first_agent(strange_second_agent, 1.0))


def plain_ppo(args, make_agent):
    """PPO as CleanRL writes it, on the streams of mdpo.py: the whole loop once more, without its parts."""
    seeds = np.random.SeedSequence(args.seed).generate_state(3).tolist()
    torch.manual_seed(seeds[0])
    shuffle, noise = (torch.Generator().manual_seed(seed) for seed in seeds[1:])
    agent = make_agent(ScriptedEnvs(args, "train"), args)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    normaliser = mdpo.RewardNormaliser(1, args.num_envs, args.gamma)
    envs = ScriptedEnvs(args, "train")
    next_obs, next_done = torch.as_tensor(envs.reset()[0]), torch.zeros(args.num_envs)
    for _ in range(args.total_timesteps // (args.num_envs * args.num_steps)):
        obs, actions, log_probs, values, rewards, dones = [], [], [], [], [], []
        for _ in range(args.num_steps):
            obs.append(next_obs)
            dones.append(next_done)  # CleanRL's layout: whether this observation begins an episode
            with torch.no_grad():
                logits, value = agent(next_obs)
            race = torch.empty(args.num_envs, 15).exponential_(generator=noise)
            action = (logits.softmax(-1) / race).argmax(-1)
            actions.append(action)
            log_probs.append(torch.distributions.Categorical(logits=logits).log_prob(action))
            values.append(value)
            images, reward, terminated, truncated, _ = envs.step(action.numpy())
            done = terminated | truncated
            rewards.append(torch.as_tensor(normaliser(reward[None], done[None])[0]).float())
            next_obs, next_done = torch.as_tensor(images), torch.as_tensor(terminated | truncated).float()
        with torch.no_grad():
            next_value = agent(next_obs)[1]
        advantages, last = [None] * args.num_steps, 0
        for t in reversed(range(args.num_steps)):
            alive = 1 - (next_done if t == args.num_steps - 1 else dones[t + 1])
            following = next_value if t == args.num_steps - 1 else values[t + 1]
            delta = rewards[t] + args.gamma * following * alive - values[t]
            advantages[t] = last = delta + args.gamma * args.gae_lambda * alive * last
        data = {"obs": obs, "actions": actions, "log_probs": log_probs, "values": values, "advantages": advantages}
        data = {key: torch.cat(value) for key, value in data.items()}
        data["returns"] = data["advantages"] + data["values"]
        for _ in range(args.update_epochs):
            order = torch.randperm(len(data["obs"]), generator=shuffle)
            for index in order.split(len(order) // args.num_minibatches):
                minibatch = {key: value[index] for key, value in data.items()}
                mdpo_step_as_in_the_paper([agent], optimizer, [minibatch], args)
    return agent


def test_one_agent_is_ppo(tmp_path):
    args = tiny_args("mdpo", tmp_path, num_agents=1, exact_every=0, eval_every=0, total_timesteps=48)
    ours = mdpo.train(args, ScriptedEnvs, TinyAgent)
    assert torch.allclose(weights(ours), weights([plain_ppo(args, TinyAgent)]), atol=1e-6)


def test_learning_rate_falls_to_zero_when_annealed(tmp_path):
    args = tiny_args("mdpo", tmp_path, anneal_lr=True, total_timesteps=64, eval_every=0)
    mdpo.train(args, ScriptedEnvs, TinyAgent)
    rows = [row.split(",") for row in next(tmp_path.glob("*/metrics.csv")).read_text().splitlines()]
    rates = [float(row[2]) for row in rows if row[1] == "charts/learning_rate"]
    assert rates == pytest.approx([5e-4, 3.75e-4, 2.5e-4, 1.25e-4])


def test_distillation_brings_two_policies_together():
    """Twenty steps on nothing but the KL: what the agents do on each other's observations becomes the same."""
    args = mdpo.Args(ent_coef=0.0, vf_coef=0.0, norm_adv=False)
    agents, batches = make_agents(2, args), [batch_of(16, seed=i) | {"advantages": torch.zeros(16)} for i in range(2)]
    nn.init.normal_(agents[0].actor.weight)
    optimizer = adam(agents, lr=0.05, fused=True)
    before, *_, after = (mdpo.update(agents, optimizer, batches, args) for _ in range(20))
    assert (after["distillation_loss"] < 0.2 * before["distillation_loss"]).all()
