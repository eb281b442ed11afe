# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#   "tensorboard==2.21.0", "tqdm==4.70.1", "filelock==4.3.1", "psutil==7.2.2", "moviepy==2.2.1"]
# ///
"""Deep Deterministic Policy Gradient (DDPG; Lillicrap et al. 2016, arXiv 1509.02971): the paper's settings.

    python ddpg_paper_faithful.py --env-id Hopper-v5 --seed 3
    python ddpg_paper_faithful.py --env-id InvertedPendulum-v5 --pixels --buffer-size 30e3 --total-timesteps 30e3

All that the paper states is here: networks, initial weights (section 7), batch normalisation from states (section 3),
pixels (section 4), Adam, L2, batch, gamma, tau, replay buffer and noise (section 7). What differs: 1M steps of
training, not up to 2.5M; a terminal state has no value, where Algorithm 1 would bootstrap; Q sees actions rescaled to
[-1, 1], and noise is in halves of the action range, so that an environment's units do not matter.

| where the paper is silent | here                          | because                                                 |
|---------------------------|-------------------------------|---------------------------------------------------------|
| targets' normalisation    | the batch's own statistics    | better on Pendulum-v1, worse on InvertedPendulum-v5     |
| Q in the actor's loss     | the batch's own statistics    | running averages are for exploring and evaluating       |
| running averages          | momentum 0.001                | HalfCheetah-v5 1,608; with torch's 0.1, 784             |
| where to normalise        | before ReLU, not the output   | as its inventors do; the output is to start near zero   |
| OU time step              | 1: forgets in 6 steps         | InvertedPendulum-v5 790; with 0.01, 859: level          |
| warm-up                   | 1,000 random steps            | not tuned: 790 there; with 64 steps, 1,000              |
| L2: of what, which factor | weights; gradient of c/2 w^2  | rllab and OpenAI Baselines spare biases too             |
| fan-in at the action      | counts the action             | it is an input like the others                          |
| pixels: kernel; action    | 3 x 3, stride 2; at layer two | 471,000 weights, near the paper's 430,000; as above     |

The returns on InvertedPendulum-v5 are with --batch-norm actor: the default does not learn it. Each seed and what is
undecided are in RESULTS.md.

| Algorithm 1                                                            | here                   |
|------------------------------------------------------------------------|------------------------|
| initialise critic Q(s, a), actor mu(s) and their targets Q' and mu'    | DDPG.__init__          |
| initialise the replay buffer R                                         | ReplayBuffer.__init__  |
| initialise a random process N, receive the first observation s_1       | main; agent.noise      |
| select the action a_t = mu(s_t) + N_t                                  | DDPG.act; DDPG.explore |
| execute a_t, observe the reward r_t and the next observation s_t+1     | main                   |
| store the transition (s_t, a_t, r_t, s_t+1) in R                       | ReplayBuffer.add       |
| sample a random minibatch of N transitions from R                      | ReplayBuffer.sample    |
| set y_i = r_i + gamma Q'(s_i+1, mu'(s_i+1)), minimise (y_i - Q)^2      | DDPG.critic_loss       |
| update the actor with the sampled policy gradient                      | DDPG.actor_loss        |
| update the targets, theta' <- tau theta + (1 - tau) theta'             | DDPG.update_targets    |
"""

import contextlib
import copy
import errno
import hashlib
import io
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zipfile
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import filelock
import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    # Experiment
    exp_name: str = SCRIPT  # name of the experiment, part of the run's name
    run_name: str | None = None  # folder of this run in runs/; by default {env_id}__{exp_name}__{seed}__{unix time}
    seed: int = 1  # seed of the networks, the environment, the exploration and the sampling of batches
    torch_deterministic: bool = True  # restrict cuDNN to deterministic algorithms
    cuda: bool = True  # train on the GPU if there is one
    cudagraphs: bool = False  # on a GPU, replay acting and the whole update as CUDA graphs
    compile: bool = False  # compile the update as one graph: faster after up to a minute; a CPU takes a C++ compiler
    num_threads: int = 0  # CPU threads; 0 leaves torch's own choice, 1 is best for several runs on one machine
    matmul: Literal["auto", "mkl", "onednn"] = "auto"  # an update's matrix products on a CPU; auto: oneDNN on Zen 5
    track: bool = False  # mirror the TensorBoard log to Weights & Biases
    wandb_project_name: str = "ddpg"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases user or team
    save_model: bool = True  # write model.pt at each evaluation and at the end
    checkpoint_interval: int = 50_000  # steps between checkpoints, each at the end of an episode; 0 = none
    keep_checkpoint: bool = False  # keep the last checkpoint of a finished run: --resume can extend the run from it
    resume: str | None = None  # folder of a run to resume under its own flags; only --total-timesteps may be raised
    warm_start: str | None = None  # folder of a run whose model.pt a new run starts from

    # Evaluation
    eval_interval: int = 5_000  # steps between evaluations, which are without exploration noise; 0 = none
    eval_episodes: int = 10  # episodes per evaluation
    final_eval_episodes: int = 100  # episodes of one last evaluation at the end, from starts not used before; 0 = none
    max_eval_steps: int = 100_000  # an evaluation episode that has not ended by then is cut
    capture_video: bool = False  # film the first episode of each evaluation, with --evaluate every episode
    evaluate: str | None = None  # folder of a run whose model.pt to evaluate instead of training

    # Algorithm
    env_id: str = "HalfCheetah-v5"  # Gymnasium environment with bounded actions; module:EnvId imports module first
    env_kwargs: str = "{}"  # options of the environment for gym.make, as JSON: '{"max_episode_steps": 500}'
    total_timesteps: int = 1_000_000  # environment steps of the run; from pixels, each repeats its action three times
    actor_lr: float = 1e-4  # Adam's learning rate for the actor (section 7)
    critic_lr: float = 1e-3  # Adam's learning rate for the critic (section 7)
    critic_weight_decay: float = 1e-2  # L2 weight decay of the critic, not of the actor (section 7)
    buffer_size: int = 1_000_000  # transitions that the replay buffer holds (section 7)
    gamma: float = 0.99  # discount factor (section 7)
    tau: float = 0.001  # how far the targets move towards the networks at each update (section 7)
    batch_size: int | None = None  # transitions per batch; by default 64, and 16 from pixels (section 7)
    ou_theta: float = 0.15  # pull of the Ornstein-Uhlenbeck noise back to zero (section 7)
    ou_sigma: float = 0.2  # size of the noise's steps at --ou-dt 1, 1 is half the action range (section 7)
    ou_dt: float = 1.0  # time step of the Ornstein-Uhlenbeck noise: 1 forgets in 6 steps, 0.01 in 666
    batch_norm: Literal["both", "actor", "critic", "none"] = "both"  # normalised networks (section 3); pixels: none
    batch_norm_momentum: float = 0.001  # share of a new batch in the running averages of batch normalisation
    weights_init: Literal["paper", "xavier", "kaiming"] = "paper"  # hidden layers; paper: within 1/sqrt(fan-in)
    pixels: bool = False  # learn from rendered frames: a step repeats the action three times, observes 3 x 64 x 64 RGB
    learning_starts: int = 1_000  # steps of uniformly random actions before learning starts (the paper is silent)
    policy_frequency: int = 1  # critic updates per update of the actor and the targets (Algorithm 1: 1)

    def __post_init__(self):
        if self.batch_size is None:
            self.batch_size = 16 if self.pixels else 64


