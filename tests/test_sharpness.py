"""benchmark/analyses/sharpness.py: its measures against closed forms, and the scripts' losses in them."""

import copy
import csv
import dataclasses
import json
import shutil

import common
import numpy as np
import pytest
import sharpness
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ScriptedEnvs, folder_in, load, tiny_args
from runs import assert_refuses, run, tiny_run
from test_robustness import rng


# ---- The measures ----
@pytest.fixture
def logistic():
    """loss_of and params of a logistic model; inputs [40, 5], the last one 1; probabilities, labels [40]."""
    inputs = torch.cat([torch.randn(40, 4, generator=rng()), torch.ones(40, 1)], dim=1).double()
    labels = (torch.rand(40, generator=rng(1)) < 0.5).double()
    weight, bias = torch.randn(4, generator=rng(2)).double().requires_grad_(), torch.tensor([0.3]).double()
    bias.requires_grad_()

    def loss_of(samples):
        return F.binary_cross_entropy_with_logits(inputs[samples, :4] @ weight + bias, labels[samples])

    probs = (inputs[:, :4] @ weight + bias).sigmoid().detach()
    return loss_of, [weight, bias], inputs, probs, labels


def test_fisher_traces_of_a_logistic_model(logistic):
    loss_of, params, inputs, probs, labels = logistic
    slopes = (probs - labels)[:, None] * inputs  # of each sample
    assert sharpness.fisher_trace(loss_of, params, 40) == pytest.approx(slopes.square().sum(1).mean().item())
    mean = slopes.mean(0)
    wanted = mean[:4].square().mean() + mean[4].square()  # of the weight and of the bias
    assert sharpness.fisher_trace_authors(loss_of, params) == pytest.approx(wanted.item())
    assert all(param.grad is None for param in params)


def test_lambda_max_of_a_logistic_model(logistic):
    loss_of, params, inputs, probs, _ = logistic
    hessian = inputs.T @ (inputs * (probs * (1 - probs))[:, None]) / 40
    wanted = torch.linalg.eigvalsh(hessian)[-1].item()
    found, steps = sharpness.lambda_max(loss_of, params, rng(), 1000, 1e-9)
    assert found == pytest.approx(wanted, rel=1e-5) and steps < 1000
    found, steps = sharpness.lambda_max(loss_of, params, rng())
    assert found == pytest.approx(wanted, rel=2e-2) and steps < 100, "as it is by default"


@pytest.mark.parametrize(
    "eigenvalues", [(1, 3, 8), (-5, 1, 3), (-5, -2, -1), (-3, -3, -3), (0, 0, 0), (-8, 0, 7.5)], ids=str
)
def test_lambda_max_of_a_quadratic(eigenvalues):
    basis = torch.linalg.qr(torch.randn(3, 3, generator=rng()).double())[0]
    matrix = basis @ torch.diag(torch.tensor(eigenvalues).double()) @ basis.T
    point, linear, apart = (torch.randn(3, generator=rng(n)).double().requires_grad_() for n in range(3))

    def loss_of(samples):
        return 0.5 * point @ matrix @ point + linear.sum() + point.sum()

    found, _ = sharpness.lambda_max(loss_of, [apart, point, linear], rng(), 1000, 1e-12)
    # Where all are below 0, the greatest is that of the parameters without curvature.
    assert found == pytest.approx(max(*eigenvalues, 0), abs=1e-4)
    found, _ = sharpness.lambda_max(loss_of, [point], rng(), 1000, 1e-12)
    assert found == pytest.approx(max(eigenvalues), abs=1e-4)


def test_the_power_iteration_is_the_slow_one():
    matrix = torch.randn(6, 6, generator=rng()).double()
    matrix = (matrix + matrix.T).numpy()
    start = torch.randn(6, generator=rng(1)).double()

    def product(vector):
        image = matrix @ torch.cat([vector[0].flatten(), vector[1]]).numpy()
        return [torch.as_tensor(image[:4]).view(2, 2), torch.as_tensor(image[4:])]

    for most, tolerance in ((1, 1e-3), (7, 0.0), (100, 1e-3), (100, 1e-1)):
        vector, values = start.numpy(), []
        while len(values) < most:
            vector = vector / (np.linalg.norm(vector) + 1e-6)
            values.append(vector @ matrix @ vector)
            vector = matrix @ vector
            if len(values) > 1 and abs(values[-1] - values[-2]) / (abs(values[-2]) + 1e-6) < tolerance:
                break
        found = sharpness.power_iteration(product, [start[:4].view(2, 2), start[4:]], most, tolerance)
        assert found == (pytest.approx(values[-1]), len(values))


