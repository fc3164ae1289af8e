"""drqv2_pieg.py: each formula against a slow twin, the looks of DMC-GB against the edited XML, what a run promises."""

import colorsys
import copy
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError
from xml.etree import ElementTree

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision
from conftest import (
    ROOT,
    ScriptedEnvs,
    TinyPieg,
    assert_resumes_exactly,
    folder_in,
    load,
    metrics_of,
    ready_rows,
    replace,
    same,
    state_of,
)
from gymnasium.utils.env_checker import check_env
from torchvision.transforms.v2 import functional as transforms

pieg = load("drqv2_pieg")
CPU = torch.device("cpu")
MODES = ("color_easy", "color_hard", "video_easy", "video_hard")


class Envs(ScriptedEnvs):
    """Frames of 12 x 12 in stacks of 3; episodes of 5 steps, each second of which fails; what ends one is shown."""

    def __init__(self, args, split, start=0):
        super().__init__(args, split, start, obs_shape=(9, 12, 12))
        self.number = 0

    def step(self, actions):
        self.time += 1
        reward = actions.sum(1)
        self.returns += reward
        ended, obs, episodes = self.time == 5, self.observe(), []
        failed = ended & (self.number % 2 == 1)
        for n in np.flatnonzero(ended):
            episodes.append((int(n), float(self.returns[n]), 5))
        self.time[ended], self.returns[ended] = 0, 0
        self.number += int(ended[0])
        following = self.observe() if ended.any() else obs
        return following, reward, failed, ended & ~failed, {"final_obs": obs, "episodes": episodes}


class Space:
    single_observation_space = gym.spaces.Box(0, 255, (9, 12, 12), np.uint8)
    single_action_space = gym.spaces.Box(-1, 1, (2,), np.float32)


def tiny(runs_dir, **changes):
    sizes = {"total_timesteps": 48, "learning_starts": 12, "batch_size": 6, "buffer_size": 30, "n_step": 2}
    widths = {"feature_dim": 8, "hidden_dim": 16, "projection_dim": 32, "overlay_pictures": 5, "noise_steps": 30}
    often = {"exact_every": 12, "eval_every": 16, "action_repeat": 2, "encoder_weights": "random"}
    rest = {"eval_episodes": 2, "final_eval_episodes": 2, "runs_dir": str(runs_dir), "cuda": False}
    return pieg.Args(**sizes | widths | often | rest | changes)


def go(args, make_envs=Envs, make_agent=TinyPieg):
    return pieg.train(args, make_envs, make_agent)


