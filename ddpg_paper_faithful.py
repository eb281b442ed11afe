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

| paper silent        | here                           | because                                                       |
|---------------------|--------------------------------|---------------------------------------------------------------|
| mode for targets    | the batch's own statistics     | experiment: best on one task, within the spread on the other  |
| OU time step        | 1: its noise forgets in 6      | experiment: better on both tasks than 0.01, forgetting in 666 |
| warm-up             | 1,000 uniformly random steps   | experiment: level with 64; 10,000 of its 20,000 were too many |
| normalisation where | before ReLU, not at the output | as its inventors do; section 7 has the output start near zero |
| terminal states     | no value after `terminated`    | nothing is earned there; Algorithm 1 would bootstrap always   |
| L2: biases; factor  | all of Q; gradient of w/2 x^2  | "on Q", and what weight_decay stands for in libraries         |
| pixels: kernel; a   | 3 x 3, stride 2; at layer two  | 471,000 weights, near the paper's 430,000; as from states     |

The experiment is benchmark/paper_decisions.py; its result, on two environments, lies in benchmark/results/.
"""

import contextlib
import copy
import functools
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

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
signals: list[int] = []  # that ask the run to stop
EVAL_COLUMNS = ["global_step", "mean", "std", "min", "max", "episodes"]
EVENT_FILES = "events.out.tfevents.*"  # TensorBoard's
LOG_INTERVAL = 200  # steps between rows of losses and diagnostics: reading them more often would cost time
CHECKPOINT_FORMAT = 1  # raised when the contents change: an older checkpoint is refused
EXACT_ENVS = "gymnasium.envs.mujoco", "gymnasium.envs.classic_control"  # their reset sets the whole state


def parse_int(text: str) -> int:
    """An integer as people type it: 1000000, 1_000_000 or 1e6, but not 1.5."""
    if not float(text).is_integer():
        raise ValueError(f"{text} is not an integer")
    return int(float(text))


Spec = tyro.constructors.PrimitiveConstructorSpec
Int = Annotated[int, Spec(1, "INT", lambda s: parse_int(s[0]), lambda n: isinstance(n, int), lambda n: [str(n)])]


@dataclass
class Args:
    # Experiment
    exp_name: str = SCRIPT
    """name of the experiment, a part of the run's name"""
    run_name: str | None = None
    """folder of this run in runs/; by default {env_id}__{exp_name}__{seed}__{unix time}"""
    seed: Int = 1
    """seed of the networks, the environment, the exploration and the sampling of batches"""
    torch_deterministic: bool = True
    """let cuDNN use deterministic algorithms only"""
    cuda: bool = True
    """train on the GPU if there is one"""
    cudagraphs: bool = False
    """on a GPU, replay acting and the whole update as CUDA graphs"""
    compile: bool = False
    """on a GPU, torch.compile acting and the update, alone or under --cudagraphs"""
    num_threads: Int = 0
    """CPU threads for torch; 0 leaves torch's own choice, 1 is best for several runs on one machine"""
    track: bool = False
    """mirror the TensorBoard log to Weights & Biases"""
    wandb_project_name: str = "ddpg"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases user or team"""
    save_model: bool = True
    """write model.pt at each evaluation and at the end"""
    checkpoint_interval: Int = 50_000
    """steps between checkpoints, each written when the episode under way has ended; 0 = none"""
    keep_checkpoint: bool = False
    """keep the last checkpoint of a finished run, for --resume to extend it"""
    resume: str | None = None
    """folder of a broken-off run, to go on with under its own flags; only --total-timesteps may be raised"""

    # Evaluation
    eval_interval: Int = 5_000
    """steps between evaluations, which are without exploration noise; 0 = none"""
    eval_episodes: Int = 10
    """episodes of one evaluation"""
    capture_video: bool = False
    """film the first episode of each evaluation, with --evaluate every episode, into the run's videos/"""
    evaluate: str | None = None
    """folder of a run, to evaluate its model instead of training"""

    # Algorithm
    env_id: str = "HalfCheetah-v5"
    """Gymnasium environment with a flat Box observation and a bounded Box action; module:EnvId imports module first"""
    total_timesteps: Int = 1_000_000
    """environment steps of the run"""
    actor_lr: float = 1e-4
    """Adam's learning rate for the actor (section 7)"""
    critic_lr: float = 1e-3
    """Adam's learning rate for the critic (section 7)"""
    critic_weight_decay: float = 1e-2
    """L2 weight decay of the critic, not of the actor (section 7)"""
    buffer_size: Int = 1_000_000
    """transitions that the replay buffer holds (section 7)"""
    gamma: float = 0.99
    """discount factor (section 7)"""
    tau: float = 0.001
    """part of the way that the targets go towards the networks in an update (section 7)"""
    batch_size: Int | None = None
    """transitions in a batch; by default 64, and 16 from pixels (section 7)"""
    ou_theta: float = 0.15
    """pull of the Ornstein-Uhlenbeck noise back to zero (section 7)"""
    ou_sigma: float = 0.2
    """size of the Ornstein-Uhlenbeck noise's steps, in halves of the action range (section 7)"""
    ou_dt: float = 1.0
    """time step of the Ornstein-Uhlenbeck noise: 1 forgets in 6 steps, 0.01 in 666 (the paper is silent)"""
    batch_norm: bool = True
    """batch normalisation (section 3), but from pixels none"""
    weights_init: Literal["paper", "xavier", "kaiming"] = "paper"
    """initial weights of the hidden layers; paper: uniform within 1/sqrt(fan-in) (section 7)"""
    pixels: bool = False
    """learn from rendered frames: a step repeats the action three times and observes 3 x 64 x 64 RGB"""
    learning_starts: Int = 1_000
    """steps of uniformly random actions before learning starts (the paper is silent)"""
    policy_frequency: Int = 1
    """critic updates to one update of the actor and the targets (Algorithm 1: 1)"""

    def __post_init__(self):
        if self.batch_size is None:
            self.batch_size = 16 if self.pixels else 64