def init_weights(network: nn.Module, output: nn.Linear, weights_init: str):
    """Section 7: uniform within 1/sqrt(fan-in), the output layer within 3e-3, from pixels 3e-4; biases too.

    With xavier or kaiming, the hidden layers have those weights instead, and biases of 0.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5  # the fan-in: inputs, times the kernel's area
            if layer is output:
                bound = 3e-4 if isinstance(network.input, Convolutions) else 3e-3
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


class QNetwork(nn.Module):
    """Action value Q(s, a): observations (N, *obs_shape) and actions (N, action_dim) to values (N,)."""

    def __init__(self, obs_shape, low, high, norm=nn.BatchNorm1d, weights_init: str = "paper"):
        super().__init__()
        pixels = len(obs_shape) == 3
        self.input = Convolutions() if pixels else norm(*obs_shape)
        size0, size1, size2 = (2048, 200, 200) if pixels else (*obs_shape, 400, 300)
        self.fc1, self.norm1 = nn.Linear(size0, size1), norm(size1)  # section 3: all layers before the action
        self.fc2 = nn.Linear(size1 + len(low), size2)  # section 7: where the action enters
        self.fc3 = nn.Linear(size2, 1)
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)
        init_weights(self, self.fc3, weights_init)

    def forward(self, obs, action):
        x = F.relu(self.norm1(self.fc1(self.input(obs))), inplace=True)  # in place saves 2 % of an update on a CPU
        action = (action - self.action_bias) / self.action_scale  # to [-1, 1], whatever the environment's units
        x = F.relu(self.fc2(torch.cat([x, action], 1)), inplace=True)
        return self.fc3(x).squeeze(1)  # with (N, 1), y - q would broadcast to (N, N)


class Actor(nn.Module):
    """Deterministic policy mu(s): observations (N, *obs_shape) to actions (N, action_dim) within [low, high]."""

    def __init__(self, obs_shape, low, high, norm=nn.BatchNorm1d, weights_init: str = "paper"):
        super().__init__()
        pixels = len(obs_shape) == 3
        self.input = Convolutions() if pixels else norm(*obs_shape)
        size0, size1, size2 = (2048, 200, 200) if pixels else (*obs_shape, 400, 300)
        self.fc1, self.norm1 = nn.Linear(size0, size1), norm(size1)  # section 3: all layers
        self.fc2, self.norm2 = nn.Linear(size1, size2), norm(size2)
        self.fc_mu = nn.Linear(size2, len(low))  # not normalised: section 7 has it start near zero
        self.register_buffer("action_low", low)
        self.register_buffer("action_high", high)
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)
        init_weights(self, self.fc_mu, weights_init)

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
    discount: torch.Tensor  # (N,), of Q'(next_obs): gamma, or 0 if that is terminal, which a time limit is not


class ReplayBuffer:
    """The last `capacity` transitions on the training device, one float32 row each: a batch is a single gather."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.sizes = [obs_dim, action_dim, 1, obs_dim, 1]
        self.rows = allocate(capacity, sum(self.sizes), device=device)
        self.size = torch.zeros((), dtype=torch.int64, device=device)  # on the device, where a CUDA graph reads it
        self.added = 0

    def add(self, obs, action, reward, next_obs, discount):
        row = np.concatenate([obs, action, [reward], next_obs, [discount]], dtype=np.float32)
        self.rows[self.added % len(self.rows)].copy_(torch.from_numpy(row), non_blocking=True)
        self.added += 1
        self.size.fill_(min(self.added, len(self.rows)))

    def sample(self, batch_size: int) -> Batch:
        """Uniformly, with replacement. Not by randint: a CUDA graph would repeat the bound it was recorded with."""
        uniform = torch.rand(batch_size, dtype=torch.float64, device=self.rows.device)  # float32 ends at 2^24 rows
        indices = (uniform * self.size).long()
        obs, action, reward, next_obs, discount = self.rows.index_select(0, indices).split(self.sizes, 1)
        return Batch(obs, action, reward.squeeze(1), next_obs, discount.squeeze(1))

    def state_dict(self):
        # Only the filled rows, through NumPy: of a slice, torch.save would write all of the memory behind it
        return attributes(self) | {"rows": torch.from_numpy(self.rows[: self.added].cpu().numpy())}

    def load_state_dict(self, state):
        self.rows[: len(state["rows"])] = state["rows"]
        set_attributes(self, {name: value for name, value in state.items() if name != "rows"})


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
        return super().state_dict() | {"frames": frames, "last_obs": None}  # between episodes, the next one is new

    def load_state_dict(self, state):
        self.frames[: len(state["frames"])] = state["frames"]
        super().load_state_dict({name: value for name, value in state.items() if name != "frames"})


class OrnsteinUhlenbeckNoise(nn.Module):
    """Exploration noise, from 0 in each episode: x += -theta x dt + sigma sqrt(dt) N(0, 1), times scale (section 7)."""

    def __init__(self, scale: torch.Tensor, theta: float, sigma: float, dt: float):
        super().__init__()
        self.theta, self.sigma, self.dt = theta, sigma, dt
        self.register_buffer("scale", scale)
        self.register_buffer("x", torch.zeros_like(scale))

    def reset(self):
        self.x.zero_()

    def sample(self):
        self.x += -self.theta * self.x * self.dt + self.sigma * self.dt**0.5 * torch.randn_like(self.x)
        return self.scale * self.x


