"""What the tests of benchmark/analyses/ share: tiny runs, scripted environments, and programs as by a command line."""

import sys

import common
import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT, ROWS, folder_in


def tiny_run(name, runs_dir, *flags, script=None):
    """The folder of a run of a script, or of a copy of it, without evaluations."""
    path = script or ROOT / "algos" / f"{name}.py"
    flags = [*ROWS[name]["flags"].split(), "--eval-every", "0", "--runs-dir", str(runs_dir), *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *flags])  # what args.json says
        common.load_script(path).main()
    return folder_in(runs_dir)


def changed_copy(name, path):
    """A copy of a PPO script at `path`, whose network is narrower."""
    text = (ROOT / "algos" / f"{name}.py").read_text()
    for before, after in (("nn.Linear(2048, 256)", "nn.Linear(2048, 64)"), ("nn.Linear(256, ", "nn.Linear(64, ")):
        assert before in text
        text = text.replace(before, after)
    path.write_text(text)
    return path


class Countdown:
    """Environment n's episodes take n + 3 steps. An observation says which environment, episode and step it is.

    The reward is the action. Odd environments end by truncation, even ones by termination.
    """

    def __init__(self, num_envs, num_actions=15):
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(0, 255, (3, 64, 64), np.uint8)
        self.single_action_space = gym.spaces.Discrete(num_actions)
        self.episode, self.time, self.resets = np.zeros(num_envs, int), np.zeros(num_envs, int), 0

    def observe(self):
        obs = np.zeros((self.num_envs, 3, 64, 64), np.uint8)
        obs[:, 0, 0, :3] = np.stack([np.arange(self.num_envs), self.episode, self.time], axis=1)
        return obs

    def reset(self):
        self.episode += self.resets > 0
        self.time[:], self.returns, self.resets = 0, np.zeros(self.num_envs), self.resets + 1
        return self.observe(), {}

    def step(self, actions):
        self.returns, self.time = self.returns + actions, self.time + 1
        odd = np.arange(self.num_envs) % 2 == 1
        done = self.time == np.arange(self.num_envs) + 3
        ends = [(n, self.returns[n], self.time[n]) for n in np.flatnonzero(done)]
        self.episode, self.time, self.returns = self.episode + done, self.time * ~done, self.returns * ~done
        return self.observe(), actions.astype(np.float32), done & ~odd, done & odd, {"episodes": ends}

    def close(self):
        pass


def run(program, monkeypatch, *flags):
    """Calls a program's main with these flags."""
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, flags)])
    program.main()


def assert_refuses(program, monkeypatch, capsys, flags, says):
    """That a program ends with exit code 2 and one line that says why."""
    with pytest.raises(SystemExit, match=r"^2$"):
        run(program, monkeypatch, *flags)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1, error
