"""The ablations change what they say, nothing else, and train, resume and evaluate as the scripts do."""

import importlib.util
import itertools
import json
import subprocess
import sys
import time
from colorsys import hsv_to_rgb, rgb_to_hsv

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, ScriptedEnvs, folder_in, load, tiny_args

spec = importlib.util.spec_from_file_location("ablations", ROOT / "benchmark" / "ablations.py")
ablations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablations)

EVERY = [(name, ablation) for name, rows in ablations.ABLATIONS.items() for ablation in rows]
BOX = (slice(None), slice(None), slice(13), slice(26))
TINY = (
    "--total-timesteps 32 --num-envs 2 --num-steps 8 --num-minibatches 2 --update-epochs 2 --exact-every 16"
    " --eval-every 16 --eval-episodes 2 --final-eval-episodes 2 --mc-samples 2 --no-cuda"
)


class PlainEnvs(ScriptedEnvs):
    """Scripted environments that keep what they showed."""

    def __init__(self, args, split, restart=0):
        super().__init__(args, split, restart)
        self.shown = []

    def observe(self):
        self.shown.append(super().observe())
        return self.shown[-1].copy()


def script_of(monkeypatch, name):
    """The module that `main` loads, on scripted environments."""
    script = load(name)
    monkeypatch.setattr(script, "make_envs", PlainEnvs)
    monkeypatch.setattr(ablations, "load_script", lambda _: script)
    return script


def wrapped(monkeypatch, tmp_path, wrapper, split="train", restart=0, **changes):
    args = tiny_args("ppo_netrand", tmp_path, **changes)
    script = script_of(monkeypatch, "ppo_netrand")
    return ablations.make_envs(script, wrapper, args, split, *([] if restart is None else [restart]))


def watch(envs, steps):
    """-> what the environments showed bare and wrapped, [steps + 1, N, 3, 64, 64] each."""
    seen = [envs.reset()[0]]
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = envs.step(np.zeros(envs.num_envs, dtype=np.int64))
        assert reward.shape == terminated.shape == truncated.shape == (envs.num_envs,)
        seen.append(obs)
    assert all(obs.dtype == np.uint8 for obs in seen)
    return np.stack(envs.shown), np.stack(seen)


# ---- Observations ----
WRAPPERS = [ablations.Gray, ablations.Cutout, ablations.Inversion, ablations.Jitter]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_only_training_is_augmented_and_gray_is_everywhere(wrapper, monkeypatch, tmp_path):
    for split in ("train", "test", "full_look"):
        evaluated = wrapped(monkeypatch, tmp_path, wrapper, split, restart=None, num_envs=16)
        bare, seen = watch(evaluated, 2)
        assert np.array_equal(bare, seen) == (wrapper is not ablations.Gray)
    bare, seen = watch(wrapped(monkeypatch, tmp_path, wrapper, num_envs=16), 2)
    assert not np.array_equal(bare, seen)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("painted", [{}, {"plain_look": True}, {"paint_vel_info": True}])
def test_a_painted_box_is_kept_whole_and_no_other(wrapper, painted, monkeypatch, tmp_path):
    bare, seen = watch(wrapped(monkeypatch, tmp_path, wrapper, num_envs=16, **painted), 3)
    bare, seen = bare.reshape(-1, 3, 64, 64), seen.reshape(-1, 3, 64, 64)
    assert np.array_equal(bare[BOX], seen[BOX]) == bool(painted)
    changed = (bare != seen).any(axis=(0, 1))
    assert changed[13, :26].any() and changed[:13, 26].any()  # it ends there


