"""How sharp the minimum of an agent is, and how many of its units are active: Fisher trace,
Hessian, active units.

Paper: Lee et al. 2023, SAM + Reset, its table of regularisers and Figure 3. The RL loss is that of
the script, on transitions of the run's replay: C51's in drq_sam_reset.py, the critic's in
sac_sam_reset.py. Augmentation, the noise of layers and of actions, and the targets are drawn once
and stay.

    python benchmark/analyses/sharpness.py Base=runs/<DrQ> SAM=runs/<DrQ + SAM> --out sharpness.csv

fisher_trace: mean over transitions of the squared norm of each one's gradient.
fisher_trace_authors: mean squared entry of each parameter tensor's gradient of the batch's loss,
summed over tensors. lambda_max: greatest eigenvalue of the Hessian, by power iteration; if it took
all --iterations, it has not settled. active_...: share of what is not zero behind the ReLUs,
without noise, of backbone and head and of each layer.

It is for runs of drq_sam_reset.py and sac_sam_reset.py and copies of them.
"""

import copy
import dataclasses
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
from evaluate import load_runs, report


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]  # [METHOD=]FOLDER of some runs
    out: str | None = None  # .csv file for the table
    batch_size: int = 512  # transitions of the loss
    active_size: int = 512  # transitions for the active units
    iterations: int = 100  # of the power iteration, at most
    seed: int = 42  # draws the transitions, augmentation and noise
    cuda: bool = True  # use a GPU if there is one


def main():
    args = tyro.cli(Args, description=__doc__)
    if min(args.batch_size, args.active_size, args.iterations) < 1 or args.seed < 0:
        common.fail("--batch-size --active-size --iterations: at least 1; --seed: at least 0")
    if args.out:
        common.check_out(args.out, ".csv")
    runs, rows = load_runs(args.runs, args.cuda), []
    for run in runs:
        problem_of(run)  # or the program ends, before anything is measured
    for run in runs:
        make_loss, active_shares = problem_of(run)(run)
        for key, value in measure(make_loss, active_shares, args).items():
            rows.append(run.source() | {"key": key, "value": value})
    report(rows, args.out)


def problem_of(run):
    """The function that makes a run's loss. It follows from an argument that a copy of a script keeps."""
    if "n_atoms" in vars(run.args):
        return rainbow
    if "initial_alpha" in vars(run.args):
        return soft_actor_critic
    common.fail(f"{run.folder}: this is for runs of drq_sam_reset.py and sac_sam_reset.py and copies of them")


def measure(make_loss, active_shares, args):
    """All numbers of a run, {key: float}."""
    loss_of, params = make_loss(args.batch_size, torch.Generator().manual_seed(args.seed))
    found = {"loss": loss_of(slice(None)).item()}
    found["fisher_trace"] = fisher_trace(loss_of, params, args.batch_size)
    found["fisher_trace_authors"] = fisher_trace_authors(loss_of, params)
    rng = torch.Generator().manual_seed(args.seed)
    found["lambda_max"], found["power_iterations"] = lambda_max(loss_of, params, rng, args.iterations)
    shares = active_shares(args.active_size, torch.Generator().manual_seed(args.seed))
    for name, share in shares.items():
        found[f"active_{name}"] = share
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
    squares = []
    for i in range(count):
        slopes = gradient(loss_of(slice(i, i + 1)), params)
        squares.append(dot(slopes, slopes))
    return torch.stack(squares).mean().item()


def fisher_trace_authors(loss_of, params):
    """Reference code: PLASTIC's synthetic/input_adaptation.py:347-356. -> float."""
    return sum(slope.square().mean() for slope in gradient(loss_of(slice(None)), params)).item()


def lambda_max(loss_of, params, rng, iterations=100, tolerance=1e-3):
    """Greatest eigenvalue of the Hessian of the loss of all samples. -> float, int: steps of the power iteration.

    Careful: power iteration finds the eigenvalue that is farthest from 0. If that one is below 0, the greatest is the
    one farthest from it, which a second iteration finds.
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
    """The eigenvalue farthest from 0 of a symmetric matrix. product(vector): their product. -> float, int: steps.

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


