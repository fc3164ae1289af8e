"""What the papers printed, and which of our runs may stand beside it.

A run is known by its script and its arguments, not by the name that somebody gave it: it fills a cell if it is the
paper's method, all that cannot change what is learned aside, and if it was evaluated after as many steps.
"""

import contextlib
import dataclasses
import io
import json
import sys
from functools import cache
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
from common import plain

PUBLISHED = common.ROOT / "benchmark" / "published"
NOT_RUN = "not run"
SCRIPTS = ("mdpo", "ppo_netrand", "drq_sam_reset", "sac_sam_reset", "drqv2_pieg")


# ---- The papers' methods: {file in published/: {row of its tables: Method}} ----
@dataclasses.dataclass
class Method:
    """The runs that belong beside a row: their script, what differs from its defaults, their steps (None: default)."""

    script: str  # with the ablation behind it, as in collect.py's column
    changed: dict
    steps: int | None = None


NO_RESETS, NO_SAM = {"reset_every": 0}, {"sam": False}
BASE = NO_SAM | NO_RESETS
NO_AUGMENT = {"augment": False}


def regularised(script, base, changed):
    """Lee et al. 2023, Tables 1, 2 and 6: rows that begin with the base method's name."""
    return {
        base: Method(script, BASE | changed),
        f"{base}+L2, 1e-3": Method(f"{script} l2_1e-3", BASE | changed),  # the best of three is in the tables
        f"{base}+L2, 1e-4": Method(f"{script} l2_1e-4", BASE | changed),
        f"{base}+L2, 1e-5": Method(f"{script} l2_1e-5", BASE | changed),
        f"{base}+SAM": Method(script, NO_RESETS | changed),
        f"{base}+LN": Method(f"{script} layer_norm", BASE | changed),
        f"{base}+CReLU": Method(f"{script} crelu", BASE | changed),
        f"{base}+SWA": Method(f"{script} swa", BASE | changed),
        f"{base}+Reset": Method(script, NO_SAM | changed),
        f"{base}+SWA+Reset": Method(f"{script} swa", NO_SAM | changed),
        f"{base}+SAM+Reset": Method(script, changed),
    }


SHRINK, PICTURES = {"shrink_perturb": 0.8}, {"overlay_dir": "pictures"}
ONE, EASY, PLAIN_LOOK = {"num_agents": 1}, {"distribution_mode": "easy"}, {"plain_look": True}
SHRINK_NAME = "DrQ+SAM+Reset+ShrinkPerturb, replay ratio"
METHODS = {
    "drq_sam_reset_atari100k": {
        **regularised("drq_sam_reset", "DER", NO_AUGMENT),
        **regularised("drq_sam_reset", "DrQ", {}),
        f"{SHRINK_NAME} 2": Method("drq_sam_reset", SHRINK),
        f"{SHRINK_NAME} 4": Method("drq_sam_reset", SHRINK | {"replay_ratio": 4}),
        f"{SHRINK_NAME} 8": Method("drq_sam_reset", SHRINK | {"replay_ratio": 8}),
    },
    "sac_sam_reset_dmcm": regularised("sac_sam_reset", "DrQ-SAC", {}),
    "pieg_dmcgb": {
        "PIE-G": Method("drqv2_pieg", PICTURES),
        "DrQ-v2": Method("drqv2_pieg", {"encoder": "drqv2", "strong_augmentation": "none"}),
        "SVEA": Method("drqv2_pieg", PICTURES | {"encoder": "drqv2"}),
        "PIE-G, layer 1": Method("drqv2_pieg", PICTURES | {"encoder_layer": 1}),
        "PIE-G, layer 2": Method("drqv2_pieg", PICTURES),
        "PIE-G, layer 3": Method("drqv2_pieg", PICTURES | {"encoder_layer": 3}),
        "PIE-G, layer 4": Method("drqv2_pieg", PICTURES | {"encoder_layer": 4}),
    },
    "procgen_ppo_openai": {
        "easy, 200 levels": Method("mdpo", ONE | EASY),
        "hard, 500 levels": Method("mdpo", ONE),
        "easy, all levels": Method("mdpo", ONE | EASY | {"num_levels": 0}),
        "hard, all levels": Method("mdpo", ONE | {"num_levels": 0}),
    },
    "mdpo_procgen": {
        "MDPO": Method("mdpo", {}),
        "PPO": Method("mdpo", ONE),
        "SPO with distillation": Method("mdpo", {"policy_loss": "spo"}),
        "SPO": Method("mdpo", ONE | {"policy_loss": "spo"}),
        "PPO, doubled": Method("mdpo doubled", ONE | {"num_envs": 128}, steps=100_000_000),
    },
    "netrand_coinrun": {
        "PPO+netrand": Method("ppo_netrand", PLAIN_LOOK, steps=256_000_000),
        "PPO": Method("ppo_netrand", PLAIN_LOOK | {"netrand": False}, steps=256_000_000),
    },
}


