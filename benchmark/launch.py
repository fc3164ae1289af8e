"""Runs a list of runs, on this machine or on Slurm, until all of them are finished.

A list is a bash file of commands, like benchmark/lists/mdpo.sh. Bash reads it, with `python` replaced by a program
that writes down what it is given. What it cannot write down, like a Python called by its path, is refused, and so is
what launch.py would lose, like a variable that a list exports. Finished runs are skipped, the others continue where
they stopped. A run is known by the command in its folder's args.json, and is finished when all its steps and its last
evaluation are done. Ctrl-C, `kill` and `kill -9` lose nothing: start the same command again. Two sweeps on one
--runs-dir share their runs.

Two comments of a list count: `# core` behind a command, for --core, and a line `# seeds: 3`, which --seeds defaults to.

A command may name the run of another line: @NAME/TASK is the folder of the finished run with that --exp-name and
--env-id and the same seed, and @/FILE is FILE in analyses/<seed> of --runs-dir. It waits until those runs are finished.

    python benchmark/launch.py benchmark/lists/mdpo.sh --core --only bigfish                    # this machine
    python benchmark/launch.py benchmark/lists/*.sh --scale smoke --dry-run                     # what would be run
    python benchmark/launch.py benchmark/lists/mdpo.sh --backend slurm --partition gpu --time-minutes 1440
"""

import ctypes
import fcntl
import glob
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

import cloudpickle
import common
import submitit
import tyro
from common import fail
from tqdm import tqdm


@dataclass
class Args:
    lists: tyro.conf.Positional[tuple[str, ...]]  # bash files of commands, like benchmark/lists/mdpo.sh
    only: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # text that a command must contain; several: all of them
    core: bool = False  # only the commands that end in the comment `# core`: a paper's main question, and no more
    seeds: int | None = None  # each command is run with --seed 1 to this (None: the list's line `# seeds: 3`, or 1)
    scale: Literal["paper", "smoke"] = "paper"  # smoke: so short that a run ends in seconds, to see that it does
    backend: Literal["local", "slurm"] = "local"  # this machine, or one job per run
    runs_dir: str = "runs"  # where run folders are made; logs are in .launch there
    dry_run: bool = False  # print the commands, one per line, and start none; what else a list does, bash does
    workers: int = 0  # local: runs at a time, which share the cores (0: as many as the GPUs hold, or one)
    runs_per_gpu: int = 1  # local: runs at a time on each GPU, of those in CUDA_VISIBLE_DEVICES if it is set
    partition: str = ""  # slurm: partition (empty: the cluster's default)
    account: str = ""  # slurm: account that is charged (empty: the user's default)
    time_minutes: int = 24 * 60  # slurm: time limit of a job, in minutes; what is not finished then is queued again
    gpus_per_run: int = 1  # slurm: GPUs per job
    cpus_per_run: int = 8  # slurm: cores per job
    memory_gb: int = 0  # slurm: memory per job, in GB (0: the cluster's default)


