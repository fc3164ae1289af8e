"""benchmark/analyses/looks.py: its numbers against slow twins, what is played in two looks, and its files."""

import csv
import json
import shutil
from types import SimpleNamespace

import imageio.v3 as iio
import looks
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load, tiny_args
from record import Episode, frames_of
from runs import Countdown, assert_refuses, run, tiny_run

ppo_netrand = load("ppo_netrand")


@pytest.fixture
def args(tmp_path):
    return tiny_args("ppo_netrand", tmp_path, num_envs=3, seed=7, precision="fp32")


@pytest.fixture
def agent(args):
    torch.manual_seed(0)
    return ppo_netrand.Agent(Countdown(1), args)


@pytest.fixture
def obs():
    """Pictures with something on them, [6, 3, 64, 64]: a bright square each, on noise."""
    images = np.random.default_rng(0).integers(0, 60, (6, 3, 64, 64), dtype=np.uint8)
    for n, image in enumerate(images):
        image[:, 10 * n : 10 * n + 12, 5 * n : 5 * n + 20] += 180
    return torch.as_tensor(images)


# ---- Grad-CAM ----
def rest(agent, block):
    """Logits from the last block's output: what grad_cam takes the gradient through."""
    return agent.actor(agent.encoder[3:](block))


def test_grad_cam_is_the_slow_one_of_finite_differences(agent, obs):
    agent.double()
    actions, slow = torch.tensor([0, 3, 14, 7, 3, 1]), []
    for image, action in zip(obs, actions, strict=True):
        with torch.no_grad():
            block = agent.encoder[:3](image[None].double() / 255)  # [1, 32, 8, 8]
            weights = torch.empty(32, dtype=torch.double)
            for channel in range(32):  # the mean of a channel's gradients: what moving all of it by 1 / 64 does
                step = torch.zeros_like(block)
                step[:, channel] = 1e-7
                change = rest(agent, block + step) - rest(agent, block - step)
                weights[channel] = change[0, action] / 2e-7 / 64
            heat = (weights[:, None, None] * block[0]).sum(0).clamp(min=0)
            heat = F.interpolate(heat[None, None], size=(64, 64), mode="bilinear", align_corners=False)[0, 0]
            slow.append(heat / heat.max())
    agent.float()
    maps = looks.grad_cam(agent, obs, actions)
    assert maps.shape == (6, 64, 64)
    torch.testing.assert_close(maps.double(), torch.stack(slow), atol=1e-3, rtol=0)
    assert (maps.amin((1, 2)) < 0.5).all(), "flat maps would test nothing"


def test_grad_cam_maps_are_from_0_to_1_each_for_itself(agent, obs):
    actions = torch.arange(6)
    maps = looks.grad_cam(agent, obs, actions)
    assert not maps.requires_grad
    assert maps.min() >= 0
    torch.testing.assert_close(maps.amax((1, 2)), torch.ones(6))
    alone = torch.cat([looks.grad_cam(agent, obs[n : n + 1], actions[n : n + 1]) for n in range(6)])
    torch.testing.assert_close(maps, alone, atol=1e-4, rtol=0)
    assert (looks.grad_cam(agent, obs, actions + 1) - maps).abs().amax((1, 2)).min() > 0.01, "the action matters"


def test_a_logit_that_nothing_speaks_for_has_an_empty_map(agent, obs):
    with torch.no_grad():
        agent.actor.weight[4] = 0
    maps = looks.grad_cam(agent, obs[:2], torch.tensor([4, 5]))
    assert maps[0].eq(0).all() and maps[1].max() == 1


def test_grad_cam_leaves_the_agent_as_it_was(agent, obs):
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    logits = agent(obs)[0]
    for mode in (True, False):
        agent.train(mode)
        looks.grad_cam(agent, obs, torch.arange(6))
        assert all(module.training == mode for module in agent.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in agent.parameters())
    assert not any(module._forward_hooks for module in agent.modules())
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())
    assert torch.equal(agent(obs)[0], logits)


