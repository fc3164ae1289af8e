"""benchmark/analyses/adaptation.py: what changes and when, the methods, the images, and the CSV of the runs."""

import csv
import itertools
import shlex
import urllib.error
from types import SimpleNamespace

import adaptation
import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision
from runs import assert_refuses, run
from torch.nn import functional as F

TINY = "--scale short --data synthetic --changes 3 --updates 2 --final-updates 3 --chunk-images 20 --test-images 30"
TINY = shlex.split(f"{TINY} --batch-size 8 --seeds 1 --methods base --optimizers sgd --no-cuda")


def tiny(**changes):
    sizes = {"changes": 3, "updates": 2, "final_updates": 3, "chunk_images": 20, "test_images": 30, "batch_size": 8}
    return adaptation.definite(adaptation.Args(**{"out": "x.csv", "data": "synthetic"} | sizes | changes))


def train(monkeypatch, task, method="base", optimizer="sgd", **changes):
    """-> rows, and what each update learned from: (indices of images [B], labels [B]) and the network's weights."""
    args, batches = tiny(**changes), []
    data = adaptation.synthetic(100, args.test_images)
    data.images[:, 0, 0, 0] = torch.arange(100)  # an image says which one it is
    update = adaptation.update

    def noting(network, optimizer, images, labels, rho):
        weights = {name: value.clone() for name, value in network.state_dict().items()}
        batches.append((images[:, 0, 0, 0].long(), labels, weights))
        update(network, optimizer, images, labels, rho)

    with monkeypatch.context() as patch:
        patch.setattr(adaptation, "update", noting)
        return adaptation.train(data, args, task, method, optimizer, 1), batches, data


# ---- What changes ----
def test_inputs_arrive_chunk_by_chunk(monkeypatch):
    """20 images, 40, 60 for two updates each, then 60 for three; labels stay as they are."""
    _, batches, data = train(monkeypatch, "input", batch_size=512)
    seen = [set(indices.tolist()) for indices, _, _ in batches]
    assert [len(indices) for indices in seen] == [20, 20, 40, 40, 60, 60, 60, 60, 60]
    assert all(before <= after for before, after in itertools.pairwise(seen))
    assert all(torch.equal(labels, data.labels[indices]) for indices, labels, _ in batches)


@pytest.mark.parametrize("relabel", ["random", "shift"])
def test_labels_change_for_whole_classes(monkeypatch, relabel):
    """All images are there from the start, and each class has one name at a time, another class's than before."""
    _, batches, data = train(monkeypatch, "label", relabel=relabel, batch_size=512)
    names = []
    for indices, labels, _ in batches:
        assert len(indices.unique()) == 60
        pairs = set(zip(data.labels[indices].tolist(), labels.tolist(), strict=True))
        assert len(pairs) == 10 and len({new for _, new in pairs}) == 10
        names.append([new for _, new in sorted(pairs)])
    assert [names[i] == names[i + 1] for i in range(8)] == [True, False, True, False, True, True, True, True]
    assert relabel == "random" or names[::2][:3] == [[(c + shift) % 10 for c in range(10)] for shift in range(3)]


def test_the_test_set_is_renamed_too(monkeypatch):
    """A network that is right about everything stays right, whatever the classes are called."""
    seen = []
    monkeypatch.setattr(adaptation, "accuracy", lambda _, images, labels: seen.append((images, labels)) or 0.5)
    _, batches, data = train(monkeypatch, "label")
    tests = [labels for images, labels in seen if torch.equal(images, data.test_images)]
    assert len(tests) == 5  # 2, 4, 6, 8, 9 updates
    for labels, (indices, learned, _) in zip(tests, batches[1::2], strict=False):
        names = dict(zip(data.labels[indices].tolist(), learned.tolist(), strict=True))
        assert all(
            names.get(old, new) == new for old, new in zip(data.test_labels.tolist(), labels.tolist(), strict=True)
        )


def test_rows_of_a_run(monkeypatch):
    rows, _, _ = train(monkeypatch, "label")
    by_key = {key: [(update, value) for update, name, value in rows if name == key] for _, key, _ in rows}
    tests = by_key["test_accuracy"]
    assert [update for update, _ in tests] == [update for update, _ in by_key["train_accuracy"]] == [2, 4, 6, 8, 9]
    assert rows[-1] == (9, "final_test_accuracy", tests[-1][1])
    assert by_key["mean_test_accuracy"] == [(9, pytest.approx(np.mean([value for _, value in tests[:3]])))]


def test_methods_of_a_seed_learn_from_the_same_batches(monkeypatch):
    base, other = (train(monkeypatch, "label", method)[1] for method in ("base", "layer_norm+reset"))
    for (indices, labels, _), (others, other_labels, _) in zip(base, other, strict=True):
        assert torch.equal(indices, others) and torch.equal(labels, other_labels)