# What makes each script's runs end in seconds on a CPU and leaves the method as it is.
SMOKE = {
    "mdpo": "--total-timesteps 64 --num-envs 4 --num-steps 8 --num-minibatches 2 --update-epochs 1 --eval-every 1000"
    " --eval-episodes 2 --final-eval-episodes 2",
    "drq_sam_reset": "--total-timesteps 60 --learning-starts 50 --batch-size 4 --eval-every 1000"
    " --final-eval-episodes 1 --eval-epsilon 0.5",
    "sac_sam_reset": "--total-timesteps 50 --action-repeat 50 --learning-starts 45 --batch-size 4 --buffer-size 60"
    " --eval-every 1000 --final-eval-episodes 1",
    "drqv2_pieg": "--total-timesteps 30 --action-repeat 50 --learning-starts 25 --batch-size 4 --buffer-size 60"
    " --feature-dim 8 --hidden-dim 16 --projection-dim 32 --encoder-weights random --overlay-dir textures"
    " --overlay-pictures 8 --eval-every 1000 --final-eval-episodes 1",
}
SMOKE["ppo_netrand"] = SMOKE["mdpo"] + " --mc-samples 1"
SMOKE |= {  # of programs that take finished runs
    "evaluate": "--eval-episodes 2",
    "mc_samples": "--samples 1 --repeats 2 --episodes 2",
    "test": "--episodes 1",
    "robustness": "--episodes 1 --steps 4 --draws 2",
    "tsne": "--versions 12 --perplexity 4 --step 3",
    "looks": "--episodes 1 --steps 4 --moments 2",
    "feature_maps": "--steps 2",
    "sharpness": "--batch-size 4 --active-size 8 --iterations 2",
    "adaptation": "--scale short --data synthetic --changes 1 --updates 2 --final-updates 0 --seeds 1",
}
# Of suites of robot arms, whose episodes are shorter and whose resets take seconds.
SMOKE_ARMS = " --action-repeat 10 --eval-every 0"


# ---- From lists to runs ----
NAMED = re.compile(r"(?:^|(?<==))@([^/@]*)/([^@]+)$")  # @NAME/TASK, METHOD=@NAME/TASK, @/FILE
RUN_FOLDER = re.compile(r"[^=]*/(?=[^/]*__[^/]*__[^/]*__[\d-]+/?$)")  # what stands before a run folder's name
# Bash finds this program under the names below before any other. It prints its name, the file and line of the call, the
# number of its words, the words and the exported variables, each ended by a NUL.
SHIM = r"""#!/bin/sh
{ printf '%s\0' "${0##*/}" "$LAUNCH_FILE" "$LAUNCH_LINE" "$#" "$@"; export -p; printf '\0'; } >&3
"""
PYTHONS = ("python", "python3", "python3.11", "python3.12")
REFUSED = ("uv", "srun", "sbatch", "ssh", "sudo")  # start a Python that is none of these
CORE = re.compile(r"\S\s+# core\s*$")  # the end of a line
# The variables before the list come first. What the list itself prints goes to stderr. The trap is called before each
# command, in functions and subshells too (-T).
EXPAND = r"""
set -euo pipefail
readonly PATH
/bin/sh -c 'export -p'
printf '\0'
exec 3>&1 1>&2
set -T
trap 'export LAUNCH_FILE="${BASH_SOURCE[0]-}" LAUNCH_LINE=$LINENO' DEBUG
source "$1"
"""


@dataclass(frozen=True)
class Run:
    """command: the script and its flags, without --runs-dir. It trains, or takes finished runs."""

    command: tuple[str, ...]
    runs_dir: str
    seed: str = "1"  # of the runs that it names
    needs: dict = field(default_factory=dict, compare=False)  # {word: the Run that it names}

    @property
    def name(self):
        """Of its log and its Slurm job: the command, shortened, and a hash of all that makes the run."""
        words = re.sub(r"[^\w.]+", "-", " ".join([Path(self.command[0]).stem, *self.command[1:]]), flags=re.ASCII)
        needs = [identity(run.command) for run in self.needs.values()]
        whole = repr((identity(self.command), self.home, needs, *([] if self.trains else [self.seed])))
        return f"{words[:100]}-{hashlib.sha1(whole.encode()).hexdigest()[:10]}"

    @property
    def home(self):
        return str(Path(self.runs_dir).resolve())

    @property
    def log(self):
        return Path(self.home, ".launch", f"{self.name}.log")

    @property
    def done(self):
        """The file that says that a command which does not train has ended well."""
        return self.log.with_suffix(".done")

    @property
    def trains(self):
        return Path(self.command[0]).parent.name != "analyses" and self.command[1:2] != ("test",)

    def words(self):
        """The command line, without the interpreter."""
        command = self.resolved() or list(self.command)
        if self.runs_dir == "runs" or not self.trains:
            return command
        return [*command, "--runs-dir", self.runs_dir]

    def resolved(self):
        """The command with folders in place of the runs that it names; None while one of them is not finished."""
        words = []
        for word in self.command:
            named = NAMED.search(word)
            if named:
                folder = Path(self.home, "analyses", self.seed, named[2])
                if named[1]:
                    folder = self.needs[word].folder()
                    if folder is None or not finished(folder):
                        return None
                word = word[: named.start()] + str(folder)
            words.append(word)
        return words

    def unmet(self):
        """The first word that names a run which is not finished."""
        for word in self.command:
            if not replace(self, command=(word,)).resolved():
                return word

    def folder(self):
        """Its folder with a checkpoint, a finished one if there is one, else the one that was saved last, or None."""
        name = common.value_of(self.command, "--exp-name")
        called = f"*__{glob.escape(name)}__{self.seed}__*" if name else "*"  # among thousands, only these are read
        folders = folders_in(self.home, called).get(identity(self.resolved() or self.command), [])
        return max(folders, key=lambda folder: (finished(folder), saved_at(folder)), default=None)

    def finished(self):
        if not self.trains:
            return self.done.exists()
        folder = self.folder()
        return folder is not None and finished(folder)