# ---- Distances and projection ----
def test_distances_by_hand():
    h_seen = torch.tensor([[3.0, 0.0], [0.0, 4.0], [2.0, 0.0]])
    h_unseen = torch.tensor([[0.0, 1.0], [0.0, 1.0], [2.0, 0.0]])
    found = looks.distances(h_seen, h_unseen)
    # Cosine: aligned 1, 0, 0; pairs of the seen look 1, 0, 1 and of the unseen one 0, 1, 1.
    assert (found["cosine"], found["cosine_ratio"]) == pytest.approx((1 / 3, 1 / 2))
    # Euclidean: aligned sqrt(10), 3, 0; pairs of the seen look 5, 1, sqrt(20) and of the unseen one 0, sqrt(5) twice.
    aligned, within = (10**0.5 + 3) / 3, (6 + 20**0.5 + 2 * 5**0.5) / 6
    assert (found["euclidean"], found["euclidean_ratio"]) == pytest.approx((aligned, aligned / within))


def test_distances_of_directions_and_scales():
    rng = torch.Generator().manual_seed(0)
    h_seen, h_unseen = (torch.rand(40, 16, generator=rng) for _ in range(2))
    found = looks.distances(h_seen, h_unseen)
    cosine = 1 - F.cosine_similarity(h_seen, h_unseen).mean()
    assert found["cosine"] == pytest.approx(cosine.item(), rel=1e-4)
    assert looks.distances(h_seen, h_seen) == dict.fromkeys(found, 0.0)
    assert looks.distances(h_unseen, h_seen) == pytest.approx(found)
    longer = looks.distances(h_seen, 3 * h_seen)
    assert longer["cosine"] == pytest.approx(0, abs=1e-6) and longer["euclidean"] > 1
    both = looks.distances(5 * h_seen, 5 * h_unseen)
    assert both["euclidean"] == pytest.approx(5 * found["euclidean"])
    assert both["euclidean_ratio"] == pytest.approx(found["euclidean_ratio"])
    assert 0.8 < found["cosine_ratio"] < 1.2, "unrelated features are as far apart as any two"


def test_a_projection_keeps_the_distances_of_what_is_flat():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(30, 2)) * [5, 1]
    plane = np.linalg.qr(rng.normal(size=(256, 2)))[0].T  # two directions at right angles in 256 dimensions
    hidden = torch.as_tensor(flat @ plane + rng.normal(size=256))
    points, shares = looks.project(hidden[:12], hidden[12:])
    assert [part.shape for part in points] == [(12, 2), (18, 2)]
    torch.testing.assert_close(torch.pdist(torch.as_tensor(np.concatenate(points))), torch.pdist(hidden))
    assert np.concatenate(points).mean(0) == pytest.approx(np.zeros(2)) and shares.sum() == pytest.approx(1)
    variances = np.concatenate(points).var(0)
    assert shares == pytest.approx(variances / variances.sum()) and shares[0] > shares[1]


def test_a_projection_finds_the_directions_that_vary_most():
    rng = np.random.default_rng(0)
    hidden = torch.as_tensor(rng.normal(size=(2000, 5)) * [0.1, 3, 0.1, 10, 0.1])
    (points,), shares = looks.project(hidden)
    assert abs(np.corrcoef(points[:, 0], hidden[:, 3])[0, 1]) > 0.99
    assert abs(np.corrcoef(points[:, 1], hidden[:, 1])[0, 1]) > 0.99
    assert shares == pytest.approx(np.array([100, 9]) / 109.03, rel=0.1)


# ---- Playing ----
class TwoLooks(Countdown):
    """Countdown in two looks, the second one 100 brighter; `change` may change the second one's steps."""

    def __init__(self, num_envs, split, change):
        super().__init__(num_envs)
        self.split, self.change, self.sent = split, change, []

    def observe(self):
        return super().observe() + np.uint8(100 * (self.split == "full_look"))

    def step(self, actions):
        self.sent.append(actions.copy())
        result = super().step(actions)
        if self.split == "full_look":
            self.change(len(self.sent), *result)
        return result


