# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco]==1.4.0",
#     "mujoco==4.0.0",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "psutil==7.2.2",
#     "moviepy==2.2.1",
# ]
# ///
"""Deep Deterministic Policy Gradient (Lillicrap et al. 2016, arXiv 1509.02971), the tuned baseline.

    python ddpg_continuous_action.py --env-id Hopper-v5 --seed 3

Algorithm 1 of the paper, with the settings that later work found to do better on MuJoCo locomotion: two hidden layers
of 256, the action at the critic's first layer, Adam at 3e-4 for both networks and no weight decay, batches of 256, tau
0.005, 25,000 uniformly random steps before learning, and Gaussian instead of Ornstein-Uhlenbeck exploration noise. No
batch normalisation. The paper's own settings are in ddpg_paper_faithful.py, and from pixels too.
"""

import contextlib
import copy
import csv
import functools
import io
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
LOG_INTERVAL = 200  # steps between rows of losses and diagnostics: reading them back more often would cost time
EXACT_ENVS = "gymnasium.envs.mujoco", "gymnasium.envs.classic_control"  # their reset sets the whole state
CHECKPOINT_FORMAT = 1  # raised when a checkpoint's contents change: older ones are refused


def parse_int(text: str) -> int:
    """An integer as people type it: 1000000, 1_000_000 or 1e6, but not 1.5."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise ValueError(f"{text} is not an integer") from None
        return int(value)


Int = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda args: parse_int(args[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]


@dataclass
class Args:
    # Experiment
    exp_name: str = SCRIPT
    """name of the experiment, a part of the run's name"""
    run_name: str | None = None
    """folder of this run under runs/; by default {env_id}__{exp_name}__{seed}__{unix time}"""
    seed: Int = 1
    """seeds the networks, the environment, the exploration and the sampling of batches"""
    torch_deterministic: bool = True
    """let cuDNN choose only deterministic algorithms"""
    cuda: bool = True
    """train on the GPU if there is one"""
    num_threads: Int = 0
    """CPU threads that torch uses; 0 leaves torch's own choice (for many runs on one machine: 1 each)"""
    cudagraphs: bool = False
    """on a GPU: replay acting and the whole update as CUDA graphs, with the same numbers as without"""
    compile: bool = False
    """on a GPU: torch.compile acting and the update (numbers agree up to rounding), alone or with --cudagraphs"""
    track: bool = False
    """mirror the TensorBoard log to Weights & Biases (pip install wandb)"""
    wandb_project_name: str = "ddpg"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases user or team"""
    save_model: bool = True
    """write model.pt at each evaluation and at the end"""
    checkpoint_interval: Int = 50_000
    """steps between checkpoints, each written at the next end of an episode; 0 = none"""
    keep_checkpoint: bool = False
    """keep checkpoint.pt of a finished run, so that --resume can extend it"""
    resume: str | None = None
    """folder of a broken-off run: go on from its checkpoint with its own flags; only --total-timesteps may be raised"""

    # Evaluation
    eval_interval: Int = 5_000
    """steps between evaluations without exploration noise; 0 = none"""
    eval_episodes: Int = 10
    """episodes of one evaluation, each in an environment of its own, all stepped together"""
    capture_video: bool = False
    """film the first episode of each evaluation into videos/ (with --evaluate, every episode)"""
    evaluate: str | None = None
    """folder of a run: evaluate its model over --eval-episodes episodes instead of training"""

    # Algorithm
    env_id: str = "HalfCheetah-v5"
    """Gymnasium environment with a flat Box observation and a bounded Box action; module:EnvId imports module first"""
    total_timesteps: Int = 1_000_000
    """environment steps of the whole run"""
    learning_rate: float = 3e-4
    """Adam's learning rate, for the actor and the critic"""
    buffer_size: Int = 1_000_000
    """transitions in the replay buffer (paper: 1e6)"""
    gamma: float = 0.99
    """discount factor (paper: 0.99)"""
    tau: float = 0.005
    """fraction of the way that the targets move towards the networks in an update (paper: 0.001)"""
    batch_size: Int = 256
    """transitions in a batch (paper: 64)"""
    exploration_noise: float = 0.1
    """standard deviation of the Gaussian exploration noise, in units of half the action range"""
    learning_starts: Int = 25_000
    """steps of uniformly random actions before learning starts (paper: silent)"""
    policy_frequency: Int = 1
    """update the actor and both targets every so many critic updates (paper: 1; CleanRL and TD3: 2)"""


