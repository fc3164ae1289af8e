"""What a run leaves behind is whole and enough to go on from, whatever ends it.

`Run` has one text in all scripts (test_copies.py), so most is tested for one on-policy and one off-policy script.
"""

import errno
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import (
    ROWS,
    SCRIPTS,
    TIMES,
    ScriptedEnvs,
    folder_in,
    load,
    make_agent_of,
    metrics_of,
    obs_shape_of,
    replace,
    same,
    state_of,
    tiny_args,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PPO = ["mdpo", "ppo_netrand"]
OFF_POLICY = ["drq_sam_reset", "sac_sam_reset", "drqv2_pieg"]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
VARIANTS = {  # what else of a script has to resume exactly
    "mdpo": [{}, {"anneal_lr": True}, {"num_agents": 1}],
    "drqv2_pieg": [{}, {"strong_augmentation": "conv", "n_step": 1}, {"strong_augmentation": "none"}],
    "ppo_netrand": [
        {"clean_prob": 0.5, "anneal_lr": True, "anneal_clip": True},
        {"clean_prob": 1.0, "clean_mode": "identity", "norm_reward": False},
        {"netrand": False},
    ],
}
# In a tiny run's second half: a step of the environments, a later update, and the last step that is learned from before
# the log is written.
LATE = {"mdpo": (10, 6, 10), "ppo_netrand": (10, 6, 10), "drq_sam_reset": (20, 25, 35), "sac_sam_reset": (20, 13, 35)}
LATE["drqv2_pieg"] = (20, 7, 34)
ONE_UPDATE = {"update_epochs": 1, "num_minibatches": 1}  # a gradient's fault is not yet one of the next loss
ONE_UPDATE = dict.fromkeys(PPO, ONE_UPDATE)
ONE_UPDATE |= {name: {"replay_ratio": 1, "sam": False} for name in ("drq_sam_reset", "sac_sam_reset")}
ONE_UPDATE["drqv2_pieg"] = {}


@pytest.fixture(params=["mdpo", "sac_sam_reset"])
def one_of_each(request):
    """An on-policy and an off-policy script."""
    return load(request.param)


def go(script, args, make_envs=ScriptedEnvs):
    """Trains on scripted environments."""
    return script.train(args, make_envs, make_agent_of(script))


def up_to(lines, most):
    """The lines of metrics.csv up to a step."""
    return lines[:1] + [line for line in lines[1:] if int(line.split(",")[0]) <= most]


def through_file(state, tmp_path):
    """A state as a checkpoint gives it back."""
    torch.save(state, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


def phase_of(args, split):
    """What environments are made for."""
    return "train" if split == "train" and args.seed != args.eval_seed else "evaluate"


def scripted(number=0, act=None, phase="train"):
    """Scripted environments that count their steps in a phase, all together; act(outcome) is part of the number-th."""

    class Envs(ScriptedEnvs):
        steps = 0

        def __init__(self, args, split, start=0):
            super().__init__(args, split, start)
            self.counts = phase_of(args, split) == phase

        def step(self, actions):
            outcome = super().step(actions)
            Envs.steps += self.counts
            if self.counts and Envs.steps == number:
                act(outcome)
            return outcome

    return Envs


def send(number):
    os.kill(os.getpid(), number)


def send_in_update(monkeypatch, script, number, call):
    """Sends a signal in the update of that count; returns a list that grows by one each update."""
    update, calls = script.update, []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == call:
            send(number)
        return update(*args)

    monkeypatch.setattr(script, "update", interrupted)
    return calls


# ---- Exact ----
def test_interrupted_and_resumed_equals_uninterrupted(script, tmp_path):
    """Killed in the last quarter and resumed from half way: weights, optimiser, streams and log, bit for bit."""
    for number, changes in enumerate(VARIANTS.get(script.__name__, [{}])):
        args = tiny_args(script.__name__, tmp_path / f"whole{number}", save_minutes=0, **changes)
        args = replace(args, total_timesteps=2 * args.total_timesteps, exact_every=args.total_timesteps)
        envs = scripted()
        agents = go(script, args, envs)
        args = replace(args, runs_dir=str(tmp_path / f"part{number}"))
        with pytest.raises(ZeroDivisionError):
            go(script, args, scripted(envs.steps * 7 // 8, lambda _: 1 / 0))
        whole, part = folder_in(tmp_path / f"whole{number}"), folder_in(args.runs_dir)
        assert state_of(part)["exact"] and state_of(part)["step"] == args.exact_every
        assert len(metrics_of(part)) > len(up_to(metrics_of(part), args.exact_every))  # there is something to cut
        time.sleep(1)  # event files are put in order by the second
        resumed = go(script, replace(args, resume=str(part)))
        assert torch.equal(weights(agents), weights(resumed)), changes
        assert same(state_of(whole), state_of(part)), changes
        assert metrics_of(whole) == metrics_of(part), changes
        assert events(whole) == events(part)


def events(folder):
    """{key: {(step, value)}} of what TensorBoard shows. An evaluation that was made again is there twice."""
    shown = EventAccumulator(str(folder)).Reload()
    keys = shown.Tags()["scalars"]
    return {key: {(event.step, event.value) for event in shown.Scalars(key)} for key in keys if key not in TIMES}


@pytest.fixture
def start(script):
    """Starts the script as a process; what still runs at the test's end is killed."""
    started = []

    def started_with(*flags):
        command = [sys.executable, script.__file__, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, **pipes))
        return started[-1]

    yield started_with
    for process in started:
        process.kill()


def wait_for(process, condition):
    deadline = time.monotonic() + 300
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.05)


@pytest.mark.slow
def test_kill_and_resume_on_the_real_environment(script, start, tmp_path):
    """kill -9, resume, SIGINT: what the last exact checkpoint holds is what an uninterrupted run has there."""
    flags = [*ROWS[script.__name__]["flags"].split(), "--eval-every", "0", "--save-minutes", "0"]
    flags += ["--runs-dir", str(tmp_path / "killed")]
    first = start(*flags, "--total-timesteps", "100000")
    wait_for(first, lambda: list(tmp_path.glob("killed/*/checkpoint.pt")))
    first.kill()
    assert first.wait() == -signal.SIGKILL
    checkpoint = folder_in(tmp_path / "killed") / "checkpoint.pt"
    begun = checkpoint.stat().st_mtime_ns
    second = start("--resume", str(checkpoint.parent))
    wait_for(second, lambda: checkpoint.stat().st_mtime_ns > begun)
    exact, log = shutil.copytree(checkpoint.parent, tmp_path / "exact"), metrics_of(checkpoint.parent)
    second.send_signal(signal.SIGINT)
    output, _ = second.communicate()
    assert second.returncode == 128 + signal.SIGINT
    assert "bit for bit" in output and f"--resume {checkpoint.parent}" in output and "Traceback" not in output

    step = state_of(exact)["step"]
    args = tyro.cli(script.Args, args=[*flags, "--total-timesteps", str(step)])
    script.train(replace(args, runs_dir=str(tmp_path / "whole")))
    whole = folder_in(tmp_path / "whole")
    assert same(state_of(whole), state_of(exact))
    assert metrics_of(whole) == up_to(log, step)


def test_a_finished_run_is_not_begun_again(one_of_each, tmp_path, capsys):
    """Its last evaluation is in the log once; resumed without more steps it says so, with more it keeps the log."""
    script, args = one_of_each, tiny_args(one_of_each.__name__, tmp_path)
    go(script, args)
    folder = folder_in(tmp_path)
    before = metrics_of(folder)
    with pytest.raises(SystemExit, match=r"^2$"):
        go(script, replace(args, resume=str(folder)))
    assert "raise --total-timesteps" in capsys.readouterr().err
    time.sleep(1)  # event files are put in order by the second
    go(script, replace(args, resume=str(folder), total_timesteps=2 * args.total_timesteps))
    assert up_to(metrics_of(folder), args.total_timesteps) == before
    steps = [step for step, _ in events(folder)["eval/test_return"]]
    assert len(set(steps)) == len(steps)


@pytest.mark.parametrize("phase", ["evaluate", "last"])
def test_an_interrupted_evaluation_is_made_up(script, tmp_path, phase):
    """Stopped by a signal in an evaluation and resumed, a run's log and state are those of the uninterrupted one."""
    args = tiny_args(script.__name__, tmp_path / "whole")
    envs = scripted(phase="evaluate")
    go(script, args, envs)
    args = replace(args, runs_dir=str(tmp_path / "part"))
    with pytest.raises(SystemExit):
        go(script, args, scripted(1 if phase == "evaluate" else envs.steps, lambda _: send(signal.SIGTERM), "evaluate"))
    part = folder_in(args.runs_dir)
    evaluated = state_of(part)["evaluated"]
    assert evaluated < state_of(part)["step"]
    go(script, replace(args, resume=str(part)))
    whole = folder_in(tmp_path / "whole")
    assert same(state_of(whole), state_of(part))
    assert metrics_of(whole) == metrics_of(part)


# ---- What is the same as before, and what is not ----
def sessions_of(folder):
    return json.loads((folder / "args.json").read_text())["sessions"]


def test_args_json_has_each_start_of_a_run(one_of_each, tmp_path):
    """A resumed run's arguments are the last ones; what changed, on which machine and with what, is in its session."""
    script, args = one_of_each, tiny_args(one_of_each.__name__, tmp_path)
    go(script, args)
    folder = folder_in(tmp_path)
    first = json.loads((folder / "args.json").read_text())
    more = {"total_timesteps": 2 * args.total_timesteps, "eval_episodes": 2}
    go(script, replace(args, resume=str(folder), **more))
    about = json.loads((folder / "args.json").read_text())
    assert about["args"] == first["args"] | more | {"resume": str(folder)}
    assert {key: about[key] for key in first if key not in ("args", "sessions")} == {
        key: first[key] for key in first if key not in ("args", "sessions")
    }
    assert [session["changed"] for session in about["sessions"]] == [{}, more | {"resume": str(folder)}]
    for session in about["sessions"]:
        assert {"command", "changed", "commit", "hardware", "python", "packages", "script"} == session.keys()
        assert session["packages"]["torch"] and session["hardware"]["torch_threads"] == torch.get_num_threads()


def test_hours_of_all_sessions_and_parameters_that_learn(script, tmp_path):
    """A resumed run goes on counting from its checkpoint, whatever it says there."""
    args = tiny_args(script.__name__, tmp_path)
    agent = go(script, args)
    folder = folder_in(tmp_path)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert 0 < state["hours"] < 0.1
    torch.save(state | {"hours": 7.0}, folder / "checkpoint.pt")
    go(script, replace(args, resume=str(folder), total_timesteps=2 * args.total_timesteps))
    again = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert 7 < again["hours"] < 7.1
    lines = (folder / "metrics.csv").read_text().splitlines()
    logged = [line for line in lines if "charts/hours" in line]
    step, _, hours = logged[-1].split(",")
    assert int(step) == again["step"] and 7 < float(hours) < again["hours"]
    agents = agent if isinstance(agent, list) else [agent]
    size = sum(param.numel() for one in agents for param in one.parameters())
    assert json.loads((folder / "args.json").read_text())["parameters"] == size


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda about: None, "bit for bit"),
        (
            lambda about: about["hardware"].update(torch_threads=99),
            "continued, in fresh environments (changed: hardware)",
        ),
        (lambda about: about["packages"].update(torch="1.0"), "continued, in fresh environments (changed: packages)"),
        (lambda about: about.update(python="3.0"), "continued, in fresh environments (changed: python)"),
    ],
)
def test_bit_for_bit_is_said_where_it_is_true(one_of_each, tmp_path, capsys, change, said):
    """From a multiple of --exact-every, with the same threads and packages."""
    script, args = one_of_each, tiny_args(one_of_each.__name__, tmp_path)
    go(script, replace(args, total_timesteps=args.exact_every, eval_every=0))
    folder = folder_in(tmp_path)
    about = json.loads((folder / "args.json").read_text())
    change(about["sessions"][-1])
    (folder / "args.json").write_text(json.dumps(about))
    capsys.readouterr()
    go(script, replace(args, resume=str(folder), eval_every=0))
    assert f"step {args.exact_every}: {said}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        # 64 steps of rollouts of 16: the last one learned at a quarter of the first rate, the next one at a half.
        ("mdpo", {"anneal_lr": True, "learning_rate": 4e-3}, ["learning_rate: 0.001 so far, 0.002 from here on"]),
        ("mdpo", {}, []),
        ("ppo_netrand", {"anneal_clip": True, "clip_coef": 0.2}, ["clip_coef: 0.05 so far, 0.1 from here on"]),
        (
            "ppo_netrand",
            {"anneal_lr": True, "learning_rate": 4e-3, "anneal_clip": True},
            ["learning_rate: 0.001 so far, 0.002 from here on", "clip_coef: 0.05 so far, 0.1 from here on"],
        ),
        # It had risen to 1 at step 36; of 72 steps, 28 of the 64 that learn are done.
        (
            "drq_sam_reset",
            {"prioritized_replay_beta": 0.5},
            ["prioritized_replay_beta: 1 so far, 0.719 from here on"],
        ),
        ("drq_sam_reset", {}, []),
    ],
)
def test_a_schedule_that_jumps_is_announced(name, settings, said, tmp_path, capsys):
    """More steps stretch what falls or rises over a run, and a resume says from where to where it goes."""
    script = load(name)
    steps = 64 if name in PPO else 36
    args = tiny_args(name, tmp_path, total_timesteps=steps, eval_every=0, **settings)
    go(script, args)
    capsys.readouterr()
    go(script, replace(args, resume=str(folder_in(tmp_path)), total_timesteps=2 * steps))
    out = capsys.readouterr().out
    assert re.findall(r"(?m)^\w+: .* from here on$", out) == said
    for line in said:  # what was really done next
        if line.startswith("learning_rate"):
            rates = [text for text in metrics_of(folder_in(tmp_path)) if "learning_rate" in text]
            assert [float(text.split(",")[2]) for text in rates[3:5]] == pytest.approx([1e-3, 2e-3])