def refusal(capsys, call, *inputs):
    """The one line with which a call ends the program, code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^2$"):
        call(*inputs)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


# ---- Formulas ----
def test_fused_frames_are_the_newer_ones_and_their_changes():
    maps = torch.randn(2, 3, 4, 5, 6)
    expected = [
        torch.cat([x[1].flatten(), x[2].flatten(), (x[1] - x[0]).flatten(), (x[2] - x[1]).flatten()]) for x in maps
    ]
    assert torch.equal(pieg.fuse_frames(maps), torch.stack(expected))
    assert torch.equal(pieg.fuse_frames(maps, False), maps.reshape(2, -1))


def test_overlay_is_half_of_each():
    images, pictures = torch.randint(0, 256, (4, 9, 6, 6)).byte(), torch.randint(0, 256, (4, 3, 6, 6)).byte()
    mixed = pieg.random_overlay(images, pictures)
    for b in range(4):
        for channel in range(9):
            half = 0.5 * images[b, channel].double() / 255 + 0.5 * pictures[b, channel % 3].double() / 255
            torch.testing.assert_close(mixed[b, channel].double() / 255, half, atol=1e-6, rtol=0)


def test_random_convolution_is_one_kernel_an_image():
    images, kernels = torch.randint(0, 256, (4, 9, 6, 6)).byte(), torch.randn(4, 3, 3, 3, 3)
    seen = pieg.random_convolution(images, kernels)
    for b in range(4):
        for first in (0, 3, 6):
            frame = nn.functional.pad(images[b : b + 1, first : first + 3] / 255, (1, 1, 1, 1), mode="replicate")
            expected = 255 / (1 + (-nn.functional.conv2d(frame, kernels[b])).exp())
            torch.testing.assert_close(seen[b : b + 1, first : first + 3], expected, atol=1e-3, rtol=1e-5)


def test_shift_is_a_crop_of_the_padded_image():
    images, offsets = torch.randint(0, 256, (30, 9, 12, 12)).byte(), torch.randint(9, (30, 2))
    offsets[:4] = torch.tensor([[0, 0], [8, 8], [0, 8], [4, 4]])
    padded = nn.functional.pad(images.double(), (4, 4, 4, 4), mode="replicate").byte()
    expected = [x[:, i : i + 12, j : j + 12] for x, (i, j) in zip(padded, offsets.tolist(), strict=True)]
    assert torch.equal(pieg.random_shift(images, offsets, 4), torch.stack(expected))


def test_noise_falls_in_a_straight_line_and_stays():
    args = pieg.check(pieg.Args())
    steps = (0, 2_000, 50_000, 100_000, 400_000)
    assert [pieg.noise_scale(step, args) for step in steps] == pytest.approx([1.0, 0.982, 0.55, 0.1, 0.1])


def test_noisy_actions_stay_within_their_bounds_and_keep_their_gradient():
    actions = torch.tensor([[0.5, 0.9, -0.95]], requires_grad=True)
    noisy = pieg.add_noise(actions, torch.tensor([[0.2, 0.3, -0.2]]))
    torch.testing.assert_close(noisy, torch.tensor([[0.7, 1 - 1e-6, -1 + 1e-6]]), atol=1e-7, rtol=0)
    (noisy * torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
    assert actions.grad.tolist() == [[1, 2, 3]]


def test_textures_follow_the_seed_and_fall_off_like_natural_pictures():
    one, again, other = (pieg.make_textures(40, 84, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert one.shape == (40, 3, 84, 84) and one.dtype == torch.uint8
    assert torch.equal(one, again) and not torch.equal(one, other)
    power = torch.fft.fft2(one.double().mean(1)).abs().square().mean(0)
    slope = np.polyfit(np.log(np.arange(2, 30)), np.log(power[0, 2:30].numpy()), 1)[0]
    assert -3.5 < slope < -1.5  # natural pictures: about -2
    colours = one.double().mean((2, 3))
    assert colours.std(0).min() > 20  # the pictures differ


@pytest.mark.parametrize("count", [7, 100, 203])
def test_textures_are_made_in_parts(count, tmp_path, monkeypatch):
    """Of 100 at most, which are drawn one after another."""
    monkeypatch.setattr(pieg, "PICTURE", 8)
    made = pieg.load_pictures(tiny(tmp_path, overlay_pictures=count), 3)
    rng, parts = torch.Generator().manual_seed(3), [100] * (count // 100) + [count % 100]
    assert torch.equal(made, torch.cat([pieg.make_textures(part, 8, rng) for part in parts if part]))


def crops_of(pictures, crops, size):
    """The crops, one by one, by torchvision. -> float32 [B, 3, size, size]."""
    seen = []
    for number, *box, mirrored in crops.tolist():
        crop = transforms.resized_crop(pictures[number].float(), *box, [size, size], antialias=True)
        seen.append(crop.flip(2) if mirrored else crop)
    return torch.stack(seen)


@pytest.mark.parametrize("size", [84, 40, 12])
def test_crops_are_resized_as_torchvision_does(size):
    pictures = torch.randint(0, 256, (5, 3, 64, 64)).byte()
    crops = pieg.draw_crops(200, pictures, torch.Generator().manual_seed(2))
    crops[0] = torch.tensor([0, 0, 0, 64, 64, 0])
    crops[1] = torch.tensor([1, 62, 0, 2, 64, 1])
    expected = crops_of(pictures, crops, size)
    torch.testing.assert_close(pieg.crop_pictures(pictures, crops, size), expected, atol=2e-3, rtol=0)


def test_crops_are_drawn_as_torchvision_draws_them():
    pictures, count = torch.zeros(7, 3, 64, 64).byte(), 20_000
    state = torch.get_rng_state()
    crops = pieg.draw_crops(count, pictures, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(crops, pieg.draw_crops(count, pictures, torch.Generator().manual_seed(1)))
    number, top, left, height, width, mirrored = crops.unbind(1)
    for values, n in ((number, 7), (mirrored, 2)):
        assert torch.bincount(values).div(count).sub(1 / n).abs().max() < 0.02
    assert min(top.min(), left.min()) == 0 and max((top + height).max(), (left + width).max()) == 64
    draw = torchvision.transforms.RandomResizedCrop.get_params
    theirs = [draw(torch.zeros(3, 64, 64), (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)]
    for ours, expected in zip((top, left, height, width), torch.tensor(theirs).T, strict=True):
        shares = [torch.bincount(values, minlength=65).cumsum(0) / count for values in (ours, expected)]
        assert (shares[0] - shares[1]).abs().max() < 0.02  # Kolmogorov-Smirnov: beyond it once in 1,000 times
    shares = [(a * b / 64**2).sort().values for a, b in ((height, width), torch.tensor(theirs).T[2:])]
    assert (shares[0] - shares[1]).abs().max() < 0.03


def test_a_crop_that_fits_at_no_try_is_the_whole_picture(monkeypatch):
    """As torchvision has it for a square. A picture so wide is drawn 0.08 of the time at one try."""
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.ones(shape) - 1e-6)
    crops = pieg.draw_crops(2, torch.zeros(1, 3, 50, 50), torch.Generator())
    assert crops[:, 4].tolist() == [50, 50]
    assert (crops[:, 1] + crops[:, 3] <= 50).all() and (crops[:, 2] == 0).all()


# ---- Networks ----
class Task:
    single_observation_space = gym.spaces.Box(0, 255, (9, 84, 84), np.uint8)
    single_action_space = gym.spaces.Box(-1, 1, (6,), np.float32)


def agent_of(**changes):
    torch.manual_seed(0)
    args = pieg.Args(**{"encoder_weights": "random", "projection_dim": 32} | changes)
    return pieg.Agent(Task, pieg.check(args))


@pytest.fixture(scope="module")
def agent():
    return agent_of()


def count(module):
    return sum(param.numel() for param in module.parameters() if param.requires_grad)


def test_parameters_are_as_many_as_the_references(monkeypatch):
    monkeypatch.setattr(nn.init, "orthogonal_", lambda weight, gain: weight)  # takes seconds
    agent = agent_of(projection_dim=1024)
    assert agent.encoder.project[0].in_features == 61_952
    assert (count(agent.encoder), count(agent.critic), count(agent.actor)) == (63_441_920, 2_902_786, 1_581_830)
    agent = agent_of(encoder="drqv2", strong_augmentation="none")
    assert agent.encoder.n_out == 39_200 and count(agent.encoder) == 2_624 + 3 * 9_248
    assert agent.actor.project[0].out_features == 50


@pytest.mark.parametrize(
    ("changes", "n_in"),
    [
        ({"encoder_layer": 1}, 4 * 64 * 21 * 21),
        ({"encoder_layer": 3}, 4 * 256 * 6 * 6),
        ({"encoder_layer": 4}, 4 * 512 * 3 * 3),
        ({"frame_differences": False}, 3 * 128 * 11 * 11),
        ({"encoder": "resnet34"}, 4 * 128 * 11 * 11),
        ({"encoder": "resnet50"}, 4 * 512 * 11 * 11),
    ],
    ids=str,
)
def test_features_of_other_encoders(changes, n_in):
    encoder = agent_of(projection_dim=2, **changes).encoder
    assert encoder.project[0].in_features == n_in
    assert encoder(torch.zeros(1, 9, 84, 84)).shape == (1, 2)


def test_initial_weights(agent):
    layers = [layer for part in (agent.encoder.project, agent.critic, agent.actor) for layer in part.modules()]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            gains = torch.linalg.svdvals(layer.weight).detach()
            torch.testing.assert_close(gains, torch.ones(min(layer.weight.shape)), atol=1e-4, rtol=0)
            assert layer.bias.abs().sum() == 0
    small = agent_of(encoder="drqv2").encoder
    for layer in list(small)[:-1:2]:
        gains = torch.linalg.svdvals(layer.weight.flatten(1)).detach()
        torch.testing.assert_close(gains, torch.full((32,), 2**0.5), atol=1e-4, rtol=0)


def test_frames_are_encoded_one_by_one_as_torchvision_does(agent):
    """The features of layer 2, from the whole network's own forward pass; running statistics, so frames are apart."""
    encoder, images = copy.deepcopy(agent.encoder).eval(), torch.randint(0, 256, (2, 9, 84, 84)).byte()
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2")
    whole = pieg.torchvision.models.resnet18(weights=None).eval()
    for name, part in zip(names, encoder.resnet, strict=True):
        getattr(whole, name).load_state_dict(part.state_dict())
    seen = []
    whole.layer2.register_forward_hook(lambda layer, inputs, outputs: seen.append(outputs))
    with torch.no_grad():
        for image in images:
            for t in range(3):
                whole(image[None, 3 * t : 3 * t + 3] / 255 - 0.5)
    maps = torch.cat(seen).view(2, 3, 128, 11, 11)
    expected = torch.cat([maps[:, 1], maps[:, 2], maps[:, 1] - maps[:, 0], maps[:, 2] - maps[:, 1]], dim=1).flatten(1)
    torch.testing.assert_close(encoder.features(images), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encoder(images), encoder.project(expected), atol=1e-4, rtol=1e-3)


def test_small_encoder_is_drqv2s():
    encoder, images = agent_of(encoder="drqv2").encoder, torch.randint(0, 256, (2, 9, 84, 84)).byte()
    hidden = images / 255.0 - 0.5
    for i in range(4):
        hidden = nn.functional.conv2d(hidden, encoder[2 * i].weight, encoder[2 * i].bias, stride=2 if i == 0 else 1)
        hidden = hidden.relu()
    torch.testing.assert_close(encoder(images, images), hidden.flatten(1).repeat(2, 1), atol=1e-5, rtol=1e-4)


def statistics(agent):
    return {name: value.clone() for name, value in agent.state_dict().items() if "running" in name or "num_b" in name}


def test_batch_normalisation_keeps_its_digits_in_a_large_batch():
    """Against float64, where torch's own in this layout is 1e-5 and more apart."""
    norm, rng = pieg.BatchNorm(8), torch.Generator().manual_seed(0)
    nn.init.uniform_(norm.weight, generator=rng)
    nn.init.normal_(norm.bias, generator=rng)
    x = torch.randn(192, 8, 42, 42, generator=rng) * 2 + torch.arange(8.0)[:, None, None]
    x = x.contiguous(memory_format=torch.channels_last)
    twin = copy.deepcopy(norm).double()
    y, expected = (
        norm(x),
        nn.functional.batch_norm(
            x.double(), twin.running_mean, twin.running_var, twin.weight, twin.bias, True, norm.momentum, norm.eps
        ),
    )
    assert (y - expected).norm() < 1e-6 * expected.norm() and norm.num_batches_tracked == 1
    for name in ("running_mean", "running_var"):
        assert (getattr(norm, name) - getattr(twin, name)).norm() < 1e-6 * getattr(twin, name).norm()


def test_each_view_is_normalised_by_itself_and_moves_the_statistics_in_turn(agent):
    """Two views at once are two calls, in order; the second one's statistics are not the first one's."""
    one, two = copy.deepcopy(agent).encoder, copy.deepcopy(agent).encoder
    dark, bright = torch.randint(0, 99, (3, 9, 84, 84)).byte(), torch.randint(99, 256, (3, 9, 84, 84)).byte()
    both, apart = one(dark, bright), torch.cat([two(dark), two(bright)])
    torch.testing.assert_close(both, apart, atol=1e-5, rtol=1e-4)
    for name, value in statistics(one).items():
        torch.testing.assert_close(value, statistics(two)[name])
    norm, frames = one.resnet[1], dark.view(9, 3, 84, 84) / 255 - 0.5
    batch = one.resnet[0](frames).mean((0, 2, 3))
    torch.testing.assert_close(0.1 * batch * 0.9, norm.running_mean - 0.1 * mean_after(one, bright), atol=1e-5, rtol=0)
    assert norm.num_batches_tracked == 2


