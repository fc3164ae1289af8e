"""benchmark/throughput.py: commands take turns, and what is printed and saved is what was measured."""

import csv
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import throughput
import torch
from conftest import ROOT, ROWS
from runs import assert_refuses, changed_copy

COUNTER = """
import sys, time
for i in range(int(sys.argv[2])):
    time.sleep(0.5)
    open(sys.argv[1], "a").write(f"{i}\\n")
    print("noise\\nSPS:", i)
print("last words", file=sys.stderr)
"""


@pytest.fixture
def job(tmp_path):
    """Makes a reference that counts its iterations in a file: the job, and how far it has come."""
    jobs = []
    (tmp_path / "counter.py").write_text(COUNTER)

    def made(name, iterations=100):
        path = tmp_path / name
        jobs.append(
            throughput.Job(name, [sys.executable, str(tmp_path / "counter.py"), str(path), str(iterations)], "^SPS:")
        )
        return jobs[-1], lambda: len(path.read_text().splitlines()) if path.exists() else 0

    yield made
    for one in jobs:
        one.end()


def test_a_command_runs_in_its_turn_and_only_then(job):
    (first, first_count), (second, second_count) = job("first"), job("second")
    time.sleep(1)
    assert first_count() == second_count() == 0
    first.turn()
    first.turn()
    second.turn()
    counts = first_count(), second_count()
    assert counts == (2, 1)
    time.sleep(1.2)
    assert counts == (first_count(), second_count())
    assert [row["iteration"] for row in first.turns] == [0, 1]
    assert all(row["seconds"] > 0 and row["others"] >= 0 and row["peak_gb"] > 0 for row in first.turns)
    first.end()
    assert first.process.poll() == -9


def test_a_command_that_ends_too_early_is_an_error(job, capsys):
    short, _ = job("short", iterations=1)
    short.turn()
    with pytest.raises(SystemExit, match=r"^1$"):
        short.turn()
    error = capsys.readouterr().err
    assert "error: short ended with code 0 before the end of iteration 1" in error and "last words" in error


def test_a_phase_within_another_is_the_outer_ones(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(throughput, "now", lambda: next(ticks))
    clock = throughput.Clock()  # 0
    step = clock.timed("environments", lambda: None)
    clock.timed("evaluation", lambda: [step(), step()])()  # 1 to 2
    step()  # 3 to 4
    clock.timed("update", lambda: None)()  # 5 to 6
    phases = {"environments": 1, "inference": 0, "update": 1, "evaluation": 1, "rest": 4}
    assert clock.read() == {"phases": phases, "updates": 1}  # 7


def test_what_is_captured_belongs_to_what_it_calls(monkeypatch):
    """Also when a CUDA graph is replayed, which calls nothing; and what calls neither is the rest."""
    ticks = iter(range(100))
    monkeypatch.setattr(throughput, "now", lambda: next(ticks))
    clock = throughput.Clock()  # 0
    parts = {"act": clock.timed("inference", lambda x: x), "update": clock.timed("update", lambda x: x)}
    parts["other"] = lambda x: x

    class Captured:
        def __init__(self, name):
            self.name, self.calls = name, 0

        def __call__(self, x):
            self.calls += 1
            return parts[self.name](x) if self.calls == 1 else x

    monkeypatch.setattr(Captured, "__call__", clock.timed(None, Captured.__call__))
    captured = {name: Captured(name) for name in parts}
    for _ in range(3):
        for name in ("act", "update", "update", "other"):
            assert captured[name](name) == name  # a tick before and one after
    found = clock.read()
    assert found["updates"] == 6
    assert found["phases"] == {"environments": 0, "inference": 3, "update": 6, "evaluation": 0, "rest": 16}  # of 25


def test_the_networks_that_an_update_calls_are_noted():
    """Those of its first call, not their parts, and whether they learn."""
    torch.manual_seed(0)
    one, two = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()), torch.nn.Linear(4, 1)
    calls, x = [], torch.ones(2, 3)

    def update(x, scale=1):
        with torch.no_grad():
            one(x)
        return two(one(x)) * scale

    noting = throughput.noting_calls(update, calls)
    assert torch.equal(noting(x, scale=2), noting(x, scale=2))
    assert [(network, learns) for network, _, learns in calls] == [(one, False), (one, True), (two, True)]
    assert torch.equal(calls[0][1][0], x) and torch.equal(calls[2][1][0], one(x))
    assert not torch.nn.modules.module._global_forward_hooks
    weights = two.weight.clone()
    assert 0 < throughput.limit_seconds(calls, 0.1) < 1
    assert not torch.equal(two.weight, weights), "a step of Adam is taken"


