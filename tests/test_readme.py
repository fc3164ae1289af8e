"""Each command of the README does what it says, in a short form."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, ROWS, SCRIPTS, load
from test_drqv2_pieg import make_looks

README = (ROOT / "README.md").read_text()
SUITES = {"benchmark/manipulation.py": "reach-duplo", "benchmark/drawerworld.py": "drawer-close"}  # their first tasks
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the commands need."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("algos", "benchmark", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def run_python(path, argv, monkeypatch):
    """Runs a script's main() in this process, or trains on a suite, tests and shows it."""
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    monkeypatch.setattr(sys, "argv", [str(path), *argv])
    spec.loader.exec_module(module)
    if f"benchmark/{path.name}" in SUITES:
        return module.suites.main(module, argv)
    module.main(*[argv] * (path.stem == "ablations"))


def short_form(path, argv):
    """The flags that make a command of the README short; those of a checkpoint's run are short already."""
    if path.startswith("benchmark/record.py"):
        return ["--steps", "3", "--rows", "1", "--columns", "1"]
    if path.startswith("benchmark/throughput.py"):
        return [f"--flags={ROWS[Path(argv[0]).stem]['flags']}", "--iterations", "1"]
    if path.startswith("benchmark/looks.py"):
        return ["--episodes", "2", "--steps", "8"]
    if path.startswith("benchmark/launch.py"):
        return ["--only", "exp-name ppo ", "--seeds", "1"] if "smoke" in argv else ["--dry-run"]
    if path.startswith(("benchmark/plot_aggregate.py", "benchmark/report.py")):
        return ["--reps", "3"]
    if path.startswith("benchmark/robustness.py"):
        return ["--episodes", "1", "--steps", "3", "--draws", "2"]
    if path.startswith("benchmark/tsne.py"):
        return ["--versions", "10", "--perplexity", "3", "--step", "2"]
    if path.startswith("benchmark/sharpness.py"):
        return ["--batch-size", "4", "--active-size", "8", "--iterations", "2"]
    if path.startswith("benchmark/adaptation.py"):
        tiny = "--scale short --data synthetic --changes 2 --updates 4 --final-updates 6 --chunk-images 20"
        return shlex.split(f"{tiny} --test-images 30 --methods base --optimizers sgd --seeds 1 --no-cuda")
    if path in SUITES and argv[0] in SCRIPTS:
        flags = shlex.split(ROWS[argv[0]]["flags"])[2:]  # without the task
        return [*flags, "--action-repeat", "10", "--total-timesteps", "30", "--eval-every", "0"]
    if path in SUITES:
        return ["--episodes", "1"] if argv[0] == "test" else []
    if not (path.startswith("algos/") or "--env-id" in argv) or "--evaluate" in argv:
        return []
    if "--resume" in argv:
        return ["--eval-every", "0", "--total-timesteps", "192" if "--total-timesteps" in argv else "128"]
    script = script_of(path, argv)
    flags = shlex.split(ROWS["mdpo" if script == "ppo_netrand" else script]["flags"])  # in the mode that is asked for
    flags = [*flags[flags.index("--total-timesteps") :], "--final-eval-episodes", "2"]
    more = {"ppo_netrand": ["--mc-samples", "1"], "mdpo": ["--eval-every", "64"]}
    more["sac_sam_reset"] = more["drqv2_pieg"] = []
    more["drq_sam_reset"] = ["--eval-every", "1000", "--final-eval-episodes", "1"]  # a game of boxing takes its time
    return flags + more[script]


def script_of(path, argv):
    """The script that a command runs, or whose runs it looks at."""
    words = [path, *argv]
    if path in SUITES or any(name in " ".join(words) for name in ("pieg", "zero_shot", "--split looks")):
        return "drqv2_pieg"
    for script in ("drq_sam_reset", "sac_sam_reset"):
        if any(script[:3] in word.lower() for word in words):
            return script
    return "ppo_netrand" if any("netrand" in word or "looks" in word for word in words) else "mdpo"


def test_the_readme_has_commands():
    assert any("make test" in command for command in COMMANDS)
    assert sum("algos/mdpo.py" in command for command in COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    program, *words = shlex.split(command)
    if program == "make":
        done = subprocess.run(["make", "-n", *words], capture_output=True, text=True)
        assert done.returncode == 0 and "requirements.txt" in (checkout / "Makefile").read_text()
        return
    if program == "cp":
        subprocess.run([program, *words], check=True)
        return
    if program in ("pip", "tensorboard"):
        assert words in (["install", "-r", "requirements.txt"], ["--logdir", "runs"])
        return
    assert program == "python"
    path, *argv = words
    if path == "benchmark/drawerworld.py" and importlib.util.find_spec("metaworld") is None:
        with pytest.raises(SystemExit, match=r"^2$"):
            run_python(checkout / path, argv, monkeypatch)
        assert "error: DrawerWorld needs Meta-World: pip install" in capsys.readouterr().err
        pytest.skip("Meta-World is not installed: make drawerworld")
    if "runs/<" in command:
        script = script_of(path, argv)
        flags = shlex.split(ROWS[script]["flags"])
        runs = f"runs/{SUITES.get(path, flags[1])}__{script}__*"
        if not list(checkout.glob(runs)) and path in SUITES:
            run_python(checkout / path, [script, *short_form(path, [script])], monkeypatch)
        elif not list(checkout.glob(runs)):
            run_python(checkout / f"algos/{script}.py", flags, monkeypatch)
        folder = str(min(checkout.glob(runs)))
        argv = [re.sub(r"runs/<.*?>", folder, word) for word in argv]
    if ("--eval-modes" in argv or "looks" in argv) and not Path("data").exists():
        make_looks(checkout / "data" / "dmcgb")  # what `make dmcgb` would get from a network
    if path == "benchmark/collect.py" and "runs" in argv and not Path("runs").exists():
        run_python(checkout / "algos/mdpo.py", shlex.split(ROWS["mdpo"]["flags"]), monkeypatch)
    if path.startswith("benchmark/plot_") and not Path(argv[0] if "curves" in path else argv[1]).exists():
        argv = [str(file) for word in argv for file in sorted(checkout.glob(word)) or [word]]
    if path.startswith("tests/"):
        subprocess.run([sys.executable, path, *(word.replace("NAME", "fail") for word in argv)], check=True)
        return
    before = set(checkout.rglob("*"))
    run_python(checkout / path, argv + short_form(path, argv), monkeypatch)
    made = {file.name for file in set(checkout.rglob("*")) - before}
    if path.startswith("algos/") and "--resume" not in argv:
        assert "--evaluate" in argv or {"checkpoint.pt", "evaluation.csv"} <= made


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_flag_in_the_readme_exists_and_none_is_missing(name):
    """A table of flags says which other one it adds to, or it is whole."""
    _, _, section = README.partition(f"## Flags of `{name}.py`")
    table = section[section.index("| group") :].partition("\n\n")[0]
    base = re.search(r"(?:copy of|as in) `(\w+)\.py`", section[: section.index("| group")])
    fields = {key.replace("_", "-") for key in load(name).Args.__dataclass_fields__}
    if base:
        fields -= {key.replace("_", "-") for key in load(base[1]).Args.__dataclass_fields__}
    assert set(re.findall(r"`--([a-z-]+)`", table)) == fields


def test_each_picture_and_file_in_the_readme_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert local and all((ROOT / link).exists() for link in local)
