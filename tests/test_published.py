"""The files of benchmark/published/: whole, without a number twice, and in agreement with each other."""

import re
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "benchmark" / "tables")]
import common
import papers
import plot_aggregate

COLUMNS = ["method", "baseline_of", "suite", "task", "setting", "metric", "value", "std", "steps_or_frames", "source"]
# Numbers in each file, counted in the papers' tables: Table 1 of Lee et al. 2023 has 14 rows of 11 (two, and three with
# an interval), Table 6 two more; Table 3's 12 rows have 66 filled cells; two optimality gaps. And so on.
NUMBERS = {
    "drq_sam_reset_atari100k": 14 * 11 + 2 * 11 + 66 + 2 + 1,
    "sac_sam_reset_dmcm": 7 * 9 + 2 * (11 + 3) + 2,
    "pieg_dmcgb": 2 * 6 * 5 + 6 + 3 * 4 + 3 * 4 + 4,
    "procgen_ppo_openai": 17 * (4 + 8 + 2 + 4),
    "atari100k_other_baselines": 4 * (26 + 4),
    "mdpo_procgen": 3,
    "netrand_coinrun": 4,
}
KEYS = {
    "atari_human_random": ["game"],
    "procgen_normalisation": ["game", "distribution_mode"],
    "sac_sam_reset_dmcm_runs": ["method", "task", "run"],
}
FILES = {path.stem for path in papers.PUBLISHED.glob("*.csv")}


def test_every_file_is_known():
    assert {*NUMBERS, *KEYS} == FILES
    about = (papers.PUBLISHED / "README.md").read_text()
    assert all(f"`{name}.csv`" in about for name in FILES)


@pytest.mark.parametrize("name", sorted(FILES))
def test_columns_keys_and_sources(name):
    rows = papers.read(name)
    if name in NUMBERS:
        assert list(rows) == COLUMNS
    key = KEYS.get(name, ["method", "suite", "task", "setting", "metric", "steps_or_frames"])
    assert not rows.duplicated(key).any()
    assert (rows["source"] != "").all()


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_all_numbers_are_numbers_and_none_is_missing(name):
    rows = papers.read(name)
    known = rows[rows["value"] != ""]
    assert len(known) == NUMBERS[name]
    assert np.isfinite(pd.to_numeric(known["value"])).all()
    assert np.isfinite(pd.to_numeric(rows["std"].replace("", "0"))).all()
    for source in rows[rows["value"] == ""]["source"]:  # why not
        assert re.search("drawn, not printed|did not survive|no numbers|not found", source), source


def test_rows_of_the_papers_that_are_easily_mixed_up():
    """By hand from the papers: the first, last and oddest cells of their tables."""
    atari = papers.read("drq_sam_reset_atari100k").set_index(["method", "setting", "metric"])["value"]
    drq = "base algorithm DrQ; replay ratio 2"
    assert atari["DrQ+SAM+Reset", drq, "hns_iqm"] == "0.411" and atari["DrQ+CReLU", drq, "hns_median"] == "0.193"
    assert atari["DrQ+SAM+Reset", drq, "hns_mean_ci95_high"] == "0.836" and atari["DrQ", drq, "trace_fisher"] == "5.54"
    assert atari["DrQ+SAM+Reset+ShrinkPerturb", "replay ratio 8", "optimality_gap"] == "0.442"
    assert atari["SR-SPR", "replay ratio 16", "hns_median"] == "0.685"
    looks = papers.read("pieg_dmcgb").query("metric == 'return'").set_index(["method", "task", "setting"])
    assert list(looks.loc["PIE-G", "finger_spin", "video_hard"][["value", "std"]]) == ["762", "59"]
    assert list(looks.loc["TLDA", "cheetah_run", "video_easy"][["value", "std"]]) == ["336", "57"]


def test_single_tasks_reproduce_the_means_of_dmc_m():
    """Lee et al. 2023 took these rows over from rl_with_resets: 293.4 and 498.8."""
    rows = papers.read("sac_sam_reset_dmcm").query("metric == 'return_mean_over_seeds'")
    means = rows.assign(value=rows["value"].astype(float)).groupby("method")["value"]
    assert dict(means.size()) == {"DrQ-SAC": 11, "DrQ-SAC+Reset": 11}
    assert dict(means.mean().round(1)) == {"DrQ-SAC": 293.4, "DrQ-SAC+Reset": 498.8}


def test_single_runs_reproduce_tasks_and_aggregates_of_dmc_m():
    rows, tasks = papers.read("sac_sam_reset_dmcm"), plot_aggregate.tasks_of("dmc")
    known = {(row.method, row.metric, row.setting): float(row.value) for row in rows.itertuples()}
    for name, scores in plot_aggregate.paper_runs("dmc", tasks, "eval/test_return").items():
        assert scores.matrix.shape == (10, 11)
        single = rows[(rows["method"] == name) & (rows["metric"] == "return_mean_over_seeds")]
        single = {common.plain(row.task): (float(row.value), float(row.std)) for row in single.itertuples()}
        np.testing.assert_allclose(scores.matrix.mean(0), [single[task][0] for task in tasks], atol=0.051)
        np.testing.assert_allclose(scores.matrix.std(0, ddof=1), [single[task][1] for task in tasks], atol=0.051)
        values = plot_aggregate.aggregate(scores.matrix, 1000)[:3]
        setting = "pixels 64x64; 10 seeds; last evaluation"
        computed = [
            known[name, metric, setting] for metric in ("return_iqm", "return_median_of_task_means", "return_mean")
        ]
        np.testing.assert_allclose(values, computed, atol=0.051)
        # The paper's median: axes exchanged, and cut, not rounded.
        printed = [known[name, metric, "pixels 64x64"] for metric in ("return_iqm", "return_median", "return_mean")]
        assert [int(value) for value in plot_aggregate.aggregate(scores.matrix.T)[:3]] == printed


def test_games_reproduce_the_normalised_means():
    """OpenAI's PPO on Procgen and rliable's Atari scores: the means over games that the files hold besides."""
    single = papers.per_task()
    procgen = papers.read("procgen_ppo_openai").query("metric == 'mean_normalised_return'")
    for row in procgen.itertuples():
        mode, levels, curve = re.match(r"(\w+)-(\w+); (\w+) curve", row.setting).groups()
        games = single[(single["key"] == f"eval/{curve}_return") & (single["name"] == f"{mode}, {levels} levels")]
        games = games[games["mark"] == int(row.steps_or_frames)]
        scores = [plot_aggregate.normalised(game.suite, game.task, float(game.value)) for game in games.itertuples()]
        assert len(scores) == 16 and abs(np.mean(scores) - float(row.value)) < 2e-4
    atari = papers.read("atari100k_other_baselines").query("metric == 'hns_mean'")
    for row in atari.itertuples():
        games = single[(single["suite"] == "atari-100k") & (single["name"] == row.method)]
        scores = [plot_aggregate.normalised("atari-100k", game.task, float(game.value)) for game in games.itertuples()]
        assert len(scores) == 26 and abs(np.mean(scores) - float(row.value)) < 2e-4


def test_random_and_human_play_are_0_and_1():
    for row in papers.read("atari_human_random").itertuples():
        scores = np.array([float(row.random_score), float(row.human_score)])
        assert list(plot_aggregate.normalised("atari-100k", row.game_snake_case, scores)) == [0, 1]
