"""What the programs in benchmark/ share: how a run is loaded, what its suite is called, and the colours of plots.

A program in a folder of benchmark/ finds this file with

    sys.path.insert(0, str(Path(__file__).parent.parent))
    import common
"""

import importlib.util
import itertools
import json
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.dont_write_bytecode = True  # or loading a run's script would leave a __pycache__ in its folder
ROOT = Path(__file__).parent.parent
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: safe for the colour-blind
KEYS = {  # what plots and tables call a key of metrics.csv
    "eval/test_return": "test",
    "eval/train_return": "train",
    "eval/full_look_return": "train, unseen look",
    "eval/color_easy_return": "color_easy",
    "eval/color_hard_return": "color_hard",
    "eval/video_easy_return": "video_easy",
    "eval/video_hard_return": "video_hard",
    "charts/episodic_return": "while learning",
}
loads = itertools.count()


def fail(message):
    """Ends the program the way a wrong flag does: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def run(program, *arguments):
    """Calls a program that trains. A full disk and Ctrl-C end it with a line, as they end the scripts."""
    threading.excepthook = lambda _: None  # TensorBoard's thread fails on a full disk too
    try:
        program(*arguments)
    except OSError as error:
        sys.exit(f"error: {error}; what was saved before is whole")
    except KeyboardInterrupt:
        sys.exit("stopped at once; what was saved before is whole")


def check_out(path, *endings):
    """Ends the program if `path` cannot be a file with one of these endings, before hours of work are lost."""
    if not str(path).endswith(endings) or not Path(path).absolute().parent.is_dir():
        fail(f"{path}: not a {' or '.join(endings)} file in a folder that exists")
    new = not Path(path).exists()
    try:
        open(path, "ab").close()
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}")
    if new:
        Path(path).unlink()


def first_line(error):
    """Of what an exception says, or its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


# ---- Runs ----
@dataclass
class Run:
    """A run: its folder, its script as a module, its arguments, its checkpoint and its args.json."""

    folder: Path
    method: str  # the name that was given before the folder, or the run's --exp-name
    script: Any
    args: Any
    state: dict
    about: dict
    make_envs: Any  # what it was trained with: the script's own, or those of a program in benchmark/suites/
    make_agent: Any

    def agents(self, make_envs=None, make_agent=None):
        """The run's agents, by default with the environments and networks it was trained with; or the program ends."""
        make_envs = make_envs or self.make_envs
        make_agent = make_agent or self.make_agent
        try:
            return self.script.load_agents(self.args, self.state, make_envs, make_agent)
        except (RuntimeError, ValueError) as error:  # a network or a task from elsewhere
            name = Path(self.script.__file__).name
            fail(f"{self.folder} was not trained by {name} alone: {first_line(error)}")

    def source(self):
        """Where a row of a table comes from."""
        return {
            "method": self.method,
            "suite": suite_of(self.about),
            "task": self.args.env_id,
            "seed": self.args.seed,
            "step": self.state["step"],
            "commit": self.about["commit"],
        }


def load_run(text, **changes):
    """The Run of "FOLDER" or "METHOD=FOLDER", with its script from that folder and `changes` to its arguments.

    The program ends with one line if the folder is no run, has no checkpoint, or is of another version.
    """
    import torch  # slow, and not needed by the programs that only read tables

    name, folder = split_name(text)
    about = read_about(folder)
    try:
        state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        path = folder / f"{state['script']}.py"
    except FileNotFoundError:
        fail(f"{folder} has no checkpoint.pt yet")
    except Exception as error:
        fail(f"{folder}/checkpoint.pt cannot be read: {first_line(error)}")
    if "args" in state:
        fail(f"{folder} is a run of another version of {path.name}")
    if not path.is_file():
        fail(f"{folder} has no {path.name}, the script that trained it")
    script = load_script(path)
    values = about["args"] | changes
    for key, value in values.items():
        if isinstance(value, list):  # JSON has no tuples
            values[key] = tuple(value)
    try:
        args = script.Args(**values)
    except TypeError as error:
        fail(f"{folder} is a run of another version of {path.name}: {error}")
    make_envs, make_agent = seams(script, about)
    return Run(folder, name or args.exp_name, script, args, state, about, make_envs, make_agent)


def seams(script, about):
    """The make_envs and make_agent that a run of `script` was trained with, from its args.json."""
    program = suite_program(about)
    if program is None:
        return script.make_envs, script.Agent
    return load_script(program).seams(script, about)


def suite_program(about):
    """The path of the program in benchmark/suites/ that started a run, or None, from its args.json."""
    program = Path(about["command"][0])
    path = ROOT / "benchmark" / "suites" / program.name
    if program.parent.name in ("suites", "") and path.is_file():  # "": started from that folder
        return path
    return None


