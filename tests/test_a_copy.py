"""A copy of a script with some lines changed is a script like the others, wherever it lies."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

CHANGES = {  # ten lines of mdpo.py: the KL the other way round, a narrower network, a flag, a log key
    "log_probs, peer_log_probs = logits.log_softmax(-1), peer_logits.log_softmax(-1)": (
        "peer_log_probs, log_probs = logits.log_softmax(-1), peer_logits.log_softmax(-1)"
    ),
    "nn.Linear(2048, 256), nn.ReLU())  # [B, 256]": "nn.Linear(2048, 128), nn.ReLU())  # [B, 128]",
    "orthogonal(nn.Linear(256, int(envs.single_action_space.n)), gain=0.01)": (
        "orthogonal(nn.Linear(128, int(envs.single_action_space.n)), gain=0.01)"
    ),
    "orthogonal(nn.Linear(256, 1), gain=1.0)": "orthogonal(nn.Linear(128, 1), gain=1.0)",
    "    distill_coef: float = 1.0 ": (
        "    temperature: float = 1.0  # divides the logits that are matched\n    distill_coef: float = 1.0 "
    ),
    "distillation_loss(logits, peer_logits)\n": (
        "distillation_loss(logits / args.temperature, peer_logits / args.temperature)\n"
    ),
    'parts["clipfrac"] =': 'parts["ratio"] = log_ratio.exp().mean()\n    parts["clipfrac"] =',
}
FLAGS = "--env-id bossfight --distribution-mode easy --num-envs 2 --num-steps 8 --num-minibatches 2 --update-epochs 1"
FLAGS += " --eval-every 32 --eval-episodes 2 --final-eval-episodes 2 --exact-every 32 --temperature 2"


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False], ids=["in algos", "elsewhere"])
def test_a_copy_does_all_that_a_script_does(inside, tmp_path):
    """Trains, resumes, is evaluated, filmed, measured, timed and plotted, by the script in its run's folder."""
    source = (ROOT / "algos" / "mdpo.py").read_text()
    for old, new in CHANGES.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    home = tmp_path / "repository"  # what a user has, with a file more
    shutil.copytree(ROOT / "benchmark", home / "benchmark", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "algos", home / "algos", ignore=shutil.ignore_patterns("__pycache__"))
    mine = home / "algos" / "mine.py" if inside else tmp_path / "elsewhere" / "mine.py"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text(source)

    def run(*words, cwd=home):
        done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(mine, *FLAGS.split(), "--total-timesteps", 32, "--runs-dir", tmp_path / "runs")
    (folder,) = (tmp_path / "runs").iterdir()
    assert "bit for bit" in run(mine, "--resume", folder, "--total-timesteps", 64)
    assert (folder / "mine.py").read_text() == source
    assert json.loads((folder / "args.json").read_text())["args"]["temperature"] == 2
    assert "losses/ratio" in (folder / "metrics.csv").read_text()
    mine.unlink()  # what follows goes by the copy in the run's folder

    analyses, tables = home / "benchmark" / "analyses", home / "benchmark" / "tables"
    assert "test" in run(analyses / "evaluate.py", folder)
    film = tmp_path / "film.gif"
    run(analyses / "record.py", folder, "--steps", 3, "--rows", 1, "--columns", 2, "--out", film)
    run(analyses / "robustness.py", folder, "--episodes", 1, "--steps", 3, "--draws", 2, "--out", tmp_path / "kl.csv")
    run(analyses / "tsne.py", folder, "--versions", 12, "--step", 2, "--perplexity", 4, "--out", tmp_path / "tsne.png")
    speed = ["--iterations", 1, "--out", tmp_path / "speed.csv", f"--flags={FLAGS}"]
    run(home / "benchmark" / "throughput.py", folder / "mine.py", *speed)
    run(tables / "collect.py", tmp_path / "runs", "--out", tmp_path / "curves.csv")
    run(tables / "plot_curves.py", tmp_path / "curves.csv", "--out", tmp_path / "curves.png")
    for name in ("film.gif", "kl.csv", "tsne.png", "speed.csv", "curves.png"):
        assert (tmp_path / name).stat().st_size > 0
    with open(tmp_path / "curves.csv") as file:
        rows = list(csv.DictReader(file))
    assert {(row["method"], row["suite"], row["task"]) for row in rows} == {("mine", "procgen-easy", "bossfight")}
    assert {int(row["step"]) for row in rows if row["key"] == "eval/test_return"} == {32, 64}


def test_a_copy_in_algos_is_the_users_own():
    """No test names the scripts by what lies in algos/, so that a file more breaks none."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text()
        assert path.name == Path(__file__).name or 'algos").glob(' not in text, path.name