def test_a_changed_network_is_said_in_a_line(one_of_each, tmp_path, capsys):
    script, args = one_of_each, tiny_args(one_of_each.__name__, tmp_path, eval_every=0)
    go(script, args)
    folder, before = folder_in(tmp_path), state_of(folder_in(tmp_path))

    class Wider(make_agent_of(script)):
        def __init__(self, envs, args):
            super().__init__(envs, args)
            self.more = torch.nn.Linear(2, 2)

    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^2$"):
        longer = replace(args, resume=str(folder), total_timesteps=2 * args.total_timesteps)
        script.train(longer, ScriptedEnvs, Wider)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder} is not of this script as it is now") and error.count("\n") == 1
    assert same(state_of(folder), before)


def test_a_script_that_was_changed_is_not_bit_for_bit(one_of_each, tmp_path, monkeypatch, capsys):
    """The folder has the script that trained last, and a resume with another one says so."""
    script, args = one_of_each, tiny_args(one_of_each.__name__, tmp_path / "runs")
    go(script, replace(args, total_timesteps=args.exact_every, eval_every=0))
    folder = folder_in(tmp_path / "runs")
    path = tmp_path / f"{script.__name__}.py"
    path.write_text(Path(script.__file__).read_text() + "# another text\n")
    monkeypatch.setattr(script, "__file__", str(path))
    capsys.readouterr()
    go(script, replace(args, resume=str(folder), eval_every=0))
    assert "continued, in fresh environments (changed: script)" in capsys.readouterr().out
    assert (folder / path.name).read_bytes() == path.read_bytes()