def mean_after(encoder, images):
    return encoder.resnet[0](images.view(9, 3, 84, 84) / 255 - 0.5).mean((0, 2, 3))


@pytest.mark.parametrize("batch_norm", ["adapting", "fixed"])
def test_frozen_weights_never_change_and_running_statistics_do(tmp_path, batch_norm):
    """Through a run of the real encoder; with --batch-norm fixed neither does."""

    class Pixels(ScriptedEnvs):
        def __init__(self, *about):
            super().__init__(*about, obs_shape=(9, 84, 84))

    args = tiny(tmp_path, total_timesteps=16, batch_norm=batch_norm, eval_every=0, exact_every=0)
    torch.manual_seed(int(np.random.SeedSequence(args.seed).generate_state(1)[0]))
    before = pieg.Agent(Pixels(args, "train"), args)
    agent = go(args, Pixels, pieg.Agent)
    for name, value in agent.encoder.resnet.named_parameters():
        assert torch.equal(value, before.encoder.resnet.get_parameter(name)), name
    assert not torch.equal(agent.encoder.project[0].weight, before.encoder.project[0].weight)
    for name, value in statistics(before).items():
        assert torch.equal(value, statistics(agent)[name]) == (batch_norm == "fixed"), name
    tracked = {int(value) for name, value in statistics(agent).items() if "num_b" in name}
    assert tracked == ({3 * 2} if batch_norm == "adapting" else {0})  # updates at steps 12 and 14, three views each


def test_acting_goes_by_running_statistics_and_evaluating_by_the_frames(agent):
    agent, obs = copy.deepcopy(agent), torch.randint(0, 256, (1, 9, 84, 84)).byte()
    before = statistics(agent)
    running = pieg.act(agent.eval(), obs)["actions"]
    twice = pieg.act(agent, obs.repeat(2, 1, 1, 1))["actions"]
    torch.testing.assert_close(twice, running.repeat(2, 1), atol=1e-5, rtol=1e-4)
    pieg.normalise_by_own(agent, pieg.Args())
    own = pieg.act(agent, obs)["actions"]
    training = copy.deepcopy(agent)
    pieg.normalise_by_own(training, pieg.Args(), False)
    expected = pieg.act(training.train(), obs)["actions"]  # a batch of these three frames
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)
    assert (own - running).abs().max() > 1e-3
    pieg.normalise_by_own(agent, pieg.Args(), False)
    assert torch.equal(pieg.act(agent, obs)["actions"], running)
    assert all(torch.equal(value, before[name]) for name, value in statistics(agent).items())


@pytest.mark.parametrize("batch_norm", ["adapting", "fixed"])
@pytest.mark.parametrize("statistics_of", ["frames", "running"])
def test_what_an_evaluation_goes_by(tmp_path, monkeypatch, batch_norm, statistics_of):
    """The frames' statistics only where those of training adapt; afterwards all is as before."""
    args = tiny(tmp_path, env_id="cartpole-balance", batch_norm=batch_norm, eval_batch_norm=statistics_of)
    envs, seen, act = ScriptedEnvs(args, "test", obs_shape=(9, 84, 84)), [], pieg.act
    agent = pieg.Agent(envs, args)
    norms = [layer for layer in agent.modules() if isinstance(layer, nn.BatchNorm2d)]
    monkeypatch.setattr(pieg, "act", lambda *inputs: seen.append({layer.training for layer in norms}) or act(*inputs))
    before = statistics(agent)
    pieg.evaluate(agent, args, lambda *_: envs, "test")
    assert {layer.training for layer in norms} == {batch_norm == "adapting"}
    assert seen and all(modes == {batch_norm == "adapting" and statistics_of == "frames"} for modes in seen)
    assert all(torch.equal(value, before[name]) for name, value in statistics(agent).items())


def test_actions_are_the_mean_and_noise(agent):
    agent, obs = copy.deepcopy(agent).eval(), torch.randint(0, 256, (4, 9, 84, 84)).byte()
    mean, exploration = agent.actor(agent.encoder(obs)), torch.randn(4, 6)
    assert torch.equal(pieg.act(agent, obs)["actions"], mean) and mean.abs().max() <= 1
    noisy = pieg.act(agent, obs, exploration)["actions"]
    torch.testing.assert_close(noisy, (mean + exploration).clamp(-1, 1))


# ---- Weights of the encoder ----
def test_weights_come_from_a_file(tmp_path):
    torch.manual_seed(3)
    whole = pieg.torchvision.models.resnet18(weights=None)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    encoder = agent_of(encoder_weights=str(tmp_path / "weights.pth")).encoder
    assert torch.equal(encoder.resnet[0].weight, whole.conv1.weight)
    assert torch.equal(encoder.resnet[5][1].conv2.weight, whole.layer2[1].conv2.weight)