def init_weights(network: nn.Module, output: nn.Linear, output_bound: float, weights_init: str):
    """Section 7: every layer uniform within 1/sqrt(fan-in), the output layer within output_bound, biases too."""
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


def input_layers(obs_shape: tuple[int, ...], batch_norm: bool):
    """What meets the observation, the normalisation, the sizes (input, first, second), the output layer's bound."""
    if len(obs_shape) == 3:
        return Convolutions(), nn.Identity, (2048, 200, 200), 3e-4
    norm = nn.BatchNorm1d if batch_norm else nn.Identity
    return norm(*obs_shape), norm, (*obs_shape, 400, 300), 3e-3


class QNetwork(nn.Module):
    """Action value Q(s, a): observations (N, *obs_shape) and actions (N, action_dim) to values (N,)."""

    def __init__(self, obs_shape, action_dim: int, batch_norm: bool = True, weights_init: str = "paper"):
        super().__init__()
        self.input, norm, (size0, size1, size2), output_bound = input_layers(obs_shape, batch_norm)
        self.fc1 = nn.Linear(size0, size1)
        self.norm1 = norm(size1)  # section 3: all layers before the action
        self.fc2 = nn.Linear(size1 + action_dim, size2)  # section 7: where the action enters
        self.fc3 = nn.Linear(size2, 1)
        init_weights(self, self.fc3, output_bound, weights_init)

    def forward(self, obs, action):
        x = F.relu(self.norm1(self.fc1(self.input(obs))), inplace=True)  # in place: 2 % of an update on a CPU
        x = F.relu(self.fc2(torch.cat([x, action], 1)), inplace=True)
        return self.fc3(x).squeeze(1)  # with (N, 1), y - q would broadcast to (N, N)


class Actor(nn.Module):
    """Deterministic policy mu(s): observations (N, *obs_shape) to actions (N, action_dim) within [low, high]."""

    def __init__(self, obs_shape, low, high, batch_norm: bool = True, weights_init: str = "paper"):
        super().__init__()
        self.input, norm, (size0, size1, size2), output_bound = input_layers(obs_shape, batch_norm)
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
        """Noise takes actions out of the bounds, and so, by a hair, does the rounding of scale and bias."""
        return action.clamp(self.action_low, self.action_high)


class Batch(NamedTuple):
    obs: torch.Tensor  # (N, obs_dim)
    action: torch.Tensor  # (N, action_dim)
    reward: torch.Tensor  # (N,)
    next_obs: torch.Tensor  # (N, obs_dim)
    terminated: torch.Tensor  # (N,), 1 after a terminal state; a time limit is not one


def copy_async(array: np.ndarray, destination: torch.Tensor):
    """Copy to the device without waiting for it: from memory that is pinned, where that is a GPU."""
    source = torch.tensor(array, dtype=torch.float32, pin_memory=destination.is_cuda)
    destination.copy_(source, non_blocking=True)


