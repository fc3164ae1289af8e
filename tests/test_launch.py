"""The lists of benchmark/lists/ hold commands that exist, and launch.py finishes each run, whatever interrupts it.

Most sweeps here are of a program that keeps the scripts' contract and takes a second: a folder with args.json, a
checkpoint per step, --resume, and signals after which it saves.
"""

import dataclasses
import fnmatch
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, load
from test_curves import load as benchmark
from test_curves import run as main

FAKE = """
import argparse, json, os, shutil, signal, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
for flag in ("--env-id", "--exp-name", "--seed", "--runs-dir", "--resume"):
    parser.add_argument(flag)
parser.add_argument("--steps", type=int, default=2)
args, here = parser.parse_args(), Path(__file__).parent
if args.exp_name == "broken":
    print("a line before")
    sys.exit("error: this one breaks")
stopped = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: stopped.append(number))
folder = Path(args.resume or f"{args.runs_dir}/{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}")
if not args.resume:
    folder.mkdir(parents=True)
    about = {"command": sys.argv, "args": {"total_timesteps": args.steps, "eval_every": 1}}
    (folder / "args.json").write_text(json.dumps(about))
(folder / "pid").write_text(str(os.getpid()))
steps = folder / "steps"


def save(state):
    shutil.copy(here / f"{state}.pt", folder / "checkpoint.tmp")
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")


for step in range(len(steps.read_text().split()) if args.resume else 0, args.steps):
    time.sleep(0.05)
    with open(steps, "a") as file:
        print(step, file=file)
    save("running")
    if stopped:
        print(f"stopped by {signal.Signals(stopped[0]).name}")
        sys.exit(128 + stopped[0])
save("done")
"""
LISTS = sorted((ROOT / "benchmark" / "lists").glob("*.sh"))
launch = benchmark("launch")


@pytest.fixture
def fake(tmp_path):
    """write(*lines) -> a list of runs of the program above, whose flags the lines are."""
    (tmp_path / "fake.py").write_text(FAKE)
    torch.save({"step": 0, "evaluated": 0}, tmp_path / "running.pt")
    torch.save({"step": 1000, "evaluated": 1000}, tmp_path / "done.pt")

    def write(*lines):
        path = tmp_path / "list.sh"
        path.write_text("".join(f"python {tmp_path}/fake.py {line}\n" for line in lines))
        return path

    return write


def start(path, *flags, **how):
    """A sweep in a session of its own, whose runs go to `runs` beside its list."""
    command = [sys.executable, ROOT / "benchmark" / "launch.py", path, "--runs-dir", path.parent / "runs", *flags]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, start_new_session=True, **output | how)


def sweep(path, *flags):
    """-> (exit code, output) of a whole sweep."""
    process = start(path, *flags)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def wait_until(ready, seconds=120):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)


def folders(path):
    return sorted(file.parent for file in (path.parent / "runs").glob("*/args.json"))


def steps_in(folder):
    return [int(step) for step in (folder / "steps").read_text().split()] if (folder / "steps").exists() else []


def all_began(path, count):
    """Whether `count` runs have taken some steps."""
    return lambda: sum(len(steps_in(folder)) > 3 for folder in folders(path)) == count


def logs(path):
    return "".join(log.read_text() for log in sorted((path.parent / "runs" / ".launch").glob("*.log")))


# ---- The lists ----
def of_command(command):
    """(script's module, ablation or None, whether of a suite outside of it, flags) of a command of a list."""
    program, *words = command
    if program.startswith("algos/"):
        return load(Path(program).stem), None, False, words
    script, *words = words
    if program == "benchmark/suites/ablations.py":
        return load(script), words[0], False, words[1:]
    if program == "benchmark/suites/coins.py":
        ablation = words.pop(0) if not words[0].startswith("--") else None
        if "--network" in words:
            place = words.index("--network")
            words = words[:place] + words[place + 2 :]
        return load(script), ablation, True, words
    assert program in ("benchmark/suites/manipulation.py", "benchmark/suites/drawerworld.py")
    return load(script), None, True, words


@pytest.mark.parametrize("scale", ["paper", "smoke"])
@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_each_line_of_a_list_is_a_command(path, scale, monkeypatch):
    """Its flags are the script's, in their range, and no two lines write into folders of one name."""
    monkeypatch.chdir(ROOT)
    ablations, parsed, names, needed = benchmark("ablations"), {}, [], set()
    for run in launch.runs_of(launch.Args(lists=(str(path),), seeds=1, scale=scale)):
        needed |= {match.groups() for match in map(launch.NAMED.search, run.command) if match and match[1]}
        if not run.trains:
            assert Path(run.command[0]).is_file()
            continue
        script, ablation, suite, flags = of_command(run.command)
        if ablation:
            ablations.find(script, ablation)
        if ablation == "frozen":  # a flag of the ablation's own
            del flags[flags.index("--encoder") : flags.index("--encoder") + 2]
        env_id = flags.pop(flags.index("--env-id") + 1)
        flags = [flag for flag in flags if flag != "--env-id"]
        if (key := (script.__name__, *flags)) not in parsed:
            parsed[key] = tyro.cli(script.Args, args=flags)
        args = parsed[key]
        if suite:
            assert env_id in benchmark(Path(run.command[0]).stem).TASKS
        names.append((run.command[0] if suite else "", env_id, args.exp_name))
        if not suite:
            not_here = {"overlay_dir": "textures", "eval_modes": ()}  # data of other people
            changes = {name: value for name, value in not_here.items() if name in vars(args)}
            script.check(dataclasses.replace(args, env_id=env_id, **changes))
    assert len(set(names)) == len(names)
    made = {(name, launch.common.plain(task)) for _, task, name in names}
    assert {(name, launch.common.plain(task)) for name, task in needed} <= made


