"""How sharp the minimum is that an agent sits in, and how much of it is awake: Fisher trace, Hessian, active units.

Paper: Lee et al. 2023, SAM + Reset, its table of regularisers and Figure 3. The RL loss is that of the script, on
transitions of the run's replay: C51's in drq_sam_reset.py, the critic's in sac_sam_reset.py. Augmentation, the noise of
layers and of actions, and the targets are drawn once and stay.

    python benchmark/sharpness.py Base=runs/<DrQ> SAM=runs/<DrQ + SAM> --out sharpness.csv

fisher_trace: mean over transitions of the squared norm of each one's gradient. fisher_trace_authors: mean squared entry
of each parameter tensor's gradient of the batch's loss, summed over tensors. lambda_max: greatest eigenvalue of the
Hessian, by power iteration; one that took --iterations had not settled. active_...: share of what is not zero behind
the ReLUs, without noise, of backbone and head and of each layer.
"""

import copy
from dataclasses import dataclass
from functools import partial

import checkpoints
import numpy as np
import suites
import torch
import torch.nn as nn
import tyro


@dataclass
class Args:
    checkpoints: tyro.conf.Positional[list[str]]  # [METHOD=]RUN: folders of drq_sam_reset.py, sac_sam_reset.py
    out: str | None = None  # .csv file for the table
    batch_size: int = 512  # transitions of the loss
    active_size: int = 512  # transitions that units are active on
    iterations: int = 100  # of the power iteration, at most
    seed: int = 42  # draws the transitions, augmentation and noise
    cuda: bool = True  # use a GPU if there is one


def main():
    args = tyro.cli(Args, description=__doc__)
    if min(args.batch_size, args.active_size, args.iterations) < 1 or args.seed < 0:
        suites.fail("--batch-size --active-size --iterations: at least 1; --seed: at least 0")
    checkpoints.check(args.checkpoints, (args.out, ".csv"))
    rows = []
    for checkpoint in [checkpoints.load(path, tuple(PROBLEMS), args.cuda) for path in args.checkpoints]:
        for key, value in measure(checkpoint, args).items():
            rows.append(checkpoint.source() | {"key": key, "value": value})
    checkpoints.report(rows, args.out)


def measure(checkpoint, args):
    """All numbers of a checkpoint, {key: float}."""
    make_loss, make_active = PROBLEMS[checkpoint.script.__name__](checkpoint)
    loss_of, params = make_loss(args.batch_size, torch.Generator().manual_seed(args.seed))
    found = {"loss": loss_of(slice(None)).item(), "fisher_trace": fisher_trace(loss_of, params, args.batch_size)}
    found["fisher_trace_authors"] = fisher_trace_authors(loss_of, params)
    rng = torch.Generator().manual_seed(args.seed)
    found["lambda_max"], found["power_iterations"] = lambda_max(loss_of, params, rng, args.iterations)
    layers = make_active(args.active_size, torch.Generator().manual_seed(args.seed))
    for part in ("backbone", "head"):
        units = {name: active for name, active in layers.items() if name.startswith(f"{part}.")}
        found[f"active_{part}"] = share(torch.cat(list(units.values())))
        found |= {f"active_{name}": share(active) for name, active in units.items()}
    return found


# ---- The measures: of loss_of(samples) -> [], the mean loss of a slice of the samples, and the parameters in it ----
def gradient(loss, params, **more):
    """d loss / d params, zeros where it does not depend on one. -> tensors shaped like the parameters."""
    return torch.autograd.grad(loss, params, materialize_grads=True, **more)


def dot(one, two):
    """Inner product of two lists of tensors. -> []."""
    return sum((a * b).sum() for a, b in zip(one, two, strict=True))


def fisher_trace(loss_of, params, count):
    """Mean over `count` samples of the squared norm of the gradient of a sample's loss. -> float."""
    slopes = (gradient(loss_of(slice(i, i + 1)), params) for i in range(count))
    return torch.stack([dot(slope, slope) for slope in slopes]).mean().item()


def fisher_trace_authors(loss_of, params):
    """Reference code: PLASTIC's synthetic/input_adaptation.py:347-356. -> float."""
    return sum(slope.square().mean() for slope in gradient(loss_of(slice(None)), params)).item()


def lambda_max(loss_of, params, rng, iterations=100, tolerance=1e-3):
    """Greatest eigenvalue of the Hessian of the loss of all samples. -> float, int: steps of the power iteration.

    Easy to miss: power iteration finds the eigenvalue that is farthest from 0. If that one is below 0, the greatest is
    the one farthest from it, which a second iteration finds.
    """
    slopes = gradient(loss_of(slice(None)), params, create_graph=True)
    start = [torch.randn(param.shape, generator=rng).to(param) for param in params]

    def product(vector, shift=0.0):  # (H - shift) vector
        image = gradient(dot(slopes, vector), params, retain_graph=True)
        return [h - shift * v for h, v in zip(image, vector, strict=True)]

    farthest, steps = power_iteration(product, start, iterations, tolerance)
    if farthest >= 0:
        return farthest, steps
    above, more = power_iteration(partial(product, shift=farthest), start, iterations, tolerance)
    return farthest + above, steps + more


def power_iteration(product, vector, iterations, tolerance):
    """The eigenvalue farthest from 0 of a symmetric matrix. product: of it and a list of tensors. -> float, int: steps.

    Reference code: PLASTIC's atari/src/common/hessian.py, when to stop, and the 1e-6.
    """
    eigenvalue = None
    for step in range(1, iterations + 1):
        norm = nn.utils.get_total_norm(vector) + 1e-6
        unit = [part / norm for part in vector]
        vector = product(unit)
        last, eigenvalue = eigenvalue, dot(vector, unit).item()
        if step > 1 and abs(eigenvalue - last) < tolerance * (abs(last) + 1e-6):
            break
    return eigenvalue, step


