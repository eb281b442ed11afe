# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#   "tensorboard==2.21.0", "tqdm==4.70.1", "filelock==4.3.1", "psutil==7.2.2", "moviepy==2.2.1",
#   "jax==0.10.2", "jaxlib==0.10.2", "optax==0.2.8"]
# ///
"""The agent of ddpg_continuous_action.py in JAX, on the CPU: the same DDPG through XLA.

    pip install -r benchmark/requirements-jax.txt
    python benchmark/jax_ddpg.py --env-id Hopper-v5 --seed 3

What learns is here, in the same order and under the same names as in the PyTorch script: networks, replay buffer and
agent. The loop and what surrounds it are that script's: flags, environments, evaluation, log, checkpoints and errors.
"""

import os
import sys
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ddpg_continuous_action as tuned
from ddpg_continuous_action import Batch, exit_unless

try:
    import jax
    import jax.numpy as jnp
    import optax
except ImportError as error:
    exit_unless(False, f"{error}: pip install -r benchmark/requirements-jax.txt")

SCRIPT = Path(__file__).stem
NOT_FOR_JAX = "torch_deterministic cuda cudagraphs compile matmul noise ou_theta ou_dt noise_anneal_steps "
NOT_FOR_JAX += "exploration_noise_final layer_norm n_step target_noise target_noise_clip"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_enable_async_dispatch", False)  # nothing could be done while an update is under way


@dataclass
class Args(tuned.Args):
    exp_name: str = SCRIPT  # name of the experiment, part of the run's name
    cuda: bool = False  # not for JAX, which runs on the CPU here
    matmul: str = "XLA"  # not for JAX: XLA multiplies matrices


def init(key, **layers) -> dict:
    """Parameters by torch's names, in its shapes and with its default: uniform in ±1/sqrt(inputs), biases too."""
    params = {}
    for name, (inputs, outputs) in layers.items():
        for part, shape in ("weight", (outputs, inputs)), ("bias", (outputs,)):
            key, part_key = jax.random.split(key)
            bound = inputs**-0.5
            params[f"{name}.{part}"] = jax.random.uniform(part_key, shape, minval=-bound, maxval=bound)
    return params


def linear(params, name: str, x):
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def q_network(params, obs, action, scale, bias):
    """Action value Q(s, a): observations (N, obs_dim) and actions (N, action_dim) to values (N,)."""
    action = (action - bias) / scale  # to [-1, 1], whatever the environment's units
    x = jnp.concatenate([obs, action], 1)
    x = jax.nn.relu(linear(params, "fc1", x))
    x = jax.nn.relu(linear(params, "fc2", x))
    return linear(params, "fc3", x).squeeze(1)  # with (N, 1), y - q would broadcast to (N, N)


def actor(params, obs, scale, bias):
    """Deterministic policy mu(s): observations (N, obs_dim) to actions (N, action_dim) within bias ± scale."""
    x = jax.nn.relu(linear(params, "fc1", obs))
    x = jax.nn.relu(linear(params, "fc2", x))
    return jnp.tanh(linear(params, "fc_mu", x)) * scale + bias


class ReplayBuffer(tuned.ReplayBuffer):
    """The PyTorch script's memory in NumPy: torch's operations between JAX's would cost a few per cent of a step."""

    def add(self, obs, action, reward, next_obs, discount):
        row = np.concatenate([obs, action, [reward], next_obs, [discount]])
        self.rows.numpy()[self.added % len(self.rows)] = row
        self.added += 1

    def sample(self, batch_size: int) -> np.ndarray:
        """Transitions drawn uniformly, with replacement: rows (N, 2 obs_dim + action_dim + 2), split by the update."""
        return self.rows.numpy()[np.random.randint(min(self.added, len(self.rows)), size=batch_size)]


