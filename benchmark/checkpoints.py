"""What the analyses of checkpoints share: how one is named and loaded, and the table of what was found."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import suites

SUITES = {"mdpo": "procgen", "ppo_netrand": "procgen", "drq_sam_reset": "atari", "sac_sam_reset": "dm_control"}


@dataclass
class Checkpoint:
    """A checkpoint, the script that wrote it as a module, and that script's Args, in fp32."""

    path: Path
    method: str
    script: Any
    state: dict
    args: Any

    def source(self):
        """Where a row of a table comes from. The commit is its run folder's, if that is there."""
        about = self.path.parent / "args.json"
        commit = json.loads(about.read_text())["commit"] if about.is_file() else ""
        row = {"method": self.method, "suite": SUITES[self.script.__name__], "task": self.args.env_id}
        return row | {"seed": self.args.seed, "step": self.state["step"], "commit": commit}

    def build(self, function, *rest, **more):
        """function(args, *rest, **more), which makes the script's environments or networks of the checkpoint."""
        try:
            return function(self.args, *rest, **more)
        except (RuntimeError, ValueError) as error:  # an ablation's network, another suite's task
            suites.fail(f"{self.path} was not trained by {self.script.__name__}.py alone: {str(error).splitlines()[0]}")


def load(text, scripts, cuda):
    """The Checkpoint of [METHOD=]RUN, a run folder or a checkpoint of one of these scripts, or the program ends."""
    method, _, path = ("", "", text) if Path(text).exists() else text.rpartition("=")
    name = suites.script_name(path)
    if name not in scripts:
        suites.fail(f"{path} is of {name}.py, and this is for {' and '.join(f'{script}.py' for script in scripts)}")
    script = suites.load_script(name)
    state = script.load_checkpoint(path)
    try:
        args = script.Args(**state["args"] | {"cuda": cuda, "cuda_required": False, "precision": "fp32"})
    except TypeError as error:
        suites.fail(f"{path} is of another version of {name}.py: {error}")
    return Checkpoint(script.checkpoint_path(path), method or args.exp_name, script, state, args)


def check(runs, *files):
    """Ends the program unless a run is named and each (path, suffix) can be a file; a path may be None."""
    if not runs:
        suites.fail("a run folder or a checkpoint, or some of them, is what this works on")
    for path, suffix in files:
        if path is not None and (not path.endswith(suffix) or not Path(path).absolute().parent.is_dir()):
            suites.fail(f"{path}: not a {suffix} file in a folder that exists")


def report(rows, out=None):
    """Prints a table of dicts, without the commits, and writes it to a CSV file."""
    table = pd.DataFrame(rows)
    print(table.drop(columns="commit").to_string(index=False, float_format="{:.4g}".format))
    if out:
        table.to_csv(out, index=False)
        print(out)