def papers():
    """A parameter for each table of docs/experiments.md's "Paper by paper": the paper's lists, the table's rows."""
    text = (ROOT / "docs" / "experiments.md").read_text()
    section = text.partition("\n## Paper by paper\n")[2].partition("\n## ")[0]
    parameters = []
    for part in section.split("\n### ")[1:]:
        heading, *lines = part.splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        parameters.append(pytest.param(re.findall(r"benchmark/lists/\w+\.sh", heading), rows[2:], id=heading[:10]))
    return parameters


@pytest.mark.parametrize(("paths", "rows"), papers())
def test_the_table_of_a_paper_names_its_lines(paths, rows, monkeypatch):
    """By --exp-name or by program; * is any text. All that the lists have is named. A row without a line says why."""
    monkeypatch.chdir(ROOT)
    there, named = set(), set()
    for path in paths:
        for command, _ in launch.commands_of(path):
            program = Path(command[0])
            if "--exp-name" in command:
                there.add(command[command.index("--exp-name") + 1])
            if program.parent.name != "algos" and program.name != "ablations.py":
                there.add(program.name)
    for _, _, lines, _ in rows:
        if lines.startswith("no line: "):
            continue
        names = re.findall(r"`(.+?)`", lines)
        assert names
        for name in names:
            found = fnmatch.filter(there, name)
            assert found, name
            named |= set(found)
    assert named == there


def test_the_papers_tables_are_of_all_lists():
    paths = [path for parameter in papers() for path in parameter.values[0]]
    assert sorted(paths) == [str(path.relative_to(ROOT)) for path in LISTS if path.stem != "coins"]


def test_every_script_has_a_list():
    assert {path.stem for path in LISTS} == {*SCRIPTS, "coins"}


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_the_core_of_a_list_needs_nothing_else(path, monkeypatch):
    """Its lines name runs of its own alone. It has the seeds of the list's head."""
    monkeypatch.chdir(ROOT)
    core = launch.runs_of(launch.Args(lists=(str(path),), core=True))
    said = re.search(r"^# seeds: (\d+)", path.read_text(), re.M)[1]
    assert {run.seed for run in core} == {str(seed) for seed in range(1, int(said) + 1)}
    made, needed = set(), set()
    for run in core:
        flags = run.command
        made.add((flags[flags.index("--exp-name") + 1], flags[flags.index("--env-id") + 1]))
        needed |= {named.groups() for named in map(launch.NAMED.search, flags) if named}
    assert needed <= made


def test_only_seeds_and_dry_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)

    def printed(*flags):
        chosen = ["benchmark/lists/mdpo.sh", "--only", "bigfish", "--only", "exp-name mdpo ", "--dry-run"]
        main(launch, monkeypatch, *chosen, *flags)
        return capsys.readouterr().out.splitlines()

    assert len(printed()) == 3  # as its head says
    expected = [f"python algos/mdpo.py --env-id bigfish --exp-name mdpo --seed {seed}" for seed in (1, 2)]
    assert printed("--seeds", 2) == expected
    assert printed("--seeds", 1, "--runs-dir", tmp_path) == [f"{expected[0]} --runs-dir {tmp_path}"]
    smoke = expected[0].replace("--seed", launch.SMOKE["mdpo"] + " --seed")
    assert printed("--seeds", 1, "--scale", "smoke") == [smoke]
    assert not list(tmp_path.iterdir())


def test_bash_reads_a_list(tmp_path, monkeypatch):
    """Loops, variables, quotes, empty words, functions and other shells; what it prints is no command."""
    monkeypatch.chdir(tmp_path)
    Path("a.py").touch()
    text = """
        f() { python a.py "$@"; }
        echo no command
        for i in 1 2; do python a.py --n $i; done
        f 'two words' "" "a
        line"
        (python a.py in a subshell) && bash -c 'python a.py in another'
    """
    Path("list.sh").write_text(text)
    ns = [("a.py", "--n", "1"), ("a.py", "--n", "2")]
    words = ("a.py", "two words", "", "a\n        line")
    expected = [*ns, words, ("a.py", "in", "a", "subshell"), ("a.py", "in", "another")]
    assert launch.commands_of("list.sh") == [(command, False) for command in expected]