class Part(nn.Module):
    """A part of an agent's state as the PyTorch script evaluates, saves and loads its own: in torch's tensors.

    `function` computes a network's output of the part and the inputs; `buffers` are those of the network in torch.
    """

    def __init__(self, agent, name: str, function=None, **buffers: np.ndarray):
        super().__init__()
        self.agent, self.name, self.function = agent, name, function
        for buffer, array in buffers.items():
            self.register_buffer(buffer, torch.tensor(array))

    def forward(self, *inputs):
        output = self.function(self.agent.state[self.name], *(tensor.numpy() for tensor in inputs))
        return torch.from_numpy(np.array(output))

    def clip(self, action):
        return action.clamp(self.action_low, self.action_high)

    def reset(self):
        """Of the noise, at the start of each episode: there is nothing to start anew."""

    def state_dict(self):
        arrays = jax.tree_util.tree_leaves_with_path(self.agent.state[self.name])
        tensors = {path_name(path): torch.from_numpy(np.array(array)) for path, array in arrays}
        return tensors | super().state_dict()

    def load_state_dict(self, state):
        def loaded(path, array):
            tensor = state[path_name(path)]
            if tensor.shape != array.shape:
                raise RuntimeError(f"{path_name(path)} is {tuple(tensor.shape)}, not {array.shape}")
            return jnp.array(tensor.numpy())

        super().load_state_dict(state, strict=False)  # the buffers
        self.agent.state[self.name] = jax.tree_util.tree_map_with_path(loaded, self.agent.state[self.name])


def path_name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


