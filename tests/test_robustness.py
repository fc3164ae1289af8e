"""benchmark/analyses/robustness.py and tsne.py: perturbations and divergences with known answers, and their files."""

import csv
import json
import shutil
from types import SimpleNamespace

import imageio.v3 as iio
import matplotlib.pyplot as plt
import numpy as np
import pytest
import robustness
import torch
import torch.nn.functional as F
import tsne
from conftest import load, tiny_args
from runs import Countdown, assert_refuses, changed_copy, run, tiny_run
from torch.distributions import Categorical, kl_divergence

mdpo = load("mdpo")
NAMES = ("random_conv", "brightness", "contrast", "saturation", "hue")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 3, 16, 30), dtype=torch.uint8, generator=rng())


@pytest.fixture
def agent(tmp_path):
    torch.manual_seed(0)
    agent = mdpo.Agent(Countdown(1), tiny_args("mdpo", tmp_path))
    agent.actor.weight.data *= 100  # a fresh policy hardly depends on what it sees
    return agent


# ---- Perturbations ----
def test_images_are_rescaled_each_for_itself():
    images = torch.zeros(3, 3, 2, 2)
    images[0, 0, 0] = torch.tensor([-2.0, 6.0])
    images[0, 1] = 2.0
    images[1] = 7.0
    images[2, 2, 1, 1] = 1e-3
    found = robustness.rescaled(images)
    assert found.dtype == torch.uint8
    # -2, 0, 2 and 6 of a range of 8: 0, 63.75, 127.5 and 255.
    assert found[0, 0].tolist() == [[0, 255], [64, 64]] and found[0, 1].eq(128).all() and found[0, 2].eq(64).all()
    assert found[1].eq(0).all(), "of one value: black, and no division by zero"
    assert found[2].sum() == found[2, 2, 1, 1] == 255


def test_a_stack_of_random_convolutions(images):
    """Two of them, with a ReLU between."""
    found, stream = robustness.random_conv(images, rng(5), layers=2), rng(5)
    versions = images.float()
    for layer in range(2):
        kernels = torch.randn(len(images), 3, 3, 3, 3, generator=stream)
        pairs = zip(versions.relu() if layer else versions, kernels, strict=True)
        versions = torch.stack([F.conv2d(image[None], kernel, padding=1)[0] for image, kernel in pairs])
    assert (found.int() - robustness.rescaled(versions).int()).abs().max() <= 1
    assert not torch.equal(found, robustness.random_conv(images, rng(5)))


def test_random_convolutions_are_the_slow_ones(images):
    kernels = torch.randn(6, 3, 3, 3, 3, generator=rng(5))  # standard normal, one of each image
    found = robustness.random_conv(images, rng(5))
    assert found.shape == images.shape and found.dtype == torch.uint8
    assert found.amin((1, 2, 3)).eq(0).all() and found.amax((1, 2, 3)).eq(255).all()
    for version, image, kernel in zip(found, images, kernels, strict=True):
        padded = F.pad(image.double(), (1, 1, 1, 1))
        slow = torch.stack(
            [
                sum(padded[c, i : i + 16, j : j + 30] * weights[c, i, j] for c, i, j in np.ndindex(3, 3, 3))
                for weights in kernel.double()
            ]
        )
        slow = 255 * (slow - slow.min()) / (slow.max() - slow.min())
        assert (version - slow).abs().max() < 0.51, "rounded"


def test_brightness_is_a_factor_from_a_half_to_one_and_a_half():
    found = robustness.recolour(torch.full((300, 3, 2, 2), 100, dtype=torch.uint8), "brightness", rng()).float()
    assert (found == found[:, :1, :1, :1]).all(), "one factor an image"
    factors = found[:, 0, 0, 0] / 100
    assert 0.49 <= factors.min() < 0.52 and 1.48 < factors.max() <= 1.5 and abs(factors.mean() - 1) < 0.05


def test_what_has_no_contrast_and_no_colour_keeps_it(images):
    gray = images[:, :1].expand(-1, 3, -1, -1)
    for name in ("saturation", "hue"):
        assert (robustness.recolour(gray, name, rng()).float() - gray.float()).abs().max() <= 1
    flat = torch.full((6, 3, 4, 4), 90, dtype=torch.uint8)
    assert (robustness.recolour(flat, "contrast", rng()).float() - 90).abs().max() <= 1
    dim = torch.randint(80, 140, images.shape, dtype=torch.uint8, generator=rng())
    deviations = robustness.recolour(dim, "contrast", rng()).float().std((1, 2, 3)) / dim.float().std((1, 2, 3))
    assert deviations.unique().numel() == 6 and deviations.min() < 0.9 and deviations.max() > 1.1


