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

    def __init__(self, render_mode=None, size=2, length=5, action=None):
        self.render_mode, self.size, self.length = render_mode, size, length
        if size != 2:
            self.observation_space = Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = action or self.action_space
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
        self.actions.append(float(np.ravel(action)[0]))
        self.x += 0.1 * self.actions[-1]
        self.t += 1
        obs, reward = self.twist(self.observe(), float(self.t - 1))
        return obs, reward, False, self.t == self.length, {}

    def render(self):
        return np.full((64, 64, 3), 100 + 10 * self.t, np.uint8)


class OtherWalk(Walk):
    pass


class Unfilmable(Walk):
    def render(self):
        raise RuntimeError("no GL\nhere")


# Random generators


def draw_globally():
    return float(np.random.uniform() + random.random() + torch.rand(()))


def seed_globally(seed):
    np.random.seed(seed)
    random.seed(seed)
    torch.manual_seed(seed)


class Seeder(Walk):
    """Seeds what it can when it is given a seed, and draws its starts from there."""

    def start(self):
        return draw_globally()

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            seed_globally(seed)
            self.action_space.seed(seed)
        return super().reset(seed=seed)


class Normal(Walk):
    """Draws one normal number at each start, from NumPy's global generator, which makes two and keeps the second."""

    def start(self):
        return np.random.normal()


class ConstructorDraws(Walk):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        draw_globally(), np.random.normal()


class ConstructorSeeds(Walk):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        seed_globally(0)


class OldGenerator(Walk):
    """As in Gym before 0.26."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.np_random = np.random.RandomState(0)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.np_random = np.random.RandomState(seed)
        return super().reset()


class LateOldGenerator(Walk):
    """Has it only from its first reset on."""

    def reset(self, *, seed=None, options=None):
        if seed is not None or not isinstance(self.np_random, np.random.RandomState):
            self.np_random = np.random.RandomState(seed)
        return super().reset()


class LateOtherGenerator(Walk):
    """From its first reset on, another one than Gymnasium's."""

    def reset(self, *, seed=None, options=None):
        if seed is not None or not self.seeds:
            self.np_random = np.random.Generator(np.random.MT19937(seed))
        return super().reset()


class NoGenerator(Walk):
    np_random = None

    def start(self):
        return np.random.uniform(-1, 1)

    def reset(self, *, seed=None, options=None):
        return super().reset()


def counted(**kwargs):
    """An environment that comes with the statistics of its episodes."""
    return gym.wrappers.RecordEpisodeStatistics(Walk(**kwargs))


gym.register("Counted-v0", counted, max_episode_steps=9)

# What cannot be made


class BareAssert(Walk):
    def __init__(self, **kwargs):
        assert len(kwargs) > 9


class MissingGoal(Walk):
    def __init__(self, **kwargs):
        kwargs["goal"]


class WrongType(Walk):
    def __init__(self, **kwargs):
        len(7)


# Observations


class Observes(Walk):
    """An observation space of any kind, and observations from it, which hold where the walk stands."""

    def __init__(self, space, **kwargs):
        super().__init__(**kwargs)
        self.observation_space = space

    def observe(self):
        return self.within(self.observation_space)

    def within(self, space):
        if isinstance(space, Dict):
            return {name: self.within(part) for name, part in space.items()}
        if isinstance(space, Tuple):
            return tuple(map(self.within, space))
        if isinstance(space, Discrete):
            return np.int64(self.t % space.n)
        return np.clip(np.full(space.shape, self.x), space.low, space.high).astype(space.dtype)


POSITION = Box(-9, 9, (2,), np.float32)
OBSERVATIONS = {
    "Dict": Dict(position=POSITION, leg=Discrete(3), more=Dict(map=Box(-1, 1, (2, 2), np.float32))),
    "Tuple": Tuple((POSITION, Box(-1, 1, (1,), np.float64))),
    "UnitGrid": Box(0, 1, (4, 4, 3), np.float32),
    "SignedGrid": Box(-1, 1, (4, 4, 3), np.float32),
    "Image": Box(0, 255, (16, 16, 3), np.uint8),
    "FloatImage": Box(0, 255, (16, 16, 3), np.float32),
}
for name, space in OBSERVATIONS.items():
    gym.register(f"{name}-v0", Observes, kwargs=dict(space=space))
for name, shape in dict(MatrixAction=(1, 1), NumberAction=()).items():
    gym.register(f"{name}-v0", Walk, kwargs=dict(action=Box(-1, 1, shape, np.float32)))
WALKS = [Walk, OtherWalk, Unfilmable, Seeder, Normal, ConstructorDraws, ConstructorSeeds]
WALKS += [OldGenerator, LateOldGenerator, LateOtherGenerator, NoGenerator, BareAssert, MissingGoal, WrongType]
for walk in WALKS:
    gym.register(f"{walk.__name__}-v0", walk)