@pytest.mark.parametrize("name", ["imagenet", "IMAGENET1K_V1"])
def test_without_a_network_the_other_two_are_named(name, monkeypatch, capsys):
    def no_network(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(pieg.torchvision.models._api, "load_state_dict_from_url", no_network)
    said = refusal(capsys, lambda: agent_of(encoder_weights=name))
    assert f"--encoder-weights {name}: " in said and "not known" in said and "`random`" in said and "a file" in said


def test_wrong_files_of_weights_say_so(tmp_path, capsys):
    torch.save(pieg.torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("other.pth", "text.pth", "nowhere.pth"):
        said = refusal(capsys, lambda name=name: agent_of(encoder_weights=str(tmp_path / name)))
        assert name in said and "torchvision's resnet18" in said


# ---- Pictures ----
def test_pictures_are_chosen_by_the_seed(tmp_path, capsys, monkeypatch):
    """From all folders below, each once, as many as there are, in the size of Places365's."""
    for number in range(6):
        folder = tmp_path / "a" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{number}.png"), np.full((40, 50, 3), (9, 99, 40 * number), np.uint8))
    (tmp_path / "a" / "note.txt").write_text("no picture")
    args = tiny(tmp_path, overlay_dir=str(tmp_path / "a"), overlay_pictures=8)
    state = torch.get_rng_state()
    pictures = pieg.load_pictures(args, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert pictures.shape == (6, 3, 256, 256) and pictures.amin((2, 3)).equal(pictures.amax((2, 3)))
    assert (pictures[:, 1:, 0, 0] == torch.tensor([99, 9])).all()  # red, green, blue
    assert sorted(pictures[:, 0, 0, 0].tolist()) == [0, 40, 80, 120, 160, 200]
    assert "crops of 6 of 6 pictures" in capsys.readouterr().out
    assert torch.equal(pictures, pieg.load_pictures(args, 5))
    assert not torch.equal(pictures, pieg.load_pictures(args, 6))
    fewer = pieg.load_pictures(replace(args, overlay_pictures=4), 5)
    assert torch.equal(fewer, pictures[:4])
    assert "crops of 4 of 6 pictures" in capsys.readouterr().out
    monkeypatch.setattr(cv2, "imread", error_of_cv2)  # of a picture that is too large
    assert "cannot be read as a picture" in refusal(capsys, pieg.load_pictures, args, 5)
    monkeypatch.undo()
    for path in (tmp_path / "a").rglob("*.png"):
        path.write_text("no picture either")
    assert "cannot be read as a picture" in refusal(capsys, pieg.load_pictures, args, 5)


def error_of_cv2(_):
    raise cv2.error("pixels <= CV_IO_MAX_IMAGE_PIXELS")


def test_a_picture_of_their_size_is_held_as_it_is(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "one.png"), picture)
    (held,) = pieg.load_pictures(tiny(tmp_path, overlay_dir=str(tmp_path)), 1)
    assert np.array_equal(held.permute(1, 2, 0).flip(2), picture)


def test_the_number_of_pictures_that_are_held(tmp_path):
    """10,000 of 3 x 256 x 256 bytes are 2 GB; as many textures would take a minute or two to make."""
    assert pieg.check(pieg.Args()).overlay_pictures == 1_000
    assert pieg.check(pieg.Args(overlay_dir=str(tmp_path))).overlay_pictures == 10_000
    assert pieg.check(pieg.Args(overlay_dir=str(tmp_path), overlay_pictures=30)).overlay_pictures == 30


# ---- Update ----
def filled(args, steps=24):
    rng = np.random.default_rng(0)
    replay = pieg.Replay(args.buffer_size, (9, 12, 12), 2, args, CPU, Path(args.runs_dir) / "replay.bin")
    replay.begin(rng.integers(0, 256, (3, 12, 12), dtype=np.uint8))
    for step in range(steps):
        frame, action = rng.integers(0, 256, (3, 12, 12), dtype=np.uint8), rng.uniform(-1, 1, 2).astype(np.float32)
        replay.add(action, float(rng.normal()), step % 8 == 7, frame)
        if step % 4 == 3:
            replay.begin(frame)
    return replay


def parts_of(args, make_agent=TinyPieg):
    torch.manual_seed(0)
    agent = make_agent(Space, args)
    target = copy.deepcopy(agent.critic).requires_grad_(False)
    for value in target.parameters():
        value.add_(0.1 * torch.randn_like(value))
    learned = [param for param in agent.parameters() if param.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=args.learning_rate, eps=args.adam_eps, fused=True)
    return agent, target, optimizer, filled(args)


def draws_of(args, replay):
    torch.manual_seed(1)
    draws = {"rows": replay.sample(torch.rand(args.batch_size, dtype=torch.float64))}
    draws["offsets"] = torch.randint(9, (2, args.batch_size, 2))
    draws["normal"], draws["sigma"] = torch.randn(2, args.batch_size, 2), torch.tensor(0.25)
    pictures = torch.randint(0, 256, (5, 3, 20, 20)).byte()
    draws["strong"] = pieg.draw_crops(args.batch_size, pictures, torch.default_generator)
    if args.strong_augmentation == "conv":
        draws["strong"] = torch.randn(args.batch_size, 3, 3, 3, 3)
    return draws, pictures


def plain_update(agent, target, replay, pictures, draws, args):
    """What an update does, one view and one loss at a time. -> gradients that Adam is given; the agent's weights move.

    With `none` it is DrQ-v2's, in which no augmentation but the shift is known.
    """
    batch = replay.gather(draws["rows"])

    def crops(key, offsets):
        padded = nn.functional.pad(batch[key].double(), (4, 4, 4, 4), mode="replicate")
        return torch.stack([x[:, i : i + 12, j : j + 12] for x, (i, j) in zip(padded, offsets.tolist(), strict=True)])

    def noisy(actions, normal):
        wanted = actions + (0.25 * normal).clamp(-0.3, 0.3)
        return actions + (wanted.clamp(-1 + 1e-6, 1 - 1e-6) - actions).detach()

    def adam(params, gradient):
        for param, part in zip(params, gradient, strict=True):
            param.data = param.data - args.learning_rate * part / (part.abs() + args.adam_eps)
        return [0.1 * part for part in gradient]

    obs, next_obs = crops("obs", draws["offsets"][0]), crops("next_obs", draws["offsets"][1])
    hidden = [agent.encoder(obs)]
    if args.strong_augmentation == "overlay":
        pictures = pieg.crop_pictures(pictures, draws["strong"], 12)
        hidden.append(agent.encoder((obs + pictures.repeat(1, 3, 1, 1)) / 2))
    if args.strong_augmentation == "conv":
        hidden.append(agent.encoder(pieg.random_convolution(obs.byte(), draws["strong"])))
    with torch.no_grad():
        next_hidden = agent.encoder(next_obs)
        q1, q2 = target(next_hidden, noisy(agent.actor(next_hidden), draws["normal"][1]))
        y = batch["returns"] + batch["bootstrap"] * torch.minimum(q1, q2)
    loss = 0
    for view in hidden:
        q1, q2 = agent.critic(view, batch["actions"])
        loss = loss + nn.functional.mse_loss(q1, y) + nn.functional.mse_loss(q2, y)
    critic, actor = [*agent.encoder.parameters(), *agent.critic.parameters()], list(agent.actor.parameters())
    moments = adam(critic, torch.autograd.grad(loss / len(hidden), critic))
    plain = hidden[0].detach()
    q1, q2 = agent.critic(plain, noisy(agent.actor(plain), draws["normal"][0]))
    moments += adam(actor, torch.autograd.grad(-torch.minimum(q1, q2).mean(), actor))
    for old, new in zip(target.parameters(), agent.critic.parameters(), strict=True):
        old.copy_(args.tau * new.detach() + (1 - args.tau) * old)
    return moments


class Plain(TinyPieg):
    """Without batch normalisation, as DrQ-v2."""

    def __init__(self, *args):
        super().__init__(*args)
        self.encoder.norm = nn.Identity()


VARIANTS = [({}, TinyPieg), ({"n_step": 1}, TinyPieg), ({"strong_augmentation": "conv"}, TinyPieg)]
VARIANTS += [({"strong_augmentation": "none", "n_step": 3}, Plain)]


@pytest.mark.parametrize(("changes", "make_agent"), VARIANTS, ids=str)
def test_update_is_the_plain_one(tmp_path, changes, make_agent):
    """In double precision, or rounding would hide what is small. The running statistics too."""
    args = tiny(tmp_path, **changes)
    (agent, target, optimizer, replay), (twin, twin_target, _, _) = (parts_of(args, make_agent) for _ in range(2))
    for network in (agent, target, twin, twin_target):
        network.double()
    draws, pictures = draws_of(args, replay)
    draws["normal"] = draws["normal"].double()
    logged = pieg.update(agent, target, optimizer, replay, pictures, draws, args)
    moments = plain_update(twin, twin_target, replay, pictures, draws, args)
    own = [*agent.encoder.parameters(), *agent.critic.parameters(), *agent.actor.parameters()]
    for param, moment in zip(own, moments, strict=True):
        assert optimizer.state[param]["step"] == 1
        assert (optimizer.state[param]["exp_avg"] - moment).norm() <= 1e-5 * moment.norm()
    for one, two in ((agent, twin), (target, twin_target)):
        for (name, value), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
            torch.testing.assert_close(value, other, atol=1e-6, rtol=1e-6, msg=name)
    assert {"qf_loss", "qf_grad_norm", "actor_loss", "actor_grad_norm", "qf1_values", "qf2_values"} == logged.keys()


def test_no_gradient_of_the_actor_reaches_the_encoder(tmp_path):
    """With the critic's loss switched off, what the actor learns leaves encoder and critic as they are."""
    args = tiny(tmp_path)
    agent, target, optimizer, replay = parts_of(args)
    draws, pictures = draws_of(args, replay)
    seen, critic = [], [*agent.encoder.parameters(), *agent.critic.parameters()]
    for param in critic:
        param.register_hook(lambda gradient: seen.append(1) or gradient * 0)
    before = copy.deepcopy(agent)
    pieg.update(agent, target, optimizer, replay, pictures, draws, args)
    assert len(seen) == len(critic)
    for name, value in agent.named_parameters():
        assert torch.equal(value, before.get_parameter(name)) == (not name.startswith("actor")), name


def test_method_off_is_drqv2_bit_for_bit(tmp_path):
    """Without strong augmentation and with DrQ-v2's encoder, the method's other settings mean nothing."""

    class Pixels(ScriptedEnvs):
        def __init__(self, *about):
            super().__init__(*about, obs_shape=(9, 20, 20))

    off = {"encoder": "drqv2", "strong_augmentation": "none", "total_timesteps": 24}
    go(tiny(tmp_path / "off", **off), Pixels, pieg.Agent)
    other = {"encoder_weights": "imagenet", "encoder_layer": 4, "projection_dim": 7, "frame_differences": False}
    other |= {"batch_norm": "fixed", "overlay_pictures": 9, "eval_batch_norm": "running"}
    go(tiny(tmp_path / "other", **off | other), Pixels, pieg.Agent)
    off, other = folder_in(tmp_path / "off"), folder_in(tmp_path / "other")
    assert same(state_of(off), state_of(other)) and metrics_of(off) == metrics_of(other)


def test_strong_augmentation_shifts_no_other_draw(tmp_path, monkeypatch):
    seen, update = {}, pieg.update
    for kind in ("overlay", "conv", "none"):
        draws = seen[kind] = []
        monkeypatch.setattr(pieg, "update", lambda *args, draws=draws: draws.append(args[5]) or update(*args))
        go(tiny(tmp_path / kind, strong_augmentation=kind, eval_every=0, exact_every=0))
    for one, two, three in zip(*seen.values(), strict=True):
        for name in ("rows", "offsets", "normal", "sigma"):
            assert torch.equal(one[name], two[name]) and torch.equal(one[name], three[name]), name
    assert len(seen["none"]) == (48 - 12) // 2
    expected = [max(1 - step / 30, 0) * 0.9 + 0.1 for step in range(12, 48, 2)]
    assert [draws["sigma"].item() for draws in seen["none"]] == pytest.approx(expected)


# ---- Replay ----
@pytest.mark.parametrize(("capacity", "n_step"), [(200, 3), (40, 3), (23, 1), (23, 3)])
def test_replay_is_a_list_of_transitions(capacity, n_step, tmp_path, monkeypatch):
    """Stacks, n-step returns and bootstraps of the newest ones, through ends of both kinds, a break, and the file."""
    monkeypatch.setattr(pieg, "BLOCK", 4)  # which is written and read in blocks
    rng, args = np.random.default_rng(1), pieg.Args(gamma=0.9, n_step=n_step)
    path, steps = tmp_path / "replay.bin", {}  # row: stack, action, reward, failed
    replay = pieg.Replay(capacity, (9, 6, 6), 2, args, CPU, path)

    def frame():
        return rng.integers(0, 256, (3, 6, 6), dtype=np.uint8)

    def check(replay):
        held = [row for row in steps if row >= replay.size + 3 - capacity and ends[row] - row >= n_step]
        if not held:
            return
        found = replay.sample((torch.arange(4 * capacity, dtype=torch.float64) + 0.5) / (4 * capacity))
        assert sorted(set(found.tolist())) == sorted(held)
        counts = found.bincount()[found.unique()]
        assert counts.max() - counts.min() <= 1  # each as likely
        batch = replay.gather(torch.tensor(sorted(held)))
        for i, row in enumerate(sorted(held)):
            stack, action, _, _ = steps[row]
            window = [steps[row + k] for k in range(n_step)]
            returns = sum(0.9**k * reward for k, (_, _, reward, _) in enumerate(window))
            assert np.array_equal(batch["obs"][i], stack) and np.array_equal(batch["actions"][i], action)
            assert np.array_equal(batch["next_obs"][i], stacks[row + n_step])
            assert batch["returns"][i].item() == pytest.approx(returns, abs=1e-5)
            assert batch["bootstrap"][i].item() == pytest.approx(0 if window[-1][3] else 0.9**n_step)

    size, stacks, ends = 0, {}, {}  # row: stack; row of a step: last row of its episode so far
    for number in range(14):
        stack = np.tile(frame(), (3, 1, 1))
        replay.begin(stack[-3:])
        first, stacks[size] = size, stack
        for time in range(length := int(rng.integers(1, 12))):
            action, reward = rng.uniform(-1, 1, 2).astype(np.float32), float(np.float32(rng.normal()))
            failed, following = bool(time == length - 1 and number % 2), np.concatenate([stack[3:], frame()])
            replay.add(action, reward, failed, following[-3:])
            steps[size] = stack, action, reward, failed
            size, stack = size + 1, following
            stacks[size] = stack
            ends.update(dict.fromkeys(range(first, size), size))
            check(replay)
        if number in (4, 9):  # saved in the middle of an episode; what is under way ends there
            other = pieg.Replay(capacity, (9, 6, 6), 2, args, CPU, path)
            other.load_state_dict(replay.state_dict())
            assert np.array_equal(ready_rows(other), ready_rows(replay))
            replay = other
            check(replay)
        size += 1  # the last observation's row
    assert replay.size == size - 1


def test_a_replay_that_is_shorter_than_its_checkpoint_is_refused(tmp_path, capsys):
    replay = filled(tiny(tmp_path))
    state = replay.state_dict()
    for path, rows in ((replay.path, 1), (tmp_path / "nowhere.bin", 0)):
        replay.path = path
        said = refusal(capsys, replay.load_state_dict, {**state, "size": state["size"] + rows})
        assert f"{path} does not hold the {state['size'] + rows + 1} rows" in said


def test_what_a_failed_save_left_behind_is_written_over(tmp_path):
    """Rows of no checkpoint are cut off; the row that was under way is there at any time."""
    args = tiny(tmp_path)
    replay = filled(args, steps=10)
    state, content = replay.state_dict(), replay.path.read_bytes()
    replay.path.write_bytes(content + b"torn")
    again = pieg.Replay(30, (9, 12, 12), 2, args, CPU, replay.path)
    again.load_state_dict(state)
    assert again.state_dict() == state and replay.path.read_bytes() == content
    again.add(np.zeros(2, np.float32), 1.0, False, np.zeros((3, 12, 12), np.uint8))
    again.state_dict()
    assert len(replay.path.read_bytes()) == len(content) + replay.row.itemsize
    replay.load_state_dict(state)  # a kill here leaves the older checkpoint, which still finds its rows


def test_a_reward_that_is_not_finite_is_never_saved(tmp_path):
    replay = filled(tiny(tmp_path))
    replay.state_dict()
    before = replay.path.read_bytes()
    replay.add(np.zeros(2, np.float32), np.inf, False, np.zeros((3, 12, 12), np.uint8))
    with pytest.raises(SystemExit, match="a reward is not finite"):
        replay.state_dict()
    assert replay.path.read_bytes() == before


def test_the_replay_is_no_larger_than_the_run():
    args = pieg.check(pieg.Args(env_id="cheetah-run"))
    assert args.buffer_size == 1_000_000 and 500_500 + 1_001 < pieg.rows_needed(args) < 530_000
    assert pieg.rows_needed(replace(args, buffer_size=1_000)) == 1_000


# ---- Runs ----
def test_time_limits_bootstrap_and_failures_do_not(tmp_path, monkeypatch):
    """Each transition is the one that was played: its last observation is not the next episode's first."""
    replays, init, played = [], pieg.Replay.__init__, []
    monkeypatch.setattr(pieg.Replay, "__init__", lambda self, *args: (replays.append(self), init(self, *args))[1])

    class Seen(Envs):
        def step(self, actions):
            outcome = super().step(actions)
            played.append((actions[0], outcome[1][0], outcome[2][0], outcome[4]["final_obs"][0, -3:]))
            return outcome

    go(tiny(tmp_path, buffer_size=100, n_step=1, eval_every=0, exact_every=0), Seen)
    batch = replays[0].gather(torch.from_numpy(ready_rows(replays[0])))
    assert len(batch["obs"]) == len(played) == 48
    for i, (action, reward, failed, frame) in enumerate(played):
        assert np.array_equal(batch["actions"][i], action) and batch["returns"][i] == reward
        assert batch["bootstrap"][i].item() == pytest.approx(0 if failed else 0.99)
        assert np.array_equal(batch["next_obs"][i, -3:], frame)
    assert [i + 1 for i in range(48) if batch["bootstrap"][i] == 0] == [10, 20, 30, 40]


def test_resumed_bit_for_bit(tmp_path):
    assert_resumes_exactly(tmp_path, go, tiny, Envs, exact_step=25)


def test_a_run_is_evaluated_where_it_could_not_be_trained(tmp_path, monkeypatch):
    """Without its pictures, and with less disk than its replay would take: as the last evaluation of its run."""
    (tmp_path / "pictures").mkdir()
    cv2.imwrite(str(tmp_path / "pictures" / "one.png"), np.full((20, 20, 3), 9, np.uint8))
    go(tiny(tmp_path, overlay_dir=str(tmp_path / "pictures")))
    (tmp_path / "pictures" / "one.png").unlink()
    (tmp_path / "pictures").rmdir()
    monkeypatch.setattr(pieg.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    state = pieg.load_checkpoint(folder_in(tmp_path))
    args = pieg.Args(**state["about"]["args"])
    (agent,) = pieg.load_agents(args, state, Envs, TinyPieg)
    value = float(pieg.evaluate(agent, args, Envs, "test").mean())
    assert f"48,eval/test_return,{value}" in metrics_of(folder_in(tmp_path))


def test_pictures_that_moved(tmp_path, capsys):
    """A resume takes them from where they are now. Made-up textures are not the same as pictures."""
    (tmp_path / "before").mkdir()
    cv2.imwrite(str(tmp_path / "before" / "one.png"), np.full((20, 20, 3), 9, np.uint8))
    go(tiny(tmp_path / "runs", overlay_dir=str(tmp_path / "before"), total_timesteps=18))
    run, now = folder_in(tmp_path / "runs"), str(tmp_path / "now")
    (tmp_path / "before").rename(now)
    args = pieg.Args(**pieg.load_checkpoint(run)["about"]["args"])
    longer = replace(args, resume=str(run), total_timesteps=36)
    assert "before: no such folder" in refusal(capsys, go, longer)
    assert "pictures and textures cannot be exchanged" in refusal(capsys, go, replace(longer, overlay_dir="textures"))
    go(replace(longer, overlay_dir=now))
    assert pieg.load_checkpoint(run)["step"] == 36
    assert pieg.load_checkpoint(run)["about"]["args"]["overlay_dir"] == now


def test_the_smallest_replay_lasts_through_episodes(tmp_path, capsys):
    args = tiny(tmp_path / "small", n_step=3, buffer_size=10, eval_every=0)
    go(args)
    assert "--buffer-size 9: from 10" in refusal(capsys, go, replace(args, buffer_size=9))
    said = refusal(capsys, go, replace(args, runs_dir=str(tmp_path / "long"), n_step=6, buffer_size=30))
    assert "--n-step 6: no episode was that long so far" in said  # they have 5 steps


def test_what_does_not_fit_into_memory_leaves_nothing(tmp_path, monkeypatch):
    """That the command line makes one line of it is shown in test_cli_errors.py."""
    monkeypatch.setattr(pieg.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**18))
    with pytest.raises(MemoryError, match="Unable to allocate"):
        go(tiny(tmp_path, total_timesteps=10**9, buffer_size=10**9))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_checkpoint_holds_the_frozen_weights_too(tmp_path, monkeypatch):
    """Evaluated or gone on with where the weights cannot be had any more."""
    args = tiny(tmp_path, total_timesteps=13, eval_every=0)
    torch.save(pieg.torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "weights.pth")
    args.encoder_weights = str(tmp_path / "weights.pth")

    class Pixels(ScriptedEnvs):
        def __init__(self, *about):
            super().__init__(*about, obs_shape=(9, 84, 84))

    agent = go(args, Pixels, pieg.Agent)
    (tmp_path / "weights.pth").unlink()
    state = pieg.load_checkpoint(folder_in(tmp_path))
    (loaded,) = pieg.load_agents(pieg.Args(**state["about"]["args"]), state, Pixels)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in agent.state_dict().items())
    go(replace(args, resume=str(folder_in(tmp_path)), total_timesteps=14), Pixels, pieg.Agent)


def test_each_look_is_evaluated_and_logged(tmp_path, dmcgb):
    splits, data = [], dmcgb

    class Seen(Envs):
        def __init__(self, args, split, start=0):
            super().__init__(args, split, start)
            splits.append((split, args.seed))

    go(tiny(tmp_path / "run", eval_modes=("color_easy", "video_easy"), dmcgb_dir=str(data)), Seen)
    looks = [("test", 42), ("color_easy", 42), ("video_easy", 42)]
    assert [split for split in splits if split[1] == 42] == 3 * looks  # twice in the run, and at its end
    logged = [line.split(",")[:2] for line in metrics_of(folder_in(tmp_path / "run"))]
    keys = ("eval/test_return", "eval/color_easy_return", "eval/video_easy_return")
    assert [row for row in logged if row[1] in keys] == [[str(step), key] for step in (16, 32, 48) for key in keys]


@pytest.mark.filterwarnings("error")
def test_looks_come_back_from_a_runs_file_as_they_were(tmp_path, dmcgb):
    """JSON has no tuples, of which the command line warns."""
    flags = ["--eval-every", "0", "--eval-modes", "color_easy", "--dmcgb-dir", str(dmcgb)]
    go(tiny(tmp_path / "run", eval_modes=("color_easy",), dmcgb_dir=str(dmcgb), total_timesteps=13, eval_every=0))
    args = pieg.load_checkpoint(folder_in(tmp_path / "run"))["about"]["args"]
    assert args["eval_modes"] == ["color_easy"] and pieg.Args(**args).eval_modes == ("color_easy",)
    for more in ([], flags):
        resume = ["--resume", str(folder_in(tmp_path / "run")), "--total-timesteps", str(14 + len(more))]
        pieg.main([*resume, *more], Envs, TinyPieg)


def test_the_random_steps_fill_the_range(tmp_path):
    seen = []

    class Seen(Envs):
        def step(self, actions):
            seen.append(actions[0])
            assert actions.dtype == np.float32 and actions.shape == (1, 2)
            return super().step(actions)

    go(tiny(tmp_path, total_timesteps=220, learning_starts=210, eval_every=0, exact_every=0), Seen)
    random = np.array(seen[:210])
    assert np.abs(random).max() <= 1 and np.abs(random.mean(0)).max() < 0.15
    assert np.abs(random.var(0) - 1 / 3).max() < 0.06


# ---- Tasks ----
def test_the_papers_settings(tmp_path):
    def of(env_id, **changes):
        args = pieg.check(pieg.Args(env_id=env_id, runs_dir=str(tmp_path), **changes))
        assert pieg.check(args) == args and args.env_id in pieg.TASKS.split()
        return args.batch_size, args.n_step, args.noise_steps, args.buffer_size, args.total_timesteps

    assert of("walker-walk") == of("walker_stand") == (512, 1, 100_000, 1_000_000, 500_500)
    assert of("walker-run") == (512, 1, 500_000, 1_000_000, 500_500)
    assert of("ball_in_cup-catch") == of("finger_spin") == (256, 3, 100_000, 1_000_000, 500_500)
    assert of("cheetah-run") == of("fish-swim") == (256, 3, 500_000, 1_000_000, 500_500)
    assert of("quadruped-run") == (256, 3, 500_000, 100_000, 500_500)
    assert of("humanoid-run") == (256, 3, 2_000_000, 1_000_000, 500_500)
    assert of("walker-walk", batch_size=3, n_step=2, noise_steps=4, buffer_size=50, action_repeat=4) == (
        *(3, 2, 4, 50),
        250_250,
    )
    assert pieg.check(pieg.Args()).feature_dim == 256 and pieg.check(pieg.Args(encoder="drqv2")).feature_dim == 50


@pytest.fixture(scope="module")
def suite():
    return pieg.import_suite()


def test_the_tasks_are_the_suites(suite):
    ours = {tuple(task.split("-")) for task in pieg.TASKS.split()}
    assert ours == {(domain, task) for domain, task in suite.ALL_TASKS if domain != "lqr"}
    assert {*pieg.EASY.split()} <= {*pieg.TASKS.split()}


# ---- DMC-GB ----
def write_clip(path, frames):
    """A clip of some frames of 96 x 96, lossless."""
    path.parent.mkdir(parents=True, exist_ok=True)
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"FFV1"), 25, (96, 96))
    assert video.isOpened()
    for frame in frames:
        video.write(np.ascontiguousarray(frame[..., ::-1]))
    video.release()