class QNetwork(nn.Module):
    """Action value Q(s, a): observations (N, obs_dim) and actions (N, action_dim) to values (N,)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(obs_dim + action_dim, 256)
        self.fc2 = nn.Linear(256, 256)
        self.fc3 = nn.Linear(256, 1)

    def forward(self, obs, action):
        x = torch.cat([obs, action], 1)
        x = F.relu(self.fc1(x), inplace=True)  # in place: 2 % of an update on a CPU
        x = F.relu(self.fc2(x), inplace=True)
        return self.fc3(x).squeeze(1)  # (N,): with (N, 1), y - q would broadcast to (N, N)


class Actor(nn.Module):
    """Deterministic policy mu(s): observations (N, obs_dim) to actions (N, action_dim) within [low, high]."""

    def __init__(self, obs_dim: int, low: torch.Tensor, high: torch.Tensor):
        super().__init__()
        self.fc1 = nn.Linear(obs_dim, 256)
        self.fc2 = nn.Linear(256, 256)
        self.fc_mu = nn.Linear(256, len(low))
        self.register_buffer("action_low", low.clone())
        self.register_buffer("action_high", high.clone())
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)

    def forward(self, obs):
        x = F.relu(self.fc1(obs), inplace=True)
        x = F.relu(self.fc2(x), inplace=True)
        return torch.tanh(self.fc_mu(x)) * self.action_scale + self.action_bias

    def clip(self, action):
        """Actions within the bounds: noise takes them out, and so does the rounding of scale and bias."""
        return action.clamp(self.action_low, self.action_high)


class Batch(NamedTuple):
    obs: torch.Tensor  # (N, obs_dim)
    action: torch.Tensor  # (N, action_dim)
    reward: torch.Tensor  # (N,)
    next_obs: torch.Tensor  # (N, obs_dim)
    terminated: torch.Tensor  # (N,), 1 where the episode ended by itself: a time limit is not an end


class ReplayBuffer:
    """The last `capacity` transitions on the training device, each one float32 row, so that a batch is one gather."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.sizes = [obs_dim, action_dim, 1, obs_dim, 1]
        self.rows = torch.empty(capacity, sum(self.sizes), device=device)
        self.row = torch.empty(sum(self.sizes), pin_memory=device.type == "cuda")  # pinned: copied without waiting
        self.copied = torch.cuda.Event() if device.type == "cuda" else None
        self.added = 0
        self.size = torch.zeros((), dtype=torch.int64, device=device)  # on the device, where a CUDA graph can read it

    @staticmethod
    def nbytes(capacity: int, obs_dim: int, action_dim: int) -> int:
        return 4 * capacity * (2 * obs_dim + action_dim + 2)

    def add(self, obs, action, reward, next_obs, terminated):
        if self.copied:
            self.copied.synchronize()  # the last row has left for the device, long ago
        self.row.numpy()[:] = np.concatenate([obs, action, [reward], next_obs, [terminated]])
        self.rows[self.added % len(self.rows)].copy_(self.row, non_blocking=True)
        if self.copied:
            self.copied.record()
        self.added += 1
        self.size.fill_(min(self.added, len(self.rows)))

    def sample(self, batch_size: int) -> Batch:
        """Transitions drawn uniformly, with replacement."""
        indices = (torch.rand(batch_size, dtype=torch.float64, device=self.rows.device) * self.size).long()
        obs, action, reward, next_obs, terminated = self.rows.index_select(0, indices).split(self.sizes, 1)
        return Batch(obs, action, reward.squeeze(1), next_obs, terminated.squeeze(1))

    def state_dict(self):
        filled = self.rows[: min(self.added, len(self.rows))].cpu().numpy()
        return {"added": self.added, "rows": torch.from_numpy(filled)}  # by way of numpy: a view would save all rows

    def load_state_dict(self, state):
        self.added = state["added"]
        self.rows[: len(state["rows"])] = state["rows"]
        self.size.fill_(len(state["rows"]))


