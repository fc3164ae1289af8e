"""Evaluates a run: plays the episodes of its last evaluation and prints mean, standard deviation
and median.

    python benchmark/analyses/evaluate.py runs/<folder>
    python benchmark/analyses/evaluate.py runs/<folder> --eval-episodes 1000 --eval-seed 7
    python benchmark/analyses/evaluate.py runs/<folder> --eval-modes video_easy video_hard    # drqv2_pieg.py
    python benchmark/analyses/evaluate.py runs/<folder> --mc-samples 20                       # ppo_netrand.py

The table is printed first, and then added to evaluation.csv in the run's folder, with one row per
agent and split. What may be given are the script's own flags of an evaluation: --eval-*,
--mc-samples, --dmcgb-dir, --cuda. Their defaults are the run's; that of --eval-episodes is as many
as in its last evaluation.
"""

import csv
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

FREE = {"mc_samples", "dmcgb_dir", "cuda", "cuda_required"}  # what may be given, besides --eval-*
PUBLISHED = common.ROOT / "benchmark" / "published" / "pieg_dmcgb.csv"


def main():
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    if words[0].startswith("-"):
        common.fail(f"{words[0]}: the run's folder comes first")
    run = common.load_run(words[0], cuda_required=False)
    run.args.eval_episodes = run.script.final_episodes(run.args)
    args = tyro.cli(run.script.Args, args=words[1:], default=run.args, description=__doc__)
    given = json.loads(json.dumps(dataclasses.asdict(args)))  # with lists for tuples, as in args.json
    for name, value in run.about["args"].items():
        if given[name] != value and name not in FREE and not name.startswith("eval_"):
            common.fail(f"--{name.replace('_', '-')} is {value} in that run and stays so; see --help")
    check(vars(args))
    evaluate_run(dataclasses.replace(run, args=args))


def check(args):
    """Ends the program if an argument of an evaluation makes no sense."""
    for name, least in (
        ("eval_episodes", 1),
        ("eval_envs", 1),
        ("eval_seed", 0),
        ("eval_epsilon", 0),
        ("mc_samples", 0),
    ):
        if args.get(name, least) < least:
            common.fail(f"--{name.replace('_', '-')} {args[name]}: at least {least}")
    episodes, side_by_side = args["eval_episodes"], args.get("eval_envs", 1)
    if episodes % min(side_by_side, episodes):
        common.fail(f"--eval-episodes {episodes}: not a multiple of --eval-envs {side_by_side}")


def evaluate_run(run):
    """Plays run.args.eval_episodes episodes per agent and split with the script's own `compare`.

    Prints a row for each and adds them to evaluation.csv in the run's folder. -> list of dicts
    """
    agents = run.agents()
    script, rows, own = run.script, [], run.script.evaluate

    def evaluate(agent, args, make_envs, split, tick=lambda: None):
        returns = own(agent, args, make_envs, split, tick)
        row = {"step": run.state["step"], "agent": agents.index(agent) + 1, "split": split}
        row |= {"eval_seed": args.eval_seed, "episodes": len(returns)}
        for name in ("mc_samples", "eval_epsilon", "eval_batch_norm"):  # of some scripts; mc_samples 0: clean policy
            if name in vars(args):
                row[name] = getattr(args, name)
        if "dmcgb_dir" in vars(args):  # how many clips of DMC-GB there are
            row["clips"] = len(list(Path(args.dmcgb_dir, split).glob("*.mp4")))
        rows.append(row | {"mean": returns.mean(), "std": returns.std(), "median": np.median(returns)})
        return returns

    script.evaluate = evaluate  # that `compare` calls
    try:
        script.compare(agents, run.args, partial(make_envs, run))
    finally:
        script.evaluate = own
    report(rows)
    if "eval_modes" in vars(run.args):
        print_papers(run, rows)
    path = run.folder / "evaluation.csv"
    table = pd.DataFrame(rows)
    try:
        if path.exists():
            table = pd.concat([pd.read_csv(path), table])
        table.to_csv(path, index=False, float_format="%.4g")
        print(path)
    except OSError as error:
        print(f"{path}: {error.strerror}, so nothing was written")
    return rows


def load_runs(texts, cuda=False):
    """The runs of some [METHOD=]FOLDER, to be measured in fp32. Of one name with other settings: names of their own."""
    if not texts:
        common.fail("a run's folder, or some of them, is needed")
    runs = []
    for text in texts:
        runs.append(common.load_run(text, cuda=cuda, cuda_required=False, precision="fp32"))
    for method in {run.method for run in runs}:
        same = [run for run in runs if run.method == method]
        settings = [common.settings_of(run.about["args"]) for run in same]
        for run, name in zip(same, common.names_apart(method, settings), strict=True):
            run.method = name
    return runs


def make_envs(run, args, split, start=0):
    """The run's environments, or the program ends with one line, as where DMC-GB's looks are missing."""
    try:
        return run.make_envs(args, split, start)
    except (OSError, ValueError, RuntimeError) as error:
        common.fail(common.first_line(error))


def report(rows, out=None):
    """Prints a table of dicts, without the commits, and writes it to a CSV file."""
    table = pd.DataFrame(rows)
    shown = table.drop(columns="commit", errors="ignore")
    print(shown.to_string(index=False, float_format="{:.4g}".format))
    if out:
        table.to_csv(out, index=False)
        print(out)


# ---- Zero-shot returns in DMC-GB's looks ----
def print_papers(run, rows):
    """What PIE-G's paper has for the looks that a run was evaluated in, if there are some."""
    task, lines = common.plain(run.args.env_id), []
    for row in rows:
        known = published().get((task, row["split"]))
        if known:
            methods = ", ".join(f"{method} {text}" for method, text in known.items())
            lines.append(f"{row['split']}: {methods}")
    if lines:
        print("Yuan et al. 2022, Table 1, mean ± standard deviation over seeds:", *lines, sep="\n  ")


def published():
    """{(task, look): {method: "mean ± std"}} of the paper's table of returns."""
    found = {}
    with open(PUBLISHED, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["metric"] != "return" or not row["std"] or "Table 1" not in row["source"]:
                continue
            place = common.plain(row["task"]), row["setting"]
            text = f"{float(row['value']):.0f} ± {float(row['std']):.0f}"
            found.setdefault(place, {})[row["method"]] = text
    return found


if __name__ == "__main__":
    main()
