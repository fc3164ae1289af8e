"""Gathers the evaluations of some runs into one tidy CSV: a row a number, with the run that it came from.

    python benchmark/collect.py runs --out benchmark/results/<experiment>.csv              # all runs in a folder
    python benchmark/collect.py MDPO=runs/<folder> PPO=runs/<folder> --out benchmark/results/<experiment>.csv

A method without a name is called by its run's --exp-name.
"""

import csv
import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "numpy", "envpool", "dm_control", "mujoco")
SUITES = {"mdpo": "procgen", "ppo_netrand": "procgen", "drq_sam_reset": "atari-100k", "sac_sam_reset": "dmc"}


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]  # run folders or folders of them, as many as there are, or METHOD=FOLDER
    out: str  # the CSV file
    suite: str | None = None  # name of the benchmark suite (default: that of the script)
    keys: tuple[str, ...] = (
        "eval/test_return",
        "eval/train_return",
        "eval/full_look_return",
        "eval/mc_test_return",
        "eval/mc_train_return",
        "eval/mc_full_look_return",
        "eval/color_easy_return",
        "eval/color_hard_return",
        "eval/video_easy_return",
        "eval/video_hard_return",
        "charts/episodic_return",
    )  # what is taken from metrics.csv


def main():
    args = tyro.cli(Args)
    runs = [rows for named in args.runs for rows in rows_of_all(named, args)]
    try:
        file = open(args.out, "w", newline="")
    except OSError as error:
        fail(f"--out {args.out}: {error.strerror}")
    with file:
        writer = csv.DictWriter(file, list(runs[0][0]))
        writer.writeheader()
        writer.writerows(row for rows in runs for row in rows)
    print(f"{args.out}: {sum(map(len, runs))} rows of {len(runs)} runs")


def rows_of_all(named, args):
    """[the rows of a run] for a run's folder or one with such folders; those without any of the keys are left out."""
    method, folder = named.split("=", 1) if "=" in named else ("", named)
    folders = [Path(folder)]
    if not (folders[0] / "args.json").exists():
        folders = sorted(path.parent for path in Path(folder).glob("*/args.json")) or folders
    runs = [rows for rows in (rows_of(method, folder, args) for folder in folders) if rows]
    if not runs:
        fail(f"{folder} has none of {' '.join(args.keys)}")
    if len(runs) < len(folders):
        print(f"{folder}: {len(folders) - len(runs)} runs left out, which have none of the keys yet", file=sys.stderr)
    return runs


def rows_of(method, folder, args):
    """The rows of one run."""
    try:
        about = json.loads((folder / "args.json").read_text())
        with open(folder / "metrics.csv") as file:
            metrics = [row for row in csv.DictReader(file) if row["key"] in args.keys]
    except (OSError, ValueError) as error:
        fail(f"{folder}: no folder of a run or of runs ({getattr(error, 'strerror', None) or error})")
    hardware, packages, (program, *flags) = about["hardware"], about["packages"], about["command"]
    ours = [f"{folder}/{Path(program).name}" for folder in ("algos", "benchmark")]
    program = next((path for path in ours if (ROOT / path).exists()), program)
    command = shlex.join(["python", program, *flags])
    source = {
        "command": re.sub(r" --runs-dir[ =]\S+", "", command),  # a path on the machine it ran on
        "commit": about["commit"],
        "packages": " ".join(f"{name}=={packages[name]}" for name in PACKAGES if name in packages),
        "hardware": f"{hardware['gpu'] or 'no GPU'}, {hardware['cores']} cores {hardware['cpu']}",
    }
    task = {
        "method": method or about["args"]["exp_name"],
        "suite": args.suite or suite_of(program, flags, about["args"]),
        "task": about["args"]["env_id"],
        "seed": about["args"]["seed"],
    }
    return [task | row | source for row in metrics]


def suite_of(program, flags, args):
    """The benchmark suite of a run: of its script, or, where another program made the environments, that one's name."""
    script = Path(program).stem
    if script == "ablations":
        script = next((flag for flag in flags if (ROOT / "algos" / f"{flag}.py").exists()), script)
    if script == "drqv2_pieg":
        return "dmc-gb" if args.get("eval_modes") else "dmc"
    return SUITES.get(script, script)


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