def test_hue_keeps_the_greatest_and_the_least_of_the_channels(images):
    found = robustness.recolour(images, "hue", rng()).float()
    for extreme in (torch.amax, torch.amin):
        assert (extreme(found, 1) - extreme(images.float(), 1)).abs().max() <= 2
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(500, -1, 2, 2)
    turned = robustness.recolour(red, "hue", rng()).argmax(1)[:, 0, 0].bincount(minlength=3)
    assert turned.min() > 100, "any hue: a third of them each are mostly red, green, blue"


@pytest.mark.parametrize("name", NAMES)
def test_a_perturbation_has_a_stream_of_its_own_and_spares_the_velocity(images, name):
    before = images.clone()
    found = robustness.perturbed(images, name, robustness.stream(3, name))
    assert torch.equal(found, robustness.perturbed(images, name, robustness.stream(3, name)))
    assert not torch.equal(found, robustness.perturbed(images, name, robustness.stream(4, name)))
    assert (found != images).flatten(1).any(1).all()
    boxed = robustness.perturbed(images, name, robustness.stream(3, name), boxed=True)
    assert torch.equal(boxed[:, :, :13, :26], images[:, :, :13, :26])
    assert torch.equal(boxed[:, :, 13:], found[:, :, 13:]) and torch.equal(boxed[..., 26:], found[..., 26:])
    assert torch.equal(images, before)
    numbers = {torch.rand((), generator=robustness.stream(3, other)).item() for other in NAMES}
    assert len(numbers) == 5


# ---- The measure ----
def test_the_divergence_is_that_of_torch():
    logits, others = 4 * torch.randn(2, 50, 15, generator=rng())
    logits[0, 3] = others[1, 2] = 60.0  # nearly certain
    wanted = kl_divergence(Categorical(logits=logits.double()), Categorical(logits=others.double()))
    torch.testing.assert_close(robustness.kl_divergence(logits, others), wanted)
    assert robustness.kl_divergence(logits, logits).eq(0).all()
    torch.testing.assert_close(
        robustness.kl_divergence(logits, logits + 3), torch.zeros(50).double(), atol=1e-5, rtol=0
    )
    assert not torch.allclose(robustness.kl_divergence(others, logits), wanted), "the order matters"


