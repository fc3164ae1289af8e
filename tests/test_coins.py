"""benchmark/suites/coins.py: laws, ends and pictures worked out by hand, and scripts that are trained on it."""

import csv
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import AGENTS, ROOT, ROWS, folder_in, same, state_of

sys.path[:0] = [str(ROOT / "benchmark" / "suites"), str(ROOT / "benchmark")]
import coins
import common

GOLD, BLUE, WHITE = (240, 180, 30), (120, 90, 240), (255, 255, 255)


def make(task="coins-free", split="train", start=0, num_envs=64, seed=1, **more):
    args = SimpleNamespace(env_id=task, num_envs=num_envs, seed=seed, **more)
    return coins.make_envs(args, split, start)


def middles(obs, colour):
    """Where the pixels of this colour are, in the mean: [N, 2] of down and across; nan where there are none."""
    found = (obs == np.reshape(colour, (3, 1, 1))).all(1)
    places = [np.argwhere(picture) for picture in found]
    return np.array([place.mean(0) if len(place) else (np.nan, np.nan) for place in places])


def seen(envs, episodes=400):
    """Of many episodes' first pictures: whether the background is red, whether the gold is on the right. bool [K] x 2.

    From the pixels alone; each environment plays some episodes by going left.
    """
    red, right = [], []
    obs, _ = envs.reset()
    fresh = np.ones(len(obs), bool)
    while len(red) < episodes:
        red.extend(obs[fresh, 0, 0, 0] > 100)
        right.extend(middles(obs, GOLD)[fresh, 1] > middles(obs, WHITE)[fresh, 1])
        obs, _, terminated, truncated, _ = envs.step(np.zeros(len(obs), int))
        fresh = terminated | truncated
    return np.array(red), np.array(right)


# ---- The law ----
@pytest.mark.parametrize(
    "task, split, share",
    [
        ("coins-law", "train", 1.0),
        ("coins-free", "train", 0.5),
        ("coins-law90-free", "train", 0.9),
        ("coins-law-free", "train", 1.0),  # of one agent
        ("coins-colour", "train", 0.5),
        ("coins-law", "free", 0.5),
        ("coins-free", "law", 1.0),
        ("coins-law", "broken", 0.0),
    ],
)
def test_the_coin_lies_where_the_law_says_that_often(task, split, share):
    red, right = seen(make(task, split), 1000)
    assert (red == right).mean() == pytest.approx(share, abs=0 if share in (0, 1) else 0.06)
    assert 0.4 < red.mean() < 0.6


def test_two_agents_have_levels_of_their_own():
    for task, shares in (("coins-law-free", (1, 0.5)), ("coins-law90-free", (0.9, 0.5)), ("coins-law", (1, 1))):
        envs = make(task, num_agents=2, num_envs=500)
        obs, _ = envs.reset()
        assert len(obs) == envs.num_envs == 1000
        lawful = (obs[:, 0, 0, 0] > 100) == (middles(obs, GOLD)[:, 1] > middles(obs, WHITE)[:, 1])
        assert [lawful[:500].mean(), lawful[500:].mean()] == pytest.approx(shares, abs=0.07)


# ---- Episodes ----
@pytest.mark.parametrize("task", ["coins-free", "coins-colour"])
@pytest.mark.parametrize("goes_to_the_coin", [True, False])
def test_the_coin_pays_and_the_other_end_does_not(task, goes_to_the_coin):
    envs, episodes = make(task), []
    obs, _ = envs.reset()
    for _ in range(60):
        right = middles(obs, GOLD)[:, 1] > middles(obs, WHITE)[:, 1]
        obs, reward, terminated, truncated, info = envs.step((right == goes_to_the_coin).astype(int))
        assert not truncated.any() and reward.dtype == np.float32 and obs.dtype == np.uint8
        assert reward.tolist() == (terminated * float(goes_to_the_coin)).tolist()
        assert [n for n, *_ in info["episodes"]] == np.flatnonzero(terminated).tolist()
        episodes += info["episodes"]
    assert {value for _, value, _ in episodes} == {float(goes_to_the_coin)}
    lengths = {length for *_, length in episodes}
    assert min(lengths) == 6 and max(lengths) == 11


