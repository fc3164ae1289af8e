"""What README.md and docs/ say: each command works in a short form, each link leads somewhere, each flag exists."""

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, ROWS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, *sorted((ROOT / "benchmark").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
FIVE = ["mdpo", "ppo_netrand", "drq_sam_reset", "sac_sam_reset", "drqv2_pieg"]
SUITES = ("benchmark/suites/manipulation.py", "benchmark/suites/drawerworld.py")


def blocks_of(page):
    """The commands of each block, as lists."""
    blocks = []
    for language, text in BLOCK.findall(page.read_text()):
        if language == "bash":
            blocks.append(text.splitlines())
    return blocks


def all_blocks():
    """A parameter for each block of each page. Those of README.md are fast, but for the paper's setting."""
    parameters = []
    for page in PAGES:
        for number, commands in enumerate(blocks_of(page), 1):
            fast = page.name == "README.md" and not any("bigfish" in command for command in commands)
            marks = [] if fast else [pytest.mark.slow]
            parameters.append(pytest.param(commands, marks=marks, id=f"{page.name}-{number}"))
    return parameters


# ---- Commands ----
@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the commands need."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("algos", "benchmark", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.mark.parametrize("commands", all_blocks())
def test_commands(commands, checkout, monkeypatch, capsys):
    """The commands of a block, one after the other, in a copy of the repository."""
    monkeypatch.chdir(checkout)
    for command in commands:
        program, *words = shlex.split(command)
        if program == "make":
            done = subprocess.run(["make", "-n", *words], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        elif program == "cp":
            subprocess.run([program, *words], check=True)
        elif program in ("pip", "tensorboard"):
            assert words in (["install", "-r", "requirements.txt"], ["--logdir", "runs"])
        elif program == "uv":
            assert words[0] == "run" and "# /// script\n" in Path(words[1]).read_text()
            run_command(words[1], words[2:], checkout, monkeypatch, capsys)
        else:
            assert program == "python"
            run_command(words[0], words[1:], checkout, monkeypatch, capsys)


def run_command(path, argv, checkout, monkeypatch, capsys):
    """Runs a program of the repository in its short form, with the runs and files that it needs."""
    if path.startswith("tests/"):
        argv = [word.replace("NAME", "fail") for word in argv]
        subprocess.run([sys.executable, path, *argv], check=True)
        return
    if path.endswith("drawerworld.py") and importlib.util.find_spec("metaworld") is None:
        with pytest.raises(SystemExit, match=r"^2$"):
            run_python(checkout / path, argv, monkeypatch)
        assert "error: DrawerWorld needs Meta-World: pip install" in capsys.readouterr().err
        pytest.skip("Meta-World is not installed: make drawerworld")
    looks = {"--eval-modes", "--dmcgb-dir", "looks"} & set(argv)
    if looks and not Path("data").exists():
        from test_drqv2_pieg import make_looks

        make_looks(checkout / "data" / "dmcgb")  # what `make dmcgb` would download
    if "runs" in argv or any("runs/<" in word for word in argv):
        folder = make_run(path, argv, checkout, monkeypatch)
        argv = [re.sub(r"runs/<.*?>", folder, word) for word in argv]
    if path.endswith("plot_aggregate.py"):
        argv = [argv[0], *expand(argv[1]), *argv[2:]]
    before = set(checkout.rglob("*"))
    run_python(checkout / path, argv + short_form(path, argv), monkeypatch)
    made = {file.name: file for file in set(checkout.rglob("*")) - before}
    if path.startswith("algos/") and "--resume" not in argv:
        assert {"checkpoint.pt", "args.json", "metrics.csv", Path(path).name} <= made.keys()
        assert ("eval/test_return" in made["metrics.csv"].read_text()) == is_evaluated(argv)
    if "--out" in argv and argv[argv.index("--out") + 1] != ".":
        assert Path(argv[argv.index("--out") + 1]).exists()


def expand(pattern):
    """What a shell makes of *.csv."""
    return [str(file) for file in sorted(Path().glob(pattern))]


def run_python(path, argv, monkeypatch):
    """Runs a program as `python path argv` does, but in this process, which saves the imports."""
    for name, module in list(sys.modules.items()):
        if "benchmark" in Path(vars(module).get("__file__") or "").parts:
            monkeypatch.delitem(sys.modules, name)  # or it would be the original one, not the copy's
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    monkeypatch.setattr(sys, "argv", [str(path), *argv])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    if path.stem in ("manipulation", "drawerworld"):
        module.pixels.main(module.SUITE, argv)
    elif path.parent.name == "suites":
        module.main(argv)
    else:
        module.main()


def make_run(path, argv, checkout, monkeypatch):
    """A finished run of the script that the command is about. -> its folder."""
    script, program = script_of(path, argv), path
    name = f"row_of_{Path(path).stem}"
    flags = [script, *short_form(path, [script])]
    if path not in SUITES:
        name, program, flags = f"row_of_{script}", f"algos/{script}.py", flags_of_row(script)
    if not list(checkout.glob(f"runs/*__{name}__*")):
        run_python(checkout / program, [*flags, "--exp-name", name], monkeypatch)
    (folder,) = checkout.glob(f"runs/*__{name}__*")
    return str(folder.relative_to(checkout))


def script_of(path, argv):
    """The script that a command runs, or whose runs it looks at."""
    text = " ".join([path, *argv])
    for script in FIVE:
        if script in text:
            return script
    words = {"ppo_netrand": ["netrand", "analyses/looks"], "drq_sam_reset": ["DrQ="], "sac_sam_reset": ["SAC="]}
    words["drqv2_pieg"] = ["PIE-G", "--split looks", "--eval-modes", *SUITES]
    for script, some in words.items():
        if any(word in text for word in some):
            return script
    return "mdpo"


def flags_of_row(script):
    return shlex.split(ROWS[script]["flags"])


def short_form(path, argv):
    """The flags that make a command short. Programs that look at a run need none: the run is short."""
    name = Path(path).stem
    fixed = {
        "record": "--steps 3 --rows 1 --columns 1",
        "looks": "--episodes 2 --steps 8",
        "mc_samples": "--samples 1 --repeats 2 --episodes 2",
        "plot_aggregate": "--reps 3",
        "plot_splits": "--reps 3",
        "report": "--reps 3",
        "robustness": "--episodes 1 --steps 3 --draws 2",
        "tsne": "--versions 10 --perplexity 3 --step 2",
        "sharpness": "--batch-size 4 --active-size 8 --iterations 2",
        "feature_maps": "--steps 3",
        "adaptation": "--scale short --data synthetic --changes 2 --updates 4 --final-updates 6 --chunk-images 20"
        " --test-images 30 --methods base --optimizers sgd --seeds 1 --no-cuda",
    }
    if name in fixed:
        return shlex.split(fixed[name])
    if name == "throughput":
        return [f"--flags={ROWS[Path(argv[0]).stem]['flags']}", "--iterations", "1"]
    if name == "launch":
        return ["--only", "exp-name ppo ", "--seeds", "1"] if "smoke" in argv else ["--dry-run"]
    if path in SUITES and argv[0] in FIVE:
        flags = flags_of_row(argv[0])[2:]  # without the task
        return [*flags, "--action-repeat", "10", "--total-timesteps", "30", "--eval-every", "0"]
    if path in SUITES:
        return ["--episodes", "1"] if argv[0] == "test" else []
    if "--resume" in argv:
        return ["--eval-every", "0", "--total-timesteps", "192" if "--total-timesteps" in argv else "128"]
    if path.startswith("algos/") or "--env-id" in argv:
        plain = ["--precision", "fp32"] if "bf16" in argv else []  # bf16 is slow on most processors
        return [*short_training(script_of(path, argv), is_evaluated(argv)), *plain]
    return []


def is_evaluated(argv):
    """Whether a command that trains says something about evaluations. The others go without: they take long."""
    return any("--eval" in word for word in argv)


def short_training(script, evaluated):
    """The flags of a script's row but for the task and its mode, which the command chooses."""
    flags = flags_of_row("mdpo" if script == "ppo_netrand" else script)
    flags = [*flags[flags.index("--total-timesteps") :], "--final-eval-episodes", "2"]
    if script == "drq_sam_reset":  # a few updates, the first reset among them; and a game of boxing takes its time
        flags += ["--total-timesteps", "512", "--final-eval-episodes", "1"]
    if script in ("sac_sam_reset", "drqv2_pieg"):
        flags += ["--total-timesteps", "30"]
    if script == "ppo_netrand":
        flags += ["--mc-samples", "1"]
    return [*flags, "--eval-every", "1000" if evaluated else "0"]  # 1000: after the last step alone


def test_the_readme_has_commands():
    text = (ROOT / "README.md").read_text()
    for command in ("make test", "pip install", "uv run", "--resume", "analyses/evaluate.py", "analyses/record.py"):
        assert command in text


# ---- Flags ----
@cache
def fields_of(path):
    """The flags of a program: the fields of its dataclasses, and what it reads from the command line itself."""
    text = path.read_text()
    flags = set(re.findall(r'"(--[a-z-]+)"', text))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.AnnAssign):
                    flag = line.target.id.replace("_", "-")
                    flags |= {f"--{flag}", f"--no-{flag}"}
    return flags


def flags_of(words):
    """All flags that a command may have: those of the program, and of the script that it passes them to."""
    path = ROOT / words[0]
    if words[0] == "algos/mine.py":
        path = ROOT / "algos/mdpo.py"
    flags = fields_of(path)
    if path.parent.name == "suites":
        flags |= fields_of(ROOT / "benchmark/suites/pixels.py")
    if path.parent.name == "suites" or path.name == "evaluate.py":
        flags |= fields_of(ROOT / f"algos/{script_of(words[0], words[1:])}.py")
    return flags


def given_in(words):
    """The flags that are given in a command."""
    flags = []
    for word in words:
        if word.startswith("--"):
            flags.append(word.partition("=")[0])
    return flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_flag_of_a_command_exists(page):
    for commands in blocks_of(page):
        for command in commands:
            words = shlex.split(command.replace("uv run", "python"))
            if words[0] == "python":
                unknown = set(given_in(words)) - flags_of(words[1:])
                assert not unknown, f"{command}: {unknown}"


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_flag_in_the_text_exists(page):
    """Behind a program's name it is one of that program's; alone it is one of any program. --eval-* is a group."""
    programs = {}
    for path in [*ROOT.glob("algos/*.py"), *ROOT.glob("benchmark/**/*.py")]:
        programs[path.name] = fields_of(path)
    any_program = set().union(*programs.values())
    text = BLOCK.sub("", page.read_text())
    if page.parent.name == "results":
        text = ""  # commands of runs, with the flags that there were then
    for code in re.findall(r"`([^`\n]*--[^`\n]*)`", text):
        program = code.split()[0].rpartition("/")[2]
        known = programs.get(program, any_program)
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*\*?", code):
            if flag.endswith("*"):
                assert any(one.startswith(flag[:-1]) for one in known), f"{page.name}: {code}"
            else:
                assert flag in known, f"{page.name}: {code}"


# ---- Links ----
def anchors_of(page):
    """What GitHub makes of a page's headings."""
    anchors = []
    for heading in re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        anchors.append(f"{anchor}-{anchors.count(anchor)}" if anchor in anchors else anchor)
    return anchors


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_link_leads_somewhere(page):
    """Files of the repository, and headings of its pages; links to the web are not followed."""
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors_of(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_file_that_is_named_exists(page):
    examples = {"algos/mine.py", "algos/X.py", "benchmark/results/mine.csv"}
    for name in re.findall(r"(?<![\w/.])((?:algos|benchmark|docs|tests)/[\w./-]*\w)", page.read_text()):
        assert name in examples or (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 12 * 1024
