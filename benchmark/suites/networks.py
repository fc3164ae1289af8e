"""Networks of ablations.py: the agent of a script with one thing changed.

Most are functions change(script, agent, args), which change an agent of the script in place for `make_agent`. Others,
as dropout(script), return another class of agents; detached(script) changes the script's loss. Papers: Lee et al. 2020,
Network Randomization; Lee et al. 2023, PLASTIC; Xie et al. 2025, mutual distillation; Yuan et al. 2022, PIE-G.
"""

import sys
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import common


def make_agent(script, change, envs, args):
    """An agent of the script, changed in place by change(script, agent, args)."""
    agent = script.Agent(envs, args)
    change(script, agent, args)
    return agent.to(memory_format=torch.channels_last)  # as the scripts' own


# ---- Networks of the network randomisation paper ----
def after_convolutions(module, make_layer):
    """Puts make_layer(convolution) behind each convolution of a module."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            setattr(module, name, nn.Sequential(child, make_layer(child)))
        else:
            after_convolutions(child, make_layer)


class Mask(nn.Module):
    """Multiplies all images by one mask [C, H, W], in training mode. Its shape is that of the first images it sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", None)

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.ones_like(x[0])
        return x * self.mask if self.training else x

    def draw(self):
        kept = torch.rand(self.mask.shape) >= 0.1  # from torch's own stream on the CPU, which checkpoints hold
        self.mask.copy_(kept / 0.9)


def dropout(script):
    """A tenth of what each convolution puts out is dropped, one mask for all images of an iteration.

    Reference code: policies.py:19-38, ppo2.py:349. Deviation: off in evaluation; theirs plays on with one fresh mask,
    since masks are not saved.
    """

    class Agent(script.Agent):
        def __init__(self, envs, args):
            super().__init__(envs, args)
            after_convolutions(self.encoder, lambda _: Mask())
            self.register_buffer("learned", torch.tensor(True))  # whether it has learned since the masks were drawn
            super().features(torch.zeros(1, *envs.single_observation_space.shape, dtype=torch.uint8))

        # Careful: acting and learning must use the same masks, or the ratios are wrong. The first call that acts after
        # one that learned begins an iteration. `update` calls features and heads, all else calls forward.
        def forward(self, obs, kernel=None):
            if self.training and self.learned:
                for module in self.modules():
                    if isinstance(module, Mask):
                        module.draw()
                self.learned.fill_(False)
            return self.heads(super().features(obs, kernel))

        def features(self, obs, kernel=None):
            self.learned.fill_(True)
            return super().features(obs, kernel)

    return Agent


def batch_norm(script, agent, args):
    """Batch normalisation behind each convolution, always with the batch's own statistics.

    Reference code: policies.py:44-45, TensorFlow's epsilon. An agent acts on N images and learns from a minibatch, on a
    CPU from slices of CPU_BATCH images: the statistics are of these, so the first ratios are not 1.
    """
    about = {"eps": 1e-3, "track_running_stats": False}
    after_convolutions(agent.encoder, lambda convolution: nn.BatchNorm2d(convolution.out_channels, **about))


def l2(amount, spared):
    """A loss of `amount` times half the sum of the squared weights, without those whose names end with `spared`."""

    def l2(script, agent, args):
        """A loss of 1e-4, or the number in its name, times half the sum of the squared weights.

        Reference code: of PPO ppo2.py:91-105, without the biases and before the gradient's norm is clipped; of the
        others Adam's weight decay, which is the same gradient. Deviations: it is clipped with the rest
        (drq_sam_reset.py), SAM, where it is on, climbs it too, and the temperature is spared (sac_sam_reset.py).
        """
        for name, weight in agent.named_parameters():
            if not name.endswith(spared):
                weight.register_hook(partial(add_decay, weight, amount))

    return l2


def add_decay(weight, amount, gradient):
    """Once per minibatch: in the first of its passes, which finds no gradient yet.

    In the scripts with SAM no pass finds one, so a captured call has no branch here.
    """
    if weight.grad is not None:
        return gradient
    return gradient + amount * weight.detach()