class ReplayBuffer:
    """The last `capacity` transitions on the training device, one float32 row each: a batch is a single gather."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.sizes = [obs_dim, action_dim, 1, obs_dim, 1]
        self.rows = torch.empty(capacity, sum(self.sizes), device=device)
        self.stored = {"rows": self.rows}  # what a checkpoint keeps
        self.size = torch.zeros((), dtype=torch.int64, device=device)  # on the device, where a CUDA graph reads it
        self.added = 0

    def add(self, obs, action, reward, next_obs, terminated):
        row = np.concatenate([obs, action, [reward], next_obs, [terminated]])
        copy_async(row, self.rows[self.added % len(self.rows)])
        self.added += 1
        self.size.fill_(min(self.added, len(self.rows)))

    def sample(self, batch_size: int) -> Batch:
        """Transitions drawn uniformly, with replacement."""
        uniform = torch.rand(batch_size, dtype=torch.float64, device=self.rows.device)
        self.indices = (uniform * self.size).long()
        obs, action, reward, next_obs, terminated = self.rows.index_select(0, self.indices).split(self.sizes, 1)
        return Batch(obs, action, reward.squeeze(1), next_obs, terminated.squeeze(1))

    def state_dict(self):
        # By way of NumPy: of a slice, torch.save would write all that lies behind it
        filled = {name: tensor[: min(self.added, len(tensor))].cpu().numpy() for name, tensor in self.stored.items()}
        return {"added": self.added} | {name: torch.from_numpy(array) for name, array in filled.items()}

    def load_state_dict(self, state):
        self.added = state["added"]
        for name, tensor in self.stored.items():
            tensor[: len(state[name])] = state[name]
        self.size.fill_(len(state["rows"]))


class PixelReplayBuffer(ReplayBuffer):
    """The same for pixels: float32 rows without observations, and beside them uint8 frames (capacity, 2, 9, 64, 64)."""

    def __init__(self, capacity: int, obs_shape: tuple[int, ...], action_dim: int, device: torch.device):
        super().__init__(capacity, 0, action_dim, device)
        self.frames = torch.empty(capacity, 2, *obs_shape, dtype=torch.uint8, device=device)
        self.stored["frames"] = self.frames

    def add(self, obs, action, reward, next_obs, terminated):
        self.frames[self.added % len(self.rows)] = torch.from_numpy(np.stack([obs, next_obs]))
        super().add([], action, reward, [], terminated)

    def sample(self, batch_size: int) -> Batch:
        batch = super().sample(batch_size)
        obs, next_obs = self.frames.index_select(0, self.indices).unbind(1)
        return batch._replace(obs=obs, next_obs=next_obs)


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


@torch.no_grad()
def explore(actor, obs, noise):
    """The greedy action mu(s) and the explored one, mu(s) + N within the bounds, stacked: (2, action_dim)."""
    greedy = actor(obs)
    return torch.cat([greedy, actor.clip(greedy + noise.sample())])


def critic_loss(qf, target_actor, target_qf, batch, gamma):
    """The mean of (y - Q(s, a))^2, equation 4, and the values Q(s, a)."""
    with torch.no_grad():
        next_q = target_qf(batch.next_obs, target_actor(batch.next_obs))
        y = batch.reward + gamma * (1 - batch.terminated) * next_q  # equation 5, but no value after a terminal state
    q = qf(batch.obs, batch.action)
    return F.mse_loss(q, y), q


def actor_loss(actor, qf, obs):
    """Minus the mean of Q(s, mu(s)): descending it ascends the sampled policy gradient, equation 6."""
    return -qf(obs, actor(obs)).mean()


def descend(optimizer, loss):
    """A step down the loss; gradients are taken of the optimiser's own parameters, so of the actor's alone or Q's."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


def update(actor, qf, target_actor, target_qf, actor_optimizer, qf_optimizer, batch, gamma, tau, update_actor=True):
    """One update of Algorithm 1: the critic, then the actor, then both targets.

    Here all four networks normalise by the batch's own statistics; everywhere else, by their running averages.
    Returns what is logged, still on the device: nothing here waits for it. Gradients stay in the parameters.
    """
    for network in actor, qf, target_actor, target_qf:
        network.train()
    qf_loss, q = critic_loss(qf, target_actor, target_qf, batch, gamma)
    descend(qf_optimizer, qf_loss)
    losses = {"losses/qf1_loss": qf_loss.detach(), "losses/qf1_values": q.detach().mean()}
    if update_actor:
        mu_loss = actor_loss(actor, qf, batch.obs)
        descend(actor_optimizer, mu_loss)
        losses["losses/actor_loss"] = mu_loss.detach()
        with torch.no_grad():  # theta' <- tau theta + (1 - tau) theta'
            targets = [*target_actor.parameters(), *target_qf.parameters()]
            torch._foreach_lerp_(targets, [*actor.parameters(), *qf.parameters()], tau)
    actor.eval(), qf.eval()
    return losses


