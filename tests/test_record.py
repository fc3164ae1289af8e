"""benchmark/analyses/record.py: what an agent sees and does in its script's evaluation, and the films of it."""

from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import record
import torch
from conftest import load, tiny_args
from runs import Countdown, assert_refuses, changed_copy, run, tiny_run

mdpo = load("mdpo")


@pytest.fixture
def agent(tmp_path):
    torch.manual_seed(0)
    return mdpo.Agent(Countdown(1), tiny_args("mdpo", tmp_path))


def fake_run(args, made, script=mdpo):
    """A Run whose environments are Countdowns; `made` gets what make_envs was asked for."""

    def make_envs(args, split, start=0):
        made.append((split, args.seed, args.num_envs))
        return Countdown(args.num_envs)

    return SimpleNamespace(script=script, args=args, make_envs=make_envs)


def evaluate_in_turn(agent, args, make_envs, split, tick=lambda: None):
    """What an evaluation with one environment does: one episode after the other. The action is the step's number."""
    envs, returns, steps = make_envs(mdpo.replace(args, num_envs=1), split), [], 0
    envs.reset()
    while len(returns) < args.eval_episodes:
        steps += 1
        *_, info = envs.step(np.array([steps]))
        returns += [value for _, value, _ in info["episodes"]]
    return np.array(returns)


# ---- What an agent sees and does ----
def seen(episodes):
    """[(environment, episode, step)] of each episode."""
    return [[tuple(obs[0, 0, :3].tolist()) for obs in episode.obs] for episode in episodes]


def test_an_episode_of_each_environment_is_noted(agent, tmp_path):
    made = []
    run = fake_run(tiny_args("mdpo", tmp_path), made)
    episodes = record.play(run, agent, "train", 3, steps=100, seed=7)
    assert made == [("train", 7, 3)]
    assert seen(episodes) == [[(n, 0, t) for t in range(n + 3)] for n in range(3)]
    assert all(episode.ended for episode in episodes)
    assert all(episode.rewards == [float(action) for action in episode.actions] for episode in episodes)
    assert not agent.training, "what follows is of an agent that is evaluated"


def test_actions_are_those_of_the_scripts_evaluation(agent, tmp_path):
    args = mdpo.replace(tiny_args("mdpo", tmp_path), eval_episodes=3, eval_seed=7)
    run = fake_run(args, [])
    returns = mdpo.evaluate(agent, args, run.make_envs, "test")
    episodes = record.play(run, agent, "test", 3, steps=100, seed=7)
    assert [sum(episode.rewards) for episode in episodes] == returns.tolist()


def test_a_long_episode_is_cut_and_ends_the_evaluation(agent, tmp_path):
    episodes = record.play(fake_run(tiny_args("mdpo", tmp_path), []), agent, "test", 3, steps=4)
    assert [len(episode.obs) for episode in episodes] == [3, 4, 4]
    assert [episode.ended for episode in episodes] == [True, True, False]


def test_episodes_that_are_played_in_turn(agent, tmp_path):
    run = fake_run(tiny_args("mdpo", tmp_path), [], SimpleNamespace(evaluate=evaluate_in_turn))
    episodes = record.play(run, agent, "test", 3, steps=100)
    assert seen(episodes) == [[(0, number, t) for t in range(3)] for number in range(3)]
    assert [episode.actions for episode in episodes] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    episodes = record.play(run, agent, "test", 3, steps=2)
    assert seen(episodes) == [[(0, number, t) for t in range(2)] for number in range(3)], "each begins anew"
    assert not any(episode.ended for episode in episodes)


def test_environments_beside_get_the_same_actions(agent, tmp_path):
    made = []
    run = fake_run(tiny_args("mdpo", tmp_path), made)
    episodes, others = record.play(run, agent, "train", 2, steps=100, seed=1, beside="full_look")
    assert made == [("train", 1, 2), ("full_look", 1, 2)]
    assert seen(episodes) == seen(others)
    assert [episode.actions for episode in episodes] == [episode.actions for episode in others]


# ---- Pictures ----
def episode(length, ended, channels=6):
    obs = [np.full((channels, 8, 8), 10 * t, np.uint8) for t in range(length)]
    for t, image in enumerate(obs):
        image[-1] = 10 * t + 9
    return record.Episode(obs, [0] * length, [1.0] * length, ended)


