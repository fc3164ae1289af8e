"""benchmark/analyses/evaluate.py: what it plays, prints and writes, and what may be changed."""

import csv
import json
import shutil
from types import SimpleNamespace

import evaluate
import numpy as np
import pandas as pd
import pytest
import torch
from runs import assert_refuses, changed_copy, run, tiny_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run of a changed copy of mdpo.py, with an evaluation at its end."""
    folder = tmp_path_factory.mktemp("runs")
    return tiny_run("mdpo", folder / "runs", "--eval-every", "64", script=changed_copy("mdpo", folder / "mine.py"))


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def logged(folder):
    """{key: value} of the last evaluation in metrics.csv."""
    metrics = pd.read_csv(folder / "metrics.csv")
    last = metrics[metrics["key"].str.startswith("eval/")].groupby("key").last()
    return last["value"].to_dict()


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_it_repeats_the_runs_last_evaluation(folder, monkeypatch, capsys):
    run(evaluate, monkeypatch, folder)
    rows, wanted = rows_of(folder / "evaluation.csv"), logged(folder)
    assert [(row["step"], row["agent"], row["split"], row["episodes"]) for row in rows] == [
        ("64", agent, split, "4") for split in ("test", "train") for agent in "12"
    ]
    for row in rows:
        assert float(row["mean"]) == pytest.approx(wanted[f"eval/agent{row['agent']}/{row['split']}_return"], rel=1e-3)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:5] for line in printed[1:6]] == [
        ["step", "agent", "split", "eval_seed", "episodes"],
        *([row["step"], row["agent"], row["split"], "42", row["episodes"]] for row in rows),
    ]
    assert printed[-1] == str(folder / "evaluation.csv")
    assert not (folder / "__pycache__").exists()


def test_a_second_evaluation_is_added_to_the_first(folder, monkeypatch):
    run(evaluate, monkeypatch, folder, "--eval-episodes", 1)
    first = rows_of(folder / "evaluation.csv")
    run(evaluate, monkeypatch, folder, "--eval-episodes", 1, "--eval-seed", 7)
    both = rows_of(folder / "evaluation.csv")
    assert both[: len(first)] == first and len(both) == len(first) + 4
    assert [row["eval_seed"] for row in both[-5:]] == ["42", "7", "7", "7", "7"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_netrand", "drq_sam_reset", "sac_sam_reset", "drqv2_pieg"])
def test_it_repeats_the_last_evaluation_of_every_script(name, tmp_path, monkeypatch):
    total = {"ppo_netrand": 64, "drq_sam_reset": 520}.get(name, 50)
    folder = tiny_run(name, tmp_path, "--eval-every", str(total))
    run(evaluate, monkeypatch, folder)
    rows, wanted = rows_of(folder / "evaluation.csv"), logged(folder)
    for row in rows:
        prefix = "mc_" if row.get("mc_samples", "0") != "0" else ""
        key = f"eval/{prefix}{row['split']}_return"
        assert float(row["mean"]) == pytest.approx(wanted[key], rel=1e-3)
    assert len(rows) == len([key for key in wanted if key.endswith("_return")])


def test_the_table_says_what_the_returns_are(monkeypatch, tmp_path, capsys):
    """Mean, standard deviation and median of what the script's `evaluate` returned to its `compare`."""
    returns = {("test", 0): [1.0, 2.0, 9.0], ("test", 1): [5.0] * 3}

    class Script(SimpleNamespace):
        def compare(self, agents, args, make_envs):
            return [self.evaluate(agent, args, make_envs, "test", tick=None) for agent in agents]

    def own(agent, args, make_envs, split, tick):
        assert (args.eval_episodes, make_envs(args, split), tick) == (3, "the run's test", None)
        return np.array(returns[split, int(agent.bias)])

    agents = [torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)]
    for number, agent in enumerate(agents):
        agent.bias.data.fill_(number)
    script = Script(evaluate=own)
    about = {"script": script, "state": {"step": 7}, "folder": tmp_path}
    about["make_envs"] = lambda args, split, start: f"the run's {split}"
    fake = SimpleNamespace(args=SimpleNamespace(eval_episodes=3, eval_seed=42), agents=lambda: agents, **about)
    rows = evaluate.evaluate_run(fake)
    assert [row["mean"] for row in rows] == [4.0, 5.0]
    assert [row["median"] for row in rows] == [2.0, 5.0]
    assert [row["std"] for row in rows] == [pytest.approx((38 / 3) ** 0.5), 0.0]
    assert script.evaluate is own
    assert rows_of(tmp_path / "evaluation.csv")[0]["std"] == "3.559"