def test_divergences_are_the_slow_ones(agent):
    frames = torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8, generator=rng())

    def darker(obs):  # versions by halves and quarters
        return obs // torch.tensor([1, 2, 4], dtype=torch.uint8).repeat(len(obs) // 3).view(-1, 1, 1, 1)

    found = robustness.divergences(agent, frames, darker, 3)
    assert found.shape == (40, 3) and not found.requires_grad
    for frame, row in zip(frames, found, strict=True):
        policy = Categorical(logits=agent(frame[None])[0].double())
        slow = [kl_divergence(policy, Categorical(logits=agent(frame[None] // by)[0].double())) for by in (1, 2, 4)]
        torch.testing.assert_close(row, torch.cat(slow), atol=1e-9, rtol=1e-4)
    assert found[:, 0].abs().max() < 1e-12, "equal policies"
    assert found[:, 1:].min() > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_that_sees_nothing_never_changes(agent, name):
    frames = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=rng())

    def change(obs):
        return robustness.perturbed(obs, name, robustness.stream(0, name))

    assert robustness.divergences(agent, frames, change, 4).mean() > 0
    agent.actor.weight.data.zero_()
    assert robustness.divergences(agent, frames, change, 4).eq(0).all()


def test_an_agent_sees_one_episode_of_each_environment(agent, tmp_path):
    """Countdown's episodes take 3, 4 and 5 steps."""
    about = {"script": mdpo, "make_envs": lambda args, *_: Countdown(args.num_envs)}
    made = SimpleNamespace(args=tiny_args("mdpo", tmp_path), **about)
    frames = robustness.seen(made, agent, episodes=3, steps=100, seed=7)
    shown = [(n, 0, t) for n in range(3) for t in range(n + 3)]
    assert frames.shape == (12, 3, 64, 64) and frames[:, 0, 0, :3].tolist() == [list(place) for place in shown]
    assert robustness.seen(made, agent, episodes=3, steps=4, seed=7).shape == (11, 3, 64, 64)


# ---- t-SNE ----
def test_the_spread_by_hand():
    # Distances 3, 4 and 5, norms 0, 3 and 4.
    assert tsne.spread(torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])) == pytest.approx(4 / (7 / 3))
    assert tsne.spread(torch.ones(5, 8)) == 0 and tsne.spread(torch.zeros(5, 8)) == 0
    encodings = torch.rand(9, 5, generator=rng())
    pairs = [(a - b).norm() for n, a in enumerate(encodings) for b in encodings[:n]]
    slow = sum(pairs) / 36 / (sum(encoding.norm() for encoding in encodings) / 9)
    assert tsne.spread(encodings) == pytest.approx(slow.item())
    assert tsne.spread(3 * encodings) == pytest.approx(slow.item())


@pytest.mark.parametrize("name", ["mdpo", "ppo_netrand"])
def test_encodings_are_what_the_heads_read(name, tmp_path):
    agent = load(name).Agent(Countdown(1), tiny_args(name, tmp_path))
    images = torch.randint(0, 256, (260, 3, 64, 64), dtype=torch.uint8, generator=rng())
    encodings = tsne.encode(agent, images)
    assert encodings.shape == (260, 256) and not encodings.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(agent.actor(encodings[250:]), agent(images[250:])[0], atol=1e-5, rtol=1e-4)


def test_the_map_shows_each_series():
    points = np.random.default_rng(0).normal(size=(9, 20, 2))
    figure = tsne.draw(torch.zeros(3, 64, 64, dtype=torch.uint8), [f"series {n}" for n in range(9)], points)
    _, right = figure.axes
    assert [text.get_text() for text in right.get_legend().get_texts()] == [f"series {n}" for n in range(9)]
    assert all(np.array_equal(dots.get_offsets(), of) for dots, of in zip(right.collections, points, strict=True))
    looks = {(tuple(dots.get_facecolor()[0]), dots.get_paths()[0].vertices.tobytes()) for dots in right.collections}
    assert len(looks) == 9, "more series than colours, and yet no two alike"
    plt.close(figure)


# ---- The programs ----
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of tiny runs on the real game, of changed copies of mdpo.py and of ppo_netrand.py."""
    folder, found = tmp_path_factory.mktemp("runs"), []
    for name, copy in (("mdpo", "mine"), ("ppo_netrand", "yours")):
        script = changed_copy(name, folder / f"{copy}.py")
        found.append(tiny_run(name, folder / name, "--total-timesteps", "32", script=script))
    return found


def test_runs_become_a_table_and_a_picture(runs, tmp_path, monkeypatch, capsys):
    short = ("--episodes", 2, "--steps", 4, "--draws", 3, "--seed", 5)
    out, images = tmp_path / "out.csv", tmp_path / "images.png"
    run(robustness, monkeypatch, f"MDPO={runs[0]}", runs[1], *short, "--out", out, "--images", images)
    assert "kl_mean" in capsys.readouterr().out
    rows = list(csv.DictReader(out.open()))
    assert [(row["method"], row["agent"], row["perturbation"]) for row in rows] == [
        (method, agent, name) for method, agent in (("MDPO", "1"), ("MDPO", "2"), ("yours", "1")) for name in NAMES
    ]
    commit = json.loads((runs[0] / "args.json").read_text())["commit"]
    for row in rows:
        suite = "procgen-plain" if row["method"] == "yours" else "procgen-easy"
        about = [row[key] for key in ("suite", "task", "seed", "step", "commit", "episodes", "frames", "draws")]
        assert about == [suite, "bossfight", "1", "32", commit, "2", "8", "3"]
        assert 0 < float(row["kl_mean"]) < 1 and float(row["kl_std"]) > 0
    picture = iio.imread(images)
    assert picture.shape[1] == 130 * 1.3 * 8 and picture[..., :3].std() > 20

    # One of the rows, put together by hand; and alone it is the same as among others.
    (made,) = robustness.load([str(runs[0])], cuda=False)
    _, agent = made.agents()
    frames, stream = robustness.seen(made, agent, 2, 4, 5), robustness.stream(5, "hue")
    kl = robustness.divergences(agent, frames, lambda obs: robustness.perturbed(obs, "hue", stream), 3)
    assert float(rows[9]["kl_mean"]) == pytest.approx(kl.mean().item(), rel=1e-12)
    assert float(rows[9]["kl_std"]) == pytest.approx(kl.numpy().std(), rel=1e-9)
    run(robustness, monkeypatch, f"MDPO={runs[0]}", *short, "--perturb", "hue", "--out", tmp_path / "hue.csv")
    assert list(csv.DictReader((tmp_path / "hue.csv").open())) == [rows[4], rows[9]], "the same seed, the same numbers"


def test_the_velocity_box_of_a_plain_look_stays(runs, monkeypatch):
    seen = []
    monkeypatch.setattr(robustness, "perturbed", lambda obs, name, rng, boxed, layers: seen.append(boxed) or obs)
    for folder in runs:
        run(robustness, monkeypatch, folder, "--steps", 1, "--episodes", 1, "--perturb", "hue")
    assert seen == [False, False, True]


def test_runs_become_a_map(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "tsne.png"
    flags = ("--versions", 12, "--perplexity", 4, "--step", 3)
    run(tsne, monkeypatch, f"MDPO={runs[0]}", runs[1], *flags, "--out", out)
    lines = capsys.readouterr().out.splitlines()
    picture = iio.imread(out)
    assert picture.shape[:2] == (702, 1170) and picture[..., :3].std() > 20
    (made,) = robustness.load([str(runs[0])], cuda=False)
    agents = made.agents()
    frame = robustness.seen(made, agents[0], 1, 4, 0)[3]
    versions = robustness.random_conv(frame.expand(12, -1, -1, -1), robustness.stream(0, "random_conv"))
    for number, agent in enumerate(agents, 1):
        (line,) = (line.split() for line in lines if line.split()[:1] == ["MDPO"] and line.split()[5] == str(number))
        assert float(line[-1]) == pytest.approx(tsne.spread(agent.encoder(versions.float() / 255)), rel=1e-3)


def test_encodings_of_other_lengths_have_no_place_on_one_map(runs, tmp_path, monkeypatch, capsys):
    wide = tiny_run("mdpo", tmp_path / "runs", "--total-timesteps", "32", "--num-agents", "1")
    flags = ("--versions", 12, "--perplexity", 4, "--step", 3, "--out", tmp_path / "tsne.png")
    assert_refuses(tsne, monkeypatch, capsys, (runs[0], wide, *flags), "its encodings are not as long")


def test_wrong_input_says_so_in_one_line(runs, tmp_path, monkeypatch, capsys):
    def changed(name, **changes):
        """A copy of the first run with other arguments."""
        folder = shutil.copytree(runs[0], tmp_path / name)
        about = json.loads((folder / "args.json").read_text())
        about["args"].update(changes)
        (folder / "args.json").write_text(json.dumps(about))
        return folder

    newer, maze, ablation = changed("newer", new=1), changed("maze", env_id="maze"), changed("ablation", num_agents=1)
    other = changed("other")
    script = (other / "mine.py").read_text()
    (other / "mine.py").write_text(script.replace("clip_coef", "clipping"))
    (other / "args.json").write_text((other / "args.json").read_text().replace("clip_coef", "clipping"))
    before = sorted(tmp_path.rglob("*"))
    picture = ("--out", tmp_path / "a.png")
    for program, flags, says in (
        (robustness, (), "a run's folder, or some of them, is needed"),
        (robustness, (tmp_path / "none",), "none is no folder of a run"),
        (robustness, (other,), "other: this is for runs of mdpo.py and ppo_netrand.py and copies of them"),
        (robustness, (newer,), "newer is a run of another version of mine.py"),
        (robustness, (ablation,), "ablation was not trained by mine.py alone"),
        (robustness, (runs[0], "--out", tmp_path / "nowhere" / "a.csv"), "a.csv: not a .csv file in a folder"),
        (robustness, (runs[0], "--images", tmp_path / "a.gif"), "a.gif: not a .png file"),
        (robustness, (runs[0], "--draws", 0), "at least 1"),
        (robustness, (runs[0], "--seed", -1), "at least 0"),
        (robustness, (runs[0], "--perturb"), "--perturb: some"),
        (tsne, picture, "a run's folder, or some of them, is needed"),
        (tsne, (runs[0], "--out", tmp_path), "not a .png file"),
        (tsne, (runs[0], *picture, "--perplexity", 200), "--perplexity 200.0: above 0 and below --versions"),
        (tsne, (runs[0], *picture, "--versions", 1), "--versions: at least 2"),
        (tsne, (runs[0], maze, *picture), "maze played maze and the first one bossfight"),
    ):
        assert_refuses(program, monkeypatch, capsys, flags, says)
    assert sorted(tmp_path.rglob("*")) == before, "nothing was written"


def test_runs_of_one_name_with_other_settings_have_names_of_their_own(runs, tmp_path):
    """So that no row of a table stands for two methods."""
    shutil.copytree(runs[0], tmp_path / "other")
    about = json.loads((tmp_path / "other" / "args.json").read_text())
    about["args"] |= {"learning_rate": 0.1, "seed": 7}
    (tmp_path / "other" / "args.json").write_text(json.dumps(about))
    one, other = robustness.load([str(runs[0]), str(tmp_path / "other")], cuda=False)
    assert (one.method, other.method) == ("mine, learning_rate 0.0005", "mine, learning_rate 0.1")
    alike = robustness.load([f"A={runs[0]}", f"A={runs[0]}"], cuda=False)
    assert [run.method for run in alike] == ["A", "A"]
