"""What the papers printed, and which of our runs may stand beside it.

A run is known by its command, not by the name that somebody gave it: it fills a cell if its arguments are those of the
paper's method, all that cannot change what is learned aside, and if it went on for as many steps.
"""

import contextlib
import dataclasses
import io
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "benchmark" / "published"
NOT_RUN = "not run"
# How a run is watched and where it runs. Without it, the arguments say what is learned.
# fmt: off
NEUTRAL = {
    "exp_name", "seed", "torch_deterministic", "cuda", "cuda_required", "cuda_graphs", "precision", "track",
    "wandb_project_name", "wandb_entity", "runs_dir", "save_minutes", "exact_every", "resume", "evaluate",
    "eval_every", "eval_episodes", "final_eval_episodes", "eval_seed", "eval_envs", "eval_modes", "dmcgb_dir",
    "mc_samples", "env_id", "total_timesteps",
}
# fmt: on

# Lee et al. 2023, Tables 1, 2 and 6: {what follows the base method's name: (ablation, flags)}.
REGULARISED = {
    "": ("", "--no-sam --reset-every 0"),
    "+L2, 1e-3": ("l2_1e_3", "--no-sam --reset-every 0"),  # of three amounts, the best is in the tables
    "+L2, 1e-4": ("l2_1e_4", "--no-sam --reset-every 0"),
    "+L2, 1e-5": ("l2_1e_5", "--no-sam --reset-every 0"),
    "+SAM": ("", "--reset-every 0"),
    "+LN": ("layer_norm", "--no-sam --reset-every 0"),
    "+CReLU": ("crelu", "--no-sam --reset-every 0"),
    "+SWA": ("swa", "--no-sam --reset-every 0"),
    "+Reset": ("", "--no-sam"),
    "+SWA+Reset": ("swa", "--no-sam"),
    "+SAM+Reset": ("", ""),
}
# {file in published/: {row of its tables: (script, ablation, flags)}}: the runs that belong beside it.
METHODS = {
    "drq_sam_reset_atari100k": {
        **{f"DER{name}": ("drq_sam_reset", how, f"--no-augment {flags}") for name, (how, flags) in REGULARISED.items()},
        **{f"DrQ{name}": ("drq_sam_reset", how, flags) for name, (how, flags) in REGULARISED.items()},
        **{
            f"DrQ+SAM+Reset+ShrinkPerturb, replay ratio {ratio}": (
                "drq_sam_reset",
                "",
                f"--shrink-perturb 0.8 --replay-ratio {ratio}",
            )
            for ratio in (2, 4, 8)
        },
    },
    "sac_sam_reset_dmcm": {
        f"DrQ-SAC{name}": ("sac_sam_reset", how, flags) for name, (how, flags) in REGULARISED.items()
    },
    "pieg_dmcgb": {
        "PIE-G": ("drqv2_pieg", "", "--overlay-dir pictures"),
        "DrQ-v2": ("drqv2_pieg", "", "--encoder drqv2 --strong-augmentation none"),
        "SVEA": ("drqv2_pieg", "", "--encoder drqv2 --overlay-dir pictures"),
        **{
            f"PIE-G, layer {layer}": ("drqv2_pieg", "", f"--overlay-dir pictures --encoder-layer {layer}")
            for layer in (1, 2, 3, 4)
        },
    },
    "procgen_ppo_openai": {
        "easy, 200 levels": ("mdpo", "", "--num-agents 1 --distribution-mode easy"),
        "hard, 500 levels": ("mdpo", "", "--num-agents 1"),
        "easy, all levels": ("mdpo", "", "--num-agents 1 --distribution-mode easy --num-levels 0"),
        "hard, all levels": ("mdpo", "", "--num-agents 1 --num-levels 0"),
    },
    "mdpo_procgen": {
        "MDPO": ("mdpo", "", ""),
        "PPO": ("mdpo", "", "--num-agents 1"),
        "SPO with distillation": ("mdpo", "", "--policy-loss spo"),
        "SPO": ("mdpo", "", "--policy-loss spo --num-agents 1"),
        "PPO, doubled": ("mdpo", "doubled", "--num-agents 1 --num-envs 128 --total-timesteps 100000000"),
    },
    "netrand_coinrun": {
        "PPO+netrand": ("ppo_netrand", "", "--plain-look"),
        "PPO": ("ppo_netrand", "", "--plain-look --no-netrand"),
    },
}


# ---- What was printed ----
@cache
def read(stem):
    """A file of published/ as strings, each number with the digits that it was printed with."""
    return pd.read_csv(PUBLISHED / f"{stem}.csv", dtype=str, keep_default_na=False)


def plain(task):
    """One spelling of a task for all: walker_walk from walker-walk."""
    return task.lower().replace("-", "_")