def test_active_units_of_a_layer_made_by_hand():
    layer, dead = nn.Linear(2, 3), nn.Linear(3, 4)
    head = nn.Sequential(dead, nn.ReLU(inplace=True), nn.Linear(4, 1))
    network = nn.ModuleDict({"backbone": nn.Sequential(layer, nn.ReLU()), "head": head})
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        layer.bias.zero_()
        dead.bias.fill_(-100)
    inputs = torch.tensor([[1.0, -2.0], [3.0, 1.0]])  # before the ReLU: 1, -2, -1 and 3, 1, 4
    shares = load("drq_sam_reset").active_units(network, lambda: head(network["backbone"](inputs)))
    assert shares == {"backbone": pytest.approx(4 / 6), "backbone.1": pytest.approx(4 / 6), "head": 0, "head.1": 0}
    assert not any(module._forward_hooks for module in network.modules())


@torch.no_grad()
def units_of(layers, x):
    """Outputs of a Sequential's ReLUs, worked out from their inputs, {place in it: values}, and what comes last."""
    found = {}
    for n, layer in enumerate(layers):
        if isinstance(layer, nn.ReLU):
            found[n] = x = torch.where(x > 0, x, 0)
        else:
            x = layer(x)
    return found, x


def rainbow_units(script, agent, batch):
    agent.eval()
    units, hidden = units_of(agent.backbone, batch["obs"].float() / 255)
    layers = {f"backbone.{n}": values for n, values in units.items()}
    for name in ("value", "advantage"):
        units, _ = units_of(getattr(agent.head, name), hidden)
        layers |= {f"head.{name}.{n}": values for n, values in units.items()}
    return layers


def sac_units(script, agent, batch):
    units, hidden = units_of(agent.encoder, batch["obs"].flip(2, 3).float() / 255)
    layers = {f"encoder.{n}": values for n, values in units.items()}
    inputs = torch.cat([agent.critic.project(hidden), batch["actions"]], dim=1)
    for name in ("q1", "q2"):
        units, _ = units_of(getattr(agent.critic, name), inputs)
        layers |= {f"critic.{name}.{n}": values for n, values in units.items()}
    units, _ = units_of(agent.actor.head, agent.actor.project(hidden))
    return layers | {f"actor.head.{n}": values for n, values in units.items()}


@pytest.mark.parametrize(("name", "slow_units"), [("drq_sam_reset", rainbow_units), ("sac_sam_reset", sac_units)])
def test_a_run_logs_the_active_units_of_its_network_from_the_first_update_on(name, slow_units, tmp_path):
    script = load(name)
    args = tiny_args(name, tmp_path, total_timesteps=18, learning_starts=9, eval_every=6, exact_every=0, batch_size=4)
    args = script.check(args)
    script.train(args, ScriptedEnvs)
    folder = folder_in(tmp_path)
    logged = {}
    for line in (folder / "metrics.csv").read_text().splitlines():
        step, key, value = line.split(",")
        if key.startswith("charts/active_"):
            logged.setdefault(int(step), {})[key.removeprefix("charts/active_")] = float(value)
    assert list(logged) == [12, 18]  # not at step 6

    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    envs = ScriptedEnvs(args, "test")
    agent = script.Agent(envs, args)
    agent.load_state_dict(state["agent"])
    shape, actions = envs.single_observation_space.shape, envs.single_action_space.shape
    capacity = getattr(args, "buffer_size", args.total_timesteps)
    replay = script.Replay(capacity, shape, *actions, args, torch.device("cpu"), folder / "replay.bin")
    replay.load_state_dict(state["replay"])
    uniform = torch.rand(512, dtype=torch.float64, generator=rng(args.eval_seed))
    index = replay.sample(uniform, 1.0)[0] if name == "drq_sam_reset" else replay.sample(uniform)
    layers = slow_units(script, agent, replay.gather(index))
    wanted = {layer: (values != 0).double().mean().item() for layer, values in layers.items()}
    for part in {layer.partition(".")[0] for layer in layers}:
        values = torch.cat([values.flatten() for layer, values in layers.items() if layer.startswith(part)])
        wanted[part] = (values != 0).double().mean().item()
    assert logged[18] == pytest.approx(wanted, abs=1e-5)
    assert len(set(wanted.values())) > 5 and logged[12] != logged[18]