class DDPG:
    """The networks, targets, optimisers and noise of Algorithm 1, and what it does with them.

    Any attribute that you add becomes part of the checkpoints and, unless only training needs it, of model.pt.
    """

    def __init__(self, args: Args, obs_space: gym.spaces.Box, action_space: gym.spaces.Box, device: torch.device):
        enough = args.batch_size > 1 or args.pixels or args.batch_norm == "none"
        exit_unless(enough, "--batch-size must be at least 2: batch normalisation needs it")
        low, high = torch.tensor(action_space.low).float(), torch.tensor(action_space.high).float()
        norms = {}  # of the actor and the critic
        for network in "actor", "critic":
            normalised = args.batch_norm in ("both", network) and not args.pixels
            norms[network] = partial(nn.BatchNorm1d, momentum=args.batch_norm_momentum) if normalised else nn.Identity
        self.actor = Actor(obs_space.shape, low, high, norms["actor"], args.weights_init).to(device)
        self.qf = QNetwork(obs_space.shape, low, high, norms["critic"], args.weights_init).to(device)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_qf = copy.deepcopy(self.qf).requires_grad_(False)
        self.actor.eval()  # acts by running averages; the others act in update alone, and stay in training mode
        adam = dict(fused=True, capturable=args.cudagraphs)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), args.actor_lr, **adam)
        weights = [parameter for parameter in self.qf.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.qf.parameters() if parameter.ndim == 1]  # biases, normalisations
        groups = [dict(params=weights, weight_decay=args.critic_weight_decay), dict(params=others)]
        self.qf_optimizer = torch.optim.Adam(groups, args.critic_lr, **adam)
        self.noise = OrnsteinUhlenbeckNoise(self.actor.action_scale, args.ou_theta, args.ou_sigma, args.ou_dt)
        self.args, self.device = args, device
        self.obs = torch.zeros(1, *obs_space.shape, device=device)  # explore reads it there, in a CUDA graph too
        # Made once: collecting them anew takes 1 % of an update
        self.actor_parameters = [*self.actor.parameters()]
        self.parameters = [*self.actor_parameters, *self.qf.parameters()]
        self.target_parameters = [*self.target_actor.parameters(), *self.target_qf.parameters()]

    def act(self, obs: np.ndarray) -> np.ndarray:
        """The action (action_dim,) to explore with at the observation (*obs_shape)."""
        self.obs.copy_(torch.as_tensor(obs), non_blocking=True)
        self.action = self.explore()
        return self.action[0].cpu().numpy()  # the only wait for the device in a step

    @torch.no_grad()
    def explore(self):
        """mu(s) + N, within the bounds: (1, action_dim)."""
        return self.actor.clip(self.actor(self.obs) + self.noise.sample())

    def critic_loss(self, batch: Batch):
        """The mean of (y - Q(s, a))^2, equation 4; and the values Q(s, a), for the log."""
        with torch.no_grad():
            next_q = self.target_qf(batch.next_obs, self.target_actor(batch.next_obs))
            y = batch.reward + batch.discount * next_q  # equation 5, with both targets; 0 * Q' after a terminal state
        q = self.qf(batch.obs, batch.action)
        return F.mse_loss(q, y), q

    def actor_loss(self, obs):
        """Minus the mean of Q(s, mu(s)): descending it ascends the sampled policy gradient, equation 6.

        By the chain rule, the gradient of Q(s, mu(s)) is that of Q by the action, at a = mu(s), times that of mu(s).
        """
        return -self.qf(obs, self.actor(obs)).mean()

    def update_targets(self):
        """theta' <- tau theta + (1 - tau) theta', for both targets."""
        move_average = get_ema_multi_avg_fn(decay=1 - self.args.tau)
        move_average(self.target_parameters, self.parameters, None)  # which ignores its third argument

    def update(self, batch: Batch, update_actor: bool = True):
        """One update of Algorithm 1: the critic, then, if update_actor, the actor and both targets.

        Here the networks normalise by the batch's own statistics; everywhere else, by their running averages. Q's move
        twice in an update: in its own loss and in the actor's.
        Returns what is logged, still on the device: nothing here waits for it.
        """
        self.actor.train()
        qf_loss, q = self.critic_loss(batch)
        qf_loss.backward()
        self.qf_optimizer.step()
        self.qf_optimizer.zero_grad()  # now: used again while in the cache, the memory makes an update 3 % faster
        losses = {"losses/qf1_loss": qf_loss.detach(), "losses/qf1_values": q.detach().mean()}
        if update_actor:
            actor_loss = self.actor_loss(batch.obs)
            actor_loss.backward(inputs=self.actor_parameters)  # which moves mu alone, not Q
            self.actor_optimizer.step()
            self.actor_optimizer.zero_grad()
            losses["losses/actor_loss"] = actor_loss.detach()
            self.update_targets()
        self.actor.eval()
        return losses

    @torch.no_grad()
    def diagnostics(self, batch: Batch):
        """Logged beside the losses, after an update: at every step it would cost time."""
        unscaled = (self.actor(batch.obs) - self.actor.action_bias) / self.actor.action_scale
        return {
            "charts/saturated_actions": (unscaled.abs() > 0.99).float().mean(),
            "charts/exploration_difference": (self.action - self.actor(self.obs)).abs().mean(),
        }

    def state_dict(self):
        made_anew = "args device obs action explore actor_parameters parameters target_parameters".split()
        return attributes(self, but=made_anew)

    def load_state_dict(self, state):
        set_attributes(self, state)


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
            _, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            frames.append(self.frame())
            if terminated or truncated:
                frames += [frames[-1]] * (3 - len(frames))  # the last one stands in, as the first does in reset
        return torch.cat(frames).numpy(), total, terminated, truncated, info


def wrap(env: gym.Env, args: Args) -> gym.Env:
    """Add wrappers here: training and evaluation use them alike. What state they keep is in no checkpoint."""
    if args.pixels:  # scored and counted in its steps; the usual key is taken
        return gym.wrappers.RecordEpisodeStatistics(PixelObservation(env), stats_key="pixels")
    return env


@torch.no_grad()
def evaluate(agent: DDPG, envs: list[gym.Env], first_start: int = 0):
    """One episode without exploration noise in each environment, all stepped together.

    Returns three arrays (N,): the environment's own return, the discounted return of what is learnt from, and the
    critic's estimate of that.
    """
    training = agent.actor.training, agent.qf.training
    agent.actor.eval(), agent.qf.eval()
    seed = 10_000 * (agent.args.seed + 1) % (2**32 - 10_000) + first_start  # 10,000 starts of its own, below 2**32
    obs = np.array([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)], dtype=np.float32)
    discounted, running = np.zeros(len(envs)), set(range(len(envs)))
    for step in range(agent.args.max_eval_steps):
        device_obs = torch.tensor(obs, device=agent.device)
        action = agent.actor.clip(agent.actor(device_obs))
        if step == 0:
            q_estimates = agent.qf(device_obs, action).cpu().numpy()
        actions = action.cpu().numpy()
        for i in sorted(running):  # finished ones keep their rows: the batch's shape, and so the rounding, stays
            obs[i], reward, terminated, truncated, _ = envs[i].step(actions[i])
            discounted[i] += agent.args.gamma**step * reward
            if terminated or truncated:
                running.remove(i)
        if not running:
            break
        if step % 10_000 == 9_999:
            tqdm.write(f"evaluating: {len(running)} of {len(envs)} episodes run on after {step + 1:,} steps")
    if running:
        tqdm.write(f"warning: {len(running)} evaluation episodes cut at --max-eval-steps", sys.stderr)
    agent.actor.train(training[0]), agent.qf.train(training[1])
    returns = np.array([env.get_wrapper_attr("episode_returns") for env in envs])  # inside wrap()
    return returns, discounted, q_estimates