@torch.no_grad()
def explore(actor, obs, noise_std):
    """The greedy action mu(s) and the explored one, mu(s) + N(0, noise_std^2) clipped, as rows: (2, action_dim)."""
    greedy = actor(obs)
    return torch.cat([greedy, actor.clip(greedy + noise_std * torch.randn_like(greedy))])


def critic_loss(qf, target_actor, target_qf, batch, gamma):
    """Mean of (y - Q(s, a))^2, equation 4, and the values Q(s, a)."""
    with torch.no_grad():
        next_q = target_qf(batch.next_obs, target_actor(batch.next_obs))
        y = batch.reward + gamma * (1 - batch.terminated) * next_q  # equation 5; no value after a terminal state
    q = qf(batch.obs, batch.action)
    return F.mse_loss(q, y), q


def actor_loss(actor, qf, obs):
    """Minus the mean of Q(s, mu(s)): its gradient in the actor's weights is minus the one of equation 6."""
    return -qf(obs, actor(obs)).mean()


def update(actor, qf, target_actor, target_qf, actor_optimizer, qf_optimizer, batch, gamma, tau, update_actor=True):
    """One update of Algorithm 1: the critic, then the actor, then both targets.

    Returns what is logged, as tensors: nothing here waits for the device. The gradients stay in the parameters.
    """
    qf_loss, q = critic_loss(qf, target_actor, target_qf, batch, gamma)
    qf_optimizer.zero_grad()
    qf_loss.backward()
    qf_optimizer.step()
    losses = {"losses/qf1_loss": qf_loss.detach(), "losses/qf1_values": q.detach().mean()}
    if update_actor:
        mu_loss = actor_loss(actor, qf, batch.obs)
        actor_optimizer.zero_grad()
        mu_loss.backward(inputs=list(actor.parameters()))  # and no gradient for the critic's weights
        actor_optimizer.step()
        losses["losses/actor_loss"] = mu_loss.detach()
        with torch.no_grad():  # theta' <- tau theta + (1 - tau) theta'
            targets = [*target_actor.parameters(), *target_qf.parameters()]
            torch._foreach_lerp_(targets, [*actor.parameters(), *qf.parameters()], tau)
    return losses, batch


@torch.no_grad()
def evaluate(actor, qf, envs, seed, gamma):
    """One episode without exploration noise in each environment, all stepped together.

    Environment i starts from seed + i, so that every evaluation of a run meets the same starts. The rows of finished
    episodes stay in the batch: its shape, and with it the rounding of the others, never changes. Returns, for each
    episode, its return, its discounted return, and the critic's estimate of that at the start: three arrays (N,).
    """
    device = actor.action_low.device
    host_obs = torch.from_numpy(np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])).float()
    returns, discounted, running, step = np.zeros(len(envs)), np.zeros(len(envs)), set(range(len(envs))), 0
    while running:
        obs = host_obs.to(device)
        actions = actor.clip(actor(obs))
        if step == 0:
            q_estimates = qf(obs, actions).cpu().numpy()
        actions = actions.cpu().numpy()
        for i in sorted(running):
            next_obs, reward, terminated, truncated, _ = envs[i].step(actions[i])
            host_obs[i] = torch.from_numpy(next_obs)
            returns[i] += reward
            discounted[i] += gamma**step * reward
            if terminated or truncated:
                running.remove(i)
        step += 1
    for env in envs:
        if isinstance(env, gym.wrappers.RecordVideo):
            env.stop_recording()
    return returns, discounted, q_estimates


