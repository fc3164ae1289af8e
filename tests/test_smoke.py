"""Each script runs on its real environment, and its run folder holds all that it must."""

import csv
import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch
from conftest import ROOT, ROWS, SCRIPTS, ScriptedEnvs, load, make_agent_of, replace, tiny_args
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_copies import dependencies, fields

FAST = ["mdpo"]  # the real environment that starts and steps fastest; what is looked at comes from shared text
SLOW = [name for name in SCRIPTS if name not in FAST]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in SLOW] + FAST)
def run(request, tmp_path_factory):
    """A script's run, as a user starts it: its module, flags, folder and what it printed."""
    runs_dir = tmp_path_factory.mktemp("runs")
    module, flags = load(request.param), [*ROWS[request.param]["flags"].split(), "--runs-dir", str(runs_dir)]
    done = subprocess.run(
        [sys.executable, module.__file__, *flags], capture_output=True, text=True, cwd=runs_dir.parent
    )
    assert done.returncode == 0, done.stderr
    (folder,) = runs_dir.iterdir()
    args = module.check(module.tyro.cli(module.Args, args=flags))
    return types.SimpleNamespace(module=module, args=args, flags=flags, folder=folder, out=done.stdout, err=done.stderr)


def metrics(folder):
    """{key: {step: value}} of metrics.csv."""
    found = {}
    for row in csv.DictReader((folder / "metrics.csv").open()):
        assert found.setdefault(row["key"], {}).setdefault(int(row["step"]), float(row["value"])) == float(row["value"])
    return found


def test_the_folder_is_named_after_the_run(run):
    pattern = rf"{run.args.env_id}__{run.args.exp_name}__{run.args.seed}__\d{{8}}-\d{{6}}-\d{{6}}"
    assert re.fullmatch(pattern, run.folder.name)