def main(args: Args):
    """Train. From a notebook: main(Args(env_id="Hopper-v5")); main(args_of("runs/NAME")) resumes a run."""
    if args.evaluate:
        return evaluate_run(args)
    device = set_up(args)
    env = make_env(args)
    env.action_space.seed(args.seed)

    # Initialise critic Q(s, a), actor mu(s), their targets and the replay buffer R
    agent = DDPG(args, env.observation_space, env.action_space, device)
    if args.pixels:
        buffer = PixelReplayBuffer(args.buffer_size, env.observation_space.shape, *env.action_space.shape, device)
    else:
        buffer = ReplayBuffer(args.buffer_size, *env.observation_space.shape, *env.action_space.shape, device)

    def learn(update_actor):
        batch = buffer.sample(args.batch_size)
        return agent.update(batch, update_actor), batch

    agent.explore, learn = accelerated(agent, buffer, learn)  # faster: --compile, --matmul, --cudagraphs

    with Run(args, device, env, agent, buffer) as run:  # --resume and --warm-start load into agent and buffer
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

            # Log, evaluate, save
            if episode_over:
                run.log_episode()
            last_step = global_step == args.total_timesteps
            evaluating = args.eval_interval and (global_step % args.eval_interval == 0 or last_step)
            saving = episode_over and run.checkpoint_due()
            if learning and (global_step % 200 == 0 or evaluating or saving or last_step):
                speed = {"charts/SPS": global_step / (time.time() - run.start_time)}
                run.log(losses | agent.diagnostics(batch) | speed)  # before saving: a NaN ends the run
            if evaluating:
                run.add_evaluation()  # a row in eval.csv, and model.pt
            if saving:
                run.save_checkpoint()
        run.finish()


# From here on: the plumbing, word for word the same in both scripts. DDPG can be understood without it.

CHECKPOINT_FORMAT = 4  # raised when the contents change: an older checkpoint is refused
TRAINING_ONLY = "target_.*|.*_optimizer|noise"  # pattern: attributes of the agent that model.pt leaves out
# Environments whose reset sets the whole state, and wrappers that keep none from episode to episode
EXACT = "gymnasium.envs.mujoco", "gymnasium.envs.classic_control", "gymnasium.wrappers.common"
EXACT += "gymnasium.wrappers.transform_", f"{__name__}.PixelObservation"
# Ranges of both scripts' flags
POSITIVE = """total_timesteps buffer_size batch_size policy_frequency eval_episodes max_eval_steps n_step
    learning_rate actor_lr critic_lr tau""".split()
NOT_NEGATIVE = """seed num_threads checkpoint_interval eval_interval final_eval_episodes learning_starts ou_theta ou_dt
    ou_sigma exploration_noise exploration_noise_final noise_anneal_steps target_noise target_noise_clip
    critic_weight_decay""".split()
UP_TO_ONE = "gamma tau batch_norm_momentum".split()
# For --matmul onednn, which must not round to bf16; oneDNN reads it at the process's first product
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"


