"""What a run leaves behind is whole and enough to go on from, whatever ends it."""

import errno
import itertools
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import (
    ROWS,
    ScriptedEnvs,
    TinyAgent,
    agents_of,
    folder_in,
    load,
    make_agent_of,
    obs_shape_of,
    replace,
    tiny_args,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PPO = [name for name in ROWS if hasattr(load(name), "RewardNormaliser")]
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
LATE = {"mdpo": (20, 6, 20), "ppo_netrand": (10, 6, 10), "drq_sam_reset": (20, 25, 36), "sac_sam_reset": (20, 13, 35)}
LATE["drqv2_pieg"] = (20, 7, 34)
ONE_UPDATE = {"update_epochs": 1, "num_minibatches": 1}  # a gradient's fault is not yet one of the next loss
ONE_UPDATE = dict.fromkeys(("mdpo", "ppo_netrand"), ONE_UPDATE)
ONE_UPDATE |= {name: {"replay_ratio": 1, "sam": False} for name in ("drq_sam_reset", "sac_sam_reset")}
ONE_UPDATE["drqv2_pieg"] = {}


def go(script, args, make_envs=ScriptedEnvs):
    """Trains on scripted environments."""
    return script.train(args, make_envs, make_agent_of(script))


def state_of(path):
    """All that a checkpoint says of a run, without the arguments and how long its log is."""
    state = torch.load(path, weights_only=True)
    return {key: value for key, value in state.items() if key not in ("args", "metrics_bytes", "done")}


def same(a, b):
    """Whether nested states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def rows(folder, most=sys.maxsize):
    """The lines of metrics.csv up to a step, without the one thing that no two runs share."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    return lines[:1] + [x for x in lines[1:] if "charts/SPS" not in x and int(x.split(",")[0]) <= most]


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

        def __init__(self, args, split, restart=0):
            super().__init__(args, split, restart)
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


# ---- Round trips ----
def test_generators_go_on_where_they_were(script, tmp_path):
    rng, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    torch.rand(5, generator=rng), torch.rand(5)
    parts = {"rng": rng, "torch_rng": torch.default_generator}
    state = through_file(script.capture(parts), tmp_path)
    expected = torch.rand(5, generator=rng), torch.rand(5)
    script.restore(parts | {"rng": other}, state)
    assert same(expected, (torch.rand(5, generator=other), torch.rand(5)))


def test_optimizer_goes_on_where_it_was(script, tmp_path):
    def made(seed):
        torch.manual_seed(seed)
        layer = torch.nn.Linear(4, 2)
        return layer, torch.optim.Adam(layer.parameters(), lr=torch.tensor(0.1), eps=1e-5, fused=True)

    def stepped(layer, optimizer):
        optimizer.zero_grad()
        layer(torch.ones(1, 4)).square().sum().backward()
        optimizer.step()
        return list(layer.parameters()), optimizer.param_groups[0]["lr"]

    layer, optimizer = made(1)
    stepped(layer, optimizer)
    optimizer.param_groups[0]["lr"].fill_(0.05)  # as an annealed one would be
    state = through_file(script.capture({"layer": layer, "optimizer": optimizer}), tmp_path)
    expected = stepped(layer, optimizer)
    layer, optimizer = made(2)
    script.restore({"layer": layer, "optimizer": optimizer}, state)
    assert same(expected, stepped(layer, optimizer))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), torch.tensor([1.0, float("-inf")]), torch.tensor(np.nan)])
def test_not_finite_names_what_is_not_at_any_depth(script, bad):
    good = {"step": 1, "name": "x", "none": None, "list": [1.0, (torch.ones(2), torch.ones(2, dtype=torch.uint8))]}
    assert script.not_finite(good) is None
    assert script.not_finite({"bad": bad}) == "bad"
    assert script.not_finite(good | {"list": [1.0, (torch.ones(2), {"deep": bad})]}) == "list.1.1.deep"