@torch.no_grad()
def evaluate(actor, qf, envs, seed, gamma):
    """One episode without exploration noise in each environment, all stepped together.

    Every evaluation of a run meets the same starts, and no other run does. Finished episodes keep their rows in the
    batch: its shape, and with it the rounding of the others' actions, stays the same. Returns three arrays (N,): the
    return, the discounted return, and what the critic made of that at the start.
    """
    starts = [env.reset(seed=10_000 * (seed + 1) + i)[0] for i, env in enumerate(envs)]
    obs = torch.tensor(np.array(starts), dtype=torch.float32)
    returns, discounted, step, running = np.zeros(len(envs)), np.zeros(len(envs)), 0, set(range(len(envs)))
    while running and not (signals and step):
        device_obs = obs.to(actor.action_low.device)
        action = actor.clip(actor(device_obs))
        if step == 0:
            q_estimates = qf(device_obs, action).cpu().numpy()
        actions = action.cpu().numpy()
        for i in sorted(running):
            next_obs, reward, terminated, truncated, _ = envs[i].step(actions[i])
            obs[i] = torch.as_tensor(next_obs)
            returns[i] += reward
            discounted[i] += gamma**step * reward
            if terminated or truncated:
                running.remove(i)
        step += 1
    for env in envs:
        if isinstance(env, gym.wrappers.RecordVideo):
            with going_on("the video"):
                env.stop_recording()  # which writes it
            env.recorded_frames, env.recording = [], False
    return returns, discounted, q_estimates


def require(condition, message):
    """Bad input: one line and exit code 2, before anything is written."""
    if not condition:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def say(text: str, file=None):
    with contextlib.suppress(OSError):  # the disk that is full may be the one this goes to
        tqdm.write(text, file=file)
        (file or sys.stdout).flush()


warn = functools.cache(lambda text: say(f"warning: {text}", sys.stderr))  # each text once


@contextlib.contextmanager
def going_on(path):
    """Training does not need what is written here: where that fails, one line says so."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        while error.__context__:  # torch.save's own error hides the disk's
            error = error.__context__
        warn(f"cannot write {path}, training goes on: {error}".partition("\n")[0])


def check_args(args: Args):
    require(0 <= args.gamma <= 1, f"--gamma must be in [0, 1], not {args.gamma}")
    require(0 < args.tau <= 1, f"--tau must be in (0, 1], not {args.tau}")
    positive = "total_timesteps buffer_size batch_size policy_frequency eval_episodes actor_lr critic_lr".split()
    for name, value in asdict(args).items():
        if isinstance(value, int | float):
            fine, limit = (value > 0, "positive") if name in positive else (value >= 0, "at least 0")
            require(fine and value < np.inf, f"--{name.replace('_', '-')} must be {limit}, not {value}")
    enough = args.batch_size > 1 or args.pixels or not args.batch_norm
    require(enough, "--batch-size must be at least 2: batch normalisation needs it")
    require(args.batch_size <= args.buffer_size, "--buffer-size must hold a batch, --batch-size")
    require(args.learning_starts < args.total_timesteps, "--learning-starts must be below --total-timesteps, to learn")
    require(args.seed < 2**32, "--seed must be below 2**32")
    if not args.evaluate:
        gpu = args.cuda and torch.cuda.is_available()
        require(gpu or not (args.cudagraphs or args.compile), "--cudagraphs and --compile need a CUDA device")
        require(not args.track or find_spec("wandb"), "--track needs Weights & Biases: pip install wandb")


class PixelObservation(gym.Wrapper):
    """A step repeats the action three times, sums the rewards and observes the three 64 x 64 frames (section 4)."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (9, 64, 64), np.uint8)
        if renderer := getattr(env.unwrapped, "mujoco_renderer", None):
            renderer.width = renderer.height = 64  # sooner than drawing 480 x 480 and shrinking

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
            total += float(reward)
            frames.append(self.frame())
            if terminated or truncated:
                frames += [frames[-1]] * (3 - len(frames))  # the last one stands in, as the first does in reset
        return torch.cat(frames).numpy(), total, terminated, truncated, info