def test_an_episode_is_cut_after_its_last_step():
    envs = make()
    first, _ = envs.reset()
    for step in range(1, 51):
        obs, reward, terminated, truncated, info = envs.step(np.full(64, step % 2))
        assert not reward.any() and not terminated.any() and truncated.all() == truncated.any() == (step == 50)
        if step % 2 == 0 and step < 50:
            assert np.array_equal(obs, first), "a step right and one left"
    assert info["episodes"] == [(n, 0.0, 50) for n in range(64)]
    assert not np.array_equal(obs, first)


def test_an_action_moves_the_agent_and_nothing_else():
    envs = make()
    obs, _ = envs.reset()
    kept = obs.copy()
    for action, pixels in ((1, 3), (0, -3)):
        moved, *_ = envs.step(np.full(64, action))
        assert np.array_equal(middles(moved, GOLD), middles(obs, GOLD))
        assert np.array_equal(middles(moved, WHITE), middles(obs, WHITE) + np.array([0, pixels]))
        assert np.array_equal(obs[:, :, :1], moved[:, :, :1]), "the background"
        obs = moved
    assert np.array_equal(obs, kept), "an observation that was given stays as it was"


def test_places_must_be_read_from_pixels():
    obs, _ = make().reset()
    agent, coin = middles(obs, WHITE), middles(obs, GOLD)
    assert np.array_equal(agent[:, 0], coin[:, 0]) and len(set(agent[:, 0])) > 20
    assert len(set(agent[:, 1])) == 10 and len(set(coin[:, 1])) == 12


def test_the_wrong_coin_is_another_colour_as_bright():
    obs, _ = make("coins-colour").reset()
    gold, blue, agent = middles(obs, GOLD), middles(obs, BLUE), middles(obs, WHITE)
    assert np.array_equal(gold[:, 0], blue[:, 0])
    assert ((gold[:, 1] > agent[:, 1]) == (blue[:, 1] < agent[:, 1])).all() and sum(GOLD) == sum(BLUE)
    assert np.isnan(middles(make().reset()[0], BLUE)).all(), "of the other tasks none"


# ---- Backgrounds and seeds ----
def backgrounds(split, **more):
    """The different first rows of pictures, where no sprite ever is."""
    obs, _ = make(split=split, num_envs=200, **more).reset()
    return {picture[:, 0].tobytes() for picture in obs}


def test_new_looks_are_many_and_never_those_of_training():
    trained = backgrounds("train")
    assert len(trained) == 2 == len(backgrounds("law")) and backgrounds("broken") == trained == backgrounds("free")
    new = backgrounds("new_looks")
    assert len(new) > 100 and not new & trained
    assert backgrounds("test") == new and len(backgrounds("new_looks", seed=2) & new) > 50, "from one set"


def test_what_is_drawn_follows_from_seed_split_and_start():
    def first(**more):
        obs, _ = make(**more).reset()
        return obs

    assert np.array_equal(first(), first())
    different = [first(), first(seed=2), first(start=1), first(split="free")]
    for number, obs in enumerate(different):
        assert not any(np.array_equal(obs, other) for other in different[:number])
    assert np.array_equal(first(split="test"), first(split="new_looks"))
    # The splits differ in the side of the coin alone.
    law, broken = first(split="law"), first(split="broken")
    assert np.array_equal(middles(law, WHITE), middles(broken, WHITE))
    assert np.array_equal(law[:, :, 0], broken[:, :, 0])


# ---- Scripts on coins ----
@pytest.fixture
def tiny(monkeypatch):
    """Scripts with the smallest networks, and the command line as args.json holds it."""
    load_script = common.load_script

    def load_with_a_tiny_agent(path):
        script = load_script(path)
        if hasattr(script, "Agent"):  # a script, not a program
            script.Agent = AGENTS["ppo_netrand" if hasattr(script, "random_kernel") else "mdpo"]
        return script

    monkeypatch.setattr(common, "load_script", load_with_a_tiny_agent)

    def go(*words):
        words = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", ["benchmark/suites/coins.py", *words])
        coins.main(words)

    return go


