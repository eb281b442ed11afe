# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#   "tensorboard==2.21.0", "tqdm==4.70.1", "psutil==7.2.2", "moviepy==2.2.1",
#   "jax==0.10.2", "jaxlib==0.10.2", "optax==0.2.8"]
# ///
"""The agent of ddpg_continuous_action.py in JAX, on the CPU: the same DDPG through XLA.

    pip install -r benchmark/requirements-jax.txt
    python benchmark/jax_ddpg.py --env-id Hopper-v5 --seed 3

What learns is here: the networks, the replay buffer, the agent and the loop, in the order of the PyTorch script, to be
read beside it. What surrounds them is that script's own: flags, environments, evaluation, log, checkpoints and errors.
"""

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ddpg_continuous_action as tuned
from ddpg_continuous_action import Batch, Run, evaluate, evaluate_run, exit_unless, parse_args, set_up, state_of

try:
    import jax
    import jax.numpy as jnp
    import optax
except ImportError as error:
    exit_unless(False, f"{error}: pip install -r benchmark/requirements-jax.txt")

SCRIPT = Path(__file__).stem
NOT_FOR_JAX = "torch_deterministic cuda cudagraphs compile matmul noise ou_theta ou_dt noise_anneal_steps "
NOT_FOR_JAX += "exploration_noise_final layer_norm n_step target_noise target_noise_clip"


@dataclass
class Args(tuned.Args):
    exp_name: str = SCRIPT
    """name of the experiment, part of the run's name"""
    cuda: bool = False
    """not for JAX, which runs on the CPU here"""
    matmul: str = "XLA"
    """not for JAX: XLA multiplies matrices"""

    SCRIPT = SCRIPT
    PACKAGES = *tuned.Args.PACKAGES, "jax", "jaxlib", "optax"


def init(key, sizes: dict) -> dict:
    """Parameters by torch's names, in its shapes and with its default: uniform in ±1/sqrt(inputs), biases too."""
    params = {}
    for name, (inputs, outputs) in sizes.items():
        for part, shape in ("weight", (outputs, inputs)), ("bias", (outputs,)):
            key, part_key = jax.random.split(key)
            bound = inputs**-0.5
            params[f"{name}.{part}"] = jax.random.uniform(part_key, shape, minval=-bound, maxval=bound)
    return params


def linear(params, name: str, x):
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


class QNetwork:
    """Action value Q(s, a): parameters, observations (N, obs_dim) and actions (N, action_dim) to values (N,)."""

    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray):
        self.sizes = dict(fc1=(obs_dim + len(low), 256), fc2=(256, 256), fc3=(256, 1))
        self.action_scale, self.action_bias = (high - low) / 2, (high + low) / 2

    @partial(jax.jit, static_argnums=0)
    def __call__(self, params, obs, action):
        action = (action - self.action_bias) / self.action_scale  # to [-1, 1], whatever the environment's units
        x = jnp.concatenate([obs, action], 1)
        x = jax.nn.relu(linear(params, "fc1", x))
        x = jax.nn.relu(linear(params, "fc2", x))
        return linear(params, "fc3", x).squeeze(1)  # with (N, 1), y - q would broadcast to (N, N)


class Actor:
    """Deterministic policy mu(s): parameters and observations (N, obs_dim) to actions within [low, high]."""

    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray):
        self.sizes = dict(fc1=(obs_dim, 256), fc2=(256, 256), fc_mu=(256, len(low)))
        self.action_low, self.action_high = low, high
        self.action_scale, self.action_bias = (high - low) / 2, (high + low) / 2

    @partial(jax.jit, static_argnums=0)
    def __call__(self, params, obs):
        x = jax.nn.relu(linear(params, "fc1", obs))
        x = jax.nn.relu(linear(params, "fc2", x))
        return jnp.tanh(linear(params, "fc_mu", x)) * self.action_scale + self.action_bias

    def clip(self, action):
        """Noise takes actions out of the bounds, and so, by a hair, does the rounding of scale and bias."""
        return action.clip(self.action_low, self.action_high)


class ReplayBuffer(tuned.ReplayBuffer):
    """The last `capacity` transitions, one float32 row each, in NumPy: a batch is rows, which the update splits."""

    def __init__(self, *args):
        super().__init__(*args)
        self.array = self.rows.numpy()  # the same memory

    def add(self, obs, action, reward, next_obs, discount):
        self.array[self.added % len(self.array)] = np.concatenate([obs, action, [reward], next_obs, [discount]])
        self.added += 1

    def sample(self, batch_size: int) -> np.ndarray:
        """Transitions drawn uniformly, with replacement: (N, 2 obs_dim + action_dim + 2)."""
        return self.array[np.random.randint(min(self.added, len(self.array)), size=batch_size)]