@pytest.fixture
def play_both(agent, args):
    """Calls looks.play_both with three episodes. -> a function of steps and change, which also returns the envs."""

    def played(steps=100, change=lambda step, *result: None):
        made = []

        def make_envs(args, split, start=0):
            made.append(TwoLooks(args.num_envs, split, change))
            return made[-1]

        about = SimpleNamespace(script=ppo_netrand, args=args, make_envs=make_envs)
        return *looks.play_both(about, agent, 3, steps, seed=7), made

    return played


def test_both_looks_get_the_actions_of_the_seen_one(play_both, agent):
    agent.actor.weight.data *= 1000  # fresh, it takes no notice of what it sees
    seen, unseen, (envs, others) = play_both()
    assert (envs.split, others.split) == ("train", "full_look")
    assert np.array_equal(envs.sent, others.sent)
    assert [len(episode.obs) for episode in seen] == [len(episode.obs) for episode in unseen] == [3, 4, 5]
    for one, other in zip(seen, unseen, strict=True):
        assert np.array_equal(np.stack(one.obs) + 100, np.stack(other.obs))
        assert one.actions == other.actions


def test_a_long_episode_is_cut(play_both):
    seen, unseen, _ = play_both(steps=4)
    assert [len(episode.obs) for episode in seen] == [len(episode.obs) for episode in unseen] == [3, 4, 4]


@pytest.mark.parametrize("part", [0, 1, 2], ids=["reward", "terminated", "truncated"])
def test_looks_that_part_end_the_program(play_both, part, capsys):
    def change(step, obs, reward, terminated, truncated, info):
        if step == 4:
            value = (reward, terminated, truncated)[part]
            value[2] = 1 - value[2]  # environment 2 is the one still under way

    with pytest.raises(SystemExit, match=r"^2$"):
        play_both(change=change)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "part at step 4" in error and error.count("\n") == 1


def test_an_episode_that_goes_on_in_one_look_ends_the_program(play_both, capsys):
    def change(step, obs, reward, terminated, truncated, info):
        terminated[2] = False

    with pytest.raises(SystemExit, match=r"^2$"):
        play_both(change=change)
    assert "part at step 5" in capsys.readouterr().err


def test_what_follows_the_episode_may_differ(play_both):
    def change(step, obs, reward, *rest):
        if step == 4:
            reward[0] = 9

    seen, _, _ = play_both(change=change)
    assert [len(episode.obs) for episode in seen] == [3, 4, 5]


def test_frames_are_of_all_episodes_in_their_order():
    obs = np.random.default_rng(0).integers(0, 256, (8, 3, 64, 64), dtype=np.uint8)
    episodes = [Episode(list(obs[:1])), Episode(list(obs[1:6])), Episode(list(obs[6:]))]
    assert np.array_equal(frames_of(episodes), obs)


# ---- The program ----
def test_labels_tell_runs_apart():
    def state(method, seed, step):
        return SimpleNamespace(method=method, args=ppo_netrand.Args(seed=seed), state={"step": step})

    assert looks.labels([state("PPO", 1, 5), state("netrand", 1, 5)]) == ["PPO", "netrand"]
    assert looks.labels([state("PPO", 1, 5), state("PPO", 2, 5)]) == ["PPO seed 1", "PPO seed 2"]
    three = [state("netrand", 1, 5), state("netrand", 1, 9), state("PPO", 1, 9)]
    assert looks.labels(three) == ["netrand seed 1 step 5", "netrand seed 1 step 9", "PPO"]


def drawn_map(moments, heat):
    """draw_maps' picture of black frames in the seen look and bright blue ones in the unseen one."""
    obs = np.zeros((2, len(moments), 3, 64, 64), dtype=np.uint8)
    obs[1, :, 2] = 200
    return looks.draw_maps([("PPO", np.array(moments), obs, np.full((2, len(moments), 64, 64), heat))])