def identity(command):
    """What makes two commands the same run, whichever way the script was called and wherever run folders lie."""
    program, *words = common.without_runs_dir(common.spelled(command))
    return Path(program).name, *(RUN_FOLDER.sub("", word) for word in words)


def folders_in(runs_dir, called="*"):
    """{identity: [folder]} of the runs that have a checkpoint. A run that was killed before its first starts again."""
    folders = {}
    for checkpoint in Path(runs_dir).glob(f"{called}/checkpoint.pt"):
        with suppress(OSError, ValueError, KeyError):
            command = json.loads((checkpoint.parent / "args.json").read_text())["command"]
            folders.setdefault(identity(command), []).append(checkpoint.parent)
    return folders


def finished(folder):
    """Whether a run has done all its steps and its last evaluation. One that cannot be read is not finished."""
    import torch  # slow, and not needed for a dry run

    try:  # mapped, so that the weights are not read
        state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        args = json.loads((folder / "args.json").read_text())["args"]
        evaluated = args["eval_every"] == 0 or state["evaluated"] >= state["step"]
        return evaluated and state["step"] >= args["total_timesteps"]
    except Exception:
        return False


def same_script(run, folder):
    """Whether a run's folder has the text that its script has now. Of a program that trains another file: True."""
    script = Path(run.command[0])
    copy = folder / script.name
    return not copy.exists() or copy.read_bytes() == script.read_bytes()


def saved_at(folder):
    return (folder / "checkpoint.pt").stat().st_mtime


def runs_of(args):
    """The runs of all lists, each once, list by list and seed by seed. A seed in a list is kept."""
    runs = {}
    for path in args.lists:
        commands, above = commands_of(path, args.core), {}  # above: {(name, task, seed): run of a line}
        for seed in range(1, (args.seeds or seeds_in(path) or 1) + 1):
            for command, core in commands:
                run = run_of(command, seed, args)
                needs = needs_of(run, above, path)
                run = replace(run, needs=needs)
                if not run.trains and not needs:
                    run = replace(run, seed="1")  # the same whatever the seed, so it is made once
                name, task = common.value_of(command, "--exp-name"), common.value_of(command, "--env-id")
                if run.trains and name and task:
                    above[name, common.plain(task), run.seed] = run
                text = shlex.join(command) + " "
                if all(part in text for part in args.only) and (core or not args.core):
                    if args.seeds and run.trains and common.value_of(command, "--seed"):
                        fail(f"--seeds {args.seeds}: {path} has a --seed of its own in {text.strip()}")
                    runs.setdefault((identity(run.command), run.seed), run)
    if not runs:
        which = "core command" if args.core else "command"
        fail(f"--only {shlex.join(args.only)}: no {which} of {' '.join(args.lists)} contains all of it")
    return list(runs.values())


