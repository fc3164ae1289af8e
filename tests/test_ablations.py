"""The ablations change what they say, nothing else, and train, resume and evaluate as the scripts do."""

import copy
import itertools
import json
import math
import subprocess
import sys
from colorsys import hsv_to_rgb, rgb_to_hsv
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import tyro
from conftest import AGENTS, ROOT, ROWS, ScriptedEnvs, folder_in, load, obs_shape_of, same, state_of, tiny_args

sys.path[:0] = [str(ROOT / "benchmark" / "suites"), str(ROOT / "benchmark")]
import ablations
import common
import networks
import observations

EVERY = [(name, ablation) for name, rows in ablations.ABLATIONS.items() for ablation in rows]
BOX = (slice(None), slice(None), slice(13), slice(26))
NETWORKS = [pair for pair in EVERY if ablations.ABLATIONS[pair[0]][pair[1]][0] in ("change", "class")]
TIMM = "test_efficientnet"  # one of timm's smallest


class PlainEnvs(ScriptedEnvs):
    """Scripted environments that keep what they showed, and end training after `left` steps."""

    left = math.inf

    def __init__(self, args, split, start=None):
        # The module of a script's Args is "mdpo", or "mdpo_3" where common.load_script made it.
        name = type(args).__module__.rstrip("_0123456789")
        super().__init__(args, split, start or 0, obs_shape=obs_shape_of(name))
        self.shown, self.training = [], start is not None

    def observe(self):
        self.shown.append(super().observe())
        return self.shown[-1].copy()

    def step(self, actions):
        PlainEnvs.left -= self.training
        if PlainEnvs.left < 0:
            raise InterruptedError
        return super().step(actions)


@pytest.fixture
def scripts(monkeypatch):
    """Every script that common.load_script loads is on scripted environments; -> a list of them."""
    loaded, load_script = [], common.load_script

    def load_on_plain_envs(path):
        script = load_script(path)
        script.make_envs = PlainEnvs
        loaded.append(script)
        return script

    monkeypatch.setattr(common, "load_script", load_on_plain_envs)
    return loaded


def wrapped(monkeypatch, tmp_path, wrapper, split="train", start=0, **changes):
    args = tiny_args("ppo_netrand", tmp_path, **changes)
    script = load("ppo_netrand")
    monkeypatch.setattr(script, "make_envs", PlainEnvs)
    return observations.make_envs(script, wrapper, args, split, *([] if start is None else [start]))


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
WRAPPERS = [observations.Gray, observations.Cutout, observations.Inversion, observations.Jitter]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_only_training_is_augmented_and_gray_is_everywhere(wrapper, monkeypatch, tmp_path):
    for split in ("train", "test", "full_look"):
        evaluated = wrapped(monkeypatch, tmp_path, wrapper, split, start=None, num_envs=16)
        bare, seen = watch(evaluated, 2)
        assert np.array_equal(bare, seen) == (wrapper is not observations.Gray)
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


@pytest.mark.parametrize("wrapper", [observations.Cutout, observations.Inversion, observations.Jitter])
def test_what_is_drawn_follows_from_seed_and_start(wrapper, monkeypatch, tmp_path):
    obs = np.random.default_rng(0).integers(0, 256, (16, 3, 64, 64), dtype=np.uint8)

    def shown(seed, start):
        envs = wrapped(monkeypatch, tmp_path, wrapper, start=start, seed=seed, num_envs=16)
        return np.stack([envs.change(obs) for _ in range(3)])

    assert np.array_equal(shown(1, 0), shown(1, 0))
    assert not np.array_equal(shown(1, 0), shown(1, 1)) and not np.array_equal(shown(1, 0), shown(2, 0))


def test_gray_is_the_mean_of_the_channels_rounded_down(monkeypatch, tmp_path):
    bare, seen = watch(wrapped(monkeypatch, tmp_path, observations.Gray), 2)
    expected = bare.astype(float).mean(axis=2).astype(np.uint8)
    assert all(np.array_equal(seen[:, :, channel], expected) for channel in range(3))


def test_cutout_paints_up_to_five_rectangles_anew_each_frame(monkeypatch, tmp_path):
    envs = wrapped(monkeypatch, tmp_path, observations.Cutout, num_envs=64)
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
    envs = wrapped(monkeypatch, tmp_path, observations.Inversion, num_envs=256)
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
    got = observations.jitter(image[None], *np.float32(drawn), boxed)[0]
    keep = np.s_[:, 13:] if boxed else np.s_[:]
    assert np.abs(got[keep] - expected[keep]).max() <= 0.501
    unboxed = slow_jitter(image, *drawn, not boxed)
    assert np.abs(got[:, 13:] - unboxed[:, 13:]).max() > 0.6  # the box counts in the mean


def test_jitter_is_drawn_once_an_iteration_for_all_environments(monkeypatch, tmp_path):
    envs = wrapped(monkeypatch, tmp_path, observations.Jitter, num_steps=4)
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
def agent_of(ablation, tmp_path, name="ppo_netrand", **changes):
    """-> script, arguments, the ablation's agent; the plain one if there is none."""
    script, args = load(name), tiny_args(name, tmp_path, **changes)
    make_agent = script.Agent
    if ablation:
        kind, change, _ = ablations.find(script, ablation)
        if ablation == "timm":
            change = networks.timm_encoder(TIMM)
        _, make_agent = ablations.factories(script, kind, change)
    torch.manual_seed(0)
    return script, args, make_agent(ScriptedEnvs(args, "train", num_actions=6), args)


def images(seed, n=4, name="ppo_netrand"):
    shape, rng = (n, *obs_shape_of(name)), torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)


def outputs_of(name, agent, obs):
    """What an agent says of some observations, a tuple."""
    if name == "drqv2_pieg":
        hidden = agent.encoder(obs)
        return agent.actor(hidden), agent.critic(hidden, torch.ones(len(obs), 2))
    if name == "sac_sam_reset":
        hidden = agent.encoder(load(name).to_pixels(obs))
        return *agent.actor(hidden), agent.critic(hidden, torch.ones(len(obs), 2))
    return (agent(load(name).to_pixels(obs)),) if name == "drq_sam_reset" else agent(obs)


def size_of(module):
    return sum(parameter.numel() for parameter in module.parameters())