@pytest.mark.parametrize("name", PPO)
def test_reward_normaliser_goes_on_where_it_was(name, tmp_path):
    rng, script = np.random.default_rng(1), load(name)
    before, after = script.RewardNormaliser(3, 0.9), script.RewardNormaliser(3, 0.9)
    for _ in range(10):
        before(rng.random(3), rng.random(3) < 0.2)
    after.load_state_dict(through_file(before.state_dict(), tmp_path))
    before.returns[:] = 0.0  # the episodes under way end with their environments
    rewards = rng.random((5, 3))
    none = np.zeros(3, dtype=bool)
    assert np.array_equal([before(row, none) for row in rewards], [after(row, none) for row in rewards])


@pytest.mark.parametrize("name", PPO)
def test_player_goes_on_where_it_was(name, tmp_path):
    script, args = load(name), tiny_args(name, tmp_path)
    kind = [True] if name == "ppo_netrand" else []  # of the iteration: clean

    def made(seed):
        torch.manual_seed(seed)
        return script.Player(ScriptedEnvs(args, "train"), TinyAgent, args, seed, torch.device("cpu"))

    before, after = made(1), made(2)
    torch.rand(3, generator=before.noise_rng)
    for t in range(3):
        reward, done = np.array([1.0, 2.0]), np.array([t == 1, False])
        before.normaliser(reward, done)
        before.count(reward, done, *kind)
    after.load_state_dict(through_file(before.state_dict(), tmp_path))
    assert list(after.finished[True] if kind else after.finished) == [(2.0, 2.0)]
    assert torch.equal(weights([before.agent]), weights([after.agent]))
    assert same(before.normaliser.state_dict(), after.normaliser.state_dict())
    assert torch.equal(torch.rand(3, generator=before.noise_rng), torch.rand(3, generator=after.noise_rng))
    before.begin(ScriptedEnvs(args, "train", 1))
    assert not (before.episode_return.any() or before.episode_length.any() or before.normaliser.returns.any())