def require(condition, message):
    """Bad input: one line, exit code 2. Called before anything is written."""
    if not condition:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def check_args(args: Args):
    for name in ("total_timesteps", "learning_rate", "buffer_size", "batch_size", "policy_frequency", "eval_episodes"):
        value = getattr(args, name)
        require(0 < value < float("inf"), f"--{name.replace('_', '-')} must be positive and finite, not {value}")
    for name in ("seed", "num_threads", "eval_interval", "checkpoint_interval", "learning_starts", "exploration_noise"):
        value = getattr(args, name)
        require(0 <= value < float("inf"), f"--{name.replace('_', '-')} must be 0 or more, and finite, not {value}")
    require(0 <= args.gamma <= 1, f"--gamma must lie in [0, 1], not {args.gamma}")
    require(0 < args.tau <= 1, f"--tau must lie in (0, 1], not {args.tau}")
    require(args.buffer_size >= args.batch_size, "--buffer-size must hold at least one batch (--batch-size)")
    require(
        args.learning_starts < args.total_timesteps,
        "learning would never start: --learning-starts is not below --total-timesteps",
    )
    on_gpu = args.cuda and torch.cuda.is_available()
    require(on_gpu or not (args.cudagraphs or args.compile), "--cudagraphs and --compile need a CUDA device")
    require(find_spec("wandb") or not args.track, "--track needs Weights & Biases: pip install wandb")


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    try:
        env = gym.make(env_id, render_mode=render_mode)
    except (gym.error.Error, ModuleNotFoundError) as error:
        require(False, error)  # gymnasium names the near matches
    obs, action = env.observation_space, env.action_space
    require(isinstance(action, gym.spaces.Box), f"{env_id} has no continuous (Box) action space but {action}")
    require(action.is_bounded(), f"{env_id} has an unbounded action space: {action}")
    require(isinstance(obs, gym.spaces.Box), f"{env_id} has no Box observation space but {obs}")
    require(len(obs.shape) != 3, f"{env_id} observes images: ddpg_paper_faithful.py --pixels learns from pixels")
    require(len(obs.shape) == len(action.shape) == 1, f"{env_id} needs flat spaces, not {obs.shape} and {action.shape}")
    return env


def make_eval_envs(args: Args, run_dir: Path) -> list[gym.Env]:
    """One environment an episode; those that are filmed render and record."""
    filmed = args.capture_video * (args.eval_episodes if args.evaluate else 1)
    envs = [make_env(args.env_id, "rgb_array" if i < filmed else None) for i in range(args.eval_episodes)]
    for i in range(filmed):
        envs[i] = gym.wrappers.RecordVideo(envs[i], str(run_dir / "videos"), episode_trigger=lambda _: True)
    return envs


def eval_seed(seed: int) -> int:
    """Seed of the first evaluation episode, far from the training seeds and from those of other runs."""
    return 10_000 * (seed + 1)


def saved_args(args: Args) -> Args:
    """The flags of the run that --resume or --evaluate names, with those of this command line over them."""
    run_dir = Path(args.resume or args.evaluate)
    try:
        saved = Args(**json.loads((run_dir / "args.json").read_text())["args"])
    except (OSError, ValueError, TypeError, KeyError):
        require(False, f"{run_dir} holds no run of {Path(__file__).name}: its args.json is missing or foreign")
    args = tyro.cli(Args, default=saved)
    for name, value in asdict(saved).items():
        if args.resume and name not in ("resume", "total_timesteps"):
            asked = getattr(args, name)
            require(asked == value, f"--resume goes on with the run's own flags: {name} is {value} there, not {asked}")
    require(not args.resume or args.total_timesteps >= saved.total_timesteps, "--total-timesteps can only be raised")
    return args