class Run:
    """A run's folder and everything written there, its progress, its end by a signal, and its resumption."""

    def __init__(self, args: Args, device: torch.device, env: gym.Env, agent: DDPG, buffer: ReplayBuffer):
        name = args.run_name or f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-")
        self.dir = Path(args.resume or Path("runs", name.replace(":", "-")))  # Windows has no colons
        self.args, self.env, self.agent, self.buffer = args, env, agent, buffer
        self.global_step, self.saved_step, self.eval_rows, self.start_time = 0, 0, [], time.time()
        found = (self.dir / "args.json").exists()
        exit_unless(args.resume or not found, f"{self.dir} holds a run: --resume it, or choose another --run-name")
        exit_unless(found or not args.resume, f"{self.dir} holds no run to resume")
        self.refuse_what_no_checkpoint_holds()
        self.record = self.restore() if args.resume else provenance(device)
        if args.warm_start and not self.global_step:
            load_model(agent, args.warm_start)
        needed = args.eval_episodes if args.eval_interval or args.final_eval_episodes else 0
        self.eval_envs = [make_env(args, render=args.capture_video and i == 0) for i in range(needed)]

    def restore(self) -> dict:
        """Go back to the last checkpoint, if there is one yet; returns what args.json records."""
        record, path = json.loads((self.dir / "args.json").read_text(encoding="utf-8")), self.dir / "checkpoint.pt"
        checkpoint = load(path) if path.exists() else {"format": CHECKPOINT_FORMAT}
        found, saved = checkpoint.get("format"), checkpoint.get("args", record["args"])
        exit_unless(found == CHECKPOINT_FORMAT, f"{path} cannot be read by this version: its format is {found}")
        for name, value in plain(self.args).items():
            kept = name in ("resume", "total_timesteps") or saved.get(name, value) == value
            exit_unless(kept, f"--resume keeps the run's own flags (see args_of): its {name} is {saved.get(name)}")
        raised = self.args.total_timesteps - record["args"]["total_timesteps"]
        exit_unless(raised >= 0, "--total-timesteps can only be raised")
        complete = (self.dir / "result.json").exists() and not (raised and path.exists())
        extending = "extending it takes a checkpoint kept by --keep-checkpoint and a higher --total-timesteps"
        exit_unless(not complete, f"{self.dir} is complete; {extending}")
        if path.exists():
            self.agent.load_state_dict(checkpoint["agent"])
            self.buffer.load_state_dict(checkpoint["buffer"])
            random_states(self.env, restore=checkpoint["random_states"])
            self.global_step = self.saved_step = checkpoint["global_step"]
            self.eval_rows = checkpoint["eval_rows"]
            self.start_time -= checkpoint["seconds"]
        return record

    def refuse_what_no_checkpoint_holds(self):
        """Before training and after the first update, which may add attributes: not hours later."""
        for part in self.agent, self.buffer:
            for name, value in part.state_dict().items():
                try:
                    torch.save(value, file := io.BytesIO())
                    torch.load(io.BytesIO(file.getvalue()), weights_only=True)
                except Exception:  # pickle and torch raise many kinds
                    what = f"{name} of {type(part).__name__}, a {type(value).__name__}"
                    remedy = "make it a tensor or plain values, or give it state_dict and load_state_dict"
                    exit_unless(False, f"no checkpoint can hold {what}: {remedy}")

    def save_checkpoint(self):
        """At an episode's end: the next reset sets the environment's state, but for its random generator."""
        self.writer.flush()  # or a kill could lose rows from before the checkpoint
        checkpoint = dict(script=SCRIPT, format=CHECKPOINT_FORMAT, args=plain(self.args), eval_rows=self.eval_rows)
        checkpoint |= dict(global_step=self.global_step, seconds=time.time() - self.start_time)
        checkpoint |= dict(agent=self.agent.state_dict(), buffer=self.buffer.state_dict())
        save(self.dir / "checkpoint.pt", checkpoint | dict(random_states=random_states(self.env)))
        self.saved_step = self.global_step

    def checkpoint_due(self) -> bool:
        interval = self.args.checkpoint_interval
        return interval > 0 and self.global_step // interval > self.saved_step // interval

    def __enter__(self):
        """Open what is written to, when all checks are done: a refused run leaves no folder."""
        with contextlib.ExitStack() as opened:  # an error here closes what was opened before it
            opened.callback(setattr, threading, "excepthook", threading.excepthook)
            threading.excepthook = partial(self.report_thread, threading.excepthook)
            try:
                self.dir.mkdir(parents=True, exist_ok=True)
                opened.enter_context(filelock.FileLock(self.dir / ".lock", timeout=0))
                if self.args.track:
                    import wandb

                    names = dict(project=self.args.wandb_project_name, entity=self.args.wandb_entity)
                    names |= dict(name=self.dir.name, id=self.record["id"])
                    wandb.init(**names, resume="allow", sync_tensorboard=True, config=asdict(self.args))
                    opened.push(lambda kind, *_: wandb.finish(exit_code=int(kind is not None)))
                log = SummaryWriter(str(self.dir), purge_step=self.global_step + 1)  # hides rows that come again
                self.writer = opened.enter_context(log)
                (self.dir / "result.json").unlink(missing_ok=True)
                save(self.dir / "args.json", json.dumps(self.record | {"args": plain(self.args)}, indent=2))
            except filelock.Timeout:
                exit_unless(False, f"{self.dir} is in use: a run is being trained there")
            except OSError as error:
                exit_unless(False, f"cannot write to {self.dir}: {error}")
            flags = [f"|{name}|{value}|" for name, value in asdict(self.args).items()]
            self.writer.add_text("hyperparameters", "\n".join(["|flag|value|", "|-|-|", *flags]))
            self.say_what_is_run()
            total, done = self.args.total_timesteps, self.global_step
            bar = tqdm(total=total, initial=done, unit=" steps", disable=None, dynamic_ncols=True)  # not in a pipe
            self.bar = opened.enter_context(bar)
            self.opened = opened.pop_all()
        self.stop_signal, self.evaluating, self.handlers = None, False, {}
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            self.handlers = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self.printed_step, self.printed_time = self.global_step, time.time()
        return self

    def say_what_is_run(self):
        device, wrappers = self.agent.device, [self.env]
        where = f"on {device} with {torch.get_num_threads()} CPU threads"
        tqdm.write(f"{self.args.env_id} {where}; results in {self.dir}")
        memory = sum(x.nbytes for x in vars(self.buffer).values() if isinstance(x, torch.Tensor)) / 2**30
        tqdm.write(f"the replay buffer takes {memory:.2f} GiB when it is full")
        while isinstance(wrappers[-1], gym.Wrapper):
            wrappers.append(wrappers[-1].env)
        if gym.wrappers.FlattenObservation in map(type, wrappers):
            tqdm.write("note: Gymnasium's FlattenObservation makes the observations flat")
        names = [f"{type(wrapper).__module__}.{type(wrapper).__name__}" for wrapper in wrappers]
        inexact = [name.split(".")[-1] for name in names if not name.startswith(EXACT)]
        if inexact or device.type == "cuda":
            what = f"state of {', '.join(inexact)}" if inexact else "GPU's rounding"
            tqdm.write(f"note: resuming may not be exact here: no checkpoint holds the {what}")
        if device.type == "cuda" and not self.args.cudagraphs:
            tqdm.write("note: --cudagraphs makes training on a GPU several times as fast")

    def stop(self, number, frame):
        """End the run after this step, or at once in an evaluation: an exception within a write could hang the log."""
        signal.signal(number, self.handlers[number])  # a second one does what it would without this run
        self.stop_signal = number
        if self.evaluating:
            raise KeyboardInterrupt

    def report_thread(self, usual, error):
        """Other threads' errors as usual; the log's writer raises its own again at our next call to it."""
        if type(error.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
            usual(error)

    def steps(self):
        """The numbers of the remaining steps."""
        for step in range(self.global_step + 1, self.args.total_timesteps + 1):
            self.global_step = step
            yield step
            self.bar.update()
            if step == self.args.learning_starts + 1:
                self.refuse_what_no_checkpoint_holds()
            if self.stop_signal:
                raise KeyboardInterrupt

    def __exit__(self, kind, error, trace):
        self.evaluating = False
        with contextlib.suppress(OSError):  # already reported
            self.opened.__exit__(kind, error, trace)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        ended = f"ended at step {self.global_step:,}; --resume {self.dir} goes on from step {self.saved_step:,}"
        if kind is KeyboardInterrupt:
            tqdm.write(f"stopped: {ended}", sys.stderr)
            sys.exit(128 + (self.stop_signal or signal.SIGINT))
        if kind is SystemExit and isinstance(error.code, str):
            error.code = f"{error.code}; {ended}"
        if isinstance(error, Exception):
            error.add_note(f"This run {ended}")
            shown = "".join(traceback.format_exception(error))  # a full disk may be behind torch's or moviepy's error
            for number in errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS:
                if os.strerror(number) in shown:
                    sys.exit(f"error: {self.dir}: {os.strerror(number)}; {ended}")

    def log(self, scalars: dict):
        """Scalars by tag; one that is not finite ends the run."""
        for tag, value in scalars.items():
            if np.ndim(value):
                raise ValueError(f"{tag} must be a scalar, but its shape is {tuple(value.shape)}")
        scalars = {tag: float(value) for tag, value in scalars.items()}
        if not np.isfinite([*scalars.values()]).all():
            sys.exit(f"error: not finite: {scalars}; lower the learning rate, or look for huge rewards")
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, self.global_step)

    def log_episode(self):
        episodic_return = self.env.get_wrapper_attr("episode_returns")  # the environment's own, whatever wrappers do
        length = self.env.get_wrapper_attr("episode_lengths")
        self.log({"charts/episodic_return": episodic_return, "charts/episodic_length": length})
        self.bar.set_postfix_str(f"return={episodic_return:.1f}", refresh=False)

    def evaluate(self, envs: list[gym.Env], first_start: int = 0):
        """What `evaluate` returns; whatever it does, it leaves the random generators as they were."""
        states, self.evaluating = random_states(self.env), True
        self.bar.set_description("evaluating")
        returned = evaluate(self.agent, envs, first_start)
        self.bar.set_description()
        random_states(self.env, restore=states)
        self.evaluating = False
        return returned

    def add_evaluation(self):
        """To eval.csv, the log and what is printed; and model.pt."""
        envs = list(self.eval_envs)
        if self.args.capture_video:
            envs[0] = film(envs[0], self.dir, f"step-{self.global_step}")
        returns, discounted, q_estimates = self.evaluate(envs)
        if self.args.capture_video:
            envs[0].stop_recording()  # which writes the film
        self.eval_rows.append({"global_step": self.global_step} | statistics(returns))
        rows = [self.eval_rows[0].keys(), *(row.values() for row in self.eval_rows)]
        save(self.dir / "eval.csv", "".join(",".join(map(str, row)) + "\n" for row in rows))
        scalars = {"eval/episodic_return": returns.mean(), "eval/discounted_return": discounted.mean()}
        self.log(scalars | {"eval/q_estimate": q_estimates.mean()})
        self.save_model()
        speed = (self.global_step - self.printed_step) / (time.time() - self.printed_time)
        self.printed_step, self.printed_time = self.global_step, time.time()
        left = tqdm.format_interval((self.args.total_timesteps - self.global_step) / speed)
        tqdm.write(f"step {self.global_step:,}: evaluation {returns.mean():.1f}, {speed:.0f} steps/s, {left} left")

    def save_model(self):
        if self.args.save_model:
            state = {name: x for name, x in self.agent.state_dict().items() if not re.fullmatch(TRAINING_ONLY, name)}
            about = dict(script=SCRIPT, env_id=self.args.env_id, obs_shape=self.env.observation_space.shape)
            save(self.dir / "model.pt", state | about | dict(global_step=self.global_step, args=plain(self.args)))

    def finish(self):
        """A last evaluation, from starts that no other has had, and result.json: the run is complete."""
        if not self.args.eval_interval:
            self.save_model()
        episodes, at_once = self.args.final_eval_episodes, self.args.eval_episodes
        starts = range(0, episodes, at_once)
        final = [self.evaluate(self.eval_envs[: episodes - start], at_once + start)[0] for start in starts]
        # The final return: the mean of the last 10 evaluations since learning started
        last = [row["mean"] for row in self.eval_rows if row["global_step"] > self.args.learning_starts][-10:]
        result = dict(global_step=self.global_step, final_return=float(np.mean(last)) if last else None)
        result |= dict(evaluations=len(self.eval_rows), final_eval=statistics(np.concatenate(final)) if final else None)
        seconds = time.time() - self.start_time
        result |= dict(seconds=seconds, steps_per_second=self.global_step / seconds)
        for each in [self.env, *self.eval_envs]:
            each.close()
        self.writer.flush()
        save(self.dir / "result.json", json.dumps(result, indent=2))
        if not self.args.keep_checkpoint:
            (self.dir / "checkpoint.pt").unlink(missing_ok=True)
        evaluations = "evaluations" if len(last) > 1 else "evaluation"
        score = f"; final return {np.mean(last):.1f}, the mean of {len(last)} {evaluations}" if last else ""
        tqdm.write(f"complete after {self.global_step:,} steps in {tqdm.format_interval(seconds)}{score}")


