"""Steps/s of a script, where its time goes, and reference commands that take turns with it,
iteration by iteration.

An iteration is a rollout with its updates. For a script that learns with every step, it is --steps
steps, once it learns. All commands are started, and each is paused while another one does an
iteration (a reference by SIGSTOP). So what slows the machine down for a while slows all of them.
The first iteration of each is not counted, nor are the random steps that a script begins with. The
limit is what the bare network reaches in the script's process: forward, backward and Adam on a
minibatch of an update, without CUDA graphs. Memory is the host's. A reference is one process.

    python benchmark/throughput.py algos/mdpo.py --flags="--env-id bigfish --num-agents 1"
    python benchmark/throughput.py algos/mine.py --references "CleanRL=python ppo_procgen.py" --out speed.csv

A reference is any program that prints a line (--mark) at the end of each iteration of as many steps
as the script's. The script's time is told apart by its functions `act`, `update` and `evaluate`,
and by the steps of its environments.
"""

import contextlib
import copy
import csv
import itertools
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import common
import torch
import tyro

PHASES = ("environments", "inference", "update", "evaluation", "rest")


@dataclass
class Args:
    script: tyro.conf.Positional[str]  # a file of algos/, or a copy of one anywhere
    flags: str = ""  # its flags; without --eval-every, --save-minutes, --exact-every it neither evaluates nor saves
    references: tuple[str, ...] = ()  # NAME=COMMAND, as many as there are
    mark: str = "^SPS:"  # regular expression of the line with which a reference ends an iteration
    iterations: int = 3  # that count, after one that does not
    steps: int = 1000  # of an iteration, where there are no rollouts
    out: str | None = None  # CSV file: one row per iteration
    inside: bool = False  # be the script's process (used by this program itself)


def main():
    args = tyro.cli(Args)
    if args.inside:
        return inside(args)
    if not Path(args.script).is_file() or min(args.iterations, args.steps) < 1:
        common.fail("a script that exists, --iterations and --steps of at least 1")
    for reference in args.references:
        if "=" not in reference:
            common.fail(f"--references {reference}: NAME=COMMAND")
    if args.out:
        common.check_out(args.out, ".csv")
    worker = [sys.executable, __file__, args.script, "--inside", f"--flags={args.flags}"]
    sizes = ["--iterations", str(args.iterations), "--steps", str(args.steps)]
    jobs = [Job(Path(args.script).name, [*worker, *sizes])]
    for reference in args.references:
        name, _, command = reference.partition("=")
        jobs.append(Job(name, shlex.split(command), args.mark))
    try:
        for job in jobs * (1 + args.iterations):
            job.turn()
        about = json.loads(jobs[0].next_line())
    finally:
        for job in jobs:
            job.end()
    rows = []
    for job in jobs:
        rows += job.turns[1:]
    for row in rows:
        row |= {"steps": about["steps"], "steps_per_second": about["steps"] / row["seconds"]}
    show(jobs, about)
    if args.out:
        save(args.out, rows, about)


