"""Gathers the evaluations of some runs into one tidy CSV: a row a number, with the run that it came from.

python benchmark/collect.py MDPO=runs/<folder> PPO=runs/<folder> --out benchmark/results/<experiment>.csv
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


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]  # METHOD=RUN_FOLDER, as many as there are
    out: str  # the CSV file
    suite: str = "procgen"  # name of the benchmark suite
    keys: tuple[str, ...] = (
        "eval/test_return",
        "eval/train_return",
        "eval/full_look_return",
        "eval/mc_test_return",
        "eval/mc_train_return",
        "eval/mc_full_look_return",
        "charts/episodic_return",
    )  # what is taken from metrics.csv


def main():
    args = tyro.cli(Args)
    rows = [row for run in args.runs for row in rows_of(*run.partition("=")[::2], args)]
    try:
        file = open(args.out, "w", newline="")
    except OSError as error:
        fail(f"--out {args.out}: {error.strerror}")
    with file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"{args.out}: {len(rows)} rows of {len(args.runs)} runs")


def rows_of(method, folder, args):
    """The rows of one run; a run without any of the keys ends the program."""
    try:
        about = json.loads((Path(folder) / "args.json").read_text())
        with open(Path(folder) / "metrics.csv") as file:
            metrics = [row for row in csv.DictReader(file) if row["key"] in args.keys]
    except OSError as error:
        fail(f"{method}={folder}: not METHOD=RUN_FOLDER ({error.strerror})")
    if not metrics:
        fail(f"{folder} has none of {' '.join(args.keys)}")
    hardware, packages, (program, *flags) = about["hardware"], about["packages"], about["command"]
    ours = Path("algos", Path(program).name)
    command = shlex.join(["python", str(ours) if (ROOT / ours).exists() else program, *flags])
    source = {
        "command": re.sub(r" --runs-dir[ =]\S+", "", command),  # a path on the machine it ran on
        "commit": about["commit"],
        "packages": " ".join(f"{name}=={packages[name]}" for name in PACKAGES if name in packages),
        "hardware": f"{hardware['gpu'] or 'no GPU'}, {hardware['cores']} cores {hardware['cpu']}",
    }
    task = {"method": method, "suite": args.suite, "task": about["args"]["env_id"], "seed": about["args"]["seed"]}
    return [task | row | source for row in metrics]


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