def run_of(command, seed, args):
    """A command of a list with the flags that --scale and a seed add."""
    words = command
    if args.scale == "smoke":
        words += tuple(smoke_flags(command))
    run = Run(words, args.runs_dir, str(seed))
    if not run.trains:
        return run
    own = common.value_of(command, "--seed")
    return replace(run, seed=own) if own else replace(run, command=(*words, "--seed", str(seed)))


def needs_of(run, above, path):
    """{word: the run that it names}, of the lines above it."""
    needs = {}
    for word in run.command:
        named = NAMED.search(word)
        if named and named[1]:
            needed = above.get((named[1], common.plain(named[2]), run.seed))
            if needed is None:
                what = f"--exp-name {named[1]} --env-id {named[2]}"
                fail(f"{path}: {word}: no line above has {what} and is run with seed {run.seed}")
            needs[word] = needed
    return needs


def seeds_in(path):
    """The number in a list's line `# seeds: 3`, or None."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    line = re.search(r"^#[ \t]*seeds:[ \t]*(.*)", text, re.MULTILINE | re.IGNORECASE)
    if line is None:
        return None
    number = re.match(r"[1-9]\d*(?![\w.-])", line[1])
    if number is None:
        fail(f"{path}: {line[0].strip()}: write a number, at least 1")
    return int(number[0])


def commands_of(path, core=False):
    """[(command, whether it is marked as core)] of a list. A command is a tuple of words: script, flags."""
    check_text(path)
    calls = calls_of(path)
    if not calls:
        fail(f"{path}: calls no python, so there is nothing to run")
    commands, marks = [], set()
    for command, changed, file, number in calls:
        script = command[0] if command else ""
        if script.startswith("-"):
            fail(f"{path}: python {script}: write `python SCRIPT` without options of Python's own")
        if "PWD" in changed:
            fail(f"{path}: goes to another folder; lists are run from the folder that holds algos/ and benchmark/")
        if changed:
            fail(f"{path}: changes {' '.join(changed)} for {script}; set it for launch.py itself instead")
        if not Path(script).is_file():
            fail(f"{path}: no script {script!r} here; lists are run from the folder that holds algos/ and benchmark/")
        for flag in ("--runs-dir", "--resume"):
            if flag in common.spelled(command):
                fail(f"{path}: {flag} in {shlex.join(command)}; it belongs to launch.py, take it out of the list")
        mark = mark_of(file, number)
        commands.append((command, mark is not None))
        marks.add((file, mark))
    if core:
        check_marks(path, marks)
    return commands


def mark_of(file, number):
    """The number of the line with the comment `# core` behind the command that begins in a line, or None."""
    for text in lines_of(file)[number - 1 :]:
        if CORE.search(text):
            return number
        if not text.endswith("\\"):  # the command ends here
            return None
        number += 1


@cache
def lines_of(path):
    return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()


def check_marks(path, marks):
    """marks: (file, line) of those that stand behind commands. Others are said, and a list without any is refused."""
    if not any(number for _, number in marks):
        fail(f"{path}: no command ends in `# core`, so --core has nothing to run")
    for file in {file for file, _ in marks}:
        for number, text in enumerate(lines_of(file), 1):
            if CORE.search(text) and text.lstrip()[0] != "#" and (file, number) not in marks:
                print(f"warning: {file}:{number}: `# core` stands behind no command that calls python", file=sys.stderr)


def check_text(path):
    """What is wrong with a list before bash reads it."""
    try:
        text = Path(path).read_bytes().decode(errors="replace")
    except OSError as error:
        fail(f"{path}: no such list ({error.strerror})")
    if text.startswith("\ufeff"):
        fail(f"{path}: starts with a byte order mark; sed -i '1s/^\\xEF\\xBB\\xBF//' {path} removes it")
    if "\r\n" in text:
        fail(f"{path}: has the line ends of Windows; sed -i 's/\\r$//' {path} changes them")
    code = re.sub(r"(^|\s)#.*", "", text, flags=re.MULTILINE)
    if found := re.search(r"\S*/python[\d.]*(?![\w/.-])", code):
        fail(f"{path}: calls {found[0]}, which launch.py cannot replace; write `python`")


def calls_of(path):
    """The calls of python in a list: words, names of the variables that the list changes for them, file, line."""
    with tempfile.TemporaryDirectory() as folder:
        for name in PYTHONS + REFUSED:
            shim = Path(folder, name)
            shim.write_text(SHIM, encoding="utf-8")
            shim.chmod(0o755)
        if not os.access(shim, os.X_OK):  # mounted so that no program runs there
            fail(f"{tempfile.gettempdir()} lets no program run, so no list can be read; set TMPDIR to another folder")
        environment = os.environ | {"PATH": f"{folder}:{os.environ.get('PATH', os.defpath)}"}
        command = ["bash", "-c", EXPAND, path, os.path.abspath(path)]
        done = subprocess.run(command, capture_output=True, env=environment)
    if done.returncode:
        *_, said = ["", *done.stderr.decode(errors="replace").strip().splitlines()]
        fail(f"{path}: bash ended with exit code {done.returncode}: {said}")
    before, *fields = done.stdout.split(b"\0")[:-1]
    calls = []
    while fields:
        program, file, number, count, *fields = fields
        if program.decode() not in PYTHONS:
            fail(f"{path}: calls {program.decode()}, which launch.py cannot replace; write `python`")
        words, after, fields = fields[: int(count)], fields[int(count)], fields[int(count) + 1 :]
        try:
            command = tuple(word.decode() for word in words)
        except UnicodeDecodeError as error:
            fail(f"{path}: {error.object!r} is not UTF-8")
        calls.append((command, names_that_differ(before, after), file.decode(), int(number)))
    return calls


def names_that_differ(before, after):
    """Of the variables in two outputs of `export -p`, but for those that shells and programs count for themselves."""
    names = set()
    if before != after:
        one, other = (set(re.split(rb"^export ", text, flags=re.MULTILINE)) for text in (before, after))
        names = {re.match(rb"\w*", variable)[0].decode() for variable in one ^ other}
    return sorted(names - {"", "_", "SHLVL", "OLDPWD", "LAUNCH_FILE", "LAUNCH_LINE"})


def smoke_flags(command):
    """The flags that make a run short, to stand behind its own."""
    program, script = Path(command[0]), Path(command[0]).stem
    if program.parent.name == "suites" and len(command) > 1:
        script = command[1]
    if not Run(command, "").trains:
        return shlex.split(SMOKE.get(script, ""))
    if script not in SMOKE:
        fail(f"--scale smoke: how to make {shlex.join(command)} short is not known, only {' '.join(sorted(SMOKE))}")
    flags = shlex.split(SMOKE[script])
    if program.stem in ("manipulation", "drawerworld"):
        flags += shlex.split(SMOKE_ARMS)
    if "--eval-modes" in common.spelled(command) and not Path("data/dmcgb").exists():
        flags.append("--eval-modes")  # none
    return flags


# ---- A run as a process ----
def start(run, environment):
    """Starts or continues a run and returns its Popen; None if another sweep is running it.

    The log is the lock: the process holds it as its output, so it is free when nobody writes there any more.
    """
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log, "ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # some file systems have no locks, which is no reason to stop
            if isinstance(error, BlockingIOError):
                return None
        folder, words = None, run.words()
        if not run.trains:
            Path(run.home, "analyses", run.seed).mkdir(parents=True, exist_ok=True)
        elif folder := run.folder():
            words = [*(run.resolved() or run.command), "--resume", str(folder)]
        command = [sys.executable, *words]
        if run.finished():
            command = ["true"]  # another sweep has finished it by now
        else:
            log.write(f"$ {shlex.join(['python', *words])}\n".encode())
            log.flush()
        how = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT, "process_group": 0}
        return subprocess.Popen(command, **how, env=os.environ | environment, preexec_fn=set_signals)


def ended(run, code):
    """Notes that a command which does not train has ended well."""
    if code == 0 and not run.trains:
        run.done.touch()


def set_signals():
    """In the new process, which has a group of its own: a terminal's Ctrl-C reaches the launcher, which passes it on.

    If the process that started it is killed, Linux sends it SIGTERM, and it saves. SIGUSR2 is for Slurm's worker.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def tail(run, lines=10):
    """The last lines of a run's log, or of Slurm's where the run never began."""
    for log in (run.log, run.log.with_suffix(".slurm")):
        if log.exists():
            return log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-lines:]
    return []