def split_name(text):
    """("METHOD", folder) from "METHOD=FOLDER", ("", folder) from "FOLDER". Both may have = in their names."""
    text = str(text)
    if Path(text).exists():
        return "", Path(text)
    for equals in re.finditer("=", text):
        folder = Path(text[equals.end() :])
        if folder.exists():
            return text[: equals.start()], folder
    name, equals, folder = text.partition("=")
    return (name, Path(folder)) if equals and "/" not in name else ("", Path(text))


def read_about(folder):
    """args.json of a run's folder, or the program ends."""
    try:
        return parse_about(folder)
    except OSError as error:
        fail(f"{folder} is no folder of a run: args.json: {error.strerror}")
    except ValueError as error:
        fail(f"{folder}: {error}")


def parse_about(folder):
    """args.json of a run's folder. Errors: OSError; ValueError, if it is not what a run writes."""
    text = (Path(folder) / "args.json").read_text(encoding="utf-8")
    try:
        about = json.loads(text)
    except ValueError as error:
        raise ValueError(f"args.json cannot be read: {error}") from error
    if not isinstance(about, dict) or not {"command", "args", "commit", "hardware", "packages"} <= about.keys():
        raise ValueError("args.json is of no run, or of one of another version")
    return about


def find_script(word):
    """The path of a script: `word` itself if it ends in .py, else the script of that name in algos/."""
    there = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
    if word.endswith(".py"):
        return Path(word)
    if word.replace("-", "_") not in there:
        fail(f"no script {word!r}, there are: {' '.join(there)}, or the path of a .py file")
    return ROOT / "algos" / f"{word.replace('-', '_')}.py"


def spelled(command):
    """A command with its flags in one spelling: to tyro, --eval_every=0 is --eval-every 0."""
    words = []
    for word in command:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            words.append(flag.replace("_", "-"))
            if equals:
                words.append(value)
        else:
            words.append(word)
    return words


def value_of(command, flag):
    """The word behind a flag, "" where there is none."""
    words = spelled(command)
    return next((value for word, value in itertools.pairwise(words) if word == flag), "")


def without_runs_dir(command):
    """The words of a command that trains, without its folder of runs, which is another one on each machine."""
    words, kept = iter(command), []
    for word in words:
        flag, equals, _ = word.replace("_", "-").partition("=")
        if flag != "--runs-dir":
            kept.append(word)
        elif not equals:
            next(words, None)
    return kept


def load_script(path):
    """A script, any file, as a fresh module with a name of its own."""
    path = Path(path)
    if not path.is_file():
        fail(f"{path}: no such script")
    name = f"{path.stem}_{next(loads)}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where tyro looks for the comments of Args
    spec.loader.exec_module(module)
    return module


# ---- What makes two runs the same method ----
# Arguments that say how a run is watched and where it runs. The others decide what is learned.
# fmt: off
NEUTRAL = (
    "env_id", "exp_name", "seed", "torch_deterministic", "cuda", "cuda_required", "cuda_graphs", "track",
    "wandb_project_name", "wandb_entity", "runs_dir", "save_minutes", "exact_every", "resume", "eval_every",
    "eval_episodes", "final_eval_episodes", "eval_seed", "eval_envs", "eval_modes", "dmcgb_dir", "mc_samples",
    "total_timesteps",
)
# fmt: on


def settings_of(args):
    """The arguments of args.json that decide what is learned. Of the precisions, bf16 alone is coarse."""
    settings = {name: value for name, value in args.items() if name not in NEUTRAL}
    if settings.get("precision") != "bf16":
        settings.pop("precision", None)
    if args.get("anneal_lr") or args.get("anneal_clip") or args.get("prioritized_replay_beta", 1) < 1:
        settings["total_timesteps"] = args["total_timesteps"]  # something rises or falls over the whole run
    return settings


def names_apart(name, settings):
    """Names for runs that were called the same: the name, and how their settings [{argument: value}] differ.

    An argument that only some have is at its default in the others.
    """
    names = []
    for own in settings:
        parts = [name]
        for key in sorted(set().union(*settings)):
            if key in own and any(other.get(key) != own[key] for other in settings):
                parts.append(f"{key} {own[key]}")
        names.append(", ".join(parts))
    return names


# ---- Suites: sets of environments that methods are compared on ----
def suite_of(about):
    """A run's suite, from its args.json.

    procgen-easy, procgen-hard, procgen-plain (--plain-look), atari-100k, dmc, dmc-gb (evaluated in its looks),
    manipulation, drawerworld, coins; other: none of them. It follows from arguments that a copy of a script keeps.
    """
    args, program = about["args"], suite_program(about)
    if program and program.stem != "ablations":
        return program.stem
    if args.get("plain_look"):
        return "procgen-plain"
    if "distribution_mode" in args:
        return "procgen-" + args["distribution_mode"]
    if args.get("eval_modes"):
        return "dmc-gb"
    if "action_repeat" in args:
        return "dmc"
    if "eval_epsilon" in args:  # Atari's protocol
        return "atari-100k"
    return "other"


def plain(task):
    """One spelling of a task for all: mspacman of MsPacman and ms_pacman."""
    return task.lower().replace("-", "").replace("_", "")