def make_env(args: Args, render: bool = False) -> gym.Env:
    env_id, options = args.env_id, dict(render_mode="rgb_array") if render or args.pixels else {}
    try:
        import mujoco  # fails where MUJOCO_GL names a GL that is not there

        mujoco.set_mju_user_warning(lambda text: warn(f"MuJoCo: {text.partition(' Time')[0]}"))
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
        env = gym.make(env_id, **options)  # names the near matches of an unknown id
        env = PixelObservation(env) if args.pixels else env
        if options:
            env.reset(seed=0)  # the first picture decides where MuJoCo's camera looks
            env.render()
    except Exception as error:  # a missing GL, for one, shows in many ways
        remedy = "; without a screen: MUJOCO_GL=egl, and apt-get install libegl1 libgl1-mesa-dri" if options else ""
        require(False, " ".join(f"cannot make {env_id}: {error}{remedy}".split()))
    obs, action = env.observation_space, env.action_space
    require(isinstance(action, gym.spaces.Box), f"DDPG needs a continuous action space (Box): {env_id} has {action}")
    require(action.is_bounded(), f"DDPG needs bounded actions: {env_id} has {action}")
    require(isinstance(obs, gym.spaces.Box), f"the observation space must be a Box: {env_id} has {obs}")
    flat = args.pixels or len(obs.shape) == 1
    require(args.pixels or len(obs.shape) < 3, f"{env_id} observes images: --pixels learns from pixels")
    require(flat and len(action.shape) == 1, f"{env_id} needs flat spaces, but has {obs} and {action}")
    return env


def float32_bounds(space: gym.spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """The bounds (action_dim,), rounded inwards: to the nearest float32, 0.4 would be 0.40000001."""
    low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    inner_low, inner_high = np.nextafter(low, high), np.nextafter(high, low)
    return np.where(low < space.low, inner_low, low), np.where(high > space.high, inner_high, high)


def make_eval_envs(args: Args, run_dir: Path) -> list[gym.Env]:
    filmed = args.capture_video * (args.eval_episodes if args.evaluate else 1)
    envs = [make_env(args, render=i < filmed) for i in range(args.eval_episodes)]
    for i in range(filmed):
        envs[i] = gym.wrappers.RecordVideo(envs[i], str(run_dir / "videos"), lambda _: True, name_prefix=f"start-{i}")
    return envs


def save(path: Path, contents) -> bool:
    """Write text, or with torch.save anything else; at every instant the old or the new file lies there whole."""
    temporary = Path(f"{path}.tmp")
    with going_on(path):
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
            require(archive.testzip() is None, f"{path} is corrupt")
        contents = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except Exception as error:  # torch and zipfile raise many kinds on a broken file
        require(False, f"cannot read {path}: {error}".splitlines()[0])
    for key, value in expected.items():
        found = contents.get(key) if isinstance(contents, dict) else None
        require(found == value, f"{path} belongs to another run or script: its {key} is {found}, not {value}")
    return contents


class Log(SummaryWriter):
    """TensorBoard's log; where it can't be written it says so, and training goes on."""

    def add(self, scalars: dict, global_step: int):
        with going_on("TensorBoard's log"):
            for tag, value in scalars.items():
                self.add_scalar(tag, value, global_step)
            self.flush()

    def close(self):
        with contextlib.suppress(OSError):  # it has been said
            super().close()


def provenance(device) -> dict:
    """The code, the versions and the machine."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    versions = {name: version(name) for name in ("torch", "gymnasium", "mujoco", "numpy")}
    versions["python"] = platform.python_version()
    hardware = {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    hardware["gpu"] = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {"commit": commit, "versions": versions, "hardware": hardware}


def saved_run(run_dir: Path) -> tuple[Args, dict | None]:
    """The flags of the run in this folder, under those of the command line, and with --resume its checkpoint."""
    try:
        saved = Args(**json.loads((run_dir / "args.json").read_text())["args"])
    except (OSError, ValueError, TypeError, KeyError):
        require(False, f"{run_dir} holds no run of {SCRIPT}.py")
    args, path, checkpoint = tyro.cli(Args, default=saved), run_dir / "checkpoint.pt", None
    if args.resume:
        flags = {name: value for name, value in asdict(saved).items() if name not in ("resume", "total_timesteps")}
        for name, value in flags.items():
            require(getattr(args, name) == value, f"--resume keeps the run's own flags: its {name} is {value}")
        require(args.total_timesteps >= saved.total_timesteps, "--total-timesteps can only be raised")
        if path.exists():
            checkpoint = load(path, "cpu", script=SCRIPT, format=CHECKPOINT_FORMAT, **flags)
        extended = checkpoint and args.total_timesteps > saved.total_timesteps
        complete = (run_dir / "result.json").exists() and not extended
        require(not complete, f"{run_dir} is complete: only with --keep-checkpoint could it be extended")
    return args, checkpoint


def open_run(args: Args, run_dir: Path, device, checkpoint: dict | None):
    """Make the run's folder; with --resume, cut off the log rows after the checkpoint."""
    args_path = run_dir / "args.json"
    taken = not args.resume and (args_path.exists() or any(run_dir.glob(EVENT_FILES)))
    require(not taken, f"{run_dir} holds a run: --resume it, or choose another --run-name")
    try:
        record = json.loads(args_path.read_text()) if args.resume else provenance(device)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "result.json").unlink(missing_ok=True)
        for log in run_dir.glob(EVENT_FILES):
            size = checkpoint["log_sizes"].get(log.name) if checkpoint else None
            log.unlink() if size is None else os.truncate(log, min(size, log.stat().st_size))
    except OSError as error:
        require(False, f"cannot write to {run_dir}: {error}")
    args.resume = None
    require(save(args_path, json.dumps(record | {"args": asdict(args)}, indent=2)), f"cannot write to {run_dir}")


