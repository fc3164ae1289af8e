"""What the tests of benchmark/analyses/ share: tiny runs, and programs run as by their command lines."""

import subprocess
import sys

import pytest
from conftest import ROOT, ROWS, folder_in


def tiny_run(name, runs_dir, *flags, script=None):
    """The folder of a run of a script, or of a copy of it, without evaluations."""
    flags = [*ROWS[name]["flags"].split(), "--eval-every", "0", "--runs-dir", str(runs_dir), *flags]
    command = [sys.executable, str(script or ROOT / "algos" / f"{name}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder_in(runs_dir)


def run(program, monkeypatch, *flags):
    """Calls a program's main with these flags."""
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, flags)])
    program.main()


def assert_refuses(program, monkeypatch, capsys, flags, says):
    """That a program ends with exit code 2 and one line that says why."""
    with pytest.raises(SystemExit, match=r"^2$"):
        run(program, monkeypatch, *flags)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1, error