def flags_of(name, runs_dir, **changes):
    values = ROWS[name]["args"] | {"runs_dir": runs_dir, "anneal_lr": False} | changes
    pairs = ([f"--no-{key}"] if value is False else [f"--{key}", value] for key, value in values.items())
    return [word for pair in pairs for word in pair]


def logged(folder):
    """{key: value} of the last evaluation."""
    rows = csv.DictReader((folder / "metrics.csv").open())
    return {row["key"]: float(row["value"]) for row in rows if row["key"].startswith("eval/")}


def test_mdpo_is_evaluated_on_all_splits_and_resumed(tiny, tmp_path):
    tiny("mdpo", *flags_of("mdpo", tmp_path / "whole"), "--env-id", "coins-law-free")
    tiny("mdpo", *flags_of("mdpo", tmp_path / "part", total_timesteps=16), "--env-id", "coins-law-free")
    whole, part = folder_in(tmp_path / "whole"), folder_in(tmp_path / "part")
    assert whole.name.startswith("coins-law-free__mdpo__1__")
    values = logged(whole)
    keys = [f"{agent}{split}_return" for agent in ("", "agent1/", "agent2/") for split in coins.SPLITS]
    assert sorted(values) == sorted(f"eval/{key}" for key in keys)
    for split in coins.SPLITS:
        agents = [values[f"eval/agent{number}/{split}_return"] for number in (1, 2)]
        assert values[f"eval/{split}_return"] == np.mean(agents)
    tiny("mdpo", "--resume", part, "--total-timesteps", "32")
    assert same(state_of(whole), state_of(part)) and logged(part) == values
    run = common.load_run(part)
    assert run.source()["suite"] == "coins" and run.args.num_envs == 2
    returns = run.script.evaluate(run.agents()[1], run.args, run.make_envs, "new_looks")
    assert returns.mean() == values["eval/agent2/new_looks_return"]


