"""Each command of the README does what it says, in a short form."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, ROWS, load

README = (ROOT / "README.md").read_text()
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
    """Runs a script's main() in this process."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    monkeypatch.setattr(sys, "argv", [str(path), *argv])
    spec.loader.exec_module(module)
    module.main()


def short_form(path, argv):
    """The flags that make a command of the README short; those of a checkpoint's run are short already."""
    if path.startswith("benchmark/record.py"):
        return ["--steps", "3", "--rows", "1", "--columns", "1"]
    if path.startswith("benchmark/throughput.py"):
        return [f"--flags={ROWS['mdpo']['flags']}", "--iterations", "1"]
    if not path.startswith("algos/") or "--evaluate" in argv:
        return []
    if "--resume" in argv:
        return ["--eval-every", "0", "--total-timesteps", "192" if "--total-timesteps" in argv else "128"]
    flags = shlex.split(ROWS["mdpo"]["flags"])
    return [*flags[flags.index("--total-timesteps") :], "--eval-every", "64", "--final-eval-episodes", "2"]


def test_the_readme_has_commands():
    assert any("make test" in command for command in COMMANDS)
    assert sum("algos/mdpo.py" in command for command in COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, checkout, monkeypatch):
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
    if "runs/<folder>" in command and not (checkout / "runs").exists():
        run_python(checkout / "algos/mdpo.py", shlex.split(ROWS["mdpo"]["flags"]), monkeypatch)
    path, *argv = words
    folders = sorted(checkout.glob("runs/*__mdpo__*"))
    argv = [word.replace("runs/<folder>", str(folders[0])) if folders else word for word in argv]
    if path.startswith("tests/"):
        subprocess.run([sys.executable, path, *(word.replace("NAME", "fail") for word in argv)], check=True)
        return
    before = set(checkout.rglob("*"))
    run_python(checkout / path, argv + short_form(path, argv), monkeypatch)
    made = {file.name for file in set(checkout.rglob("*")) - before}
    if path.startswith("algos/") and "--resume" not in argv:
        assert "--evaluate" in argv or {"checkpoint.pt", "evaluation.csv"} <= made


def test_each_flag_in_the_readme_exists_and_none_is_missing():
    section = README[README.index("## Flags of") :]
    named = set(re.findall(r"`--([a-z-]+)`", section[: section.index("The paper's baselines")]))
    fields = {name.replace("_", "-") for name in load("mdpo").Args.__dataclass_fields__}
    assert named == fields


def test_each_picture_and_file_in_the_readme_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert local and all((ROOT / link).exists() for link in local)