# ---- Networks of the plasticity paper ----
def relus(module):
    """(sequence, index) of each ReLU; the layer that it follows is the one before it there."""
    found = []
    for layers in module.modules():
        if isinstance(layers, nn.Sequential):
            found += [(layers, i) for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
    return found


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel. [B, C, H, W] -> the same."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def normalise(module, owner=None):
    """Puts layer normalisation in front of each ReLU, directly behind the layer that the ReLU follows.

    owner: the ModuleList that the new layers belong to, if not to the module.
    """
    for layers, i in relus(module):
        kind = ChannelNorm if isinstance(layers[i - 1], nn.Conv2d) else nn.LayerNorm
        norm = kind(len(layers[i - 1].weight), eps=1e-6)
        if owner is not None:
            norm = Lent(norm, owner)
        layers[i] = nn.Sequential(norm, layers[i])


class Lent(nn.Module):
    """Applies a layer that belongs to another module."""

    def __init__(self, layer, owner):
        super().__init__()
        owner.append(layer)
        self.layer = [layer]  # in a list: no part of this module, but copied with it

    def forward(self, x):
        return self.layer[0](x)


def rainbow_layer_norm(script, agent, args):
    """Layer normalisation behind each convolution, over a pixel's channels, and each hidden layer.

    Paper: 5.1, directly behind the layer. Reference code: nature.py:24-35, rainbow_policy.py:74-86, and a reset leaves
    the scales and shifts as they are, so those of the head lie outside it (and outside --sam-scope head).
    Deviation: --shrink-perturb moves those of the backbone.
    """
    agent.norms = nn.ModuleList()
    normalise(agent.backbone)
    normalise(agent.head, owner=agent.norms)


def sac_layer_norm(script, agent, args):
    """Layer normalisation behind each convolution, over a pixel's channels, and each hidden layer.

    Paper: 5.1, directly behind the layer. A reset draws all of the heads anew, scales and shifts too.
    """
    normalise(agent)


class CReLU(nn.ReLU):
    """The positive and the negative part. [B, C, ...] -> [B, 2C, ...]. Paper: arXiv:1603.05201."""

    def forward(self, x):
        return super().forward(torch.cat([x, -x], dim=1))


def halve_for_crelu(script, module, args):
    """CReLUs for ReLUs, each behind a layer of half the width, so that what follows stays as wide as it is."""
    for layers, i in relus(module):
        n_out, n_in, *kernel = layers[i - 1].weight.shape
        if kernel:
            half = nn.Conv2d(n_in, n_out // 2, kernel, layers[i - 1].stride)
        else:
            half = script.NoisyLinear(n_in, n_out // 2, args.noisy_std)
        layers[i - 1], layers[i] = half, CReLU()


def rainbow_crelu(script, agent, args):
    """Concatenated ReLUs behind layers of half the width.

    Paper: 7.3, all ReLUs. Reference code: nature.py:60-68, rainbow_policy.py:114-125, of two variants the one of
    its scripts. Half of what is behind a CReLU is always zero, so charts/active_* say nothing here.
    """
    halve_for_crelu(script, agent, args)


def double_for_crelu(script, agent):
    """CReLUs for the ReLUs of the three heads, and layers of twice the inputs behind them."""
    for head in (agent.critic.q1, agent.critic.q2, agent.actor.head):
        for layers, i in relus(head):
            n_out, n_in = layers[i + 1].weight.shape
            layers[i], layers[i + 1] = CReLU(), script.orthogonal(nn.Linear(2 * n_in, n_out), 2**0.5)
    mean, log_std = agent.actor.head[-1].weight.data.chunk(2)  # as in the script's Actor
    nn.init.orthogonal_(mean, 2**0.5)
    nn.init.orthogonal_(log_std, 1.0)


def sac_crelu(script, agent, args):
    """Concatenated ReLUs in encoder and heads, in front of layers of twice the inputs.

    Paper: 7.4, all ReLUs. Reference code: dmc networks/common.py, MLP, which has them in the heads alone.
    """
    double_for_crelu(script, agent)
    for layers, i in relus(agent.encoder):
        layers[i] = CReLU()
        if isinstance(layers[i + 1], nn.Conv2d):
            n_out, n_in, *_ = layers[i + 1].weight.shape
            convolution = nn.Conv2d(2 * n_in, n_out, 3, stride=2, padding=1)
            layers[i + 1] = script.orthogonal(convolution, 2**0.5)
    for part in (agent.critic, agent.actor):
        part.project = script.projection(2 * part.project[0].in_features)


def rainbow_plastic(script, agent, args):
    """The paper's later version: normalised backbone, CReLU head, SAM on the backbone, reset.

    Reference code: scripts/NeurIPS2023/drq_plastic_rr2.sh and configs/agent/drq.yaml:24. At replay ratios 4 and 8
    give --shrink-perturb 0.6. Deviation: SAM leaves the head out; see rainbow_plastic_code for what theirs does.
    """
    normalise(agent.backbone)
    halve_for_crelu(script, agent.head, args)


def rainbow_plastic_code(script, agent, args):
    """The same with SAM as in the authors' code: the head climbs too, and steps by the sum of both gradients.

    Reference code: agents/base.py:159-214 with sam_head off. The head's gradient enters SAM's norm and the head is
    perturbed; then its first gradient, clipped, is added to the second one. The backbone steps by the second alone.
    """
    rainbow_plastic(script, agent, args)
    BothGradients(agent, args.max_grad_norm)


class BothGradients:
    """Hooks that add the first of each two gradients of the head, clipped with the backbone's, to the second."""

    def __init__(self, agent, max_norm):
        self.first, self.share, self.max_norm = {}, None, max_norm
        for name, param in agent.named_parameters():
            param.register_hook(partial(self.see, name))

    def see(self, name, gradient):
        if self.share is None and name not in self.first:
            self.first[name] = gradient
            return gradient
        if self.share is None:  # the second pass begins
            norm = nn.utils.get_total_norm(self.first.values())
            self.share = (self.max_norm / (norm + 1e-6)).clamp(max=1)
        first, share = self.first.pop(name), self.share
        if not self.first:
            self.share = None
        return gradient + share * first if name.startswith("head.") else gradient


def rainbow_plastic_dagger(script, agent, args):
    """The authors' lighter version: normalised backbone and resets, without SAM and CReLU.

    Reference code: scripts/NeurIPS2023/drq_plastic_dagger_rr2.sh. At replay ratios 4 and 8 give --shrink-perturb 0.6.
    """
    normalise(agent.backbone)


DER_TARGET_EVERY = 2_000  # updates between copies into the target network


def der(script):
    """Data-efficient Rainbow as it was published: no augmentation, one update per step, a target of every 2,000th.

    Paper: arXiv:1906.05243. Lee et al. 2023 say only that DER "optimizes its hyperparameters". The rest is as in the
    script, so the network is DrQ's. Give --tau 1: what the target's forward holds are older weights.
    """

    class Agent(script.Agent):
        def __init__(self, envs, args):
            super().__init__(envs, args)
            self.held = Held(weights_of(self), passes_per_update=1 + args.sam)

        def forward(self, pixels):
            target = not next(self.parameters()).requires_grad
            if target or not self.training:  # what is evaluated is the target network
                with holding(self, self.held.weights):
                    return super().forward(pixels)
            if torch.is_grad_enabled():
                self.held.see(self)
            return super().forward(pixels)

    return Agent


class Held(nn.Module):
    """An agent's weights [K] after the last multiple of DER_TARGET_EVERY updates. A copy of the agent has the same."""

    def __init__(self, weights, passes_per_update):
        super().__init__()
        self.passes_per_update = passes_per_update
        self.register_buffer("weights", weights)
        self.register_buffer("passes", torch.tensor(0))

    def __deepcopy__(self, memo):
        return self

    def see(self, agent):
        """Before each pass of learning."""
        if self.passes.item() % (self.passes_per_update * DER_TARGET_EVERY) == 0:
            self.weights.copy_(weights_of(agent))
        self.passes += 1


def sac_plastic(script, agent, args):
    """The paper's later version: normalised encoder, CReLU heads, SAM on the critic, reset.

    Reference code: dmc drq/networks.py and configs/drq.py:9-11. Deviations: SAM is for all of the critic, theirs takes
    the second gradient for the encoder and the first for the rest; frames are gray, theirs have colour.
    """
    normalise(agent.encoder)
    double_for_crelu(script, agent)


SWA_STEPS, SWA_EVERY = 40_000, 100  # the mean is of every 100th of the last 40,000 updates


def swa(script):
    """Evaluates the mean of the weights in the last 40,000 updates (stochastic weight averaging).

    Paper: 9.1, of the online network; the period was lost in its text, 100 updates are our choice. Before the mean
    begins, evaluations are of the target network as ever.
    """

    class Agent(script.Agent):
        def __init__(self, envs, args):
            super().__init__(envs, args)
            self.average = Average(weights_of(self), passes_per_update=1 + args.sam)
            self.updates = args.replay_ratio * (args.total_timesteps - args.learning_starts)

        # Only learning makes passes with gradients through the online network: one per update, with SAM two.
        def forward(self, pixels):
            if self.training and torch.is_grad_enabled():
                self.average.see(self, self.updates)
            if self.training or not self.average.count:
                return super().forward(pixels)
            with holding(self, self.average.mean):
                return super().forward(pixels)

    return Agent


class Average(nn.Module):
    """The mean of an agent's weights [K] after some of its updates. A copy of the agent has the same Average."""

    def __init__(self, weights, passes_per_update):
        super().__init__()
        self.passes_per_update = passes_per_update
        self.register_buffer("mean", torch.zeros_like(weights))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("passes", torch.tensor(0))

    def __deepcopy__(self, memo):
        return self

    def see(self, agent, updates):
        """Before each pass of learning. updates: of the whole run.

        A run that is made longer by fewer than SWA_STEPS updates keeps what it has averaged, else it begins again.
        """
        done, within = divmod(self.passes.item(), self.passes_per_update)
        self.passes += 1
        if within or done % SWA_EVERY:
            return
        if done <= max(updates - SWA_STEPS, 0):
            self.count.zero_()
            return
        self.count += 1
        self.mean.lerp_(weights_of(agent), 1 / self.count.item())


def weights_of(agent):
    """All parameters [K]."""
    return torch.cat([param.detach().flatten() for param in agent.parameters()])


@contextmanager
def holding(agent, weights):
    """In this context the agent's parameters are these [K]."""
    saved = [param.data for param in agent.parameters()]
    nn.utils.vector_to_parameters(weights, agent.parameters())
    try:
        yield
    finally:
        for param, before in zip(agent.parameters(), saved, strict=True):
            param.data = before


# ---- Networks of the mutual distillation paper ----
def widen(script, agent, depths, hidden):
    """An IMPALA encoder of these depths and hidden width, with heads to it."""
    num_actions, channels = agent.actor.out_features, agent.encoder[0].conv.in_channels
    blocks = [script.ImpalaBlock(*sizes) for sizes in pairwise((channels, *depths))]
    dense = nn.Linear(64 * depths[-1], hidden)
    agent.encoder = nn.Sequential(*blocks, nn.Flatten(), nn.ReLU(), dense, nn.ReLU())
    agent.actor = script.orthogonal(nn.Linear(hidden, num_actions), gain=0.01)
    agent.critic = script.orthogonal(nn.Linear(hidden, 1), gain=1.0)


def doubled(script, agent, args):
    """PPO with twice the width, batch and steps.

    Paper: figure 6, which does not say what of the model is doubled.
    """
    widen(script, agent, (32, 64, 64), 512)


def doubled_equal(script, agent, args):
    """PPO with about as many weights as two agents, and twice the batch and steps.

    Paper: figure 6, the other reading: widths times the root of 2.
    """
    widen(script, agent, (23, 45, 45), 362)


def frozen(encoder=None):
    """encoder: the weights of its encoder; None for a run that is resumed or evaluated, whose checkpoint has them."""

    def frozen(script, agent, args):
        """PPO that trains new heads on a frozen encoder: --encoder RUN [--encoder-agent 2].

        Paper: figure 5. Game and levels are those of that run, of which agent 1 is taken.
        """
        if encoder:
            try:
                agent.encoder.load_state_dict(encoder)
            except RuntimeError:
                common.fail("--encoder: the network of that run is of another shape")
        agent.encoder.requires_grad_(False)

    return frozen


def detached(script):
    """Each agent is pulled to its peer, and does not pull the peer to itself.

    The usual mutual learning, as in arXiv:1706.00384. In the paper's code no gradient is stopped.
    """
    loss = script.distillation_loss
    script.distillation_loss = lambda logits, peer_logits: loss(logits, peer_logits.detach())


def detached_own(script):
    """The other half: each agent pulls its peer to itself, on its own observations, and is not pulled by this loss."""
    loss = script.distillation_loss
    script.distillation_loss = lambda logits, peer_logits: loss(logits.detach(), peer_logits)


# ---- Networks of the paper on pretrained encoders ----
def timm_encoder(name="", stage=0):
    """name: of a model of timm. stage: which of its features, from 1; 0: the last of stride 8, as PIE-G's are."""

    def timm_encoder(script):
        """PIE-G on a model of timm in ResNet's place: --encoder-name NAME [--encoder-stage K].

        --encoder-weights imagenet (timm's, a download), random, or a file of the model's. All else is as in the script:
        frozen, with its projection, fusion of frames and batch normalisation. Deviation: pictures are normalised by the
        mean and deviation that the model was pretrained with (timm's pretrained_cfg), whatever its weights. The authors
        subtract 0.5 alone. Batch normalisation that adapts makes up for that in a ResNet; other models have none.
        """

        class Agent(script.Agent):
            def __init__(self, envs, args):
                # A ResNet whose place is taken: without weights, and of four layers, as their projection is the least.
                super().__init__(envs, replace(args, encoder="resnet18", encoder_weights="random", encoder_layer=4))
                encoder, obs_shape = self.encoder, envs.single_observation_space.shape
                try:
                    encoder.resnet = timm_maps(script, name, stage, args.encoder_weights, obs_shape[-1])
                    encoder.resnet.requires_grad_(False).eval()
                    n_in = encoder.features(torch.zeros(1, *obs_shape)).shape[1]
                except Exception as error:  # of the network, a file, its shapes, or a model for larger pictures
                    weights = f"--encoder-weights {args.encoder_weights}"
                    common.fail(f"--encoder-name {name} {weights}: {common.first_line(error)}")
                encoder.project[0] = script.orthogonal(nn.Linear(n_in, encoder.n_out), 1.0)
                self.train()
                self.to(memory_format=torch.channels_last)

        return Agent

    return timm_encoder


def check_timm(name):
    """Ends the program if timm is not there, or has no model of that name."""
    if not find_spec("timm"):
        common.fail("--encoder-name: needs timm: pip install timm")
    import timm  # takes a second, and is needed by one ablation alone

    if not name:
        common.fail("--encoder-name: which model of timm? For example resnet50")
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), cutoff=0.5)
        common.fail(f"--encoder-name {name}: timm has no such model; near are: {' '.join(near) or 'none'}")


def timm_maps(script, name, stage, weights, size):
    """The TimmMaps of a model for pictures of size x size. Errors: those of timm, ValueError."""
    import timm

    more = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    if weights not in ("imagenet", "random"):
        more["pretrained_cfg_overlay"] = {"state_dict": timm_weights(name, weights)}
    model = timm.create_model(name, pretrained=weights != "random", **more)
    strides = [layer["reduction"] for layer in model.feature_info]
    if not stage and 8 in strides:
        stage = len(strides) - strides[::-1].index(8)
    if not 1 <= stage <= len(strides):  # 0 is left where no stage is of stride 8
        raise ValueError(f"give --encoder-stage 1 to {len(strides)}, of strides {' '.join(map(str, strides))}")
    model.prune_intermediate_layers([stage - 1], prune_norm=True)
    adapt(script, model)
    return TimmMaps(model, stage - 1)


class TimmMaps(nn.Module):
    """A stage of a model. float32 [B, 3, H, W] in -0.5..0.5, as the script has them -> [B, C, h, w]."""

    def __init__(self, model, stage):
        super().__init__()
        self.model, self.stage = model, stage
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        self.register_buffer("mean", mean - 0.5)
        self.register_buffer("std", std)

    def forward(self, x):
        x = (x - self.mean) / self.std
        return self.model.forward_intermediates(x, indices=[self.stage], intermediates_only=True)[0]

    def train(self, mode=True):
        """Of batch normalisation alone. Nothing is dropped, as the model does not learn."""
        super().train(False)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.train(mode)
        return self


def adapt(script, module):
    """Puts the script's batch normalisation in the place of a model's. See BatchNorm there for why."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            norm = script.BatchNorm(child.num_features, child.eps, child.momentum, child.affine)
            norm.load_state_dict(child.state_dict(), strict=False)
            setattr(module, name, nn.Sequential(norm, *child.children()))  # timm's has its activation as a child
        else:
            adapt(script, child)


def timm_weights(name, path):
    """A file's state dict under the names of a model of timm. Errors: those of the file, ValueError."""
    import timm

    if not Path(path).is_file():
        raise ValueError("no such file; `imagenet`, `random` or a file of the model's weights")
    state = timm.models.load_state_dict(path)
    if "_conv_stem.weight" in state:
        if not name.startswith("tf_efficientnet_lite"):  # efficientnet_lite0 would take them, but pads otherwise
            raise ValueError("those are weights of --encoder-name tf_efficientnet_lite0, or another of the tf_ ones")
        state = from_lite(state, timm.create_model(name))
    return state


def from_lite(state, model):
    """The weights of the package efficientnet_lite_pytorch under the names of timm's tf_efficientnet_lite0 to 4."""
    names = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    places = []
    for number, blocks in enumerate(model.blocks):
        places += [f"blocks.{number}.{i}" for i in range(len(blocks))]
    for number, place in enumerate(places):
        theirs = ["_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
        ours = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
        if f"_blocks.{number}._expand_conv.weight" not in state:  # the first does not expand
            theirs, ours = theirs[2:], ["conv_dw", "bn1", "conv_pw", "bn2"]
        for their, our in zip(theirs, ours, strict=True):
            names[f"_blocks.{number}.{their}"] = f"{place}.{our}"
    renamed = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        renamed[f"{names.get(layer, layer)}.{kind}"] = value
    return renamed
