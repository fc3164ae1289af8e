"""What a user can get wrong ends the program with exit code 2 and one line, before the first step, on a clean disk."""

import ctypes
import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
import unittest.mock

import pytest
import torch
from conftest import ROWS, SCRIPTS, ScriptedEnvs, load, make_agent_of, replace, tiny_args

PROCGEN = ["mdpo", "ppo_netrand"]  # the scripts that draw with EnvPool's Procgen
GAMES = "bigfish bossfight caveflyer chaser climber coinrun dodgeball fruitbot heist jumper leaper maze miner ninja"
GAMES += " plunder starpilot"

# (flags, what the error's line says); @ is the folder that `runs` fills.
EVERY_SCRIPT = [
    ("--seed -1", "--seed -1: from"),
    ("--total-timesteps -1", "--total-timesteps -1: from"),
    ("--save-minutes nan", "--save-minutes nan: from"),
    ("--save-minutes inf", "--save-minutes inf: from"),
    ("--exact-every -1", "--exact-every -1: from"),
    ("--eval-every -1", "--eval-every -1: from"),
    ("--eval-episodes 0", "--eval-episodes 0: from"),
    ("--final-eval-episodes -1", "--final-eval-episodes -1: from 0\n"),
    ("--track", "--track: pip install wandb"),
    ("--cuda-required", "--cuda-required: torch finds no GPU here"),
    ("--env-id nowhere", "--env-id nowhere: no such"),
    ("--resume @/nowhere", "nowhere is no run that can be read: [Errno 2] No such file"),
    ("--resume @/run/checkpoint.pt", "checkpoint.pt is no run that can be read: [Errno 20] Not a directory"),
    ("--resume @/text", "text is no run that can be read: "),
    ("--resume @/cut", "cut is no run that can be read: "),
    ("--resume @/list", "list is no run that can be read: "),
    ("--resume @/other", "other is no run that can be read: it is a run of other.py"),
    ("--resume @/older", "older is a run of another version of"),
    ("--resume @/run", "is finished at step"),
    ("--resume @/run --total-timesteps 99 --seed 2", "--seed is 1 in that run and stays so"),
    ("--resume @/run --total-timesteps 99 --exact-every 8", "--exact-every is"),
    ("--resume @/run --total-timesteps 99 --gamma 0.5", "--gamma is 0.9"),
    ("--resume @/run --total-timesteps 99 --precision bf16", "--precision is fp32 in that run and stays so"),
    ("--exp-name a/b", "--exp-name 'a/b': is part of a folder's name"),
    ("--seed 99999999999999999999", "--seed 99999999999999999999: from 0 to 9223372036854775807"),
    ("--resume @/logless", "logless is no run that can be read: [Errno 2] No such file"),
    ("--resume @/cut_log", "cut_log is no run that can be read: metrics.csv has lost lines since the checkpoint"),
    ("--runs-dir @/text.pt", "cannot be written"),
    ("--runs-dir @/text.pt/deeper", "cannot be written"),
]
ONE_SCRIPT = {
    "mdpo": [
        ("--total-timesteps 0", "--total-timesteps 0: from"),
        ("--env-id bigfsh", "--env-id bigfsh: no such game; there are " + GAMES),
        ("--env-id Minor-v0", "--env-id Minor-v0: no such game; there are " + GAMES),
        ("--env-id BigfishMedium-v0", "--env-id BigfishMedium-v0: no such game; there are " + GAMES),
        ("--num-minibatches 3", "--num-minibatches 3: does not cut 16384 steps into equal parts of 2 or more"),
        ("--num-minibatches 16384", "--num-minibatches 16384: does not cut 16384 steps"),
        ("--num-steps 1000000000", "out of memory: Unable to allocate"),
        ("--num-steps 1000000000000000", "--num-steps 1000000000000000: from 1 to"),
        ("--num-levels 3000000000", "--num-levels 3000000000: from -1 to 2147483647"),
        ("--start-level 3000000000", "--start-level 3000000000: from 0 to 2147483647"),
        ("--eval-seed -1", "--eval-seed -1: from"),
        ("--num-levels -2", "--num-levels -2: from"),
        ("--start-level -1", "--start-level -1: from"),
        ("--num-envs 0", "--num-envs 0: from"),
        ("--num-steps 0", "--num-steps 0: from"),
        ("--num-minibatches 0", "--num-minibatches 0: from"),
        ("--update-epochs 0", "--update-epochs 0: from"),
        ("--distill-coef -1", "--distill-coef -1.0: from"),
        ("--learning-rate nan", "--learning-rate nan: from"),
        ("--learning-rate inf", "--learning-rate inf: from"),
        ("--gamma 1.1", "--gamma 1.1: from 0 to 1"),
        ("--gamma nan", "--gamma nan: from 0 to 1"),
        ("--gae-lambda 1.1", "--gae-lambda 1.1: from 0 to 1"),
        ("--clip-coef 0", "--clip-coef 0.0: from"),
        ("--ent-coef -1", "--ent-coef -1.0: from"),
        ("--vf-coef -1", "--vf-coef -1.0: from"),
        ("--max-grad-norm -1", "--max-grad-norm -1.0: from"),
        ("--resume @/run --total-timesteps 99 --gamma 0.9", "--gamma is 0.999 in that run and stays so"),
        ("--resume @/run --total-timesteps 99 --env-id maze", "--env-id is bigfish in that run and stays so"),
        ("--resume @/run --total-timesteps 99 --num-envs 4", "--num-envs is 2 in that run and stays so"),
        ("--resume @/run --total-timesteps 99 --num-agents 1", "--num-agents is 2 in that run and stays so"),
    ],
    "ppo_netrand": [
        ("--env-id coinrum", "--env-id coinrum: no such game; there are " + GAMES),
        ("--plain-look --distribution-mode easy", "--plain-look: easy coinrun has one theme anyway"),
        ("--plain-look --env-id CoinrunEasy-v0", "--plain-look: easy coinrun has one theme anyway"),
        ("--plain-look --env-id maze", "--plain-look and --paint-vel-info: maze has no velocity to paint"),
        ("--paint-vel-info --env-id HeistHard-v0", "--plain-look and --paint-vel-info: heist has no velocity"),
        ("--clean-prob 1.1", "--clean-prob 1.1: from 0 to 1"),
        ("--clean-prob -0.1", "--clean-prob -0.1: from 0 to 1"),
        ("--fm-coef -1", "--fm-coef -1.0: from"),
        ("--mc-samples -1", "--mc-samples -1: from"),
        ("--num-minibatches 3", "--num-minibatches 3: does not cut 16384 steps into equal parts of 2 or more"),
        ("--num-steps 1000000000", "out of memory: Unable to allocate"),
        ("--num-steps 1000000000000000", "--num-steps 1000000000000000: from 1 to"),
        ("--resume @/run --total-timesteps 99 --clean-prob 0.9", "--clean-prob is 0.1 in that run and stays so"),
        ("--resume @/run --total-timesteps 99 --no-netrand", "--netrand is True in that run and stays so"),
    ],
    "sac_sam_reset": [
        ("--env-id cheetah-walk", "--env-id cheetah-walk: no such task; there are acrobot-swingup"),
        ("--env-id lqr-lqr_2_1", "--env-id lqr-lqr_2_1: no such task"),
        ("--num-envs 2", "--num-envs 2: from 1 to 1"),
        ("--action-repeat -1", "--action-repeat -1: from"),
        ("--sam-rho nan", "--sam-rho nan: from"),
        ("--learning-starts 0", "--learning-starts 0: from 1"),
        ("--buffer-size 10000000000", "out of memory: Unable to allocate"),
        ("--total-timesteps 1000000000000", "--total-timesteps: 3906250000 MB of replay do not fit on the disk"),
        ("--resume @/run --total-timesteps 99 --sam-on actor", "--sam-on is both in that run and stays so"),
        ("--resume @/run --total-timesteps 99 --action-repeat 4", "--action-repeat is 2 in that run and stays so"),
        ("--resume @/run --total-timesteps 99 --env-id walker_run", "--env-id is cheetah-run in that run and stays so"),
    ],
}
ONE_SCRIPT["drqv2_pieg"] = [
    ("--env-id cheetah-walk", "--env-id cheetah-walk: no such task; there are acrobot-swingup"),
    ("--num-envs 2", "--num-envs 2: from 1 to 1"),
    ("--encoder-layer 5", "--encoder-layer 5: from 1 to 4"),
    ("--action-repeat -1", "--action-repeat -1: from"),
    ("--n-step -1", "--n-step -1: from 1"),
    ("--n-step 30 --learning-starts 20", "--learning-starts 20: from 30"),
    ("--buffer-size 3", "--buffer-size 3: from"),
    ("--noise-clip nan", "--noise-clip nan: from"),
    ("--update-every 0", "--update-every 0: from 1"),
    ("--overlay-pictures -1", "--overlay-pictures -1: from 1"),
    ("--overlay-dir nowhere", "--overlay-dir nowhere: no such folder; one with pictures, or `textures`"),
    ("--overlay-dir @/run", "no .jpg .jpeg .png in it"),
    ("--eval-modes video_hard", "DMC-GB's data for video_hard is not in data/dmcgb (video_hard/video0.mp4 to"),
    ("--eval-modes color_easy --dmcgb-dir @", "(color_easy.json to color_easy.pt): `make dmcgb` fetches it"),
    ("--total-timesteps 1000000000", "--total-timesteps: 20187377 MB of replay do not fit on the disk"),
    ("--total-timesteps 1000000000000", "--total-timesteps: 20187377929 MB of replay do not fit on the disk"),
    ("--resume @/run --total-timesteps 99 --encoder drqv2", "--encoder is resnet18 in that run and stays so"),
    ("--resume @/run --total-timesteps 99 --n-step 3", "--n-step is 2 in that run and stays so"),
]
CASES = [(name, *case) for name in SCRIPTS for case in EVERY_SCRIPT + ONE_SCRIPT.get(name, [])]
# What may differ in a resumed run, besides --total-timesteps and --cuda.
MAY_CHANGE = {"save_minutes": 0.0, "eval_every": 0, "eval_episodes": 2, "final_eval_episodes": 2, "eval_seed": 7}
MAY_CHANGE |= {"wandb_project_name": "p", "wandb_entity": "e"}
TYRO = ["--nonsense 1", "--seed one", "--seed nan", "--precision fp8", "--resume"]  # tyro's own errors, in a box