def test_core_is_the_comment_behind_a_command(tmp_path, capsys, monkeypatch):
    """Of its line, or of the last one where it goes over several. One behind no command is said."""
    monkeypatch.chdir(tmp_path)
    Path("a.py").touch()
    Path("more").write_text("python a.py --sourced  # core\n")
    text = """
        # core
# Seeds: 2, and a word on them
        f() {
            python a.py "$@" # core
        }
        for i in 1 2; do # core
            python a.py --n $i  # core
            python a.py --no $i  # correct
            python a.py --not $i  # core, they say
        done
        # f --no comment # core
        python a.py --long \\
            --line "a # core b"\t# core
        f --function
        python a.py --pipe | cat  # core
        (python a.py --or || true) # core
        source ./more
        wait # core
        python a.py --both; echo a.py --xargs | xargs python # core
    """
    Path("list.sh").write_text(text)
    main(launch, monkeypatch, "list.sh", "--dry-run", "--core")
    lines = []
    core = [
        "--n 1",
        "--n 2",
        "--long --line 'a # core b'",
        "--function",
        "--pipe",
        "--or",
        "--sourced",
        "--both",
        "--xargs",
    ]
    for seed in (1, 2):
        for flags in core:
            lines.append(f"python a.py {flags} --seed {seed}")
    printed = capsys.readouterr()
    assert printed.out.splitlines() == lines
    behind = [text.splitlines().index(f"        {line} # core") + 1 for line in ("for i in 1 2; do", "wait")]
    said = [f"warning: {tmp_path}/list.sh:{n}: `# core` stands behind no command that calls python" for n in behind]
    assert printed.err.splitlines() == said
    main(launch, monkeypatch, "list.sh", "--dry-run", "--seeds", 1)
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 9 + 4 and not printed.err
    assert sorted(os.listdir()) == ["a.py", "list.sh", "more"]


def test_a_line_that_names_no_run_and_does_not_train_is_run_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("analyses").mkdir()
    Path("analyses", "a.py").touch()
    Path("a.py").touch()
    takes = "python analyses/a.py --out @/b.csv; python analyses/a.py @c/d --seed 5\n"
    Path("list.sh").write_text(f"python a.py --exp-name c --env-id d\n{takes}")
    main(launch, monkeypatch, "list.sh", "--dry-run", "--seeds", 2, "--only", "analyses")
    one = f"python analyses/a.py --out {tmp_path}/runs/analyses/1/b.csv"
    assert capsys.readouterr().out.splitlines() == [one, *["python analyses/a.py @c/d --seed 5"] * 2]


def test_a_seed_in_a_list_is_kept(tmp_path, capsys, monkeypatch):
    """--seed 1 is for those without one; --seeds would be for those with one too."""
    monkeypatch.chdir(tmp_path)
    Path("a.py").touch()
    Path("list.sh").write_text("for s in 3 2; do python a.py --seed $s; done; python a.py --seed=4; python a.py --x\n")
    main(launch, monkeypatch, "list.sh", "--dry-run")
    flags = ["--seed 3", "--seed 2", "--seed=4", "--x --seed 1"]
    assert capsys.readouterr().out.splitlines() == [f"python a.py {each}" for each in flags]
    main(launch, monkeypatch, "list.sh", "--dry-run", "--only=--x", "--seeds", 2)
    assert capsys.readouterr().out.splitlines() == ["python a.py --x --seed 1", "python a.py --x --seed 2"]
    for seeds in (1, 2):
        with pytest.raises(SystemExit, match=r"^2$"):
            main(launch, monkeypatch, "list.sh", "--dry-run", "--seeds", seeds)
        error = f"error: --seeds {seeds}: list.sh has a --seed of its own in a.py --seed 3\n"
        assert capsys.readouterr() == ("", error)


TRAINS = "from pathlib import Path\nPath('trained').touch()\n"


