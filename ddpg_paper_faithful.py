# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#   "tensorboard==2.21.0", "tqdm==4.70.1", "psutil==7.2.2", "moviepy==2.2.1"]
# ///
"""Deep Deterministic Policy Gradient (DDPG; Lillicrap et al. 2016, arXiv 1509.02971): the paper to the letter.

    python ddpg_paper_faithful.py --env-id Hopper-v5 --seed 3
    python ddpg_paper_faithful.py --env-id InvertedPendulum-v5 --pixels --buffer-size 30e3 --total-timesteps 30e3

| setting             | paper (section)                                         | here                               |
|---------------------|---------------------------------------------------------|------------------------------------|
| networks            | 400, 300, ReLU; tanh; action at Q's second layer (7)    | the same                           |
| ... from pixels     | 3 convolutions of 32 filters, then 200, 200 (7)         | the same                           |
| batch normalisation | from states: input, all of mu, Q up to the action (3)   | the same                           |
| initial weights     | 1/sqrt(fan-in); output 3e-3, from pixels 3e-4 (7)       | the same; fan-in counts the action |
| Adam; L2; batch     | actor 1e-4, Q 1e-3; on Q 1e-2; 64, from pixels 16 (7)   | the same                           |
| gamma, tau, buffer  | 0.99, 0.001, 1e6 (7)                                    | the same                           |
| noise               | Ornstein-Uhlenbeck, 0.15, 0.2 (7), new each episode (3) | the same, times half the range     |
| pixels              | action three times, 3 frames of 64 x 64, in [0, 1] (4)  | the same                           |
| training            | up to 2.5M steps, evaluated without noise (4)           | 1M, as others on Gymnasium's tasks |

Where the paper is silent, what was tried (returns: of what is here; of what is instead) and what was not:

| silent, measured    | here                  | instead               | on; steps                    | returns         |
|---------------------|-----------------------|-----------------------|------------------------------|-----------------|
| targets' statistics | the batch's own       | copied; rllab's modes | InvertedPendulum-v5; 200,000 | 47; 856, 973    |
| ... rllab's modes   | the batch's own       | momentum 0.001; 0.1   | Hopper-v5; 200,000           | 309; 17, 295    |
| ... momentum 0.1    | the batch's own       | rllab's modes         | Pendulum-v1; 20,000          | -463; -732      |
| running averages    | momentum 0.001        | 0.1, torch's          | HalfCheetah-v5; 200,000      | 1,608; 784      |
| OU time step        | 1: forgets in 6 steps | 0.01                  | InvertedPendulum-v5; 100,000 | 790; 859        |
| warm-up             | 1,000 random steps    | 64; 10,000            | InvertedPendulum-v5; 100,000 | 790; 1,000, 607 |

| silent, reasoned    | here                           | because                                                       |
|---------------------|--------------------------------|---------------------------------------------------------------|
| Q in mu's loss      | by the batch's own statistics  | section 3 has running averages for exploring and evaluating   |
| where to normalise  | before ReLU, not at the output | as its inventors do; section 7 has the output start near zero |
| terminal states     | no value after `terminated`    | nothing is earned there; Algorithm 1 would bootstrap always   |
| L2: where; factor   | weights; gradient of c/2 w^2   | "weight decay": rllab and OpenAI Baselines spare biases too   |
| actions in Q        | rescaled to [-1, 1]            | or their units would set their weight in Q's input            |
| pixels: kernel; a   | 3 x 3, stride 2; at layer two  | 471,000 weights, near the paper's 430,000; as from states     |

Copied: the targets normalise by the running averages of the networks that they follow. rllab's modes: by averages of
their own, which follow those with tau, and Q in mu's loss by its running averages (benchmark/paper_batch_norm.py). OU
time step and warm-up were measured with only mu normalised: with both, that task is not learnt. Each seed, what came
out on other tasks, and what is undecided are in RESULTS.md.

| Algorithm 1                                                            | here                   |
|------------------------------------------------------------------------|------------------------|
| initialise critic Q(s, a), actor mu(s) and their targets Q' and mu'    | DDPG.__init__          |
| initialise the replay buffer R                                         | ReplayBuffer.__init__  |
| initialise a random process N, receive the first observation s_1       | main; agent.noise      |
| select the action a_t = mu(s_t) + N_t                                  | DDPG.explore           |
| execute a_t, observe the reward r_t and the next observation s_t+1     | main                   |
| store the transition (s_t, a_t, r_t, s_t+1) in R                       | ReplayBuffer.add       |
| sample a random minibatch of N transitions from R                      | ReplayBuffer.sample    |
| set y_i = r_i + gamma Q'(s_i+1, mu'(s_i+1)), minimise (y_i - Q)^2      | DDPG.critic_loss       |
| update the actor with the sampled policy gradient                      | DDPG.actor_loss        |
| update the targets, theta' <- tau theta + (1 - tau) theta'             | DDPG.update_targets    |
"""

import contextlib
import copy
import fcntl
import functools
import io
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
import weakref
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    # Experiment
    exp_name: str = SCRIPT
    """name of the experiment, part of the run's name"""
    run_name: str | None = None
    """folder of this run in runs/; by default {env_id}__{exp_name}__{seed}__{unix time}"""
    seed: int = 1
    """seed of the networks, the environment, the exploration and the sampling of batches"""
    torch_deterministic: bool = True
    """restrict cuDNN to deterministic algorithms"""
    cuda: bool = True
    """train on the GPU if there is one"""
    cudagraphs: bool = False
    """on a GPU, replay acting and the whole update as CUDA graphs"""
    compile: bool = False
    """on a GPU, torch.compile acting and the update, alone or under --cudagraphs"""
    num_threads: int = 0
    """CPU threads for torch; 0 leaves torch's own choice, 1 is best for several runs on one machine"""
    matmul: Literal["auto", "mkl", "onednn"] = "auto"
    """library for an update's matrix products on CPU; auto: oneDNN on AMD from Zen 5 on, where MKL is half as fast"""
    track: bool = False
    """mirror the TensorBoard log to Weights & Biases"""
    wandb_project_name: str = "ddpg"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases user or team"""
    save_model: bool = True
    """write model.pt at each evaluation and at the end"""
    checkpoint_interval: int = 50_000
    """steps between checkpoints, each written at the end of the episode in progress; 0 = none"""
    keep_checkpoint: bool = False
    """keep the last checkpoint, if there is one, of a finished run: --resume can extend the run from there"""
    resume: str | None = None
    """folder of an interrupted run to resume under its own flags; --total-timesteps alone may be raised"""

    # Evaluation
    eval_interval: int = 5_000
    """steps between evaluations, which are without exploration noise; 0 = none"""
    eval_episodes: int = 10
    """episodes per evaluation"""
    final_eval_episodes: int = 100
    """episodes of one last evaluation at the end, from starts not used before; 0 = none"""
    max_eval_steps: int = 100_000
    """most steps in an evaluation episode, for environments whose episodes may never end"""
    capture_video: bool = False
    """film the first episode of each evaluation, with --evaluate every episode, into the run's videos/"""
    evaluate: str | None = None
    """folder of a run whose model to evaluate instead of training"""

    # Algorithm
    env_id: str = "HalfCheetah-v5"
    """Gymnasium environment with a flat Box observation and a bounded Box action; module:EnvId imports module first"""
    total_timesteps: int = 1_000_000
    """environment steps of the run (with --pixels, each repeats its action three times)"""
    actor_lr: float = 1e-4
    """Adam's learning rate for the actor (section 7)"""
    critic_lr: float = 1e-3
    """Adam's learning rate for the critic (section 7)"""
    critic_weight_decay: float = 1e-2
    """L2 weight decay of the critic, not of the actor (section 7)"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds (section 7)"""
    gamma: float = 0.99
    """discount factor (section 7)"""
    tau: float = 0.001
    """target smoothing coefficient: how far the targets move towards the networks at each update (section 7)"""
    batch_size: int | None = None
    """transitions per batch; by default 64, and 16 from pixels (section 7)"""
    ou_theta: float = 0.15
    """pull of the Ornstein-Uhlenbeck noise back to zero (section 7)"""
    ou_sigma: float = 0.2
    """size of the Ornstein-Uhlenbeck noise's steps at --ou-dt 1, in units of half the action range (section 7)"""
    ou_dt: float = 1.0
    """time step of the Ornstein-Uhlenbeck noise: 1 forgets in 6 steps, 0.01 in 666 (the paper is silent)"""
    batch_norm: Literal["both", "actor", "critic", "none"] = "both"
    """networks with batch normalisation (section 3: both); with --pixels none has it"""
    batch_norm_momentum: float = 0.001
    """share of a new batch in the running averages of batch normalisation (the paper is silent)"""
    weights_init: Literal["paper", "xavier", "kaiming"] = "paper"
    """initial weights of the hidden layers; paper: uniform within 1/sqrt(fan-in) (section 7)"""
    pixels: bool = False
    """learn from rendered frames: a step repeats the action three times and observes 3 x 64 x 64 RGB"""
    learning_starts: int = 1_000
    """steps of uniformly random actions before learning starts (the paper is silent)"""
    policy_frequency: int = 1
    """critic updates per update of the actor and the targets (Algorithm 1: 1)"""

    def __new__(cls, *_, **given):
        args = super().__new__(cls)
        args.given = given  # flags that the caller set: --resume and --evaluate take the others from the run
        return args

    def __post_init__(self):
        if self.batch_size is None:
            self.batch_size = 16 if self.pixels else 64


