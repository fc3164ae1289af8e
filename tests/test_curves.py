"""From runs to a plot: what collect.py writes and plot_curves.py draws."""

import csv
import json
import shlex
import shutil
import sys

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from conftest import ROOT
from matplotlib.colors import to_hex

sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "benchmark" / "tables")]
import collect
import common
import papers
import plot_curves


def load(name):
    """A program in benchmark/ as a fresh module."""
    return common.load_script(next((ROOT / "benchmark").rglob(f"{name}.py")))


def run(module, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
    module.main()


def make_run(folder, command, args, script="mdpo", returns=(), sessions=()):
    """A run's folder as a script leaves it: args.json, metrics.csv and the script, here of one comment."""
    folder.mkdir()
    about = {"command": command, "args": {"exp_name": script, "seed": 1} | args, "commit": "c0ffee", "python": "3"}
    about |= {"packages": {"torch": "2", "tqdm": "4"}, "hardware": {"gpu": None, "cores": 2, "cpu": "x"}}
    about["sessions"] = [{"command": command, "changed": changed} for changed in ({}, *sessions)]
    (folder / "args.json").write_text(json.dumps(about))
    (folder / f"{script}.py").write_text("# a script")
    lines = [f"{10 * n},eval/test_return,{value}\n{10 * n},losses/x,1\n" for n, value in enumerate(returns)]
    (folder / "metrics.csv").write_text("step,key,value\n" + "".join(lines))


@pytest.fixture
def folders(tmp_path):
    """Two runs of a script of ours and one of a script elsewhere, with returns that say which is which."""
    programs = (("/there/algos/mdpo.py", "mdpo", 3), ("algos/mdpo.py", "mdpo", 2), ("/there/other.py", "other", 3))
    for seed, (program, script, steps) in enumerate(programs):
        command = [program, "--runs-dir", "elsewhere", "--seed", str(seed)]
        args = {"env_id": "maze", "seed": seed, "distribution_mode": "easy", "num_levels": 200}
        make_run(tmp_path / f"run{seed}", command, args, script, [step + seed for step in range(steps)])
    return tmp_path


# ---- collect.py ----
def test_a_row_a_number_with_the_run_it_came_from(folders, monkeypatch, capsys):
    runs = [f"A={folders}/run0", f"A={folders}/run1", f"B={folders}/run2"]
    run(collect, monkeypatch, *runs, "--out", folders / "out.csv")
    rows = list(csv.DictReader((folders / "out.csv").open()))
    assert [(row["method"], row["seed"], row["step"], row["value"]) for row in rows] == [
        *[("A", "0", str(10 * step), str(step)) for step in range(3)],
        *[("A", "1", str(10 * step), str(step + 1)) for step in range(2)],
        *[("B", "2", str(10 * step), str(step + 2)) for step in range(3)],
    ]
    assert {(row["command"], row["script"], row["changed"], row["default_steps"]) for row in rows} == {
        ("python algos/mdpo.py --seed 0", "mdpo", '{"distribution_mode": "easy"}', "50000000"),
        ("python algos/mdpo.py --seed 1", "mdpo", '{"distribution_mode": "easy"}', "50000000"),
        ("python other.py --seed 2", "other", '{"distribution_mode": "easy", "num_levels": 200, "version": ""}', ""),
    }
    assert {(row["packages"], row["commit"], row["task"], row["suite"], row["hardware"]) for row in rows} == {
        ("torch==2", "c0ffee", "maze", "procgen-easy", "no GPU, 2 cores x")
    }


def test_a_run_counts_with_its_latest_arguments(tmp_path, monkeypatch):
    """They are in args.json; the command is still the first one, with what was changed behind it."""
    command = ["algos/mdpo.py", "--total-timesteps", "100", "--num-agents", "1"]
    args = {"env_id": "maze", "distribution_mode": "hard", "num_levels": -1, "num_agents": 1, "total_timesteps": 300}
    make_run(
        tmp_path / "a",
        command,
        args,
        returns=[1],
        sessions=[{"resume": "/x"}, {"resume": "/x", "total_timesteps": 300}],
    )
    run(collect, monkeypatch, tmp_path / "a", "--out", tmp_path / "out.csv")
    (row,) = csv.DictReader((tmp_path / "out.csv").open())
    assert row["command"] == f"python {' '.join(command)} (resumed with --total-timesteps 300)"
    assert (row["script"], row["changed"]) == ("mdpo", '{"num_agents": 1}')


def test_a_run_of_a_changed_copy_is_collected_and_drawn_like_any_other(tmp_path, monkeypatch):
    """Whatever its file is called: its method is its --exp-name, its suite follows from its arguments."""
    args = {"env_id": "maze", "distribution_mode": "hard", "num_levels": 500, "new_flag": 3}
    make_run(tmp_path / "a", ["elsewhere/mine.py"], args | {"exp_name": "idea"}, script="mine", returns=[1, 2])
    run(collect, monkeypatch, tmp_path, "--out", tmp_path / "out.csv")
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    names = ("method", "suite", "task", "script", "default_steps", "command")
    assert [rows[0][name] for name in names] == ["idea", "procgen-hard", "maze", "mine", "", "python mine.py"]
    assert json.loads(rows[0]["changed"]) == {
        "distribution_mode": "hard",
        "num_levels": 500,
        "new_flag": 3,
        "version": "",
    }
    run(plot_curves, monkeypatch, tmp_path / "out.csv", "--out", tmp_path / "out.svg", "--published", "none")
    assert "idea, test (1 seed)" in (tmp_path / "out.svg").read_text()


@pytest.mark.parametrize(
    ("command", "script", "found"),
    [
        (["algos/mdpo.py"], "mdpo", "mdpo"),
        (["/x/benchmark/suites/ablations.py", "mdpo", "doubled", "--seed", "1"], "mdpo", "mdpo doubled"),
        (["benchmark/suites/ablations.py", "algos/mine.py", "doubled"], "mine", "mine doubled"),
        (["ablations.py", "a.py", "timm", "--encoder_stage=2", "--encoder-name", "b"], "mdpo", "mdpo timm b 2"),
        (["benchmark/suites/drawerworld.py", "drqv2_pieg"], "drqv2_pieg", "drqv2_pieg drawerworld"),
        (["coins.py", "a.py", "detached", "--seed", "1"], "mdpo", "mdpo coins detached"),
        (["coins.py", "mdpo", "--network=script", "--seed", "1"], "mdpo", "mdpo coins script"),
        (["notebook.py"], "mdpo", "mdpo notebook"),
    ],
)
def test_script_of_a_run(command, script, found, tmp_path):
    """With what else changed the method behind it, so that it is not taken for the paper's."""
    make_run(tmp_path / "a", command, {"env_id": "maze", "num_levels": 500}, script)
    settings = collect.settings_of(tmp_path / "a", common.read_about(tmp_path / "a"))
    assert settings["script"] == found
    assert bool(settings["default_steps"]) == (found in ("mdpo", "mdpo doubled"))


@pytest.mark.parametrize("out", ["{}/no/out.csv", "{}", "{}/out.txt"])
def test_collect_says_what_is_wrong(out, folders, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        run(collect, monkeypatch, f"A={folders}/run0", "--out", out.replace("{}", str(folders)))
    assert capsys.readouterr().err.startswith("error: ")


def test_a_broken_run_is_named_and_skipped(folders, monkeypatch, capsys):
    """However it is broken, the others are collected. Only where nothing is left does the program fail."""
    for name in ("empty", "list", "no_metrics", "no_json", "no_args"):
        shutil.copytree(folders / "run0", folders / name)
    (folders / "empty" / "args.json").write_text("")
    (folders / "list" / "args.json").write_text("[]")
    (folders / "no_metrics" / "metrics.csv").unlink()
    (folders / "no_json" / "args.json").write_bytes(b"\xff\xfe")
    about = json.loads((folders / "run0" / "args.json").read_text())
    (folders / "no_args" / "args.json").write_text(json.dumps(about | {"args": 3}))
    run(collect, monkeypatch, folders, folders / "gone", f"B={folders}/empty", "--out", folders / "out.csv")
    said = capsys.readouterr().err
    for name in ("empty", "list", "no_metrics", "no_json", "no_args", "gone"):
        assert f"skipped: {folders}/{name}: " in said
    assert said.endswith("7 of 10 skipped\n")
    assert "no_metrics: metrics.csv: No such file or directory\n" in said
    assert len(pd.read_csv(folders / "out.csv")) == 3 + 2 + 3
    (folders / "out.csv").unlink()
    with pytest.raises(SystemExit, match="error: no run in "):  # a text, so exit code 1
        run(collect, monkeypatch, folders / "empty", folders / "gone", "--out", folders / "out.csv")
    assert not (folders / "out.csv").exists()


def test_a_line_that_was_cut_is_no_number(folders, monkeypatch):
    """As a full disk leaves it: 12 of 12.75."""
    with open(folders / "run0" / "metrics.csv", "a") as file:
        file.write("90,eval/test_return,12")
    run(collect, monkeypatch, folders / "run0", "--out", folders / "out.csv")
    assert list(pd.read_csv(folders / "out.csv")["step"]) == [0, 10, 20]


def test_runs_of_any_name_in_any_folder(tmp_path, monkeypatch):
    """Folders with spaces, quotes and =, as --runs-dir and --exp-name make them."""
    outer = tmp_path / "a 'quoted' = folder"
    outer.mkdir()
    for name in ("lr=0.1", "it's"):
        command = ["algos/mdpo.py", "--runs-dir", str(outer), "--exp-name", name]
        make_run(outer / f"maze__{name}", command, {"env_id": "maze", "exp_name": name}, returns=[1, 2])
    run(collect, monkeypatch, outer, "--out", tmp_path / "out.csv")
    rows = pd.read_csv(tmp_path / "out.csv")
    assert {*rows["method"]} == {"lr=0.1", "it's"}
    assert {shlex.split(command)[-1] for command in rows["command"]} == {"lr=0.1", "it's"}
    run(collect, monkeypatch, f"A=B={outer}/maze__lr=0.1", f"{outer}/maze__it's", "--out", tmp_path / "out.csv")
    assert {*pd.read_csv(tmp_path / "out.csv")["method"]} == {"A=B", "it's"}


def test_runs_of_one_name_with_other_settings_are_apart(tmp_path, monkeypatch):
    """What decides learning has to be equal, in scripts of ours and in copies, within a CSV and across some."""
    hard = {"env_id": "maze", "distribution_mode": "hard"}
    runs = [("mdpo", {}), ("mdpo", {"seed": 2, "save_minutes": 9.0}), ("mdpo", {"num_agents": 1})]
    runs += [("mdpo", {"learning_rate": 0.1, "num_agents": 1}), ("mine", {"new": 1}), ("mine", {"new": 2})]
    for n, (script, args) in enumerate(runs):
        args = hard | {"exp_name": script} | args
        make_run(tmp_path / str(n), [f"algos/{script}.py", "--seed", str(n)], args, script, [float(n), 2.0])
    run(collect, monkeypatch, tmp_path, "--out", tmp_path / "all.csv")
    methods = ["mdpo", "mdpo, learning_rate 0.1, num_agents 1", "mdpo, num_agents 1", "mine, new 1", "mine, new 2"]
    assert sorted(papers.load([tmp_path / "all.csv"])["method"].unique()) == methods
    run(plot_curves, monkeypatch, tmp_path / "all.csv", "--out", tmp_path / "a.svg", "--published", "none")
    text = (tmp_path / "a.svg").read_text()
    assert "mdpo, test (2 seeds)" in text and "mdpo, num_agents 1, test (1 seed)" in text
    assert len(papers.load([tmp_path / "all.csv"])) == 12
    for n in (0, 2):
        run(collect, monkeypatch, f"A={tmp_path}/{n}", f"A={tmp_path}/{n}", "--out", tmp_path / f"{n}.csv")
    rows = papers.load([tmp_path / "0.csv", tmp_path / "2.csv"])
    assert sorted(rows["method"].unique()) == ["A", "A, num_agents 1"]


@pytest.mark.parametrize(
    ("command", "commit", "ours"),
    [
        ("/there/algos/mdpo.py", "ab12", True),
        ("mdpo.py", "ab12", False),  # a copy, perhaps a changed one
        ("own/mdpo.py", "ab12", False),
        ("algos/mdpo.py", "ab12-dirty", False),
        ("algos/mdpo.py", "", False),
    ],
)
def test_a_changed_text_is_another_method(command, commit, ours, tmp_path, monkeypatch):
    """Only a script of ours as it was committed can be the paper's; two texts of another one are two methods."""
    for n, text in enumerate(("one", "two", "two")):
        make_run(tmp_path / str(n), [command], {"env_id": "maze", "distribution_mode": "hard"}, returns=[n])
        about = json.loads((tmp_path / str(n) / "args.json").read_text())
        about |= {"script": text * 20, "commit": commit, "args": about["args"] | {"seed": n}}
        (tmp_path / str(n) / "args.json").write_text(json.dumps(about))
    run(collect, monkeypatch, tmp_path, "--out", tmp_path / "out.csv")
    rows = papers.load([tmp_path / "out.csv"])
    methods = ["mdpo"] if ours else ["mdpo, version oneoneon", "mdpo, version twotwotw"]
    assert sorted(rows["method"].unique()) == methods
    assert bool(papers.cells("mdpo", rows["changed"].iloc[0])) == ours


@pytest.mark.parametrize("schedule", [{"anneal_lr": True}, {"anneal_clip": True}, {"prioritized_replay_beta": 0.4}, {}])
def test_schedules_over_runs_of_other_lengths_are_apart(schedule, tmp_path, monkeypatch):
    for seed, steps in enumerate((64, 128)):
        args = {"env_id": "maze", "seed": seed, "total_timesteps": steps} | schedule
        make_run(tmp_path / str(seed), ["mine.py"], args, "mine", returns=[1, 2])
    run(collect, monkeypatch, tmp_path, "--out", tmp_path / "out.csv")
    methods = ["mine, total_timesteps 128", "mine, total_timesteps 64"] if schedule else ["mine"]
    assert sorted(papers.load([tmp_path / "out.csv"])["method"].unique()) == methods


@pytest.mark.parametrize("value", ["nan", "inf", "abc", ""])
def test_a_value_that_is_no_number_costs_its_run_alone(value, folders, monkeypatch, capsys):
    with open(folders / "run0" / "metrics.csv", "a") as file:
        file.write(f"90,eval/test_return,{value}\n")
    run(collect, monkeypatch, folders, "--out", folders / "out.csv")
    said = capsys.readouterr().err
    assert f"skipped: {folders}/run0: " in said and said.endswith("1 of 3 skipped\n")
    assert len(papers.load([folders / "out.csv"])) == 2 + 3


def test_a_floor_that_is_no_method(folders, monkeypatch, capsys):
    run(collect, monkeypatch, f"A={folders}/run0", "--out", folders / "a.csv")
    with pytest.raises(SystemExit, match=r"^2$"):
        run(plot_curves, monkeypatch, folders / "a.csv", "--floor", "B", "--out", folders / "a.svg")
    assert capsys.readouterr().err == "error: --floor B: no such method; there are A\n"


def test_names_that_look_like_numbers_or_like_nothing(tmp_path, monkeypatch):
    names = ["None", "NA", "001", "1e-4", "nan", "true"]
    for name in names:
        make_run(tmp_path / name, ["algos/mdpo.py"], {"env_id": "maze", "exp_name": name}, returns=[1, 2])
    run(collect, monkeypatch, tmp_path, "--out", tmp_path / "out.csv")
    rows = papers.load([tmp_path / "out.csv"])
    assert sorted(rows["method"].unique()) == sorted(names)
    assert [rows[name].dtype.kind for name in ("seed", "step", "value")] == ["i", "i", "f"]
    run(plot_curves, monkeypatch, tmp_path / "out.csv", "--out", tmp_path / "out.svg", "--published", "none")
    text = (tmp_path / "out.svg").read_text()
    assert all(f"{name}, test (1 seed)" in text for name in names)


@pytest.mark.parametrize("text", ["", "\n", "method,suite\nA", "\0\0"])
def test_a_broken_csv_is_named_and_skipped(text, folders, monkeypatch, capsys):
    run(collect, monkeypatch, f"A={folders}/run0", "--out", folders / "good.csv")
    header = (folders / "good.csv").read_text().splitlines()[0]
    (folders / "bad.csv").write_text(text)
    (folders / "header.csv").write_text(header + "\n")
    row = ["no number"] * len(header.split(","))
    (folders / "words.csv").write_text(header + "\n" + ",".join(row) + "\n")
    tables = [folders / f"{name}.csv" for name in ("bad", "good", "header", "words")]
    assert len(papers.load(tables)) == 3
    said = capsys.readouterr().err
    assert f"skipped: {folders}/header.csv: no rows" in said and f"skipped: {folders}/words.csv: " in said
    assert (f"skipped: {folders}/bad.csv: " in said) == (text in ("", "\n"))
    with pytest.raises(SystemExit, match=r"^2$"):
        run(plot_curves, monkeypatch, folders / "bad.csv", "--out", folders / "a.svg")
    assert f"{folders}/bad.csv" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seeds", "label", "markers"),
    [
        ({1: [0, 10], 2: [20, 30]}, "A, test (2 seeds, no steps in common)", ["", ""]),
        ({1: [5], 2: [20]}, "A, test (2 seeds, no steps in common)", [".", "."]),
        ({1: [5], 2: [5]}, "A, test (2 seeds)", [".", ".", "o"]),
        ({1: [5]}, "A, test (1 seed)", ["o"]),
        ({1: [0, 10]}, "A, test (1 seed)", [""]),
    ],
)
def test_what_is_there_is_seen(seeds, label, markers):
    """Seeds that share no step are drawn as they are and said to be so; a single point has a marker."""
    rows = [(seed, step, 1.0) for seed, steps in seeds.items() for step in steps]
    data = pd.DataFrame(rows, columns=["seed", "step", "value"]).assign(method="A", key="eval/test_return")
    figure, axis = plt.subplots()
    plot_curves.draw(axis, data, {"eval/test_return": "-"}, {"A": "red"}, None)
    drawn = [line.get_marker().replace("None", "") for line in axis.get_lines() if len(line.get_xdata())]
    assert drawn == markers
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [label]
    plt.close(figure)


def test_the_mean_goes_as_far_as_all_seeds_go(folders):
    data = pd.DataFrame(
        {
            "method": ["A"] * 5,
            "key": ["eval/test_return"] * 5,
            "seed": [1, 1, 1, 2, 2],
            "step": [0, 10, 20, 0, 10],
            "value": [1.0, 2.0, 9.0, 3.0, 6.0],
        }
    )
    lines = {"eval/test_return": "-", "eval/train_return": "--"}
    figure, axis = plt.subplots()
    plot_curves.draw(axis, data, lines, {"A": "red", "B": "blue"}, "floor")
    mean = axis.get_lines()[-1]
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([0, 10], [2.0, 4.0])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["A, test (2 seeds)"]
    plt.close(figure)


def test_seeds_that_were_logged_at_other_steps_share_a_mean():
    """As when each game's return is logged at its end. Between its own steps a seed goes straight on."""
    about = {"method": ["A"] * 5, "key": ["charts/episodic_return"] * 5, "seed": [1, 1, 2, 2, 2]}
    data = pd.DataFrame(about | {"step": [0, 20, 5, 10, 30], "value": [0.0, 20.0, 15.0, 20.0, 0.0]})
    figure, axis = plt.subplots()
    plot_curves.draw(axis, data, {"charts/episodic_return": "-"}, {"A": "red"}, None)
    *_, mean = axis.get_lines()
    assert list(mean.get_xdata()) == [5, 10, 20] and list(mean.get_ydata()) == [10.0, 15.0, 15.0]
    plt.close(figure)


def test_plot_says_what_is_wrong(folders, monkeypatch, capsys):
    run(collect, monkeypatch, *[f"{name}={folders}/run0" for name in "ABCDEFG"], "--out", folders / "many.csv")
    for path, out in (("nowhere.csv", "curve.png"), ("many.csv", "curve.txt")):
        with pytest.raises(SystemExit, match=r"^2$"):
            run(plot_curves, monkeypatch, folders / path, "--out", folders / out)
        assert capsys.readouterr().err.startswith("error: ")
    run(plot_curves, monkeypatch, folders / "many.csv", "--out", folders / "curve.png", "--floor", "G")
    assert (folders / "curve.png").stat().st_size > 10_000


def test_only_what_was_logged_has_a_panel(folders, monkeypatch):
    """Looks of DMC-GB a panel of their own, with a line each; no panel of training, which nothing was logged of."""
    with open(folders / "run0" / "metrics.csv", "a") as file:
        file.write("0,eval/video_hard_return,1\n10,eval/video_hard_return,2\n0,eval/color_easy_return,3\n")
    keys = ("eval/test_return", "eval/color_easy_return", "eval/video_hard_return")
    run(collect, monkeypatch, f"A={folders}/run0", "--out", folders / "looks.csv", "--keys", *keys)
    run(plot_curves, monkeypatch, folders / "looks.csv", "--out", folders / "looks.png")
    figure = plt.gcf()
    assert [axis.get_title() for axis in figure.axes] == ["maze, evaluations", "maze, looks it was not trained in"]
    texts = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert texts == ["A, color_easy (1 seed)", "A, video_hard (1 seed)"]
    plt.close(figure)


def test_collect_takes_all_runs_of_a_folder(folders, monkeypatch, capsys):
    """Each called by its --exp-name, of its own suite; a run that has logged nothing yet is left out."""
    shutil.rmtree(folders / "run0")
    atari, dmc = {"env_id": "Krull", "eval_epsilon": 0.001}, {"env_id": "walker-walk", "action_repeat": 2}
    make_run(folders / "atari", ["mine.py"], atari | {"exp_name": "drq"}, "mine", [1, 2, 3])
    make_run(folders / "dmc", ["mine.py"], dmc | {"exp_name": "sac"}, "mine", [1, 2])
    (folders / "run2" / "metrics.csv").write_text("step,key,value\n")
    (folders / "no_run").mkdir()
    run(collect, monkeypatch, folders, "--out", folders / "out.csv")
    rows = pd.read_csv(folders / "out.csv").groupby(["method", "suite", "task"]).size()
    assert dict(rows) == {
        ("drq", "atari-100k", "Krull"): 3,
        ("sac", "dmc", "walker-walk"): 2,
        ("mdpo", "procgen-easy", "maze"): 2,
    }
    assert capsys.readouterr().err.endswith("2 of 5 skipped\n")
    run(collect, monkeypatch, f"A={folders}", "--out", folders / "out.csv", "--suite", "mine")
    assert {*pd.read_csv(folders / "out.csv")[["method", "suite"]].to_numpy().ravel()} == {"A", "mine"}


@pytest.mark.parametrize(
    ("program", "args", "suite"),
    [
        ("algos/mine.py", {"action_repeat": 2, "eval_modes": []}, "dmc"),
        ("algos/mine.py", {"action_repeat": 2, "eval_modes": ["video_hard"]}, "dmc-gb"),
        ("benchmark/suites/drawerworld.py", {"action_repeat": 2}, "drawerworld"),
        ("benchmark/suites/coins.py", {"distribution_mode": "hard"}, "coins"),
        ("benchmark/suites/ablations.py", {"action_repeat": 2}, "dmc"),
        ("mine.py", {"distribution_mode": "hard"}, "procgen-hard"),
        ("mine.py", {"distribution_mode": "hard", "plain_look": False}, "procgen-hard"),
        ("mine.py", {"distribution_mode": "hard", "plain_look": True}, "procgen-plain"),
        ("mine.py", {"eval_epsilon": 0.0}, "atari-100k"),
        ("mine.py", {}, "other"),
    ],
)
def test_suite_of_a_run(program, args, suite):
    assert common.suite_of({"command": [program, "--seed", "1"], "args": args}) == suite


# ---- plot_curves.py ----
def test_published_levels_are_drawn_where_they_fit_and_named_where_not():
    """SPR's 3681.61 on Krull and rliable's DER below it; a line twice as high would flatten the curves."""
    about = {"method": "A", "suite": "atari-100k", "task": "krull", "key": "eval/test_return", "seed": 1}
    data = pd.DataFrame([about | {"step": step, "value": value} for step, value in ((0, 0.0), (10, 2600.0))])
    lines = plot_curves.PANELS["evaluations"]
    levels = plot_curves.levels_of(data, lines, plot_curves.published(("atari100k_other_baselines",)))
    assert levels["SPR, test, 100,000 agent steps"] == 3681.61 and len(levels) == 4
    easy = data.assign(suite="procgen-easy", task="bossfight")
    keys = {"eval/test_return": "o-", "eval/train_return": "s--"}
    levels_of_ppo = plot_curves.levels_of(easy, keys, plot_curves.published(("procgen_ppo_openai",)))
    assert sum("all levels), train" in label for label in levels_of_ppo) == 1
    assert sum("200 levels), train" in label for label in levels_of_ppo) == 1
    assert plot_curves.levels_of(data, lines, plot_curves.published(("none",))) == {}
    figure, axis = plt.subplots()
    plot_curves.draw(axis, data, lines, {"A": "red"}, None, levels)
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert "published SPR, test, 100,000 agent steps: 3682" in texts
    assert "above, published DrQ(eps), test, 100,000 agent steps: 4402" in texts
    assert axis.get_ylim()[1] < 4402
    plt.close(figure)


@pytest.mark.parametrize("count", [len(common.COLOURS), 20])
def test_each_method_has_a_colour_of_its_own(count):
    about = {"suite": "dmc", "task": "walker-walk", "key": "eval/test_return", "seed": 1}
    rows = [about | {"method": str(n), "step": step, "value": n} for n in range(count) for step in (0, 10)]
    figure = plot_curves.draw_all(pd.DataFrame(rows))
    assert len({to_hex(line.get_color()) for line in figure.axes[0].lines}) == count
    plt.close(figure)


def test_seeds_stand_in_a_band_of_their_deviation():
    about = {"method": "A", "key": "eval/test_return"}
    data = pd.DataFrame(
        [about | {"seed": seed, "step": step, "value": 10.0 * seed} for seed in (1, 3) for step in (0, 1)]
    )
    figure, axis = plt.subplots()
    plot_curves.draw(axis, data, {"eval/test_return": "o-"}, {"A": "red"}, None)
    (band,) = axis.collections
    ends = band.get_paths()[0].get_extents()
    assert (ends.y0, ends.y1) == pytest.approx((20 - 200**0.5, 20 + 200**0.5))
    plt.close(figure)


def test_keys_that_are_no_returns_have_a_panel_each(folders, monkeypatch, capsys):
    """As the active units of a layer, without a line at a return and on an axis of its own."""
    with open(folders / "run0" / "metrics.csv", "a") as file:
        file.write("10,charts/active_head,0.25\n10,charts/active_head.value.1,0.75\n")
    run(collect, monkeypatch, f"A={folders}/run0", "--out", folders / "a.csv")
    keys = ["charts/active_head", "charts/active_head.value.1"]
    rows = papers.load([folders / "a.csv"])
    figure = plot_curves.draw_all(rows, floor="A", printed=plot_curves.published(), keys=keys)
    assert [axis.get_title() for axis in figure.axes] == [f"maze, {key}" for key in keys]
    assert all(not axis.lines for axis in figure.axes)
    figure = plot_curves.draw_all(rows, printed=plot_curves.published(), keys=keys)
    assert [[line.get_ydata().tolist() for line in axis.lines] for axis in figure.axes] == [[[0.25]], [[0.75]]]
    plt.close("all")
    with pytest.raises(SystemExit, match=r"^2$"):
        run(plot_curves, monkeypatch, folders / "a.csv", "--out", folders / "a.svg", "--keys", "charts/nope")
    assert "--keys charts/nope: there are eval/test_return charts/active_head" in capsys.readouterr().err


def test_pictures_are_the_same_bytes_each_time(folders, monkeypatch, capsys):
    run(collect, monkeypatch, f"A={folders}/run0", "--out", folders / "a.csv")
    pictures = []
    for name in ("a.svg", "b.svg"):
        run(plot_curves, monkeypatch, folders / "a.csv", "--out", folders / name, "--published", "none")
        pictures.append((folders / name).read_bytes())
    assert pictures[0] == pictures[1] and b"maze, evaluations" in pictures[0]
    for flags in (["--published", "nobody"], ["--out", folders / "a.pdf"]):
        with pytest.raises(SystemExit, match=r"^2$"):
            run(plot_curves, monkeypatch, folders / "a.csv", *flags, *([] if "--out" in flags else ["--out", "x.svg"]))
        assert capsys.readouterr().err.startswith("error: ")
