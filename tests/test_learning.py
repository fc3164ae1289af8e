"""What the runs of coins showed most clearly, learned again in three minutes of one core."""

import csv
import sys

import pytest
from conftest import ROOT, folder_in

sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "benchmark" / "suites")]
import coins
import common


def trained(name, runs_dir, flags):
    """Trains a script on coins. -> {key: return} of its last evaluation."""
    script = common.load_script(ROOT / "algos" / f"{name}.py")
    factories = coins.on_coins(script, ablation="", network="small")
    own = ["--eval-every", "1000000", "--no-cuda", "--runs-dir", str(runs_dir)]
    script.main([*coins.SHORT.split(), *own, *flags.split()], *factories)
    with (folder_in(runs_dir) / "metrics.csv").open() as file:
        return {row["key"]: float(row["value"]) for row in csv.DictReader(file) if row["key"].startswith("eval/")}


@pytest.mark.slow
def test_ppo_learns_free_levels_and_takes_the_shortcut_of_others(tmp_path):
    returns = trained("mdpo", tmp_path, "--env-id coins-law-free --distill-coef 0 --total-timesteps 6144")
    assert returns["eval/agent1/law_return"] > 0.9 and returns["eval/agent1/broken_return"] < 0.1
    assert returns["eval/agent2/free_return"] > 0.9 and returns["eval/agent2/broken_return"] > 0.8


@pytest.mark.slow
def test_distillation_keeps_both_agents_off_the_shortcut(tmp_path):
    """With a detached peer both returns are 0 where the law is broken. The seeds of docs/results.md differ."""
    returns = trained("mdpo", tmp_path, "--env-id coins-law-free --total-timesteps 12288")
    for agent in ("agent1", "agent2"):
        assert returns[f"eval/{agent}/law_return"] > 0.9 and returns[f"eval/{agent}/broken_return"] > 0.4


@pytest.mark.slow
def test_netrand_is_right_behind_random_kernels(tmp_path):
    """The Monte Carlo policy plays behind kernels that were never trained on."""
    returns = trained("ppo_netrand", tmp_path, "--env-id coins-free --mc-samples 3")
    assert returns["eval/free_return"] > 0.75 and returns["eval/mc_free_return"] > 0.75