# ---- Where runs are run: start(run) -> whether it was started, alive() -> names of those that go on, stop() ----
class Local:
    """This machine, some runs at a time."""

    poll_seconds = 0.2

    def __init__(self, args, runs):
        gpus = visible_gpus()
        workers = args.workers or max(len(gpus) * args.runs_per_gpu, 1)
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        threads = os.environ.get("OMP_NUM_THREADS", str(max(cores // workers, 1)))
        self.free, self.processes = [], {}  # variables of idle workers; (run, process, its variables) by name
        for worker in range(workers):
            environment = {"OMP_NUM_THREADS": threads}
            if gpus:
                gpu = gpus[worker % len(gpus)]
                environment["CUDA_VISIBLE_DEVICES"] = gpu
                if renders(gpu):  # DeepMind Control, or it would render on the first
                    environment["MUJOCO_EGL_DEVICE_ID"] = gpu
            self.free.append(environment)

    def start(self, run):
        process = start(run, self.free[0]) if self.free else None
        if process:
            self.processes[run.name] = run, process, self.free.pop(0)
        return process is not None

    def alive(self):
        for name, (run, process, environment) in list(self.processes.items()):
            if process.poll() is not None:
                ended(run, process.returncode)
                del self.processes[name]
                self.free.append(environment)
        return set(self.processes)

    def stop(self):
        """Called once, because a second signal ends a run before it has saved."""
        for _, process, _ in self.processes.values():
            process.send_signal(signal.SIGTERM)


def visible_gpus():
    """What CUDA_VISIBLE_DEVICES may name, one by one."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(gpu) for gpu in range(count)]


@cache
def renders(gpu):
    """Whether EGL knows a GPU by this number. A container may hide it, and a user may have chosen another."""
    if not gpu.isdigit() or "MUJOCO_EGL_DEVICE_ID" in os.environ:
        return False
    probe = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()"]
    environment = os.environ | {"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": gpu}
    return subprocess.run(probe, env=environment, capture_output=True).returncode == 0


@contextmanager
def outside_slurm():
    """Inside, the environment says nothing of an allocation that the launcher itself may run in.

    A job would get the allocation's memory and tasks beside its own, and fail. Where Slurm is and a user's own defaults
    stay; what would hide jobs from squeue and scancel goes.
    """
    names = ("SLURM_CONF", "SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    hiding = [name for name in os.environ if name.startswith(("SQUEUE_", "SCANCEL_"))]
    with submitit.helpers.clean_env(hiding):
        os.environ.update(kept)
        yield


class Slurm:
    """One job per run. Jobs outlive a launcher that is killed, and the next one finds them by their names."""

    poll_seconds = 5

    def __init__(self, args, runs):
        self.names = {run.name for run in runs}
        self.threads = {"OMP_NUM_THREADS": str(args.cpus_per_run)}
        try:
            cloudpickle.register_pickle_by_value(common)  # a job finds no file of ours to import
            self.executor = submitit.SlurmExecutor(Path(runs[0].home, ".launch", "slurm"), max_num_timeout=1000)
        except RuntimeError:
            fail("--backend slurm: there is no srun here")
        wanted = {
            "time": args.time_minutes,
            "partition": args.partition,
            "account": args.account,
            "gpus_per_node": args.gpus_per_run,
            "cpus_per_task": args.cpus_per_run,
            "mem": f"{args.memory_gb}GB" if args.memory_gb else "",
        }
        given = {name: value for name, value in wanted.items() if value}
        self.executor.update_parameters(stderr_to_stdout=True, **given)
        try:
            self.queued = self.queue()
        except subprocess.CalledProcessError as error:
            fail(f"--backend slurm: {error.stderr.strip()}")

    def queue(self):
        """{name: job} of the sweep's jobs that wait or run."""
        command = ["squeue", "--me", "--noheader", "--format=%A %j"]
        with outside_slurm():
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        jobs = {}
        for line in lines:
            job, name = line.split(maxsplit=1)
            if name in self.names:
                jobs[name] = job
        return jobs

    def start(self, run):
        if run.name not in self.queued:
            output = str(run.log.with_suffix(".slurm"))
            more = {"srun_args": ["--output", output], "additional_parameters": {"requeue": True, "output": output}}
            self.executor.update_parameters(job_name=run.name, **more)
            try:
                with outside_slurm():
                    self.queued[run.name] = self.executor.submit(Worker(run, self.threads)).job_id
            except RuntimeError as error:
                fail(f"--backend slurm: {str(error).strip().splitlines()[-1]}")
        return True

    def alive(self):
        with suppress(subprocess.CalledProcessError):  # Slurm's controller may be away for a while
            self.queued = self.queue()
        return set(self.queued)

    def stop(self):
        """A plain scancel would kill srun, which then kills the run before it has saved."""
        if self.queued:
            with outside_slurm():
                subprocess.run(["scancel", "--state=PENDING", *self.queued.values()])
                subprocess.run(["scancel", "--signal=TERM", *self.queued.values()])


class Worker:
    """A run inside a Slurm job. Where Slurm queues the job again, it starts again, and the run continues."""

    def __init__(self, run, environment):
        self.run, self.environment, self.pid = run, environment, None

    def __call__(self):
        while (process := start(self.run, self.environment)) is None:
            time.sleep(1)
        self.pid = process.pid
        while process.poll() is None:
            time.sleep(0.2)
        ended(self.run, process.returncode)
        if process.returncode:
            sys.exit(process.returncode)  # so that Slurm's records say so too

    def checkpoint(self):
        """submitit calls it shortly before the time limit, or when the job has to go. -> what is queued instead."""
        with suppress(ProcessLookupError, ChildProcessError):
            if self.pid:
                os.kill(self.pid, signal.SIGUSR1)
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Worker(self.run, self.environment))


# ---- The sweep ----
def sweep(runs, backend):
    """Runs what is not finished. -> the runs that failed, the signal that ended the sweep or None."""
    done = {}
    for command, folders in folders_in(runs[0].home).items():
        whole = [folder for folder in folders if finished(folder)]
        if whole:
            done[command] = max(whole, key=saved_at)
    waiting, changed = [], []
    for run in runs:
        folder = done.get(identity(run.resolved() or run.command)) if run.trains else None
        if not (folder or run.done.exists()):
            waiting.append(run)
        elif folder and not same_script(run, folder):
            changed.append(run.command[0])
    check_needs(waiting, done)
    for script in sorted(set(changed)):
        print(f"warning: {script} has changed since {changed.count(script)} of its finished runs", file=sys.stderr)
    live, failed, signals, told, ready = [], [], [], False, None
    print(f"{len(waiting)} to run, {len(runs) - len(waiting)} done", flush=True)

    def on_signal(number, _):
        signals.append(number)
        for known in before:
            signal.signal(known, signal.SIG_DFL)  # a second one ends the launcher at once

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    progress = Progress(len(runs), len(waiting))
    while live or (waiting and not signals):
        if not signals:
            if ready is None:  # at the start, and where a run has ended that another one may wait for
                unmade = {run.name for run in [*waiting, *live, *failed]}
                ready = [run for run in waiting if unmade.isdisjoint(needed.name for needed in run.needs.values())]
            for run in list(ready):
                if backend.start(run):
                    ready.remove(run)
                    waiting.remove(run)
                    live.append(run)
            if waiting and not live and not ready:  # what they wait for is in no list, or has failed
                failed, waiting = failed + waiting, []
                break
        elif not told:
            backend.stop()
            told = True
        progress.show(live, waiting, failed)
        time.sleep(backend.poll_seconds)
        alive = backend.alive()
        for run in list(live):
            if run.name not in alive:
                live.remove(run)
                ready = None
                if not run.finished():
                    stopped = waiting if signals else failed
                    stopped.append(run)
    progress.show(live, waiting, failed)
    progress.bar.close()
    for number, handler in before.items():
        signal.signal(number, handler)
    return failed, signals[0] if signals else None


def check_needs(waiting, done):
    """Ends the program if a run names one that is neither finished nor run now."""
    known = {run.name for run in waiting}
    for run in waiting:
        for word, needed in run.needs.items():
            if needed.name not in known and identity(needed.resolved() or needed.command) not in done:
                fail(f"{shlex.join(run.command)}: needs {word}, whose line --core or --only leaves out")


class Progress:
    """One bar for the whole sweep, or a line at each change where the output is no terminal."""

    def __init__(self, total, waiting):
        tqdm.monitor_interval = 0  # no thread beside the one that starts processes
        self.terminal, self.total, self.line = sys.stderr.isatty(), total, None
        about = {"unit": "run", "disable": not self.terminal, "dynamic_ncols": True}
        self.bar = tqdm(total=total, initial=total - waiting, **about)

    def show(self, live, waiting, failed):
        done = self.total - len(live) - len(waiting) - len(failed)
        line = f"{len(live)} under way, {len(waiting)} waiting, {len(failed)} failed"
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update(done - self.bar.n)
        self.bar.refresh()
        if not self.terminal and line != self.line:
            print(f"{done}/{self.total} done, {line}", flush=True)
        self.line = line


def check(args):
    """Flags out of range."""
    positive = ("seeds", "runs_per_gpu", "time_minutes", "cpus_per_run")
    for name, value in vars(args).items():
        least = 1 if name in positive else 0
        if isinstance(value, int) and value < least:
            fail(f"--{name.replace('_', '-')} {value}: at least {least}")
    if not args.lists:
        there = sorted((Path(__file__).parent / "lists").glob("*.sh"))
        fail(f"which list? There are {' '.join(map(str, there))}")


def main():
    args = tyro.cli(Args)
    check(args)
    runs = runs_of(args)
    if args.dry_run:
        print("\n".join(shlex.join(["python", *run.words()]) for run in runs))
        return
    try:
        Path(runs[0].home, ".launch").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--runs-dir {args.runs_dir} cannot be written: {error.strerror}")
    backend = Local(args, runs) if args.backend == "local" else Slurm(args, runs)
    failed, number = sweep(runs, backend)
    for run in failed:
        if not run.resolved():
            print(f"\nfailed: {shlex.join(['python', *run.command])}\n  waits for a finished run: {run.unmet()}")
            continue
        print(f"\nfailed: {shlex.join(['python', *run.words()])}", *tail(run), f"log: {run.log}", sep="\n  ")
    if number:
        print(f"stopped by {signal.Signals(number).name}; the same command goes on")
        sys.exit(128 + number)
    if failed:
        sys.exit(f"\nerror: {len(failed)} of {len(runs)} runs failed; the same command tries them again")


if __name__ == "__main__":
    main()