@pytest.mark.parametrize(
    "line",
    [
        "python a.py",
        "python3 a.py",
        "python3.11 a.py",
        "python3.12 a.py",
        "nohup python a.py",
        "nohup python3 a.py >/dev/null 2>&1 &",
        "(sleep 0.3; python3 a.py) >/dev/null 2>&1 &",
        "timeout 10 python a.py",
        "env python3 a.py",
        "exec python a.py",
        "exec -a name python a.py",
        "echo a.py | xargs python3",
        "bash -c 'python3 a.py'",
        "FLAGS=a.py; python $FLAGS",
        "python a.py # not .venv/bin/python",
    ],
)
def test_a_list_is_read_and_not_run(line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_text(TRAINS)
    Path("list.sh").write_text(line + "\n")
    main(launch, monkeypatch, "list.sh", "--dry-run")
    assert capsys.readouterr().out == "python a.py --seed 1\n"
    assert not Path("trained").exists()


BIN = str(Path(sys.executable).parent)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("X=1 python a.py", "changes X for a.py; set it for launch.py itself instead"),
        ("export X=1 Y=2; python a.py", "changes X Y for a.py; set it for "),
        ("env X=1 python a.py", "changes X for a.py; set it for "),
        ("declare -x X=$'two\nlines'; python a.py", "changes X for a.py; set it for "),
        ("unset HOME; python a.py", "changes HOME for a.py; set it for "),
        (f"export PATH={BIN}:$PATH; python a.py", "PATH: "),
        ("cd folder; python ../a.py", "goes to another folder; lists are run from the folder that holds algos/ and "),
        (f"{sys.executable} a.py", f"calls {sys.executable}, which launch.py cannot replace; write `python`"),
        (f"BIN={BIN}\nPYTHONPATH=. nohup $BIN/python3 a.py", "calls $BIN/python3, which "),
        ("bash other.sh || true; python a.py", "changes X for a.py; set it for "),
        ("uv run a.py || true", "calls uv, which "),
        ("srun python a.py", "calls srun, which "),
        ("python a.py --runs-dir x", "--runs-dir in a.py --runs-dir x; it belongs to launch.py, take it out of "),
        ("python a.py --runs_dir=x", "--runs-dir in a.py --runs_dir=x; it belongs to "),
        ("python a.py --resume x", "--resume in a.py --resume x; it belongs to "),
        ("python a.py --env-id x\r\n", r"has the line ends of Windows; sed -i 's/\r$//' list.sh changes them"),
        ("\ufeffpython a.py", r"starts with a byte order mark; sed -i '1s/^\xEF\xBB\xBF//' list.sh removes it"),
        (r"python a.py $'\xff'", r"b'\xff' is not UTF-8"),
    ],
)
def test_what_launch_py_would_lose_is_refused(text, error, tmp_path, capsys, monkeypatch):
    """In one line, and nothing is run, although a dry run reads the list with bash."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("a.py").write_text(TRAINS)
    Path("other.sh").write_text("export X=1\nnohup python a.py\n")
    Path("list.sh").write_bytes(f"{text}\n".encode())
    with pytest.raises(SystemExit, match=r"^2$"):
        main(launch, monkeypatch, "list.sh", "--dry-run")
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("error: list.sh: ") and error in said.err
    assert not Path("trained").exists()


@pytest.mark.parametrize(("path", "why"), [("folder", "Is a directory"), (300 * "x", "File name too long")])
def test_what_is_no_list_is_one_line(path, why, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(SystemExit, match=r"^2$"):
        main(launch, monkeypatch, path)
    assert capsys.readouterr() == ("", f"error: {path}: no such list ({why})\n")


def test_a_temporary_folder_where_no_program_runs_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("list.sh").write_text("python a.py\n")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit, match=r"^2$"):
        main(launch, monkeypatch, "list.sh")
    error = "lets no program run, so no list can be read; set TMPDIR to another folder\n"
    assert capsys.readouterr() == ("", f"error: {tempfile.gettempdir()} {error}")


@pytest.mark.parametrize(
    ("text", "flags", "error"),
    [
        (None, [], "list.sh: no such list"),
        ("python fake.py; false", [], "list.sh: bash ended with exit code 1"),
        ("python fake.py $missing", [], "missing: unbound variable"),
        ("for", [], "syntax error"),
        ("echo python fake.py", [], "list.sh: calls no python, so there is nothing to run"),
        ("python", [], "no script '' here"),
        ("python -u fake.py", [], "python -u: write `python SCRIPT` without options of Python's own"),
        ("python algos/nothing.py", [], "no script 'algos/nothing.py' here"),
        ("python fake.py", ["--only", "bigfish"], "--only bigfish: no command of "),
        ("python fake.py # core", ["--core", "--only", "bigfish"], "--only bigfish: no core command of "),
        ("# core\npython fake.py", ["--core"], "list.sh: no command ends in `# core`, so --core has nothing to run"),
        ("# seeds: many\npython fake.py", [], "list.sh: # seeds: many: write a number, at least 1"),
        ("# seeds: 0\npython fake.py", [], "list.sh: # seeds: 0: write a number, at least 1"),
        ("# seeds: 2-5\npython fake.py", [], "list.sh: # seeds: 2-5: write a number, at least 1"),
        ("python fake.py @a/b", [], "list.sh: @a/b: no line above has --exp-name a --env-id b and is run with seed 1"),
        ("python fake.py", ["--scale", "smoke"], "--scale smoke: how to make fake.py short is not known, only ada"),
        ("python fake.py", ["--seeds", "0"], "--seeds 0: at least 1"),
        ("python fake.py", ["--workers", "-1"], "--workers -1: at least 0"),
        ("python fake.py", ["--runs-dir", "fake.py"], "--runs-dir fake.py cannot be written: Not a directory"),
        ("python fake.py", ["--backend", "slurm"], "--backend slurm: there is no srun here"),
    ],
)
def test_a_mistake_is_one_line(text, flags, error, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fake.py").touch()
    Path("bin").mkdir()
    Path("bin", "bash").symlink_to(shutil.which("bash"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if text is not None:
        Path("list.sh").write_text(text + "\n")
    with pytest.raises(SystemExit, match=r"^2$"):
        main(launch, monkeypatch, "list.sh", *flags)
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("error: ") and error in said.err


# ---- What a run is ----
def test_a_run_is_known_by_its_command(tmp_path):
    """Wherever the script was called from and its folder lies; a folder without a checkpoint is none of its."""
    run = launch.Run(("algos/mdpo.py", "--env-id", "bigfish", "--seed", "1"), str(tmp_path))

    def folder(name, command, done=None):
        (tmp_path / name).mkdir()
        about = {"command": command, "args": {"total_timesteps": 100, "eval_every": 10}}
        (tmp_path / name / "args.json").write_text(json.dumps(about))
        if done is not None:
            step = 100 if done else 50
            torch.save({"step": step, "evaluated": step}, tmp_path / name / "checkpoint.pt")
        return tmp_path / name

    assert run.folder() is None and not run.finished()
    folder("dead", list(run.command))
    folder("other", ["algos/mdpo.py", "--env-id", "bigfish", "--seed", "2"], done=True)
    (folder("cut", list(run.command), done=False) / "args.json").write_text("{")
    assert run.folder() is None
    half = folder("half", ["/there/algos/mdpo.py", *run.command[1:], "--runs-dir", "elsewhere"], done=False)
    assert run.folder() == half and not run.finished()
    whole = folder("whole", list(run.command), done=True)
    os.utime(whole / "checkpoint.pt", (0, 0))  # finished comes before newer
    assert run.folder() == whole and run.finished()
    (whole / "checkpoint.pt").write_bytes(b"no checkpoint")
    os.utime(whole / "checkpoint.pt", (0, 0))
    assert run.folder() == half and not run.finished()


@pytest.mark.parametrize("flags", ["--distribution_mode easy", "--distribution-mode=easy", "--distribution_mode=easy"])
def test_a_run_is_known_however_its_flags_are_spelled(flags, tmp_path, monkeypatch):
    """As tyro reads them. A list that spells a run twice has it once."""
    monkeypatch.chdir(tmp_path)
    command = ["algos/mdpo.py", *flags.split(), "--no_cuda", "--seed", "1", "--runs_dir", "elsewhere"]
    Path("runs", "one").mkdir(parents=True)
    Path("runs", "one", "args.json").write_text(json.dumps({"command": command}))
    Path("runs", "one", "checkpoint.pt").touch()
    Path("mdpo.py").touch()
    lines = [f"python mdpo.py {spelled} --no-cuda\n" for spelled in (flags, "--distribution-mode easy")]
    for text in (lines[0], lines[1], "".join(lines)):
        Path("list.sh").write_text(text)
        (run,) = launch.runs_of(launch.Args(lists=("list.sh",)))
        assert run.folder() == tmp_path / "runs" / "one"
    assert launch.identity(["mdpo.py", "--exp-name", "a_b"]) != launch.identity(["mdpo.py", "--exp-name", "a-b"])


# A program in a folder `analyses` takes finished runs. This one notes what it is given, and may fail.
TAKES = """
import sys
from pathlib import Path

