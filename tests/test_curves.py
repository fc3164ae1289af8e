"""From runs to a plot: what collect.py writes and plot_curves.py draws."""

import csv
import importlib.util
import json
import sys

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from conftest import ROOT
from matplotlib.colors import to_hex

sys.path.insert(0, str(ROOT / "benchmark"))  # where they find each other


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmark" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


collect, plot_curves = load("collect"), load("plot_curves")


def run(module, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
    module.main()


@pytest.fixture
def folders(tmp_path):
    """Two runs of a script of ours and one of somebody else's, with returns that say which is which."""
    for seed, (program, steps) in enumerate((("elsewhere/mdpo.py", 3), ("mdpo.py", 2), ("other.py", 3))):
        folder = tmp_path / f"run{seed}"
        folder.mkdir()
        about = {
            "command": [program, "--runs-dir", "elsewhere", "--seed", str(seed)],
            "args": {"env_id": "maze", "seed": seed},
            "commit": "c0ffee",
        }
        about |= {"packages": {"torch": "2", "tqdm": "4"}, "hardware": {"gpu": None, "cores": 2, "cpu": "x"}}
        (folder / "args.json").write_text(json.dumps(about))
        lines = [
            f"{10 * step},{key},{step + seed}" for step in range(steps) for key in ("eval/test_return", "losses/x")
        ]
        (folder / "metrics.csv").write_text("\n".join(["step,key,value", *lines]) + "\n")
    return tmp_path


def test_a_row_a_number_with_the_run_it_came_from(folders, monkeypatch, capsys):
    runs = [f"A={folders}/run0", f"A={folders}/run1", f"B={folders}/run2"]
    run(collect, monkeypatch, *runs, "--out", folders / "out.csv")
    rows = list(csv.DictReader((folders / "out.csv").open()))
    assert [(row["method"], row["seed"], row["step"], row["value"]) for row in rows] == [
        *[("A", "0", str(10 * step), str(step)) for step in range(3)],
        *[("A", "1", str(10 * step), str(step + 1)) for step in range(2)],
        *[("B", "2", str(10 * step), str(step + 2)) for step in range(3)],
    ]
    assert {row["command"] for row in rows} == {
        "python algos/mdpo.py --seed 0",
        "python algos/mdpo.py --seed 1",
        "python other.py --seed 2",
    }
    assert {(row["packages"], row["commit"], row["task"], row["hardware"]) for row in rows} == {
        ("torch==2", "c0ffee", "maze", "no GPU, 2 cores x")
    }


@pytest.mark.parametrize("flags", ["A=nowhere --out {}/out.csv", "A={}/run0 --out {}/no/out.csv", "A={}/run0 --out {}"])
def test_collect_says_what_is_wrong(flags, folders, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        run(collect, monkeypatch, *flags.replace("{}", str(folders)).split())
    assert capsys.readouterr().err.startswith("error: ")


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
    lines = {"eval/test_return": ("-", "unseen levels"), "eval/train_return": ("--", "training levels")}
    figure, axis = plt.subplots()
    plot_curves.draw(axis, data, lines, {"A": "red", "B": "blue"}, "floor")
    mean = axis.get_lines()[-1]
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([0, 10], [2.0, 4.0])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["A, unseen levels (2 seeds)"]
    plt.close(figure)


def test_seeds_that_were_logged_at_other_steps_share_a_mean():
    """As when each game's return is logged at its end. Between its own steps a seed goes straight on."""
    about = {"method": ["A"] * 5, "key": ["charts/episodic_return"] * 5, "seed": [1, 1, 2, 2, 2]}
    data = pd.DataFrame(about | {"step": [0, 20, 5, 10, 30], "value": [0.0, 20.0, 15.0, 20.0, 0.0]})
    figure, axis = plt.subplots()
    plot_curves.draw(axis, data, {"charts/episodic_return": ("-", "episodes")}, {"A": "red"}, None)
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
    """Each called by its --exp-name, of the suite of its script; a run that has logged nothing yet is left out."""
    for n, (program, name) in enumerate(
        (
            (["algos/drq_sam_reset.py"], "drq"),
            (["x/benchmark/ablations.py", "sac_sam_reset", "l2"], "l2"),
            (["mdpo.py"], "new"),
        )
    ):
        folder = folders / f"run{n}"
        about = json.loads((folder / "args.json").read_text())
        about["command"], about["args"]["exp_name"] = [*program, "--seed", str(n)], name
        (folder / "args.json").write_text(json.dumps(about))
    (folders / "run2" / "metrics.csv").write_text("step,key,value\n")
    (folders / "no_run").mkdir()
    run(collect, monkeypatch, folders, "--out", folders / "out.csv")
    rows = pd.read_csv(folders / "out.csv").groupby(["method", "suite", "command"]).size()
    assert dict(rows) == {
        ("drq", "atari-100k", "python algos/drq_sam_reset.py --seed 0"): 3,
        ("l2", "dmc", "python benchmark/ablations.py sac_sam_reset l2 --seed 1"): 2,
    }
    assert "1 runs left out" in capsys.readouterr().err
    run(collect, monkeypatch, f"A={folders}", "--out", folders / "out.csv", "--suite", "mine")
    assert {*pd.read_csv(folders / "out.csv")[["method", "suite"]].to_numpy().ravel()} == {"A", "mine"}


@pytest.mark.parametrize(
    ("program", "args", "suite"),
    [
        ("drqv2_pieg.py", {"eval_modes": []}, "dmc"),
        ("drqv2_pieg.py", {"eval_modes": ["video_hard"]}, "dmc-gb"),
        ("ppo_netrand.py", {}, "procgen"),
        ("benchmark/drawerworld.py", {}, "drawerworld"),
    ],
)
def test_suite_of_a_run(program, args, suite):
    assert collect.suite_of(program, ["drqv2_pieg"], args) == suite


def test_published_levels_are_drawn_where_they_fit_and_named_where_not():
    """SPR's 3681.61 on Krull and rliable's DER below it; a line twice as high would flatten the curves."""
    about = {"method": "A", "suite": "atari-100k", "task": "krull", "key": "eval/test_return", "seed": 1}
    data = pd.DataFrame([about | {"step": step, "value": value} for step, value in ((0, 0.0), (10, 2600.0))])
    lines = plot_curves.COLUMNS["evaluations"]
    levels = plot_curves.levels_of(data, lines, plot_curves.printed(("atari100k_other_baselines",)))
    assert levels["SPR, test, 100,000 agent steps"] == 3681.61 and len(levels) == 4
    assert plot_curves.levels_of(data, lines, plot_curves.printed(("none",))) == {}
    figure, axis = plt.subplots()
    plot_curves.draw(axis, data, lines, {"A": "red"}, None, levels)
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert "published SPR, test, 100,000 agent steps: 3682" in texts
    assert "above, published DrQ(eps), test, 100,000 agent steps: 4402" in texts
    assert axis.get_ylim()[1] < 4402
    plt.close(figure)


@pytest.mark.parametrize("count", [len(plot_curves.COLOURS), 20])
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
    plot_curves.draw(axis, data, {"eval/test_return": ("o-", "test")}, {"A": "red"}, None)
    (band,) = axis.collections
    ends = band.get_paths()[0].get_extents()
    assert (ends.y0, ends.y1) == pytest.approx((20 - 200**0.5, 20 + 200**0.5))
    plt.close(figure)


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