def test_limit_fraction():
    """Ten updates in five seconds, where the bare network needs 0.4 s for one: 0.8 of the limit."""
    rows = [{"updates": 4, "phases": {"update": 2.0}}, {"updates": 6, "phases": {"update": 3.0}}]
    assert throughput.limit_fraction(rows, {"limit_seconds": 0.4}) == pytest.approx(0.8)


def test_wrong_arguments(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    mdpo = "algos/mdpo.py"
    for flags, says in (
        (["nowhere.py"], "a script that exists"),
        ([mdpo, "--iterations", 0], "--iterations and --steps of at least 1"),
        ([mdpo, "--steps", 0], "--iterations and --steps of at least 1"),
        ([mdpo, "--references", "python"], "--references python: NAME=COMMAND"),
        ([mdpo, "--out", tmp_path / "speed.txt"], "speed.txt: not a .csv file"),
    ):
        assert_refuses(throughput, monkeypatch, capsys, flags, says)


def test_a_scripts_own_error_is_shown(tmp_path):
    command = [sys.executable, "benchmark/throughput.py", "algos/mdpo.py", "--flags=--env-id pong"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pong: no such game" in done.stderr and "error: mdpo.py ended with code 2" in done.stderr


@pytest.mark.slow
def test_a_changed_copy_beside_a_reference(tmp_path):
    assert_timed(changed_copy("mdpo", tmp_path / "mine.py"), "mdpo", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_netrand", "drq_sam_reset", "sac_sam_reset", "drqv2_pieg"])
def test_a_script_beside_a_reference(name, tmp_path):
    assert_timed(f"algos/{name}.py", name, tmp_path)


def assert_timed(script, name, tmp_path):
    """That the program times two iterations of a script and of a reference that counts to nine."""
    (tmp_path / "counter.py").write_text(COUNTER)
    reference = shlex.join([sys.executable, str(tmp_path / "counter.py"), str(tmp_path / "count"), "9"])
    command = [sys.executable, "benchmark/throughput.py", str(script), f"--flags={ROWS[name]['flags']}"]
    command += ["--references", f"counter={reference}", "--iterations", "2", "--steps", "5"]
    command += ["--out", str(tmp_path / "speed.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "speed.csv").open()))
    own = Path(script).name
    assert [(row["name"], row["iteration"]) for row in rows] == [
        (own, "1"),
        (own, "2"),
        ("counter", "1"),
        ("counter", "2"),
    ]
    for row in rows[:2]:
        phases = {phase: float(row[phase]) for phase in throughput.PHASES}
        assert min(phases.values()) >= 0 and phases["environments"] and phases["inference"] and phases["update"]
        assert sum(phases.values()) <= float(row["seconds"]) + 0.01
        assert row["command"] == f"python {script} {ROWS[name]['flags']}"
    for row in rows:
        assert float(row["steps_per_second"]) == pytest.approx(int(row["steps"]) / float(row["seconds"]))
        assert row["precision"] == ("fp32" if row["name"] == own else "") and row["hardware"]
    for word in ("counter", "environments", "inference", "update", "evaluation", "rest", "bare network"):
        assert word in done.stdout