def make_looks(folder):
    """A folder of looks: 100 sets of colours, 3 clips of 4 to 6 frames. Frame j of clip i is all (60 i, 10 j, 200)."""
    rng = np.random.default_rng(0)
    for mode in MODES[:2]:
        keys = ("skybox_rgb", "grid_rgb1", "grid_rgb2", "self_rgb")
        sets = [{key: rng.random(3).tolist() for key in keys} for _ in range(100)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{mode}.json").write_text(json.dumps(sets))
    for mode in MODES[2:]:
        for number in range(3):
            frames = [np.full((96, 96, 3), (60 * number, 10 * j, 200), np.uint8) for j in range(4 + number)]
            clip = folder / mode / f"video{number}.avi"
            write_clip(clip, frames)
            clip.rename(clip.with_suffix(".mp4"))
    return folder


@pytest.fixture
def dmcgb(tmp_path):
    return make_looks(tmp_path / "dmcgb")


def test_the_key_is_colorsys():
    """On random colours, and on those where hue, saturation or value are at a threshold."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (40_000, 3))
    edges = [(r, g, b) for g in range(0, 256, 5) for r in range(0, 256, 15) for b in range(0, 256, 5)]
    edges += [(0, 70, 0), (0, 69, 0), (175, 255, 175), (176, 255, 176), (85, 255, 0), (86, 255, 0), (0, 60, 55)]
    edges += [(0, 255, 234), (0, 255, 235), (0, 0, 0), (255, 255, 255), (51, 204, 51)]
    colours = np.concatenate([colours, edges]).astype(np.uint8)
    found = pieg.is_green(colours[None])[0]

    def wanted(colour):
        h, s, v = colorsys.rgb_to_hsv(*(int(x) / 255 for x in colour))
        return 100 <= h * 360 <= 185 and s * 255 >= 80 and v * 255 >= 70

    assert found.tolist() == [wanted(colour) for colour in colours]
    assert 0.05 < found.mean() < 0.5


def test_clips_are_resized_and_go_round(tmp_path):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(3)]
    write_clip(tmp_path / "clip.avi", frames)
    seen, again = pieg.frames_of(tmp_path / "clip.avi"), [0, 1, 2, 0, 1]
    for j in again:
        frame = torch.from_numpy(frames[j]).permute(2, 0, 1)[None] / 255
        resized = nn.functional.interpolate(frame, (84, 84), mode="bilinear", align_corners=False)
        expected = (resized * 255)[0].permute(1, 2, 0).byte().numpy()
        assert np.abs(next(seen).astype(int) - expected).max() <= 3  # the codec stores other colours
    (tmp_path / "clip.avi").unlink()
    with pytest.raises(OSError, match=r"clip.avi cannot be read any more"):
        [next(seen) for _ in range(2)]


@pytest.mark.parametrize("shape", [(352, 352), (218, 480), (84, 84), (50, 60)])
def test_frames_are_resized_as_torch_does(shape):
    """Within one level of gray, as torch's own kernels are of each other; one colour stays itself."""
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255
    expected = nn.functional.interpolate(pixels, (84, 84), mode="bilinear", align_corners=False)[0] * 255
    close = np.abs(pieg.resized(frame, 84).astype(int) - expected.byte().permute(1, 2, 0).numpy())
    assert close.max() <= 1 and close.mean() < 0.05
    assert (pieg.resized(np.full_like(frame, 77), 84) == 77).all()


@pytest.mark.parametrize("mode", MODES)
def test_missing_and_broken_data_say_so(mode, tmp_path, dmcgb):
    with pytest.raises(FileNotFoundError, match=rf"{mode}.*make dmcgb.*--dmcgb-dir"):
        pieg.make_dmc("walker-walk", mode, dmcgb_dir=tmp_path / "nowhere")
    folder = dmcgb
    looks = pieg.dmcgb_data(folder, mode)
    if mode in pieg.CLIPS:
        assert [path.name for path in looks] == ["video0.mp4", "video1.mp4", "video2.mp4"]
        looks[1].write_text("version https://git-lfs.github.com/spec/v1")
        with pytest.raises(RuntimeError, match=r"video1.mp4 has no frames.*git-lfs"):
            pieg.dmcgb_data(folder, mode)
        return
    assert len(looks) == 100
    del looks[17]["grid_rgb2"]
    (folder / f"{mode}.json").write_text(json.dumps(looks))
    with pytest.raises(ValueError, match=rf"{mode}.json does not hold 100 sets of grid_rgb1, grid_rgb2"):
        pieg.dmcgb_data(folder, mode)
    looks[17]["grid_rgb2"] = [0.0, 0.0, 0.0]
    (folder / f"{mode}.json").write_text(json.dumps(looks[:99]))
    with pytest.raises(ValueError, match="does not hold 100 sets"):
        pieg.dmcgb_data(folder, mode)


def test_the_authors_files_of_colours_are_read(tmp_path, dmcgb):
    """Pickled arrays, without running what a pickle says."""
    folder = dmcgb
    sets = pieg.dmcgb_data(folder, "color_hard")
    arrays = [{key: np.array(value) for key, value in colours.items()} for colours in sets]
    torch.save(arrays, tmp_path / "color_hard.pt")
    read = pieg.dmcgb_data(tmp_path, "color_hard")
    assert all(np.array_equal(one[key], two[key]) for one, two in zip(sets, read, strict=True) for key in one)


def test_make_dmcgb_fetches_the_folder(tmp_path):
    """From a repository of the same layout, through what an interrupted copy left; a second time it says so."""
    source, here = tmp_path / "source", tmp_path / "here"
    (source / "src" / "env" / "data" / "video_easy").mkdir(parents=True)
    (source / "src" / "env" / "data" / "video_easy" / "video0.mp4").write_text("a clip")
    (source / "LICENSE").write_text("MIT")
    (here / "data" / "dmcgb.part" / "video_easy").mkdir(parents=True)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(source)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "data"]):
        subprocess.run([*git, *words], check=True)
    make = ["make", "-f", str(ROOT / "Makefile"), "-C", str(here), "dmcgb", f"DMCGB=file://{source}"]
    subprocess.run(make, check=True, capture_output=True)
    found = sorted(str(path.relative_to(here / "data")) for path in (here / "data").rglob("*") if path.is_file())
    assert found == ["dmcgb/LICENSE", "dmcgb/video_easy/video0.mp4"]
    again = subprocess.run(make, capture_output=True, text=True)
    assert again.returncode and "error: data/dmcgb is there already" in again.stderr