# ---- The scripts ----
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{script: folder of a tiny run on the real task}."""
    flags = {"drq_sam_reset": "--total-timesteps 80 --learning-starts 70", "sac_sam_reset": "--total-timesteps 40"}
    folder = tmp_path_factory.mktemp("runs")
    return {name: tiny_run(name, folder / name, *more.split()) for name, more in flags.items()}


@pytest.fixture(params=["drq_sam_reset", "sac_sam_reset"])
def problem(request, runs, monkeypatch):
    """A Run, its make_loss and active_shares, and the replay that they draw from."""
    made, replays = common.load_run(runs[request.param], cuda=False, precision="fp32"), []

    class Replay(made.script.Replay):
        def __init__(self, *args):
            super().__init__(*args)
            replays.append(self)

    monkeypatch.setattr(made.script, "Replay", Replay)
    make_problem = sharpness.problem_of(made)
    assert make_problem.__name__ == {"drq_sam_reset": "rainbow", "sac_sam_reset": "soft_actor_critic"}[request.param]
    return made, *make_problem(made), *replays


@pytest.mark.slow
def test_a_loss_is_the_mean_of_its_samples_and_stays(problem):
    _, make_loss, active_shares, _ = problem
    loss_of, params = make_loss(6, rng())
    losses = torch.stack([loss_of(slice(n, n + 1)) for n in range(6)])
    torch.testing.assert_close(losses.mean(), loss_of(slice(None)), rtol=1e-4, atol=0)
    assert losses.unique().numel() > 1 and loss_of(slice(None)) == loss_of(slice(None))
    active_shares(6, rng())
    again, _ = make_loss(6, rng())
    assert again(slice(None)) == loss_of(slice(None)) != make_loss(6, rng(1))[0](slice(None))
    assert all(slope.abs().sum() > 0 for slope in sharpness.gradient(loss_of(slice(None)), params))


@pytest.mark.slow
def test_the_hessian_is_symmetric(problem):
    """What the gradient hook in Rainbow's network would break."""
    loss_of, params = problem[1](4, rng())
    slopes = sharpness.gradient(loss_of(slice(None)), params, create_graph=True)
    one, two = ([torch.randn(param.shape, generator=rng(n)) for param in params] for n in range(2))
    images = [sharpness.gradient(sharpness.dot(slopes, vector), params, retain_graph=True) for vector in (one, two)]
    left, right = sharpness.dot(images[0], two).item(), sharpness.dot(images[1], one).item()
    scale = sharpness.dot(images[0], images[0]).sqrt().item()
    assert scale > 0 and abs(left - right) < 1e-3 * scale


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["drq_sam_reset"], indirect=True)
def test_rainbows_loss_is_the_scripts_and_its_gradient_the_losss_own(problem):
    """The script's network scales the gradient on its way to the backbone by 2^-0.5."""
    made, make_loss, _, replay = problem
    script, args, state = made.script, made.args, made.state
    loss_of, params = make_loss(6, rng())
    (agent,), (target,) = (script.load_agents(args, {"target": state[name]}) for name in ("agent", "target"))
    draws = rng()
    index, weights = replay.sample(torch.rand(6, dtype=torch.float64, generator=draws), 1.0)
    for network in (agent, target):
        size = sum(len(noise) for noise in script.noise_of(agent))
        script.set_noise(network, torch.randn(size, generator=draws))
    offsets, intensity = torch.randint(9, (2, 6, 2), generator=draws), torch.randn(2, 6, generator=draws)
    batch = replay.gather(index) | {"weights": weights}
    loss, _ = script.rainbow_loss(agent, target, batch, offsets, intensity, args)
    assert loss_of(slice(None)).item() == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    for (name, own), slope in zip(
        agent.named_parameters(), sharpness.gradient(loss_of(slice(None)), params), strict=True
    ):
        scale = 2**0.5 if name.startswith("backbone") else 1
        torch.testing.assert_close(slope, scale * own.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["sac_sam_reset"], indirect=True)
def test_the_critics_loss_is_that_of_the_scripts_update(problem):
    made, make_loss, _, replay = problem
    script, args, state = made.script, dataclasses.replace(made.args, sam=False), made.state
    loss_of, params = make_loss(6, rng())
    (agent,) = script.load_agents(args, state)
    target = copy.deepcopy(nn.ModuleDict({"encoder": agent.encoder, "critic": agent.critic}))
    target.load_state_dict(state["target"])
    stream = rng()
    draws = {"rows": replay.sample(torch.rand(6, dtype=torch.float64, generator=stream))}
    draws["offsets"] = torch.randint(9, (2, 6, 2), generator=stream)
    draws["normal"] = torch.randn(2, 6, 1, generator=stream)  # cartpole's actions are one number
    optimizer = torch.optim.Adam(agent.parameters())
    parts = script.update(agent, target, optimizer, replay, draws, args)
    assert loss_of(slice(None)).item() == pytest.approx(parts["qf_loss"].item(), rel=1e-5)
    norm = nn.utils.get_total_norm(sharpness.gradient(loss_of(slice(None)), params))
    assert norm.item() == pytest.approx(parts["qf_grad_norm"].item(), rel=1e-4)
    assert len(params) == len(list(agent.encoder.parameters())) + len(list(agent.critic.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["drq_sam_reset"], indirect=True)
def test_no_sample_reaches_over_the_observation_that_was_under_way(problem):
    """Its frame is not in the file. With n rewards per sample, the n newest rows would need it or one behind it."""
    made, _, _, replay = problem
    there = replay.priorities.nonzero().flatten()
    assert made.args.n_step == 10 and replay.size == 80 and not replay.rows["dones"][79]
    assert there.max() == 69 and replay.rows["frames"][there].any()
    assert made.state["replay"]["priorities"].nonzero().max() == 70


def table(path):
    return {row["key"]: float(row["value"]) for row in csv.DictReader(path.open())}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["drq_sam_reset", "sac_sam_reset"])