@cache
def per_task():
    """What the papers printed of single tasks: the rows of published/ that have a return, with

    origin (the file), suite (procgen-easy and procgen-hard apart), task, key of metrics.csv that measures it, name (of
    METHODS, or the method's own) and mark (steps after which it was measured, 0: at the end).
    """
    games = dict(read("atari_human_random")[["game", "game_snake_case"]].to_numpy())
    atari = read("atari100k_other_baselines").query("metric == 'score'")
    atari = atari.assign(suite="atari-100k", task=atari["task"].map(games), key="eval/test_return")
    dmc = read("sac_sam_reset_dmcm").query("metric == 'return_mean_over_seeds'").assign(key="eval/test_return")
    dmc = dmc.assign(suite="dmc", task=dmc["task"].map(plain))
    looks = read("pieg_dmcgb").query("metric == 'return' and setting.str.startswith('video')")
    looks = looks.assign(task=looks["task"].map(plain), key="eval/" + looks["setting"] + "_return")
    procgen = read("procgen_ppo_openai").query("metric != 'mean_normalised_return'")
    mode, levels, curve = (procgen["setting"].str.split("; ").str[n] for n in range(3))
    procgen = procgen.assign(
        suite="procgen-" + mode,
        name=mode + ", " + levels.str.replace("training ", "").str.replace("unlimited", "all"),
        key="eval/" + curve.str.split().str[0] + "_return",
        mark=procgen["steps_or_frames"].astype(int),
    )
    parts = {"atari100k_other_baselines": atari, "sac_sam_reset_dmcm": dmc, "pieg_dmcgb": looks}
    parts |= {"procgen_ppo_openai": procgen}
    rows = pd.concat([part.assign(origin=origin) for origin, part in parts.items()], ignore_index=True)
    return rows.assign(name=rows["name"].fillna(rows["method"]), mark=rows["mark"].fillna(0).astype(int))


# ---- Which runs belong beside it ----
def load(paths):
    """The rows of collect.py's CSVs in one table, with the file that they are from. Others are left out."""
    tables = [pd.read_csv(path).assign(file=Path(path).stem) for path in sorted(map(Path, paths))]
    tables = [table for table in tables if {"method", "task", "seed", "step", "key", "value", "command"} <= {*table}]
    if not tables:
        raise ValueError("no CSV of collect.py")
    rows = pd.concat(tables, ignore_index=True)
    mode = rows["command"].str.extract(r"--distribution-mode[ =](\w+)")[0].fillna("hard")
    mode = mode.where(~rows["command"].str.contains("--plain-look"), "plain")  # which nobody else reports
    return rows.assign(suite=rows["suite"].where(rows["suite"] != "procgen", "procgen-" + mode))


def scores(rows, file, name, key, mark=0):
    """{task: [return of a run]} of the runs that may stand beside a row of a paper's table.

    Each run counts with its first evaluation after `mark` steps, or after the paper's own (0).
    """
    rows = rows[rows["key"] == key]
    needed = {command: dict(cells(command)).get((file, name), np.inf) for command in rows["command"].unique()}
    needed = rows["command"].map(needed)
    rows = rows[(rows["step"] >= (mark or needed)) & np.isfinite(needed)].sort_values("step")
    runs = rows.groupby(["task", "seed", "command"], as_index=False)["value"].first()
    return {plain(task): runs["value"].to_list() for task, runs in runs.groupby("task")}


def cells(command):
    """[((file, name of METHODS), the paper's steps)] that a command belongs beside."""
    return cells_without_seed(re.sub(r" --seed[ =]\d+", "", command))


@cache
def cells_without_seed(command):
    script, ablation, args = recognised(command)
    rows = []
    for file, methods in METHODS.items():
        for name, (of, how, flags) in methods.items():
            if (script, ablation) == (of, how):
                theirs = definite(script, dataclasses.replace(arguments(script, flags), env_id=args.env_id))
                if settings(theirs) == settings(args):
                    rows.append(((file, name), theirs.total_timesteps))
    return rows


def recognised(command):
    """(script, ablation or "", its arguments) of a command that trains; ("", "", None) of any other."""
    of_script = re.fullmatch(r"python algos/(\w+)\.py(.*)", command)
    of_ablation = re.fullmatch(r"python benchmark/ablations\.py (\S+) (\S+)(.*)", command)
    if of_script:
        script, ablation, flags = of_script[1], "", of_script[2]
    elif of_ablation:
        script, ablation, flags = of_an_ablation(*of_ablation.groups())
    else:
        script, ablation, flags = "", "", ""
    args = arguments(script, flags) if (ROOT / "algos" / f"{script}.py").exists() else None
    if args is None or args.evaluate or args.resume:
        return "", "", None
    return script, ablation, definite(script, args)


def of_an_ablation(script, ablation, flags):
    """(script, ablation with underscores, flags) with those that the ablation brings along."""
    from ablations import ABLATIONS

    script, ablation = script.replace("-", "_"), ablation.replace("-", "_")
    if ablation in ABLATIONS:
        script, ablation = ablation, script
    own = {name.replace("-", "_"): row[2] for name, row in ABLATIONS.get(script, {}).items()}
    return (script, ablation, " ".join(own[ablation]) + flags) if ablation in own else ("", "", "")


@cache
def module(script):
    from suites import load_script  # which takes seconds: torch

    return sys.modules.setdefault(script, load_script(script))  # where tyro looks for the flags' comments


@cache
def arguments(script, flags):
    """The arguments that flags give a script; None if it refuses them."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return tyro.cli(module(script).Args, args=shlex.split(flags))
        except SystemExit:
            return None


def definite(script, args):
    """Arguments with the task's own values in place of 0, in the scripts that have such."""
    return getattr(module(script), "definite", lambda args: args)(args)


def settings(args):
    """What decides what is learned. Pictures to overlay are equal wherever they lie, but are not textures."""
    known = {key: value for key, value in dataclasses.asdict(args).items() if key not in NEUTRAL}
    if "overlay_dir" in known and known["overlay_dir"] != "textures":
        known["overlay_dir"] = "pictures"
    if known.get("num_levels") == -1:
        known["num_levels"] = {"easy": 200, "hard": 500}[known["distribution_mode"]]
    return known


def fail(message):
    """Ends the program the way a wrong flag does: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