class Job:
    """A command that runs an iteration at a time. The script's process (no mark) waits for a line before each."""

    def __init__(self, name, command, mark=None):
        self.name, self.command, self.mark, self.turns = name, command, mark, []
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors, "text": True}
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        self.pause()

    def send(self, number):
        os.killpg(self.process.pid, number)

    def pause(self):
        if self.mark:
            self.send(signal.SIGSTOP)

    def next_line(self):
        """Lets the command run to the end of its iteration and returns the line that says so."""
        if self.mark:
            self.send(signal.SIGCONT)
        elif self.process.poll() is None:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if re.search(self.mark or "^{", line):
                self.pause()
                return line
        end = f"with code {self.process.wait()} before the end of iteration {len(self.turns)}"
        self.errors.seek(0)
        print(self.errors.read()[-2000:], file=sys.stderr)
        print(f"error: {self.name} ended {end}: {shlex.join(self.command)}", file=sys.stderr)
        sys.exit(1)

    def turn(self):
        """One iteration, timed."""
        start, busy, own = time.monotonic(), busy_seconds(), self.cpu_seconds()
        line = self.next_line()
        seconds = time.monotonic() - start
        others = (busy_seconds() - busy - (self.cpu_seconds() - own)) / (seconds * os.cpu_count())
        row = {"name": self.name, "iteration": len(self.turns), "seconds": seconds, "others": max(others, 0.0)}
        row |= {"peak_gb": self.peak_gb(), "command": shlex.join(self.command), "phases": {}}
        self.turns.append(row | ({} if self.mark else json.loads(line)))

    def cpu_seconds(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_gb(self):
        """Of resident memory. A command that has just ended has none: then what it was before."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        if found:
            return int(found[1]) / 1e6
        return self.turns[-1]["peak_gb"] if self.turns else 0.0

    def end(self):
        if self.process.poll() is None:
            self.send(signal.SIGKILL)
        self.process.wait()


def busy_seconds():
    """CPU time that this machine has spent so far, on anything."""
    fields = Path("/proc/stat").read_text(encoding="utf-8").split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def show(jobs, about):
    """Prints the two tables."""
    script = jobs[0].turns[1:]
    iterations = f"{len(script)} iterations of {about['steps']} steps"
    print(f"{about['precision']}, {about['hardware']}, {iterations}")
    print(f"{'':24}{'steps/s':>9}{'least':>9}{'most':>9}{'ratio':>8}{'peak GB':>9}{'others':>8}")
    for job in jobs:
        speeds, ratios, others = [], [], 0.0
        for own, row in zip(script, job.turns[1:], strict=True):
            speeds.append(row["steps_per_second"])
            ratios.append(row["seconds"] / own["seconds"])
            others = max(others, row["others"])
        warning = "  NOT TO BE TRUSTED: the cores were shared" if others > 0.05 else ""
        print(
            f"{job.name:24}{statistics.median(speeds):9.1f}{min(speeds):9.1f}{max(speeds):9.1f}"
            f"{statistics.median(ratios):8.2f}{job.turns[-1]['peak_gb']:9.2f}{others:8.1%}{warning}"
        )
    total = sum(row["seconds"] for row in script)
    for phase in PHASES:
        print(f"{phase:24}{sum(row['phases'][phase] for row in script) / total:9.1%}")
    print(f"update: {limit_fraction(script, about):.2f} of what the bare network reaches")


def limit_fraction(rows, about):
    updates = sum(row["updates"] for row in rows)
    seconds = sum(row["phases"]["update"] for row in rows)
    return about["limit_seconds"] * updates / seconds


def save(path, rows, about):
    columns = ["name", "iteration", "steps", "seconds", "steps_per_second", "peak_gb", "others", *PHASES]
    columns += ["limit_fraction", "precision", "command", "commit", "packages", "hardware"]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            if row["phases"]:
                row |= row["phases"] | {"limit_fraction": limit_fraction([row], about)}
                row |= about
            writer.writerow(row | {"hardware": about["hardware"]})


# ---- The script's process ----
class Enough(Exception):
    """All iterations are timed."""


def inside(args):
    """Prints one line of JSON per iteration, and waits for one before the next; then one about the run."""

    def between(iteration):
        print(json.dumps(iteration), flush=True)
        sys.stdin.readline()

    sys.stdin.readline()
    about, _ = iterate(args.script, shlex.split(args.flags), args.steps, 1 + args.iterations, between)
    print(json.dumps(about), flush=True)


def iterate(path, flags, steps, wanted, between, make_envs=None, limit=5.0):
    """Trains for some iterations, with a clock around each phase -> what is known about the run, its networks' weights.

    between(phases and updates of an iteration) is called after each. limit: seconds for timing the bare network.
    """
    script = common.load_script(path)
    make_envs = make_envs or script.make_envs
    all_flags = ["--eval-every", "0", "--save-minutes", "0", "--exact-every", "0", *flags]
    run_args = vars(tyro.cli(script.Args, args=all_flags))
    warm_up, batch_size = run_args.get("learning_starts", 0), steps
    if "num_steps" in run_args:  # rollouts
        batch_size = run_args["num_envs"] * run_args["num_steps"]
    total = warm_up + (wanted + 1) * batch_size  # the last iteration is stopped at its first step
    clock, calls, agents, played, ended = Clock(), [], [], 0, 0

    def count():
        """Before each step of training: ends an iteration if all of its steps are done, and learned from."""
        nonlocal played, ended
        if played >= warm_up + (ended + 1) * batch_size:
            between(clock.read())
            clock.reset()
            ended += 1
            if ended == wanted:
                raise Enough
        played += run_args["num_envs"]

    def make_timed_envs(args, split, *start):
        envs = make_envs(args, split, *start)
        step = clock.timed("environments", envs.step)

        def counted_step(actions):
            count()
            return step(actions)

        envs.step = step if clock.inside else counted_step  # an evaluation makes its own
        return envs

    def make_agent(envs, args):
        agents.append(script.Agent(envs, args))
        return agents[-1]

    script.act = clock.timed("inference", script.act)
    script.update = clock.timed("update", noting_calls(script.update, calls))
    script.evaluate = clock.timed("evaluation", script.evaluate)
    script.Captured.__call__ = clock.timed(None, script.Captured.__call__)
    with tempfile.TemporaryDirectory() as runs_dir:
        with contextlib.suppress(Enough):
            script.main(
                [*all_flags, "--total-timesteps", str(total), "--runs-dir", runs_dir], make_timed_envs, make_agent
            )
        about = json.loads(next(Path(runs_dir).glob("*/args.json")).read_text())
    weights = [copy.deepcopy(agent.state_dict()) for agent in agents]
    limit = limit_seconds(calls, limit)  # it trains these networks
    calls.clear()  # `script` would keep them in memory
    hardware, packages = about["hardware"], []
    for name in ("torch", "numpy", "envpool", "dm_control"):
        if name in about["packages"]:
            packages.append(f"{name}=={about['packages'][name]}")
    return {
        "steps": batch_size * run_args.get("num_agents", 1),
        "limit_seconds": limit,
        "precision": about["args"]["precision"],
        "command": shlex.join(["python", path, *flags]),
        "commit": about["commit"],
        "packages": " ".join(packages),
        "hardware": f"{hardware['gpu'] or 'no GPU'}, {hardware['cores']} cores {hardware['cpu']},"
        f" {hardware['torch_threads']} torch threads",
    }, weights


class Clock:
    """Seconds in each phase of an iteration."""

    def __init__(self):
        self.phases = {}  # of what is captured
        self.reset()

    def reset(self):
        self.start, self.seconds, self.updates = now(), dict.fromkeys(PHASES, 0.0), 0
        self.inside, self.inner = False, None

    def timed(self, phase, function):
        """The function, with its time added to a phase, unless it is called within another phase.

        phase None: the function is Captured.__call__, and the phase is that of the function which is captured. A CUDA
        graph calls no function of Python, so it is kept from the calls before the graph was recorded.
        """

        def call(*inputs, **more):
            if self.inside:
                self.inner = phase
                return function(*inputs, **more)
            start, self.inside, self.inner = now(), True, None
            outputs = function(*inputs, **more)
            self.inside = False
            name = phase or self.phases.setdefault(id(inputs[0]), self.inner or "rest")
            self.seconds[name] += now() - start
            self.updates += name == "update"
            return outputs

        return call

    def read(self):
        """{"phases": seconds of each, "updates": their number} since the last reset."""
        self.seconds["rest"] += now() - self.start - sum(self.seconds.values())
        return {"phases": self.seconds, "updates": self.updates}


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def noting_calls(function, calls):
    """The function. Of its first call, the networks that it calls are noted: (network, inputs, whether it learns).

    A network that another one calls is a part of that one.
    """
    modules, within = torch.nn.modules.module, []

    def enter(module, inputs):
        if not within:
            copies = []
            for value in inputs:
                copies.append(value.detach().clone() if torch.is_tensor(value) else value)
            learns = any(param.requires_grad for param in module.parameters())
            calls.append((module, copies, learns and torch.is_grad_enabled()))
        within.append(module)

    def leave(*_):
        within.pop()

    def noting(*inputs, **more):
        if calls:
            return function(*inputs, **more)
        hooks = modules.register_module_forward_pre_hook(enter), modules.register_module_forward_hook(leave)
        outputs = function(*inputs, **more)
        for hook in hooks:
            hook.remove()
        return outputs

    return noting


def limit_seconds(calls, limit):
    """Seconds of forward, backward and Adam for the networks and inputs of an update: the fastest of some tries."""
    learning = {network: list(network.parameters()) for network, _, learns in calls if learns}
    optimizer = torch.optim.Adam(itertools.chain(*learning.values()), lr=1e-6, fused=True)

    def step():
        optimizer.zero_grad()
        for network, inputs, learns in calls:
            with torch.set_grad_enabled(learns):
                outputs = network(*inputs)
            if learns:
                outputs = outputs if isinstance(outputs, tuple) else [outputs]
                sum(output.square().mean() for output in outputs).backward()
        optimizer.step()

    seconds = []
    while len(seconds) < 3 or sum(seconds) < limit:
        start = now()
        step()
        seconds.append(now() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
