"""What the runs of coins showed most clearly, learned again in two minutes of one core."""

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