# ---- What was printed ----
@cache
def read(stem):
    """A file of published/ as strings, each number with the digits that it was printed with."""
    return pd.read_csv(PUBLISHED / f"{stem}.csv", dtype=str, keep_default_na=False)


@cache
def per_task():
    """What the papers printed of single tasks: the rows of published/ that have a return, with

    origin (the file), task as `plain` spells it, key of metrics.csv that measures it, name (of METHODS, or the
    method's own) and mark (steps after which it was measured, 0: at the end).
    """
    atari = read("atari100k_other_baselines").query("metric == 'score'")
    atari = atari.assign(origin="atari100k_other_baselines", key="eval/test_return")

    dmc = read("sac_sam_reset_dmcm").query("metric == 'return_mean_over_seeds'")
    dmc = dmc.assign(origin="sac_sam_reset_dmcm", key="eval/test_return")

    looks = read("pieg_dmcgb").query("metric == 'return' and setting.str.startswith('video')")
    looks = looks.assign(origin="pieg_dmcgb", key="eval/" + looks["setting"] + "_return")

    procgen = read("procgen_ppo_openai").query("metric != 'mean_normalised_return'")
    mode, levels, curve = (procgen["setting"].str.split("; ").str[n] for n in range(3))
    levels = levels.str.replace("training ", "").str.replace("unlimited", "all")
    procgen = procgen.assign(
        origin="procgen_ppo_openai",
        name=mode + ", " + levels,
        key="eval/" + curve.str.split().str[0] + "_return",
        mark=procgen["steps_or_frames"].astype(int),
    )
    rows = pd.concat([atari, dmc, looks, procgen], ignore_index=True)
    name = rows["name"].fillna(rows["method"])
    return rows.assign(name=name, mark=rows["mark"].fillna(0).astype(int), task=rows["task"].map(plain))


# ---- Which runs belong beside it ----
def load(paths, each_alone=False):
    """The rows of collect.py's CSVs in one table, with the file that they are from. Others are left out.

    Runs of one name with other settings get names of their own; each_alone: if they are in one file.
    Errors: OSError; ValueError if there is no such CSV.
    """
    tables = []
    for path in sorted(map(Path, paths)):
        table = read_rows(path)
        if table is not None:
            tables.append(table.assign(file=path.stem))
    if not tables:
        raise ValueError(f"no CSV of collect.py with a run: {' '.join(map(str, paths))}")
    rows = pd.concat(tables, ignore_index=True)
    places = ["method", "suite", "task", "file"] if each_alone else ["method", "suite", "task"]
    for (method, *_), group in rows.groupby(places):
        kinds = group[["script", "changed"]].drop_duplicates().to_numpy().tolist()
        settings = [{"script": script, **json.loads(changed or "{}")} for script, changed in kinds]
        for (script, changed), name in zip(kinds, common.names_apart(method, settings), strict=True):
            own = group.index[(group["script"] == script) & (group["changed"] == changed)]
            rows.loc[own, "method"] = name
    return rows


COLUMNS = {"method", "suite", "task", "seed", "step", "key", "value", "script", "changed", "default_steps", "command"}
RUN = ["task", "seed", "command"]  # what tells the runs of a method apart
NUMBERS = ("seed", "step", "value", "default_steps", "episodes")


