"""drq_sam_reset.py: each formula against a slow twin, the replay against a list, and what a run promises."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ScriptedEnvs, assert_resumes_exactly, folder_in, load, replace, same, state_of
from torch.utils._python_dispatch import TorchDispatchMode

drq = load("drq_sam_reset")
CPU = torch.device("cpu")


class Envs(ScriptedEnvs):
    """Frames of 12 x 12 in stacks of 4; games of 7 steps; a life is lost with every third step of a game."""

    def __init__(self, args, split, start=0):
        super().__init__(args, split, start, obs_shape=(4, 12, 12), num_actions=3)

    def step(self, actions):
        reward = 6 * (actions == self.time % 3).astype(np.float32) - 3
        self.time += 1
        self.returns += reward
        ended = self.time == 7
        lost = (self.time % 3 == 0) & ~ended
        episodes = [(int(n), float(self.returns[n]), 7) for n in np.flatnonzero(ended)]
        self.time[ended], self.returns[ended] = 0, 0
        return self.observe(), reward, ended, np.zeros_like(ended), {"life_lost": lost, "episodes": episodes}


class Small(nn.Module):
    """The interface of Agent on small frames."""

    def __init__(self, envs, args):
        super().__init__()
        self.backbone = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 8), nn.ReLU())
        self.head = drq.DuelingHead(8, int(envs.single_action_space.n), args.n_atoms, args.noisy_std)
        self.register_buffer("support", torch.linspace(args.v_min, args.v_max, args.n_atoms))

    def forward(self, pixels):
        return self.head(self.backbone(pixels)).log_softmax(-1)

    values = drq.Agent.values


def tiny(runs_dir, **changes):
    sizes = {"total_timesteps": 48, "learning_starts": 12, "batch_size": 4, "n_step": 3, "n_atoms": 11}
    often = {"exact_every": 12, "reset_every": 20, "shrink_perturb": 0.8, "eval_every": 16}
    rest = {"eval_episodes": 2, "final_eval_episodes": 2, "runs_dir": str(runs_dir), "cuda": False}
    return drq.Args(**sizes | often | rest | changes)


def go(args, make_envs=Envs):
    return drq.train(args, make_envs, Small)


# ---- Formulas ----
def algorithm_1(probs, rewards, bootstrap, support):
    """C51's projection as the paper writes it."""
    projected, atoms = torch.zeros(probs.shape, dtype=torch.float64), len(support)
    low, high = support[0].item(), support[-1].item()
    for i in range(len(probs)):
        for j in range(atoms):
            moved = min(max(rewards[i].item() + bootstrap[i].item() * support[j].item(), low), high)
            place = (moved - low) / ((high - low) / (atoms - 1))
            lower, upper = math.floor(place), math.ceil(place)
            projected[i, lower] += probs[i, j].item() * (upper - place if upper > lower else 1)
            projected[i, upper] += probs[i, j].item() * (place - lower)
    return projected


def test_projection_is_algorithm_1_and_keeps_mass_and_mean():
    torch.manual_seed(0)
    probs, support = torch.randn(12, 51).softmax(-1), torch.linspace(-10, 10, 51)
    rewards, bootstrap = 4 * torch.randn(12), torch.tensor([0.0, 0.99**10, 1.0]).repeat(4)
    rewards[:3] = torch.tensor([0.0, 40.0, -40.0])
    projected = drq.project_distribution(probs, rewards, bootstrap, support)
    torch.testing.assert_close(projected.double(), algorithm_1(probs, rewards, bootstrap, support), atol=3e-6, rtol=0)
    torch.testing.assert_close(projected.sum(1), torch.ones(12))
    projected = drq.project_distribution(probs, rewards / 1000, torch.full((12,), 0.9), support)  # nothing is clipped
    torch.testing.assert_close(projected @ support, rewards / 1000 + 0.9 * (probs @ support), atol=1e-5, rtol=0)