class State(NamedTuple):
    """All that learning and acting change, in trees of arrays; the jitted functions read it from their arguments."""

    actor: dict
    qf: dict
    target_actor: dict
    target_qf: dict
    actor_optimizer: Any
    qf_optimizer: Any
    key: jax.Array  # of the exploration noise


class DDPG:
    """The networks, targets, optimisers and noise of Algorithm 1, and what it does with them."""

    def __init__(self, args: Args, obs_space: gym.spaces.Box, action_space: gym.spaces.Box, device: torch.device):
        (obs_dim,), (low, high) = obs_space.shape, map(torch.Tensor.numpy, tuned.float32_bounds(action_space))
        self.mu, self.q = Actor(obs_dim, low, high), QNetwork(obs_dim, low, high)
        actor_key, qf_key, key = jax.random.split(jax.random.PRNGKey(args.seed), 3)
        actor, qf = init(actor_key, self.mu.sizes), init(qf_key, self.q.sizes)
        # Over one vector instead of six arrays: 5 % of an update, and too little at a time to keep a second thread busy
        self.optimizer = optax.flatten(optax.adam(args.learning_rate))
        targets, optimizers = jax.tree.map(jnp.copy, (actor, qf)), (self.optimizer.init(actor), self.optimizer.init(qf))
        self.state = State(actor, qf, *targets, *optimizers, key)
        self.args, self.device = args, device
        self.columns = np.cumsum([obs_dim, len(low), 1, obs_dim])  # where a row of the replay buffer is split
        self.obs = np.zeros((1, obs_dim), np.float32)
        self.action = np.zeros(len(low))  # the last one

    def act(self, obs):
        """The action (action_dim,) to explore with after the observation (obs_dim,), both NumPy arrays."""
        self.obs[0] = obs
        action, key = self.explore(self.state.actor, self.obs, self.state.key)
        self.action, self.state = np.asarray(action)[0], self.state._replace(key=key)
        return self.action

    @partial(jax.jit, static_argnums=0, donate_argnames="key")  # of self it takes only what never changes
    def explore(self, actor, obs, key):
        """mu(s) + N, within the bounds: (1, action_dim). Also returns the next step's key."""
        key, noise_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (1, len(self.mu.action_scale)))
        return self.mu.clip(self.mu(actor, obs) + self.args.exploration_noise * self.mu.action_scale * noise), key

    def split(self, rows) -> Batch:
        obs, action, reward, next_obs, discount = jnp.split(rows, self.columns, 1)
        return Batch(obs, action, reward.squeeze(1), next_obs, discount.squeeze(1))

    def critic_loss(self, qf, state: State, batch: Batch):
        """The mean of (y - Q(s, a))^2, equation 4, and of the values Q(s, a)."""
        next_q = self.q(state.target_qf, batch.next_obs, self.mu(state.target_actor, batch.next_obs))
        y = batch.reward + batch.discount * next_q  # equation 5; the discount is 0 after a terminal state
        q = self.q(qf, batch.obs, batch.action)
        return jnp.mean((y - q) ** 2), q.mean()

    def actor_loss(self, actor, qf, obs):
        """Minus the mean of Q(s, mu(s)): descending it ascends the sampled policy gradient, equation 6."""
        return -self.q(qf, obs, self.mu(actor, obs)).mean()

    def descend(self, params, gradients, optimizer):
        steps, optimizer = self.optimizer.update(gradients, optimizer)
        return optax.apply_updates(params, steps), optimizer

    @partial(jax.jit, static_argnums=(0, 3), donate_argnames="state")
    def learn(self, state: State, rows, update_actor: bool):
        """One update of Algorithm 1: the critic, then the actor, then both targets. Also returns what is logged."""
        batch = self.split(rows)
        (qf_loss, q), gradients = jax.value_and_grad(self.critic_loss, has_aux=True)(state.qf, state, batch)
        losses = {
            "losses/qf1_loss": qf_loss,
            "losses/qf1_values": q,
            "losses/qf1_grad_norm": optax.tree.norm(gradients),
        }
        qf, qf_optimizer = self.descend(state.qf, gradients, state.qf_optimizer)
        state = state._replace(qf=qf, qf_optimizer=qf_optimizer)
        if update_actor:
            actor_loss, gradients = jax.value_and_grad(self.actor_loss)(state.actor, qf, batch.obs)
            losses |= {"losses/actor_loss": actor_loss, "losses/actor_grad_norm": optax.tree.norm(gradients)}
            actor, actor_optimizer = self.descend(state.actor, gradients, state.actor_optimizer)
            targets = state.target_actor, state.target_qf  # theta' <- tau theta + (1 - tau) theta'
            targets = optax.incremental_update((actor, qf), targets, self.args.tau)
            state = State(actor, qf, *targets, actor_optimizer, qf_optimizer, state.key)
        return state, losses

    def update(self, rows, update_actor: bool = True):
        self.state, losses = self.learn(self.state, rows, update_actor)
        return losses

    def diagnostics(self, rows):
        """What is logged beside the losses: the share of saturated actions, and how far the last one was from mu(s)."""
        unscaled = (self.mu(self.state.actor, self.split(rows).obs) - self.mu.action_bias) / self.mu.action_scale
        return {
            "charts/saturated_actions": (jnp.abs(unscaled) > 0.99).mean(),
            "charts/exploration_difference": np.abs(self.action - self.mu(self.state.actor, self.obs)[0]).mean(),
        }

    @property
    def actor(self):
        """mu(s) and, next, Q(s, a), as evaluate() calls them."""
        return OnTensors(self.mu, self.state.actor)

    @property
    def qf(self):
        return OnTensors(self.q, self.state.qf)

    def model_state(self):
        """For model.pt: everything but what only training needs. The PyTorch script's networks load it too."""
        return {name: state for name, state in self.state_dict().items() if name in ("actor", "qf")}

    def state_dict(self):
        return state_of(jax.tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), self.state._asdict()))

    def load_state_dict(self, state):
        for name, saved in state.items():
            leaves = [jnp.array(leaf.numpy()) for leaf in jax.tree.leaves(saved)]
            tree = jax.tree.unflatten(jax.tree.structure(getattr(self.state, name)), leaves)
            self.state = self.state._replace(**{name: tree})


