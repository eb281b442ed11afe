"""Environments as people bring them, for test_people.py. Used as people_stubs:EnvId."""

import random

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, Tuple


class Walk(gym.Env):
    """Steps from a start drawn anew for each episode; whatever one does, they pay 0, 1, 2, ..., and five pay 10."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)  # one for all instances, as in many environments
    made = []  # every instance since the list was last emptied; the first is the one that a run trains on

    def __init__(self, render_mode=None, size=2, length=5):
        self.render_mode, self.size, self.length = render_mode, size, length
        if size != 2:
            self.observation_space = Box(-np.inf, np.inf, (size,), np.float32)
        self.seeds, self.starts, self.actions = [], [], []
        self.made.append(self)

    def twist(self, obs, reward):
        """The tests put something else here: it is called in each step, len(self.actions) of which have been."""
        return obs, reward

    def training(self):
        return self is self.made[0]

    def start(self):
        return self.np_random.uniform(-1, 1)

    def observe(self):
        return np.full(self.size, self.x + self.t / 10, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.start(), 0
        self.seeds.append(seed)
        self.starts.append(self.x)
        return self.observe(), {}

    def step(self, action):
        self.actions.append(float(action[0]))
        self.x += 0.1 * self.actions[-1]
        self.t += 1
        obs, reward = self.twist(self.observe(), float(self.t - 1))
        return obs, reward, False, self.t == self.length, {}

    def render(self):
        return np.full((64, 64, 3), 100 + 10 * self.t, np.uint8)


class Unmakeable(Walk):
    def __init__(self, of_type=None, **kwargs):
        if of_type is None:
            assert len(kwargs) > 9
        len(7)


# Random generators


def draw_globally():
    """NumPy makes two normal numbers and keeps the second."""
    return float(np.random.uniform() + np.random.normal() + random.random() + torch.rand(()))


def seed_globally(seed):
    np.random.seed(seed)
    random.seed(seed)
    torch.manual_seed(seed)


class Seeder(Walk):
    """Seeds what it can when it is made and when it is given a seed, and draws its starts from there."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        seed_globally(0), draw_globally()

    def start(self):
        return draw_globally()

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            seed_globally(seed)
            self.action_space.seed(seed)
        return super().reset(seed=seed)


class OtherGenerator(Walk):
    """Draws from another generator than Gymnasium's from its first reset on; as in Gym before 0.26, from the first."""

    def __init__(self, kind, early=False, **kwargs):
        super().__init__(**kwargs)
        self.kind = kind
        if early:
            self.set_generator(0)

    def set_generator(self, seed):
        old = self.kind == "RandomState"
        self.np_random = np.random.RandomState(seed) if old else np.random.Generator(np.random.MT19937(seed))

    def reset(self, *, seed=None, options=None):
        if seed is not None or not self.seeds:
            self.set_generator(seed)
        return super().reset()


def counted(**kwargs):
    """An environment that comes with the statistics of its episodes."""
    return gym.wrappers.RecordEpisodeStatistics(Walk(**kwargs))


# Observations


class Grid(Walk):
    """Looks like an image, and is none."""

    observation_space = Box(0, 1, (4, 4, 3), np.float32)

    def observe(self):
        return np.full((4, 4, 3), self.t / 10, np.float32)


class Parts(Walk):
    observation_space = Dict(leg=Discrete(3), more=Tuple([Box(-9, 9, (2,), np.float32), Box(-9, 9, (2, 2))]))

    def observe(self):
        x = np.float32(self.x)
        return {"leg": np.int64(self.t % 3), "more": (np.full(2, x), np.full((2, 2), x))}


for walk in Walk, Unmakeable, Seeder, OtherGenerator, Grid, Parts:
    gym.register(f"{walk.__name__}-v0", walk)
gym.register("Counted-v0", counted, max_episode_steps=9)