def test_too_few_clips_are_a_warning(tmp_path, dmcgb, capsys):
    pieg.check(tiny(tmp_path, eval_modes=("video_hard",), dmcgb_dir=str(dmcgb)))
    assert "warning: 3 of the 100 clips of video_hard are there" in capsys.readouterr().out


@pytest.mark.slow
def test_the_mode_train_is_the_suite(suite):
    """Beside the same task without the wrapper: frames, sums of rewards, scaled actions, the end, streams."""
    env = pieg.make_dmc("quadruped-walk", seed=3, action_repeat=250)
    bare, rng = suite.load("quadruped", "walk", task_kwargs={"random": 3}), np.random.default_rng(0)

    def picture():
        return bare.physics.render(84, 84, camera_id=2).transpose(2, 0, 1)

    def close(one, two):
        assert np.abs(one.astype(int) - two.astype(int)).max() <= 1  # some drivers round otherwise now and then

    bare.reset()
    obs, _ = env.reset()
    close(obs, np.concatenate([picture()] * 3))
    spec = bare.action_spec()
    assert spec.minimum.min() != -1 or spec.maximum.max() != 1
    for step in range(1, 5):
        action, before, total = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32), obs, 0.0
        obs, reward, terminated, truncated, _ = env.step(action)
        for _ in range(250):
            moment = bare.step(spec.minimum + (action.astype(float) + 1) / 2 * (spec.maximum - spec.minimum))
            total += moment.reward
        assert reward == pytest.approx(total, abs=1e-4)
        assert not terminated and truncated == moment.last() == (step == 4)
        close(obs[-3:], picture())
        assert np.array_equal(obs[:6], before[3:])
    bare.reset()
    close(env.reset()[0][-3:], picture())
    env.close()