with open(Path(__file__).parent.parent / "taken", "a") as file:
    print(*sys.argv[1:], file=file)
for word in sys.argv[1:]:
    folder = word.partition("=")[2] or word
    assert not word.endswith("x.csv") or Path(folder).parent.is_dir()
sys.exit("--fail" in sys.argv and Path(__file__).parent.parent.joinpath("broken").exists())
"""


def test_a_line_waits_for_the_runs_that_it_names(fake, tmp_path):
    """Of the same seed, whether they are made now or were before; what has ended well is not done again."""
    path = fake("--env-id Ms_Pacman --exp-name a", "--env-id MsPacman --exp-name b --steps 40")
    (tmp_path / "analyses").mkdir()
    (tmp_path / "analyses" / "takes.py").write_text(TAKES)
    (tmp_path / "broken").touch()
    takes = f"python {tmp_path}/analyses/takes.py"
    lines = [f"{takes} X=@a/mspacman @b/MsPacman @/x.csv", f"{takes} @a/MsPacman --fail"]
    lines.append(f"python {tmp_path}/fake.py --env-id c --exp-name frozen --encoder @b/MsPacman")
    text = path.read_text()
    path.write_text(text + "\n".join(lines) + "\n")
    (tmp_path / "fake.py").write_text(FAKE.replace('"--runs-dir"', '"--encoder", "--runs-dir"'))
    code, output = sweep(path, "--seeds", 2, "--workers", 2)
    assert (
        code == 1 and output.startswith("10 to run, 0 done") and "8/10 done, 0 under way, 0 waiting, 2 failed" in output
    )
    runs = {folder.name.rsplit("__", 1)[0]: folder for folder in folders(path)}
    assert len(runs) == 6
    taken = (tmp_path / "taken").read_text().splitlines()
    for seed in "12":
        a, b = runs[f"Ms_Pacman__a__{seed}"], runs[f"MsPacman__b__{seed}"]
        assert f"X={a} {b} {tmp_path}/runs/analyses/{seed}/x.csv" in taken and f"{a} --fail" in taken
        command = json.loads((runs[f"c__frozen__{seed}"] / "args.json").read_text())["command"]
        assert command[command.index("--encoder") + 1] == str(b)
    (tmp_path / "broken").unlink()
    code, output = sweep(path, "--seeds", 2)
    assert code == 0 and output.startswith("2 to run, 8 done") and "10/10 done" in output
    assert len((tmp_path / "taken").read_text().splitlines()) == 4 + 2
    code, output = sweep(path, "--seeds", 2)
    assert code == 0 and output.startswith("0 to run, 10 done")


def test_a_script_that_changed_since_its_run_is_said(fake, tmp_path):
    """A finished run is not done again, but its numbers are of the text before."""
    path = fake("--env-id a")
    assert sweep(path)[0] == 0
    (folder,) = folders(path)
    shutil.copy(tmp_path / "fake.py", folder)
    assert "warning" not in sweep(path)[1]
    (tmp_path / "fake.py").write_text(FAKE + "# mended\n")
    code, output = sweep(path)
    assert code == 0 and "0 to run, 1 done" in output
    assert f"warning: {tmp_path}/fake.py has changed since 1 of its finished runs" in output


def test_a_line_whose_run_has_failed_fails(fake, tmp_path):
    """The others are made all the same."""
    path = fake("--env-id a", "--env-id b --exp-name broken", "--env-id c --exp-name d --resume-from @broken/b")
    code, output = sweep(path)
    assert code == 1 and "1/3 done, 0 under way, 0 waiting, 2 failed" in output
    assert "waits for a finished run: @broken/b" in output


@pytest.mark.slow
def test_a_core_line_may_take_a_run_that_is_not_core(fake, tmp_path):
    """If that one is finished. It is not made for it, which is said before anything is run."""
    path = fake("--env-id a --exp-name a", "--env-id b --encoder @a/a  # core")
    (tmp_path / "fake.py").write_text(FAKE.replace('"--runs-dir"', '"--encoder", "--runs-dir"'))
    code, output = sweep(path, "--core")
    assert code == 2 and "needs @a/a, whose line --core or --only leaves out" in output and not folders(path)
    assert sweep(path, "--only", "exp-name a")[0] == 0
    code, output = sweep(path, "--core")
    assert code == 0 and "1/1 done" in output


@pytest.mark.slow
def test_a_line_takes_the_run_of_a_line(fake, tmp_path):
    """And not another one of that name. What was made from a run is known when the folders have moved."""
    path = fake("--env-id a --exp-name a --steps 3", "--env-id b --exp-name b --encoder @a/a")
    (tmp_path / "fake.py").write_text(FAKE.replace('"--runs-dir"', '"--encoder", "--runs-dir"'))
    assert sweep(path)[0] == 0
    first = {folder.name for folder in folders(path)}
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    moved = ("--runs-dir", tmp_path / "moved")
    code, output = sweep(path, *moved)
    assert code == 0 and output.startswith("0 to run, 2 done")
    path.write_text(path.read_text().replace("--steps 3", "--steps 4"))
    code, output = sweep(path, *moved)
    assert code == 0 and output.startswith("2 to run, 0 done")
    taken = []
    for folder in (tmp_path / "moved").glob("*__b__*"):
        command = json.loads((folder / "args.json").read_text())["command"]
        taken.append(Path(command[command.index("--encoder") + 1]).name in first)
    assert sorted(taken) == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGKILL"])
def test_a_sweep_of_dependent_lines_goes_on(fake, tmp_path, signal_name):
    path = fake("--env-id a --exp-name a --steps 60", "--env-id b --exp-name b --steps 3 --encoder @a/a")
    (tmp_path / "fake.py").write_text(FAKE.replace('"--runs-dir"', '"--encoder", "--runs-dir"'))
    process = start(path)
    wait_until(all_began(path, 1))
    process.send_signal(getattr(signal, signal_name))
    process.communicate(timeout=60)
    assert len(folders(path)) == 1
    code, output = sweep(path)
    assert code == 0 and "2/2 done" in output
    assert sorted(map(len, map(steps_in, folders(path)))) == [3, 60]


@pytest.mark.parametrize("letter", ["x", "é", "漢"])
def test_a_log_has_a_name_that_a_file_may_have(letter, tmp_path):
    run, other = (launch.Run(("a.py", "--exp-name", count * letter), str(tmp_path)) for count in (300, 301))
    assert len(os.fsencode(run.log.with_suffix(".slurm").name)) <= 255 and run.log != other.log


@pytest.mark.parametrize(
    ("args", "state", "done"),
    [
        ({"total_timesteps": 100, "eval_every": 10}, {"step": 100, "evaluated": 100}, True),
        ({"total_timesteps": 90, "eval_every": 10}, {"step": 100, "evaluated": 100}, True),  # whole rollouts
        ({"total_timesteps": 100, "eval_every": 10}, {"step": 100, "evaluated": 90}, False),
        ({"total_timesteps": 100, "eval_every": 0}, {"step": 100, "evaluated": 0}, True),
        ({"total_timesteps": 200, "eval_every": 10}, {"step": 100, "evaluated": 100}, False),  # raised at a resume
        ({"total_timesteps": 100, "eval_every": 10}, {"done": True}, False),  # of another version
    ],
)
def test_a_run_is_finished_with_its_steps_and_its_last_evaluation(args, state, done, tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"command": ["a.py"], "args": args}))
    torch.save(state, tmp_path / "checkpoint.pt")
    assert launch.finished(tmp_path) == done


def test_workers_share_gpus_and_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    probes, probe = [], launch.renders
    monkeypatch.setattr(launch, "renders", lambda gpu: gpu != "7" and gpu.isdigit())  # a container without the last

    def environments(gpus=None, **flags):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if gpus is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        return [tuple(slot.values()) for slot in launch.Local(launch.Args(lists=(), **flags), []).free]

    assert environments() == [("6", "0", "0"), ("6", "1", "1")]  # cores, and where it computes and renders
    assert environments("4,7", runs_per_gpu=2) == [("3", "4", "4"), ("3", "7"), ("3", "4", "4"), ("3", "7")]
    assert environments(workers=3) == [("4", "0", "0"), ("4", "1", "1"), ("4", "0", "0")]
    assert environments("GPU-8a2f,GPU-95ed") == [("6", "GPU-8a2f"), ("6", "GPU-95ed")]  # EGL knows numbers alone
    monkeypatch.setattr(
        launch.subprocess, "run", lambda command, env, **_: probes.append(env) or SimpleNamespace(returncode=0)
    )
    assert probe("5") and not probe("GPU-8a2f") and probes[0]["MUJOCO_EGL_DEVICE_ID"] == "5"
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "3")
    assert not probe("6") and len(probes) == 1  # the user's choice
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert environments("") == [("12",)]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environments(workers=2) == [("5",), ("5",)]


# ---- Sweeps on this machine ----
HOW = ["ctrl-c", "kill", "kill -9", "kill -9 of all"]


def test_a_sweep_ends_and_a_second_start_does_nothing(fake):
    path = fake("--env-id a --exp-name one", "--env-id b --exp-name one")
    code, output = sweep(path, "--seeds", "2", "--workers", "2")
    assert code == 0 and output.startswith("4 to run, 0 done\n") and "4/4 done, 0 under way, 0 waiting" in output
    assert [steps_in(folder) for folder in folders(path)] == 4 * [[0, 1]]
    before = logs(path)
    assert sweep(path, "--seeds", "2", "--workers", "2") == (
        0,
        "0 to run, 4 done\n4/4 done, 0 under way, 0 waiting, 0 failed\n",
    )
    assert logs(path) == before and len(folders(path)) == 4


@pytest.mark.slow
def test_on_a_terminal_the_sweep_is_one_bar(fake):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    process = start(fake("--env-id a", "--env-id b"), stderr=theirs)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # the terminal's end
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.communicate(timeout=60)[0] == "2 to run, 0 done\n" and process.returncode == 0
    assert b"| 2/2 [" in shown and b"0 under way, 0 waiting, 0 failed" in shown and b"\n" not in shown.rstrip()


@pytest.mark.slow
def test_a_run_that_fails_is_listed_with_the_end_of_its_log(fake):
    path = fake("--env-id a --exp-name broken", "--env-id b")
    for to_run, done in ((2, 0), (1, 1)):  # it is tried again
        code, output = sweep(path)
        assert code == 1 and f"{to_run} to run, {done} done" in output
        _, _, failures = output.partition("failed: ")
        assert failures.startswith(f"python {path.parent}/fake.py --env-id a --exp-name broken --seed 1")
        assert "  a line before\n  error: this one breaks\n" in failures and failures.count("failed: ") == 0
        assert failures.endswith("error: 1 of 2 runs failed; the same command tries them again\n")
    assert [steps_in(folder) for folder in folders(path)] == [[0, 1]]


@pytest.mark.parametrize("how", [pytest.param(how, marks=pytest.mark.slow) for how in HOW[1:]] + HOW[:1])
def test_what_is_interrupted_goes_on(how, fake):
    """A terminal's Ctrl-C reaches the launcher's group; the runs are not in it, and save whoever dies."""
    path = fake("--env-id a --steps 60", "--env-id b --steps 60", "--env-id c --steps 60")
    process = start(path, "--workers", "2")
    wait_until(all_began(path, 2))
    if how == "kill -9 of all":
        for folder in folders(path):
            os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
    number = {"ctrl-c": signal.SIGINT, "kill": signal.SIGTERM}.get(how, signal.SIGKILL)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    half = folders(path)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number
        assert output.endswith(f"stopped by {number.name}; the same command goes on\n") and "failed: " not in output
    assert len(half) == 2 and all(len(steps_in(folder)) < 60 for folder in half)
    code, output = sweep(path, "--workers", "2")
    assert code == 0 and output.startswith("3 to run, 0 done\n") and len(folders(path)) == 3
    assert set(half) < set(folders(path)) and all(f"--resume {folder}" in logs(path) for folder in half)
    assert logs(path).count("stopped by SIGTERM") == (0 if how == "kill -9 of all" else 2)
    for folder in folders(path):
        assert steps_in(folder) == list(range(60))


@pytest.mark.slow
def test_two_sweeps_share_their_runs(fake):
    path = fake(*(f"--env-id {name} --steps 20" for name in "abcd"))
    both = [start(path), start(path)]
    assert [process.communicate(timeout=120) and process.returncode for process in both] == [0, 0]
    assert len(folders(path)) == 4 and all(steps_in(folder) == list(range(20)) for folder in folders(path))
    assert logs(path).count("$ python") == 4


@pytest.mark.slow
def test_a_smoke_run_of_mdpo(tmp_path):
    shutil.copy(ROOT / "benchmark" / "lists" / "mdpo.sh", tmp_path)
    flags = ["--only", "bigfish --exp-name ppo ", "--seeds", "1", "--scale", "smoke"]
    assert sweep(tmp_path / "mdpo.sh", *flags)[0] == 0
    (folder,) = folders(tmp_path / "mdpo.sh")
    assert folder.name.startswith("bigfish__ppo__1__") and launch.finished(folder)
    assert sweep(tmp_path / "mdpo.sh", *flags)[1].startswith("0 to run, 1 done\n")


# ---- Sweeps on a Slurm of one node ----
CONFIG = """
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SlurmdParameters=config_overrides
KillWait=10
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1
NodeName=localhost CPUs=2 State=UNKNOWN
PartitionName=test Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def slurm_answers(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout.split()


@pytest.fixture(scope="module")
def slurm():
    """A Slurm of its own on this machine, which the environment variable SLURM_CONF leads to."""
    daemons = {
        name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("munged", "slurmctld", "slurmd")
    }
    if missing := [name for name, path in daemons.items() if path is None]:
        pytest.skip(f"no {' '.join(missing)} here: apt-get install slurm-wlm munge")
    if os.getuid() != 0:
        pytest.skip("only root can start Slurm's daemons")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short, as a socket's path has to be
    sockets = [socket.create_server(("localhost", 0)) for _ in range(2)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, ports=ports))
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    munge = [f"--{name}={folder / file}" for name, file in (("key-file", "key"), ("socket", "munge.socket"))]
    munge += [f"--{name}-file={folder / name}" for name in ("pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D", "-N", "localhost"],
    ]
    patch = pytest.MonkeyPatch()
    patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    log, processes = open(folder / "output", "w"), []
    try:
        for name, *flags in commands:
            processes.append(subprocess.Popen([daemons[name], *flags], stdout=log, stderr=log))
            time.sleep(1)
        wait_until(lambda: slurm_answers("sinfo", "--noheader", "--format=%t") == ["idle"], 60)
        yield
        subprocess.run(["scancel", "--user=root"])
        wait_until(lambda: not slurm_answers("squeue", "--noheader"), 60)
    except AssertionError:
        print((folder / "output").read_text())
        raise
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait()
        log.close()
        patch.undo()
        shutil.rmtree(folder)


