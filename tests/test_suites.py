"""benchmark/suites/pixels.py: stacks, ends and actions worked out by hand, and the command line on a suite of toys."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import AGENTS, ROOT, ROWS

sys.path[:0] = [str(ROOT / "benchmark" / "suites"), str(ROOT / "benchmark")]
import common
import pixels


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
    envs = pixels.Stacks([Toy(length=100), Toy(length=100, start=5)], repeat=2)
    assert envs.single_observation_space.shape == (9, 84, 84) and envs.single_action_space.shape == (2,)
    obs, _ = envs.reset()
    assert frames(obs) == [[10, 10, 10], [15, 15, 15]]
    seen = [envs.step(np.zeros((2, 2), np.float32))[0] for _ in range(3)]
    assert frames(seen[0]) == [[10, 10, 12], [15, 15, 17]]
    assert frames(seen[2]) == [[12, 14, 16], [17, 19, 21]]
    assert frames(seen[0]) == [[10, 10, 12], [15, 15, 17]], "an observation that was given stays as it was"


def test_actions_are_stretched_over_their_ranges():
    toy = Toy()
    envs = pixels.Stacks([toy], repeat=1)
    envs.reset()
    for action in ((-1, -1), (1, 1), (0, 0.5)):
        envs.step(np.array([action], np.float32))
    assert np.array_equal(toy.actions, [[-2, 0], [2, 4], [0, 3]])


def test_gray_frames_are_one_number_deep_and_its_fractions_are_cut_off():
    envs = pixels.Stacks([Toy(length=2, size=64)], repeat=1, gray=True)
    assert envs.single_observation_space.shape == (3, 64, 64)
    seen = [envs.reset()[0], *(envs.step(NOTHING)[0] for _ in range(2))]
    # 0.299 count + 0.587 (count + 100) + 0.114 (count + 200) = count + 81.5
    assert [obs[:, :, 0, 0].tolist() for obs in seen] == [[[91, 91, 91]], [[91, 91, 92]], [[103, 103, 103]]]
    assert all((obs == obs[:, :, :1, :1]).all() and obs.shape == (1, 3, 64, 64) for obs in seen)


@pytest.mark.parametrize("fails", [False, True])
def test_an_end_stops_the_repeats_and_begins_the_next_episode(fails):
    toys = [Toy(5, fails), Toy(100, start=5)]
    envs = pixels.Stacks(toys, repeat=2)
    envs.reset()
    rewards, ends, episodes = [], [], []
    for _ in range(3):
        obs, reward, terminated, truncated, info = envs.step(np.zeros((2, 2), np.float32))
        rewards.append(reward.tolist())
        ends.append((terminated.tolist(), truncated.tolist()))
        episodes.append(info["episodes"])
    assert rewards == [[1 + 2, 1 + 2], [3 + 4, 3 + 4], [5, 5 + 6]] and reward.dtype == np.float32
    assert ends[:2] == [([False, False], [False, False])] * 2
    assert ends[2] == ([fails, False], [not fails, False])
    assert episodes == [[], [], [(0, 15, 3)]]  # environment, return, length in steps
    assert frames(info["final_obs"]) == [[12, 14, 15], [17, 19, 21]]
    assert frames(obs) == [[25, 25, 25], [17, 19, 21]]
    obs, reward, *_, info = envs.step(np.zeros((2, 2), np.float32))
    assert frames(obs) == frames(info["final_obs"]) == [[25, 25, 27], [19, 21, 23]] and reward[0] == 1 + 2
    for _ in range(2):
        *_, info = envs.step(np.zeros((2, 2), np.float32))
    assert info["episodes"] == [(0, 15, 3)], "returns and lengths begin anew"
    envs.close()
    assert all(toy.closed for toy in toys)


# ---- A suite of toys ----
@pytest.fixture
def suite(monkeypatch):
    """A suite of toys, whose variants have a reward and a brightness of their own, and scripts with tiny agents."""
    made = []

    def make(task, variant, seed, size, training):
        made.append((task, variant, seed, size, training))
        reward, start = {"plain": (1, 20), "dark": (3, 40)}[variant]
        return Toy(6, reward=reward, start=start, size=size)

    def check(variants):
        if set(variants) - {"plain", "dark"}:
            common.fail(f"no {variants}")

    def load_with_a_tiny_agent(path):
        script = load_script(path)
        script.Agent = AGENTS.get(Path(path).stem)
        return script

    load_script = common.load_script
    monkeypatch.setattr(common, "load_script", load_with_a_tiny_agent)
    toys = pixels.Suite("toys", "How to use it.", ("toy-push", "toy-pull"), ("plain", "dark"), "return", make, check)
    toys.made = made
    return toys


def test_seeds_tell_training_from_all_else(suite):
    def seeds(split, seed=1, start=0):
        args = SimpleNamespace(env_id="toy-push", seed=seed, num_envs=3, action_repeat=1)
        suite.made.clear()
        pixels.make_envs(suite, args, split, start)
        return [seed for _, _, seed, *_ in suite.made]

    assert seeds("test") == seeds("plain") == seeds("dark")
    different = [seeds("train"), seeds("test"), seeds("train", seed=2), seeds("train", start=1)]
    assert len({seed for some in different for seed in some}) == 12


def test_what_is_trained_on_is_the_first_variant(suite):
    args = SimpleNamespace(env_id="Toy_Pull", seed=1, num_envs=1, action_repeat=1)
    for split in ("train", "test", "plain", "dark"):
        pixels.make_envs(suite, args, split, size=64)
    assert [(task, variant, size, training) for task, variant, _, size, training in suite.made] == [
        ("toy-pull", "plain", 64, True),
        ("toy-pull", "plain", 64, False),
        ("toy-pull", "plain", 64, False),
        ("toy-pull", "dark", 64, False),
    ]


def kinds(suite):
    """What was made: {(variant, size, whether for training)}."""
    return {(variant, size, training) for _, variant, _, size, training in suite.made}


# ---- The command line ----
@pytest.mark.parametrize("script, size", [("sac_sam_reset", 64), ("drqv2_pieg", 84)])
def test_a_suite_is_trained_on_resumed_and_tested(script, size, suite, tmp_path, capsys):
    pixels.main(suite, [script, *tiny(script), "--runs-dir", str(tmp_path)])
    assert kinds(suite) == {("plain", size, True), ("plain", size, False)}
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(f"toy-push__{script}__1__"), "its first task is the default"
    pixels.main(suite, [script, "--resume", str(folder), "--total-timesteps", "40"])
    run = common.load_run(folder)
    assert run.state["step"] == 40 and run.args.env_id == "toy-push"
    suite.made.clear()
    pixels.main(suite, ["test", str(folder), "--episodes", "3"])
    # Six control steps of rewards 1 to 6, once or three times.
    expected = "step,variant,episodes,return,std\n40,plain,3,21,0\n40,dark,3,63,0\n"
    assert (folder / "toys.csv").read_text() == expected
    assert kinds(suite) == {("plain", size, False), ("dark", size, False)}
    assert "dark         return 63 +- 0 in 3 episodes" in capsys.readouterr().out
    pixels.main(suite, ["test", str(folder), "--variants", "dark", "--episodes", "1"])
    assert [row[1:4] for row in csv.reader((folder / "toys.csv").open())][1:] == [["dark", "1", "63"]]
    (folder / "toys.csv").unlink()
    (folder / "toys.csv").mkdir()  # cannot be written
    pixels.main(suite, ["test", str(folder), "--variants", "dark", "--episodes", "1"])
    captured = capsys.readouterr()
    assert "dark         return 63 +- 0 in 1 episodes" in captured.out and "not written: " in captured.err


def test_a_copy_of_a_script_is_trained_and_tested_with_itself(suite, tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text((ROOT / "algos" / "sac_sam_reset.py").read_text())
    monkeypatch.setitem(AGENTS, "mine", AGENTS["sac_sam_reset"])
    flags = [*tiny("sac_sam_reset"), "--runs-dir", str(tmp_path / "runs"), "--eval-every", "0"]
    pixels.main(suite, [str(path), *flags])
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("toy-push__mine__1__") and (folder / "mine.py").read_text() == path.read_text()
    path.unlink()
    pixels.main(suite, ["test", str(folder), "--episodes", "1"])
    assert (folder / "toys.csv").read_text().count("\n") == 3
    assert {size for _, size, _ in kinds(suite)} == {64}


def test_another_task_is_trained_on_when_asked_and_resumed_without(suite, tmp_path):
    flags = [*tiny("sac_sam_reset"), "--runs-dir", str(tmp_path), "--env-id", "toy_pull", "--eval-every", "0"]
    pixels.main(suite, ["sac_sam_reset", *flags])
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("toy-pull__")
    pixels.main(suite, ["sac_sam_reset", f"--resume={folder}", "--total-timesteps", "38"])
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 38


def test_look_puts_the_variants_side_by_side(suite, tmp_path):
    pixels.main(suite, ["look", str(tmp_path / "look.png"), "--scale", "2"])
    picture = cv2.imread(str(tmp_path / "look.png"))[..., ::-1]
    assert picture.shape == (168, 336, 3)
    assert (picture[60:, :168] == (30, 130, 230)).all() and (picture[60:, 168:] == (50, 150, 250)).all()
    assert (picture[:20, :168] != (30, 130, 230)).any(), "its name"
    pixels.main(suite, ["look", str(tmp_path / "one.png"), "--variants", "dark", "--env-id", "toy_pull"])
    assert cv2.imread(str(tmp_path / "one.png")).shape == (336, 336, 3)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_is_the_suite_s_own(argv, suite, capsys):
    pixels.main(suite, argv)
    assert capsys.readouterr().out == "How to use it.\n"


@pytest.mark.parametrize(
    "argv, said",
    [
        (["nothing"], "no script 'nothing', there are: drq_sam_reset"),
        (["nothing.py"], "nothing.py: no such script"),
        (["mdpo"], "mdpo.py is no script for DeepMind Control from pixels"),
        (["sac_sam_reset", "--env-id", "walker-walk"], "--env-id walker-walk: no such task; there are toy-pu"),
        (["sac_sam_reset", "--env-id", "toy_push", "--gamma", "2"], "--gamma 2.0: from 0 to 1"),
        (["drqv2_pieg", "--eval-modes", "color_easy"], "--eval-modes: looks of DMC-GB; those of toys are plain dark"),
        (["drqv2_pieg", "--encoder", "drqv2", "--eval-modes=video_hard"], "--eval-modes: looks of DMC-GB; those of"),
        (["drqv2_pieg", "--eval_modes", "color_easy"], "--eval-modes: looks of DMC-GB; those of toys are plain dark"),
        (["drqv2_pieg", "--eval_modes=color_easy"], "--eval-modes: looks of DMC-GB; those of toys are plain dark"),
        (["drqv2_pieg", "--resume", "@/run", "--eval-modes", "color_easy"], "--eval-modes: looks of DMC-GB; those of"),
        (["test", "@/nowhere"], "nowhere is no folder of a run: args.json: No such file or directory"),
        (["test", "@/nowhere", "--variants", "wood"], "no ('wood',)"),
        (["test", "@/nowhere", "--episodes", "0"], "--episodes 0: at least 1"),
        (["look", "@/look.jpg"], "look.jpg: not a .png file in a folder that exists"),
        (["look", "@/no/look.png"], "look.png: not a .png file in a folder that exists"),
        (["look", "@/look.png", "--scale", "0"], "--scale 0: at least 1"),
        (["look", "@/look.png", "--env-id", "toy"], "--env-id toy: no such task; there are toy-push toy-pull"),
        (["look", "@/look.png", "--variants", "wood"], "no ('wood',)"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(argv, said, suite, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^2$"):
        pixels.main(suite, [part.replace("@", str(tmp_path)) for part in argv])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "program, found",
    [
        ("benchmark/suites/ablations.py", "ablations.py"),
        ("/somewhere/benchmark/suites/manipulation.py", "manipulation.py"),
        ("drawerworld.py", "drawerworld.py"),  # started from their folder
        ("algos/mdpo.py", None),
        ("algos/ablations.py", None),
        ("suites/mine.py", None),
        ("mdpo.py", None),
    ],
)
def test_a_run_knows_which_suite_started_it(program, found):
    path = common.suite_program({"command": [program, "sac_sam_reset", "layer_norm"]})
    assert path == (found and ROOT / "benchmark" / "suites" / found)