# ---- Methods ----
def test_sam_is_the_gradient_at_the_worst_point_nearby():
    """Two updates with momentum and weight decay, against the same written out in float64."""
    torch.manual_seed(0)
    network = adaptation.make_network(set(), (3, 3, 1)).double()
    images, labels = torch.randn(2, 5, 3, 32, 32).double(), torch.randint(10, (2, 5))
    names, weights = zip(*((name, value.detach().clone()) for name, value in network.named_parameters()), strict=True)
    momentum = [torch.zeros_like(value) for value in weights]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for batch, targets in zip(images, labels, strict=True):
        adaptation.update(network, optimizer, batch, targets, rho=0.3)

        def gradients(values, batch=batch, targets=targets):
            values = [value.clone().requires_grad_() for value in values]
            logits = torch.func.functional_call(network, dict(zip(names, values, strict=True)), batch)
            return torch.autograd.grad(F.cross_entropy(logits, targets), values)

        uphill = gradients(weights)
        length = sum(gradient.square().sum() for gradient in uphill).sqrt()
        worst = [value + 0.3 * gradient / length for value, gradient in zip(weights, uphill, strict=True)]
        steps = [gradient + 0.01 * value for gradient, value in zip(gradients(worst), weights, strict=True)]
        momentum = [0.9 * old + step for old, step in zip(momentum, steps, strict=True)]
        weights = [value - 0.1 * step for value, step in zip(weights, momentum, strict=True)]
    for value, expected in zip(network.parameters(), weights, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10)


def test_sam_of_no_length_is_none(monkeypatch):
    base, some = (train(monkeypatch, "input", method)[1][-1][2] for method in ("base", "sam"))
    none = train(monkeypatch, "input", "sam", sam_rho=0.0)[1][-1][2]
    assert all(torch.equal(base[name], none[name]) for name in base)
    assert not any(torch.equal(base[name], some[name]) for name in base)


@pytest.mark.parametrize(("every", "resets"), [(1, [2, 4]), (2, [2])])
def test_resets_draw_the_head_alone_anew(monkeypatch, every, resets):
    """With each change but the first: before updates 2 and 4 of 9, never after the last change. Learning rate 0."""
    about = {"reset_every": every, "learning_rate": 0.0}
    _, batches, _ = train(monkeypatch, "label", "layer_norm+reset", **about)
    weights = [weights for _, _, weights in batches]
    network = adaptation.make_network({"layer_norm"}, (3, 3, 1))
    linear = {id(value) for layer in network if isinstance(layer, nn.Linear) for value in layer.parameters()}
    names = {name for name, value in network.named_parameters() if id(value) in linear}
    assert len(names) == 6
    for step in range(1, 9):
        changed = {name for name in weights[0] if not torch.equal(weights[step - 1][name], weights[step][name])}
        assert changed == (names if step in resets else set())


def test_l2_and_learning_rates():
    network = adaptation.make_network(set(), (3, 3, 1))

    def groups(parts, task, name, **changes):
        optimizer = adaptation.make_optimizer(network, parts, tiny(**changes), task, name)
        return {key: optimizer.param_groups[0].get(key) for key in ("lr", "weight_decay", "momentum")}

    assert groups(set(), "input", "sgd") == {"lr": 0.001, "weight_decay": 0, "momentum": 0.9}
    assert groups(set(), "label", "sgd") == {"lr": 0.01, "weight_decay": 0.001, "momentum": 0.9}
    assert groups({"l2"}, "label", "sgd", l2=0.25)["weight_decay"] == 0.251
    assert groups({"l2"}, "input", "adam") == {"lr": 0.001, "weight_decay": 0.001, "momentum": None}
    given = groups(set(), "label", "sgd", learning_rate=0.5, weight_decay=0.0)
    assert given == {"lr": 0.5, "weight_decay": 0, "momentum": 0.9}


# ---- Network ----
@pytest.mark.parametrize(
    ("parts", "strides", "features", "count"),
    [
        (set(), (3, 3, 1), 64, 896 + 18_496 + 36_928 + 33_280 + 65_664 + 1_290),
        (set(), (3, 1, 1), 2_304, 896 + 18_496 + 36_928 + 2_305 * 512 + 65_664 + 1_290),
        ({"layer_norm"}, (3, 3, 1), 64, 156_554 + 2 * (32 + 64 + 64 + 512 + 128)),
        ({"crelu"}, (3, 3, 1), 64, 448 + 9_248 + 18_464 + 16_640 + 32_832 + 1_290),
    ],
)
def test_widths(parts, strides, features, count):
    network = adaptation.make_network(parts, strides)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    flat = next(i for i, layer in enumerate(network) if isinstance(layer, nn.Flatten))
    assert network[: flat + 1](torch.zeros(2, 3, 32, 32)).shape == (2, features)
    assert sum(value.numel() for value in network.parameters()) == count


