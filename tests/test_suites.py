"""benchmark/suites.py: stacks, ends and actions worked out by hand, and the command line on a suite of toys."""

import csv
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import AGENTS, ROOT, ROWS

sys.path.insert(0, str(ROOT / "benchmark"))
import suites


def tiny(script):
    """Flags of a run of 36 steps."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in ROWS[script]["args"].items() if key != "cuda"]
    return [*flags, "--no-cuda"]


class Toy:
    """Counts its control steps into a picture; an episode takes `length` of them and fails at its end, or is cut."""

    low, high = np.array([-2.0, 0.0]), np.array([2.0, 4.0])

    def __init__(self, length=5, fails=False, reward=1.0, start=0, size=84):
        self.length, self.fails, self.reward, self.count, self.closed = length, fails, reward, start, False
        self.size, self.actions = size, []

    def reset(self):
        self.time = 0
        self.count += 10

    def step(self, action):
        self.actions.append(action)
        self.time += 1
        self.count += 1
        ended = self.time == self.length
        return self.reward * self.time, ended and self.fails, ended and not self.fails

    def frame(self):
        return np.full((self.size, self.size, 3), (self.count, self.count + 100, self.count + 200), np.uint8)

    def close(self):
        self.closed = True


def frames(obs):
    """The counts that a stack shows: [N, 9, 84, 84] -> [N, 3]; each frame is whole and in its channels."""
    planes = obs[:, :, :1, :1]
    assert (obs == planes).all() and obs.dtype == np.uint8 and obs.shape[1:] == (9, 84, 84)
    planes = planes.reshape(-1, 3, 3).astype(int) - np.array([0, 100, 200])
    assert (planes == planes[..., :1]).all()
    return planes[..., 0].tolist()


NOTHING = np.zeros((1, 2), np.float32)


def test_stacks_hold_three_frames_oldest_first_and_begin_with_one_repeated():
    envs = suites.Stacks([Toy(length=100), Toy(length=100, start=5)], repeat=2)
    assert envs.single_observation_space.shape == (9, 84, 84) and envs.single_action_space.shape == (2,)
    obs, _ = envs.reset()
    assert frames(obs) == [[10, 10, 10], [15, 15, 15]]
    seen = [envs.step(np.zeros((2, 2), np.float32))[0] for _ in range(3)]
    assert frames(seen[0]) == [[10, 10, 12], [15, 15, 17]]
    assert frames(seen[2]) == [[12, 14, 16], [17, 19, 21]]
    assert frames(seen[0]) == [[10, 10, 12], [15, 15, 17]], "an observation that was given stays as it was"


def test_actions_are_stretched_over_their_ranges():
    toy = Toy()
    envs = suites.Stacks([toy], repeat=1)
    envs.reset()
    for action in ((-1, -1), (1, 1), (0, 0.5)):
        envs.step(np.array([action], np.float32))
    assert np.array_equal(toy.actions, [[-2, 0], [2, 4], [0, 3]])


def test_gray_frames_are_one_number_deep_and_its_fractions_are_cut_off():
    envs = suites.Stacks([Toy(length=2, size=64)], repeat=1, gray=True)
    assert envs.single_observation_space.shape == (3, 64, 64)
    seen = [envs.reset()[0], *(envs.step(NOTHING)[0] for _ in range(2))]
    # 0.299 count + 0.587 (count + 100) + 0.114 (count + 200) = count + 81.5
    assert [obs[:, :, 0, 0].tolist() for obs in seen] == [[[91, 91, 91]], [[91, 91, 92]], [[103, 103, 103]]]
    assert all((obs == obs[:, :, :1, :1]).all() and obs.shape == (1, 3, 64, 64) for obs in seen)


@pytest.mark.parametrize("fails", [False, True])
def test_an_end_stops_the_repeats_and_begins_the_next_episode(fails):
    toys = [Toy(5, fails), Toy(100, start=5)]
    envs = suites.Stacks(toys, repeat=2)
    envs.reset()
    rewards, ends = [], []
    for _ in range(3):
        obs, reward, terminated, truncated, info = envs.step(np.zeros((2, 2), np.float32))
        rewards.append(reward.tolist())
        ends.append((terminated.tolist(), truncated.tolist()))
    assert rewards == [[1 + 2, 1 + 2], [3 + 4, 3 + 4], [5, 5 + 6]] and reward.dtype == np.float32
    assert ends[:2] == [([False, False], [False, False])] * 2
    assert ends[2] == ([fails, False], [not fails, False])
    assert frames(info["final_obs"]) == [[12, 14, 15], [17, 19, 21]]
    assert frames(obs) == [[25, 25, 25], [17, 19, 21]]
    obs, reward, *_, info = envs.step(np.zeros((2, 2), np.float32))
    assert frames(obs) == frames(info["final_obs"]) == [[25, 25, 27], [19, 21, 23]] and reward[0] == 1 + 2
    envs.close()
    assert all(toy.closed for toy in toys)


def test_seeds_tell_training_from_all_else():
    def seeds(split, seed=1, restart=0):
        return suites.seeds_of(SimpleNamespace(seed=seed, num_envs=3), split, restart)

    assert seeds("test") == seeds("shape_large") == seeds("wood")
    different = [seeds("train"), seeds("test"), seeds("train", seed=2), seeds("train", restart=1)]
    assert len({seed for some in different for seed in some}) == 12


# ---- The command line ----
@pytest.fixture
def suite(monkeypatch):
    """A suite of toys, whose variants have a reward and a brightness of their own, and scripts with tiny agents."""
    made = []

    def make_envs(args, split, restart=0, size=84, gray=False):
        made.append((split, size, gray))
        reward, start = {"train": (1, 0), "test": (1, 0), "plain": (1, 20), "dark": (3, 40)}[split]
        assert suites.task_of(args, toys) in ("toy_push", "toy_pull")
        some = [Toy(6, reward=reward, start=start, size=size) for _ in range(args.num_envs)]
        return suites.Stacks(some, args.action_repeat, gray)

    def check(variants):
        if set(variants) - {"plain", "dark"}:
            suites.fail(f"no {variants}")

    def with_a_tiny_agent(name, suite=None):
        script = load_script(name, suite)
        for function in (script.main, script.load_agent):
            setattr(script, function.__name__, partial(function, make_agent=AGENTS[name]))
        return script

    load_script = suites.load_script
    monkeypatch.setattr(suites, "load_script", with_a_tiny_agent)
    toys = ModuleType("toys", "How to use it.")
    vars(toys).update(TASKS={"toy": "push pull"}, VARIANTS=("plain", "dark"), SCORE="return", make_envs=make_envs)
    vars(toys).update(check=check, made=made, __file__="toys.py")
    return toys


@pytest.mark.parametrize("script, frames", [("sac_sam_reset", (64, True)), ("drqv2_pieg", (84, False))])
def test_a_suite_is_trained_on_resumed_and_tested(script, frames, suite, tmp_path, capsys):
    suites.main(suite, [script, *tiny(script), "--runs-dir", str(tmp_path)])
    assert set(suite.made) == {("train", *frames), ("test", *frames)}
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(f"toy-push__{script}__1__"), "its first task is the default"
    suites.main(suite, [script, "--resume", str(folder), "--total-timesteps", "40"])
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["step"] == 40 and state["args"]["env_id"] == "toy-push"
    suite.made.clear()
    suites.main(suite, ["test", str(folder), "--episodes", "3"])
    rows = list(csv.reader((folder / "toys.csv").open()))
    # Six control steps of rewards 1 to 6, once or three times.
    assert rows == [
        ["step", "variant", "episodes", "return", "std"],
        ["40", "plain", "3", "21", "0"],
        ["40", "dark", "3", "63", "0"],
    ]
    assert suite.made == [(split, *frames) for split in ("test", "plain", "dark")]
    assert "dark         return 63 +- 0 in 3 episodes" in capsys.readouterr().out
    suites.main(suite, ["test", str(folder), "--variants", "dark", "--episodes", "1"])
    assert [row[1:4] for row in csv.reader((folder / "toys.csv").open())][1:] == [["dark", "1", "63"]]


def test_another_task_is_trained_on_when_asked_and_resumed_without(suite, tmp_path):
    flags = [*tiny("sac_sam_reset"), "--runs-dir", str(tmp_path), "--env-id", "toy_pull", "--eval-every", "0"]
    suites.main(suite, ["sac_sam_reset", *flags])
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("toy-pull__")
    suites.main(suite, ["sac_sam_reset", f"--resume={folder}", "--total-timesteps", "38"])
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 38


def test_look_puts_the_variants_side_by_side(suite, tmp_path):
    suites.main(suite, ["look", str(tmp_path / "look.png"), "--scale", "2"])
    picture = cv2.imread(str(tmp_path / "look.png"))[..., ::-1]
    assert picture.shape == (168, 336, 3)
    assert (picture[60:, :168] == (30, 130, 230)).all() and (picture[60:, 168:] == (50, 150, 250)).all()
    assert (picture[:20, :168] != (30, 130, 230)).any(), "its name"
    suites.main(suite, ["look", str(tmp_path / "one.png"), "--variants", "dark", "--env-id", "toy_pull"])
    assert cv2.imread(str(tmp_path / "one.png")).shape == (336, 336, 3)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_is_the_suite_s_own(argv, suite, capsys):
    suites.main(suite, argv)
    assert capsys.readouterr().out == "How to use it.\n"


@pytest.mark.parametrize(
    "argv, said",
    [
        (["nothing"], "no command and no script 'nothing'; commands: test look; scripts: drq_sam_reset"),
        (["mdpo"], "mdpo is no script for DeepMind Control from pixels"),
        (["sac_sam_reset", "--env-id", "walker-walk"], "--env-id walker-walk: no such task, toy-pu"),
        (["sac_sam_reset", "--env-id", "toy_push", "--gamma", "2"], "--gamma 2.0: from 0 to 1"),
        (["drqv2_pieg", "--eval-modes", "color_easy"], "--eval-modes: looks of DMC-GB; those of toys are plain dark"),
        (["drqv2_pieg", "--encoder", "drqv2", "--eval-modes=video_hard"], "--eval-modes: looks of DMC-GB; those of"),
        (["drqv2_pieg", "--eval_modes", "color_easy"], "--eval-modes: looks of DMC-GB; those of toys are plain dark"),
        (["drqv2_pieg", "--eval_modes=color_easy"], "--eval-modes: looks of DMC-GB; those of toys are plain dark"),
        (["drqv2_pieg", "--resume", "@/run", "--eval-modes", "color_easy"], "--eval-modes: looks of DMC-GB; those of"),
        (["test", "@/nowhere"], "nowhere cannot be read as a checkpoint: No such file or directory"),
        (["test", "@/nowhere", "--variants", "wood"], "no ('wood',)"),
        (["test", "@/nowhere", "--episodes", "0"], "--episodes 0: at least 1"),
        (["look", "@/look.jpg"], "look.jpg at --scale 4: a .png file in a folder that exists"),
        (["look", "@/no/look.png"], "look.png at --scale 4: a .png file in a folder that exists"),
        (["look", "@/look.png", "--scale", "0"], "look.png at --scale 0: a .png file"),
        (["look", "@/look.png", "--env-id", "toy"], "--env-id toy: no such task, there are toy_push toy_pull"),
        (["look", "@/look.png", "--variants", "wood"], "no ('wood',)"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(argv, said, suite, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^2$"):
        suites.main(suite, [part.replace("@", str(tmp_path)) for part in argv])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert not list(tmp_path.iterdir())