ON_SLURM = ["--backend", "slurm", "--gpus-per-run", "0", "--cpus-per-run", "1"]


def job_of(path, folder):
    """Slurm's number of the job that runs into a folder."""
    command = json.loads((folder / "args.json").read_text())["command"]
    run = launch.Run(tuple(command[: command.index("--runs-dir")]), str(path.parent / "runs"))
    return slurm_answers("squeue", "--noheader", f"--name={run.name}", "--format=%A")[0]


@pytest.mark.slow
def test_on_slurm_a_sweep_ends_although_jobs_are_queued_again(slurm, fake):
    """One by an administrator or a preemption, one because it was warned of its time limit; a third one fails."""
    path = fake("--env-id a --steps 100", "--env-id b --steps 100", "--env-id c --exp-name broken")
    smoke = f"python algos/mdpo.py --env-id bigfish --num-agents 1 {launch.SMOKE['mdpo']}\n"
    path.write_text(path.read_text() + smoke)
    process = start(path, *ON_SLURM)
    wait_until(all_began(path, 2))
    one, two = folders(path)[:2]
    subprocess.run(["scontrol", "requeue", job_of(path, one)], check=True)
    subprocess.run(["scancel", "--signal=USR2", job_of(path, two)], check=True)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "3/4 done, 0 under way, 0 waiting, 1 failed" in output
    assert "  error: this one breaks\n" in output and "error: 1 of 4 runs failed" in output
    for folder, number in ((one, "SIGTERM"), (two, "SIGUSR1")):
        assert steps_in(folder) == list(range(100)) and f"--resume {folder}" in logs(path)
        assert f"stopped by {number}\n" in logs(path)
    assert len(folders(path)) == 3
    before = logs(path)
    code, output = sweep(path, *ON_SLURM, "--only", "steps 100")
    assert code == 0 and output.startswith("0 to run, 2 done\n") and logs(path) == before