def masks_of(agent):
    return [module.mask.clone() for module in agent.modules() if isinstance(module, networks.Mask)]


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
    _, _, agent = agent_of("dropout", tmp_path)
    seen = watched(agent, networks.Mask)
    agent(images(0))
    convolutions = [module for module in agent.modules() if isinstance(module, nn.Conv2d)]
    assert len(seen) == len(convolutions) == 15
    zeros = 0
    for x, y in seen:
        dropped = (y[0] == 0) & (x[0] != 0)
        assert torch.allclose(y, x * ~dropped / 0.9)  # the same for all images
        zeros += dropped.sum().item()
    assert abs(zeros / sum(x[0].numel() for x, _ in seen) - 0.1) < 0.005

    _, _, bare = agent_of(None, tmp_path)
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
    _, _, bare = agent_of(None, tmp_path)
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


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "ablation"), NETWORKS)
def test_a_network_is_copied_saved_and_read_again(name, ablation, precision, tmp_path):
    _, _, agent = agent_of(ablation, tmp_path, name, precision=precision)
    obs, expected = images(0, name=name), None
    for network in (agent, copy.deepcopy(agent), agent_of(ablation, tmp_path, name, precision=precision)[2]):
        network.load_state_dict(agent.state_dict())
        outputs = outputs_of(name, network.eval(), obs)
        expected = expected or outputs
        assert equal(expected, outputs) and all(x.dtype == torch.float32 and x.isfinite().all() for x in outputs)
    plain = outputs_of(name, agent_of(None, tmp_path, name)[2], obs)
    assert [x.shape for x in plain] == [x.shape for x in outputs]
    kernels = [parameter for parameter in agent.parameters() if parameter.dim() == 4]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


# ---- Networks of the plasticity paper ----
def scatter(agent, kinds):
    """Gives the norms of an agent scales and shifts that show."""
    norms = [module for module in agent.modules() if isinstance(module, kinds)]
    for parameter in itertools.chain(*(norm.parameters() for norm in norms)):
        nn.init.uniform_(parameter, 0.5, 2)
    return norms


@torch.no_grad()
@pytest.mark.parametrize(
    ("ablation", "name", "convolutions", "hidden"),
    [
        ("layer_norm", "drq_sam_reset", 3, 2),
        ("plastic", "drq_sam_reset", 3, 0),
        ("layer_norm", "sac_sam_reset", 4, 6),
        ("plastic", "sac_sam_reset", 4, 0),
    ],
)
def test_layer_norm_is_over_channels_and_hidden_units(ablation, name, convolutions, hidden, tmp_path):
    script, _, agent = agent_of(ablation, tmp_path, name)
    scatter(agent, nn.LayerNorm)
    kinds = (nn.Conv2d, nn.Linear, getattr(script, "NoisyLinear", nn.Linear))
    seen, before, after = watched(agent, nn.LayerNorm), watched(agent, kinds), watched(agent, nn.ReLU)
    outputs_of(name, agent, images(0, name=name))
    seen = [(x.clone(), y) for x, y in seen if x.shape[1] != 50]  # without sac_sam_reset.py's own
    norms = [module for module in agent.modules() if isinstance(module, networks.ChannelNorm)]
    assert len(norms) == convolutions and sum(x.dim() == 2 for x, _ in seen) == hidden
    assert all(norm.eps == 1e-6 for norm in agent.modules() if isinstance(norm, nn.LayerNorm))
    for x, _ in seen:  # of a layer directly, and in front of a ReLU
        assert any(x.shape == y.shape and torch.equal(x, y) for *_, y in before)
    assert sum(any(y.shape == x.shape and torch.equal(y.relu(), z) for x, z in after) for _, y in seen) == len(seen)
    for norm in norms:
        x = 1e-3 * torch.randn(2, len(norm.weight), 3, 4)  # small enough for epsilon to show
        expected = torch.zeros_like(x)
        for n, row, column in itertools.product(range(2), range(3), range(4)):
            pixel = x[n, :, row, column]
            spread = (pixel - pixel.mean()) / (pixel.var(unbiased=False) + 1e-6).sqrt()
            expected[n, :, row, column] = spread * norm.weight + norm.bias
        assert torch.allclose(norm(x), expected, atol=1e-5)
        turned = nn.functional.layer_norm(x.movedim(1, -1), norm.normalized_shape, norm.weight, norm.bias, 1e-6)
        assert torch.equal(norm(x), turned.movedim(-1, 1))


@torch.no_grad()
def test_a_reset_leaves_the_norms_of_rainbow_and_each_network_has_its_own(tmp_path):
    script, _, agent = agent_of("layer_norm", tmp_path, "drq_sam_reset")
    norms = scatter(agent, nn.LayerNorm)
    target, before = copy.deepcopy(agent), [parameter.clone() for norm in norms for parameter in norm.parameters()]
    _, _, fresh = agent_of("layer_norm", tmp_path, "drq_sam_reset")
    nn.init.uniform_(fresh.head.value[0].weight)
    script.reset_head(agent, target, fresh)
    script.shrink_and_perturb(agent.backbone, fresh.backbone, 1.0)
    for network in (agent, target):
        assert torch.equal(network.head.value[0].weight, fresh.head.value[0].weight)
        kept = [norm for norm in network.modules() if isinstance(norm, nn.LayerNorm)]
        assert len(kept) == 5 and equal(before, [parameter for norm in kept for parameter in norm.parameters()])
    obs = images(0, name="drq_sam_reset")
    expected = outputs_of("drq_sam_reset", target, obs)
    for norm in agent.norms:
        norm.weight.zero_()
    assert equal(expected, outputs_of("drq_sam_reset", target, obs))
    assert not equal(expected, outputs_of("drq_sam_reset", agent, obs))


def test_crelu_is_both_parts():
    x = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    assert torch.equal(networks.CReLU()(x), torch.tensor([[1.0, 0, 0, 2], [0, 3, 0, 0]]))
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(networks.CReLU()(x), torch.cat([x.relu(), (-x).relu()], 1))


def noisy_size(n_in, n_out):
    return 2 * (n_in * n_out + n_out)