def evaluate_run(args: Args):
    """--evaluate: the score of a run's model.pt, on the starts of its evaluations, or of another --seed."""
    device = set_up(args)
    envs = [make_env(args, render=args.capture_video) for _ in range(args.eval_episodes)]
    agent = DDPG(args, envs[0].observation_space, envs[0].action_space, device)
    model = load_model(agent, args.evaluate)
    trained_in = model["env_id"], model["args"].get("env_kwargs", "{}")
    if trained_in != (args.env_id, args.env_kwargs):
        tqdm.write(f"note: trained in another environment: {' '.join(trained_in)}")
    if args.capture_video:
        envs = [film(env, Path(args.evaluate), f"start-{i}") for i, env in enumerate(envs)]
    returns, *_ = evaluate(agent, envs)
    for env in envs:
        env.close()  # which writes its film
    episodes = f"{len(returns)} episode{'s' if len(returns) > 1 else ''}"
    score = f"{returns.mean():.2f} ± {returns.std():.2f} over {episodes}"
    print(f"{args.env_id} after {model['global_step']:,} steps: {score}")


def parse_args() -> Args:
    """The command line; with --resume and --evaluate, on top of the run's own flags."""
    one_rate = any(re.fullmatch("--learning[-_]rate(=.*)?", word) for word in sys.argv)
    two_rates = not hasattr(Args, "learning_rate")
    exit_unless(not (one_rate and two_rates), "the paper has two learning rates: --actor-lr and --critic-lr")
    registry = tyro.constructors.ConstructorRegistry()

    def parsed(words):  # 1e6 is an integer; 1.5 is left for set_up to refuse
        return int(float(words[0])) if float(words[0]).is_integer() else float(words[0])

    spec = tyro.constructors.PrimitiveConstructorSpec
    integer = spec(1, "INT", parsed, lambda n: isinstance(n, int), lambda n: [str(n)])
    registry.primitive_rule(lambda info: integer if info.type is int else None)
    args = tyro.cli(Args, registry=registry)
    exit_unless(not (args.resume and args.evaluate), "--resume and --evaluate cannot be combined")
    if run_dir := args.resume or args.evaluate:
        args = tyro.cli(Args, default=args_of(run_dir, evaluate=bool(args.evaluate)), registry=registry)
    return args