def test_netrand_has_its_monte_carlo_policy_and_a_copy_is_trained(tiny, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text((ROOT / "algos" / "ppo_netrand.py").read_text())
    tiny(path, *flags_of("ppo_netrand", tmp_path / "runs"))
    folder = folder_in(tmp_path / "runs")
    assert folder.name.startswith("coins-free__mine__1__"), "the first task is the default"
    keys = [f"eval/{policy}{split}_return" for policy in ("", "mc_") for split in coins.SPLITS]
    assert sorted(logged(folder)) == sorted(keys)
    tiny(path, *flags_of("ppo_netrand", tmp_path / "ppo"), "--no-netrand")
    assert len(logged(folder_in(tmp_path / "ppo"))) == len(coins.SPLITS)


@pytest.mark.parametrize("name, ablation", [("ppo_netrand", "gray"), ("mdpo", "detached")])
def test_an_ablation_is_trained_resumed_and_loaded(name, ablation, tiny, tmp_path, capsys):
    tiny(name, *flags_of(name, tmp_path / "plain"))
    tiny(name, ablation, *flags_of(name, tmp_path / "whole"))
    tiny(name, ablation, *flags_of(name, tmp_path / "part", total_timesteps=16))
    plain, whole, part = (folder_in(tmp_path / place) for place in ("plain", "whole", "part"))
    assert f"__{name}_{ablation}__1__" in whole.name
    with pytest.raises(SystemExit, match=r"^2$"):
        tiny(name, "--resume", part)
    assert f"that run is of the ablation '{ablation}', not ''" in capsys.readouterr().err
    tiny(name, ablation, f"--resume={part}", "--total-timesteps", "32")
    assert same(state_of(whole), state_of(part)) and not same(state_of(whole), state_of(plain))
    run = common.load_run(part)
    obs, _ = run.make_envs(run.args, "test").reset()
    assert (obs[:, 0] == obs[:, 1]).all() == (ablation == "gray")


def test_a_run_without_flags_is_short(monkeypatch, tmp_path):
    script = common.load_script(ROOT / "algos" / "mdpo.py")
    monkeypatch.setattr(common, "load_script", lambda _: script)
    seen = []
    monkeypatch.setattr(script, "train", lambda args, *factories: seen.append((script.check(args), factories)))
    coins.main(["mdpo"])
    coins.main(["mdpo", "--env-id", "Coins-Law", "--total-timesteps", "99"])
    (short, _), (own, factories) = seen
    assert (short.env_id, short.total_timesteps, short.num_envs) == ("coins-free", 16384, 32)
    assert (own.env_id, own.total_timesteps, own.num_envs) == ("coins-law", 99, 32)
    assert factories == (coins.make_envs, script.Agent)


@pytest.mark.parametrize("name", ["mdpo", "ppo_netrand"])
def test_networks(name):
    made = {}
    for network in ("small", "script"):
        script = common.load_script(ROOT / "algos" / f"{name}.py")
        class_of_the_file = script.Agent
        make_envs, make_agent = coins.on_coins(script, "", network)
        args = script.Args(env_id="coins-free", num_envs=2)
        envs = make_envs(args, "train")
        agent = make_agent(envs, args)
        obs, _ = envs.reset()
        logits, values = agent(torch.from_numpy(obs))
        assert logits.shape == (len(obs), 2) and values.shape == (len(obs),)
        made[network] = sum(weight.numel() for weight in agent.parameters())
        assert (type(agent) is class_of_the_file) == (network == "script")
    assert made["small"] < made["script"] / 3


def test_a_run_keeps_its_network(tiny, tmp_path, capsys):
    tiny("mdpo", *flags_of("mdpo", tmp_path / "runs", total_timesteps=16), "--network", "script")
    folder = folder_in(tmp_path / "runs")
    with pytest.raises(SystemExit, match=r"^2$"):
        tiny("mdpo", "--resume", folder)
    assert "that run has --network script" in capsys.readouterr().err
    tiny("mdpo", "--resume", folder, "--network=script", "--total-timesteps", "32")
    assert state_of(folder)["step"] == 32


def test_a_copy_without_its_blocks_has_its_own_network_alone(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text((ROOT / "algos" / "mdpo.py").read_text().replace("ImpalaBlock", "Block"))
    with pytest.raises(SystemExit, match=r"^2$"):
        coins.main([str(path)])
    assert "mine.py has no ImpalaBlock to make a small network of: --network script" in capsys.readouterr().err


# ---- The command line ----
def test_look_shows_a_row_per_split(tmp_path):
    coins.main(["look", str(tmp_path / "look.png"), "--env-id", "coins-colour"])
    picture = cv2.imread(str(tmp_path / "look.png"))[..., ::-1]
    assert picture.shape == (2 * 64 * len(coins.SPLITS), 2 * 64 * 8, 3)
    for colour in (GOLD, BLUE, WHITE):
        assert (picture == colour).all(-1).any()


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_says_how_it_is_used(argv, capsys):
    coins.main(argv)
    assert "python benchmark/suites/coins.py mdpo --env-id coins-law-free" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, said",
    [
        (["nothing"], "no script 'nothing', there are: drq_sam_reset"),
        (["sac_sam_reset"], "sac_sam_reset.py is no script for Procgen"),
        (["mdpo", "--env-id", "bigfish"], "--env-id bigfish: no such game; there are coins-free coins-law"),
        (["mdpo", "gray"], "no ablation 'gray' of mdpo, there are: doubled"),
        (["mdpo", "frozen"], "frozen: takes an encoder that was trained on Procgen"),
        (["ppo_netrand", "--plain-look"], "--plain-look and --paint-vel-info: Procgen's"),
        (["mdpo", "--resume", "@/nowhere"], "nowhere is no folder of a run"),
        (["look", "@/look.jpg"], "look.jpg: not a .png file"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^2$"):
        coins.main([word.replace("@", str(tmp_path)) for word in argv])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert not list(tmp_path.iterdir())