@torch.no_grad()
def test_crelu_of_rainbow_keeps_the_widths(tmp_path):
    _, _, plain = agent_of(None, tmp_path, "drq_sam_reset", n_atoms=51)
    script, args, agent = agent_of("crelu", tmp_path, "drq_sam_reset", n_atoms=51)
    convolutions = (4 * 64 + 1) * 16 + (32 * 16 + 1) * 32 + (64 * 9 + 1) * 32
    head = 2 * noisy_size(3136, 256) + noisy_size(512, 51) + noisy_size(512, 6 * 51)
    assert size_of(agent.backbone) == convolutions and size_of(agent.head) == head
    before, after = watched(plain, nn.ReLU), watched(agent, networks.CReLU)
    for network in (plain, agent):
        outputs_of("drq_sam_reset", network, images(0, name="drq_sam_reset"))
    assert len(after) == 5 and [y.shape for _, y in before] == [y.shape for _, y in after]
    assert torch.allclose(agent.head.value[0].bias_sigma, torch.tensor(args.noisy_std * 256**-0.5))
    _, _, agent = agent_of("plastic", tmp_path, "drq_sam_reset", n_atoms=51)
    assert size_of(agent.head) == head and size_of(agent.backbone) == size_of(plain.backbone) + 2 * (32 + 64 + 64)
    obs = images(0, name="drq_sam_reset")
    active = script.active_units(agent, lambda: script.act(agent, obs))  # of the norms' ReLUs, and of CReLUs
    assert active["head"] == 0.5 and 0 < active["backbone"] < 1


@torch.no_grad()
@pytest.mark.parametrize("ablation", ["crelu", "plastic"])
def test_crelu_of_sac_doubles_the_inputs_of_what_follows(ablation, tmp_path):
    _, _, plain = agent_of(None, tmp_path, "sac_sam_reset")
    _, _, agent = agent_of(ablation, tmp_path, "sac_sam_reset")
    more = 2 * (32 + 64 + 128 + 256)  # of the norms
    if ablation == "crelu":
        more = 9 * (32 * 64 + 64 * 128 + 128 * 256)
        assert [type(layer) for layer in agent.encoder] == [nn.Conv2d, networks.CReLU] * 4 + [nn.Flatten]
        assert agent.encoder(torch.zeros(2, 3, 64, 64)).shape == (2, 2 * 4096)
        for part in (agent.critic, agent.actor):
            assert part.project[0].weight.shape == (50, 2 * 4096) and not part.project[0].bias.any()
            assert part.project[0].weight.std().item() == pytest.approx(8192**-0.5, rel=0.01)
        for layer in list(agent.encoder)[0:8:2]:
            rows = layer.weight.flatten(1)
            assert torch.allclose(rows @ rows.T, 2 * torch.eye(len(rows)), atol=1e-4) or len(rows) > rows.shape[1]
    assert size_of(agent.encoder) == size_of(plain.encoder) + more
    for head, wide, n_out in ((plain.critic.q1, agent.critic.q1, 1), (plain.actor.head, agent.actor.head, 4)):
        assert size_of(wide) == size_of(head) + 256 * (256 + n_out)
        assert [type(layer) for layer in wide] == [nn.Linear, networks.CReLU] * 2 + [nn.Linear]
        assert torch.equal(wide[0].weight @ wide[0].weight.T, head[0].weight @ head[0].weight.T)
        assert torch.allclose(wide[2].weight @ wide[2].weight.T, 2 * torch.eye(256), atol=1e-5)
        assert not wide[2].bias.any() and not wide[4].bias.any()
    assert torch.allclose(agent.critic.q2[4].weight.square().sum(), torch.tensor(2.0))
    mean, log_std = agent.actor.head[4].weight.chunk(2)
    assert torch.allclose(mean @ mean.T, 2 * torch.eye(2), atol=1e-5)
    assert torch.allclose(log_std @ log_std.T, torch.eye(2), atol=1e-5)


def replay_of(script, args, rows=30):
    """A replay of made-up transitions, with priorities of their own."""
    rng, device = np.random.default_rng(0), torch.device("cpu")
    replay = script.Replay(rows, (4, 84, 84), args, device, None)
    replay.begin(rng.integers(0, 256, (84, 84)))
    for n in range(rows):
        replay.add(rng.integers(6), rng.normal(), n % 7 == 6, rng.integers(0, 256, (84, 84)))
    return replay


def draws_of(script, agent, args, seed):
    """The random numbers of an update, as `train` draws them."""
    rng, passes = torch.Generator().manual_seed(seed), 2 if args.sam else 1
    size, noise_size = args.batch_size, sum(map(len, script.noise_of(agent)))
    draws = {"beta": torch.tensor(0.5, dtype=torch.float64)}
    draws["uniform"] = torch.rand(size, dtype=torch.float64, generator=rng)
    draws["noise"] = torch.randn(passes, 2, noise_size, generator=rng)
    draws["offsets"] = torch.randint(9, (passes, 2, size, 2), generator=rng)
    draws["intensity"] = torch.randn(passes, 2, size, generator=rng)
    return draws


@pytest.mark.parametrize(("max_norm", "rate"), [(1e-3, 10.0), (10.0, 1e-2)])
def test_plastic_code_climbs_with_the_head_and_adds_its_first_gradient(max_norm, rate, tmp_path):
    """Beside a slow twin, written from the authors' agents/base.py and optimizer/sam.py; two updates in a row."""
    script, args, agent = agent_of("plastic_code", tmp_path, "drq_sam_reset", max_grad_norm=max_norm, batch_size=4)
    _, _, twin = agent_of("plastic", tmp_path, "drq_sam_reset")
    twin.load_state_dict(agent.state_dict())
    first = {part: networks.weights_of(getattr(agent, part)) for part in ("backbone", "head")}
    replays, pairs, optimizers = [replay_of(script, args), replay_of(script, args)], [], []
    for network in (agent, twin):
        pairs.append((network, copy.deepcopy(network).requires_grad_(False)))
        optimizers.append(torch.optim.SGD(network.parameters(), lr=rate))
    for seed in range(2):
        draws = draws_of(script, agent, args, seed)
        script.update(*pairs[0], optimizers[0], replays[0], draws, args)

        online, target = pairs[1]
        index, weights = replays[1].sample(draws["uniform"], draws["beta"])
        batch = replays[1].gather(index) | {"weights": weights}
        gradients = []
        for i in range(2):
            for network, noise in zip((online, target), draws["noise"][i], strict=True):
                script.set_noise(network, noise)
            augmentation = draws["offsets"][i], draws["intensity"][i]
            loss, priorities = script.rainbow_loss(online, target, batch, *augmentation, args)
            replays[1].prioritise(index, priorities)
            names, params = zip(*online.named_parameters(), strict=True)
            gradients.append(dict(zip(names, torch.autograd.grad(loss, params), strict=True)))
            if i == 0:
                before = {name: param.detach().clone() for name, param in online.named_parameters()}
                norm = torch.cat([gradient.flatten() for gradient in gradients[0].values()]).norm()
                with torch.no_grad():
                    for name, param in online.named_parameters():
                        param += args.sam_rho * gradients[0][name] / norm
        for name, param in online.named_parameters():
            param.data = before[name]
            param.grad = gradients[1][name]
            if name.startswith("head."):
                param.grad = param.grad + gradients[0][name] * min(1, max_norm / norm)
        nn.utils.clip_grad_norm_(online.parameters(), max_norm)
        optimizers[1].step()
        for param, own in zip(target.parameters(), online.parameters(), strict=True):
            param.data = 0.99 * param.data + 0.01 * own.data
        for part in ("backbone", "head"):
            one, other = (networks.weights_of(getattr(network, part)) for network in (agent, twin))
            assert (one - other).norm() < 0.03 * (other - first[part]).norm()