def test_shift_is_pad_and_crop():
    torch.manual_seed(0)
    images, offsets = torch.randint(0, 256, (6, 4, 20, 30)).byte(), torch.randint(0, 9, (6, 2))
    offsets[0], offsets[1] = 4, 0
    padded = nn.functional.pad(images.float(), (4, 4, 4, 4), mode="replicate").byte()
    crops = [image[:, y : y + 20, x : x + 30] for image, (y, x) in zip(padded, offsets.tolist(), strict=True)]
    assert torch.equal(drq.random_shift(images, offsets, 4), torch.stack(crops))
    assert torch.equal(drq.random_shift(images, offsets, 4)[0], images[0])


def test_intensity_is_one_factor_an_image():
    images, noise = torch.rand(4, 3, 5, 5), torch.tensor([-9.0, -1.0, 0.5, 3.0])
    expected = torch.stack([image * factor for image, factor in zip(images, (0.9, 0.95, 1.025, 1.1), strict=True)])
    torch.testing.assert_close(drq.random_intensity(images, noise), expected)


def test_noisy_layer_entry_by_entry():
    layer, x, normal = drq.NoisyLinear(5, 3, 0.5), torch.randn(2, 5), torch.randn(8)
    drq.set_noise(layer, normal)
    f = [math.copysign(abs(value) ** 0.5, value) for value in normal.tolist()]
    y = torch.zeros(2, 3)
    for o in range(3):
        weight = [layer.weight[o, i] + layer.weight_sigma[o, i] * f[5 + o] * f[i] for i in range(5)]
        y[:, o] = sum(weight[i] * x[:, i] for i in range(5)) + layer.bias[o] + layer.bias_sigma[o] * f[5 + o]
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(layer.eval()(x), x @ layer.weight.T + layer.bias)
    assert layer.weight_sigma.unique().tolist() == pytest.approx([0.5 / 5**0.5])
    assert layer.bias_sigma.unique().tolist() == pytest.approx([0.5 / 3**0.5])


def test_sam_climbs_rho_along_the_gradient_and_comes_back_exactly():
    matrix, w = torch.tensor([[3.0, 1.0], [1.0, 2.0]]), nn.Parameter(torch.tensor([1.0, -2.0]))
    before, gradient = w.detach().clone(), matrix @ w.detach()
    (0.5 * w @ matrix @ w).backward()
    saved = drq.sam_perturb([w], 0.1)
    torch.testing.assert_close(w.detach(), before + 0.1 * gradient / gradient.norm())
    drq.sam_restore([w], saved)
    assert torch.equal(w.detach(), before)


# ---- Networks for the tests of an update ----
class Space:
    single_observation_space = gym.spaces.Box(0, 255, (4, 12, 12), np.uint8)
    single_action_space = gym.spaces.Discrete(3)


def filled(args, steps=40, capacity=60, path=None):
    rng = np.random.default_rng(0)
    replay = drq.Replay(capacity, (4, 12, 12), args, CPU, path)
    replay.begin(rng.integers(1, 256, (12, 12), dtype=np.uint8))
    for _ in range(steps):
        frame = rng.integers(1, 256, (12, 12), dtype=np.uint8)
        replay.add(int(rng.integers(3)), float(rng.integers(-1, 2)), bool(rng.random() < 0.15), frame)
    return replay


def parts_of(args, make_agent=Small):
    torch.manual_seed(0)
    agent = make_agent(Space, args)
    target = copy.deepcopy(agent).requires_grad_(False)
    with torch.no_grad():
        for value in target.parameters():
            value.add_(0.1 * torch.randn_like(value))
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True)
    return agent, target, optimizer, filled(args)


def draws_of(args, agent):
    torch.manual_seed(1)
    passes, batch, size = 1 + args.sam, args.batch_size, sum(len(noise) for noise in drq.noise_of(agent))
    uniform = torch.rand(batch, dtype=torch.float64)
    return {
        "beta": torch.tensor(0.5, dtype=torch.float64),
        "uniform": uniform,
        "noise": torch.randn(passes, 2, size),
        "offsets": torch.randint(9, (passes, 2, batch, 2)),
        "intensity": torch.randn(passes, 2, batch),
    }