def load_file(path: Path, device, **expected):
    """What torch.save wrote, if every byte is intact and it has the `expected` items; else one line and exit code 2."""
    try:
        require(zipfile.ZipFile(path).testzip() is None, f"{path} is corrupt")
        contents = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except Exception as error:  # whatever a broken file makes zipfile or torch raise
        require(False, f"{path} cannot be read: {error}".splitlines()[0])
    for key, value in expected.items():
        found = contents.get(key) if isinstance(contents, dict) else None
        require(found == value, f"{path} is of another kind: its {key} is {found}, not {value}")
    return contents


def write_file(path: Path, write) -> bool:
    """Write a file so that the old or the new one lies there whole at every instant; False, and a line, if it fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return True
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError on a full disk
        temporary.unlink(missing_ok=True)
        tqdm.write(f"warning: cannot write {path}, going on without it: {error}", file=sys.stderr)
        return False


class Log(SummaryWriter):
    """TensorBoard events. When they can't be written any more it says so, once, and training goes on."""

    failed = False

    def __init__(self, log_dir: Path):
        threading.excepthook = lambda _: None  # the writer thread's error comes back at the next call
        super().__init__(str(log_dir))

    def add(self, scalars: dict, global_step: int):
        try:
            for tag, value in scalars.items():
                if not self.failed:
                    self.add_scalar(tag, value, global_step)
        except OSError as error:
            self.failed = True
            tqdm.write(f"warning: TensorBoard's log ends at step {global_step}: {error}", file=sys.stderr)

    def flush(self):
        with contextlib.suppress(OSError):
            super().flush()

    def close(self):
        with contextlib.suppress(OSError):
            super().close()


def write_json(path: Path, contents: dict) -> bool:
    return write_file(path, lambda file: file.write(json.dumps(contents, indent=2).encode()))