def init_weights(network: nn.Module, output: nn.Linear, output_bound: float, weights_init: str):
    """Section 7: every layer uniform within 1/sqrt(fan-in), the output layer within output_bound, biases too.

    With xavier or kaiming, the hidden layers have those weights instead, and biases of 0.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = output_bound if layer is output else layer.weight[0].numel() ** -0.5
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.uniform_(layer.bias, -bound, bound)
            if weights_init != "paper" and layer is not output:
                getattr(nn.init, f"{weights_init}_uniform_")(layer.weight)
                nn.init.zeros_(layer.bias)


class Convolutions(nn.Sequential):
    """Three convolutional layers of 32 filters, no pooling (section 7): frames (N, 9, 64, 64) to features (N, 2048)."""

    def __init__(self):
        convs = [nn.Conv2d(channels, 32, kernel_size=3, stride=2, padding=1) for channels in (9, 32, 32)]
        super().__init__(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2], nn.ReLU(), nn.Flatten())

    def forward(self, frames):
        return super().forward(frames / 255)


def input_layers(obs_shape: tuple[int, ...], norm):
    """The layers before fc1, the normalisation, the sizes of fc1's input and both hidden layers, the output's bound."""
    if len(obs_shape) == 3:
        return Convolutions(), nn.Identity, (2048, 200, 200), 3e-4
    return norm(*obs_shape), norm, (*obs_shape, 400, 300), 3e-3


class QNetwork(nn.Module):
    """Action value Q(s, a): observations (N, *obs_shape) and actions (N, action_dim) to values (N,)."""

    def __init__(self, obs_shape, low, high, norm=nn.BatchNorm1d, weights_init: str = "paper"):
        super().__init__()
        self.input, norm, (size0, size1, size2), output_bound = input_layers(obs_shape, norm)
        self.fc1 = nn.Linear(size0, size1)
        self.norm1 = norm(size1)  # section 3: all layers before the action
        self.fc2 = nn.Linear(size1 + len(low), size2)  # section 7: where the action enters
        self.fc3 = nn.Linear(size2, 1)
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)
        init_weights(self, self.fc3, output_bound, weights_init)

    def forward(self, obs, action):
        x = F.relu(self.norm1(self.fc1(self.input(obs))), inplace=True)  # in place saves 2 % of an update on a CPU
        action = (action - self.action_bias) / self.action_scale  # to [-1, 1], whatever the environment's units
        x = F.relu(self.fc2(torch.cat([x, action], 1)), inplace=True)
        return self.fc3(x).squeeze(1)  # with (N, 1), y - q would broadcast to (N, N)


class Actor(nn.Module):
    """Deterministic policy mu(s): observations (N, *obs_shape) to actions (N, action_dim) within [low, high]."""

    def __init__(self, obs_shape, low, high, norm=nn.BatchNorm1d, weights_init: str = "paper"):
        super().__init__()
        self.input, norm, (size0, size1, size2), output_bound = input_layers(obs_shape, norm)
        self.fc1 = nn.Linear(size0, size1)
        self.norm1 = norm(size1)  # section 3: all layers
        self.fc2 = nn.Linear(size1, size2)
        self.norm2 = norm(size2)
        self.fc_mu = nn.Linear(size2, len(low))  # not normalised: section 7 has it start near zero
        self.register_buffer("action_low", low)
        self.register_buffer("action_high", high)
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)
        init_weights(self, self.fc_mu, output_bound, weights_init)

    def forward(self, obs):
        x = F.relu(self.norm1(self.fc1(self.input(obs))), inplace=True)
        x = F.relu(self.norm2(self.fc2(x)), inplace=True)
        return torch.tanh(self.fc_mu(x)) * self.action_scale + self.action_bias

    def clip(self, action):
        """Noise takes actions out of bounds; so, by a hair, does rounding in scale and bias."""
        return action.clamp(self.action_low, self.action_high)


class Batch(NamedTuple):
    obs: torch.Tensor  # (N, *obs_shape)
    action: torch.Tensor  # (N, action_dim)
    reward: torch.Tensor  # (N,)
    next_obs: torch.Tensor  # (N, *obs_shape)
    discount: torch.Tensor  # (N,), of Q'(next_obs): gamma, or 0 after a terminal state; a time limit is not one


class ReplayBuffer:
    """The last `capacity` transitions on the training device, one float32 row each: a batch is a single gather."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.sizes = [obs_dim, action_dim, 1, obs_dim, 1]
        self.rows = allocate(capacity, sum(self.sizes), device=device)
        self.size = torch.zeros((), dtype=torch.int64, device=device)  # on the device, where a CUDA graph reads it
        self.added = 0

    def add(self, obs, action, reward, next_obs, discount):
        row = np.concatenate([obs, action, [reward], next_obs, [discount]])
        copy_async(row, self.rows[self.added % len(self.rows)])
        self.added += 1
        self.size.fill_(min(self.added, len(self.rows)))

    def sample(self, batch_size: int) -> Batch:
        """Transitions drawn uniformly, with replacement."""
        uniform = torch.rand(batch_size, dtype=torch.float64, device=self.rows.device)
        indices = (uniform * self.size).long()
        obs, action, reward, next_obs, discount = self.rows.index_select(0, indices).split(self.sizes, 1)
        return Batch(obs, action, reward.squeeze(1), next_obs, discount.squeeze(1))

    def state_dict(self):
        # torch.save would write all of the memory behind a slice; what comes back from NumPy is only the slice
        return {"added": self.added, "rows": torch.from_numpy(self.rows[: self.added].cpu().numpy())}

    def load_state_dict(self, state):
        self.added = state["added"]
        self.rows[: len(state["rows"])] = state["rows"]
        self.size.fill_(len(state["rows"]))