def test_where_nothing_can_be_written_the_table_is_printed(folder, monkeypatch, capsys):
    (folder / "evaluation.csv").mkdir()
    run(evaluate, monkeypatch, folder)
    printed = capsys.readouterr().out
    assert "median" in printed and printed.splitlines()[-1].endswith(
        "evaluation.csv: Is a directory, so nothing was written"
    )


def test_flags_of_an_evaluation_may_be_given(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "evaluate_run", lambda made: seen.append(made.args))
    run(evaluate, monkeypatch, folder, "--eval-episodes", 6, "--eval-seed", 7, "--no-cuda")
    run(evaluate, monkeypatch, folder)
    assert [(args.eval_episodes, args.eval_seed) for args in seen] == [(6, 7), (4, 42)]
    saved = json.loads((folder / "args.json").read_text())["args"]
    assert saved["eval_episodes"] == 2 and saved["final_eval_episodes"] == 4


def test_wrong_input_says_so_in_one_line(folder, tmp_path, monkeypatch, capsys):
    for flags, says in (
        ((tmp_path / "none",), "none is no folder of a run"),
        (("--eval-seed", 7, folder), "--eval-seed: the run's folder comes first"),
        ((folder, "--gamma", 0.9), "--gamma is 0.999 in that run and stays so"),
        ((folder, "--env-id", "maze"), "--env-id is bossfight in that run and stays so"),
        ((folder, "--final-eval-episodes", 9), "--final-eval-episodes is 4 in that run"),
        ((folder, "--eval-episodes", 0), "--eval-episodes 0: at least 1"),
        ((folder, "--eval-seed", -1), "--eval-seed -1: at least 0"),
    ):
        assert_refuses(evaluate, monkeypatch, capsys, flags, says)
    assert not (folder / "evaluation.csv").exists()
    run(evaluate, monkeypatch)
    assert "python benchmark/analyses/evaluate.py runs/<folder>" in capsys.readouterr().out


def test_arguments_of_an_evaluation_are_checked(capsys):
    evaluate.check({"eval_episodes": 20, "eval_envs": 50, "mc_samples": 0})
    evaluate.check({"eval_episodes": 20, "eval_envs": 10, "eval_epsilon": 0.0})
    for args, says in (
        ({"eval_episodes": 20, "eval_envs": 3}, "--eval-episodes 20: not a multiple of --eval-envs 3"),
        ({"eval_episodes": 20, "eval_envs": 0}, "--eval-envs 0: at least 1"),
        ({"eval_episodes": 20, "mc_samples": -1}, "--mc-samples -1: at least 0"),
    ):
        with pytest.raises(SystemExit, match=r"^2$"):
            evaluate.check(args)
        assert says in capsys.readouterr().err


def test_missing_data_of_environments_ends_the_program_with_a_line(capsys):
    def make_envs(args, split, start):
        raise FileNotFoundError("DMC-GB's data is not there\nat all")

    with pytest.raises(SystemExit, match=r"^2$"):
        evaluate.make_envs(SimpleNamespace(make_envs=make_envs), None, "video_easy")
    assert capsys.readouterr().err == "error: DMC-GB's data is not there\n"


# ---- Zero-shot returns in DMC-GB's looks ----
def test_all_of_the_papers_table_is_there():
    tasks = ["ballincupcatch", "cartpoleswingup", "cheetahrun", "fingerspin", "walkerstand", "walkerwalk"]
    places = {(task, look) for task in tasks for look in ("video_easy", "video_hard")}
    found = evaluate.published()
    assert found.keys() == places
    assert all(methods.keys() == {"DrQ", "DrQ-v2", "SVEA", "TLDA", "PIE-G"} for methods in found.values())


def test_the_papers_returns_are_printed_below(capsys):
    """Its Table 1: of ball_in_cup-catch in video_hard, PIE-G 786 +- 47 and SVEA 403 +- 174."""
    rows = [{"split": "test"}, {"split": "color_easy"}, {"split": "video_hard"}]
    evaluate.print_papers(SimpleNamespace(args=SimpleNamespace(env_id="ball_in_cup-catch")), rows)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("Yuan et al. 2022, Table 1")
    assert second.startswith("  video_hard: ") and "PIE-G 786 ± 47" in second and "SVEA 403 ± 174" in second
    evaluate.print_papers(SimpleNamespace(args=SimpleNamespace(env_id="hopper-hop")), rows)
    assert not capsys.readouterr().out