def test_a_second_process_on_a_run_is_refused(one_of_each, tmp_path, capsys):
    """Whatever it is at: nothing is changed by the second one, and the first one goes on."""
    script, args, seen = one_of_each, tiny_args(one_of_each.__name__, tmp_path, save_minutes=1e-9), []

    def begin_again(_):
        folder = folder_in(tmp_path)
        files = [path for path in folder.iterdir() if "tfevents" not in path.name]  # which a thread of the first writes
        before = {path: path.read_bytes() for path in files}
        with pytest.raises(SystemExit, match=r"^2$"):
            go(script, replace(args, resume=str(folder)))
        seen.append(capsys.readouterr().err)
        assert before == {path: path.read_bytes() for path in files}
        assert len(list(folder.iterdir())) == len(files) + 1

    go(script, args, scripted(LATE[script.__name__][0], begin_again))
    assert len(seen) == 1 and "another process is running it" in seen[0] and seen[0].count("\n") == 1
    assert state_of(folder_in(tmp_path))["step"] == args.total_timesteps


def test_a_file_system_without_locks_is_no_error(one_of_each, tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(one_of_each.fcntl, "flock", no_locks)
    args = tiny_args(one_of_each.__name__, tmp_path, eval_every=0)
    go(one_of_each, args)
    assert "would not be noticed: No locks available" in capsys.readouterr().out
    assert state_of(folder_in(tmp_path))["step"] == args.total_timesteps


def test_train_works_twice_and_in_a_thread(one_of_each, tmp_path):
    """As a library: signals are handled as before when it returns, or when it fails."""
    script, args = one_of_each, tiny_args(one_of_each.__name__, tmp_path / "0", eval_every=0)
    before = [signal.getsignal(number) for number in SIGNALS]
    first = weights(go(script, args))
    second = weights(go(script, replace(args, runs_dir=str(tmp_path / "1"))))
    found = []
    thread = threading.Thread(target=lambda: found.append(go(script, replace(args, runs_dir=str(tmp_path / "2")))))
    thread.start()
    thread.join()
    assert torch.equal(first, second) and torch.equal(first, weights(found[0]))
    with pytest.raises(ZeroDivisionError):
        go(script, replace(args, runs_dir=str(tmp_path / "3")), scripted(3, lambda _: 1 / 0))
    assert before == [signal.getsignal(number) for number in SIGNALS]


# ---- Safety saves ----
def test_timed_saves_change_nothing(script, tmp_path):
    saved = []
    envs = scripted(LATE[script.__name__][0], lambda _: saved.extend(tmp_path.glob("timed/*/checkpoint.pt")))
    args = tiny_args(script.__name__, tmp_path / "timed", exact_every=0, save_minutes=1e-9)
    go(script, args, envs)
    go(script, replace(args, save_minutes=0, runs_dir=str(tmp_path / "never")))
    assert saved
    assert same(*(state_of(folder_in(tmp_path / name)) for name in ("timed", "never")))


def recording(starts):
    """Scripted environments; the `start` of each one to train in is kept."""

    def make_envs(args, split, start=0):
        starts.extend([start] if phase_of(args, split) == "train" else [])
        return ScriptedEnvs(args, split, start)

    return make_envs


def test_resumed_from_a_safety_save_goes_on_in_new_environments(script, tmp_path, capsys):
    args, before, after = tiny_args(script.__name__, tmp_path, exact_every=0), [], []
    half = args.total_timesteps // 2
    go(script, replace(args, total_timesteps=half), recording(before))
    go(script, replace(args, resume=str(folder_in(tmp_path))), recording(after))
    assert (before, after) == ([0], [half])
    assert "fresh environments" in capsys.readouterr().out
    assert state_of(folder_in(tmp_path))["step"] == args.total_timesteps


def test_each_exact_save_begins_new_environments(script, tmp_path):
    args, starts = tiny_args(script.__name__, tmp_path), []
    go(script, args, recording(starts))
    assert starts == list(range(0, args.total_timesteps + 1, args.exact_every))


def test_a_checkpoint_is_exact_only_where_environments_begin_anew(script, tmp_path):
    args = tiny_args(script.__name__, tmp_path)
    half = args.total_timesteps // 2
    for steps, exact in ((half, True), (3 * half // 2 if script.__name__ in OFF_POLICY else 2 * half, False)):
        runs_dir = tmp_path / str(steps)
        go(
            script,
            replace(args, exact_every=half if exact else 4 * half, total_timesteps=steps, runs_dir=str(runs_dir)),
        )
        assert (state_of(folder_in(runs_dir))["step"], state_of(folder_in(runs_dir))["exact"]) == (steps, exact)


# ---- Signals ----
@pytest.mark.parametrize("phase", ["train", "update", "evaluate"])
def test_signal_saves_at_once_and_ends(script, tmp_path, monkeypatch, capsys, phase):
    """While collecting, learning or evaluating: saved, said how to go on, conventional exit code, and it does go on."""
    for number in SIGNALS if script.__name__ in ("mdpo", "sac_sam_reset") else [signal.SIGTERM]:
        runs_dir, before = tmp_path / str(number), signal.getsignal(number)
        args, envs = tiny_args(script.__name__, runs_dir), scripted(3, lambda _, n=number: send(n), phase)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            updates = send_in_update(patch, script, number, 3 if phase == "update" else None)
            go(script, args, envs)
        folder = folder_in(runs_dir)
        assert end.value.code == 128 + number
        assert f"--resume {folder}" in capsys.readouterr().out.splitlines()[-1]
        assert signal.getsignal(number) == before
        done = len(updates) if phase == "update" else envs.steps
        # Besides: the other updates of the same step.
        assert 3 <= done <= {"train": 3, "update": 2 + getattr(args, "replay_ratio", 1), "evaluate": 3}[phase]
        assert state_of(folder)["exact"] == (phase == "evaluate")
        go(script, replace(args, resume=str(folder)))
        assert state_of(folder)["step"] == args.total_timesteps


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_second_signal_ends_at_once(one_of_each, tmp_path):
    args = tiny_args(one_of_each.__name__, tmp_path)
    twice = scripted(3, lambda _: (send(signal.SIGTERM), send(signal.SIGTERM)))
    assert in_child(lambda: go(one_of_each, args, twice)) == signal.SIGTERM
    assert not (folder_in(tmp_path) / "checkpoint.pt").exists()


def in_child(action):
    """Which signal ended a forked process that does it (0: none)."""
    child = os.fork()
    if child == 0:
        signal.alarm(120)  # a test that hangs is one that fails
        try:
            action()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


# ---- Faults while saving ----
class Watched:
    """A file or a module; on_step(name) is called before each use of its functions of these names."""

    def __init__(self, thing, on_step, names):
        self.thing, self.on_step, self.names = thing, on_step, names

    def __getattr__(self, name):
        if name in self.names:
            self.on_step(name)
        return getattr(self.thing, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.thing.close()


@contextmanager
def watching_saves(script, on_step):
    """on_step(name) is called before each thing that a save does to the disk."""

    def watched_open(path, *args, **kwargs):
        if Path(path).suffix not in (".tmp", ".bin"):
            return open(path, *args, **kwargs)
        on_step("open")
        return Watched(open(path, *args, **kwargs), on_step, ("truncate", "write", "flush"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "open", watched_open, raising=False)
        patch.setattr(script, "os", Watched(os, on_step, ("fsync", "replace")))
        yield


def at(number, act):
    """Calls `act` when called for that time, counted from 0."""
    count = itertools.count()
    return lambda _: act() if next(count) == number else None


def fill_the_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def half(one_of_each, tmp_path):
    """(arguments to go on to the end, folder of a run that is half done, its state, that at the end, steps between)."""
    script = one_of_each
    args = tiny_args(script.__name__, tmp_path / "half", eval_every=0, **ONE_UPDATE[script.__name__])
    go(script, replace(args, total_timesteps=args.total_timesteps // 2))
    folder, steps = folder_in(tmp_path / "half"), []
    end = shutil.copytree(folder, tmp_path / "end")
    with watching_saves(script, steps.append):
        go(script, replace(args, resume=str(end)))
    assert "open write flush fsync replace" in " ".join(steps)
    assert ("open truncate write flush fsync" in " ".join(steps)) == (script.__name__ in OFF_POLICY)
    return args, folder, state_of(folder), state_of(end), steps


def test_full_disk_at_each_step_of_a_save(one_of_each, half, tmp_path):
    """One line, exit code 1, and the checkpoint is the one before or the new one, whole."""
    args, folder, old, new, steps = half
    for number, name in enumerate(steps):
        copy = shutil.copytree(folder, tmp_path / str(number))
        with watching_saves(one_of_each, at(number, fill_the_disk)), pytest.raises((SystemExit, OSError)) as end:
            go(one_of_each, replace(args, resume=str(copy)))
        line = str(end.value)  # what SystemExit prints; the script's last lines do the same for an OSError
        assert "No space left" in line and "\n" not in line, (number, name)
        state = state_of(copy)
        assert same(state, old) or same(state, new), (number, name)
        assert not list(copy.glob("*.tmp")), (number, name)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_kill_at_each_step_of_a_save(one_of_each, half, tmp_path):
    """The checkpoint is the one before or the new one, whole, and the run goes on from it to the same end."""
    args, folder, old, new, steps = half
    for number, name in enumerate(steps):
        copy = shutil.copytree(folder, tmp_path / str(number))
        resumed = replace(args, resume=str(copy))
        with watching_saves(one_of_each, at(number, lambda: send(signal.SIGKILL))):
            assert in_child(lambda resumed=resumed: go(one_of_each, resumed)) == signal.SIGKILL, (number, name)
        state = state_of(copy)
        assert same(state, old) or same(state, new), (number, name)
        if same(state, old):
            go(one_of_each, resumed)
        assert same(state_of(copy), new), (number, name)


def test_full_disk_under_the_log(one_of_each, tmp_path, monkeypatch):
    """A row of metrics.csv that cannot be written ends the program with one line, whatever it was doing."""
    real_open, fault = open, at(1, fill_the_disk)  # the second thing written, after the header

    def full(path, *args, **kwargs):
        file = real_open(path, *args, **kwargs)
        return Watched(file, fault, ("write",)) if Path(str(path)).name == "metrics.csv" else file

    flags = [*ROWS[one_of_each.__name__]["flags"].split(), "--eval-every", "0", "--runs-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [one_of_each.__file__, *flags])
    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(one_of_each.__file__, run_name="__main__")
    assert re.fullmatch(r"error: .*No space left.*", end.value.code)


# ---- Numbers that are not finite ----
def poison(kind, outcome, agent):
    """Makes the next reward, loss or gradient not a number."""
    parameter = next(agent.parameters())
    if kind == "reward":
        outcome[1].fill(np.nan)
    elif kind == "loss":
        parameter.data.fill_(np.nan)
    else:
        parameter.register_hook(lambda gradient: gradient * np.nan)


def poisoned_run(script, args, kind, number, then=lambda: None):
    """Runs until it ends by itself; in that step something is poisoned and `then` called. -> what it exits with."""
    agents = []

    def make_agent(*args):
        agents.append(make_agent_of(script)(*args))
        return agents[-1]

    envs = scripted(number, lambda outcome: (poison(kind, outcome, agents[0]), then()))
    with pytest.raises(SystemExit) as end:
        script.train(args, envs, make_agent)
    return end.value.code


@pytest.mark.parametrize(
    ("kind", "name"), [("reward", r"reward\w*"), ("loss", r"losses/\w*loss"), ("gradient", r"losses/\w*grad_norm")]
)
def test_not_finite_ends_the_run_and_is_never_saved(script, tmp_path, kind, name):
    args = tiny_args(script.__name__, tmp_path, **ONE_UPDATE[script.__name__])
    line = poisoned_run(script, args, kind, LATE[script.__name__][2])
    assert re.search(rf"{name} is (nan|not finite) at step {args.total_timesteps}", line) and "\n" not in line
    assert_half_and_finite(script, args, folder_in(tmp_path))
    assert "nan" not in (folder_in(tmp_path) / "metrics.csv").read_text()


@pytest.mark.parametrize(("kind", "phase"), [("reward", "train"), ("loss", "train"), ("gradient", "update")])
def test_not_finite_is_not_saved_by_a_signal_either(script, tmp_path, monkeypatch, kind, phase):
    args, (number, update, _) = tiny_args(script.__name__, tmp_path), LATE[script.__name__]
    if phase == "update":
        send_in_update(monkeypatch, script, signal.SIGTERM, update)
        line = poisoned_run(script, args, kind, number)
    else:
        line = poisoned_run(script, args, kind, number, lambda: send(signal.SIGTERM))
    assert "finite" in line and "at step" in line and "\n" not in line
    assert_half_and_finite(script, args, folder_in(tmp_path))


def assert_half_and_finite(script, args, folder):
    """That the checkpoint is the one of half way, and that all of its numbers are finite."""
    state = state_of(folder)
    assert state["step"] == args.total_timesteps // 2
    numbers = [value for value in state.values() if isinstance(value, torch.Tensor | float)]
    assert numbers and all(torch.as_tensor(value).isfinite().all() for value in numbers)


# ---- Read again ----
@pytest.mark.parametrize("name", PPO)
def test_reward_normaliser_goes_on_where_it_was(name, tmp_path):
    rng, script = np.random.default_rng(1), load(name)
    before, after = script.RewardNormaliser(1, 3, 0.9), script.RewardNormaliser(1, 3, 0.9)
    for _ in range(10):
        before(rng.random((1, 3)), rng.random((1, 3)) < 0.2)
    after.load_state_dict(through_file(before.state_dict(), tmp_path))
    before.returns[:] = 0.0  # the episodes under way end with their environments
    rewards = rng.random((5, 1, 3))
    none = np.zeros((1, 3), dtype=bool)
    assert np.array_equal([before(row, none) for row in rewards], [after(row, none) for row in rewards])


def actions_of(script, agent):
    """What an agent does on fixed observations."""
    rng = torch.Generator().manual_seed(1)
    obs = torch.randint(0, 256, (64, *obs_shape_of(script.__name__)), dtype=torch.uint8, generator=rng)
    if script.__name__ == "mdpo":
        return script.act([agent], obs[None], torch.empty(1, 64, 15).exponential_(generator=rng))
    noise = [torch.empty(64, 15).exponential_(generator=rng)] * (script.__name__ in PPO)
    return script.act(agent, obs, *noise)


def test_reloaded_agents_act_the_same(script, tmp_path):
    args = tiny_args(script.__name__, tmp_path, eval_every=0)
    agents = go(script, args)
    state = script.load_checkpoint(folder_in(tmp_path))
    args = script.Args(**state["about"]["args"])
    loaded = script.load_agents(args, state, ScriptedEnvs, make_agent_of(script))
    trained = agents if isinstance(agents, torch.nn.ModuleList) else [agents]
    for before, after in zip(trained, loaded, strict=True):
        assert same(actions_of(script, before), actions_of(script, after))


@pytest.mark.parametrize("name", SCRIPTS)
def test_resume_takes_its_arguments_from_the_run(name, tmp_path, monkeypatch, capsys):
    """Only what does not change learning may differ; the rest is refused by name, and nothing is touched."""
    script = load(name)
    go(script, tiny_args(name, tmp_path, seed=3))
    folder, begun = folder_in(tmp_path), []
    args = script.Args(**script.load_checkpoint(folder)["about"]["args"])
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(script, "train", lambda args, *seams: begun.append(args))
        script.main(["--resume", str(folder), "--total-timesteps", "64"])
    assert begun == [replace(args, seed=3, resume=str(folder), total_timesteps=64)]
    for flag, value in (("--seed", "4"), ("--exact-every", "48"), ("--gamma", "0.5"), ("--exp-name", "other")):
        with pytest.raises(SystemExit) as end:
            script.main(["--resume", str(folder), flag, value, "--total-timesteps", "64"], ScriptedEnvs)
        assert end.value.code == 2 and f"{flag} is" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "spelled", "known"),
    [
        ("mdpo", "BigfishHard-v0", "bigfish"),
        ("ppo_netrand", "Bigfish", "bigfish"),
        ("drq_sam_reset", "ms_pacman", "MsPacman"),
        ("sac_sam_reset", "cartpole_swingup", "cartpole-swingup"),
        ("drqv2_pieg", "cartpole_swingup", "cartpole-swingup"),
    ],
)
def test_a_task_has_one_spelling_and_a_run_goes_on_by_its_own_words(name, spelled, known, tmp_path):
    script = load(name)
    args = tiny_args(name, tmp_path, eval_every=0, env_id=spelled)
    go(script, args)
    folder = folder_in(tmp_path)
    assert folder.name.startswith(f"{known}__")
    assert json.loads((folder / "args.json").read_text())["args"]["env_id"] == known
    flags = ["--resume", str(folder), "--env-id", spelled, "--total-timesteps", str(2 * args.total_timesteps)]
    script.main(flags, ScriptedEnvs, make_agent_of(script))
    assert state_of(folder)["step"] == 2 * args.total_timesteps