class PixelReplayBuffer(ReplayBuffer):
    """A buffer for pixels: its rows say where observations lie in a ring of uint8 frames (capacity + 1, 9, 64, 64).

    The observation that ends a step also starts the next and is stored once, so an episode of n steps takes n + 1
    places. When all are taken, the oldest hundredth is freed in one go, with the transitions that start there.
    """

    def __init__(self, capacity: int, obs_shape: tuple[int, ...], action_dim: int, device: torch.device):
        super().__init__(capacity, 1, action_dim, device)  # float32 tells places apart up to 2^24, 576 GiB of frames
        self.frames = allocate(capacity + 1, *obs_shape, device=device, dtype=torch.uint8)
        self.hundredth = len(self.frames) // 100 + 1
        self.placed, self.last_obs = 0, None

    def add(self, obs, action, reward, next_obs, discount):
        for frames in [next_obs] if obs is self.last_obs else [obs, next_obs]:  # one array within an episode: see main
            place = self.placed % len(self.frames)
            if place % self.hundredth == 0:  # rows that start from here to the next hundredth are the oldest
                lost = int((self.rows[: self.added, 0] // self.hundredth == place // self.hundredth).sum())
                self.rows[: self.added - lost] = self.rows[lost : self.added].clone()
                self.added -= lost
            self.frames[place] = torch.from_numpy(frames)
            self.placed += 1
        self.last_obs = next_obs
        super().add([(place - 1) % len(self.frames)], action, reward, [place], discount)

    def sample(self, batch_size: int) -> Batch:
        batch = super().sample(batch_size)
        places = torch.cat([batch.obs, batch.next_obs]).long().squeeze(1)
        obs, next_obs = self.frames.index_select(0, places).chunk(2)
        return batch._replace(obs=obs, next_obs=next_obs)

    def state_dict(self):
        frames = torch.from_numpy(self.frames[: self.placed].cpu().numpy())
        return super().state_dict() | {"placed": self.placed, "frames": frames}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.placed = state["placed"]
        self.frames[: len(state["frames"])] = state["frames"]


class OrnsteinUhlenbeckNoise:
    """Exploration noise, 0 at first: x <- x - theta x dt + sigma sqrt(dt) N(0, 1), times scale (section 7)."""

    def __init__(self, scale: torch.Tensor, theta: float, sigma: float, dt: float):
        self.scale, self.theta, self.sigma, self.dt = scale, theta, sigma, dt
        self.x = torch.zeros_like(scale)

    def reset(self):
        self.x.zero_()

    def sample(self):
        self.x += -self.theta * self.x * self.dt + self.sigma * self.dt**0.5 * torch.randn_like(self.x)
        return self.scale * self.x


class DDPG:
    """The networks, targets, optimisers and noise of Algorithm 1, and what it does with them.

    Whatever is added here as an attribute becomes part of the checkpoints and, unless model_state leaves it out, of
    model.pt.
    """

    def __init__(self, args: Args, obs_space: gym.spaces.Box, action_space: gym.spaces.Box, device: torch.device):
        enough = args.batch_size > 1 or args.pixels or args.batch_norm == "none"
        exit_unless(enough, "--batch-size must be at least 2: batch normalisation needs it")
        obs_shape, (low, high) = obs_space.shape, float32_bounds(action_space)
        norm = functools.partial(nn.BatchNorm1d, momentum=args.batch_norm_momentum)
        actor_norm = norm if args.batch_norm in ("both", "actor") else nn.Identity
        qf_norm = norm if args.batch_norm in ("both", "critic") else nn.Identity
        self.actor = Actor(obs_shape, low, high, actor_norm, args.weights_init).to(device)
        self.qf = QNetwork(obs_shape, low, high, qf_norm, args.weights_init).to(device)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_qf = copy.deepcopy(self.qf).requires_grad_(False)
        for network in self.actor, self.qf:
            network.eval()  # running averages, except in update; the targets, used only there, stay in training mode
        self.actor_optimizer = Adam(self.actor.parameters(), args.actor_lr)
        self.qf_optimizer = Adam(self.qf.parameters(), args.critic_lr, args.critic_weight_decay)
        self.noise = OrnsteinUhlenbeckNoise(self.actor.action_scale, args.ou_theta, args.ou_sigma, args.ou_dt)
        self.args, self.device = args, device
        self.obs = torch.zeros(1, *obs_shape, device=device)  # written in place: a CUDA graph reads from one address
        self.action = np.zeros(len(low))  # what act returned last

    def act(self, obs):
        """The action (action_dim,) to explore with at the observation (*obs_shape), both NumPy arrays."""
        copy_async(obs, self.obs[0])
        self.action = self.explore()[0].cpu().numpy()  # the only wait for the device in a step, from states
        return self.action

    @torch.no_grad()
    def explore(self):
        """mu(s) + N, within the bounds: (1, action_dim)."""
        return self.actor.clip(self.actor(self.obs) + self.noise.sample())

    def critic_loss(self, batch: Batch):
        """The mean of (y - Q(s, a))^2, equation 4, and the values Q(s, a)."""
        with torch.no_grad():
            next_q = self.target_qf(batch.next_obs, self.target_actor(batch.next_obs))
            y = batch.reward + batch.discount * next_q  # equation 5; the discount is 0 after a terminal state
        q = self.qf(batch.obs, batch.action)
        return F.mse_loss(q, y), q

    def actor_loss(self, obs):
        """Minus the mean of Q(s, mu(s)): descending it ascends the sampled policy gradient, equation 6."""
        return -self.qf(obs, self.actor(obs)).mean()

    @torch.no_grad()
    def update_targets(self):
        """theta' <- tau theta + (1 - tau) theta', for both targets."""
        targets = [*self.target_actor.parameters(), *self.target_qf.parameters()]
        torch._foreach_lerp_(targets, [*self.actor.parameters(), *self.qf.parameters()], self.args.tau)

    def update(self, batch: Batch, update_actor: bool = True):
        """One update of Algorithm 1: the critic, then, unless update_actor is off, the actor and both targets.

        Here the networks normalise by the batch's own statistics; everywhere else, by their running averages. Q's move
        twice in an update: in its own loss and in the actor's.
        Returns what is logged, still on the device: nothing here waits for it. Gradients are logged as their norm.
        """
        for network in self.actor, self.qf:
            network.train()
        qf_loss, q = self.critic_loss(batch)
        losses = {"losses/qf1_loss": qf_loss.detach(), "losses/qf1_values": q.detach().mean()}
        losses["losses/qf1_grad_norm"] = self.qf_optimizer.descend(qf_loss)
        if update_actor:
            actor_loss = self.actor_loss(batch.obs)
            losses["losses/actor_loss"] = actor_loss.detach()
            losses["losses/actor_grad_norm"] = self.actor_optimizer.descend(actor_loss)  # moves mu alone, not Q
            self.update_targets()
        for network in self.actor, self.qf:
            network.eval()
        return losses

    @torch.no_grad()
    def diagnostics(self, batch: Batch):
        """Logged beside the losses: the share of saturated actions, and how far act's last action was from mu(s)."""
        unscaled = (self.actor(batch.obs) - self.actor.action_bias) / self.actor.action_scale
        return {
            "charts/saturated_actions": (unscaled.abs() > 0.99).float().mean(),
            "charts/exploration_difference": np.abs(self.action - self.actor(self.obs)[0].cpu().numpy()).mean(),
        }

    def model_state(self):
        """For model.pt: everything but what only training needs."""
        training_only = "target_.*|.*_optimizer|noise|explore|args|device|obs|action"
        return {name: state for name, state in self.state_dict().items() if not re.fullmatch(training_only, name)}

    def state_dict(self):
        return {name: state_of(value) for name, value in vars(self).items()}

    def load_state_dict(self, state):
        for name, value in state.items():
            setattr(self, name, restored(getattr(self, name, None), value))


class PixelObservation(gym.Wrapper):
    """A step repeats the action three times, observes the three 64 x 64 frames (section 4) and sums the rewards."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (9, 64, 64), np.uint8)
        if renderer := getattr(env.unwrapped, "mujoco_renderer", None):
            renderer.width = renderer.height = 64  # faster than drawing 480 x 480 and shrinking

    def frame(self):
        frame = torch.from_numpy(self.env.render().copy()).permute(2, 0, 1)
        return frame if frame.shape[1:] == (64, 64) else F.adaptive_avg_pool2d(frame.float(), 64).byte()

    def reset(self, **kwargs):
        _, info = self.env.reset(**kwargs)
        return torch.cat([self.frame()] * 3).numpy(), info

    def step(self, action):
        frames, total = [], 0.0
        while len(frames) < 3:
            _, reward, terminated, truncated, info = self.env.step(action.copy())  # it may change what it is given
            total += float(reward)
            frames.append(self.frame())
            if terminated or truncated:
                frames += [frames[-1]] * (3 - len(frames))  # the last one stands in, as the first does in reset
        return torch.cat(frames).numpy(), total, terminated, truncated, info


def wrap(env: gym.Env, args: Args) -> gym.Env:
    """The place for wrappers, in training and evaluation alike.

    A wrapper with state of its own, like NormalizeObservation, keeps a separate one in each environment, and no
    checkpoint holds it: such state belongs in DDPG.
    """
    return PixelObservation(env) if args.pixels else env


@torch.no_grad()
def evaluate(agent: DDPG, envs: list[gym.Env], first_seed: int, max_steps: int):
    """One episode without exploration noise in each environment, started from first_seed, first_seed + 1, ...

    All are stepped together. Finished episodes keep their rows in the batch: its shape, and with it the rounding of
    the others' actions, stays the same. Returns three arrays (N,): the return, the discounted return, and the critic's
    estimate of it at the start.
    """
    starts = [env.reset(seed=first_seed + i)[0] for i, env in enumerate(envs)]
    obs = torch.tensor(np.array(starts), dtype=torch.float32)
    returns, discounted, running = np.zeros(len(envs)), np.zeros(len(envs)), set(range(len(envs)))
    for step in range(max_steps):
        device_obs = obs.to(agent.device)
        action = agent.actor.clip(agent.actor(device_obs))
        if step == 0:
            q_estimates = agent.qf(device_obs, action).cpu().numpy()
        actions = action.cpu().numpy()
        for i in sorted(running):
            next_obs, reward, terminated, truncated, _ = envs[i].step(actions[i])
            obs[i] = torch.as_tensor(next_obs)
            returns[i] += reward
            discounted[i] += agent.args.gamma**step * reward
            if terminated or truncated:
                running.remove(i)
        if not running or stop_signals:
            break
    else:
        warn(f"{len(running)} evaluation episodes did not end within --max-eval-steps {max_steps:,}: cut there")
    return returns, discounted, q_estimates


def main(args: Args):
    """Train. From a notebook too: main(Args(env_id="Hopper-v5")), main(Args(resume="runs/NAME"))."""
    if args.evaluate:
        return evaluate_run(args, DDPG)
    args, device, env = set_up(args)
    obs_shape, action_dim = env.observation_space.shape, env.action_space.shape[0]

    # Initialise critic Q(s, a), actor mu(s), their targets and the replay buffer R
    agent = DDPG(args, env.observation_space, env.action_space, device)
    buffer_class, obs_size = (PixelReplayBuffer, obs_shape) if args.pixels else (ReplayBuffer, obs_shape[0])
    buffer = buffer_class(args.buffer_size, obs_size, action_dim, device)

    def learn(update_actor):
        batch = buffer.sample(args.batch_size)
        return agent.update(batch, update_actor), batch

    agent.explore, learn = accelerated(agent.explore, learn, args, device)  # --matmul, --cudagraphs, --compile

    with Run(args, device, env, agent=agent, buffer=buffer) as run:  # --resume restores both from the checkpoint
        episode_over = True
        for global_step in run.steps():
            if episode_over:  # initialise a random process N, receive s_1
                obs, _ = env.reset(seed=args.seed if global_step == 1 else None)
                agent.noise.reset()

            # Select action a_t = mu(s_t) + N_t
            learning = global_step > args.learning_starts
            action = agent.act(obs) if learning else env.action_space.sample()

            # Execute a_t, observe r_t and s_t+1, store the transition (with the real s_t+1 even at an episode's end)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            buffer.add(obs, action, reward, next_obs, discount=0 if terminated else args.gamma)
            obs, episode_over = next_obs, terminated or truncated

            # Sample a batch; update the critic, the actor and the targets
            if learning:
                losses, batch = learn(global_step % args.policy_frequency == 0)

            due = run.record_step(reward, episode_over)
            if due.losses and learning:  # first: a loss that is not finite ends the run before anything bad is saved
                run.log_losses(losses | agent.diagnostics(batch))
            if due.evaluation:
                run.add_evaluation(*evaluate(agent, run.eval_envs, run.eval_seed, args.max_eval_steps))
            if due.model:
                run.save_model(agent.model_state())
            if due.checkpoint:
                run.save_checkpoint()
        returns = [evaluate(agent, envs, seed, args.max_eval_steps)[0] for envs, seed in run.final_starts()]
        run.finish(returns)


# From here on: the plumbing, word for word the same in both scripts. DDPG can be understood without it.

EVAL_COLUMNS = ["global_step", "mean", "std", "min", "max", "episodes"]
EVENT_FILES = "events.out.tfevents.*"  # TensorBoard's
LOG_INTERVAL = 200  # steps between rows of losses and diagnostics: reading them more often would cost time
CHECKPOINT_FORMAT = 3  # raised when the contents change: an older checkpoint is refused
EXACT_ENVS = "gymnasium.envs.mujoco", "gymnasium.envs.classic_control"  # their reset sets the whole state
STATELESS_WRAPPERS = "CopiedArrays", "PixelObservation", "TimeLimit", "OrderEnforcing", "PassiveEnvChecker"
STATELESS_WRAPPERS += "RescaleObservation", "RescaleAction", "ClipAction"
POSITIVE = (
    *("total_timesteps", "buffer_size", "batch_size", "policy_frequency", "eval_episodes", "max_eval_steps"),
    *("learning_rate", "actor_lr", "critic_lr", "n_step"),
)
NOT_NEGATIVE = (
    *("seed", "num_threads", "checkpoint_interval", "eval_interval", "final_eval_episodes", "learning_starts"),
    *("exploration_noise", "exploration_noise_final", "noise_anneal_steps", "target_noise", "target_noise_clip"),
    *("critic_weight_decay", "ou_theta", "ou_sigma", "ou_dt"),
)
# What a run records of its script: in capitals, as no flag is; a script that imports this one has its own
Args.SCRIPT, Args.PACKAGES = SCRIPT, ("torch", "gymnasium", "mujoco", "numpy")
stop_signals: list[int] = []  # SIGINT or SIGTERM, once it has come


class Due(NamedTuple):
    """What is to be done after a step."""

    losses: bool
    evaluation: bool
    model: bool
    checkpoint: bool


class Run:
    """A run's folder and everything written there, its progress, its end by a signal, and its resumption.

    `parts` are what a checkpoint holds beside the run's own state: anything with state_dict() and load_state_dict().
    """

    def __init__(self, args: Args, device: torch.device, env: gym.Env, **parts):
        default_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-")
        self.dir = Path(args.resume or Path("runs", args.run_name or default_name))
        self.args, self.device, self.env, self.parts = args, device, env, parts
        check_checkpoint_holds(parts, env)
        checkpoint = self.load_checkpoint()
        record = self.open_folder(checkpoint)
        shapes = f"observations {env.observation_space.shape}, actions {env.action_space.shape}"
        print_line(f"{args.env_id}: {shapes}; results in {self.dir}")
        library = {"mkl": "MKL", "onednn": "oneDNN"}.get(args.matmul, args.matmul)
        products = f", matrix products by {library}" if device.type == "cpu" else ""
        print_line(f"{device}, CPU threads: {torch.get_num_threads()}{products}")
        if device.type == "cuda" or not resets_exactly(env):
            print_line("note: resuming will not be exact here (on a GPU, or where reset does not set the whole state)")
        if args.track:
            import wandb

            names = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=self.dir.name)
            options = dict(id=record["wandb_id"], resume="allow", sync_tensorboard=True, save_code=True)
            wandb.init(**names, **options, config=asdict(args))
        self.eval_envs = make_eval_envs(args, self.dir) if args.eval_interval or args.final_eval_episodes else []
        self.eval_seed = first_eval_seed(args)
        env.action_space.seed(args.seed)
        self.eval_rows, self.global_step, self.start_time = [], 0, time.time()
        if checkpoint:
            for name, part in parts.items():
                part.load_state_dict(checkpoint["parts"][name])
            self.eval_rows, self.global_step = checkpoint["eval_rows"], checkpoint["global_step"]
            self.start_time -= checkpoint["seconds"]
            random_states(env, restore=checkpoint["random_states"])
        self.last_checkpoint = self.global_step
        self.episode_return, self.episode_length, self.written = 0.0, 0, True
        self.latest, self.printed_step, self.printed_time = {}, self.global_step, time.time()

    def load_checkpoint(self) -> dict | None:
        path = self.dir / "checkpoint.pt"
        if not self.args.resume or not path.exists():
            return None
        checkpoint = load(path, "cpu", script=self.args.SCRIPT, format=CHECKPOINT_FORMAT)
        for name, value in differing(checkpoint["args"], self.args).items():
            exit_unless(False, f"{path} belongs to another run: its {name} is {value}")
        return checkpoint

    def open_folder(self, checkpoint: dict | None) -> dict:
        """Make the folder and args.json, whose contents it returns; with --resume, cut off newer log rows."""
        args_path = self.dir / "args.json"
        taken = not self.args.resume and (args_path.exists() or any(self.dir.glob(EVENT_FILES)))
        exit_unless(not taken, f"{self.dir} holds a run: --resume it, or choose another --run-name")
        try:
            record = json.loads(args_path.read_text()) if self.args.resume else provenance(self.args, self.device)
            self.dir.mkdir(parents=True, exist_ok=True)
            self.unlock = weakref.finalize(self, os.close, locked(self.dir))
            (self.dir / "result.json").unlink(missing_ok=True)
            for log in self.dir.glob(EVENT_FILES):
                size = checkpoint["log_sizes"].get(log.name) if checkpoint else None
                log.unlink() if size is None else os.truncate(log, min(size, log.stat().st_size))
        except OSError as error:
            exit_unless(False, f"cannot write to {self.dir}: {error}")
        record["args"] = as_saved(self.args)
        if self.args.track:
            record.setdefault("wandb_id", uuid.uuid4().hex[:8])  # not the run's name, which other folders may hold too
        exit_unless(save(args_path, json.dumps(record, indent=2)), f"cannot write to {self.dir}")
        return record

    def __enter__(self):
        self.log = Log(str(self.dir))
        self.handlers = {number: signal.signal(number, note_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        self.excepthook = threading.excepthook
        threading.excepthook = functools.partial(quiet_log_writer, self.excepthook)
        flags = [f"|{name}|{value}|" for name, value in asdict(self.args).items()]
        self.log.add_text("hyperparameters", "\n".join(["|flag|value|", "|-|-|", *flags]))
        self.plain = not (sys.stdout.isatty() and sys.stderr.isatty())  # lines for a log instead of the bar
        total = dict(total=self.args.total_timesteps, initial=self.global_step, unit=" steps")
        self.bar = tqdm(**total, disable=self.plain, dynamic_ncols=True)
        return self

    def __exit__(self, kind, error, traceback):
        self.bar.close()
        self.log.close()
        self.unlock()
        threading.excepthook = self.excepthook
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        stop_signals.clear()  # or the next evaluation in this process would stop at once
        warn.cache_clear()
        if self.args.track:
            import wandb

            wandb.finish(exit_code=int(kind is not None))
        if isinstance(error, Exception):
            error.add_note(f"This ended the run at step {self.global_step:,}. {self.how_to_resume()}")

    def how_to_resume(self) -> str:
        start = f"from step {self.last_checkpoint:,}" if self.last_checkpoint else "from the start: no checkpoint yet"
        return f"Resume it with --resume {self.dir} ({start})"

    def steps(self):
        """The numbers of the remaining steps."""
        for step in range(self.global_step + 1, self.args.total_timesteps + 1):
            self.stop_if_asked()
            self.global_step = step
            yield step
            self.bar.update()
            if self.plain and self.global_step % (self.args.eval_interval or 5_000) == 0:
                self.print_progress()

    def stop_if_asked(self):
        if stop_signals:
            print_line(f"stopped by {signal.Signals(stop_signals[0]).name}. {self.how_to_resume()}", sys.stderr)
            sys.exit(128 + stop_signals[0])

    def record_step(self, reward, episode_over) -> Due:
        """Count the step, log the return of an episode that is over, and say what is due now."""
        args, step = self.args, self.global_step
        self.episode_return += float(reward)
        self.episode_length += 1
        last_step = step == args.total_timesteps
        evaluation = args.eval_interval > 0 and (step % args.eval_interval == 0 or last_step)
        interval = args.checkpoint_interval
        overdue = interval > 0 and step // interval > self.last_checkpoint // interval
        if overdue and self.episode_length > interval and not self.env.spec.max_episode_steps:
            warn(
                f"no checkpoint since step {self.last_checkpoint:,}: checkpoints are written only when an episode ends"
            )
        checkpoint = overdue and episode_over
        if episode_over:
            scalars = {"charts/episodic_return": self.episode_return, "charts/episodic_length": self.episode_length}
            self.log.add(scalars, step)
            self.show("return", self.episode_return)
            self.episode_return, self.episode_length = 0.0, 0
        if evaluation and args.capture_video:
            self.eval_envs[0].name_prefix = f"step-{step}"
        losses = step % LOG_INTERVAL == 0 or evaluation or checkpoint or last_step
        return Due(losses, evaluation, args.save_model and (evaluation or last_step), checkpoint)

    def log_losses(self, losses: dict):
        """Scalars by tag, and gradients, of which it logs the norm; one that is not finite ends the run."""
        norms = {tag: nn.utils.get_total_norm(value) for tag, value in losses.items() if isinstance(value, tuple)}
        scalars = {tag: float(value) for tag, value in (losses | norms).items()}
        if not np.isfinite(list(scalars.values())).all():
            advice = "lower the learning rate, or look for huge rewards and observations"
            sys.exit(f"error: a loss is not finite at step {self.global_step}: {scalars}; {advice}")
        self.log.add(scalars | {"charts/SPS": self.global_step / (time.time() - self.start_time)}, self.global_step)

    def add_evaluation(self, returns: np.ndarray, discounted: np.ndarray, q_estimates: np.ndarray):
        self.stop_if_asked()  # which cut the evaluation short
        finish_films(self.eval_envs)
        self.eval_rows.append([self.global_step, *statistics(returns).values()])
        rows = [EVAL_COLUMNS, *self.eval_rows]
        self.written = save(self.dir / "eval.csv", "".join(",".join(map(str, row)) + "\n" for row in rows))
        scalars = {"eval/episodic_return": returns.mean(), "eval/q_estimate": q_estimates.mean()}
        self.log.add(scalars | {"eval/discounted_return": discounted.mean()}, self.global_step)
        self.show("evaluation", returns.mean())

    def save_model(self, contents: dict):
        about = {
            "script": self.args.SCRIPT,
            "env_id": self.args.env_id,
            "obs_shape": self.env.observation_space.shape,
            "global_step": self.global_step,
            "args": as_saved(self.args),
        }
        self.written = save(self.dir / "model.pt", contents | about) and self.written

    def save_checkpoint(self):
        """One that fails is due again at the end of the next episode."""
        if self.global_step == self.args.total_timesteps and not self.written:
            return  # --resume would take the last results as written
        checkpoint = {
            "script": self.args.SCRIPT,
            "format": CHECKPOINT_FORMAT,
            "args": as_saved(self.args),
            "global_step": self.global_step,
            "seconds": time.time() - self.start_time,
            "eval_rows": self.eval_rows,
            "random_states": random_states(self.env),
            "log_sizes": {path.name: path.stat().st_size for path in self.dir.glob(EVENT_FILES)},
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        if save(self.dir / "checkpoint.pt", checkpoint):
            self.last_checkpoint = self.global_step

    def final_starts(self):
        """Environments and first seeds for --final-eval-episodes episodes from starts that no evaluation has met."""
        first = self.args.eval_episodes
        for i in range(0, self.args.final_eval_episodes, len(self.eval_envs) or 1):
            self.stop_if_asked()
            envs = [env.env if isinstance(env, gym.wrappers.RecordVideo) else env for env in self.eval_envs]
            yield envs[: self.args.final_eval_episodes - i], self.eval_seed + first + i

    def finish(self, final_returns: list[np.ndarray]):
        """Write result.json, whose presence says that the run is complete."""
        self.stop_if_asked()
        for each in [self.env, *self.eval_envs]:
            each.close()
        last = [row[1] for row in self.eval_rows][-10:]  # the final return is the mean of the last 10 evaluations
        seconds = time.time() - self.start_time
        result = dict(
            global_step=self.args.total_timesteps,
            final_return=float(np.mean(last)) if last else None,
            evaluations=len(self.eval_rows),
            final_eval=statistics(np.concatenate(final_returns)) if final_returns else None,
            seconds=seconds,
            steps_per_second=self.args.total_timesteps / seconds,
        )
        if not (self.written and save(self.dir / "result.json", json.dumps(result, indent=2))):
            sys.exit(f"error: the results could not be written. {self.how_to_resume()}")
        if not self.args.keep_checkpoint:
            (self.dir / "checkpoint.pt").unlink(missing_ok=True)
        score = f"; final return {result['final_return']:.1f}, the mean of {len(last)} evaluations" if last else ""
        duration = tqdm.format_interval(seconds)
        print_line(f"complete after {self.args.total_timesteps:,} steps in {duration}{score}")

    def show(self, name: str, value: float):
        self.latest[name] = f"{value:.1f}"
        self.bar.set_postfix(self.latest, refresh=False)

    def print_progress(self):
        speed = (self.global_step - self.printed_step) / (time.time() - self.printed_time)  # the warm-up is faster
        self.printed_step, self.printed_time = self.global_step, time.time()
        left = tqdm.format_interval((self.args.total_timesteps - self.global_step) / speed)
        latest = "".join(f"{name} {value}, " for name, value in self.latest.items())
        print_line(f"step {self.global_step:,}: {latest}{speed:.0f} steps/s, {left} left")


def evaluate_run(args: Args, agent_class: type):
    """--evaluate: the score of a run's model.pt, on the starts of its evaluations, or of another --seed."""
    args, device, env = set_up(args)
    model = load(Path(args.evaluate, "model.pt"), device, script=args.SCRIPT, env_id=args.env_id)
    agent = agent_class(args, env.observation_space, env.action_space, device)
    agent.load_state_dict({name: state for name, state in model.items() if name in agent.state_dict()})
    envs = make_eval_envs(args, Path(args.evaluate))
    returns, *_ = evaluate(agent, envs, first_eval_seed(args), args.max_eval_steps)
    finish_films(envs)
    for each in [env, *envs]:
        each.close()
    score = f"{returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episode{'s' * (len(returns) > 1)}"
    print(f"{args.env_id} after {model['global_step']:,} steps: {score}")


# Flags


def parse_int(text: str) -> int:
    """An integer as people type it: 1000000, 1_000_000 or 1e6, but not 1.5."""
    if not float(text).is_integer():
        raise ValueError(f"{text} is not an integer")
    return int(float(text))


registry = tyro.constructors.ConstructorRegistry()


@registry.primitive_rule
def integers(info):
    """Makes tyro read integers with parse_int."""
    if info.type is not int:
        return None
    spec = tyro.constructors.PrimitiveConstructorSpec
    return spec(1, "INT", lambda words: parse_int(words[0]), lambda n: isinstance(n, int), lambda n: [str(n)])


def parse_args(args_class: type) -> Args:
    """The command line; with --resume and --evaluate, over the run's own flags."""
    args = tyro.cli(args_class, registry=registry)
    if args.resume or args.evaluate:
        args = tyro.cli(args_class, default=saved_args(args), registry=registry)
    return args


def saved_args(args: Args) -> Args:
    """The flags of the run that --resume or --evaluate names."""
    exit_unless(not (args.resume and args.evaluate), "--resume and --evaluate cannot be combined")
    run_dir = Path(args.resume or args.evaluate)
    try:
        if args.resume:
            record = json.loads((run_dir / "args.json").read_text())
            exit_unless(record.get("script", args.SCRIPT) == args.SCRIPT, f"{run_dir} holds no run of {args.SCRIPT}.py")
        else:
            exit_unless((run_dir / "model.pt").exists(), f"{run_dir} holds no run of {args.SCRIPT}.py with a model.pt")
            record = load(run_dir / "model.pt", "cpu", script=args.SCRIPT)
        flags = record["args"]
        tuples = {name: tuple(flags[name]) for name in flags if isinstance(getattr(Args, name, None), tuple)}
        own = dict(resume=args.resume, evaluate=args.evaluate)
        if args.evaluate:
            own["capture_video"] = False  # or it would film because training did
        return type(args)(**flags | tuples | own)
    except (OSError, ValueError, TypeError, KeyError):
        exit_unless(False, f"{run_dir} holds no run of {args.SCRIPT}.py")


def as_saved(args: Args) -> dict:
    """The flags as args.json gives them back: lists for tuples, and new strings, which pickle always writes alike."""
    return json.loads(json.dumps(asdict(args) | {"resume": None}))


def differing(saved: dict, args: Args) -> dict:
    """The saved flags that differ from `args`, except for those that a resumed run may change."""
    flags = {name: value for name, value in as_saved(args).items() if name not in ("resume", "total_timesteps")}
    return {name: saved[name] for name, value in flags.items() if name in saved and saved[name] != value}


def set_up(args: Args) -> tuple[Args, torch.device, gym.Env]:
    """All the flags, checked; the device; and the environment. Sets every seed."""
    if args.resume or args.evaluate:
        saved = saved_args(args)
        usual = type(args)()
        given = {k: v for k, v in asdict(args).items() if k in args.given or v != getattr(usual, k)}
        args = replace(saved, **given)
        if args.resume:
            for name, value in differing(as_saved(saved), args).items():
                exit_unless(False, f"--resume keeps the run's own flags: its {name} is {value}")
            raised = args.total_timesteps - saved.total_timesteps
            exit_unless(raised >= 0, "--total-timesteps can only be raised")
            run_dir = Path(args.resume)
            complete = (run_dir / "result.json").exists() and not (raised and (run_dir / "checkpoint.pt").exists())
            extending = "extending it takes a checkpoint kept by --keep-checkpoint and a higher --total-timesteps"
            exit_unless(not complete, f"{run_dir} is complete; {extending}")
    for field in fields(args):
        value = getattr(args, field.name)
        if isinstance(value, float) and field.type in (int, int | None):  # Args(total_timesteps=1e6), in a notebook
            flag = f"--{field.name.replace('_', '-')}"
            exit_unless(value.is_integer(), f"{flag} must be an integer, not {value}")
            args = replace(args, **{field.name: int(value)})
    check_args(args)
    if args.matmul == "auto":
        args = replace(args, matmul="onednn" if mkl_holds_back() else "mkl")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.num_threads or torch.get_num_threads())
    if device.type == "cpu" and args.matmul == "onednn":
        fine = torch.full((64, 64), 1 + 2**-12)  # bf16 rounds it to 1
        exact = multiplied_by_onednn(torch.mm)(fine, torch.eye(64)).equal(fine)
        advice = f"import {SCRIPT} before anything multiplies, or take --matmul mkl"
        exit_unless(exact, f"oneDNN was used before and would multiply in bf16: {advice}")
    torch.set_flush_denormal(True)  # numbers below 1e-38 are 0: L2 makes many, and Intel's CPUs are slow with them
    torch.backends.cudnn.deterministic = args.torch_deterministic
    warnings.filterwarnings("ignore", ".*(Overwriting existing videos|not in the possible render_modes)")
    warnings.filterwarnings("ignore", module="glfw")  # what it has to say comes in the error too
    env = make_env(args, render=args.capture_video)  # which is not filmed: a missing GL must fail now
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    return args, device, env


def check_args(args: Args):
    exit_unless(0 <= args.gamma <= 1, f"--gamma must be in [0, 1], not {args.gamma}")
    exit_unless(0 < args.tau <= 1, f"--tau must be in (0, 1], not {args.tau}")
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if name in POSITIVE:
            exit_unless(0 < value < np.inf, f"{flag} must be positive, not {value}")
        elif name in NOT_NEGATIVE:
            exit_unless(0 <= value < np.inf, f"{flag} must be at least 0, not {value}")
    momentum = getattr(args, "batch_norm_momentum", 0)
    exit_unless(0 <= momentum <= 1, f"--batch-norm-momentum must be in [0, 1], not {momentum}")
    adapts = getattr(args, "noise", "") != "parameter" or args.exploration_noise > 0
    exit_unless(adapts, "--noise parameter starts from --exploration-noise, which must be positive")
    exit_unless(args.batch_size <= args.buffer_size, "--buffer-size must be at least --batch-size")
    learns = args.learning_starts < args.total_timesteps
    exit_unless(learns, "--learning-starts must be below --total-timesteps, or nothing is learned")
    filled = getattr(args, "n_step", 1) <= args.learning_starts + 1
    exit_unless(filled, "--learning-starts must be at least --n-step - 1: the first transition takes that many steps")
    annealing = getattr(args, "noise_anneal_steps", 0)
    visible = annealing == 0 or annealing > args.learning_starts
    exit_unless(visible, "--noise-anneal-steps must be above --learning-starts, whose steps it includes")
    exit_unless(args.seed < 2**32, "--seed must be below 2**32")
    if not args.evaluate:
        gpu = args.cuda and torch.cuda.is_available()
        exit_unless(gpu or not (args.cudagraphs or args.compile), "--cudagraphs and --compile need a CUDA device")
        exit_unless(not args.track or find_spec("wandb"), "--track needs Weights & Biases: pip install wandb")


# Environments


def warn_of_mujoco(text: str):
    if "deprecated" not in text:  # Gymnasium's business
        warn(f"MuJoCo: {text.partition(' Time')[0]}")


class CopiedArrays(gym.Wrapper):
    """Environments may change an action that they are given, and hand out the same observation array every time."""

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return np.array(obs), info

    def step(self, action):
        obs, reward, *rest = self.env.step(np.array(action))
        return np.array(obs), float(reward), *rest


def make_env(args: Args, render: bool = False) -> gym.Env:
    env_id, pixels = args.env_id, getattr(args, "pixels", False)
    options = dict(render_mode="rgb_array") if render or pixels else {}
    try:
        import mujoco  # fails where MUJOCO_GL names a GL that is not there

        mujoco.set_mju_user_warning(warn_of_mujoco)
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
        env = CopiedArrays(wrap(gym.make(env_id, **options), args))  # make names the near matches of an unknown id
        renderer = getattr(env.unwrapped, "mujoco_renderer", None)
        if renderer and not pixels:  # film with the camera that follows the robot, if there is one (else -1)
            renderer.camera_id = mujoco.mj_name2id(env.unwrapped.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        if options:
            env.reset(seed=0)  # the first picture decides where MuJoCo's camera looks
            env.render()
    except Exception as error:  # a missing GL, for one, shows in many ways
        remedy = "; without a screen: MUJOCO_GL=egl, and apt-get install libegl1 libgl1-mesa-dri" if options else ""
        exit_unless(False, " ".join(f"cannot make {env_id}: {error}{remedy}".split()))
    obs, action = env.observation_space, env.action_space
    continuous = isinstance(action, gym.spaces.Box) and np.issubdtype(action.dtype, np.floating)
    exit_unless(continuous, f"DDPG needs a continuous action space (Box of floats): {env_id} has {action}")
    exit_unless(action.is_bounded(), f"DDPG needs bounded actions: {env_id} has {action}")
    low, high = float32_bounds(action)
    usable = (low < high).all() and (high - low).isfinite().all() and (high + low).isfinite().all()
    exit_unless(usable, f"DDPG needs action bounds that differ, by less than float32's maximum: {env_id} has {action}")
    exit_unless(isinstance(obs, gym.spaces.Box), f"the observation space must be a Box: {env_id} has {obs}")
    images, flat = len(obs.shape) == 3, len(obs.shape) == 1
    exit_unless(pixels or not images, f"{env_id} observes images: ddpg_paper_faithful.py --pixels learns from pixels")
    usable = (pixels or flat) and len(action.shape) == 1
    exit_unless(usable, f"{env_id} needs flat spaces, but has {obs} and {action}")
    return env


def float32_bounds(space: gym.spaces.Box) -> tuple[torch.Tensor, torch.Tensor]:
    """The bounds (action_dim,), rounded inwards: to the nearest float32, 0.4 would be 0.40000001."""
    low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    inner_low, inner_high = np.nextafter(low, high), np.nextafter(high, low)
    low, high = np.where(low < space.low, inner_low, low), np.where(high > space.high, inner_high, high)
    return torch.from_numpy(low), torch.from_numpy(high)


def first_eval_seed(args: Args) -> int:
    """All evaluations of a run have the same starts, and those of another seed have others."""
    return 10_000 * (args.seed + 1)


def make_eval_envs(args: Args, run_dir: Path) -> list[gym.Env]:
    filmed = args.capture_video * (args.eval_episodes if args.evaluate else 1)
    envs = [make_env(args, render=i < filmed) for i in range(args.eval_episodes)]
    for i in range(filmed):
        envs[i] = gym.wrappers.RecordVideo(envs[i], str(run_dir / "videos"), lambda _: True, name_prefix=f"start-{i}")
    return envs


def finish_films(envs: list[gym.Env]):
    """Write what has been filmed."""
    for env in envs:
        if isinstance(env, gym.wrappers.RecordVideo):
            with warn_if_unwritable("the video"):
                env.stop_recording()  # which writes it
            env.recorded_frames, env.recording = [], False


def resets_exactly(env: gym.Env) -> bool:
    """Whether an episode depends on nothing but the environment's random generator."""
    while type(env).__name__ in STATELESS_WRAPPERS:
        env = env.env
    return type(env).__module__.startswith(EXACT_ENVS)


# Files


def exit_unless(condition, message: str):
    """On bad input, print one line and exit with code 2, before anything is written."""
    if not condition:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def print_line(text: str, file=None):
    """Print a line without breaking the progress bar."""
    with contextlib.suppress(OSError):  # the disk that is full may be the one this goes to
        tqdm.write(text, file=file)
        (file or sys.stdout).flush()


warn = functools.cache(lambda text: print_line(f"warning: {text}", sys.stderr))  # each text once


@contextlib.contextmanager
def warn_if_unwritable(path):
    """Training can go on without what is written here: a failure is only a warning."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error
        while cause.__context__:  # torch.save's own RuntimeError hides the disk's OSError
            cause = cause.__context__
        if not isinstance(cause, OSError):
            raise
        warn(f"cannot write {path}, training goes on: {cause}".partition("\n")[0])


def save(path: Path, contents) -> bool:
    """Write text, or with torch.save anything else; at every moment the old or the new file is there, complete."""
    temporary = Path(f"{path}.tmp")
    with warn_if_unwritable(path):
        with open(temporary, "wb") as file:
            file.write(contents.encode()) if isinstance(contents, str) else torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        return True
    with contextlib.suppress(OSError):
        temporary.unlink()
    return False


def load(path: Path, device, **expected) -> dict:
    """What torch.save wrote, if every byte is intact and it holds the expected items; else one line, exit code 2."""
    try:
        with zipfile.ZipFile(path) as archive:
            exit_unless(archive.testzip() is None, f"{path} is corrupt")
        contents = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except Exception as error:  # torch and zipfile raise many kinds on a broken file
        exit_unless(False, f"cannot read {path}: {error}".splitlines()[0])
    for key, value in expected.items():
        found = contents.get(key) if isinstance(contents, dict) else None
        exit_unless(found == value, f"{path} belongs to another run or script: its {key} is {found}, not {value}")
    return contents


def locked(folder: Path) -> int:
    """Keeps other runs out of the folder, until the file descriptor that it returns is closed or the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        exit_unless(False, f"{folder} is in use: a run is being trained there")
    except OSError:  # a network's file system may have no such locks
        pass
    return descriptor


class Log(SummaryWriter):
    """TensorBoard's log; where it can't be written a warning says so, and training goes on."""

    def add(self, scalars: dict, global_step: int):
        with warn_if_unwritable("TensorBoard's log"):
            for tag, value in scalars.items():
                self.add_scalar(tag, value, global_step)
            self.flush()
            return
        if Path(self.log_dir).is_dir():  # an error ends the writer's thread for good: the next call starts another file
            self.all_writers = None
            with contextlib.suppress(OSError):
                for path in Path(self.log_dir).glob(EVENT_FILES):
                    if path.stat().st_size == 0:  # it failed at its first byte
                        path.unlink()

    def close(self):
        with contextlib.suppress(OSError):  # already reported
            super().close()


def quiet_log_writer(usual_hook, error):
    """The log's writer thread need not report a full disk: its error comes back in the next call."""
    if not (isinstance(error.exc_value, OSError) and type(error.thread).__module__.startswith("tensorboard")):
        usual_hook(error)


def note_signal(number, frame):
    """Only notes it: an exception at an arbitrary point, such as inside the log's queue, could hang the run."""
    signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C ends the run at once
    stop_signals.append(number)


def statistics(returns: np.ndarray) -> dict:
    """What eval.csv and result.json hold of some episodes, as plain numbers."""
    values = dict(mean=returns.mean(), std=returns.std(), min=returns.min(), max=returns.max())
    return {name: float(value) for name, value in values.items()} | {"episodes": len(returns)}


def provenance(args: Args, device) -> dict:
    """The code, the versions and the machine."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    versions = {name: version(name) for name in args.PACKAGES}
    versions["python"] = platform.python_version()
    hardware = {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    hardware["gpu"] = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {"script": args.SCRIPT, "commit": commit, "versions": versions, "hardware": hardware}


# State


def copy_async(array: np.ndarray, destination: torch.Tensor):
    """Copy to the device without waiting for it."""
    destination.copy_(torch.as_tensor(array, dtype=torch.float32), non_blocking=True)


def allocate(*shape: int, device: torch.device, dtype=torch.float32) -> torch.Tensor:
    """Memory for the replay buffer, uninitialised, if there is enough; else one line and exit code 2."""
    needed = math.prod(shape) * dtype.itemsize / 2**30
    free = (torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available) / 2**30
    advice = f"the replay buffer needs {needed:.2f} GiB, {free:.2f} GiB are free: lower --buffer-size"
    exit_unless(needed < free, advice)
    return torch.empty(shape, dtype=dtype, device=device)


# What training leaves as it is
CONSTANT = Args, gym.Space, torch.device, torch.dtype, np.dtype, type, functools.partial
CONSTANT += FunctionType, MethodType, BuiltinFunctionType


def state_of(part):
    """What a checkpoint keeps of an attribute: its state_dict(), a plain value, or all attributes of another object."""
    if hasattr(part, "state_dict"):
        return part.state_dict()
    if isinstance(part, np.ndarray | np.generic):  # before float, which np.float64 is: weights_only refuses to load it
        return {"NumPy's": torch.from_numpy(np.array(part)), "array": isinstance(part, np.ndarray)}
    if part is None or isinstance(part, torch.Tensor | bool | int | float | str):
        return part
    if type(part) is dict:
        return {key: state_of(value) for key, value in part.items()}
    if type(part) is list:
        return [state_of(value) for value in part]
    if isinstance(part, tuple):
        return tuple(state_of(value) for value in part)
    if isinstance(part, CONSTANT):
        return None
    attributes_alone = hasattr(part, "__dict__") and part.__reduce_ex__(4)[0].__name__ == "__newobj__"
    if not attributes_alone or isinstance(part, dict | list):
        raise TypeError(f"no checkpoint can hold {part!r}: wrap it in a class with state_dict() and load_state_dict()")
    return {name: state_of(value) for name, value in vars(part).items()}


def restored(part, state):
    """The attribute with that state; tensors change in place, since a CUDA graph reads them where they are."""
    if isinstance(part, CONSTANT):
        return part
    if hasattr(part, "load_state_dict"):
        part.load_state_dict(copy.deepcopy(state))  # a copy: the state is mapped from the checkpoint's file
        return part
    if isinstance(state, dict) and "NumPy's" in state:
        array = state["NumPy's"].numpy().copy()
        return array if state["array"] else array[()]
    if isinstance(state, dict) and (part is None or isinstance(part, dict)):
        return {key: restored((part or {}).get(key), value) for key, value in state.items()}
    if isinstance(state, dict):
        for name, value in state.items():
            setattr(part, name, restored(getattr(part, name, None), value))
        return part
    if isinstance(state, list | tuple):
        old = part if isinstance(part, list | tuple) else []
        values = [restored(old[i] if i < len(old) else None, value) for i, value in enumerate(state)]
        return part._make(values) if hasattr(part, "_make") else type(state)(values)
    if isinstance(part, torch.Tensor) and isinstance(state, torch.Tensor) and part.shape == state.shape:
        part.data.copy_(state)
        return part
    return copy.deepcopy(state)


def check_checkpoint_holds(parts: dict, env: gym.Env):
    """What no checkpoint can hold must fail before training, not hours later."""
    random_states(env)
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    file.seek(0)
    torch.load(file, weights_only=True)


def random_states(env: gym.Env, restore: list | None = None) -> list:
    """Sets every random generator to the state in `restore`, if given; returns their states, as plain values."""
    rngs = [np.random.get_bit_generator(), *(x.np_random.bit_generator for x in (env.unwrapped, env.action_space))]
    if restore:
        torch.set_rng_state(restore[0])
        for state in restore[1]:
            torch.cuda.set_rng_state(state)
        random.setstate(restore[2])
        for generator, state in zip(rngs, restore[3], strict=True):
            generator.state = json.loads(state)
    states = [json.dumps(generator.state, default=np.ndarray.tolist) for generator in rngs]
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), cuda, random.getstate(), states]


# Speed


class Adam:
    """Adam (Kingma & Ba 2015) by torch's fused kernel, without torch.optim's bookkeeping: an update 5 % faster.

    `weight_decay` is the coefficient of L2 on the weights, not on biases and normalisations.
    """

    def __init__(self, parameters, lr: float, weight_decay: float = 0.0):
        self.parameters, self.weight_decay = list(parameters), weight_decay
        self.means = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.squares = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.step = torch.zeros((), device=self.parameters[0].device)
        self.settings = dict(lr=lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False)

    @torch.no_grad()
    def descend(self, loss):
        """A step down the loss, by its gradients with respect to these parameters alone; returns the gradients."""
        gradients = torch.autograd.grad(loss, self.parameters)
        down = [gradient.contiguous() for gradient in gradients]  # under torch.compile it may be a slice
        for i, parameter in enumerate(self.parameters):
            if self.weight_decay and parameter.ndim > 1:
                down[i] = down[i].add(parameter, alpha=self.weight_decay)
        self.step += 1
        steps = [self.step] * len(down)
        torch._fused_adam_(self.parameters, down, self.means, self.squares, [], steps, **self.settings)
        return gradients


def mkl_holds_back() -> bool:
    """Whether oneDNN multiplies faster: on AMD's CPUs from Zen 5 on.

    There MKL, which takes its AVX2 kernels where the CPU is not Intel's, leaves half of the machine idle: 117 GFLOP/s
    for 256 x 256 x 256 where oneDNN does 242. Zen 4's AVX-512 is no wider than its AVX2: 100 and 102, and oneDNN takes
    longer to start.
    """
    path = Path("/proc/cpuinfo")
    cpu = path.read_text() if path.exists() else ""
    family = re.search(r"vendor_id\s*: AuthenticAMD\ncpu family\s*: (\d+)", cpu)
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and family is not None and int(family[1]) >= 26


# oneDNN without bf16; it reads this once, on some CPUs as early as a process's first product by any library.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"


def multiplied_by_onednn(learn):
    """`learn` with its matrix products by oneDNN; only it: for small products, as in acting, MKL starts sooner.

    torch hands fp32 products to oneDNN where bf16 is allowed; the capped instruction set has none: they stay fp32.
    """
    usual = torch.get_float32_matmul_precision()

    def learn_by_onednn(*args):
        torch.set_float32_matmul_precision("medium")
        try:
            return learn(*args)
        finally:
            torch.set_float32_matmul_precision(usual)

    return learn_by_onednn


def accelerated(explore, learn, args: Args, device: torch.device):
    """Both functions as --matmul, --compile and --cudagraphs ask for."""
    if device.type == "cpu" and args.matmul == "onednn":
        learn = multiplied_by_onednn(learn)
    if args.compile:
        Adam.descend = torch.compiler.disable(Adam.descend)  # torch.compile fails on the kernel that it calls
        explore, learn = torch.compile(explore), torch.compile(learn)
    if args.cudagraphs:
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.Stream())  # recording needs its first calls off the default stream
        explore, learn = cuda_graphed(explore), cuda_graphed(learn)
    return explore, learn


def cuda_graphed(function, warmup=3):
    """`function` replayed as a CUDA graph, one for each set of arguments; the first calls run, and count, as usual."""
    calls, graphs, outputs = {}, {}, {}

    def call(*args):
        calls[args] = calls.get(args, 0) + 1
        if calls[args] <= warmup:  # what happens once, like making the optimiser's state, must not be recorded
            return function(*args)
        if args not in graphs:
            graphs[args] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[args]):
                outputs[args] = function(*args)
        graphs[args].replay()
        return outputs[args]

    return call


if __name__ == "__main__":
    main(parse_args(Args))
