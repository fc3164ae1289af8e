"""benchmark/common.py: a run is loaded with the script of its folder, or the program ends with one line."""

import json
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import common

SCRIPT = """
from dataclasses import dataclass


@dataclass
class Args:
    env_id: str = "maze"
    seed: int = 1
    exp_name: str = "idea"
    width: int = 3
    sizes: tuple[int, ...] = ()


def make_envs(args, split, start=0):
    return "environments"


class Agent:
    pass


def load_agents(args, state, make_envs, make_agent):
    if state["weights"] != args.width:
        raise RuntimeError("size mismatch\\nmore")
    return [make_envs, make_agent]
"""


@pytest.fixture
def folder(tmp_path):
    """The folder of a run of mine.py, which is nowhere else."""
    folder = tmp_path / "a=b"
    folder.mkdir()
    (folder / "mine.py").write_text(SCRIPT)
    args = {"env_id": "miner", "seed": 4, "exp_name": "idea", "width": 3, "sizes": [1, 2]}
    about = {"command": ["mine.py"], "args": args, "commit": "c0ffee", "hardware": {}, "packages": {}}
    (folder / "args.json").write_text(json.dumps(about))
    torch.save({"script": "mine", "step": 7, "weights": 3}, folder / "checkpoint.pt")
    return folder


def fails(capsys, function, *values, **more):
    """The line that a program ends with."""
    with pytest.raises(SystemExit, match=r"^2$"):
        function(*values, **more)
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


def test_a_run_has_the_script_of_its_folder(folder):
    run = common.load_run(folder, seed=5)
    assert run.script.__file__ == str(folder / "mine.py")
    assert (run.args.env_id, run.args.seed, run.args.sizes) == ("miner", 5, (1, 2))
    source = {"method": "idea", "suite": "other", "task": "miner", "seed": 5, "step": 7, "commit": "c0ffee"}
    assert run.source() == source
    assert run.agents() == [run.script.make_envs, run.script.Agent]
    assert run.agents("theirs", "another") == ["theirs", "another"]


def test_a_name_before_the_folder_is_the_methods(folder):
    """A folder may have = in its own name, as this one has."""
    assert common.load_run(folder).method == "idea"
    assert common.load_run(f"PPO={folder}").method == "PPO"


def test_each_script_is_a_module_of_its_own(folder):
    one, two = common.load_script(folder / "mine.py"), common.load_script(folder / "mine.py")
    assert one is not two and one.Args is not two.Args and one.__name__ != two.__name__
    assert sys.modules[one.__name__] is one


def test_a_folder_that_is_no_run(folder, capsys):
    nowhere = folder / "nowhere"
    error = fails(capsys, common.load_run, nowhere)
    assert f"{nowhere} is no folder of a run: args.json: No such file or directory" in error
    (folder / "args.json").write_text("{")
    assert f"{folder}: args.json cannot be read: " in fails(capsys, common.load_run, folder)
    for text in ("[]", '{"args": {}}'):
        (folder / "args.json").write_text(text)
        assert "is of no run, or of one of another version" in fails(capsys, common.load_run, folder)


def test_a_run_without_a_checkpoint(folder, capsys):
    (folder / "checkpoint.pt").write_bytes(b"cut short")
    assert "checkpoint.pt cannot be read: " in fails(capsys, common.load_run, folder)
    (folder / "checkpoint.pt").unlink()
    assert f"{folder} has no checkpoint.pt yet" in fails(capsys, common.load_run, folder)


def test_a_run_of_another_version(folder, capsys):
    expected = f"{folder} is a run of another version of mine.py"
    assert f"{expected}: " in fails(capsys, common.load_run, folder, no_such_argument=1)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(state | {"args": {}}, folder / "checkpoint.pt")  # as before args.json held them alone
    assert expected in fails(capsys, common.load_run, folder)
    torch.save(state, folder / "checkpoint.pt")
    (folder / "mine.py").unlink()
    assert f"{folder} has no mine.py, the script that" in fails(capsys, common.load_run, folder)


def test_weights_of_another_network(folder, capsys):
    run = common.load_run(folder, width=4)
    assert fails(capsys, run.agents) == f"error: {folder} was not trained by mine.py alone: size mismatch\n"


def test_scripts_by_name_and_by_path(capsys):
    assert common.find_script("ppo-netrand") == common.find_script("ppo_netrand") == ROOT / "algos" / "ppo_netrand.py"
    assert str(common.find_script("elsewhere/mine.py")) == "elsewhere/mine.py"
    assert "no script 'nothing', there are: " in fails(capsys, common.find_script, "nothing")
    assert "nothing.py: no such script" in fails(capsys, common.load_script, "nothing.py")


def test_outputs_are_checked_before_any_work(tmp_path, capsys):
    common.check_out(tmp_path / "a.csv", ".png", ".csv")
    assert not (tmp_path / "a.csv").exists()
    (tmp_path / "b.csv").write_text("kept")
    common.check_out(tmp_path / "b.csv", ".csv")
    assert (tmp_path / "b.csv").read_text() == "kept"
    (tmp_path / "c.csv").mkdir()
    error = fails(capsys, common.check_out, tmp_path / "c.csv", ".csv")
    assert error == f"error: {tmp_path}/c.csv cannot be written: Is a directory\n"
    for path in (tmp_path / "a.txt", tmp_path / "no" / "a.csv"):
        error = fails(capsys, common.check_out, path, ".png", ".csv")
        assert error == f"error: {path}: not a .png or .csv file in a folder that exists\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyboardInterrupt(), "stopped at once; what "), (OSError(28, "No space left"), r"error: \[Errno 28\] No space")],
)
def test_a_program_that_trains_ends_with_a_line(error, said, monkeypatch):
    monkeypatch.setattr("threading.excepthook", None)

    def program(name):
        assert name == "a"
        raise error

    with pytest.raises(SystemExit, match=said):  # a text, so exit code 1
        common.run(program, "a")


def test_commands_without_the_folder_of_runs():
    command = ["a.py", "--runs-dir", "x", "--seed", "1", "--runs-dir=y", "--runs_dir", "z", "--exp_name=a_b"]
    assert common.without_runs_dir(command) == ["a.py", "--seed", "1", "--exp_name=a_b"]


def test_one_spelling_of_a_task():
    assert common.plain("MsPacman") == common.plain("ms_pacman") == "mspacman"
    assert common.plain("ball_in_cup-catch") == common.plain("ball_in_cup_catch")