def test_layer_norm_is_over_the_channels_of_a_pixel():
    x = torch.randn(2, 5, 3, 4)
    norm = adaptation.ChannelNorm(5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x[..., 0, 0]), expected[..., 0, 0])


def test_crelu_keeps_both_signs():
    out = adaptation.CReLU()(torch.tensor([[1.0, -2.0]]))
    assert out.tolist() == [[1.0, 0.0, 0.0, 2.0]]


def test_active_units_of_dead_layers():
    """Convolutions of 32 x 100 + 64 x 9 + 64 units an image, a head of 512 + 128."""
    network, images = adaptation.make_network(set(), (3, 3, 1)), torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        for layer in network:
            for value in getattr(layer, "parameters", list)():
                value.fill_(0.1)
        assert adaptation.active_units(network, images) == {"backbone": 1, "head": 1}
        network[7].bias.fill_(-1e6)  # the head's first layer; the second lives by its own bias
        assert adaptation.active_units(network, images) == {"backbone": 1, "head": pytest.approx(128 / 640)}
        network[0].bias.fill_(-1e6)
        expected = {"backbone": pytest.approx(640 / 3840), "head": pytest.approx(128 / 640)}
        assert adaptation.active_units(network, images) == expected


# ---- Images ----
def test_synthetic_images_are_a_seeds_own():
    one, same, other = (adaptation.synthetic(300, 200, seed) for seed in (0, 0, 1))
    assert one.images.shape == (300, 3, 32, 32) and one.test_images.shape == (200, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(one[1:], same[1:], strict=True))
    assert not torch.equal(one.images, other.images)
    assert set(one.labels.tolist()) == set(range(10))
    assert abs(one.images.mean()) < 0.1 and abs(one.images.std() - 1) < 0.1
    assert torch.equal(one.test_images, adaptation.synthetic(20, 200).test_images)  # whatever is learned from


@pytest.mark.slow
def test_more_synthetic_images_teach_more():
    """From 100 images about a third of new ones, from 1,000 about two thirds; chance is a tenth."""
    data = adaptation.synthetic(1_000, 500)
    found = {}
    for count in (100, 1_000):
        torch.manual_seed(0)
        network = adaptation.make_network(set(), (3, 3, 1))
        optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
        for _ in range(250):
            batch = torch.randint(count, (64,))
            adaptation.update(network, optimizer, data.images[batch], data.labels[batch], rho=0)
        found[count] = adaptation.accuracy(network, data.test_images, data.test_labels)
    assert 0.2 < found[100] < found[1_000] - 0.1 < 0.8


def test_cifar10_is_normalised(monkeypatch):
    """The authors' numbers, each channel's own; all training images and the first of the others."""

    def dataset(folder, train, download):
        assert folder == "there" and download
        pixels = np.zeros((6, 32, 32, 3), np.uint8)
        pixels[:, 4, 5] = 255, 0, 51
        return SimpleNamespace(data=pixels, targets=[0, 1, 2, 3, 4, 5] if train else [5, 4, 3, 2, 1, 0])

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", dataset)
    data = adaptation.cifar10("there", 2)
    assert (data.name, data.images.shape, data.test_images.shape) == ("cifar10", (6, 3, 32, 32), (2, 3, 32, 32))
    assert data.labels.tolist() == [0, 1, 2, 3, 4, 5] and data.test_labels.tolist() == [5, 4]
    expected = [(1 - 0.4914) / 0.2023, (0 - 0.4822) / 0.1994, (0.2 - 0.4465) / 0.2010]
    torch.testing.assert_close(data.images[0, :, 4, 5], torch.tensor(expected))


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), RuntimeError("no network, or corrupted")])
def test_without_a_network_the_synthetic_set_is_named(tmp_path, monkeypatch, capsys, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fails)
    out = tmp_path / "out.csv"
    run(adaptation, monkeypatch, *TINY, "--out", out, "--data", "cifar10", "--plot", tmp_path / "plot.svg")
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("CIFAR-10 cannot be downloaded (") and "no network" in first
    assert rest[0].startswith("synthetic data, ") and sum("synthetic data" in line for line in rest) == 3
    assert {row["data"] for row in rows_of(out)} == {"synthetic"}
    assert all(" --data synthetic " in row["command"] for row in rows_of(out))
    assert (tmp_path / "plot.svg").read_text().count("synthetic data") == 1