def edited(suite, monkeypatch, colours, *task, seed):
    """The task as it is loaded with edited XML."""
    from dm_control.suite import common

    assets = dict(common.ASSETS)
    for path in ("./common/skybox.xml", "./common/materials.xml"):
        root = ElementTree.fromstring(assets[path])
        for element in root.iter():
            for key, rgb in colours.items():
                kind, name, attribute = pieg.COLOURS[key]
                if (element.tag, element.get("name")) == (kind, name):
                    element.set(attribute, " ".join(map(str, [*rgb, 1][: 4 if kind == "material" else 3])))
        assets[path] = ElementTree.tostring(root)
    with monkeypatch.context() as patch:
        for path, text in assets.items():
            patch.setitem(common.ASSETS, path, text)
        return suite.load(*task, task_kwargs={"random": seed})


GREEN = {"skybox_rgb": (0.2, 0.8, 0.2), "skybox_rgb2": (0.2, 0.8, 0.2), "skybox_markrgb": (0.2, 0.8, 0.2)}
GREEN_FLOOR = GREEN | {key: (0.2, 0.8, 0.2) for key in ("grid_rgb1", "grid_rgb2", "grid_markrgb")}


@pytest.mark.slow
@pytest.mark.parametrize("task", [("walker", "walk"), ("ball_in_cup", "catch"), ("quadruped", "run")])
@pytest.mark.parametrize("mode", MODES)
def test_a_look_is_that_of_the_edited_xml(suite, monkeypatch, dmcgb, mode, task):
    """Colour modes: equal. Video modes: equal outside the key, the clip's frame inside. The physics is the task's."""
    data, clip = dmcgb, 1
    env, plain = (pieg.make_dmc("-".join(task), kind, 0, data) for kind in (mode, "train"))
    sets = pieg.dmcgb_data(data, mode)
    colours = {"video_easy": GREEN, "video_hard": GREEN_FLOOR}.get(mode) or sets[44]  # RandomState(0)'s first draw
    bare = edited(suite, monkeypatch, colours, *task, seed=0)
    bare.reset()
    obs, _ = env.reset()
    plain.reset()
    action = np.full(env.action_space.shape, 0.5, np.float32)
    spec, camera = bare.action_spec(), 2 if task[0] == "quadruped" else 0
    for j in range(3):
        picture = bare.physics.render(84, 84, camera_id=camera).copy()
        frame = obs[-3:].transpose(1, 2, 0)
        if mode in pieg.CLIPS:
            green = pieg.is_green(picture)
            assert green.any() == (task[0] != "quadruped" or mode == "video_hard")  # that camera sees no sky
            assert np.abs(frame[green].astype(int) - (60 * clip, 10 * j, 200)).max(initial=0) <= 3
            frame, picture = frame[~green], picture[~green]
        assert np.abs(frame.astype(int) - picture).max() <= 1
        assert np.array_equal(env.env.physics.get_state(), plain.env.physics.get_state())
        obs, reward, *_ = env.step(action)
        assert reward == plain.step(action)[1]
        for _ in range(2):
            bare.step(spec.minimum + 0.75 * (spec.maximum - spec.minimum))
        assert np.array_equal(env.env.physics.get_state(), bare.physics.get_state())
    for one in (env, plain):
        one.close()


