"""What the runs of coins showed most clearly, with a network so small that it is learned in minutes on one core."""

import csv
import sys

import pytest
import torch.nn as nn
from conftest import ROOT, folder_in

sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "benchmark" / "suites")]
import coins
import common


def trained(name, runs_dir, flags):
    """Trains a script on coins with a small network. -> {key: return} of its last evaluation."""
    script = common.load_script(ROOT / "algos" / f"{name}.py")
    make_envs, _ = coins.on_coins(script, ablation="")

    class Small(script.Agent):
        """Two blocks of the three, on pictures of 16 x 16 pixels."""

        def __init__(self, envs, args):
            super().__init__(envs, args)
            blocks = nn.AvgPool2d(4), script.ImpalaBlock(3, 16), script.ImpalaBlock(16, 32)
            self.encoder = nn.Sequential(*blocks, nn.Flatten(), nn.ReLU(), nn.Linear(512, 256), nn.ReLU())

    own = ["--learning-rate", "1e-3", "--eval-every", "1000000", "--no-cuda", "--runs-dir", str(runs_dir)]
    script.main([*coins.SHORT.split(), *own, *flags.split()], make_envs, Small)
    with (folder_in(runs_dir) / "metrics.csv").open() as file:
        return {row["key"]: float(row["value"]) for row in csv.DictReader(file) if row["key"].startswith("eval/")}


@pytest.mark.slow
def test_ppo_takes_the_shortcut_and_learns_free_levels(tmp_path):
    returns = trained("mdpo", tmp_path, "--env-id coins-law-free --distill-coef 0 --total-timesteps 8192")
    assert returns["eval/agent1/law_return"] > 0.9 and returns["eval/agent1/broken_return"] < 0.1
    assert returns["eval/agent2/free_return"] > 0.9 and returns["eval/agent2/broken_return"] > 0.8


@pytest.mark.slow
def test_distillation_keeps_an_agent_off_the_shortcut(tmp_path):
    returns = trained("mdpo", tmp_path, "--env-id coins-law-free")
    for agent in ("agent1", "agent2"):
        assert returns[f"eval/{agent}/law_return"] > 0.9 and returns[f"eval/{agent}/broken_return"] > 0.8


@pytest.mark.slow
def test_netrand_is_right_behind_any_random_kernel(tmp_path):
    returns = trained("ppo_netrand", tmp_path, "--env-id coins-free --mc-samples 3")
    assert returns["eval/free_return"] > 0.9 and returns["eval/mc_free_return"] > 0.9