@pytest.mark.parametrize("wrapper", [ablations.Cutout, ablations.Inversion, ablations.Jitter])
def test_what_is_drawn_follows_from_seed_and_restart(wrapper, monkeypatch, tmp_path):
    obs = np.random.default_rng(0).integers(0, 256, (16, 3, 64, 64), dtype=np.uint8)

    def shown(seed, restart):
        envs = wrapped(monkeypatch, tmp_path, wrapper, restart=restart, seed=seed, num_envs=16)
        return np.stack([envs.change(obs) for _ in range(3)])

    assert np.array_equal(shown(1, 0), shown(1, 0))
    assert not np.array_equal(shown(1, 0), shown(1, 1)) and not np.array_equal(shown(1, 0), shown(2, 0))


def test_gray_is_the_mean_of_the_channels_rounded_down(monkeypatch, tmp_path):
    bare, seen = watch(wrapped(monkeypatch, tmp_path, ablations.Gray), 2)
    expected = bare.astype(float).mean(axis=2).astype(np.uint8)
    assert all(np.array_equal(seen[:, :, channel], expected) for channel in range(3))


def test_cutout_paints_up_to_five_rectangles_anew_each_frame(monkeypatch, tmp_path):
    envs = wrapped(monkeypatch, tmp_path, ablations.Cutout, num_envs=64)
    wall = np.full((64, 3, 64, 64), 255, dtype=np.uint8)  # a colour that is never drawn
    frames = np.concatenate([envs.change(wall) for _ in range(20)])
    assert (wall == 255).all()
    painted = (frames != 255).any(axis=1)
    colours = [len(np.unique(frame[:, p].T, axis=0)) for frame, p in zip(frames, painted, strict=True)]
    assert max(colours) == 5 and abs(colours.count(0) / len(frames) - 1 / 6) < 0.05
    assert not (painted[:-64] == painted[64:]).all(axis=(1, 2))[painted[64:].any(axis=(1, 2))].any()
    sizes = []
    for frame, p in zip(frames, painted, strict=True):
        if len(np.unique(frame[:, p].T, axis=0)) == 1:  # one rectangle: its bounding box is full
            rows, columns = np.flatnonzero(p.any(axis=1)), np.flatnonzero(p.any(axis=0))
            assert p[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            sizes += [len(lines) for lines in (rows, columns) if lines[-1] < 63]
    assert min(sizes) in (6, 7) and max(sizes) in (22, 23) and abs(np.mean(sizes) - 14.4) < 1.5
    assert abs(painted[:, 63].mean() - painted[:, 40].mean()) < 0.1 and painted[:, 63].any() and painted[..., 63].any()


def test_inversion_is_of_whole_environments_for_good(monkeypatch, tmp_path):
    envs = wrapped(monkeypatch, tmp_path, ablations.Inversion, num_envs=256)
    bare, seen = watch(envs, 3)
    inverted = (seen[0] == 255 - bare[0]).all(axis=(1, 2, 3))
    assert np.array_equal(seen[:, inverted], 255 - bare[:, inverted])
    assert np.array_equal(seen[:, ~inverted], bare[:, ~inverted])
    assert 0.4 < inverted.mean() < 0.6


def slow_jitter(image, brightness, contrast, saturation, boxed):
    """[3, 64, 64], pixel by pixel in HSV."""
    x = image.astype(float)
    if boxed:
        x[:, :13, :26] = 0
    x = np.clip(x + brightness, 0, 255)
    if boxed:
        x[:, :13, :26] = 0
    for channel in range(3):
        mean = x[channel].mean()
        x[channel] = np.clip((x[channel] - mean) * contrast + mean, 0, 255)
    for row in range(64):
        for column in range(64):
            hue, s, value = rgb_to_hsv(*x[:, row, column])
            x[:, row, column] = hsv_to_rgb(hue, min(1, s * saturation), value)
    return x


@pytest.mark.parametrize("drawn", [(0.4, 1.5, 1.4), (-0.5, 0.5, 0.5), (0.1, 1.3, 0.7)])
@pytest.mark.parametrize("boxed", [False, True])
def test_jitter_equals_its_slow_twin(drawn, boxed):
    image = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    image[:, :, 40:] = 9  # a patch of gray, which has no hue
    expected = slow_jitter(image, *drawn, boxed)
    got = ablations.jitter(image[None], *np.float32(drawn), boxed)[0]
    keep = np.s_[:, 13:] if boxed else np.s_[:]
    assert np.abs(got[keep] - expected[keep]).max() <= 0.501
    unboxed = slow_jitter(image, *drawn, not boxed)
    assert np.abs(got[:, 13:] - unboxed[:, 13:]).max() > 0.6  # the box counts in the mean


def test_jitter_is_drawn_once_an_iteration_for_all_environments(monkeypatch, tmp_path):
    envs = wrapped(monkeypatch, tmp_path, ablations.Jitter, num_steps=4)
    obs = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    obs[1] = obs[0]
    seen = [envs.change(obs) for _ in range(12)]
    assert all(np.array_equal(frame[0], frame[1]) for frame in seen)
    same = [np.array_equal(a, b) for a, b in itertools.pairwise(seen)]
    assert same == [t % 4 != 3 for t in range(11)]
    draws = []
    for _ in range(400):
        envs.change(obs[:1, :, :2, :2])
        draws.append(envs.drawn)
    assert np.allclose(np.min(draws, axis=0), (-0.5, 0.5, 0.5), atol=0.1)
    assert np.allclose(np.max(draws, axis=0), (0.5, 1.5, 1.5), atol=0.1)


# ---- Networks ----
def agent_of(name, tmp_path, **changes):
    script, args = load("ppo_netrand"), tiny_args("ppo_netrand", tmp_path, **changes)
    envs = ScriptedEnvs(args, "train")
    torch.manual_seed(0)
    return script, args, getattr(ablations, name)(script)(envs, args)


def images(seed, n=4):
    return torch.randint(0, 256, (n, 3, 64, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def masks_of(agent):
    return [module.mask.clone() for module in agent.modules() if isinstance(module, ablations.Mask)]


def equal(a, b):
    return all(map(torch.equal, a, b))


@torch.no_grad()
def test_dropout_has_one_mask_an_iteration(tmp_path):
    _, _, agent = agent_of("dropout", tmp_path)
    iterations = []
    for _ in range(3):
        logits, values = agent(images(0))
        masks = masks_of(agent)
        for seed in range(2):
            agent(images(seed))  # more steps, and the bootstrapped value
        for _ in range(2):  # learning, with and without gradients
            with torch.enable_grad():
                learned = agent.heads(agent.features(images(0)))
            agent.features(images(1))
        assert equal((logits, values), learned) and equal(masks, masks_of(agent))
        iterations.append(masks)
    assert not any(map(torch.equal, iterations[0], iterations[1]))
    assert not any(map(torch.equal, iterations[1], iterations[2]))
    agent(images(0))
    _, _, resumed = agent_of("dropout", tmp_path)
    resumed.load_state_dict(agent.state_dict())  # as saved in the middle of an iteration
    assert equal(resumed(images(0)), agent(images(0)))


def watched(agent, kind):
    """A list that grows by (input, output) at each call of a module of that kind."""
    seen = []
    for module in agent.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    return seen


@torch.no_grad()
def test_dropout_drops_a_tenth_of_each_convolution_and_scales_the_rest(tmp_path):
    script, args, agent = agent_of("dropout", tmp_path)
    seen = watched(agent, ablations.Mask)
    agent(images(0))
    convolutions = [module for module in agent.modules() if isinstance(module, nn.Conv2d)]
    assert len(seen) == len(convolutions) == 15
    zeros = 0
    for x, y in seen:
        dropped = (y[0] == 0) & (x[0] != 0)
        assert torch.allclose(y, x * ~dropped / 0.9)  # the same for all images
        zeros += dropped.sum().item()
    assert abs(zeros / sum(x[0].numel() for x, _ in seen) - 0.1) < 0.005

    torch.manual_seed(0)
    bare = script.Agent(ScriptedEnvs(args, "train"), args)
    state = torch.get_rng_state()
    masks = masks_of(agent.eval())
    assert equal(agent(images(0)), bare(images(0)))  # off in evaluation, on the network that it would have been
    agent.train().features(images(0))
    agent.eval()(images(0))
    assert equal(masks, masks_of(agent)) and torch.equal(state, torch.get_rng_state())


@torch.no_grad()
def test_batch_norm_normalises_by_the_batch_in_training_and_evaluation(tmp_path):
    _, _, agent = agent_of("batch_norm", tmp_path)
    seen = watched(agent, nn.BatchNorm2d)
    trained = agent(images(0))
    assert len(seen) == 15
    for x, y in seen:
        spread = x.var((0, 2, 3), unbiased=False)
        assert torch.allclose(y.mean((0, 2, 3)), torch.zeros(len(spread)), atol=1e-4)
        assert torch.allclose(y.var((0, 2, 3), unbiased=False), spread / (spread + 1e-3), rtol=1e-3)
    assert equal(trained, agent.eval()(images(0)))
    assert not torch.allclose(trained[1][:2], agent(images(0)[:2])[1])  # of this batch, not of an earlier one


@pytest.mark.parametrize("netrand", [False, True])
def test_l2_adds_the_weights_once_a_minibatch_and_spares_the_biases(netrand, monkeypatch, tmp_path):
    script, args, agent = agent_of("l2", tmp_path, netrand=netrand, max_grad_norm=1e9)
    torch.manual_seed(0)
    bare = script.Agent(ScriptedEnvs(args, "train"), args)
    monkeypatch.setattr(script, "CPU_BATCH", 3)
    rng = torch.Generator().manual_seed(0)
    batch = {key: torch.rand(8, generator=rng) for key in ("log_probs", "values", "advantages", "returns")}
    batch |= {"obs": images(0, 8), "actions": torch.zeros(8, dtype=torch.int64)}
    kernel = script.random_kernel(rng) if netrand else None
    for _ in range(2):  # a gradient that is left from the last minibatch changes nothing
        for each in (agent, bare):
            optimizer = torch.optim.SGD(each.parameters(), lr=0.0)
            script.update(each, optimizer, kernel, False, torch.tensor(0.2), batch, args)
    for (name, mine), theirs in zip(agent.named_parameters(), bare.parameters(), strict=True):
        decay = 0 if name.endswith("bias") else 1e-4 * theirs
        assert torch.equal(mine, theirs) and torch.allclose(mine.grad, theirs.grad + decay, rtol=1e-6, atol=1e-7), name
    changed = agent.actor.weight.grad - bare.actor.weight.grad, agent.critic.weight.grad - bare.critic.weight.grad
    assert all(change.norm() > 1e-6 for change in changed)


# ---- The command line ----
def run(monkeypatch, name, ablation, *flags):
    script_of(monkeypatch, name)
    ablations.main([name, ablation, *TINY.split(), *map(str, flags)])


def same(a, b):
    """Whether nested states are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def state_of(path):
    """A checkpoint without the arguments and how long its log is."""
    state = torch.load(path, weights_only=True)
    return {key: value for key, value in state.items() if key not in ("args", "metrics_bytes")}


def evaluations(folder):
    return [line for line in (folder / "metrics.csv").read_text().splitlines() if ",eval/" in line]


@pytest.mark.parametrize(("name", "ablation"), EVERY)
def test_each_one_trains_evaluates_and_resumes_bit_for_bit(name, ablation, monkeypatch, tmp_path):
    flags = ["--plain-look"] + (["--netrand"] if ablation == "dropout" else [])
    run(monkeypatch, name, ablation, *flags, "--runs-dir", tmp_path / "whole", "--exact-every", "16")
    run(monkeypatch, name, ablation, *flags, "--runs-dir", tmp_path / "part", "--total-timesteps", "16")
    whole, part = folder_in(tmp_path / "whole"), folder_in(tmp_path / "part")
    assert f"__{name}_{ablation}__1__" in part.name
    args = json.loads((part / "args.json").read_text())["args"]
    assert args["netrand"] == ("--netrand" in flags) and args["cuda_graphs"] == (ablation not in ("dropout", "l2"))
    time.sleep(1)  # event files are put in order by the second
    flags += ["--runs-dir", tmp_path / "part"]
    run(monkeypatch, name, ablation, *flags, "--resume", part / "exact.pt")
    assert same(state_of(whole / "checkpoint.pt"), state_of(part / "checkpoint.pt"))
    assert evaluations(whole)[-6:] == evaluations(part)[-6:]
    trained = (part / "evaluation.csv").read_text()
    run(monkeypatch, name, ablation, *flags, "--evaluate", part)
    assert (part / "evaluation.csv").read_text() == trained
    other = "gray" if ablation != "gray" else "cutout"
    with pytest.raises(SystemExit, match=r"^2$"):
        run(monkeypatch, name, other, *flags, "--resume", part, "--total-timesteps", "48")


@pytest.mark.parametrize("ablation", ["cutout", "inversion", "jitter", "gray"])
def test_the_environments_are_wrapped_where_the_script_trains(ablation, monkeypatch, tmp_path):
    """What the last rollout holds, against what bare environments show."""
    script = script_of(monkeypatch, "ppo_netrand")
    made, update = [], script.update

    def seen_update(agent, optimizer, kernel, skip, clip_coef, batch, args):
        made.append(batch["obs"].clone())
        return update(agent, optimizer, kernel, skip, clip_coef, batch, args)

    monkeypatch.setattr(script, "update", seen_update)
    flags = "--num-envs 8 --num-steps 2 --num-minibatches 1 --eval-every 0 --total-timesteps 16 --update-epochs 1"
    run(monkeypatch, "ppo_netrand", ablation, *flags.split(), "--runs-dir", tmp_path)
    args = tiny_args("ppo_netrand", tmp_path, num_envs=8)
    envs = PlainEnvs(args, "train")
    envs.reset(), envs.step(np.zeros(8))
    bare, (learned,) = torch.as_tensor(np.concatenate(envs.shown[:2])), made
    share = (bare[:, None] == learned[None]).flatten(2).all(2).any(1).float().mean()
    assert share < 1 and (ablation in ("cutout", "inversion") or share == 0)


def test_dropout_gives_ratios_of_one_at_first(monkeypatch, tmp_path):
    """Masks that changed between acting and learning would show in the first minibatch of each iteration."""
    script, first = script_of(monkeypatch, "ppo_netrand"), []
    update = script.update
    monkeypatch.setattr(script, "update", lambda *args: first.append(update(*args)) or first[-1])
    flags = ["--runs-dir", tmp_path, "--netrand", "--clean-prob", "0.5", "--total-timesteps", "96"]
    run(monkeypatch, "ppo_netrand", "dropout", *flags)
    assert len(first) == 24 and all(parts["approx_kl"].abs() < 1e-6 for parts in first[::4])
    assert all(parts["approx_kl"].abs() > 1e-6 for parts in first[3::4])


def test_what_is_not_there_is_one_line_and_code_2(capsys):
    for argv, expected in ((["nope"], "ppo_netrand"), (["ppo_netrand"], "gray"), (["ppo_netrand", "nope"], "cutout")):
        with pytest.raises(SystemExit, match=r"^2$"):
            ablations.main(argv)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and expected in error


def test_all_are_listed_and_the_program_starts():
    command = [sys.executable, str(ROOT / "benchmark" / "ablations.py")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(f"{name} {ablation} " in output for name, ablation in EVERY)
    assert len(output.splitlines()) == 1 + len(EVERY)
    helped = subprocess.run([*command, "ppo_netrand", "--help"], capture_output=True, text=True, check=True).stdout
    assert helped == output
    failed = subprocess.run([*command, "ppo_netrand", "l2", "--num-envs", "0"], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("error: --num-envs 0")