def test_der_learns_towards_weights_of_every_nth_update(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "DER_TARGET_EVERY", 3)
    changes = {"sam": False, "augment": False, "tau": 1.0, "batch_size": 4}
    script, args, agent = agent_of("der", tmp_path, "drq_sam_reset", **changes)
    target, replay = copy.deepcopy(agent).requires_grad_(False), replay_of(script, args)
    assert target.held is agent.held
    optimizer, obs = torch.optim.Adam(agent.parameters(), lr=1e-2), images(0, name="drq_sam_reset")
    seen, online = [], []
    for number in range(7):
        online.append(networks.weights_of(agent))
        draws = draws_of(script, agent, args, number)
        script.update(agent, target, optimizer, replay, draws, args)
        seen.append(agent.held.weights.clone())
        script.set_noise(target, draws["noise"][0, 0])
        with torch.no_grad(), networks.holding(agent, online[number // 3 * 3]):
            script.set_noise(agent, draws["noise"][0, 0])
            assert torch.equal(agent(obs.float() / 255), target(obs.float() / 255))
    assert all(torch.equal(seen[number], online[number // 3 * 3]) for number in range(7))
    assert not torch.equal(seen[2], seen[3]) and not torch.equal(online[1], online[0])


@pytest.mark.parametrize("name", [pytest.param("drq_sam_reset", marks=pytest.mark.slow), "sac_sam_reset"])
def test_l2_is_the_weight_decay_of_adam(name, monkeypatch, tmp_path):
    """After the first update; a large one, that it shows."""
    script, spared = load(name), {"drq_sam_reset": (), "sac_sam_reset": "log_alpha"}[name]
    steps, adam = 6, torch.optim.Adam
    flags = [*ablations.BASE, *flags_of(name, tmp_path, total_timesteps=steps, eval_every=0, exact_every=0)]
    flags += ["--max-grad-norm", "1e9"] * (name == "drq_sam_reset")

    def trained(make_agent, weight_decay=0.0):
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim, "Adam", partial(adam, weight_decay=weight_decay))
            agent = script.main(flags, PlainEnvs, lambda *args: made.append(make_agent(*args)) or made[-1])
        return dict((made[0] if name == "drq_sam_reset" else agent).named_parameters())

    results = []
    decaying = partial(networks.make_agent, script, networks.l2(0.5, spared))
    for change in ((decaying,), (script.Agent, 0.5), (script.Agent,)):
        made = []
        results.append(trained(*change))
    mine, decayed, plain = results
    for key in mine:
        expected = plain[key] if key == "log_alpha" else decayed[key]
        assert torch.allclose(mine[key], expected, rtol=0, atol=2e-6), key
        assert mine[key].dim() < 2 or not torch.allclose(mine[key], plain[key], rtol=0, atol=2e-6), key


@pytest.mark.parametrize("sam", [False, True])
def test_swa_evaluates_the_mean_of_the_last_weights(sam, monkeypatch, tmp_path):
    monkeypatch.setattr(networks, "SWA_EVERY", 2)
    monkeypatch.setattr(networks, "SWA_STEPS", 9)
    script = pin(monkeypatch, "drq_sam_reset")
    monkeypatch.setattr(script, "Agent", AGENTS["drq_sam_reset"])
    update, weights = script.update, []

    def seen_update(agent, *rest):
        weights.append(networks.weights_of(agent))
        return update(agent, *rest)

    monkeypatch.setattr(script, "update", seen_update)
    evaluated, compare = [], script.compare

    def seen_compare(agents, *rest):
        evaluated.append(seen(agents[0]))
        return compare(agents, *rest)

    monkeypatch.setattr(script, "compare", seen_compare)
    obs = script.to_pixels(images(0, name="drq_sam_reset"))

    @torch.no_grad()
    def seen(agent):
        """The agent's parameters, what it says in evaluation, and its parameters behind that."""
        before, logits = networks.weights_of(agent), agent.eval()(obs)
        return before, logits, networks.weights_of(agent.train())

    run(monkeypatch, "drq_sam_reset", "swa", *flags_of("drq_sam_reset", tmp_path, eval_every=9), *["--sam"] * sam)
    chosen = torch.stack(weights[6:13:2])  # weights[n] are those after n of 13 updates
    state = torch.load(folder_in(tmp_path) / "checkpoint.pt", weights_only=True)
    for network in ("agent", "target"):
        assert state[network]["average.count"] == len(chosen) and state[network]["average.passes"] == 13 * (1 + sam)
        assert torch.allclose(state[network]["average.mean"], chosen.mean(0), atol=1e-6)
    args = tiny_args("drq_sam_reset", tmp_path)
    twin = script.Agent(PlainEnvs(args, "test"), args)
    assert len(evaluated) == 2
    for (before, logits, after), mean in zip(evaluated, (None, state["target"]["average.mean"]), strict=True):
        nn.utils.vector_to_parameters(before if mean is None else mean, twin.parameters())
        assert torch.equal(logits, twin.eval()(obs)) and torch.equal(before, after)
    assert not torch.allclose(evaluated[-1][0], mean)
    (agent,) = script.load_agents(args, state, PlainEnvs, networks.swa(script))
    assert torch.equal(agent.eval()(obs), logits)


# ---- Networks of the mutual distillation paper ----
def impala_size(depths, hidden, num_actions):
    size, n_in = 0, 3
    for n_out in depths:
        size += (9 * n_in + 1) * n_out + 4 * (9 * n_out + 1) * n_out
        n_in = n_out
    return size + (64 * n_in + 1) * hidden + (hidden + 1) * (num_actions + 1)


@torch.no_grad()
def test_doubled_is_twice_as_wide_and_the_other_has_the_weights_of_two(tmp_path):
    script, args, plain = agent_of(None, tmp_path, "mdpo")
    assert size_of(plain) == impala_size((16, 32, 32), 256, 6)
    _, _, wide = agent_of("doubled", tmp_path, "mdpo")
    _, _, equal_size = agent_of("doubled_equal", tmp_path, "mdpo")
    assert size_of(wide) == impala_size((32, 64, 64), 512, 6)
    assert abs(size_of(equal_size) / (2 * size_of(plain)) - 1) < 0.01
    for agent, width in ((wide, 512), (equal_size, 362)):
        hidden = agent.encoder(torch.rand(2, 3, 64, 64))
        assert hidden.shape == (2, width) and (hidden >= 0).all()
        gram = agent.actor.weight @ agent.actor.weight.T
        assert torch.allclose(gram, 1e-4 * torch.eye(6), atol=1e-7) and not agent.actor.bias.any()
        assert torch.allclose(agent.critic.weight.norm(), torch.tensor(1.0))
    args = tyro.cli(script.Args, args=ablations.DOUBLED)
    assert (args.num_agents, args.total_timesteps) == (1, 100_000_000)
    assert args.num_envs * args.num_steps == 32768 and args.num_envs * args.num_steps // args.num_minibatches == 4096


def encoder_run(tmp_path, *flags):
    """The folder of a short run of two agents."""
    script = common.load_script(ROOT / "algos" / "mdpo.py")
    short = flags_of("mdpo", tmp_path / "source", eval_every=0, total_timesteps=16, update_epochs=1)
    script.main([*short, "--env-id", "maze", *map(str, flags)], PlainEnvs)
    return folder_in(tmp_path / "source")


def agents_in(folder):
    """The weights of each agent of a run."""
    return [agent.state_dict() for agent in common.load_run(folder).agents()]


@pytest.mark.parametrize("ablation, own, peer", [("detached", True, False), ("detached_own", False, True)])
def test_detached_distillation_pulls_one_of_the_two(ablation, own, peer):
    script = common.load_script(ROOT / "algos" / "mdpo.py")
    logits, peer_logits = torch.randn(2, 5, 15, generator=torch.Generator().manual_seed(0))
    expected = script.distillation_loss(logits, peer_logits)
    kind, change, _ = ablations.find(script, ablation)
    make_envs, make_agent = ablations.factories(script, kind, change)
    assert (make_envs, make_agent) == (script.make_envs, script.Agent)
    logits.requires_grad_()
    peer_logits.requires_grad_()
    loss = script.distillation_loss(logits, peer_logits)
    assert torch.equal(loss, expected)
    loss.backward()
    assert [logits.grad is not None, peer_logits.grad is not None] == [own, peer]


@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_frozen_trains_new_heads_on_the_encoder_of_a_run(number, scripts, monkeypatch, tmp_path):
    source = encoder_run(tmp_path, "--num-levels", "7")
    flags = ["--encoder-agent", "2"] * (number == 2)
    short = flags_of("mdpo", tmp_path / "new", eval_every=0, total_timesteps=16, update_epochs=1)
    run(monkeypatch, "mdpo", "frozen", "--encoder", source, *flags, *short)
    folder = folder_in(tmp_path / "new")
    before, (after,) = agents_in(source)[number - 1], agents_in(folder)
    args = json.loads((folder / "args.json").read_text())["args"]
    assert (args["env_id"], args["num_levels"], args["num_agents"]) == ("maze", 7, 1)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("encoder."), name


def test_frozen_begins_with_heads_of_its_own(tmp_path):
    script, args, source = agent_of(None, tmp_path, "mdpo")
    plain = copy.deepcopy(source)
    nn.init.uniform_(source.encoder[0].conv.weight)
    nn.init.uniform_(source.actor.weight)
    torch.manual_seed(0)
    change = networks.frozen(source.encoder.state_dict())
    agent = networks.make_agent(script, change, ScriptedEnvs(args, "train", num_actions=6), args)
    assert equal(agent.encoder.parameters(), source.encoder.parameters())
    assert equal(agent.actor.parameters(), plain.actor.parameters())
    assert [name for name, weight in agent.named_parameters() if weight.requires_grad] == [
        "actor.weight",
        "actor.bias",
        "critic.weight",
        "critic.bias",
    ]


def test_frozen_says_what_it_lacks(scripts, monkeypatch, capsys, tmp_path):
    source = encoder_run(tmp_path, "--num-agents", "1")
    wide = flags_of("mdpo", tmp_path / "wide", eval_every=0, total_timesteps=16, num_steps=8, update_epochs=1)
    run(monkeypatch, "mdpo", "doubled", *wide, "--num-envs", "2")
    other = flags_of("ppo_netrand", tmp_path / "other", eval_every=0, total_timesteps=16)
    run(monkeypatch, "ppo_netrand", "cutout", *other)
    capsys.readouterr()
    tiny = flags_of("mdpo", tmp_path / "new")
    for flags, expected in (
        ([], "--encoder"),
        (["--encoder", source, "--encoder-agent", "2"], "no such agent"),
        (["--encoder", tmp_path], "is no folder of a run"),
        (["--encoder", folder_in(tmp_path / "wide")], "another shape"),
        (["--encoder", folder_in(tmp_path / "other")], "a run of mdpo.py or of a copy of it is needed"),
    ):
        with pytest.raises(SystemExit, match=r"^2$"):
            run(monkeypatch, "mdpo", "frozen", *flags, *tiny)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "new").exists()


# ---- Networks of the paper on pretrained encoders ----
def pieg_with(model, tmp_path, stage=0, **changes):
    """The agent of PIE-G on a model of timm."""
    script, args = load("drqv2_pieg"), tiny_args("drqv2_pieg", tmp_path, **changes)
    torch.manual_seed(0)
    return networks.timm_encoder(model, stage)(script)(ScriptedEnvs(args, "train"), args)


@torch.no_grad()
def test_timm_gives_the_features_of_its_own_extractor(tmp_path):
    """Of a stage, and of normalised pictures, for convolutions with batch normalisation or without, and attention."""
    for model, stage, index, shape in (
        (TIMM, 0, 2, (32, 11, 11)),
        (TIMM, 4, 3, (48, 6, 6)),
        ("test_resnet", 0, 2, (48, 11, 11)),
        ("test_convnext", 0, 1, (32, 10, 10)),
        ("vit_tiny_patch16_224", 1, 0, (192, 5, 5)),
    ):
        agent = pieg_with(model, tmp_path, stage)
        encoder, frames = agent.eval().encoder, images(0, 2, "drqv2_pieg").unflatten(1, (3, 3))
        maps = encoder.resnet(frames.flatten(0, 1) / 255 - 0.5)
        assert maps.shape == (6, *shape)
        size = {"img_size": 84} if model.startswith("vit") else {}
        own = timm.create_model(model, features_only=True, out_indices=[index], **size).eval()
        weights = own_weights(encoder.resnet.model)
        for name, value in own.state_dict().items():
            plain = name.removeprefix("model.").replace("stem_", "stem.").replace("stages_", "stages.")
            if plain in weights:  # the rest is of later stages
                value.copy_(weights.pop(plain))
        assert not weights
        about = timm.get_pretrained_cfg(model)
        mean, std = torch.tensor(about.mean).view(3, 1, 1), torch.tensor(about.std).view(3, 1, 1)
        (expected,) = own((frames.flatten(0, 1) / 255 - mean) / std)
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)
        newer = maps.unflatten(0, (2, 3))
        fused = torch.cat([newer[:, 1:], newer[:, 1:] - newer[:, :-1]], 1).flatten(1)
        torch.testing.assert_close(encoder(frames.flatten(1, 2)), encoder.project(fused))


def own_weights(model):
    """A model's state under timm's names, from those behind `networks.adapt`."""
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    weights = {}
    for key, value in model.state_dict().items():
        layer, _, kind = key.rpartition(".")
        weights[f"{layer.removesuffix('.0')}.{kind}" if layer in layers else key] = value
    return weights


def test_timm_is_frozen_and_its_statistics_move_in_training_alone(tmp_path):
    for batch_norm in ("adapting", "fixed"):
        agent = pieg_with(TIMM, tmp_path, batch_norm=batch_norm)
        encoder, before = agent.encoder, copy.deepcopy(agent.encoder.resnet.state_dict())
        learned = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
        assert learned == [f"project.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")]
        views = images(0, 4, "drqv2_pieg"), images(1, 4, "drqv2_pieg")
        both = encoder(*views)
        both.sum().backward()
        assert all(parameter.grad is not None for parameter in encoder.project.parameters())
        state = encoder.resnet.state_dict()
        moved = {name.rpartition(".")[2] for name in state if not torch.equal(state[name], before[name])}
        adapting = batch_norm == "adapting"
        assert moved == ({"running_mean", "running_var", "num_batches_tracked"} if adapting else set())
        each = torch.cat([encoder(view) for view in views])  # view by view
        assert torch.allclose(both, each, atol=1e-6)
        mixed = encoder(torch.cat(views))
        assert torch.allclose(both, mixed, atol=1e-5) != adapting
        trained = encoder(views[0])
        agent.eval()
        running, script, args = encoder(views[0]), load("drqv2_pieg"), encoder.args
        script.normalise_by_own(agent, args)
        own = encoder(views[0])
        assert torch.allclose(running, trained, atol=1e-5) != adapting and torch.equal(own, trained)
        script.normalise_by_own(agent, args, False)
        assert torch.equal(encoder(views[0]), running)


def test_timm_drops_nothing_and_sums_as_the_script_does(tmp_path):
    agent = pieg_with("resnet10t", tmp_path)
    norms = [layer for layer in agent.encoder.resnet.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms and all(type(layer) is load("drqv2_pieg").BatchNorm and layer.training for layer in norms)
    others = [layer for layer in agent.encoder.resnet.modules() if not isinstance(layer, nn.BatchNorm2d)]
    assert not any(layer.training for layer in others)


def lite_state(model):
    """A state dict of random numbers as efficientnet_lite_pytorch names it, and the same as timm does."""
    theirs, ours, number = {}, {}, -1
    for key, value in model.state_dict().items():
        value = torch.rand(value.shape) if value.is_floating_point() else value + 7
        layer, kind = key.rsplit(".", 1)
        head = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
        if layer in head:
            name = head[layer]
        else:
            part = layer.rpartition(".")[2]
            first = layer.startswith("blocks.0.")
            number += key.endswith("conv_dw.weight" if first else "conv_pw.weight")
            names = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
            names |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
            if first:
                names = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
            name = f"_blocks.{number}.{names[part]}"
        theirs[f"{name}.{kind}"] = ours[key] = value
    return theirs, ours


def test_efficientnet_lites_weights_are_read_under_their_other_names(tmp_path, capsys):
    model = timm.create_model("tf_efficientnet_lite0")
    theirs, ours = lite_state(model)
    # From the file efficientnet-lite0-57934424.pth: how many tensors there are, and the shapes of some.
    assert len(theirs) == 296
    assert theirs["_blocks.0._project_conv.weight"].shape == (16, 32, 1, 1)
    assert theirs["_blocks.5._depthwise_conv.weight"].shape == (240, 1, 3, 3)
    assert theirs["_blocks.15._expand_conv.weight"].shape == (1152, 192, 1, 1)
    assert same(networks.from_lite(theirs, model), ours)
    torch.save(theirs, tmp_path / "theirs.pth")
    torch.save(ours, tmp_path / "ours.pth")
    resnets = []
    for file in ("theirs.pth", "ours.pth"):
        agent = pieg_with("tf_efficientnet_lite0", tmp_path, encoder_weights=str(tmp_path / file))
        resnets.append(agent.encoder.resnet)
    assert same(resnets[0].state_dict(), resnets[1].state_dict())
    assert torch.equal(resnets[0].model.conv_stem.weight, ours["conv_stem.weight"])
    for name, says in (("efficientnet_lite0", "weights of --encoder-name tf_efficientnet_lite0"), (TIMM, "tf_")):
        with pytest.raises(SystemExit, match=r"^2$"):
            pieg_with(name, tmp_path, encoder_weights=str(tmp_path / "theirs.pth"))
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and says in error


def test_timm_says_what_it_lacks(scripts, monkeypatch, capsys, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for flags, expected in (
        ([], "which model of timm"),
        (["--encoder-name", "resnt18"], "no such model; near are: resnet18"),
        (["--encoder-name", "hub/resnet18"], "no such model"),
        (["--encoder-name", "resnet18.nope"], "nope"),
        (["--encoder-name", TIMM, "--encoder-stage", "6"], "give --encoder-stage 1 to 5, of strides 2 4 8"),
        (["--encoder-name", "vit_tiny_patch16_224"], "give --encoder-stage 1 to 12"),
        (["--encoder-name", TIMM, "--encoder-weights", tmp_path / "no.pth"], "no.pth: no such file"),
        (["--encoder-name", TIMM, "--encoder-weights", tmp_path / "other.pth"], "loading state_dict"),
        (["--encoder-name", TIMM, "--encoder", "resnet34"], "in the place of --encoder"),
        (["--encoder-name", TIMM, "--encoder_layer=3"], "in the place of --encoder"),
    ):
        with pytest.raises(SystemExit, match=r"^2$"):
            run(monkeypatch, "drqv2_pieg", "timm", *flags_of("drqv2_pieg", tmp_path / "new"), *flags)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and expected in error, error
    assert not (tmp_path / "new").exists()


def test_without_timm_one_line_says_how_to_get_it(scripts, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(SystemExit, match=r"^2$"):
        run(monkeypatch, "drqv2_pieg", "timm", "--encoder-name", TIMM, *flags_of("drqv2_pieg", tmp_path / "new"))
    assert capsys.readouterr().err == "error: --encoder-name: needs timm: pip install timm\n"
    assert not (tmp_path / "new").exists()


def test_timm_keeps_its_model_over_a_resume(scripts, monkeypatch, capsys, tmp_path):
    flags = ["--encoder-name", TIMM, "--encoder-stage", 2, *flags_of("drqv2_pieg", tmp_path, eval_every=0)]
    run(monkeypatch, "drqv2_pieg", "timm", *flags)
    folder = folder_in(tmp_path)
    assert f"__drqv2_pieg_timm_{TIMM}_2__1__" in folder.name
    resume = ["--resume", folder, "--total-timesteps", 22]
    with pytest.raises(SystemExit, match=r"^2$"):
        run(monkeypatch, "drqv2_pieg", "timm", *resume, "--encoder-stage", 3)
    assert capsys.readouterr().err == "error: --encoder-stage is 2 in that run and stays so\n"
    run(monkeypatch, "drqv2_pieg", "timm", *resume)
    (agent,) = common.load_run(folder).agents()
    assert state_of(folder)["step"] == 22 and agent.encoder.resnet.stage == 1


# ---- The command line ----
# Of the scripts with a replay fewer updates, 14 and 13, as their networks are real ones here.
SHORTER = {"total_timesteps": 18, "learning_starts": 5, "replay_ratio": 1, "exact_every": 9, "eval_every": 18}
SHORTER = dict.fromkeys(("drq_sam_reset", "sac_sam_reset"), SHORTER)
SHORTER["drqv2_pieg"] = {"total_timesteps": 18, "learning_starts": 5, "exact_every": 9, "eval_every": 18}


def flags_of(name, runs_dir, **changes):
    """A row of conftest's as flags."""
    values = ROWS[name]["args"] | SHORTER.get(name, {}) | {"runs_dir": runs_dir} | changes
    pairs = (["--no-" + key] if value is False else ["--" + key, str(value)] for key, value in values.items())
    return list(itertools.chain(*pairs))


def pin(monkeypatch, name):
    """The module of a script, on scripted environments, which is what common.load_script gives from now on."""
    script = load(name)
    monkeypatch.setattr(script, "make_envs", PlainEnvs)
    monkeypatch.setattr(common, "load_script", lambda _: script)
    return script


def run(monkeypatch, script, ablation, *flags):
    """Runs the program in this process."""
    argv = [script, ablation, *map(str, flags)]
    monkeypatch.setattr(sys, "argv", ["benchmark/suites/ablations.py", *argv])  # what args.json holds
    ablations.main(argv)


def evaluations(folder):
    """What was logged at evaluations, active units among it."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    return [line for line in lines if ",eval/" in line or ",charts/active_" in line]


# What goes without captured calls, what is asked for besides, and what resumes as another one of the list does.
BRANCHING = {("ppo_netrand", "dropout"), ("ppo_netrand", "l2"), ("drq_sam_reset", "swa"), ("drq_sam_reset", "der")}
MORE = {
    ("ppo_netrand", "dropout"): ["--netrand"],
    ("drq_sam_reset", "swa"): ["--sam"],
}
LIKE = {(name, f"l2_{amount}") for name in ("drq_sam_reset", "sac_sam_reset") for amount in ("1e-3", "1e-5")}
FAST = {("ppo_netrand", "cutout"), ("mdpo", "frozen")}  # one of environments, one of networks
RESUMED = []
for pair in EVERY:
    if pair not in LIKE:
        RESUMED.append(pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.slow))


@pytest.mark.parametrize(("name", "ablation"), RESUMED)
def test_each_one_trains_evaluates_and_resumes_bit_for_bit(name, ablation, scripts, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(networks, "SWA_EVERY", 4)
    flags = ["--plain-look"] * (name == "ppo_netrand") + MORE.get((name, ablation), [])
    encoder = ["--encoder", encoder_run(tmp_path)] if ablation == "frozen" else []
    encoder += ["--encoder-name", TIMM] * (ablation == "timm")
    run(monkeypatch, name, ablation, *encoder, *flags_of(name, tmp_path / "whole"), *flags)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(PlainEnvs, "left", 13)  # of 16 or 18 steps
        run(patch, name, ablation, *encoder, *flags_of(name, tmp_path / "part"), *flags)
    whole, part = folder_in(tmp_path / "whole"), folder_in(tmp_path / "part")
    label = f"{name}_{ablation}" + f"_{TIMM}" * (ablation == "timm")
    assert f"__{label}__1__" in part.name
    known = json.loads((part / "args.json").read_text())["args"]
    assert known["cuda_graphs"] == ((name, ablation) not in BRANCHING)
    assert known.get("netrand", False) == ("--netrand" in flags)
    others = [key for key in ablations.ABLATIONS[name] if key not in (ablation, "frozen")]
    for other in others[:1]:
        capsys.readouterr()
        with pytest.raises(SystemExit, match=r"^2$"):
            run(monkeypatch, name, other, "--resume", part)
        assert f"not of the ablation {other}, but '{ablation}'" in capsys.readouterr().err
    run(monkeypatch, name, ablation, "--resume", part)
    assert same(state_of(whole), state_of(part))
    assert evaluations(whole) == evaluations(part) and evaluations(whole)
    finished = common.load_run(part)
    returns = []
    for agent in finished.agents():
        returns.append(finished.script.evaluate(agent, finished.args, finished.make_envs, "test").mean())
    logged = [line for line in evaluations(part) if "eval/test_return" in line]
    assert float(logged[-1].split(",")[2]) == np.mean(returns)


@pytest.mark.parametrize("ablation", ["cutout", "inversion", "jitter", "gray"])
def test_the_environments_are_wrapped_where_the_script_trains(ablation, monkeypatch, tmp_path):
    """What the last rollout holds, against what bare environments show."""
    script = pin(monkeypatch, "ppo_netrand")
    made, update = [], script.update

    def seen_update(agent, optimizer, kernel, skip, clip_coef, batch, args):
        made.append(batch["obs"].clone())
        return update(agent, optimizer, kernel, skip, clip_coef, batch, args)

    monkeypatch.setattr(script, "update", seen_update)
    flags = "--num-envs 8 --num-steps 2 --num-minibatches 1 --eval-every 0 --total-timesteps 16 --update-epochs 1"
    run(monkeypatch, "ppo_netrand", ablation, *flags_of("ppo_netrand", tmp_path), *flags.split())
    args = tiny_args("ppo_netrand", tmp_path, num_envs=8)
    envs = PlainEnvs(args, "train")
    envs.reset(), envs.step(np.zeros(8))
    bare, (learned,) = torch.as_tensor(np.concatenate(envs.shown[:2])), made
    share = (bare[:, None] == learned[None]).flatten(2).all(2).any(1).float().mean()
    assert share < 1 and (ablation in ("cutout", "inversion") or share == 0)


def test_dropout_gives_ratios_of_one_at_first(monkeypatch, tmp_path):
    """Masks that changed between acting and learning would show in the first minibatch of each iteration."""
    script, first = pin(monkeypatch, "ppo_netrand"), []
    update = script.update
    monkeypatch.setattr(script, "update", lambda *args: first.append(update(*args)) or first[-1])
    flags = [*flags_of("ppo_netrand", tmp_path, total_timesteps=96, eval_every=0), "--netrand", "--clean-prob", "0.5"]
    run(monkeypatch, "ppo_netrand", "dropout", *flags)
    assert len(first) == 24 and all(parts["approx_kl"].abs() < 1e-6 for parts in first[::4])
    assert all(parts["approx_kl"].abs() > 1e-6 for parts in first[3::4])


def test_a_copy_is_known_by_its_arguments_and_lies_in_the_run(scripts, monkeypatch, tmp_path):
    text = (ROOT / "algos" / "mdpo.py").read_text()
    copy_path = tmp_path / "mine.py"
    copy_path.write_text(text.replace("gain=0.01)", "gain=0.02)"))
    flags = flags_of("mdpo", tmp_path / "runs", eval_every=0)
    run(monkeypatch, str(copy_path), "doubled", *flags, "--num-envs", "2", "--total-timesteps", "16")
    folder = folder_in(tmp_path / "runs")
    assert "__mine_doubled__1__" in folder.name
    assert (folder / "mine.py").read_text() == copy_path.read_text()
    copy_path.unlink()
    (agent,) = common.load_run(folder).agents()  # with the script and the ablation that trained it
    assert agent.actor.in_features == 512


def test_a_name_may_have_either_dash(monkeypatch):
    seen = []
    script = pin(monkeypatch, "drq_sam_reset")
    monkeypatch.setattr(script, "main", lambda flags, *seams: seen.append(flags))
    ablations.main(["drq-sam-reset", "layer_norm", "--env-id", "pong"])
    ablations.main(["drq_sam_reset", "l2_1e-3"])
    flags, (_, other, *_) = seen
    assert flags == ["--exp-name", "drq_sam_reset_layer_norm", *ablations.BASE, "--env-id", "pong"]
    assert other == "drq_sam_reset_l2_1e-3"


def test_plastic_is_the_method_on_its_networks():
    for name, scope in (("drq_sam_reset", ("sam_scope", "backbone")), ("sac_sam_reset", ("sam_on", "critic"))):
        args = tyro.cli(load(name).Args, args=ablations.ABLATIONS[name]["plastic"][2])
        assert args.sam and args.reset_every and getattr(args, scope[0]) == scope[1]
        assert args.learning_rate == {"drq_sam_reset": 1.414e-4, "sac_sam_reset": 1e-4}[name]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["nope"], "no script 'nope', there are: drq_sam_reset"),
        (["nope.py"], "nope.py: no such script"),
        (["ppo_netrand"], "gray"),
        (["ppo_netrand", "nope"], "cutout"),
        (["drqv2_pieg", "l2"], "no ablation 'l2' of drqv2_pieg, there are: timm"),
        (["ppo_netrand", "l2", "--resume", "nowhere"], "nowhere is no folder of a run"),
    ],
)
def test_what_is_not_there_is_one_line_and_code_2(argv, expected, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        ablations.main(argv)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error


def test_a_script_without_ablations_is_told_which_have_some(tmp_path, capsys):
    (tmp_path / "other.py").write_text("class Args:\n    pass\n")
    with pytest.raises(SystemExit, match=r"^2$"):
        ablations.main([str(tmp_path / "other.py"), "l2"])
    assert "error: no ablations of other.py, there are some of: ppo_netrand" in capsys.readouterr().err


def test_all_are_listed(capsys):
    for argv in ([], ["--help"], ["ppo_netrand", "-h"]):
        ablations.main(argv)
        output = capsys.readouterr().out
        assert all(f"{name} {ablation} " in output for name, ablation in EVERY)
        assert len(output.splitlines()) == 2 + len(EVERY) and "drqv2_pieg.py --encoder drqv2" in output


def test_the_program_starts(tmp_path):
    command = [sys.executable, str(ROOT / "benchmark" / "suites" / "ablations.py"), "ppo_netrand", "l2"]
    failed = subprocess.run([*command, "--num-envs", "0"], capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 2 and failed.stderr.startswith("error: --num-envs 0")
    assert not list(tmp_path.iterdir())
