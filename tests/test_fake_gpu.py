"""The scripts' way through a GPU, on a fake one (fake_gpu.py): all of `train`, captured and not, and what it moves."""

import csv
import functools
import json
import os
import subprocess
import sys

import gpu
import pytest
import throughput
import torch
from conftest import ROOT, SCRIPTS, ScriptedEnvs
from runs import assert_refuses

VARIANTS = {
    "mdpo": [
        {"eval_every": 16, "anneal_lr": True},
        {"num_agents": 1, "precision": "bf16", "policy_loss": "spo"},
        {"distill_coef": 0.0, "cuda_graphs": False},
    ],
    # A uniform random number that is read back is 0.5, so one iteration is as the others.
    "ppo_netrand": [
        {"eval_every": 16, "clean_prob": 0.0, "anneal_lr": True, "anneal_clip": True, "plain_look": True},
        {"clean_prob": 1.0, "precision": "bf16"},
        {"clean_prob": 1.0, "clean_mode": "identity", "cuda_graphs": False},
        {"netrand": False},
    ],
    "drq_sam_reset": [
        {"eval_every": 16},
        {"sam_scope": "head", "sam_noise": "reuse", "reset_optimizer": "head", "precision": "bf16"},
        {"sam": False, "augment": False, "cuda_graphs": False},
    ],
    "sac_sam_reset": [
        {"eval_every": 16},
        {"sam_on": "actor", "precision": "bf16"},
        {"sam": False, "cuda_graphs": False},
    ],
    "drqv2_pieg": [
        {"eval_every": 16, "precision": "bf16"},
        {"strong_augmentation": "conv", "batch_norm": "fixed"},
        {"encoder": "drqv2", "strong_augmentation": "none", "cuda_graphs": False},
    ],
}
# So short that all is captured and replayed a few times: a fake operation takes Python half a millisecond.
SHORT = {"total_timesteps": 16, "eval_every": 0}
LEAST = {"mdpo": {"update_epochs": 3}, "ppo_netrand": {"update_epochs": 3}}
# Copies to the GPU and from it per step of a captured run: observations and actions, then what an off-policy update
# needs, a transition, and the frame after an episode's end, every third step. PPO has two environments here, and its
# noise, rewards and episodes' ends go once per rollout.
COPIES = {
    "mdpo": (1.0, 0.7),
    "ppo_netrand": (1.0, 0.7),
    "drq_sam_reset": (1 + 5 * 2 + 1, 1),
    "sac_sam_reset": (2 + 3 + 2.4, 1),
    "drqv2_pieg": (2 + 5 / 2 + 2.4, 1),
}
MUTANTS = {
    "a tensor made on the CPU": ("mdpo", "(share / len(agents) * loss)", "(loss * torch.ones(1)).sum()"),
    "arange without a device": (
        "drq_sam_reset",
        'len(batch["actions"]), device=offsets.device',
        'len(batch["actions"])',
    ),
    "a value that is no buffer": ("drq_sam_reset", 'self.register_buffer("support", ', "self.support = ("),
    "float() in update": ("mdpo", 'parts["clipfrac"] = (', 'parts["clipfrac"] = float(loss) * ('),
    "a number of the CPU's in a graph": (
        "sac_sam_reset",
        "alpha * next_log_probs)",
        "torch.tensor(0.1) * next_log_probs)",
    ),
}