@pytest.mark.parametrize("scope", ["all", "backbone", "head"])
def test_update_with_sam_is_two_passes(tmp_path, scope):
    """Gradient at w, climb along it, gradient there, clip, Adam from w: written out with plain tensors."""
    args = tiny(tmp_path, sam_scope=scope, max_grad_norm=0.05)
    agent, target, optimizer, replay = parts_of(args)
    draws = draws_of(args, agent)
    twin, twin_target, twin_optimizer, twin_replay = parts_of(args)
    index, weights = twin_replay.sample(draws["uniform"], draws["beta"])
    batch = twin_replay.gather(index) | {"weights": weights}

    def loss(i):
        for network, noise in zip((twin, twin_target), draws["noise"][i], strict=True):
            drq.set_noise(network, noise)
        return drq.rainbow_loss(twin, twin_target, batch, draws["offsets"][i], draws["intensity"][i], args)[0]

    params = list(twin.parameters())
    climbing = list({"all": twin, "backbone": twin.backbone, "head": twin.head}[scope].parameters())
    before = [param.detach().clone() for param in params]
    gradients = torch.autograd.grad(loss(0), climbing)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    with torch.no_grad():
        for param, gradient in zip(climbing, gradients, strict=True):
            param += args.sam_rho * gradient / norm
    gradients = torch.autograd.grad(loss(1), params)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert norm > args.max_grad_norm
    for param, old, gradient in zip(params, before, gradients, strict=True):
        param.data, param.grad = old, gradient * args.max_grad_norm / norm
    twin_optimizer.step()
    logged = drq.update(agent, target, optimizer, replay, draws, args)
    for param, expected in zip(agent.parameters(), params, strict=True):
        torch.testing.assert_close(param, expected, atol=2e-7, rtol=1e-5)
        assert optimizer.state[param]["step"] == 1
        torch.testing.assert_close(optimizer.state[param]["exp_avg"], 0.1 * expected.grad, atol=1e-8, rtol=1e-3)
    assert logged["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
    for own, online, other in zip(target.parameters(), params, twin_target.parameters(), strict=True):
        torch.testing.assert_close(own, 0.99 * other + 0.01 * online)


@pytest.mark.parametrize("optimizer_of", ["all", "head"])
def test_reset_touches_what_it_lists(tmp_path, optimizer_of):
    args = tiny(tmp_path)
    agent, target, optimizer, replay = parts_of(args)
    drq.update(agent, target, optimizer, replay, draws_of(args, agent), args)
    before = copy.deepcopy((agent, target, optimizer.state_dict()))
    fresh = Small(Space, args)
    drq.reset_head(agent, target, fresh)
    drq.forget_moments(optimizer, (agent if optimizer_of == "all" else agent.head).parameters())
    for name, value in agent.state_dict().items():
        expected = fresh if name.startswith("head") and not name.endswith("noise") else before[0]
        assert torch.equal(value, expected.state_dict()[name]), name
        expected = fresh if name.startswith("head") and not name.endswith("noise") else before[1]
        assert torch.equal(target.state_dict()[name], expected.state_dict()[name]), name
    for i, (name, _) in enumerate(agent.named_parameters()):
        for key, value in optimizer.state_dict()["state"][i].items():
            cleared = optimizer_of == "all" or name.startswith("head")
            assert value.abs().sum() == 0 if cleared else torch.equal(value, before[2]["state"][i][key])
    drq.shrink_and_perturb(agent.backbone, fresh.backbone, 0.8)
    for own, old, new in zip(*(net.backbone.parameters() for net in (agent, before[0], fresh)), strict=True):
        torch.testing.assert_close(own, 0.8 * old + 0.2 * new)


class NoReadBack(TorchDispatchMode):
    """Refuses what a captured graph cannot hold: values read back and shapes made from data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        refused = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "is_nonzero", "equal")
        assert func.overloadpacket.__name__ not in refused, func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("changes", [{}, {"sam": False}, {"augment": False}, {"sam_scope": "backbone"}], ids=str)
def test_update_reads_nothing_back(tmp_path, changes):
    args = tiny(tmp_path, **changes)
    parts = parts_of(args)
    draws = draws_of(args, parts[0])
    with NoReadBack():
        drq.update(*parts, draws, args)
        drq.act(parts[1], parts[3].gather(torch.arange(2))["obs"])


# ---- Replay ----
def test_replay_is_a_list_of_transitions():
    """Stacks, returns and bootstraps of each row that can be sampled, with two breaks."""
    rng, args = np.random.default_rng(1), drq.Args(n_step=4, gamma=0.9)
    replay, stack = drq.Replay(300, (4, 6, 6), args, CPU, None), np.zeros((4, 6, 6), np.uint8)

    def next_stack(stack, begins):
        frame = rng.integers(1, 256, (6, 6), dtype=np.uint8)
        return np.concatenate([stack[1:] * (not begins), frame[None]]), frame

    runs = []
    for t in range(250):
        if t in (0, 100, 180):  # environments made anew, in the middle of a life
            stack, frame = next_stack(stack, True)
            replay.begin(frame)
            runs.append([])
        action, reward, done = int(rng.integers(5)), float(rng.integers(-1, 2)), bool(rng.random() < 0.12)
        following, frame = next_stack(stack, done)
        replay.add(action, reward, done, frame)
        runs[-1].append((t, stack, action, reward, done, following))
        stack = following
    expected = {}
    for number, run in enumerate(runs):
        lost = number < 2 and not run[-1][4]  # the last observation went with the old environments
        for i in range(len(run) - 3 - lost):
            window = run[i : i + 4]
            last = next((k for k in range(4) if window[k][4]), 3)
            value = sum(0.9**k * window[k][3] for k in range(last + 1))
            expected[window[0][0]] = (*window[0][1:3], value, window[last][4], window[last][5])
    rows = replay.priorities.nonzero().flatten()
    assert rows.tolist() == sorted(expected)
    batch = replay.gather(rows)
    for i, row in enumerate(rows.tolist()):
        obs, action, value, done, next_obs = expected[row]
        assert np.array_equal(batch["obs"][i], obs) and batch["actions"][i] == action
        assert batch["returns"][i].item() == pytest.approx(value, abs=1e-6)
        assert batch["bootstrap"][i].item() == pytest.approx(0 if done else 0.9**4)
        assert done or np.array_equal(batch["next_obs"][i], next_obs)


def test_sampling_is_prioritised_and_weighted():
    args = drq.Args(n_step=3)
    replay = filled(args)
    rows = replay.priorities.nonzero().flatten()
    assert rows.tolist() == list(range(38)) and replay.priorities.max() == 2**32
    losses = 5 * torch.rand(len(rows)) + 0.01
    replay.prioritise(rows, losses)
    probs = losses.double() ** 0.5 / (losses.double() ** 0.5).sum()
    # Row i is drawn by share k as often as their intervals overlap: taken by a grid over each share.
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    index = replay.sample(grid, torch.tensor(0.4))[0]
    counts = torch.bincount(index, minlength=61)[:38] / 20_000
    torch.testing.assert_close(counts, probs.float(), atol=1.1e-4, rtol=0)
    index, weights = replay.sample(torch.rand(8, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64))
    expected = (1 / (probs[index] * 38) + 1e-5) ** 0.4
    torch.testing.assert_close(weights, (expected / expected.max()).float())
    for edge, row in ((0.0, 0), (1 - 2**-53, 37)):
        assert replay.sample(torch.full((8,), edge, dtype=torch.float64), torch.tensor(0.4))[0][-bool(edge)] == row
    frame = np.zeros((12, 12), np.uint8)
    greatest = replay.priorities.max().clone()
    replay.prioritise(rows, losses / 100)
    replay.add(0, 0.0, False, frame)
    assert replay.priorities[38] == max(greatest, 2**32)  # new rows get the greatest ever seen


def kept(replay):
    """A replay's state as a checkpoint holds it: of its own memory."""
    return {name: value.clone() if torch.is_tensor(value) else value for name, value in replay.state_dict().items()}


def test_replay_of_one_step_comes_back_from_its_file(tmp_path):
    args, path = drq.Args(n_step=3), tmp_path / "replay.bin"
    replay, other = filled(args, steps=1, path=path), drq.Replay(60, (4, 12, 12), args, CPU, path)
    other.load_state_dict(kept(replay))
    assert all(torch.equal(other.rows[name][:1], replay.rows[name][:1]) for name in replay.rows)


def test_replay_comes_back_from_its_file(tmp_path, monkeypatch):
    """In blocks. Rows that were written after the checkpoint are not read, and are overwritten."""
    monkeypatch.setattr(drq, "BLOCK", 7)
    args, path = drq.Args(n_step=3), tmp_path / "replay.bin"
    replay = filled(args, path=path)
    state = kept(replay)
    replay.add(1, 1.0, True, np.ones((12, 12), np.uint8))
    kept(replay)  # appended; the state knows nothing of it
    assert path.stat().st_size == 41 * replay.row.itemsize
    other = drq.Replay(80, (4, 12, 12), args, CPU, path)
    other.load_state_dict(state)
    assert all(torch.equal(other.rows[name][:40], replay.rows[name][:40]) for name in replay.rows)
    assert torch.equal(other.priorities[:40], state["priorities"]) and other.greatest == state["greatest"]
    other.add(2, 0.0, False, np.ones((12, 12), np.uint8))
    newer = kept(other)
    assert path.stat().st_size == 41 * replay.row.itemsize
    again = drq.Replay(80, (4, 12, 12), args, CPU, path)
    again.load_state_dict(newer)
    assert again.rows["actions"][40] == 2
    for write in (lambda: path.write_bytes(path.read_bytes()[:-1]), path.unlink):
        write()
        with pytest.raises(SystemExit, match=r"^2$"):
            drq.Replay(80, (4, 12, 12), args, CPU, path).load_state_dict(newer)


def test_a_reward_that_is_not_finite_is_never_saved(tmp_path):
    replay = filled(drq.Args(n_step=3), path=tmp_path / "replay.bin")
    replay.state_dict()
    before = replay.path.read_bytes()
    replay.add(0, float("nan"), False, np.ones((12, 12), np.uint8))
    with pytest.raises(SystemExit, match="not finite"):
        replay.state_dict()
    assert replay.path.read_bytes() == before


# ---- Runs ----
@pytest.mark.slow
def test_resumed_bit_for_bit(tmp_path):
    """With lost lives and resets on the way; replay.bin too."""
    assert_resumes_exactly(tmp_path, go, tiny, Envs, exact_step=28)


def test_logged_rewards_are_clipped_and_returns_are_not(tmp_path):
    go(tiny(tmp_path, eval_every=0))
    rows = [line.split(",") for line in (folder_in(tmp_path) / "metrics.csv").read_text().splitlines()[1:]]
    returns = [float(value) for _, key, value in rows if key == "charts/episodic_return"]
    rewards = [float(value) for _, key, value in rows if key == "charts/reward"]
    assert len(returns) == 6 and {abs(value) % 3 for value in returns} == {0} and max(map(abs, returns)) > 7 * 0.2
    # Written at the exact points (steps 14, 28, 42) and at the end: four means, which hold all rewards.
    means = np.array(rewards) @ [14, 14, 14, 6]
    assert len(rewards) == 4 and -48 <= means <= 48 and means == pytest.approx(round(means), abs=1e-9)
    assert sum(returns) / 3 == pytest.approx(np.array(rewards[:3]) @ [14, 14, 14])


def test_evaluation_changes_nothing(tmp_path):
    for name, every in (("with", 16), ("without", 0)):
        go(tiny(tmp_path / name, eval_every=every))
    states = [state_of(folder_in(tmp_path / name)) for name in ("with", "without")]
    for state, evaluated in zip(states, (48, 0), strict=True):
        assert state.pop("evaluated") == evaluated
    assert same(*states)


def test_method_off_is_rainbow_bit_for_bit(tmp_path):
    """Without SAM its settings mean nothing, and a reset that never comes is none."""
    go(tiny(tmp_path / "off", sam=False, reset_every=0))
    go(tiny(tmp_path / "never", sam=False, sam_rho=3.0, sam_scope="head", reset_every=10**6, shrink_perturb=0.5))
    assert same(*(state_of(folder_in(tmp_path / name)) for name in ("off", "never")))


@pytest.mark.parametrize("noise", ["independent", "reuse", "none"])
def test_noise_schemes(tmp_path, monkeypatch, noise):
    seen, update = [], drq.update
    monkeypatch.setattr(drq, "update", lambda *args: (seen.append(args[4]["noise"].clone()), update(*args))[1])
    go(tiny(tmp_path, sam_noise=noise, total_timesteps=15))
    assert len(seen) == 6
    for first, second in seen:
        assert torch.equal(first, second) == (noise == "reuse") and (first.abs().sum() == 0) == (noise == "none")


def test_wrong_flags_say_so_in_one_line(tmp_path, capsys):
    for changes in ({"env_id": "pongg"}, {"num_envs": 2}, {"total_timesteps": 10**9}, {"learning_starts": 3}):
        with pytest.raises(SystemExit) as refused:
            go(replace(tiny(tmp_path), **changes))
        assert refused.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---- Seams ----
def test_an_agent_can_add_weight_decay_by_hooks(tmp_path):
    class Decayed(Small):
        def __init__(self, *args):
            super().__init__(*args)
            for param in self.parameters():
                param.register_hook(lambda gradient, param=param: gradient + 0.5 * param)

    for sam in (False, True):
        args, moments = tiny(tmp_path, sam=sam, sam_rho=0.0, max_grad_norm=1e6), []
        for make_agent in (Small, Decayed):
            agent, target, optimizer, replay = parts_of(args, make_agent)
            before = [param.detach().clone() for param in agent.parameters()]
            drq.update(agent, target, optimizer, replay, draws_of(args, agent), args)
            moments.append([optimizer.state[param]["exp_avg"] for param in agent.parameters()])
        for plain, decayed, w in zip(*moments, before, strict=True):
            torch.testing.assert_close(decayed - plain, 0.1 * 0.5 * w, atol=1e-7, rtol=1e-4)


def test_an_agent_can_keep_averages_and_be_evaluated_on_them(tmp_path):
    used = []

    class Averaged(Small):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer("average", torch.zeros(8))

        def forward(self, pixels):
            if self.training:
                self.average.lerp_(self.backbone[2].bias.detach(), 0.5)
            else:
                used.append(self.average.clone())
            return super().forward(pixels)

    target = drq.train(tiny(tmp_path), Envs, Averaged)
    *_, evaluated, _ = used  # the last one is the online agent, whose active units are counted then
    assert torch.equal(evaluated, target.average) and not torch.equal(used[0], evaluated)
    checkpoint = torch.load(folder_in(tmp_path) / "checkpoint.pt", weights_only=True)
    assert torch.equal(checkpoint["target"]["average"], target.average)


# ---- The real games ----
def test_lives_and_games_of_breakout(tmp_path):
    """Beside the same games without the wrapper, frame by frame."""
    args = tiny(tmp_path, env_id="Breakout", num_envs=2, seed=3)
    envs, bare = drq.make_envs(args, "train"), drq.make_envs(args, "train").envs
    rng, lives = np.random.default_rng(0), [5, 5]
    frames = [[frame] for frame in bare.reset()[0][:, -1]]  # of each game's life under way
    obs, _ = envs.reset()
    lost, ended = 0, 0
    for _ in range(400):
        for n, own in enumerate(frames):
            assert (obs[n] == np.stack([0 * own[0]] * (4 - len(own[-4:])) + own[-4:])).all()
        actions = rng.integers(0, 4, 2)
        obs, reward, terminated, truncated, info = envs.step(actions)
        bare_obs, bare_reward, over, _, bare_info = bare.step(actions)
        assert (reward == bare_reward).all() and (terminated == over).all() and not truncated.any()
        for n in range(2):
            left = int(bare_info["lives"][n])
            assert info["life_lost"][n] == (0 < left < lives[n])
            if over[n]:
                assert left == 0
                frames[n] = [bare.reset(np.array([n], dtype=np.int32))[0][0, -1]]
            else:
                frames[n] = (frames[n] if left == lives[n] else []) + [bare_obs[n, -1]]
            lives[n] = 5 if over[n] else left
            lost, ended = lost + bool(info["life_lost"][n]), ended + bool(over[n])
    assert lost > 4 and ended > 1