def test_a_run_becomes_a_table(runs, name, tmp_path, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in runs[name].iterdir()}
    flags = ("--batch-size", 4, "--iterations", 3, "--out")
    run(sharpness, monkeypatch, f"some={runs[name]}", *flags, tmp_path / "one.csv")
    assert "fisher_trace_authors" in capsys.readouterr().out
    run(sharpness, monkeypatch, f"some={runs[name]}", *flags, tmp_path / "two.csv")
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes(), "the same seed"
    assert {path: path.read_bytes() for path in runs[name].iterdir()} == before, "the run is as it was"
    row = next(csv.DictReader((tmp_path / "one.csv").open()))
    about = json.loads((runs[name] / "args.json").read_text())
    step = {"drq_sam_reset": "80", "sac_sam_reset": "40"}[name]
    suite = {"drq_sam_reset": "atari-100k", "sac_sam_reset": "dmc"}[name]
    wanted = {"method": "some", "suite": suite, "task": about["args"]["env_id"], "seed": "1", "step": step}
    assert row.items() >= (wanted | {"commit": about["commit"]}).items()
    found = table(tmp_path / "one.csv")
    layers = {
        "drq_sam_reset": ["backbone.1", "backbone.3", "backbone.5", "head.advantage.1", "head.value.1"],
        "sac_sam_reset": [
            *(f"backbone.{n}" for n in (1, 3, 5, 7)),
            *(f"head.q{n}.{m}" for n in (1, 2) for m in (1, 3)),
        ],
    }[name]
    measures = ["loss", "fisher_trace", "fisher_trace_authors", "lambda_max", "power_iterations"]
    assert sorted(found) == sorted(measures + [f"active_{layer}" for layer in ["backbone", "head", *layers]])
    assert all(found[key] > 0 for key in found if key != "lambda_max")
    assert found["fisher_trace"] > found["fisher_trace_authors"]
    for part in ("backbone", "head"):
        of_layers = [value for key, value in found.items() if key.startswith(f"active_{part}.")]
        assert min(of_layers) < found[f"active_{part}"] < max(of_layers) < 1


@pytest.mark.slow
def test_wrong_input_says_so_in_one_line(runs, tmp_path, monkeypatch, capsys):
    folder = runs["sac_sam_reset"]
    mdpo = tiny_run("mdpo", tmp_path / "mdpo", "--total-timesteps", "32")
    alone, jaco, young = (tmp_path / name for name in ("alone", "jaco", "young"))
    shutil.copytree(folder, alone)
    (alone / "replay.bin").unlink()
    shutil.copytree(folder, jaco)
    about = json.loads((jaco / "args.json").read_text())
    about["args"]["env_id"] = "reach-duplo"
    (jaco / "args.json").write_text(json.dumps(about))
    shutil.copytree(runs["drq_sam_reset"], young)
    state = torch.load(young / "checkpoint.pt", weights_only=True)
    state["replay"] |= {"size": 5, "priorities": torch.zeros(5, dtype=torch.int64)}  # fewer than n steps
    torch.save(state, young / "checkpoint.pt")
    for flags, says in (
        ((), "a run's folder, or some of them, is needed"),
        ((tmp_path / "none",), "none is no folder of a run"),
        ((mdpo,), "this is for runs of drq_sam_reset.py and sac_sam_reset.py and copies of them"),
        ((alone,), "replay.bin"),
        ((jaco,), "jaco was not trained by sac_sam_reset.py alone"),
        ((young,), "its replay holds no transition"),
        ((folder, "--out", tmp_path / "table.txt"), "table.txt: not a .csv file"),
        ((folder, "--batch-size", 0), "at least 1"),
        ((folder, "--active-size", 0), "at least 1"),
        ((folder, "--iterations", 0), "at least 1"),
        ((folder, "--seed", -1), "at least 0"),
    ):
        assert_refuses(sharpness, monkeypatch, capsys, flags, says)
    assert not list(tmp_path.glob("*.csv"))