def random_states(env, restore: list | None = None) -> list:
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


def cuda_graphed(function, warmup=3):
    """`function` replayed as a CUDA graph, one for each of its arguments; its first calls run, and count, as usual."""
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


def main(args: Args):
    checkpoint = None
    if args.resume or args.evaluate:
        args, checkpoint = saved_run(Path(args.resume or args.evaluate))
    check_args(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.num_threads or torch.get_num_threads())
    torch.backends.cudnn.deterministic = args.torch_deterministic
    warnings.filterwarnings("ignore", ".*(Overwriting existing videos|not in the possible render_modes)")
    warnings.filterwarnings("ignore", module="glfw")  # what it has to say comes in the error too
    env = make_env(args, render=args.capture_video)  # is not filmed, but says in time if it can't be
    obs_shape, action_dim = env.observation_space.shape, env.action_space.shape[0]

    # Initialise critic Q(s, a) and actor mu(s), copy both to targets, empty the replay buffer
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    low, high = (torch.from_numpy(bound) for bound in float32_bounds(env.action_space))
    actor = Actor(obs_shape, low, high, args.batch_norm, args.weights_init).to(device).eval()
    qf = QNetwork(obs_shape, action_dim, args.batch_norm, args.weights_init).to(device).eval()
    if args.evaluate:
        model = load(Path(args.evaluate, "model.pt"), device, script=SCRIPT, env_id=args.env_id)
        actor.load_state_dict(model["actor"])
        qf.load_state_dict(model["qf"])
        returns, *_ = evaluate(actor, qf, make_eval_envs(args, Path(args.evaluate)), args.seed, args.gamma)
        score = f"{returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes"
        return print(f"{args.env_id} after {model['global_step']:,} steps: {score}")
    target_actor = copy.deepcopy(actor).requires_grad_(False)
    target_qf = copy.deepcopy(qf).requires_grad_(False)
    adam = functools.partial(torch.optim.Adam, fused=True, capturable=device.type == "cuda")
    actor_optimizer = adam(actor.parameters(), lr=args.actor_lr)
    qf_optimizer = adam(qf.parameters(), lr=args.critic_lr, weight_decay=args.critic_weight_decay)
    needed = args.buffer_size * (2 * np.prod(obs_shape) * (1 if args.pixels else 4) + 4 * action_dim + 8) / 2**30
    free = (torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available) / 2**30
    require(needed < free, f"the replay buffer needs {needed:.2f} GiB, {free:.2f} GiB are free: lower --buffer-size")
    buffer_class, obs_size = (PixelReplayBuffer, obs_shape) if args.pixels else (ReplayBuffer, obs_shape[0])
    buffer = buffer_class(args.buffer_size, obs_size, action_dim, device)
    noise = OrnsteinUhlenbeckNoise(actor.action_scale, args.ou_theta, args.ou_sigma, args.ou_dt)
    parts = dict(actor=actor, qf=qf, target_actor=target_actor, target_qf=target_qf, buffer=buffer)
    parts |= dict(actor_optimizer=actor_optimizer, qf_optimizer=qf_optimizer)

    device_obs = torch.empty(1, *obs_shape, device=device)  # written in place: a CUDA graph reads from one address

    def act():
        return explore(actor, device_obs, noise)

    def learn(update_actor):
        batch = buffer.sample(args.batch_size)
        networks, optimizers = (actor, qf, target_actor, target_qf), (actor_optimizer, qf_optimizer)
        return update(*networks, *optimizers, batch, args.gamma, args.tau, update_actor), batch

    if args.compile:
        act, learn = torch.compile(act), torch.compile(learn)
    if args.cudagraphs:
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.Stream())  # recording needs its first calls off the default stream
        act, learn = cuda_graphed(act), cuda_graphed(learn)

    default_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-")
    run_dir = Path(args.resume or Path("runs", args.run_name or default_name))
    open_run(args, run_dir, device, checkpoint)
    say(f"{args.env_id}: observations {obs_shape}, {action_dim} actions; results in {run_dir}")
    say(f"{device}, {torch.get_num_threads()} CPU threads; replay buffer {needed:.2f} GiB when full")
    if args.track:
        import wandb

        run_id = run_dir.name.replace(":", "-")  # which W&B refuses
        names = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name, id=run_id)
        wandb.init(**names, resume="allow", config=asdict(args), sync_tensorboard=True, save_code=True)

    eval_envs = make_eval_envs(args, run_dir) if args.eval_interval else []
    eval_rows, last_checkpoint, start_time = [EVAL_COLUMNS], 0, time.time()
    env.action_space.seed(args.seed)
    obs, _ = env.reset(seed=args.seed)
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name] if part is buffer else copy.deepcopy(checkpoint[name]))  # not mapped
        eval_rows, last_checkpoint = checkpoint["eval_rows"], checkpoint["global_step"]
        start_time -= checkpoint["seconds"]
        random_states(env, restore=checkpoint["random_states"])
        obs, _ = env.reset()
        if device.type == "cuda" or not str(env.spec.entry_point).startswith(EXACT_ENVS):
            say("note: resuming is exact on the CPU, with environments whose reset sets their whole state; not here")

    def on_signal(number, frame):  # only notes it: an exception just anywhere, in the log's queue say, could hang
        signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C ends it at once
        signals.append(number)

    def stop_if_asked():
        if signals:
            say(f"stopped by {signal.Signals(signals[0]).name}; to go on: --resume {run_dir}", sys.stderr)
            sys.exit(128 + signals.pop())

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    threading.excepthook = lambda _: None  # an error of the log's writer thread comes back in the next call
    episode_return, episode_length, shown, written = 0.0, 0, {}, True
    said_step, said_time = last_checkpoint, time.time()
    plain = not (sys.stdout.isatty() and sys.stderr.isatty())  # lines for a log instead of the bar
    bar = tqdm(total=args.total_timesteps, initial=last_checkpoint, unit=" steps", disable=plain, dynamic_ncols=True)
    with Log(str(run_dir)) as log, bar:
        flags = [f"|{name}|{value}|" for name, value in asdict(args).items()]
        log.add_text("hyperparameters", "\n".join(["|flag|value|", "|-|-|", *flags]))
        for global_step in range(last_checkpoint + 1, args.total_timesteps + 1):
            stop_if_asked()
            # Select action a_t = mu(s_t) + N_t
            if global_step <= args.learning_starts:
                action = env.action_space.sample()
            else:
                copy_async(obs, device_obs[0])
                greedy, action = act().cpu().numpy()  # the only wait for the device in a step

            # Execute a_t, observe r_t and s_t+1, store the transition: after a time limit too, with the real s_t+1
            next_obs, reward, terminated, truncated, _ = env.step(action)
            buffer.add(obs, action, reward, next_obs, terminated)
            obs = next_obs
            episode_return += float(reward)
            episode_length += 1

            # Sample a batch; update the critic, the actor and the targets
            learning = global_step > args.learning_starts
            if learning:
                losses, batch = learn(global_step % args.policy_frequency == 0)

            last_step, episode_over = global_step == args.total_timesteps, terminated or truncated
            evaluating = args.eval_interval and (global_step % args.eval_interval == 0 or last_step)
            every = args.checkpoint_interval
            saving = every and episode_over and global_step // every > last_checkpoint // every

            if learning and (global_step % LOG_INTERVAL == 0 or evaluating or saving or last_step):
                scalars = {tag: loss.item() for tag, loss in losses.items()}
                unscaled = (actor(batch.obs) - actor.action_bias) / actor.action_scale
                scalars["charts/saturated_actions"] = (unscaled.abs() > 0.99).float().mean().item()
                scalars["charts/exploration_difference"] = float(np.abs(action - greedy).mean())
                for name, network in ("actor", actor), ("qf1", qf):
                    grads = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
                    scalars[f"losses/{name}_grad_norm"] = nn.utils.get_total_norm(grads).item()
                if not np.isfinite(list(scalars.values())).all():  # seen before anything is saved
                    advice = "lower the learning rate, or look for huge rewards and observations"
                    sys.exit(f"error: a loss is not finite at step {global_step}: {scalars}; {advice}")
                log.add(scalars | {"charts/SPS": global_step / (time.time() - start_time)}, global_step)

            if evaluating:
                if args.capture_video:
                    eval_envs[0].name_prefix = f"step-{global_step}"
                returns, discounted, q_estimates = evaluate(actor, qf, eval_envs, args.seed, args.gamma)
                stop_if_asked()
                statistics = returns.mean(), returns.std(), returns.min(), returns.max()
                eval_rows.append([global_step, *map(float, statistics), len(returns)])
                written = save(run_dir / "eval.csv", "".join(",".join(map(str, row)) + "\n" for row in eval_rows))
                scalars = {"eval/episodic_return": returns.mean(), "eval/q_estimate": q_estimates.mean()}
                log.add(scalars | {"eval/discounted_return": discounted.mean()}, global_step)
                shown["evaluation"] = f"{returns.mean():.1f}"
            if args.save_model and (evaluating or last_step):
                model = dict(script=SCRIPT, env_id=args.env_id, obs_shape=obs_shape, global_step=global_step)
                model |= dict(batch_norm=args.batch_norm, actor=actor.state_dict(), qf=qf.state_dict())
                written = save(run_dir / "model.pt", model) and written

            if episode_over:
                scalars = {"charts/episodic_return": episode_return, "charts/episodic_length": episode_length}
                log.add(scalars, global_step)
                shown["return"] = f"{episode_return:.1f}"
                episode_return, episode_length = 0.0, 0
                if saving and (written or not last_step):  # --resume would take its step's results as written
                    last_checkpoint, seconds = global_step, time.time() - start_time
                    log_sizes = {path.name: path.stat().st_size for path in run_dir.glob(EVENT_FILES)}
                    checkpoint = asdict(args) | dict(script=SCRIPT, format=CHECKPOINT_FORMAT, seconds=seconds)
                    checkpoint |= dict(global_step=global_step, eval_rows=eval_rows, log_sizes=log_sizes)
                    checkpoint |= dict(random_states=random_states(env))
                    checkpoint |= {name: part.state_dict() for name, part in parts.items()}
                    save(run_dir / "checkpoint.pt", checkpoint)
                obs, _ = env.reset()
                noise.reset()

            if evaluating or episode_over:
                bar.set_postfix(shown, refresh=False)
            bar.update()
            if plain and global_step % (args.eval_interval or 5_000) == 0:
                speed = (global_step - said_step) / (time.time() - said_time)  # the warm-up is faster than what follows
                said_step, said_time = global_step, time.time()
                left = tqdm.format_interval((args.total_timesteps - global_step) / speed)
                known = "".join(f"{name} {value}, " for name, value in shown.items())
                say(f"step {global_step:,}: {known}{speed:.0f} steps/s, {left} left")

    for each in [env, *eval_envs]:
        each.close()
    final = [row[1] for row in eval_rows[1:]][-10:]  # the final return is the mean of the last 10 evaluations
    result = dict(global_step=args.total_timesteps, final_return=float(np.mean(final)) if final else None)
    result |= dict(evaluations=len(eval_rows) - 1, seconds=time.time() - start_time)
    result["steps_per_second"] = args.total_timesteps / result["seconds"]
    if not (written and save(run_dir / "result.json", json.dumps(result, indent=2))):
        sys.exit(f"error: the results could not be written; to go on: --resume {run_dir}")
    if not args.keep_checkpoint:
        (run_dir / "checkpoint.pt").unlink(missing_ok=True)
    known = f"; final return {result['final_return']:.1f}, the mean of {len(final)} evaluations" if final else ""
    say(f"complete after {args.total_timesteps:,} steps in {tqdm.format_interval(result['seconds'])}{known}")


if __name__ == "__main__":
    main(tyro.cli(Args))
