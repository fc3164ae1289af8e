"""Steps/s of a script, where its time goes, and reference commands that take turns with it, iteration by iteration.

An iteration is a rollout with its updates; of a script that learns with every step, it is some steps (--steps) once it
learns. All commands are started, and each is paused while another one does an iteration (a reference by SIGSTOP), so
that what slows the machine down for a while slows all of them. The first iteration of each warms up, on top of random
steps where a script begins with them, and does not count. The limit is what the bare network reaches in the script's
process: forward, backward and Adam on minibatches like an update's, called one operation at a time. Memory is the
host's, and CPU time a process's: a reference is one process.

    python benchmark/throughput.py algos/mdpo.py --flags="--env-id bigfish --num-agents 1"
    python benchmark/throughput.py algos/mdpo.py --references "CleanRL=python ppo_procgen.py" --out speed.csv

A reference is any program that prints a line (--mark) at the end of each iteration of as many steps as the script's.
"""

import csv
import importlib.util
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
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

PHASES = ("environments", "inference", "update", "evaluation", "rest")


@dataclass
class Args:
    script: tyro.conf.Positional[str]  # a file of algos/
    flags: str = ""  # its flags; evaluations and saves are left out unless they are among them
    references: tuple[str, ...] = ()  # NAME=COMMAND, as many as there are
    mark: str = "^SPS:"  # regular expression of the line with which a reference ends an iteration
    iterations: int = 3  # that count, after one that does not
    steps: int = 1000  # of an iteration, where there are no rollouts
    out: str | None = None  # CSV file: a row an iteration
    inside: bool = False  # be the script's process (used by this program itself)


def main():
    args = tyro.cli(Args)
    if args.inside:
        return inside(args)
    least = min(args.iterations, args.steps)
    if not Path(args.script).is_file() or least < 1 or not all("=" in text for text in args.references):
        said = "a script that exists, --references NAME=COMMAND, --iterations and --steps of at least 1"
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)
    worker = [sys.executable, __file__, args.script, "--inside", f"--flags={args.flags}"]
    sizes = ["--iterations", str(args.iterations), "--steps", str(args.steps)]
    jobs = [Job(Path(args.script).name, [*worker, *sizes])]
    for name, _, command in (reference.partition("=") for reference in args.references):
        jobs.append(Job(name, shlex.split(command), args.mark))
    try:
        for job in jobs * (1 + args.iterations):
            job.turn()
        about, rows = json.loads(jobs[0].next_line()), [row for job in jobs for row in job.turns[1:]]
    finally:
        for job in jobs:
            job.end()
    for row in rows:
        row |= {"steps": about["steps"], "steps_per_second": about["steps"] / row["seconds"]}
    show(jobs, about)
    if args.out:
        save(args.out, rows, about)


class Job:
    """A command that runs an iteration at a time. The script's process (no mark) waits for a line before each."""

    def __init__(self, name, command, mark=None):
        self.name, self.command, self.mark, self.turns = name, command, mark, []
        self.errors = tempfile.TemporaryFile("w+")
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
        line = next((line for line in self.process.stdout if re.search(self.mark or "^{", line)), None)
        if line is None:
            end = f"with code {self.process.wait()} before the end of iteration {len(self.turns)}"
            self.errors.seek(0)
            print(self.errors.read()[-2000:], file=sys.stderr)
            print(f"error: {self.name} ended {end}: {shlex.join(self.command)}", file=sys.stderr)
            sys.exit(1)
        self.pause()
        return line

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
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_gb(self):
        """Of resident memory. A command that has just ended has none: then what it was before."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(found[1]) / 1e6 if found else max((row["peak_gb"] for row in self.turns), default=0.0)

    def end(self):
        if self.process.poll() is None:
            self.send(signal.SIGKILL)
        self.process.wait()


def busy_seconds():
    """CPU time that this machine has spent so far, on anything."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def show(jobs, about):
    """Prints the two tables."""
    script = jobs[0].turns[1:]
    print(f"{about['precision']}, {about['hardware']}, {len(script)} iterations of {about['steps']} steps")
    print(f"{'':24}{'steps/s':>9}{'least':>9}{'most':>9}{'ratio':>8}{'peak GB':>9}{'others':>8}")
    for job in jobs:
        speeds = [row["steps_per_second"] for row in job.turns[1:]]
        ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(script, job.turns[1:], strict=True))
        others = max(row["others"] for row in job.turns[1:])
        print(
            f"{job.name:24}{statistics.median(speeds):9.1f}{min(speeds):9.1f}{max(speeds):9.1f}{ratio:8.2f}"
            f"{job.turns[-1]['peak_gb']:9.2f}{others:8.1%}"
            + "  NOT TO BE TRUSTED: the cores were shared"
            * (others > 0.05)
        )
    total = sum(row["seconds"] for row in script)
    for phase in PHASES:
        print(f"{phase:24}{sum(row['phases'][phase] for row in script) / total:9.1%}")
    print(f"update: {limit_fraction(script, about):.2f} of what the bare network reaches")


def limit_fraction(rows, about):
    return about["limit_seconds"] * sum(row["updates"] for row in rows) / sum(row["phases"]["update"] for row in rows)


def save(path, rows, about):
    columns = ["name", "iteration", "steps", "seconds", "steps_per_second", "peak_gb", "others", *PHASES]
    columns += ["limit_fraction", "precision", "command", "commit", "packages", "hardware"]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            if row["phases"]:
                row |= row["phases"] | {"limit_fraction": limit_fraction([row], about)}
                row |= {key: about[key] for key in ("precision", "command", "commit", "packages")}
            writer.writerow(row | {"hardware": about["hardware"]})