def write_eval_csv(path: Path, rows: list[dict]) -> bool:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["global_step", "mean", "std", "min", "max", "episodes"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_file(path, lambda file: file.write(text.getvalue().encode()))


def provenance(args: Args, device) -> dict:
    """Every flag, the code, the versions and the machine."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git
        commit = None
    return {
        "args": asdict(args),
        "commit": commit,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "gymnasium", "mujoco", "numpy")},
        "hardware": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        },
    }


def open_run(args: Args, run_dir: Path, device) -> dict | None:
    """Make the run's folder, or go back to its checkpoint, which is returned: rows of the lost stretch are cut off."""
    checkpoint, record = None, provenance(args, device)
    if args.resume:
        record["args"]["resume"] = None
        path, result = run_dir / "checkpoint.pt", run_dir / "result.json"
        if result.exists():
            done = json.loads(result.read_text())["global_step"]
            require(args.total_timesteps > done, f"{run_dir} is complete at {done} steps: raise --total-timesteps")
            require(path.exists(), f"{run_dir} is complete and kept no checkpoint to go on from (--keep-checkpoint)")
        if path.exists():
            checkpoint = load_file(path, "cpu", script=SCRIPT, format=CHECKPOINT_FORMAT)
            for name in record["args"].keys() - {"total_timesteps"}:
                theirs, ours = checkpoint["args"].get(name), record["args"][name]
                require(theirs == ours, f"{path} is of a run with other flags: its {name} is {theirs}, not {ours}")
        now, record = record, json.loads((run_dir / "args.json").read_text()) | {"args": record["args"]}
        step = checkpoint["global_step"] if checkpoint else 0
        record.setdefault("resumed", []).append({"global_step": step} | {key: now[key] for key in now if key != "args"})
        result.unlink(missing_ok=True)
    else:
        require(
            not (run_dir / "args.json").exists(), f"{run_dir} holds a run already; --resume {run_dir} goes on with it"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for log in run_dir.glob("events.out.tfevents.*"):
            size = checkpoint["log_sizes"].get(log.name) if checkpoint else None
            log.unlink() if size is None else os.truncate(log, size)
    except OSError as error:
        require(False, f"cannot write to {run_dir}: {error}")
    require(write_json(run_dir / "args.json", record), f"cannot write to {run_dir}")
    return checkpoint


def rng_state(env) -> dict:
    """Every random generator's state, in plain Python values and tensors, so that weights_only=True loads it."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "numpy": [name, keys.tolist(), *rest],
        "python": random.getstate(),
        "env": env.unwrapped.np_random.bit_generator.state,
        "action_space": env.action_space.np_random.bit_generator.state,
    }


def set_rng_state(state, env):
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    env.unwrapped.np_random.bit_generator.state = state["env"]
    env.action_space.np_random.bit_generator.state = state["action_space"]


def cuda_graphed(function, warmup=3):
    """`function`, replayed as a CUDA graph, one for each of its arguments; the first calls run (and count) as usual."""
    calls, graphs, outputs = Counter(), {}, {}

    def call(*args):
        calls[args] += 1
        if calls[args] <= warmup:  # lazy initialisation, the optimiser's state for one, must not be recorded
            return function(*args)
        if args not in graphs:
            graphs[args] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[args]):
                outputs[args] = function(*args)
        graphs[args].replay()
        return outputs[args]

    return call


def main(args: Args):
    if args.resume or args.evaluate:
        args = saved_args(args)
    check_args(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    mujoco.set_mju_user_warning(functools.cache(lambda text: print(f"mujoco: {text}", file=sys.stderr)))  # each once
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen

    if args.evaluate:
        run_dir = Path(args.evaluate)
        model = load_file(run_dir / "model.pt", device, script=SCRIPT)
        actor = Actor(model["obs_dim"], model["action_low"], model["action_high"]).to(device)
        qf = QNetwork(model["obs_dim"], len(model["action_low"])).to(device)
        actor.load_state_dict(model["actor"])
        qf.load_state_dict(model["qf"])
        returns, _, _ = evaluate(actor, qf, make_eval_envs(args, run_dir), eval_seed(args.seed), args.gamma)
        print(f"{args.env_id} after {model['global_step']:,} steps: {returns.mean():.2f} ± {returns.std():.2f} "
              f"over {len(returns)} episodes")  # fmt: skip
        return

    # Environment, memory and folder are checked before anything is written
    env = make_env(args.env_id)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    buffer_gib = ReplayBuffer.nbytes(args.buffer_size, obs_dim, action_dim) / 2**30
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    require(
        buffer_gib <= free / 2**30,
        f"the full replay buffer takes {buffer_gib:.2f} GiB, {free / 2**30:.2f} GiB are free: lower --buffer-size",
    )
    run_name = args.run_name or f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-")
    run_dir = Path(args.resume or f"runs/{run_name}")
    checkpoint = open_run(args, run_dir, device)
    print(
        f"{args.env_id}: {obs_dim} observations, {action_dim} actions; {device}, {torch.get_num_threads()} CPU threads; "
        f"full replay buffer {buffer_gib:.2f} GiB; {run_dir}",
    )
    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            name=run_dir.name,
            id=run_dir.name,
            resume="allow",
            config=asdict(args),
            sync_tensorboard=True,
            save_code=True,
        )

    # Initialise the critic Q(s, a) and the actor mu(s), copy both to targets, empty the replay buffer
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    low, high = (torch.tensor(bound, dtype=torch.float32) for bound in (env.action_space.low, env.action_space.high))
    actor = Actor(obs_dim, low, high).to(device)
    qf = QNetwork(obs_dim, action_dim).to(device)
    target_actor = copy.deepcopy(actor).requires_grad_(False)
    target_qf = copy.deepcopy(qf).requires_grad_(False)
    adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, fused=True, capturable=device.type == "cuda")
    actor_optimizer, qf_optimizer = adam(actor.parameters()), adam(qf.parameters())
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    noise_std = args.exploration_noise * actor.action_scale
    host_obs = torch.empty(1, obs_dim, pin_memory=device.type == "cuda")
    device_obs = torch.empty(1, obs_dim, device=device)  # written in place: a CUDA graph reads a fixed address

    def act():
        return explore(actor, device_obs, noise_std)

    def learn(update_actor):
        batch = buffer.sample(args.batch_size)
        optimizers = actor_optimizer, qf_optimizer
        return update(actor, qf, target_actor, target_qf, *optimizers, batch, args.gamma, args.tau, update_actor)

    if args.compile:
        act, learn = torch.compile(act), torch.compile(learn)
    if args.cudagraphs:
        act, learn = cuda_graphed(act), cuda_graphed(learn)

    env.action_space.seed(args.seed)
    obs, _ = env.reset(seed=args.seed)
    eval_envs = make_eval_envs(args, run_dir) if args.eval_interval else []
    eval_rows, first_step, last_checkpoint, past_seconds, start_time = [], 1, 0, 0.0, time.time()

    stateful = dict(actor=actor, qf=qf, target_actor=target_actor, target_qf=target_qf, buffer=buffer)
    stateful |= dict(actor_optimizer=actor_optimizer, qf_optimizer=qf_optimizer)
    if checkpoint:
        for name, part in stateful.items():
            part.load_state_dict(checkpoint[name])
        eval_rows, last_checkpoint, past_seconds = (checkpoint[key] for key in ("eval_rows", "global_step", "seconds"))
        first_step = last_checkpoint + 1
        set_rng_state(checkpoint["rng"], env)
        del checkpoint
        obs, _ = env.reset()
        if device.type != "cpu" or not str(env.spec.entry_point).startswith(EXACT_ENVS):
            print("note: not exact to the byte: that takes a CPU, and an environment whose reset sets its whole state")
    write_eval_csv(run_dir / "eval.csv", eval_rows)

    log = Log(run_dir)
    log.add_text("hyperparameters", "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items()))
    bar = tqdm(total=args.total_timesteps, initial=first_step - 1, unit="step", disable=None, dynamic_ncols=True)

    def stop(code, message):
        bar.close()
        log.close()
        print(message, file=sys.stderr)
        sys.exit(code)

    def on_signal(signum, frame):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends it at once
        stop(128 + signum, f"stopped by {signal.Signals(signum).name}; go on with --resume {run_dir}")

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    episode_return, episode_length, shown = 0.0, 0, {}
    log_time, log_step = time.time(), first_step - 1
    for global_step in range(first_step, args.total_timesteps + 1):
        # Select action a_t = mu(s_t) + N_t
        if global_step <= args.learning_starts:
            action = env.action_space.sample()
        else:
            host_obs.numpy()[0] = obs
            device_obs.copy_(host_obs, non_blocking=True)
            greedy, action = act().cpu().numpy()  # the step's one wait for the device

        # Execute a_t, observe r_t and s_t+1, store the transition: at a time limit too, the last real observation
        next_obs, reward, terminated, truncated, _ = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated)
        obs = next_obs
        episode_return += float(reward)
        episode_length += 1

        # Sample a batch, update the critic, the actor and the targets
        learning = global_step > args.learning_starts
        if learning:
            losses, batch = learn(global_step % args.policy_frequency == 0)

        bar.update()
        last_step = global_step == args.total_timesteps
        evaluating = args.eval_interval and (global_step % args.eval_interval == 0 or last_step)
        saving = (
            (terminated or truncated)
            and args.checkpoint_interval
            and global_step // args.checkpoint_interval > last_checkpoint // args.checkpoint_interval
        )
        if learning and (global_step % LOG_INTERVAL == 0 or evaluating or saving):
            scalars = {tag: loss.item() for tag, loss in losses.items()}
            if not all(map(math.isfinite, scalars.values())):  # before anything is saved
                message = f"error: a loss is not finite at step {global_step}: {scalars}; what was saved before is kept"
                stop(1, f"{message}. Try a lower --learning-rate, or look for huge rewards or observations")
            with torch.no_grad():
                used = (actor(batch.obs) - actor.action_bias) / actor.action_scale
            log.add(
                scalars
                | {
                    "losses/qf1_grad_norm": nn.utils.get_total_norm([p.grad for p in qf.parameters()]).item(),
                    "losses/actor_grad_norm": nn.utils.get_total_norm([p.grad for p in actor.parameters()]).item(),
                    "charts/saturated_actions": (used.abs() > 0.99).float().mean().item(),
                    "charts/exploration_difference": float(np.abs(action - greedy).mean()),
                    "charts/SPS": (global_step - log_step) / (time.time() - log_time),
                },
                global_step,
            )
            log_time, log_step = time.time(), global_step

        if evaluating:
            returns, discounted, q_estimates = evaluate(actor, qf, eval_envs, eval_seed(args.seed), args.gamma)
            statistics = dict(mean=returns.mean(), std=returns.std(), min=returns.min(), max=returns.max())
            row = {"global_step": global_step} | {name: float(value) for name, value in statistics.items()}
            eval_rows.append(row | {"episodes": len(returns)})
            write_eval_csv(run_dir / "eval.csv", eval_rows)
            log.add(
                {
                    "eval/episodic_return": returns.mean(),
                    "eval/discounted_return": discounted.mean(),  # what the critic estimates at the start
                    "eval/q_estimate": q_estimates.mean(),
                },
                global_step,
            )
            shown["eval"] = f"{returns.mean():.1f}"
        if args.save_model and (evaluating or last_step):
            model = dict(script=SCRIPT, env_id=args.env_id, obs_dim=obs_dim, global_step=global_step)
            model |= dict(action_low=low, action_high=high, actor=actor.state_dict(), qf=qf.state_dict())
            write_file(run_dir / "model.pt", lambda file, model=model: torch.save(model, file))

        if terminated or truncated:
            log.add({"charts/episodic_return": episode_return, "charts/episodic_length": episode_length}, global_step)
            shown["return"] = f"{episode_return:.1f}"
            episode_return, episode_length = 0.0, 0
            if saving:
                last_checkpoint = global_step
                log.flush()
                checkpoint = {name: part.state_dict() for name, part in stateful.items()} | {
                    "script": SCRIPT,
                    "format": CHECKPOINT_FORMAT,
                    "args": asdict(args),
                    "global_step": global_step,
                    "seconds": past_seconds + time.time() - start_time,
                    "eval_rows": eval_rows,
                    "rng": rng_state(env),
                    "log_sizes": {path.name: path.stat().st_size for path in run_dir.glob("events.out.tfevents.*")},
                }
                write_file(run_dir / "checkpoint.pt", functools.partial(torch.save, checkpoint))
            obs, _ = env.reset()

        bar.set_postfix(shown, refresh=False)
        if bar.disable and (
            global_step % (args.eval_interval or 5_000) == 0 or last_step
        ):  # a log file, not a terminal
            seconds = time.time() - start_time
            speed = (global_step - first_step + 1) / seconds
            left = timedelta(seconds=round((args.total_timesteps - global_step) / speed))
            known = "".join(f", {name} {value}" for name, value in shown.items())
            print(
                f"step {global_step:,} of {args.total_timesteps:,}{known}, {speed:.0f} steps/s, {left} left", flush=True
            )

    bar.close()
    log.close()
    env.close()
    for eval_env in eval_envs:
        eval_env.close()
    final = [row["mean"] for row in eval_rows[-10:]]
    seconds = past_seconds + time.time() - start_time
    result = {
        "global_step": args.total_timesteps,
        "final_return": float(np.mean(final)) if final else None,  # mean of the last 10 evaluations
        "evaluations": len(eval_rows),
        "seconds": seconds,
        "steps_per_second": args.total_timesteps / seconds,
    }
    if not write_json(run_dir / "result.json", result):
        sys.exit(1)
    if not args.keep_checkpoint:
        (run_dir / "checkpoint.pt").unlink(missing_ok=True)
    print(f"final return {result['final_return']}, the mean of the last {len(final)} evaluations; {run_dir}")


if __name__ == "__main__":
    main(tyro.cli(Args))