def test_colours_are_given_back(suite):
    env = suite.load("walker", "walk", task_kwargs={"random": 0})
    env.reset()
    stock = env.physics.render(84, 84, camera_id=0).copy()
    pieg.recolour(env.physics, GREEN_FLOOR | {"self_rgb": (1, 0, 0)})
    assert (env.physics.render(84, 84, camera_id=0) != stock).any(2).mean() > 0.5
    pieg.recolour(env.physics, {})
    assert np.array_equal(env.physics.render(84, 84, camera_id=0), stock)
    env.physics.free()


@pytest.mark.slow
def test_colours_and_clips_come_in_the_authors_order(dmcgb, monkeypatch):
    data, drawn, shown = dmcgb, [], []
    sets, recolour = pieg.dmcgb_data(data, "color_easy"), pieg.recolour
    monkeypatch.setattr(pieg, "recolour", lambda physics, look: drawn.append(look) or recolour(physics, look))
    env = pieg.make_dmc("cartpole-balance", "color_easy", 0, data)
    for seed in (None, None, None, None, 43, None, None, None):
        env.reset(seed=seed)
    assert [sets.index(look) for look in drawn] == [44, 47, 64, 67, 68, 64, 49, 21]
    env.close()
    env = pieg.make_dmc("cartpole-balance", "video_easy", 0, data)
    for seed in (None, None, None, None, 0):
        env.reset(seed=seed)
        shown.append(Path(env.looks[env.clip]).name)
    assert shown == [f"video{number}.mp4" for number in (1, 2, 0, 1, 1)]
    env.close()


def test_a_clip_goes_on_with_each_step_and_is_the_same_in_a_resets_stack(dmcgb):
    env = pieg.make_dmc("cartpole-balance", "video_hard", 0, dmcgb)
    obs, _ = env.reset()
    assert np.array_equal(obs[:3], obs[3:6]) and np.array_equal(obs[:3], obs[6:])
    for step in range(1, 8):  # clip 1 has five frames
        before, (obs, *_) = obs, env.step(np.zeros(1, np.float32))
        assert np.array_equal(obs[:6], before[3:])
        assert abs(int(obs[7, 0, 0]) - 10 * (step % 5)) <= 3
    env.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["train", *MODES])
def test_gymnasiums_checker_passes(mode, dmcgb):
    env = pieg.make_dmc("cartpole-balance", mode, 0, dmcgb)
    check_env(env, skip_render_check=True, skip_close_check=True)
    one, two = env.reset(seed=7)[0], env.reset()[0]
    again = env.reset(seed=7)[0]
    assert np.abs(one.astype(int) - again).max() <= 1 and not np.array_equal(one, two)
    assert np.abs(env.reset()[0].astype(int) - two).max() <= 1
    env.close()


def test_a_mode_and_a_task_that_there_is_not(dmcgb):
    with pytest.raises(ValueError, match="walker-wolk: no such task; there are acrobot-swingup"):
        pieg.make_dmc("walker-wolk")
    with pytest.raises(ValueError, match="mode nonsense: train color_easy color_hard video_easy video_hard"):
        pieg.make_dmc("cartpole-balance", "nonsense", 0, dmcgb)


@pytest.mark.slow
def test_environments_are_drawn_by_seed_split_and_start(dmcgb):
    """A mode's episodes begin as those of `test` do, and no others; an end begins the next episode."""
    args = pieg.check(tiny(".", env_id="cartpole-swingup", action_repeat=250, dmcgb_dir=str(dmcgb)))
    seen = {}
    for split, start in (("train", 0), ("train", 1), ("test", 0), ("color_easy", 0)):
        envs = pieg.make_envs(args, split, start)
        obs, _ = envs.reset()
        assert obs.shape == (1, 9, 84, 84) and obs.dtype == np.uint8
        seen[split, start], rewards, kept, copies = envs.envs[0].env.physics.get_state(), [], [obs], [obs.copy()]
        for step in range(1, 5):
            obs, reward, terminated, truncated, info = envs.step(np.zeros((1, 1), np.float32))
            rewards.append(float(reward[0]))
            kept.append(obs)
            copies.append(obs.copy())
            assert not terminated[0] and truncated[0] == (step == 4) == ("final_obs" in info)
            assert info["episodes"] == ([] if step < 4 else [(0, pytest.approx(sum(rewards)), 4)])
        assert all(np.array_equal(one, two) for one, two in zip(kept, copies, strict=True))  # new arrays
        assert info["final_obs"][0].shape == (9, 84, 84) and not np.array_equal(info["final_obs"][0], obs[0])
        assert np.array_equal(obs[0, :3], obs[0, 6:])
        envs.close()
    assert np.array_equal(seen["test", 0], seen["color_easy", 0])
    assert len({state.tobytes() for state in seen.values()}) == 3