# ---- Results ----
def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_finished_runs_are_not_made_again(tmp_path, monkeypatch, capsys):
    """Nor touched; a new seed is added, and other flags are another run, that the table leaves out."""
    out = tmp_path / "out.csv"
    run(adaptation, monkeypatch, *TINY, "--out", out)
    first = out.read_text()
    assert "2 runs, 0 made before" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(adaptation, "train", None)
        run(adaptation, monkeypatch, *TINY, "--out", out)
    again = capsys.readouterr().out
    assert out.read_text() == first and "2 runs, 2 made before" in again
    run(adaptation, monkeypatch, *TINY, "--out", out, "--seeds", "1", "2")
    assert "4 runs, 2 made before" in capsys.readouterr().out
    assert out.read_text().startswith(first) and {row["seed"] for row in rows_of(out)} == {"1", "2"}
    run(adaptation, monkeypatch, *TINY, "--out", out, "--batch-size", "4")
    said = capsys.readouterr().out
    assert "2 runs, 0 made before" in said and said.count("| base | 1 |") == 2


@pytest.mark.slow
def test_a_rows_command_makes_that_run_again(tmp_path, monkeypatch):
    out, again = tmp_path / "out.csv", tmp_path / "again.csv"
    run(adaptation, monkeypatch, *TINY, "--out", out, "--methods", "base", "sam+reset", "--strides", "3", "1", "1")
    wanted = [row for row in rows_of(out) if row["task"] == "label" and row["method"] == "sam+reset"]
    program, script, *flags = shlex.split(wanted[0]["command"].replace("<file>.csv", str(again)))
    assert (program, script) == ("python", "benchmark/analyses/adaptation.py")
    run(adaptation, monkeypatch, *flags, "--no-cuda")
    assert rows_of(again) == wanted
    assert wanted[0]["commit"] and "torch==" in wanted[0]["packages"] and "cores" in wanted[0]["hardware"]


def test_the_table_has_the_best_method_first(tmp_path, monkeypatch, capsys):
    final = {"base": 0.5, "l2": 0.75, "sam": 0.25}

    def train(data, args, task, method, optimizer, seed):
        rows = [(6, "train_accuracy", 0.125), (9, "train_accuracy", 1.0)]
        rows += [(9, "active_backbone", 0.5), (9, "active_head", 0.5), (9, "mean_test_accuracy", 0.5)]
        return [*rows, (9, "final_test_accuracy", final[method] + 0.02 * (seed - 2))]

    monkeypatch.setattr(adaptation, "train", train)
    about = ("--tasks", "input", "--seeds", "1", "2", "3", "--methods", *final)
    run(adaptation, monkeypatch, *TINY, "--out", tmp_path / "out.csv", *about)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[:3] for line in lines[1:]] == [
        ["| l2", "3", "75.0% ± 2.0"],
        ["| base", "3", "50.0% ± 2.0"],
        ["| sam", "3", "25.0% ± 2.0"],
    ]
    assert lines[1].split(" | ")[4] == "100.0% ± 0.0"  # the last of train_accuracy


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--methods base sam+dropout", "--methods sam+dropout: not base, nor some of layer_norm "),
        ("--methods sam+base", "--methods sam+base: not base"),
        ("--methods ''", "--methods : not base"),
        ("--seeds", "--seeds: at least one"),
        ("--changes 0", "--changes 0: at least 1"),
        ("--updates -3", "--updates -3: at least 1"),
        ("--batch-size 0", "--batch-size 0: at least 1"),
        ("--reset-every 0", "--reset-every 0: at least 1"),
        ("--final-updates -1", "--final-updates -1: at least 0"),
        ("--sam-rho -0.1", "--sam-rho -0.1: at least 0"),
        ("--learning-rate nan", "--learning-rate nan: at least 0"),
        ("--strides 9 9 1", "--strides 9 9 1: nothing is left"),
        ("--strides 0 1 1", "--strides 0 1 1: nothing is left"),
        ("--data cifar10 --changes 101 --chunk-images 500", "CIFAR-10 has 50,000 images"),
        ("--data cifar10 --test-images 10001", "CIFAR-10 has 50,000 images"),
        ("--out @/out.txt", "out.txt: not a .csv file in a folder that exists"),
        ("--out @/nowhere/out.csv", "out.csv: not a .csv file in a folder that exists"),
        ("--plot @/plot.csv", "plot.csv: not a .png or .svg file in a folder that exists"),
        ("--out @/other.csv", "other.csv: there already, and not a CSV of this program"),
        ("--out @/folder.csv", "folder.csv cannot be written: Is a directory"),
    ],
)
def test_wrong_input_says_so_in_one_line(tmp_path, monkeypatch, capsys, flags, says):
    (tmp_path / "other.csv").write_text("step,key,value\n1,a,2\n")
    (tmp_path / "folder.csv").mkdir()
    before = sorted(tmp_path.iterdir())
    flags = shlex.split(flags.replace("@", str(tmp_path)))
    assert_refuses(adaptation, monkeypatch, capsys, [*TINY, "--out", tmp_path / "out.csv", *flags], says)
    assert sorted(tmp_path.iterdir()) == before
