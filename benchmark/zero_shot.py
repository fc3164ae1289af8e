"""Zero-shot returns of runs of drqv2_pieg.py in DMC-GB's looks, as a table beside the paper's.

    python algos/drqv2_pieg.py --evaluate runs/<folder> --eval-modes color_easy color_hard video_easy video_hard
    python benchmark/zero_shot.py runs/<folder> runs/<folder>

Of each run's evaluation.csv: mean and standard deviation over episodes. The paper's are over seeds, whose number it
does not say; its own table has the two looks with clips.
"""

import csv
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import tyro

PUBLISHED = Path(__file__).parent / "published" / "pieg_dmcgb.csv"


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]  # run folders that were evaluated, a column each
    published: tuple[str, ...] = ("PIE-G", "SVEA", "DrQ-v2")  # methods of the paper's tables, a column each


def main():
    args = tyro.cli(Args)
    known = published()
    for method in args.published:
        if method not in known:
            fail(f"--published {method}: there are {', '.join(known)}")
    columns = [evaluated(folder) for folder in args.runs]
    print(markdown(columns, {f"{method}, paper": known[method] for method in args.published}))


def evaluated(folder):
    """(name of the column, task, {look: text}) of a run."""
    try:
        about = json.loads((Path(folder) / "args.json").read_text())["args"]
        with open(Path(folder) / "evaluation.csv") as file:
            rows = list(csv.DictReader(file))
        cells = {row["split"]: cell(row["mean"], row["std"]) + note_of(row) for row in rows}
        return f"{about['exp_name']}, seed {about['seed']}, step {rows[0]['step']}", about["env_id"], cells
    except (OSError, LookupError, ValueError) as error:
        fail(f"{folder}: not the folder of a run of drqv2_pieg.py that was evaluated ({error})")


def cell(mean, std):
    return f"{float(mean):.0f} ± {float(std):.0f}"


def note_of(row):
    """How many episodes there were, and of how few clips."""
    return f" ({row['episodes']} episodes" + (f", {row['clips']} clips)" if row["clips"] != "0" else ")")


def published():
    """{method: {(task, look): text}} of the paper's table of returns."""
    methods = defaultdict(dict)
    with open(PUBLISHED) as file:
        for row in csv.DictReader(file):
            if row["suite"] == "dmc-gb" and row["metric"] == "return" and row["std"] and "Table 1" in row["source"]:
                place = row["task"].replace("_", "-"), row["setting"]
                methods[row["method"]][place] = cell(row["value"], row["std"])
    return methods


def markdown(columns, methods):
    """A table with a row a task and look."""
    places = dict.fromkeys((task, look) for _, task, cells in columns for look in cells)
    lines = [["task", "look", *(name for name, _, _ in columns), *methods], ["---"] * (2 + len(columns) + len(methods))]
    for task, look in places:
        own = [cells.get(look, "") if task == of else "" for _, of, cells in columns]
        theirs = [cells.get((task.replace("_", "-"), look), "") for cells in methods.values()]
        lines.append([task, look, *own, *theirs])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fail(message):
    """Ends the program the way a wrong flag does: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