# ---- Exact ----
def test_interrupted_and_resumed_equals_uninterrupted(script, tmp_path):
    """Stopped in the last quarter and resumed from half way: weights, optimiser, streams and log, bit for bit."""
    for number, changes in enumerate(VARIANTS.get(script.__name__, [{}])):
        args = tiny_args(script.__name__, tmp_path / f"whole{number}", **changes)
        args = replace(args, total_timesteps=2 * args.total_timesteps, exact_every=args.total_timesteps)
        envs = scripted()
        agents = go(script, args, envs)
        args = replace(args, runs_dir=str(tmp_path / f"part{number}"))
        with pytest.raises(SystemExit):
            go(script, args, scripted(envs.steps * 7 // 8, lambda _: send(signal.SIGTERM)))
        whole, part = folder_in(tmp_path / f"whole{number}"), folder_in(args.runs_dir)
        about = (part / "args.json").read_bytes()
        assert len(rows(part)) > len(rows(part, args.exact_every))  # there is something to cut
        time.sleep(1)  # event files are put in order by the second
        resumed = go(script, replace(args, resume=str(part / "exact.pt")))
        assert torch.equal(weights(agents), weights(resumed)), changes
        assert same(state_of(whole / "checkpoint.pt"), state_of(part / "checkpoint.pt")), changes
        assert rows(whole) == rows(part), changes
        assert events(whole) == events(part)
        assert about == (part / "args.json").read_bytes()


def events(folder):
    """{key: steps} of what TensorBoard shows."""
    shown = EventAccumulator(str(folder)).Reload()
    return {key: [event.step for event in shown.Scalars(key)] for key in shown.Tags()["scalars"]}


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


def test_kill_and_resume_on_the_real_environment(script, start, tmp_path):
    """kill -9, resume, SIGINT: what the last exact checkpoint holds is what an uninterrupted run has there."""
    flags = [*ROWS[script.__name__]["flags"].split(), "--eval-every", "0", "--runs-dir", str(tmp_path / "killed")]
    first = start(*flags, "--total-timesteps", "100000")
    wait_for(first, lambda: list(tmp_path.glob("killed/*/exact.pt")))
    first.kill()
    assert first.wait() == -signal.SIGKILL
    exact = folder_in(tmp_path / "killed") / "exact.pt"
    begun = exact.stat().st_mtime_ns
    second = start("--resume", str(exact))
    wait_for(second, lambda: exact.stat().st_mtime_ns > begun)
    second.send_signal(signal.SIGINT)
    output, _ = second.communicate()
    assert second.returncode == 128 + signal.SIGINT
    assert "bit for bit" in output and f"--resume {exact.parent}" in output and "Traceback" not in output

    step = state_of(exact)["step"]
    args = tyro.cli(script.Args, args=[*flags, "--total-timesteps", str(step)])
    script.train(replace(args, runs_dir=str(tmp_path / "whole")))
    whole = folder_in(tmp_path / "whole")
    assert same(state_of(whole / "exact.pt"), state_of(exact))
    assert rows(whole, step) == rows(exact.parent, step)


def test_a_finished_run_is_not_begun_again(script, tmp_path, capsys):
    """Its last evaluation is in the log once; resumed without more steps it says so, with more it keeps the log."""
    args = tiny_args(script.__name__, tmp_path)
    go(script, args)
    folder = folder_in(tmp_path)
    before = rows(folder)
    with pytest.raises(SystemExit, match=r"^2$"):
        go(script, replace(args, resume=str(folder)))
    assert "raise --total-timesteps" in capsys.readouterr().err
    time.sleep(1)  # event files are put in order by the second
    go(script, replace(args, resume=str(folder), total_timesteps=2 * args.total_timesteps))
    assert rows(folder, args.total_timesteps) == before
    assert sorted(set(steps := events(folder)["eval/test_return"])) == steps


def test_resuming_an_older_checkpoint_gives_up_the_newer_one(script, tmp_path):
    """Ended before its first save, the run goes on from where it was resumed, not from where it had been."""
    args = tiny_args(script.__name__, tmp_path)
    go(script, replace(args, exact_every=args.total_timesteps // 2, total_timesteps=3 * args.total_timesteps // 2))
    folder = folder_in(tmp_path)
    shutil.copy(folder / "exact.pt", folder / "older.pt")
    go(script, replace(args, resume=str(folder), total_timesteps=2 * args.total_timesteps, exact_every=0))
    with pytest.raises(ZeroDivisionError):
        again = replace(args, resume=str(folder / "older.pt"), total_timesteps=3 * args.total_timesteps)
        go(script, again, scripted(1, lambda _: 1 / 0))
    assert same(state_of(folder / "checkpoint.pt"), state_of(folder / "older.pt"))


# ---- Safety saves ----
def test_timed_saves_change_nothing(script, tmp_path):
    saved = []
    envs = scripted(LATE[script.__name__][0], lambda _: saved.extend(tmp_path.glob("timed/*/checkpoint.pt")))
    args = tiny_args(script.__name__, tmp_path / "timed", exact_every=0, save_minutes=1e-9)
    go(script, args, envs)
    go(script, replace(args, save_minutes=0, runs_dir=str(tmp_path / "never")))
    assert saved
    assert same(*(state_of(folder_in(tmp_path / name) / "checkpoint.pt") for name in ("timed", "never")))


def recording(restarts):
    """Scripted environments; the `restart` of each one to train in is kept."""

    def make_envs(args, split, restart=0):
        restarts.extend([restart] if phase_of(args, split) == "train" else [])
        return ScriptedEnvs(args, split, restart)

    return make_envs


def test_resumed_from_a_safety_save_goes_on_in_new_environments(script, tmp_path, capsys):
    args, before, after = tiny_args(script.__name__, tmp_path, exact_every=0), [], []
    go(script, replace(args, total_timesteps=args.total_timesteps // 2), recording(before))
    go(script, replace(args, resume=str(folder_in(tmp_path))), recording(after))
    assert (set(before), set(after)) == ({0}, {1})
    assert "fresh environments" in capsys.readouterr().out
    assert state_of(folder_in(tmp_path) / "checkpoint.pt")["step"] == args.total_timesteps


def test_each_exact_save_begins_new_environments(script, tmp_path):
    args, restarts = tiny_args(script.__name__, tmp_path), []
    go(script, args, recording(restarts))
    assert restarts == sorted(restarts) and set(restarts) == set(range(1 + args.total_timesteps // args.exact_every))


def test_checkpoint_is_the_newest_and_exact_the_newest_exact_one(script, tmp_path):
    args = tiny_args(script.__name__, tmp_path)
    half = args.total_timesteps // 2
    go(script, replace(args, exact_every=2 * half, total_timesteps=3 * half))
    for name, expected in (("checkpoint.pt", (3 * half, False)), ("exact.pt", (2 * half, True))):
        state = state_of(folder_in(tmp_path) / name)
        assert (state["step"], state["exact"]) == expected


# ---- Signals ----
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("phase", ["train", "update", "evaluate"])
def test_signal_saves_at_once_and_ends(script, tmp_path, monkeypatch, capsys, phase, number):
    """While collecting, learning or evaluating: saved, said how to go on, conventional exit code, and it does go on."""
    args, envs = tiny_args(script.__name__, tmp_path), scripted(3, lambda _: send(number), phase)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        updates = send_in_update(patch, script, number, 3 if phase == "update" else None)
        go(script, args, envs)
    folder = folder_in(tmp_path)
    assert end.value.code == 128 + number
    assert f"--resume {folder}" in capsys.readouterr().out.splitlines()[-1]
    assert signal.getsignal(number) == signal.SIG_DFL  # so that a second one ends the program at once
    done = len(updates) if phase == "update" else envs.steps
    # Besides: a second agent's step of the same time, the other updates of the same step.
    assert 3 <= done <= {"train": 4, "update": 2 + getattr(args, "replay_ratio", 1), "evaluate": 3}[phase]
    assert not state_of(folder / "checkpoint.pt")["exact"]
    go(script, replace(args, resume=str(folder)))
    assert state_of(folder / "checkpoint.pt")["step"] == args.total_timesteps


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_second_signal_ends_at_once(script, tmp_path):
    args = tiny_args(script.__name__, tmp_path)
    twice = scripted(3, lambda _: (send(signal.SIGTERM), send(signal.SIGTERM)))
    assert in_child(lambda: go(script, args, twice)) == signal.SIGTERM
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
        patch.setattr(script, "os", Watched(os, on_step, ("fsync", "replace", "open")))
        yield


def at(number, act):
    """Calls `act` when called for that time, counted from 0."""
    count = itertools.count()
    return lambda _: act() if next(count) == number else None


def fill_the_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def half(script, tmp_path):
    """(arguments to go on to the end, folder of a run that is half done, its state, that at the end, steps between)."""
    args = tiny_args(script.__name__, tmp_path / "half", eval_every=0, **ONE_UPDATE[script.__name__])
    go(script, replace(args, total_timesteps=args.total_timesteps // 2))
    folder, steps = folder_in(tmp_path / "half"), []
    end = shutil.copytree(folder, tmp_path / "end")
    with watching_saves(script, steps.append):
        go(script, replace(args, resume=str(end)))
    assert "open write flush fsync replace open fsync" in " ".join(steps)
    assert ("open truncate write flush fsync" in " ".join(steps)) == hasattr(script, "Replay")
    return args, folder, state_of(folder / "checkpoint.pt"), state_of(end / "checkpoint.pt"), steps


def test_full_disk_at_each_step_of_a_save(script, half, tmp_path):
    """One line, exit code 1, and the checkpoint is the one before or the new one, whole."""
    args, folder, old, new, steps = half
    for number, name in enumerate(steps):
        copy = shutil.copytree(folder, tmp_path / str(number))
        with watching_saves(script, at(number, fill_the_disk)), pytest.raises((SystemExit, OSError)) as end:
            go(script, replace(args, resume=str(copy)))
        line = str(end.value)  # what SystemExit prints; the script's last lines do the same for an OSError
        assert "No space left" in line and "\n" not in line, (number, name)
        state = state_of(copy / "checkpoint.pt")
        assert same(state, old) or same(state, new), (number, name)
        assert not list(copy.glob("*.tmp")), (number, name)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_kill_at_each_step_of_a_save(script, half, tmp_path):
    """The checkpoint is the one before or the new one, whole, and the run goes on from it to the same end."""
    args, folder, old, new, steps = half
    for number, name in enumerate(steps):
        copy = shutil.copytree(folder, tmp_path / str(number))
        resumed = replace(args, resume=str(copy))
        with watching_saves(script, at(number, lambda: send(signal.SIGKILL))):
            assert in_child(lambda resumed=resumed: go(script, resumed)) == signal.SIGKILL, (number, name)
        state = state_of(copy / "checkpoint.pt")
        assert same(state, old) or same(state, new), (number, name)
        if same(state, old):
            go(script, resumed)
        assert same(state_of(copy / "checkpoint.pt"), new), (number, name)


def test_full_disk_under_the_log(script, tmp_path, monkeypatch):
    """A row of metrics.csv that cannot be written ends the program with one line, whatever it was doing."""
    real_open, fault = open, at(1, fill_the_disk)  # the second thing written, after the header

    def full(path, *args, **kwargs):
        file = real_open(path, *args, **kwargs)
        return Watched(file, fault, ("write",)) if Path(str(path)).name == "metrics.csv" else file

    flags = [*ROWS[script.__name__]["flags"].split(), "--eval-every", "0", "--runs-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags])
    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script.__file__, run_name="__main__")
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
    assert re.search(rf"{name} is nan at step {args.total_timesteps}", line) and "\n" not in line
    state = script.load_checkpoint(folder_in(tmp_path))
    assert state["step"] == args.total_timesteps // 2 and script.not_finite(state) is None
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
    state = script.load_checkpoint(folder_in(tmp_path))
    assert state["step"] == args.total_timesteps // 2 and script.not_finite(state) is None


# ---- Read again ----
def actions_of(script, agent):
    """What an agent does on fixed observations."""
    rng = torch.Generator().manual_seed(1)
    obs = torch.randint(0, 256, (64, *obs_shape_of(script.__name__)), dtype=torch.uint8, generator=rng)
    noise = [torch.empty(64, 15).exponential_(generator=rng)] * (script.__name__ in PPO)
    return script.act(agent, obs, *noise)


def test_reloaded_agents_act_the_same(script, tmp_path):
    args = tiny_args(script.__name__, tmp_path, eval_every=0)
    agents = go(script, args)
    loaded = agents_of(script, script.load_checkpoint(folder_in(tmp_path)), make_agent_of(script))
    for before, after in zip(agents if isinstance(agents, list) else [agents], loaded, strict=True):
        assert same(actions_of(script, before), actions_of(script, after))


def test_resume_takes_its_arguments_from_the_checkpoint(script, tmp_path, monkeypatch, capsys):
    """Only what does not change learning may differ; the rest is refused by name, and nothing is touched."""
    go(script, tiny_args(script.__name__, tmp_path, seed=3))
    folder, begun = folder_in(tmp_path), []
    args = script.Args(**script.load_checkpoint(folder)["args"])
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(script, "train", lambda args, *seams: begun.append(args))
    monkeypatch.setattr(sys, "argv", [script.__file__, "--resume", str(folder), "--total-timesteps", "64"])
    script.main()
    assert begun == [replace(args, seed=3, resume=str(folder), total_timesteps=64)]
    for flag, value in (("--seed", "4"), ("--exact-every", "48")):
        monkeypatch.setattr(sys, "argv", [script.__file__, "--resume", str(folder), flag, value])
        with pytest.raises(SystemExit) as end:
            script.main()
        assert end.value.code == 2 and flag in capsys.readouterr().err
    assert len(begun) == 1
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