class Unstepped(ScriptedEnvs):
    """Environments that no run with a wrong argument may step."""

    def step(self, actions):
        raise AssertionError("an environment was stepped")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{script: folder with a finished run and with files that are no checkpoints of it}."""
    found = {}
    for name in SCRIPTS:
        found[name] = folder = tmp_path_factory.mktemp(name)
        load(name).train(tiny_args(name, folder / "runs"), ScriptedEnvs, make_agent_of(load(name)))
        (run,) = (folder / "runs").iterdir()
        run.rename(folder / "run")
        (folder / "runs").rmdir()
        about = json.loads((folder / "run" / "args.json").read_text())
        state = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)
        for broken in ("text", "cut", "list", "other", "older", "logless", "cut_log"):
            shutil.copytree(folder / "run", folder / broken)
        whole = (folder / "run" / "checkpoint.pt").read_bytes()
        (folder / "cut" / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
        (folder / "text" / "args.json").write_text("no JSON")
        (folder / "logless" / "metrics.csv").unlink()
        (folder / "cut_log" / "metrics.csv").write_text("step,key,value\n")
        torch.save([state], folder / "list" / "checkpoint.pt")
        torch.save(state | {"script": "other"}, folder / "other" / "checkpoint.pt")
        about["args"]["gone"] = 1
        (folder / "older" / "args.json").write_text(json.dumps(about))
        (folder / "text.pt").write_text("a file")
    return found


@pytest.fixture
def call(monkeypatch, runs, tmp_path):
    """Calls a script's `main` with some flags, in an empty folder, without a GPU and without W&B."""

    def call_main(script, flags, make_envs=Unstepped):
        monkeypatch.setattr(sys, "argv", [script.__file__, *flags.replace("@", str(runs[script.__name__])).split()])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setitem(sys.modules, "wandb", None)
        monkeypatch.chdir(tmp_path)
        if script.__name__ == "drqv2_pieg":  # ten thousand textures take a minute
            images = torch.zeros(500, 3, 84, 84, dtype=torch.uint8)
            monkeypatch.setattr(script, "make_textures", lambda count, size, _: images[:count, :, :size, :size])
        script.main(make_envs=make_envs, make_agent=make_agent_of(script))

    return call_main