# ---- The scripts: make_loss(count, rng) -> loss_of, params; active_shares(count, rng) -> {layer: share} ----
def rainbow(run):
    """C51's loss of drq_sam_reset.py, importance-weighted as at the end of a run."""
    script, args, state = run.script, run.args, run.state
    networks = []
    for name in ("agent", "target"):
        (network,) = dataclasses.replace(run, state=state | {"target": state[name]}).agents()
        # The script's own forward scales the gradient on its way to the backbone, and would have no Hessian.
        network.forward = partial(log_probabilities, network)
        networks.append(network)
    agent, target = networks
    (shape, _), device = spaces(run), agent.support.device
    replay = script.Replay(state["replay"]["size"], shape, args, device, run.folder / "replay.bin")
    replay.load_state_dict(state["replay"])
    replay.begin(np.zeros(shape[1:], np.uint8))  # the observation under way is not in the file
    require(run, replay.priorities.any())

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
            draws = offsets[:, samples], intensity[:, samples]
            return script.rainbow_loss(agent, target, part, *draws, args)[0]

        return loss_of, list(agent.parameters())

    def active_shares(count, rng):
        index, _ = sample(count, rng)
        obs = replay.gather(index)["obs"]
        return script.active_units(agent, lambda: script.act(agent, obs))

    return make_loss, active_shares


def log_probabilities(network, pixels):
    """Log-probabilities of the return's atoms. [B, 4, 84, 84] in 0..1 -> [B, A, atoms]."""
    return network.head(network.backbone(pixels)).log_softmax(-1)


def soft_actor_critic(run):
    """The critic's loss of sac_sam_reset.py, written as in its `update`."""
    script, args, state = run.script, run.args, run.state
    (agent,) = run.agents()
    network = nn.ModuleDict({"backbone": agent.encoder, "head": agent.critic})
    target = copy.deepcopy(nn.ModuleDict({"encoder": agent.encoder, "critic": agent.critic}))
    target.load_state_dict(state["target"])
    (shape, num_actions), device = spaces(run), agent.log_alpha.device
    replay = script.Replay(args.buffer_size, shape, num_actions, args, device, run.folder / "replay.bin")
    replay.load_state_dict(state["replay"])
    require(run, replay.past_ready > replay.first_ready)

    def sample(count, rng):
        rows = replay.sample(torch.rand(count, dtype=torch.float64, generator=rng))
        return replay.gather(rows.to(device))

    def make_loss(count, rng):
        batch = sample(count, rng)
        offsets = torch.randint(2 * script.PAD + 1, (2, count, 2), generator=rng).to(device)
        normal = torch.randn(2, count, num_actions, generator=rng).to(device)
        obs = script.to_pixels(script.random_shift(batch["obs"], offsets[0], script.PAD))
        next_obs = script.to_pixels(script.random_shift(batch["next_obs"], offsets[1], script.PAD))
        with torch.no_grad():
            mean, log_std = agent.actor(agent.encoder(next_obs))
            next_actions, log_probs = script.squashed_gaussian(mean, log_std, normal[1])
            next_q = target["critic"](target["encoder"](next_obs), next_actions)
            alpha = agent.log_alpha.exp()
            rewards, bootstrap = batch["rewards"], batch["bootstrap"]
            targets = script.critic_targets(rewards, bootstrap, next_q, log_probs, alpha)

        def loss_of(samples):
            q = agent.critic(agent.encoder(obs[samples]), batch["actions"][samples])
            return (q - targets[samples]).square().sum(0).mean()

        return loss_of, list(network.parameters())

    def active_shares(count, rng):
        batch = sample(count, rng)
        pixels = script.to_pixels(batch["obs"])
        actions = batch["actions"]
        return script.active_units(network, lambda: agent.critic(agent.encoder(pixels), actions))

    return make_loss, active_shares


def spaces(run):
    """Shape of an observation, and the number of actions, or of an action's numbers where it is a vector."""
    envs = run.make_envs(run.args, "test")
    envs.close()
    actions = envs.single_action_space
    if actions.shape:
        return envs.single_observation_space.shape, actions.shape[0]
    return envs.single_observation_space.shape, int(actions.n)


def require(run, there):
    if not there:
        common.fail(f"{run.folder}: its replay holds no transition that can be learned from")


if __name__ == "__main__":
    main()
