"""Gathers the logged returns of some runs into one tidy CSV: one row per number, with the run that it came from.

    python benchmark/tables/collect.py runs --out benchmark/results/<experiment>.csv              # all runs in a folder
    python benchmark/tables/collect.py MDPO=runs/<folder> PPO=runs/<folder> --out benchmark/results/<experiment>.csv

A method without a name is called by its run's --exp-name. A folder that is no whole run is named and skipped.
"""

import csv
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import papers

PACKAGES = ("torch", "numpy", "envpool", "dm_control", "mujoco")


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]  # run folders, or folders that contain some, or METHOD=FOLDER
    out: str  # the CSV file
    suite: str | None = None  # name of the suite (default: it follows from the run's arguments)
    keys: tuple[str, ...] = (
        *common.KEYS,
        "eval/mc_test_return",
        "eval/mc_train_return",
        "eval/mc_full_look_return",
        "charts/active_",
        "charts/hours",
    )  # what is taken from metrics.csv: keys that begin so


def main():
    args = tyro.cli(Args)
    common.check_out(args.out, ".csv")
    runs, skipped, known = [], 0, set()
    for text in args.runs:
        method, folder = common.split_name(text)
        for one in folders_in(folder):
            if (method, one.resolve()) in known:
                continue
            known.add((method, one.resolve()))
            try:
                runs.append(rows_of(method, one, args))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                print(f"skipped: {one}: {reason(error)}", file=sys.stderr)
                skipped += 1
    if skipped:
        print(f"{skipped} of {skipped + len(runs)} skipped", file=sys.stderr)
    if not args.runs:
        common.fail("which runs? Their folders, or a folder that holds some")
    if not runs:
        sys.exit(f"error: no run in {' '.join(args.runs)}, so {args.out} was not written")
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(runs[0][0]), lineterminator="\n")
        writer.writeheader()
        for rows in runs:
            writer.writerows(rows)
    print(f"{args.out}: {sum(map(len, runs))} rows of {len(runs)} runs")


def folders_in(folder):
    """A run's folder alone, or the folders in it."""
    if (folder / "args.json").exists() or not folder.is_dir():
        return [folder]
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return folders or [folder]


def reason(error):
    """Why a run cannot be read, in a line."""
    if isinstance(error, OSError):
        return f"{Path(error.filename).name}: {error.strerror}"
    return common.first_line(error)


def rows_of(method, folder, args):
    """The rows of one run. Errors: of many kinds, for a folder that is no whole run."""
    about = common.parse_about(folder)
    text = (folder / "metrics.csv").read_text(encoding="utf-8")
    whole, _, _ = text.rpartition("\n")  # a full disk may have cut the last line, and a number with it
    metrics = list(csv.DictReader(whole.splitlines()))
    episodes = {row["step"]: row["value"] for row in metrics if row["key"] == "charts/eval_episodes"}
    run = {
        "method": method or about["args"]["exp_name"],
        "suite": args.suite or common.suite_of(about),
        "task": about["args"]["env_id"],
        "seed": about["args"]["seed"],
    }
    source = settings_of(folder, about) | {
        "command": command_of(about),
        "commit": about["commit"],
        "packages": packages_of(about),
        "hardware": hardware_of(about),
        "parameters": about.get("parameters", ""),  # that learn
    }
    rows = []
    for row in metrics:
        if row["key"].startswith(args.keys):
            if not math.isfinite(float(row["value"])):
                raise ValueError(f"metrics.csv: {row['key']} is {row['value']} at step {row['step']}")
            count = episodes.get(row["step"], "") if row["key"].startswith("eval/") else ""
            rows.append(run | row | {"episodes": count} | source)
    if not rows:
        raise ValueError(f"metrics.csv has none of {' '.join(args.keys)} yet")
    return rows


def command_of(about):
    """The first command, without folders of the machine that it ran on, and the steps where a resume changed them."""
    program, *flags = common.without_runs_dir(about["command"])
    parts = Path(program).parts
    while len(parts) > 1 and parts[0] not in ("algos", "benchmark"):
        parts = parts[1:]
    command = shlex.join(["python", "/".join(parts), *flags])
    for session in about.get("sessions", [])[1:]:
        if "total_timesteps" in session["changed"]:
            command += f" (resumed with --total-timesteps {session['changed']['total_timesteps']})"
    return command


def packages_of(about):
    versions = about["packages"]
    return " ".join(f"{name}=={versions[name]}" for name in PACKAGES if name in versions)


def hardware_of(about):
    hardware = about["hardware"]
    return f"{hardware['gpu'] or 'no GPU'}, {hardware['cores']} cores {hardware['cpu']}"


# ---- What a run is, for the papers' tables ----
def settings_of(folder, about):
    """What papers.py knows a run by.

    script: its stem, with the ablation or the suite's program behind it. changed: the arguments that decide what is
    learned, as JSON; of a script of ours as it was committed, those that differ from its defaults. default_steps: steps
    of a whole run, empty for other scripts than ours.
    """
    program, *words = about["command"]
    stem = Path(program).stem
    script = stem
    if not (folder / f"{stem}.py").exists():  # a program that trains a script
        script = next((path.stem for path in folder.glob("*.py")), stem)
    name = script
    if stem == "ablations":  # ablations.py SCRIPT ABLATION; of the ablation timm which encoder
        encoder = (common.value_of(words, "--encoder-name"), common.value_of(words, "--encoder-stage"))
        name = " ".join([script, words[1], *filter(None, encoder)])
    elif stem != script:
        ablation = [word for word in words[1:2] if not word.startswith("-")]  # coins.py SCRIPT ABLATION
        name = " ".join([script, stem, *ablation, common.value_of(words, "--network")]).strip()
    settings = common.settings_of(about["args"])
    settings["version"] = about.get("script", "")[:8]  # two texts of one name are two methods
    unknown = {"script": name, "changed": papers.as_text(settings), "default_steps": ""}
    place = Path(words[0] if stem == "ablations" else program)
    elsewhere = place.suffix == ".py" and place.parent.name != "algos"
    if script not in papers.SCRIPTS or stem not in (script, "ablations") or elsewhere:
        return unknown
    if about["commit"].endswith("-dirty") or not about["commit"]:  # perhaps changed
        return unknown
    try:
        args = papers.module(script).Args(**about["args"])
    except TypeError:  # of another version of the script
        return unknown
    changed, steps = papers.changes(script, args)
    return {"script": name, "changed": papers.as_text(changed), "default_steps": steps}


if __name__ == "__main__":
    main()