def test_pictures_show_what_they_are_given():
    figure = drawn_map([0, 7, 14], 0.5)
    rows = np.array(figure.axes).reshape(2, 3)
    assert [axis.get_title() for axis in rows[0]] == ["step 0", "step 7", "step 14"]
    assert [axis.get_ylabel() for axis in rows[:, 0]] == ["PPO\nseen look", "PPO\nunseen look"]
    assert [axis.images[0].get_array()[0, 0].tolist() for axis in rows[:, 1]] == [[0, 0, 0], [0, 0, 200]]
    assert all(np.all(axis.images[1].get_array() == 0.5) for axis in rows.flat)
    plt.close(figure)
    hidden = torch.rand(2, 9, 256)
    row = {"label": "PPO", "cosine": 0.25, "cosine_ratio": 0.5}
    figure = looks.draw_trajectories([(row, hidden), (row | {"label": "other"}, hidden)])
    assert [axis.get_title().split("\n")[0] for axis in figure.axes] == ["PPO", "other"]
    assert "cosine distance 0.250, 0.50 x" in figure.axes[0].get_title()
    lines = {line.get_label(): np.stack(line.get_data(), axis=1) for line in figure.axes[0].get_lines()}
    points, _ = looks.project(*hidden)
    assert np.array_equal(lines["seen look"], points[0]) and np.array_equal(lines["unseen look"], points[1])
    plt.close(figure)