@torch.no_grad()
def active_units(network, forward):
    """{layer: bool [units]}, whether they were not zero behind each ReLU of a network, in forward()."""
    active = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: active.update({name: (out != 0).flatten()}))
        for name, module in network.named_modules()
        if isinstance(module, nn.ReLU)
    ]
    forward()
    for hook in hooks:
        hook.remove()
    return active


def share(active):
    return active.float().mean().item()


# ---- The scripts: make_loss(count, rng) -> loss_of, params; make_active(count, rng) -> active_units' dict ----
def rainbow(checkpoint):
    """C51's loss of drq_sam_reset.py, importance-weighted as at the end of a run."""
    script, args, state = checkpoint.script, checkpoint.args, checkpoint.state

    class Agent(script.Agent):
        """Easy to miss: the script's own scales the gradient on its way to the backbone, and would have no Hessian."""

        def forward(self, pixels):
            return self.head(self.backbone(pixels)).log_softmax(-1)

    agent, target = (
        checkpoint.build(script.load_agent, state | {"target": state[name]}, make_agent=Agent)
        for name in ("agent", "target")
    )
    (shape, _), device = spaces(checkpoint), agent.support.device
    replay = fill(checkpoint, script.Replay(state["replay"]["size"], shape, args, device))
    replay.begin(np.zeros(shape[1:], np.uint8))  # Easy to miss: the observation under way is not in the file.
    require(checkpoint, replay.priorities)

    def sample(count, rng):
        return replay.sample(torch.rand(count, dtype=torch.float64, generator=rng).to(device), 1.0)

    def make_loss(count, rng):
        index, weights = sample(count, rng)
        batch = replay.gather(index) | {"weights": weights}
        for network in (agent.train(), target):
            size = sum(len(noise) for noise in script.noise_of(network))
            script.set_noise(network, torch.randn(size, generator=rng).to(device))
        offsets = torch.randint(2 * script.PAD + 1, (2, count, 2), generator=rng).to(device)
        intensity = torch.randn(2, count, generator=rng).to(device)

        def loss_of(samples):
            part = {key: value[samples] for key, value in batch.items()}
            return script.rainbow_loss(agent, target, part, offsets[:, samples], intensity[:, samples], args)[0]

        return loss_of, list(agent.parameters())

    def make_active(count, rng):
        obs = replay.gather(sample(count, rng)[0])["obs"]
        return active_units(agent.eval(), lambda: script.act(agent, obs))

    return make_loss, make_active


def soft_actor_critic(checkpoint):
    """The critic's loss of sac_sam_reset.py, written as in its `update`."""
    script, args, state = checkpoint.script, checkpoint.args, checkpoint.state
    agent = checkpoint.build(script.load_agent, state)
    network = nn.ModuleDict({"backbone": agent.encoder, "head": agent.critic})
    target = copy.deepcopy(nn.ModuleDict({"encoder": agent.encoder, "critic": agent.critic}))
    target.load_state_dict(state["target"])
    (shape, num_actions), device = spaces(checkpoint), agent.log_alpha.device
    replay = fill(checkpoint, script.Replay(args.buffer_size, shape, num_actions, args, device))
    require(checkpoint, replay.whole)

    def sample(count, rng):
        rows = replay.sample(torch.rand(count, dtype=torch.float64, generator=rng))
        return replay.gather(rows.to(device))

    def make_loss(count, rng):
        batch = sample(count, rng)
        offsets = torch.randint(2 * script.PAD + 1, (2, count, 2), generator=rng).to(device)
        normal = torch.randn(2, count, num_actions, generator=rng).to(device)
        obs, next_obs = (
            script.to_pixels(script.random_shift(batch[key], shift, script.PAD))
            for key, shift in zip(("obs", "next_obs"), offsets, strict=True)
        )
        with torch.no_grad():
            next_actions, log_probs = script.squashed_gaussian(*agent.actor(agent.encoder(next_obs)), normal[1])
            next_q = target["critic"](target["encoder"](next_obs), next_actions)
            alpha = agent.log_alpha.exp()
            targets = script.critic_targets(batch["rewards"], batch["bootstrap"], next_q, log_probs, alpha)

        def loss_of(samples):
            q = agent.critic(agent.encoder(obs[samples]), batch["actions"][samples])
            return (q - targets[samples]).square().sum(0).mean()

        return loss_of, list(network.parameters())

    def make_active(count, rng):
        batch = sample(count, rng)
        return active_units(
            network, lambda: agent.critic(agent.encoder(script.to_pixels(batch["obs"])), batch["actions"])
        )

    return make_loss, make_active


PROBLEMS = {"drq_sam_reset": rainbow, "sac_sam_reset": soft_actor_critic}


def spaces(checkpoint):
    """Shape of an observation, number of actions (of an action's numbers, where it is a vector)."""
    envs = checkpoint.build(checkpoint.script.make_envs, "test")
    envs.close()
    actions = envs.single_action_space
    return envs.single_observation_space.shape, int(actions.n) if hasattr(actions, "n") else actions.shape[0]


def fill(checkpoint, replay):
    """The replay with what the run had played."""
    replay.load_state_dict(checkpoint.state["replay"])
    replay.load(checkpoint.path.parent / "replay.bin")
    return replay


def require(checkpoint, there):
    if not there.any():
        suites.fail(f"{checkpoint.path}: its replay holds no transition that can be learned from")


if __name__ == "__main__":
    main()
