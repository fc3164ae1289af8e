"""benchmark/analyses/feature_maps.py: maps of both kinds of encoders, how they differ, and the files of some runs."""

import csv
import json
from types import SimpleNamespace

import evaluate
import feature_maps
import numpy as np
import pytest
import record
import torch
import torch.nn as nn
from runs import assert_refuses, run, tiny_run


@pytest.fixture
def obs():
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 9, 84, 84), dtype=torch.uint8, generator=rng)


def test_maps_are_of_the_newest_frame_with_a_frozen_encoder(obs):
    encoder = SimpleNamespace(resnet=nn.Conv2d(3, 5, 3))
    maps = feature_maps.feature_maps(encoder, obs, "resnet18")
    assert maps.shape == (2, 5, 82, 82) and not maps.requires_grad
    torch.testing.assert_close(maps, encoder.resnet(obs[:, 6:] / 255 - 0.5))


def test_maps_are_of_the_whole_stack_with_drqv2s_encoder(obs):
    layers = nn.Conv2d(9, 5, 3, stride=2), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU()
    maps = feature_maps.feature_maps(nn.Sequential(*layers, nn.Flatten()), obs, "drqv2")
    assert maps.shape == (2, 4, 39, 39)
    torch.testing.assert_close(maps, nn.Sequential(*layers)(obs / 255 - 0.5))


def test_the_difference_is_of_normalised_maps():
    maps = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    other = maps.clone()
    other[0, 0] = maps[0, 0].min()  # one map of one state
    both = feature_maps.normalised(torch.stack([maps, other]))
    assert both.min() == 0 and both.max() == 1
    low, high = maps[0, 0].min(), maps[0, 0].max()
    wanted = ((maps[0, 0] - low) / (high - low)).sum() / maps.numel()
    assert feature_maps.difference(both) == pytest.approx(wanted.item(), rel=1e-4)
    assert feature_maps.normalised(torch.ones(2, 3, 4, 5, 5)).eq(0).all()


@pytest.mark.slow
def test_runs_become_a_picture_and_a_table(tmp_path, monkeypatch):
    """Two runs, one with each encoder, in the look that they were trained in and in another one.

    One of them is also filmed and evaluated there.
    """
    keys = ("skybox_rgb", "grid_rgb1", "grid_rgb2", "self_rgb")
    colours = np.random.default_rng(0).random((100, len(keys), 3)).tolist()
    (tmp_path / "dmcgb").mkdir()
    sets = [dict(zip(keys, numbers, strict=True)) for numbers in colours]
    (tmp_path / "dmcgb" / "color_hard.json").write_text(json.dumps(sets))
    folders = [tiny_run("drqv2_pieg", tmp_path / name, "--encoder", name) for name in ("resnet18", "drqv2")]
    flags = ["--out", tmp_path, "--steps", 3, "--dmcgb-dir", tmp_path / "dmcgb", "--mode", "color_hard"]
    run(feature_maps, monkeypatch, *folders, *flags)
    rows = list(csv.DictReader((tmp_path / "feature_maps.csv").open()))
    assert [row["checkpoint"] for row in rows] == [folder.name for folder in folders]
    assert [row["method"] for row in rows] == ["drqv2_pieg, encoder resnet18", "drqv2_pieg, encoder drqv2"]
    assert all(row["states"] == "3" and 0 < float(row["difference"]) < 1 for row in rows)
    assert (tmp_path / "feature_maps.png").stat().st_size > 1000

    films, data = [], ("--dmcgb-dir", tmp_path / "dmcgb", "--no-cuda")
    monkeypatch.setattr(record, "LOOKS", ("test", "color_hard"))
    monkeypatch.setattr(record, "write", lambda path, frames, fps: films.extend(frames))
    flags = ["--split", "looks", "--columns", 1, "--scale", 1, "--steps", 2]
    run(record, monkeypatch, folders[1], *flags, *data)
    seen, other = films[0][:70], films[0][84:154]  # above the returns
    assert films[0].shape == (168, 84, 3) and seen.std() > 5 and (seen != other).mean() > 0.2

    run(evaluate, monkeypatch, folders[1], "--eval-modes", "color_hard", "--eval-episodes", 1, *data)
    rows = list(csv.DictReader((folders[1] / "evaluation.csv").open()))
    found = [(row["split"], row["episodes"], row["clips"]) for row in rows]
    assert found == [("test", "1", "0"), ("color_hard", "1", "0")]


def test_wrong_input_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    folder = tiny_run("mdpo", tmp_path / "runs", "--total-timesteps", "32")
    for flags, says in (
        ((folder, "--out", tmp_path), "this is for runs of drqv2_pieg.py and copies of it"),
        ((tmp_path / "none", "--out", tmp_path), "none is no folder of a run"),
        (("--out", tmp_path), "a run's folder, or some of them, is needed"),
        ((folder, "--out", tmp_path / "nowhere"), "feature_maps.png: not a .png file in a folder that exists"),
        ((folder, "--out", tmp_path, "--steps", 0), "--steps: at least 1"),
    ):
        assert_refuses(feature_maps, monkeypatch, capsys, flags, says)
    assert not list(tmp_path.glob("feature_maps*"))