def test_a_picture_before_each_step_and_one_after_the_last():
    long, short, cut = episode(3, True), episode(2, True), episode(3, False)
    films = list(record.pictures([long, short, cut, long], 3, columns=2, scale=2, gray=False))
    assert [film.shape for film in films] == [(32, 32, 3)] * 4
    corner = [[film[y, x].tolist() for y, x in ((0, 0), (0, 16), (16, 0))] for film in films]
    assert corner[0] == [[0, 0, 9]] * 3, "the newest three channels"
    assert corner[1] == [[10, 10, 19]] * 3
    assert corner[2] == [[20, 20, 29], [3, 3, 6], [20, 20, 29]], "what has ended stays and darkens"
    assert corner[3] == [[6, 6, 9], [3, 3, 6], [20, 20, 29]], "what was cut does not"


def test_gray_frames_have_one_channel(monkeypatch):
    texts = []
    monkeypatch.setattr(record.cv2, "putText", lambda picture, text, *_: texts.append(text))
    film = next(record.pictures([episode(3, True, channels=4)], 3, columns=1, scale=1, gray=True))
    assert film[0, 0].tolist() == [9, 9, 9]
    cell = record.cell(episode(3, True), 2, 1, False)
    assert cell[0, 0].tolist() == [20, 20, 29] and texts[-1] == "2", "the return so far"


# ---- The program ----
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The run of a changed copy of mdpo.py."""
    folder = tmp_path_factory.mktemp("runs")
    return tiny_run("mdpo", folder / "runs", script=changed_copy("mdpo", folder / "mine.py"))


def test_a_film_shows_what_the_environments_begin_with(folder, tmp_path, monkeypatch, capsys):
    flags = ["--rows", 2, "--columns", 3, "--scale", 2, "--steps", 4, "--agent", 2, "--no-cuda"]
    run(record, monkeypatch, folder, *flags, "--out", tmp_path / "film.gif")
    assert "film.gif: 4 steps, returns 0 (cut) 0 (cut) 0 (cut)" in capsys.readouterr().out
    film = iio.imread(tmp_path / "film.gif")
    assert film.shape[1:] == (2 * 128, 3 * 128, 3) and len(film) > 2, "a .gif merges equal pictures"
    args = mdpo.Args(env_id="bossfight", distribution_mode="easy", num_agents=1, num_envs=6, seed=0)
    obs, _ = mdpo.make_envs(args, "test").reset()
    grid = np.concatenate([np.concatenate(list(row), axis=2) for row in obs.reshape(2, 3, 3, 64, 64)], axis=1)
    shown = film[0, ::2, ::2].transpose(2, 0, 1).astype(int)
    assert np.median(np.abs(shown - grid)) < 8, "a .gif has 256 colours"


def test_a_film_lies_in_the_runs_folder(folder, monkeypatch):
    run(record, monkeypatch, folder, "--rows", 1, "--columns", 1, "--steps", 3, "--no-cuda")
    assert iio.imread(folder / "episodes.mp4").shape == (4, 256, 256, 3)


def test_wrong_input_says_so_in_one_line(folder, tmp_path, monkeypatch, capsys):
    for flags, says in (
        ((tmp_path / "none",), "none is no folder of a run"),
        ((folder, "--out", tmp_path / "film.avi"), "film.avi: not a .mp4 or .gif file"),
        ((folder, "--out", tmp_path / "nowhere" / "film.gif"), "film.gif: not a .mp4 or .gif file in a folder"),
        ((folder, "--rows", 0), "at least 1"),
        ((folder, "--steps", 0), "at least 1"),
        ((folder, "--seed", -1), "at least 0"),
        ((folder, "--agent", 3), "--agent 3: the run has 2"),
        ((folder, "--agent", 0), "--agent 0: the run has 2"),
        ((folder, "--split", "full_look"), "--split full_look: that run was not trained with --plain-look"),
        ((folder, "--split", "looks"), "--split looks: that run is not of drqv2_pieg.py"),
    ):
        assert_refuses(record, monkeypatch, capsys, flags, says)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_netrand", "drq_sam_reset", "sac_sam_reset", "drqv2_pieg"])
def test_every_script_can_be_filmed(name, tmp_path, monkeypatch):
    """The first picture is what its environments begin with."""
    folder = tiny_run(name, tmp_path / "runs")
    pictures = []
    monkeypatch.setattr(record, "write", lambda path, frames, fps: pictures.extend(frames))
    run(record, monkeypatch, folder, "--rows", 1, "--columns", 2, "--scale", 1, "--steps", 3, "--no-cuda")
    made = record.common.load_run(folder, seed=0, num_envs=2)
    obs, _ = made.make_envs(made.args, "test").reset()
    height, width = obs.shape[2:]
    assert [picture.shape for picture in pictures] == [(height, 2 * width, 3)] * 4
    assert np.array_equal(pictures[0][: height // 2, : width - 1, -1], obs[0, -1, : height // 2, : width - 1])