def on_a_fake_gpu(*jobs):
    """What fake_gpu.py prints of pairs of a script and changes, in a process of its own: torch notices a GPU once."""
    command = [sys.executable, str(ROOT / "tests" / "fake_gpu.py"), json.dumps(jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_on_a_gpu(name):
    """Each variant, one that goes on from a checkpoint of the CPU's, and what a step moves between host and GPU.

    The last is from the difference between two lengths, which leaves out what a run does once.
    """
    path, short = f"algos/{name}.py", SHORT | LEAST.get(name, {})
    variants = [short | variant for variant in [*VARIANTS[name], {"resumed": True}]]
    plain = short | {"exact_every": 0, "save_minutes": 0} | ({"reset_every": 0} if "sam" in name else {})
    found = on_a_fake_gpu(*([path, changes] for changes in [*variants, plain, plain | {"total_timesteps": 32}]))
    for variant, counts in zip(variants, found[:-2], strict=True):
        captured = variant.get("cuda_graphs", True)
        assert "error" not in counts, (variant, counts)
        assert counts["launches"] > 100 and (counts.get("replays", 0) > 4) == captured, variant
        assert counts.get("graphs", 0) == 2 * captured, variant  # acting and learning
    for way, most in zip(("to_gpu_copies", "to_cpu_copies"), COPIES[name], strict=True):
        assert (found[-1][way] - found[-2][way]) / 16 <= most, way


def test_what_a_gpu_would_refuse_is_refused(tmp_path):
    jobs = []
    for number, (name, old, new) in enumerate(MUTANTS.values()):
        text = (ROOT / "algos" / f"{name}.py").read_text()
        assert text.count(old) == 1
        path = tmp_path / str(number) / f"{name}.py"
        path.parent.mkdir()
        path.write_text(text.replace(old, new))
        jobs.append([str(path), SHORT])
    errors = dict(zip(MUTANTS, on_a_fake_gpu(*jobs), strict=True))
    print(json.dumps(errors, indent=1))
    assert all("error" in found for found in errors.values()), errors


# ---- benchmark/gpu.py ----
TABLE = """
import sys
from pathlib import Path

sys.path[:0] = [sys.argv[1] + "/tests", sys.argv[1] + "/benchmark"]
import fake_gpu
import gpu
from conftest import ScriptedEnvs

rows = []
path, flags = sys.argv[1] + "/algos/mdpo.py", "--num-envs 4 --num-steps 8 --num-minibatches 2 --update-epochs 2"
for graphs in (False, True):
    with fake_gpu.fake_gpu():
        row, digest = gpu.measure(path, "tf32", graphs, flags.split(), ScriptedEnvs, limit=0.1)
    rows.append(row | {"same_weights": bool(digest), "resumed": True})
gpu.write(sys.argv[2], rows)
gpu.show(rows)
"""


@pytest.mark.slow
def test_the_table_is_filled(tmp_path):
    path = tmp_path / "gpu.csv"
    command = [sys.executable, "-c", TABLE, str(ROOT), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()[-3:]
    assert lines[0].split()[:4] == ["script", "precision", "graphs", "steps/s"]
    assert [line.split()[:3] for line in lines[1:]] == [["mdpo", "tf32", "no"], ["mdpo", "tf32", "yes"]]
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row["steps_per_second"]) > 0 and float(row["ms_per_update"]) > 0
        assert sum(float(row[phase]) for phase in throughput.PHASES if phase != "evaluation") == pytest.approx(1)
        assert "--precision tf32" in row["command"] and row["hardware"].startswith("a fake GPU") and row["packages"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "obs_shape"), [("mdpo", (3, 64, 64)), ("sac_sam_reset", (3, 64, 64))])
def test_a_resume_on_another_device(name, obs_shape):
    """Here the CPU stands for both."""
    make_envs = functools.partial(ScriptedEnvs, obs_shape=obs_shape)
    assert gpu.resumes(str(ROOT / "algos" / f"{name}.py"), make_envs=make_envs)


def test_timing_the_bare_network_leaves_the_weights_alone():
    """Those that are compared are from before it, and the same in each run."""
    flags = ["--num-envs", "4", "--num-steps", "8", "--num-minibatches", "2", "--update-epochs", "1", "--no-cuda"]
    digests = set()
    for limit in (0.0, 0.2):
        _, weights = throughput.iterate("algos/mdpo.py", flags, 10, 1, lambda _: None, ScriptedEnvs, limit)
        digests.add(gpu.digest(weights))
    assert len(digests) == 1


def test_a_command_is_given_its_time(tmp_path):
    assert gpu.finished([sys.executable, "-c", "print('{}')"], 60) == ("{}\n", True)
    assert gpu.finished([sys.executable, "-c", "import sys; sys.exit(3)"], 60) == ("", False)
    code = "import time; print('{}', flush=True); time.sleep(60)"
    assert gpu.finished([sys.executable, "-c", code], 2) == ("{}\n", False)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refuses(gpu, monkeypatch, capsys, [], "torch finds no GPU here")