def files(*folders):
    """All that is in some folders."""
    found = [path for folder in folders for path in folder.rglob("*")]
    return {path: path.read_bytes() if path.is_file() else None for path in found}


def is_one_line(error, said):
    return error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1 and said in error


@pytest.mark.parametrize("name, flags, said", CASES, ids=[f"{name} {flags}" for name, flags, _ in CASES])
def test_a_wrong_argument_ends_the_program(name, flags, said, call, runs, tmp_path, capsys):
    before = files(runs[name], tmp_path)
    with pytest.raises(SystemExit, match=r"^2$"):
        call(load(name), flags)
    error = capsys.readouterr().err
    assert is_one_line(error, said), error
    assert files(runs[name], tmp_path) == before


def test_a_name_of_two_lines(script, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        script.train(tiny_args(script.__name__, tmp_path / "runs", exp_name="a\nb"), Unstepped)
    assert is_one_line(capsys.readouterr().err, r"--exp-name 'a\nb': is part of a folder's name")


@pytest.mark.parametrize("flags", TYRO)
def test_what_tyro_refuses(script, flags, call, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        call(script, flags)
    assert flags.split()[0] in capsys.readouterr().err
    assert files(tmp_path) == {}


def test_an_error_in_a_program_of_its_own(script, tmp_path):
    command = [sys.executable, script.__file__, "--env-id", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert is_one_line(done.stderr, "--env-id nowhere: no such"), done.stderr
    assert files(tmp_path) == {}


def test_a_resumed_run_may_change_what_is_not_learning(script, call, runs, tmp_path):
    """Its args.json then has the last arguments, and a later resume begins with them."""
    run = shutil.copytree(runs[script.__name__] / "run", tmp_path / "run")
    steps = ROWS[script.__name__]["args"]["total_timesteps"]
    before = json.loads((run / "args.json").read_text())["args"]
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in MAY_CHANGE.items())
    call(script, f"--resume {run} --cuda --total-timesteps {3 * steps // 2} {flags}", ScriptedEnvs)
    after = json.loads((run / "args.json").read_text())["args"]
    changes = MAY_CHANGE | {"total_timesteps": 3 * steps // 2, "resume": str(run), "cuda": True}
    assert after == before | changes
    call(script, f"--resume {run} --total-timesteps {2 * steps}", ScriptedEnvs)
    assert json.loads((run / "args.json").read_text())["args"] == after | {"total_timesteps": 2 * steps}
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 2 * steps


@pytest.mark.parametrize("name", PROCGEN)
@pytest.mark.parametrize("found, cure", [(True, "apt-get install libgl1 libglib2.0-0"), (False, "install PyQt5-Qt5")])
def test_a_missing_system_library(name, found, cure, call, tmp_path, tmp_path_factory, monkeypatch, capsys):
    def missing(*args, **kwargs):
        raise OSError("libGL.so.1: cannot open shared object file")

    qt = tmp_path_factory.mktemp("PyQt5")
    (qt / "Qt5" / "lib").mkdir(parents=True)
    (qt / "Qt5" / "lib" / "libQt5Core.so.5").touch()
    package = types.SimpleNamespace(submodule_search_locations=[str(qt)]) if found else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(SystemExit, match=r"^2$"):
        call(load(name), "", load(name).make_envs)
    error = capsys.readouterr().err
    assert is_one_line(error, cure), error
    assert "libGL.so.1" in error
    assert files(tmp_path) == {}


@pytest.mark.parametrize("name", PROCGEN)
@pytest.mark.parametrize(
    "env_id, mode, made, levels",
    [
        ("bigfish", "hard", "BigfishHard-v0", 500),
        ("bigfish", "easy", "BigfishEasy-v0", 200),
        ("Bigfish-v0", "easy", "BigfishEasy-v0", 200),
        ("BigfishEasy-v0", "hard", "BigfishEasy-v0", 200),
        ("BigfishHard-v0", "easy", "BigfishHard-v0", 500),
    ],
)
def test_an_envpool_id_has_its_own_mode(name, env_id, mode, made, levels, tmp_path, monkeypatch):
    script, envpool = load(name), unittest.mock.MagicMock()
    monkeypatch.setattr(script, "import_envpool", lambda: envpool)
    script.make_envs(script.check(tiny_args(name, tmp_path, env_id=env_id, distribution_mode=mode)), "train")
    (call,) = envpool.make_gymnasium.call_args_list
    assert (call.args, call.kwargs["num_levels"]) == ((made,), levels)


class Wandb(types.ModuleType):
    """The package W&B, which refuses to begin."""

    def __init__(self, origin):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin=origin)

    def init(self, **about):
        raise RuntimeError("api_key not configured (no-tty)\nmore")


@pytest.mark.parametrize("letter", ":;,#?'")
def test_a_name_that_wandb_refuses(letter, script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", Wandb("wandb/__init__.py"))
    args = tiny_args(script.__name__, tmp_path / "runs", track=True, exp_name=f"a{letter}b")
    with pytest.raises(SystemExit, match=r"^2$"):
        script.train(args, Unstepped, make_agent_of(script))
    assert is_one_line(capsys.readouterr().err, f"--exp-name a{letter}b: is part of a W&B id")
    script.check(replace(args, track=False))  # without W&B it is a good name
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("origin", "said"), [(None, "--track: pip install wandb"), ("x.py", "--track: api_key not configured (no-tty)")]
)
def test_wandb_that_cannot_begin(origin, said, script, tmp_path, monkeypatch, capsys):
    """A folder called wandb is no package, and nothing is written for a run that W&B does not take."""
    monkeypatch.setitem(sys.modules, "wandb", Wandb(origin))
    args = tiny_args(script.__name__, tmp_path / "runs", track=True)
    with pytest.raises(SystemExit, match=r"^2$"):
        script.train(args, Unstepped, make_agent_of(script))
    assert is_one_line(capsys.readouterr().err, said)
    assert files(tmp_path) == {}


def test_a_script_in_a_notebooks_cell_says_what_to_do(script):
    """Where there is no file of it, a run could not keep a copy."""
    text = open(script.__file__).read()
    with pytest.raises(RuntimeError, match=r"save this text as a \.py file"):
        exec(compile(text, "<cell>", "exec"), {"__name__": "__main__"})


def test_called_from_a_notebook_the_command_is_the_call(script, tmp_path, monkeypatch):
    """sys.argv is the kernel's there."""
    args = tiny_args(script.__name__, tmp_path)
    assert script.describe(args)["command"] == sys.argv
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    assert script.describe(args)["command"] == [f"{script.__name__}.py", repr(args)]


def test_a_folder_that_git_distrusts(script, tmp_path, monkeypatch, capsys):
    """No commit is recorded, and this is said; outside of git there is nothing to say."""
    (tmp_path / "git").write_text(GIT)
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert script.describe(script.Args())["commit"] == ""
    assert capsys.readouterr().out.startswith("warning: git does not trust the owner of ")
    (tmp_path / "git").write_text("#!/bin/sh\necho 'fatal: not a git repository' >&2; exit 128")
    assert script.describe(script.Args())["commit"] == "" and capsys.readouterr().out == ""
    (tmp_path / "git").write_text(f"#!/bin/sh\necho 'warning: slow' >&2\necho {'ab' * 20}-dirty")
    assert script.describe(script.Args())["commit"] == "ab" * 20 + "-dirty"


GIT = """#!/bin/sh
echo "fatal: detected dubious ownership in repository at '/there'" >&2
exit 128
"""


def test_interrupted_before_training(script, tmp_path):
    """Ctrl-C while environments are made is no traceback."""
    program = (
        "import runpy, sys, torch; from unittest import mock\n"
        "sys.argv = sys.argv[1:]\n"
        "with mock.patch('torch.manual_seed', side_effect=KeyboardInterrupt):\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = ROWS[script.__name__]["flags"].split()
    command = [sys.executable, "-c", program, script.__file__, *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "stopped at once; what was saved before is whole\n")
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate 8 PiB"), torch.OutOfMemoryError("no room\nand more"), MemoryError()]
)
def test_too_little_memory_is_one_line(error, monkeypatch, capsys):
    """Wherever in training it ends: of the host, or of a GPU."""
    script = load("mdpo")

    def train(*_):
        raise error

    monkeypatch.setattr(script, "train", train)
    with pytest.raises(SystemExit, match=r"^2$"):
        script.main(["--env-id", "bigfish"])
    said = capsys.readouterr().err
    assert said == f"error: out of memory: {str(error).removesuffix('and more').strip()}\n"
