"""benchmark/throughput.py: commands take turns, and what is printed and saved is what was measured."""

import csv
import importlib.util
import shlex
import subprocess
import sys
import time

import pytest
from conftest import ROOT, ROWS, SCRIPTS

spec = importlib.util.spec_from_file_location("throughput", ROOT / "benchmark" / "throughput.py")
throughput = importlib.util.module_from_spec(spec)
spec.loader.exec_module(throughput)

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


def test_limit_fraction():
    """Ten updates in five seconds, where the bare network needs 0.4 s for one: 0.8 of the limit."""
    rows = [{"updates": 4, "phases": {"update": 2.0}}, {"updates": 6, "phases": {"update": 3.0}}]
    assert throughput.limit_fraction(rows, {"limit_seconds": 0.4}) == pytest.approx(0.8)


@pytest.mark.parametrize("flags", ["--iterations 0", "--steps 0", "--references python", None])
def test_wrong_arguments(flags, monkeypatch, capsys):
    flags = f"algos/mdpo.py {flags}" if flags else "nowhere.py"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["throughput.py", *flags.split()])
    with pytest.raises(SystemExit, match=r"^2$"):
        throughput.main()
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_beside_a_reference(name, tmp_path):
    (tmp_path / "counter.py").write_text(COUNTER)
    reference = shlex.join([sys.executable, str(tmp_path / "counter.py"), str(tmp_path / "count"), "9"])
    command = [sys.executable, "benchmark/throughput.py", f"algos/{name}.py", f"--flags={ROWS[name]['flags']}"]
    command += ["--references", f"counter={reference}", "--iterations", "2", "--steps", "5"]
    command += ["--out", str(tmp_path / "speed.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "speed.csv").open()))
    assert [(row["name"], row["iteration"]) for row in rows] == [
        (f"{name}.py", "1"),
        (f"{name}.py", "2"),
        ("counter", "1"),
        ("counter", "2"),
    ]
    for row in rows[:2]:
        phases = {phase: float(row[phase]) for phase in throughput.PHASES}
        assert min(phases.values()) >= 0 and phases["environments"] and phases["inference"] and phases["update"]
        assert sum(phases.values()) <= float(row["seconds"]) + 0.01
        assert row["commit"] and row["command"] == f"python algos/{name}.py {ROWS[name]['flags']}"
    for row in rows:
        assert float(row["steps_per_second"]) == pytest.approx(int(row["steps"]) / float(row["seconds"]))
        assert row["precision"] == ("fp32" if row["commit"] else "") and row["hardware"]
    for word in ("counter", "environments", "inference", "update", "evaluation", "rest", "bare network"):
        assert word in done.stdout