def read_table(path):
    """A CSV as strings, or None if it cannot be read. Names stay as they are written: None, NA, 001."""
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:  # empty, or not a table
        print(f"skipped: {path}: {common.first_line(error)}", file=sys.stderr)
        return None


def read_rows(path):
    """A CSV of collect.py, or None if it is another table, or has no row or a number that is none."""
    table = read_table(path)
    if table is None or not {*table} >= COLUMNS:
        return None
    # The oldest have none of these.
    table = table.assign(episodes=table.get("episodes", "0"), parameters=table.get("parameters", ""))
    try:
        for name in NUMBERS:
            table[name] = pd.to_numeric(table[name])
        table["value"] = table["value"].astype(float)
    except ValueError as error:
        print(f"skipped: {path}: {name}: {common.first_line(error)}", file=sys.stderr)
        return None
    if table.empty:
        print(f"skipped: {path}: no rows", file=sys.stderr)
        return None
    return table


def scores(rows, file, name, key, mark=0):
    """{task, as `plain` spells it: [return of a run]} of the runs that may stand beside a row of a paper's table."""
    runs = whole_runs(rows, file, name, key, mark)
    return {plain(task): own["value"].to_list() for task, own in runs.groupby("task")}


def whole_runs(rows, file, name, key, mark=0):
    """The row of each run that may stand beside a row of a paper's table: its first evaluation after `mark` steps,

    or after the paper's own (0), if it was one of at least as many episodes as the script's last one by default.
    """
    method = METHODS[file][name]
    rows = rows[rows["episodes"] >= episodes_of(method.script)]
    rows = rows[(rows["key"] == key) & (rows["script"] == method.script) & (rows["changed"] == as_text(method.changed))]
    needed = mark or method.steps or rows["default_steps"]
    rows = rows[rows["step"] >= needed].sort_values("step")
    return rows.drop_duplicates(RUN).sort_values(RUN)


def episodes_of(script):
    """Episodes of the last evaluation of a whole run, which a number beside a paper's has to be of."""
    stem = script.split()[0]  # without the ablation
    return module(stem).final_episodes(checked(stem, {}))


def cells(script, changed):
    """[(file, name of METHODS)] of the rows that a run belongs beside, by collect.py's columns."""
    found = []
    for file, methods in METHODS.items():
        for name, method in methods.items():
            if (method.script, as_text(method.changed)) == (script, changed):
                found.append((file, name))
    return found


def as_text(changed):
    return json.dumps(changed, sort_keys=True)


# ---- A run's arguments beside its script's ----
LEVELS = {"easy": 200, "hard": 500}  # training levels of Procgen's modes, which the scripts call -1


@cache
def module(script):
    """One of SCRIPTS as it is in algos/, whose defaults are the paper's."""
    return common.load_script(common.ROOT / "algos" / f"{script}.py")


def changes(script, args):
    """(what differs from the script's defaults and decides what is learned, steps of a run by default).

    A default may follow from the task or from other arguments; the script's `check` puts it in. Pictures to overlay
    are equal wherever they lie, but are not the made-up textures. --num-levels 500 is hard mode's default.
    """
    own = {field.name: field.default for field in dataclasses.fields(args)}
    settings = common.settings_of(vars(args))
    if "num_levels" in settings and settings["num_levels"] == LEVELS[settings["distribution_mode"]]:
        settings["num_levels"] = own["num_levels"]
    pictures = settings.get("overlay_dir", "textures") != "textures"
    if pictures:
        settings["overlay_dir"] = str(common.ROOT)  # a folder that is there on each machine
    found = PICTURES if pictures else {}
    for name, value in settings.items():
        if value == own[name] or name == "overlay_dir":
            continue
        if value != vars(checked(script, settings | {"env_id": args.env_id, name: own[name]}))[name]:
            found = found | {name: value}
    return found, checked(script, settings | {"env_id": args.env_id}).total_timesteps


def checked(script, settings):
    """The script's arguments with these settings, as `check` makes them definite, or as they are if it refuses them."""
    args = module(script).Args(**settings)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        return module(script).check(args)
    return args