@pytest.mark.slow
def test_on_slurm_jobs_outlive_the_launcher_and_ctrl_c_saves_them(slurm, fake):
    path = fake("--env-id a --steps 400", "--env-id b --steps 400", "--env-id c --steps 400")
    first = start(path, *ON_SLURM)
    wait_until(all_began(path, 2))
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    jobs = slurm_answers("squeue", "--noheader", "--format=%A")
    assert len(jobs) == 3
    second = start(path, *ON_SLURM)
    assert second.stdout.readline() == "3 to run, 0 done\n" and "3 under way" in second.stdout.readline()
    assert slurm_answers("squeue", "--noheader", "--format=%A") == jobs  # found, not submitted again
    second.send_signal(signal.SIGINT)
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 130 and output.endswith("stopped by SIGINT; the same command goes on\n")
    assert not slurm_answers("squeue", "--noheader") and logs(path).count("stopped by SIGTERM") == 2
    assert all(3 < len(steps_in(folder)) < 400 for folder in folders(path)) and len(folders(path)) == 2
    code, output = sweep(path, *ON_SLURM, "--partition", "nowhere")
    assert code == 2 and "error: --backend slurm: sbatch: error: " in output and "Traceback" not in output


@pytest.mark.slow
def test_on_slurm_a_sweep_may_start_inside_a_job(slurm, fake, monkeypatch):
    """What Slurm tells that job of its memory and tasks is not for the sweep's; where Slurm is, is."""
    names = ("SLURM_MEM_PER_CPU", "SLURM_MEM_PER_NODE", "SLURM_NTASKS", "SLURM_JOB_ID", "SQUEUE_STATES")
    for name, value in zip(names, ("100", "100", "2", "1", "COMPLETED"), strict=True):
        monkeypatch.setenv(name, value)
    path = fake("--env-id a", "--env-id b")
    code, output = sweep(path, *ON_SLURM)
    assert code == 0 and "2/2 done, 0 under way, 0 waiting, 0 failed" in output
    assert [steps_in(folder) for folder in folders(path)] == 2 * [[0, 1]]
    before = dict(os.environ)
    with launch.outside_slurm():
        assert set(names) <= set(before) - set(os.environ) and "SLURM_CONF" in os.environ
    assert dict(os.environ) == before