class DDPG:
    """The networks, targets, optimisers and noise of Algorithm 1, and what it does with them.

    All that learning and acting change is in `state`, trees of arrays: jitted functions take it from their arguments.
    """

    def __init__(self, args: Args, obs_space: gym.spaces.Box, action_space: gym.spaces.Box, device: torch.device):
        if args.num_threads:  # else XLA's own choice, which it makes when it first computes: now
            os.environ["NPROC"] = str(args.num_threads)
        (obs_dim,), low, high = obs_space.shape, np.float32(action_space.low), np.float32(action_space.high)
        self.low, self.high, self.scale, self.bias = low, high, (high - low) / 2, (high + low) / 2
        self.mu = jax.jit(partial(actor, scale=self.scale, bias=self.bias))
        self.q = jax.jit(partial(q_network, scale=self.scale, bias=self.bias))
        self.columns = np.cumsum([obs_dim, len(low), 1, obs_dim])  # where a row of the replay buffer is split
        # Over one vector instead of six arrays: 5 % of an update, and too little at a time to keep a second thread busy
        self.optimizer = optax.flatten(optax.adam(args.learning_rate))
        actor_key, qf_key, noise_key = jax.random.split(jax.random.PRNGKey(args.seed), 3)
        networks = {
            "actor": init(actor_key, fc1=(obs_dim, 256), fc2=(256, 256), fc_mu=(256, len(low))),
            "qf": init(qf_key, fc1=(obs_dim + len(low), 256), fc2=(256, 256), fc3=(256, 1)),
        }
        # JAX sorts the names of a plain dict, and in that order XLA compiles an update that keeps a second thread busy
        self.state = OrderedDict(networks)
        self.state |= {f"target_{name}": jax.tree.map(jnp.copy, params) for name, params in networks.items()}
        self.state |= {f"{name}_optimizer": self.optimizer.init(params) for name, params in networks.items()}
        self.state["noise"] = noise_key
        for name in self.state:
            setattr(self, name, Part(self, name))
        units = dict(action_scale=self.scale, action_bias=self.bias)
        self.actor = Part(self, "actor", self.mu, action_low=low, action_high=high, **units)
        self.qf = Part(self, "qf", self.q, **units)
        self.args, self.device = args, device
        self.obs = np.zeros((1, obs_dim), np.float32)
        self.action = np.zeros(len(low))  # the last one

    def clip(self, action):
        """Noise takes actions out of bounds; so, by a hair, does rounding in scale and bias."""
        return action.clip(self.low, self.high)

    def act(self, obs):
        """The action (action_dim,) to explore with after the observation (obs_dim,), both NumPy arrays."""
        self.obs[0] = obs
        action, self.state["noise"] = self.explore(self.state["actor"], self.obs, self.state["noise"])
        self.action = np.asarray(action)[0]
        return self.action

    @partial(jax.jit, static_argnums=0, donate_argnames="key")  # of self it takes only what never changes
    def explore(self, actor, obs, key):
        """mu(s) + N, within the bounds: (1, action_dim). Also returns the next step's key."""
        key, noise_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (1, len(self.scale)))
        return self.clip(self.mu(actor, obs) + self.args.exploration_noise * self.scale * noise), key

    def critic_loss(self, qf, state, batch: Batch):
        """The mean of (y - Q(s, a))^2, equation 4, and of the values Q(s, a)."""
        next_q = self.q(state["target_qf"], batch.next_obs, self.mu(state["target_actor"], batch.next_obs))
        y = batch.reward + batch.discount * next_q  # equation 5; the discount is 0 after a terminal state
        q = self.q(qf, batch.obs, batch.action)
        return jnp.mean((y - q) ** 2), q.mean()

    def actor_loss(self, actor, qf, obs):
        """Minus the mean of Q(s, mu(s)): descending it ascends the sampled policy gradient, equation 6."""
        return -self.q(qf, obs, self.mu(actor, obs)).mean()

    def descend(self, state, name: str, gradients):
        """Adam's step, made in the state."""
        steps, state[f"{name}_optimizer"] = self.optimizer.update(gradients, state[f"{name}_optimizer"])
        state[name] = optax.apply_updates(state[name], steps)

    @partial(jax.jit, static_argnums=(0, 3), donate_argnames="state")
    def learn(self, state, rows, update_actor: bool):
        """The update as a function from one state to the next. Also returns what is logged."""
        obs, action, reward, next_obs, discount = jnp.split(rows, self.columns, 1)
        batch = Batch(obs, action, reward.squeeze(1), next_obs, discount.squeeze(1))
        (qf_loss, q), gradients = jax.value_and_grad(self.critic_loss, has_aux=True)(state["qf"], state, batch)
        losses = {"losses/qf1_loss": qf_loss, "losses/qf1_values": q}
        self.descend(state, "qf", gradients)
        if update_actor:
            actor_loss, gradients = jax.value_and_grad(self.actor_loss)(state["actor"], state["qf"], batch.obs)
            losses["losses/actor_loss"] = actor_loss
            self.descend(state, "actor", gradients)
            for name in "actor", "qf":  # theta' <- tau theta + (1 - tau) theta'
                target = f"target_{name}"
                state[target] = optax.incremental_update(state[name], state[target], self.args.tau)
        return state, losses

    def update(self, rows, update_actor: bool = True):
        """One update of Algorithm 1: the critic, then, unless update_actor is off, the actor and both targets."""
        self.state, losses = self.learn(self.state, rows, update_actor)
        return losses

    def diagnostics(self, rows):
        """What is logged beside the losses: the share of saturated actions, and how far the last one was from mu(s)."""
        unscaled = (self.mu(self.state["actor"], rows[:, : self.columns[0]]) - self.bias) / self.scale
        return {
            "charts/saturated_actions": (jnp.abs(unscaled) > 0.99).mean(),
            "charts/exploration_difference": np.abs(self.action - self.mu(self.state["actor"], self.obs)[0]).mean(),
        }

    def state_dict(self):
        return {name: getattr(self, name).state_dict() for name in self.state}

    def load_state_dict(self, state):
        tuned.set_attributes(self, state)


def provenance(device: torch.device, of_torchs=tuned.provenance) -> dict:
    record = of_torchs(device)
    record["versions"] |= {name: version(name) for name in ("jax", "jaxlib", "optax")}
    return record


def main(args: Args):
    for name in NOT_FOR_JAX.split():
        default, flag = getattr(Args, name), f"--{name.replace('_', '-')}"
        exit_unless(getattr(args, name) == default, f"{flag} is not for {SCRIPT}.py: it stays at {default}")
    tuned.main(args)


if __name__ == "__main__":
    tuned.SCRIPT, tuned.__file__, tuned.Args, tuned.provenance = SCRIPT, __file__, Args, provenance
    tuned.DDPG, tuned.ReplayBuffer = DDPG, ReplayBuffer
    sys.stdout.reconfigure(line_buffering=True)  # in a log file too
    main(tuned.parse_args())