# ---- The script's process ----
def inside(args):
    """Trains with a clock around each phase; a line of JSON an iteration, and one about the run and its limit."""
    script = load(args.script)
    rest = ["--eval-every", "0", "--save-minutes", "0", "--exact-every", "0", *shlex.split(args.flags)]
    run_args = tyro.cli(script.Args, args=rest)
    sys.stdin.readline()
    rollouts, first = hasattr(run_args, "num_steps"), getattr(run_args, "learning_starts", 0)
    batch_size = run_args.num_envs * run_args.num_steps if rollouts else args.steps
    clock, log, tick, calls = Clock(), script.Run.log, script.Run.tick, []

    def make_envs(*about):
        envs = script.make_envs(*about)
        envs.step = clock.timed("environments", envs.step)
        return envs

    def end_iteration():
        print(json.dumps(clock.read()), flush=True)
        sys.stdin.readline()
        clock.reset()

    def logged(run, step, values):
        log(run, step, values)
        if rollouts and "charts/SPS" in values:
            end_iteration()

    def ticked(run, save, steps=0):
        tick(run, save, steps)
        if not rollouts and steps and run.bar.n > first and (run.bar.n - first) % batch_size == 0:
            end_iteration()

    script.evaluate, script.Run.log, script.Run.tick = clock.timed("evaluation", script.evaluate), logged, ticked
    script.update = noting_calls(script.update, calls)
    call, phase = script.Captured.__call__, {True: "update", False: "inference"}
    by_phase = {name: clock.timed(name, call) for name in phase.values()}
    script.Captured.__call__ = lambda self, *inputs: by_phase[phase[bool(self.parts)]](self, *inputs)
    with tempfile.TemporaryDirectory() as runs_dir:
        total = first + (1 + args.iterations) * batch_size
        trained = script.train(replace(run_args, runs_dir=runs_dir, total_timesteps=total), make_envs)
        agents = trained if isinstance(trained, list) else [trained]
        about = json.loads(next(Path(runs_dir).glob("*/args.json")).read_text())
    hardware, packages = about["hardware"], about["packages"]
    about = {
        "steps": batch_size * len(agents),
        "limit_seconds": limit_seconds(rollout_calls(script, agents, run_args) if rollouts else calls),
        "precision": about["args"]["precision"],
        "command": shlex.join(["python", "algos/" + Path(args.script).name, *shlex.split(args.flags)]),
        "commit": about["commit"],
        "packages": " ".join(
            f"{name}=={packages[name]}" for name in ("torch", "numpy", "envpool", "dm_control") if name in packages
        ),
        "hardware": f"{hardware['gpu'] or 'no GPU'}, {hardware['cores']} cores {hardware['cpu']},"
        f" {hardware['torch_threads']} torch threads",
    }
    print(json.dumps(about), flush=True)


def load(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Clock:
    """Seconds in each phase of an iteration."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.start, self.seconds, self.updates = now(), dict.fromkeys(PHASES, 0.0), 0
        self.inside = False

    def timed(self, phase, function):
        """The function, its time added to a phase, unless it is a part of another one."""

        def call(*inputs):
            if self.inside:
                return function(*inputs)
            start, self.inside = now(), True
            outputs = function(*inputs)
            self.seconds[phase] += now() - start
            self.updates += phase == "update"
            self.inside = False
            return outputs

        return call

    def read(self):
        """{"phases": seconds of each, "updates": their number} since the last reset."""
        rest = now() - self.start - sum(self.seconds.values())
        return {"phases": self.seconds | {"rest": rest}, "updates": self.updates}


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def noting_calls(function, calls):
    """The function; the networks that it calls at first, not their parts, are noted: (network, inputs, if to learn)."""
    modules, within = torch.nn.modules.module, []

    def enter(module, inputs):
        if not within:
            learns = torch.is_grad_enabled() and any(param.requires_grad for param in module.parameters())
            calls.append((module, [value.detach().clone() for value in inputs], learns))
        within.append(module)

    def leave(*_):
        within.pop()

    def noting(*inputs):
        if calls:
            return function(*inputs)
        hooks = modules.register_module_forward_pre_hook(enter), modules.register_module_forward_hook(leave)
        outputs = function(*inputs)
        for hook in hooks:
            hook.remove()
        return outputs

    return noting


def rollout_calls(script, agents, args):
    """What an update on a minibatch of a rollout would be noted to call, on images of noise."""
    size = args.num_envs * args.num_steps // args.num_minibatches
    device = next(agents[0].parameters()).device
    images = torch.randint(0, 256, (size, 3, 64, 64), dtype=torch.uint8, device=device)
    slices = images.split(script.CPU_BATCH if device.type == "cpu" else size)
    distilling = getattr(args, "distill_coef", 0) > 0
    matching = getattr(args, "netrand", False) and args.fm_coef > 0
    calls = []
    for agent, obs in itertools.product(agents, slices):
        calls += [(network, [obs], True) for network in (agents if distilling else [agent])]
        calls += [(agent, [obs], False)] * matching  # the features that others are matched to need no gradient
    return calls


def limit_seconds(calls):
    """Seconds of forward, backward and Adam for the images and networks of an update and nothing else: the least."""
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
    while len(seconds) < 3 or sum(seconds) < 5:
        start = now()
        step()
        seconds.append(now() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