def test_args_json_says_how_to_run_it_again(run):
    saved = json.loads((run.folder / "args.json").read_text())
    assert saved["args"] == json.loads(json.dumps(vars(run.args) | {"precision": "fp32"}))
    assert saved["command"] == [run.module.__file__, *run.flags]
    head = subprocess.run("git rev-parse HEAD", shell=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert saved["commit"].removesuffix("-dirty") == head
    for package in (pin.split("==")[0] for pin in dependencies(open(run.module.__file__).read())):
        assert saved["packages"][package] == importlib.metadata.version(package)
    assert saved["python"] in sys.version
    assert {"gpu": None, "cores": os.cpu_count()}.items() <= saved["hardware"].items()
    assert {"cpu", "torch_threads"} <= saved["hardware"].keys()


def test_the_folder_holds_the_script(run):
    name = f"{run.module.__name__}.py"
    assert (run.folder / name).read_bytes() == (ROOT / "algos" / name).read_bytes()


def test_metrics_have_their_keys(run):
    keys = metrics(run.folder).keys()
    assert {"charts/SPS", "eval/test_return"} <= keys
    held_out = run.module.__name__ in ("mdpo", "ppo_netrand")  # or there are no training levels to tell from others
    assert ("eval/train_return" in keys) == ("eval/gap" in keys) == held_out
    assert any(key.startswith("losses/") for key in keys)
    assert {key.split("/")[0] for key in keys} == {"charts", "losses", "eval"}


def check_sums(logged):
    """A key's value is the mean of its agents', and a gap is training levels minus held-out ones."""
    for key, steps in logged.items():
        prefix, name = key.rsplit("/", 1)
        agents = [logged[other] for other in logged if re.fullmatch(rf"{prefix}/agent\d/{name}", other)]
        for step, value in steps.items():
            if agents:
                assert np.mean([agent[step] for agent in agents]) == pytest.approx(value, abs=1e-12)
            if "gap" in name:
                train, test = (logged[key.replace("gap", f"{split}_return")][step] for split in ("train", "test"))
                assert train - test == pytest.approx(value, abs=1e-12)
    return logged


def test_metrics_add_up(run):
    check_sums(metrics(run.folder))


def test_events_equal_metrics(run):
    events = EventAccumulator(str(run.folder), size_guidance={"scalars": 0}).Reload()
    found = {key: {event.step: event.value for event in events.Scalars(key)} for key in events.Tags()["scalars"]}
    logged = metrics(run.folder)
    assert found == {key: {step: np.float32(value) for step, value in steps.items()} for key, steps in logged.items()}


def test_the_checkpoint_loads_as_weights_only(run):
    state = torch.load(run.folder / "checkpoint.pt", weights_only=True)
    assert state["script"] == run.module.__name__
    assert state["step"] == state["evaluated"] == max(metrics(run.folder)["charts/SPS"])


def test_the_last_evaluation_can_be_made_again(run):
    """With the agents of the checkpoint, and the number of episodes that the last evaluation has."""
    state, args = run.module.load_checkpoint(run.folder), run.args
    assert run.module.Args(**state["about"]["args"]) == replace(args, precision="fp32")
    agents = run.module.load_agents(args, state)
    again = run.module.compare(agents, replace(args, eval_episodes=args.final_eval_episodes), run.module.make_envs)
    logged = metrics(run.folder)
    assert again == {key: logged[key][state["step"]] for key in again}
    assert {key for key in logged if key.startswith("eval/")} == again.keys()


def test_output_that_is_no_terminal_is_plain_lines(run):
    assert "\r" not in run.out + run.err
    assert "Traceback" not in run.err


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(script, terminal, tmp_path, monkeypatch, capsys):
    """Lines with steps and returns, and a bar where there is a terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    script.train(
        tiny_args(script.__name__, tmp_path, save_minutes=0, eval_every=0), ScriptedEnvs, make_agent_of(script)
    )
    out, err = capsys.readouterr()
    assert ("\r" in err) == ("%|" in err) == terminal
    assert "\r" not in out
    assert re.search(r"step \d+: charts/episodic_return -?\d", out)
    assert str(next(tmp_path.iterdir())) in out


def test_finished_episodes_are_logged(script, tmp_path):
    script.train(tiny_args(script.__name__, tmp_path), ScriptedEnvs, make_agent_of(script))
    (folder,) = tmp_path.iterdir()
    logged = check_sums(metrics(folder))
    assert 3 <= min(logged["charts/episodic_length"].values()) <= max(logged["charts/episodic_length"].values()) <= 4
    assert 0 <= min(logged["charts/episodic_return"].values()) <= max(logged["charts/episodic_return"].values()) <= 4


def test_track_hands_the_run_to_wandb(script, tmp_path, monkeypatch):
    """W&B is started before the events, which it copies, and a resumed run goes on under its name."""
    calls, wandb = [], types.ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None, origin="wandb/__init__.py")
    finished = []

    def init(**about):
        calls.append(about | {"events": len(list(tmp_path.glob("*/events*")))})
        return types.SimpleNamespace(finish=lambda: finished.append(about["id"]))

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args = tiny_args(script.__name__, tmp_path, track=True, wandb_project_name="p", wandb_entity="e")
    script.train(args, ScriptedEnvs, make_agent_of(script))
    (folder,) = tmp_path.iterdir()
    config = vars(script.check(args)) | {"precision": "fp32"}
    about = {"project": "p", "entity": "e", "config": config, "sync_tensorboard": True}
    about |= {"id": folder.name, "name": folder.name, "resume": "allow"}
    assert calls == [about | {"events": 0}]
    longer = replace(args, resume=str(folder), total_timesteps=2 * args.total_timesteps)
    script.train(longer, ScriptedEnvs, make_agent_of(script))
    assert calls[1]["id"] == folder.name
    assert finished == [folder.name] * 2


@pytest.mark.parametrize("terminal", [False, True])
def test_an_evaluation_is_seen(script, terminal, tmp_path, monkeypatch, capsys):
    """A line says that it begins and how long it is; where there is a terminal, a bar shows how far it is."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    args = tiny_args(script.__name__, tmp_path, eval_every=16, eval_episodes=2, final_eval_episodes=4)
    script.train(args, ScriptedEnvs, make_agent_of(script))
    out, err = capsys.readouterr()
    counts = re.findall(r"(?m)^step \d+: evaluating, (\d+) (?:episodes|games)", out)
    assert counts == ["2", "2", "4"] if len(counts) == 3 else counts == ["2", "4"]
    (folder,) = tmp_path.iterdir()
    assert [str(int(value)) for value in metrics(folder)["charts/eval_episodes"].values()] == counts
    assert ("evaluation, test: " in err) == terminal
    if terminal:
        assert "/4 [" in err


def test_a_short_run_ends_with_a_short_evaluation(script):
    """By default, and never in more episodes than the paper's; a number that is given stays."""
    whole, short = script.check(script.Args()), script.check(script.Args(total_timesteps=300))
    most = {"drq_sam_reset": 100, "sac_sam_reset": 10, "drqv2_pieg": 100}.get(script.__name__, 128)
    assert script.final_episodes(whole) == most
    assert 1 <= script.final_episodes(short) <= most / 5
    assert script.final_episodes(replace(short, final_eval_episodes=77)) == 77
    longest = replace(whole, total_timesteps=100 * whole.total_timesteps)
    assert script.final_episodes(longest) == most


def test_no_evaluation_warns():
    """As dm_control does for each cheetah, in 200 characters."""
    records, handler, logger = [], logging.Handler(), logging.getLogger("absl")
    handler.emit = records.append
    for script in (load("drqv2_pieg"), load("sac_sam_reset")):
        suite = script.import_suite()
        logger.addHandler(handler)
        suite.load("cheetah", "run")
        logger.removeHandler(handler)
    assert records == []


def test_help_explains_each_field(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.__file__, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        script.main()
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, (_, comment) in fields(open(script.__file__).read()).items():
        assert f"--{name.replace('_', '-')} " in text.replace(",", " ")
        assert comment, f"{name} has no comment"
        assert comment.removeprefix("# ") in text