def args_of(run_dir: str, evaluate: bool = False, **changes) -> Args:
    """The flags with which to resume a run, or to evaluate its model."""
    try:
        if evaluate:
            saved, own = load(Path(run_dir, "model.pt")), dict(evaluate=run_dir, capture_video=False)
        else:
            saved, own = json.loads(Path(run_dir, "args.json").read_text(encoding="utf-8")), dict(resume=run_dir)
        exit_unless(saved["script"] == SCRIPT, f"{run_dir} holds a run of {saved['script']}.py")
        flags = {name: tuple(flag) if isinstance(flag, list) else flag for name, flag in saved["args"].items()}
        return Args(**flags | own | changes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        exit_unless(False, f"{run_dir} holds no run of {SCRIPT}.py: {type(error).__name__}: {error}")


def plain(args: Args) -> dict:
    """The flags as JSON gives them back: in new strings, since pickle writes a shared one differently."""
    return json.loads(json.dumps(asdict(args) | {"resume": None}))


def exit_unless(condition, message: str):
    """On bad input, print one line and exit with code 2; a run that fails later exits with 1."""
    if not condition:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


def set_up(args: Args) -> torch.device:
    """Checks the flags, sets the seeds and torch's switches."""
    for field in fields(args):
        value, flag = getattr(args, field.name), f"--{field.name.replace('_', '-')}"
        if int in (field.type, *get_args(field.type)) and isinstance(value, float):
            exit_unless(value.is_integer(), f"{flag} must be an integer, not {value}")
            setattr(args, field.name, int(value))
        choices = get_args(field.type) if get_origin(field.type) is Literal else [value]
        exit_unless(value in choices, f"{flag} must be one of {choices}, not {value}")
        exit_unless(field.name not in POSITIVE or 0 < value < np.inf, f"{flag} must be positive, not {value}")
        exit_unless(field.name not in NOT_NEGATIVE or 0 <= value < np.inf, f"{flag} must be at least 0, not {value}")
        exit_unless(field.name not in UP_TO_ONE or 0 <= value <= 1, f"{flag} must be in [0, 1], not {value}")
    exit_unless(args.seed < 2**32, f"--seed must be below 2**32, not {args.seed}")
    learns = f"--learning-starts {args.learning_starts:,} must be below --total-timesteps {args.total_timesteps:,}"
    exit_unless(args.learning_starts < args.total_timesteps, learns)
    n_step = getattr(args, "n_step", 1)  # of the tuned script alone
    exit_unless(n_step <= args.learning_starts + 1, "--learning-starts must be at least --n-step - 1")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if not args.evaluate:
        exit_unless(device.type == "cuda" or not args.cudagraphs, "--cudagraphs needs a CUDA device")
        exit_unless(not args.track or find_spec("wandb"), "--track needs Weights & Biases: pip install wandb")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    if args.matmul == "auto":  # on AMD's CPUs from Zen 5 on, oneDNN does twice as many products a second as MKL
        cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        family = re.search(r"AuthenticAMD\ncpu family\s*: (\d+)", cpu)
        args.matmul = "onednn" if family and int(family[1]) >= 26 else "mkl"
    torch.set_flush_denormal(True)  # numbers below 1e-38 become 0: Intel's CPUs are slow with them
    torch.backends.cudnn.deterministic = args.torch_deterministic
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    return device


def checked(what: str, shape: tuple[int, ...], numbers) -> np.ndarray:
    """A copy: some environments change the action they are given, or hand out the same array every time."""
    if np.shape(numbers) != shape or not np.isfinite(numbers).all():
        shown = " ".join(str(numbers).split())
        sys.exit(f"error: {what} must be finite and of shape {shape}, but is {shown}")
    return np.array(numbers)


def make_env(args: Args, render: bool = False) -> gym.Env:
    env_id, pixels = args.env_id, getattr(args, "pixels", False)
    states = random_states()  # an environment may draw numbers, or seed, as it is made
    warnings.filterwarnings("ignore", module="glfw")  # both warnings are in the error below, too
    warnings.filterwarnings("ignore", ".*not in the possible render_modes")
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):  # render without a screen
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    try:
        import mujoco  # fails where MUJOCO_GL names a GL that is not there

        mujoco.set_mju_user_warning(lambda text: None if "deprecated" in text else tqdm.write(text, sys.stderr))
        kwargs = json.loads(args.env_kwargs) | ({"render_mode": "rgb_array"} if render or pixels else {})
        env = gym.make(env_id, **kwargs)
        action = env.action_space
        env = gym.wrappers.TransformAction(  # float32 may miss the bounds by a hair
            env, lambda x: np.clip(checked("the action", action.shape, x), action.low, action.high), action
        )
        env = gym.wrappers.TransformReward(env, lambda x: float(checked("the environment's reward", (), x)))
        env = wrap(gym.wrappers.RecordEpisodeStatistics(env, stats_key=SCRIPT), args)  # it may have another inside
        renderer = getattr(env.unwrapped, "mujoco_renderer", None)
        chosen = {"camera_id", "camera_name", "default_camera_config"} & env.spec.kwargs.keys()
        if renderer and not chosen and not pixels:  # film with the camera that follows the robot, if there is one
            renderer.camera_id = mujoco.mj_name2id(env.unwrapped.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        if "render_mode" in kwargs:
            env.reset(seed=0)  # at its first picture MuJoCo's camera takes its place for good
            env.render()
    except Exception as error:  # a missing GL, for one, shows in many ways
        place = traceback.extract_tb((error.__cause__ or error).__traceback__)[-1]
        cause = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        remedy = "; without a screen: MUJOCO_GL=egl, and apt-get install libegl1 libgl1-mesa-dri"
        remedy = remedy if render or pixels else ""
        exit_unless(False, f"cannot make {env_id} with --env-kwargs {args.env_kwargs}: {cause}{remedy}")
    random_states(restore=states)
    obs = env.observation_space
    continuous = isinstance(action, gym.spaces.Box) and action.dtype.kind == "f" and len(action.shape) == 1
    exit_unless(continuous, f"DDPG needs a continuous action space, a flat Box of floats: {env_id} has {action}")
    usable = (action.low < action.high).all() and np.abs([action.low, action.high]).max() < 1e38
    exit_unless(usable, f"DDPG needs an action space with finite bounds that differ: {env_id} has {action}")
    box = isinstance(obs, gym.spaces.Box)
    images = box and len(obs.shape) > 1 and (obs.dtype == np.uint8 or (obs.low.min(), obs.high.max()) == (0, 255))
    exit_unless(pixels or not images, f"{env_id} observes images: ddpg_paper_faithful.py --pixels learns from pixels")
    exit_unless(obs.is_np_flattenable, f"Gymnasium cannot make the observations flat: {env_id} has {obs}")
    if not images and not (box and len(obs.shape) == 1):
        env = gym.wrappers.FlattenObservation(env)
    obs = env.observation_space
    return gym.wrappers.TransformObservation(env, partial(checked, "the observation", obs.shape), obs)


def film(env: gym.Env, run_dir: Path, name: str) -> gym.Env:
    warnings.filterwarnings("ignore", ".*Overwriting existing videos")
    return gym.wrappers.RecordVideo(env, str(run_dir / "videos"), lambda _: True, name_prefix=name)


def save(path: Path, contents):
    """Write text, or with torch.save anything else; at every moment the old or the new file is there, complete."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        file.write(contents.encode()) if isinstance(contents, str) else torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())
    if not isinstance(contents, str):  # what cannot be read must not take the place of what can
        torch.load(temporary, weights_only=True, mmap=True)
    temporary.replace(path)


def load(path: Path) -> dict:
    """What this script saved, if every byte is intact; else one line and exit code 2."""
    try:
        with zipfile.ZipFile(path) as archive:
            exit_unless(archive.testzip() is None, f"{path} is corrupt")
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch and zipfile raise many kinds on a broken file
        exit_unless(False, f"cannot read {path}: {error}".splitlines()[0])
    found = contents.get("script") if isinstance(contents, dict) else None
    exit_unless(found == SCRIPT, f"{path} belongs to another run or script: its script is {found}, not {SCRIPT}")
    return contents


def load_model(agent: DDPG, run_dir: str) -> dict:
    """Load a run's model.pt into the agent, its targets too: a warm start must not begin with random ones."""
    path, bounds = Path(run_dir, "model.pt"), torch.cat([agent.actor.action_low, agent.actor.action_high])
    model = load(path)
    try:
        state = {name: model[name] for name in agent.state_dict() if not re.fullmatch(TRAINING_ONLY, name)}
        state |= {f"target_{name}": state[name] for name in state if hasattr(agent, f"target_{name}")}
        agent.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        exit_unless(False, f"{path} does not fit this environment and these flags: {error}")
    same = bounds.equal(torch.cat([agent.actor.action_low, agent.actor.action_high]))
    exit_unless(same, f"{path} is for other action bounds")
    return model


def attributes(part, but=()) -> dict:
    """What a checkpoint keeps of an object: each attribute, or its state_dict() if it has one."""
    own = {name: value for name, value in vars(part).items() if name not in but}
    return {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in own.items()}


def set_attributes(part, state: dict):
    for name, value in copy.deepcopy(state).items():  # a copy: what was loaded is mapped from its file
        own = getattr(part, name, None)
        if hasattr(own, "load_state_dict"):
            own.load_state_dict(value)
        elif isinstance(own, torch.Tensor) and isinstance(value, torch.Tensor):
            own.data = value.to(own.device)
        else:
            setattr(part, name, value)


def statistics(returns: np.ndarray) -> dict:
    values = dict(mean=returns.mean(), std=returns.std(), min=returns.min(), max=returns.max())
    return {name: float(value) for name, value in values.items()} | {"episodes": len(returns)}


def provenance(device: torch.device) -> dict:
    """The code, its defaults, the versions and the machine."""
    git = "git describe --always --dirty --abbrev=40 --exclude=*"
    commit = subprocess.run(git, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    code = dict(script=SCRIPT, commit=commit, sha256=hashlib.sha256(Path(__file__).read_bytes()).hexdigest())
    versions = {name: version(name) for name in ("torch", "gymnasium", "mujoco", "numpy")}
    versions["python"] = platform.python_version()
    hardware = dict(platform=platform.platform(), cpus=os.cpu_count(), threads=torch.get_num_threads())
    hardware["gpu"] = torch.cuda.get_device_name() if device.type == "cuda" else None
    return code | dict(id=os.urandom(4).hex(), defaults=plain(Args()), versions=versions, hardware=hardware)


def random_states(env: gym.Env | None = None, restore: dict | None = None) -> dict:
    """The random generators' states as plain values, the environment's too; before, sets them as in `restore`."""
    own = dict(env=getattr(env.unwrapped, "np_random", None), action=env.action_space.np_random) if env else {}
    own = {name: rng.bit_generator for name, rng in own.items() if isinstance(rng, np.random.Generator)}
    if restore:
        torch.set_rng_state(restore["torch"])
        if restore["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(restore["cuda"])
        random.setstate(restore["python"])
        numpy, states = json.loads(restore["numpy"])
        np.random.set_state(numpy)
        for name in own.keys() & states.keys():
            if own[name].state["bit_generator"] == states[name]["bit_generator"]:
                own[name].state = states[name]
    numpy = np.random.get_state(legacy=False), {name: rng.state for name, rng in own.items()}
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    states = dict(torch=torch.get_rng_state(), cuda=cuda, python=random.getstate())
    return states | dict(numpy=json.dumps(numpy, default=np.ndarray.tolist))


def allocate(*shape: int, device: torch.device, dtype=torch.float32) -> torch.Tensor:
    """Memory for the replay buffer, uninitialised, if there is enough; else one line and exit code 2."""
    free = psutil.virtual_memory().available
    for limit in "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes":  # of a container
        with contextlib.suppress(OSError, ValueError):
            free = min(free, int(Path(limit).read_text()))
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    needed = np.prod(shape, dtype=float) * dtype.itemsize
    sizes = f"{needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
    exit_unless(needed < free, f"the replay buffer needs {sizes}: lower --buffer-size")
    return torch.empty(shape, dtype=dtype, device=device)


def accelerated(agent: DDPG, buffer: ReplayBuffer, learn):
    """agent.explore and learn as --compile, --matmul and --cudagraphs ask for."""
    args, explore = agent.args, agent.explore
    if args.compile:
        learn = compiled(learn, agent)
    if agent.device.type == "cpu" and args.matmul == "onednn":
        probe = torch.full((64, 64), 1 + 2**-12)  # bf16 rounds it to 1
        exact = by_onednn(torch.mm, probe, torch.eye(64)).equal(probe)
        exit_unless(exact, f"something multiplied before {SCRIPT} was imported, and oneDNN has bf16: take --matmul mkl")
        learn = partial(by_onednn, learn)  # acting stays with MKL, which starts small products sooner
    if args.cudagraphs:
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.Stream())  # recording needs its first calls off the default stream
        explore, learn = cuda_graphed(explore, agent, buffer), cuda_graphed(learn, agent, buffer)
    return explore, learn


def compiled(learn, agent: DDPG):
    """`learn` as one graph, with backward and Adam in it."""
    try:
        torch.compile(torch.sin)(torch.zeros(9, device=agent.device))
    except Exception as error:  # of many kinds
        exit_unless(False, f"--compile needs a C++ compiler, such as g++: {error}".splitlines()[0])
    torch.compiler.reset()  # what a notebook's earlier runs compiled: there is a limit to how often
    torch._dynamo.config.trace_autograd_ops = True
    torch._inductor.config.fallback_random = True  # torch's own random numbers
    graph = torch.compile(learn, fullgraph=True, options={"cpp_wrapper": agent.device.type == "cpu"})
    for optimizer in vars(agent).values():
        if type(optimizer) is torch.optim.Adam:  # its methods cannot be traced, nor can making its state
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for parameter in parameters:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = moments | {"step": torch.zeros((), device=agent.device)}
            optimizer.zero_grad, optimizer.step = partial(zero_grad, parameters), partial(adam_step, optimizer)

    def learn_compiled(update_actor):
        try:
            return graph(update_actor)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            sys.exit(f"error: --compile cannot make this update one graph ({reason}): leave it away")

    return learn_compiled


def zero_grad(parameters: list[nn.Parameter]):
    for parameter in parameters:
        parameter.grad = None


@torch.no_grad()
def adam_step(optimizer: torch.optim.Adam):
    """Adam (Kingma & Ba 2015, algorithm 1) in plain operations."""
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            state, gradient = optimizer.state[parameter], parameter.grad + group["weight_decay"] * parameter
            state["step"].add_(1)
            state["exp_avg"].lerp_(gradient, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            mean = state["exp_avg"] / (1 - beta1 ** state["step"])
            square = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
            parameter.sub_(group["lr"] * mean / (square.sqrt() + group["eps"]))


def by_onednn(function, *arguments):
    torch.set_float32_matmul_precision("medium")  # hands products to oneDNN, with leave to use bf16, which it lacks
    result = function(*arguments)
    torch.set_float32_matmul_precision("highest")
    return result


def cuda_graphed(function, agent: DDPG, buffer: ReplayBuffer):
    """`function` replayed as a CUDA graph; the first three calls run as usual.

    A graph repeats what Python read when it was recorded, so there is one for each set of arguments and of numbers and
    switches among the attributes of the agent, its noise, its optimisers and the buffer.
    """
    calls, graphs, outputs, read, graphing = {}, {}, {}, [], True

    def stop(reason: str):
        nonlocal graphing
        graphing = False
        tqdm.write(f"warning: no CUDA graphs from here on: {reason}", sys.stderr)

    def call(*arguments):
        if not calls:
            optimizers = [value for value in vars(agent).values() if isinstance(value, torch.optim.Optimizer)]
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            for part in vars(agent), vars(agent.noise), vars(buffer), *groups:
                names = [name for name, value in part.items() if isinstance(value, int | float)]
                read.extend((part, name) for name in names if name not in ("added", "placed"))  # read by no graph
        key = arguments, *(part[name] for part, name in read)
        if graphing:
            calls[key] = calls.get(key, 0) + 1
            if len(calls) > 16:
                stop("a number that an update may read keeps changing")
        if not graphing or calls[key] <= 3:  # what happens once, like making Adam's state, must not be recorded
            return function(*arguments)
        if key not in graphs:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    outputs[key] = function(*arguments)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                stop(f"an update cannot be recorded ({reason})")
                return function(*arguments)
            graphs[key] = graph
        graphs[key].replay()
        return outputs[key]

    return call


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="replace")  # in a log file too; and where there is no ±
    main(parse_args())
