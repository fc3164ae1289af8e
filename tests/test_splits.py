"""benchmark/tables/plot_splits.py: which numbers of which runs become one dot, from runs' folders to the picture."""

import sys

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from conftest import ROOT
from runs import assert_refuses, run

sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "benchmark" / "tables")]
import collect
import papers
import plot_splits
import report
from test_curves import make_run


def write_run(folder, method, seed, values, task="coins-law"):
    """A run's folder with evaluations {key: one number, or one at each evaluation}."""
    args = {"env_id": task, "exp_name": method, "seed": seed, "distribution_mode": "hard"}
    make_run(folder, ["benchmark/suites/coins.py", "mdpo", "--exp-name", method, "--seed", str(seed)], args)
    lines = ["step,key,value"]
    for key, numbers in values.items():
        for step, value in enumerate(numbers, 1):
            lines.append(f"{step},{key},{value}")
    (folder / "metrics.csv").write_text("\n".join([*lines, ""]))


@pytest.fixture
def table(tmp_path, monkeypatch):
    """collect.py's CSV of three seeds of PPO, two of MDPO and one of netrand."""
    for seed, last in enumerate((0.1, 0.3, 0.5), 1):
        values = {"eval/law_return": [0, 1], "eval/broken_return": [0.9, last], "charts/reward": [7]}
        write_run(tmp_path / f"ppo{seed}", "ppo", seed, values)
    for seed in (1, 2):
        values = {"eval/law_return": [0.5], "eval/agent1/law_return": [1], "eval/agent2/law_return": [0]}
        write_run(tmp_path / f"mdpo{seed}", "mdpo", seed, values, "coins-law-free")
    write_run(tmp_path / "netrand", "netrand", 1, {"eval/law_return": [0.6], "eval/mc_law_return": [0.7]})
    run(collect, monkeypatch, tmp_path, "--keys", "eval/", "--out", tmp_path / "all.csv")
    return tmp_path / "all.csv"


def test_the_last_evaluations_of_all_seeds_become_one_line(table, tmp_path, monkeypatch):
    run(plot_splits, monkeypatch, table, "--out", tmp_path / "a.svg", "--csv", tmp_path / "a.csv", "--reps", 50)
    lines = pd.read_csv(tmp_path / "a.csv").set_index(["method", "split"])
    assert lines["iqm"].to_dict() == {
        ("ppo", "law"): 1,
        ("ppo", "broken"): 0.3,
        ("mdpo, agent 1", "law"): 1,
        ("mdpo, agent 2", "law"): 0,
        ("netrand", "law"): 0.6,
        ("netrand, Monte Carlo", "law"): 0.7,
    }
    ppo = lines.loc[("ppo", "broken")]
    assert 0.1 <= ppo["low"] < 0.3 < ppo["high"] <= 0.5 and (ppo["runs"], ppo["steps"]) == (3, 2)
    assert lines.loc[("netrand", "law"), ["low", "high"]].isna().all(), "a single run has no interval"
    picture = (tmp_path / "a.svg").read_text()
    assert "mdpo, agent 2 (coins-law-free)" in picture and "broken" in picture and "of 1 to 3 runs" in picture
    run(plot_splits, monkeypatch, table, "--out", tmp_path / "b.svg", "--reps", 50)
    assert (tmp_path / "b.svg").read_text() == picture, "the same bytes each time"


def test_methods_and_splits_are_in_the_order_asked_for(table, tmp_path, monkeypatch):
    flags = ["--methods", "mdpo", "ppo", "--splits", "broken", "law", "--reps", 5]
    run(plot_splits, monkeypatch, table, *flags, "--out", tmp_path / "a.png", "--csv", tmp_path / "a.csv")
    lines = pd.read_csv(tmp_path / "a.csv")
    assert list(lines["method"].unique()) == ["mdpo, agent 1", "mdpo, agent 2", "ppo"]
    figure = plot_splits.draw(lines, ("broken", "law"))
    assert [axis.get_title() for axis in figure.axes] == ["broken", "law"]
    labels = ["mdpo, agent 1 (coins-law-free)", "mdpo, agent 2 (coins-law-free)", "ppo (coins-law)"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == labels
    plt.close(figure)
    flags = ["--methods", "ppo", "--splits", "broken", "--reps", 5]
    run(plot_splits, monkeypatch, table, *flags, "--out", tmp_path / "a.png", "--csv", tmp_path / "a.csv")
    assert pd.read_csv(tmp_path / "a.csv")[["method", "split"]].to_numpy().tolist() == [["ppo", "broken"]]


def test_the_report_has_them_with_their_commands(table, tmp_path):
    section = report.splits_section(tmp_path, "all", papers.load([table], each_alone=True), reps=20)
    assert "| mdpo, agent 2 | coins-law-free | 2 | 1 | 0.00 (0.00, 0.00) |  |" in section
    assert "| netrand, Monte Carlo | coins-law | 1 | 1 | 0.70 |  |" in section
    assert "`python benchmark/suites/coins.py mdpo --exp-name ppo --seed 3`" in section
    assert "broken" in (tmp_path / "all.svg").read_text()


def test_what_a_user_gets_wrong_is_one_line(table, tmp_path, monkeypatch, capsys):
    for flags, said in (
        (["--methods", "sac"], "--methods sac: there are mdpo"),
        (["--splits", "test"], "--splits test: there are law"),
        (["--reps", 0], "--reps 0: at least 1"),
        (["--out", tmp_path / "a.pdf"], "a.pdf: not a .svg or .png file"),
    ):
        out = [] if "--out" in flags else ["--out", tmp_path / "a.svg"]
        assert_refuses(plot_splits, monkeypatch, capsys, [table, *out, *flags], said)
    run(collect, monkeypatch, tmp_path, "--keys", "charts/reward", "--out", tmp_path / "none.csv")
    assert "skipped" in capsys.readouterr().err
    assert_refuses(plot_splits, monkeypatch, capsys, [tmp_path / "none.csv", "--out", tmp_path / "a.svg"], "no return")
    assert not (tmp_path / "a.svg").exists()