def with_args(folder, to, **changes):
    """A copy of a run with other arguments."""
    shutil.copytree(folder, to)
    about = json.loads((to / "args.json").read_text())
    about["args"].update(changes)
    (to / "args.json").write_text(json.dumps(about))
    return to


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run folders of a tiny run on the real environment, and of the same one as if it were plain PPO from a GPU."""
    runs_dir = tmp_path_factory.mktemp("runs")
    flags = ["--env-id", "coinrun", "--distribution-mode", "hard"]
    folder = tiny_run("ppo_netrand", runs_dir / "netrand", *flags)
    changes = {"netrand": False, "precision": "bf16", "cuda": True, "cuda_required": True}
    return [with_args(folder, runs_dir / "plain", **changes), folder]


def test_two_runs_become_two_pictures_and_a_table(trained, tmp_path, monkeypatch, capsys):
    flags = ["--out", tmp_path, "--episodes", 3, "--steps", 12, "--moments", 4, "--seed", 5]
    lengths = [7, 12, 4]

    def shorter(*args, play_both=looks.play_both):  # an agent this fresh hardly ever ends an episode
        both = play_both(*args)
        for episodes in both:
            for episode, length in zip(episodes, lengths, strict=True):
                del episode.obs[length:], episode.actions[length:], episode.rewards[length:]
        return both

    monkeypatch.setattr(looks, "play_both", shorter)
    drawn = {}
    for name in ("draw_trajectories", "draw_maps"):
        draw = getattr(looks, name)
        monkeypatch.setattr(looks, name, lambda given, name=name, draw=draw: drawn.update({name: given}) or draw(given))
    run(looks, monkeypatch, f"PPO={trained[0]}", trained[1], *flags)
    assert {path.name for path in tmp_path.iterdir()} == {"looks_trajectories.png", "looks_grad_cam.png", "looks.csv"}
    for name, inches in {"looks_trajectories.png": (10, 5.4), "looks_grad_cam.png": (8.5, 8.6)}.items():
        picture = iio.imread(tmp_path / name)
        width, height = inches
        assert picture.shape[:2] == (round(130 * height), round(130 * width))
        assert picture[..., :3].std() > 20 and (picture[..., :3] < 250).any(2).mean() > 0.02, "it is not empty"
    rows = list(csv.DictReader((tmp_path / "looks.csv").open()))
    commit = json.loads((trained[0] / "args.json").read_text())["commit"]
    for row, label in zip(rows, ["PPO", "ppo_netrand"], strict=True):
        assert (row["label"], row["env_id"], row["seed"], row["step"]) == (label, "coinrun", "1", "64")
        assert (row["episodes"], row["steps"], row["commit"]) == ("3", "23", commit)
        assert all(float(row[key]) > 0 for key in ("cosine", "cosine_ratio", "euclidean", "euclidean_ratio"))
    assert "ppo_netrand: cosine distance" in capsys.readouterr().out
    made = looks.common.load_run(trained[1], cuda=False, precision="fp32")
    (agent,) = made.agents()
    both = shorter(made, agent, 3, 12, 5)
    hidden = [looks.encode(agent, frames_of(episodes)) for episodes in both]  # the first episode's come first
    for key, value in looks.distances(*hidden).items():
        assert float(row[key]) == value, "the same seed, the same numbers"
    _, first = drawn["draw_trajectories"][1]
    for given, wanted in zip(first, hidden, strict=True):
        torch.testing.assert_close(given, wanted[: lengths[0]])
    _, moments, frames, cams = drawn["draw_maps"][1]
    assert list(moments) == [0, 2, 4, 6]
    actions = torch.as_tensor([both[0][0].actions[moment] for moment in moments])
    for given, look, episodes in zip(cams, frames, both, strict=True):  # of the same actions in both looks
        assert np.array_equal(look, [episodes[0].obs[moment] for moment in moments])
        wanted = looks.grad_cam(agent, torch.as_tensor(look), actions)
        torch.testing.assert_close(torch.as_tensor(given), wanted)


def test_on_the_real_game_the_looks_differ_in_style_alone(trained):
    made = looks.common.load_run(trained[0], cuda=False, cuda_required=False, precision="fp32")
    (agent,) = made.agents()
    both = looks.play_both(made, agent, 4, 30, 3)
    assert not agent.bf16 and next(agent.parameters()).device.type == "cpu"
    for one, other in zip(*both, strict=True):
        seen, unseen = np.stack(one.obs), np.stack(other.obs)
        assert np.array_equal(seen[..., :13, :26], unseen[..., :13, :26]), "the velocity box says the same"
        assert len(np.unique(seen[..., :13, :26])) > 2, "and it does say something"
        assert (seen != unseen).mean() > 0.1


def test_what_is_wrong_is_said_in_a_line(trained, tmp_path, monkeypatch, capsys):
    full = with_args(trained[0], tmp_path / "full", plain_look=False)
    newer = with_args(trained[0], tmp_path / "newer", new=1)
    other = with_args(trained[0], tmp_path / "other")
    for name in ("args.json", "ppo_netrand.py"):  # a script without that argument
        (other / name).write_text((other / name).read_text().replace("plain_look", "look"))
    before = sorted(tmp_path.rglob("*"))
    out = ["--out", tmp_path]
    for flags, words in (
        ([full, *out], "full: was trained without --plain-look"),
        ([trained[0], full, *out], "full: was trained without --plain-look"),
        ([other, *out], "other: was trained without --plain-look"),
        ([newer, *out], "newer is a run of another version of ppo_netrand.py"),
        ([tmp_path / "none", *out], "none is no folder of a run"),
        ([*out], "a run's folder, or some of them, is needed"),
        ([trained[0], "--out", tmp_path / "nowhere"], "looks.csv: not a .csv file in a folder that exists"),
        ([trained[0], *out, "--episodes", 0], "at least 1"),
        ([trained[0], *out, "--moments", 0], "at least 1"),
        ([trained[0], *out, "--steps", 1], "at least 2"),
        ([trained[0], *out, "--seed", -1], "at least 0"),
    ):
        assert_refuses(looks, monkeypatch, capsys, flags, words)
    assert sorted(tmp_path.rglob("*")) == before, "nothing was written"