class OnTensors:
    """A network with its parameters that takes and returns torch's tensors."""

    def __init__(self, network: Actor | QNetwork, params: dict):
        self.network, self.params = network, params

    def __call__(self, *inputs):
        return torch.from_numpy(np.array(self.network(self.params, *(each.numpy() for each in inputs))))

    def clip(self, action):
        return torch.from_numpy(self.network.clip(action.numpy()))


def use_threads(number: int):
    """Of XLA's, like torch's; 0 leaves XLA's own choice. XLA looks when it first computes."""
    if number:
        os.environ["NPROC"] = str(number)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # nothing could be done while an update is under way


def main(args: Args):
    """Train. From a notebook too: main(Args(env_id="Hopper-v5")), main(Args(resume="runs/NAME"))."""
    for name in NOT_FOR_JAX.split():
        default, flag = getattr(Args, name), f"--{name.replace('_', '-')}"
        exit_unless(getattr(args, name) == default, f"{flag} is not for {SCRIPT}.py: it stays at {default}")
    if args.evaluate:
        return evaluate_run(args, DDPG)
    args, device, env = set_up(args)
    use_threads(args.num_threads)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]

    # Initialise critic Q(s, a) and actor mu(s), copy both to the targets, empty the replay buffer
    agent = DDPG(args, env.observation_space, env.action_space, device)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)

    with Run(args, device, env, agent=agent, buffer=buffer) as run:  # --resume restores both from the checkpoint
        episode_over = True
        for global_step in run.steps():
            if episode_over:  # receive s_1
                obs, _ = env.reset(seed=args.seed if global_step == 1 else None)

            # Select action a_t = mu(s_t) + N_t
            learning = global_step > args.learning_starts
            action = agent.act(obs) if learning else env.action_space.sample()

            # Execute a_t, observe r_t and s_t+1, store the transition (at an episode's end too with the real s_t+1)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            buffer.add(obs, action, reward, next_obs, 0 if terminated else args.gamma)
            obs, episode_over = next_obs, terminated or truncated

            # Sample a batch; update the critic, the actor and the targets
            if learning:
                rows = buffer.sample(args.batch_size)
                losses = agent.update(rows, global_step % args.policy_frequency == 0)

            due = run.record_step(reward, episode_over)
            if due.losses and learning:  # first: a loss that is not finite ends the run before anything bad is saved
                run.log_losses(losses | agent.diagnostics(rows))
            if due.evaluation:
                run.add_evaluation(*evaluate(agent, run.eval_envs, run.eval_seed, args.max_eval_steps))
            if due.model:
                run.save_model(agent.model_state())
            if due.checkpoint:
                run.save_checkpoint()
        returns = [evaluate(agent, envs, seed, args.max_eval_steps)[0] for envs, seed in run.final_starts()]
        run.finish(returns)


if __name__ == "__main__":
    main(parse_args(Args))
