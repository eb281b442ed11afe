"""Copies of the scripts, changed by a few lines as their users would: what is added is checkpointed by existing."""

import collections
import io
import json
import random
import signal
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, agent
from test_resume import ANY_STEP, before, outcome, send
from test_resume import run as run_process

FLAGS = "--env-id Pendulum-v1 --total-timesteps 300 --learning-starts 80 --batch-size 16 --buffer-size 250"
FLAGS += " --checkpoint-interval 200 --eval-interval 200 --eval-episodes 1 --final-eval-episodes 1"
FLAGS += " --num-threads 1 --no-cuda --run-name x"
IN_THE_MIDDLE = before(ANY_STEP, 450, send(signal.SIGKILL))  # at step 250: an evaluation took 200

# Changes: pairs of the script's text and the user's

SECOND_CRITIC = {
    "        self.target_actor = copy": """\
        self.qf2 = copy.deepcopy(self.qf)
        nn.init.normal_(self.qf2.fc3.weight, std=0.01)
        self.target_qf2 = copy.deepcopy(self.qf2).requires_grad_(False)
        self.target_actor = copy""",
    "Adam(self.qf.parameters(),": "Adam([*self.qf.parameters(), *self.qf2.parameters()],",
    "            y = batch.reward + batch.discount * next_q": """\
            next_q2 = self.target_qf2(batch.next_obs, self.target_actor(batch.next_obs))
            y = batch.reward + batch.discount * torch.minimum(next_q, next_q2)""",
    "return F.mse_loss(q, y), q\n": "return F.mse_loss(q, y) + F.mse_loss(self.qf2(batch.obs, batch.action), y), q\n",
    "*self.target_qf.parameters()]": "*self.target_qf.parameters(), *self.target_qf2.parameters()]",
    "*self.qf.parameters()], self": "*self.qf.parameters(), *self.qf2.parameters()], self",
}
SELF_ARGS = "        self.args, self.device = args, device\n"
MY_NOISE = {SELF_ARGS: f"{SELF_ARGS}        self.noise = MyNoise(self.actor.action_scale)\n"}
NOISE_WITH_A_STATE_DICT = MY_NOISE | {
    "class DDPG:": """\
class MyNoise:
    def __init__(self, scale):
        self.scale, self.walk = scale, torch.zeros_like(scale)

    def reset(self):
        pass

    def sample(self):
        self.walk = 0.99 * self.walk + 0.1 * torch.randn_like(self.walk)
        return self.scale * self.walk

    def state_dict(self):
        return {"walk": self.walk}

    def load_state_dict(self, state):
        self.walk = state["walk"]


class DDPG:"""
}
NOISE_WITH_PLAIN_ATTRIBUTES = MY_NOISE | {
    "class DDPG:": """\
class MyNoise:
    def __init__(self, scale):
        self.scale, self.walk = scale, torch.zeros_like(scale)
        self.array, self.size = np.zeros(len(scale)), 1.0

    def reset(self):
        self.size *= 0.9

    def sample(self):
        self.walk = 0.99 * self.walk + 0.1 * torch.randn_like(self.walk)
        self.array += 0.1 * np.random.normal(size=self.array.shape)
        self.size += 0.01 * np.abs(self.array).mean()
        return self.scale * self.size * (self.walk + torch.as_tensor(self.array, dtype=torch.float32))


class DDPG:"""
}
NORMALISER = {
    "class DDPG:": """\
class Normaliser:
    def __init__(self, size):
        self.count, self.mean, self.var = 0, np.zeros(size), np.ones(size)

    def update(self, obs):
        self.count += 1
        delta = obs - self.mean
        self.mean = self.mean + delta / self.count
        self.var = self.var + (delta * (obs - self.mean) - self.var) / self.count

    def __call__(self, obs):
        mean, std = torch.as_tensor(self.mean).float(), torch.as_tensor(self.var).float().sqrt()
        return (obs - mean) / (std + 1e-3)


class DDPG:""",
    SELF_ARGS: f"{SELF_ARGS}        self.normaliser = Normaliser(obs_space.shape)\n",
    "copy_async(obs, self.obs[0])": "self.normaliser.update(obs)\n        copy_async(obs, self.obs[0])",
    "self.actor(self.obs) + self": "self.actor(self.normaliser(self.obs)) + self",
    "self.actor(self.obs)[0]": "self.actor(self.normaliser(self.obs))[0]",
    "        qf_loss, q = self": """\
        batch = batch._replace(obs=self.normaliser(batch.obs), next_obs=self.normaliser(batch.next_obs))
        qf_loss, q = self""",
    "(self.actor(batch.obs) -": "(self.actor(self.normaliser(batch.obs)) -",
    "obs.to(agent.device)": "agent.normaliser(obs.to(agent.device))",
}
NEW_FLAGS = {
    "    policy_frequency: int = 1\n": """\
    target_entropy: float = -6.0
    device: str = "here"
    path: str = "there"
    format: int = 1
    script: str = "none"
    hidden: tuple[int, ...] = (256, 256)
    policy_frequency: int = 1
""",
    SELF_ARGS: f"""{SELF_ARGS}\
        self.my_args, self.obs_space, self.action_space = args, obs_space, action_space
""",
    "return -self.qf(obs, self.actor(obs)).mean()": """\
action = self.actor(obs) + 0.01 * float(self.action_space.sample()[0])
        return -self.qf(obs, action).mean() + self.my_args.target_entropy * 1e-3 * action.square().mean()""",
}
MY_FLAGS = "--target-entropy -3 --device mine --path a/b --format 7 --script other --hidden 3 4"


def differ(one: dict, other: dict) -> bool:
    return not all(torch.equal(one[name], other[name]) for name in one)


CHANGES = {  # the new lines, the new flags, and what shows in the agent's state that they did something
    "a second critic": (SECOND_CRITIC, "", lambda agent: differ(agent["qf2"], agent["target_qf2"])),
    "a noise with state_dict": (NOISE_WITH_A_STATE_DICT, "", lambda agent: agent["noise"]["walk"] != 0),
    "a noise without": (NOISE_WITH_PLAIN_ATTRIBUTES, "", lambda agent: agent["noise"]["size"] != 1),
    "a normaliser": (NORMALISER, "", lambda agent: agent["normaliser"]["count"] > 100),
    "flags and spaces": (NEW_FLAGS, MY_FLAGS, lambda agent: True),
}


def changed(script, changes: dict[str, str]) -> str:
    source = (ROOT / f"{script.SCRIPT}.py").read_text()
    for old, new in changes.items():
        assert source.count(old) == 1, f"{source.count(old)} times in {script.SCRIPT}.py: {old}"
        source = source.replace(old, new)
    return source


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_resumes_to_the_same_bytes(script, change, tmp_path):
    lines, flags, did_something = CHANGES[change]
    (tmp_path / "mine.py").write_text(changed(script, lines))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    ended = run_process(whole, tmp_path / "mine.py", f"{FLAGS} {flags}")
    assert ended.code == 0, ended.output
    ended = run_process(killed, tmp_path / "mine.py", f"{FLAGS} {flags} --total-timesteps 260", IN_THE_MIDDLE)
    assert ended.code == -signal.SIGKILL, ended.output
    checkpoint = torch.load(killed / "runs/x/checkpoint.pt", weights_only=True)
    assert checkpoint["global_step"] == 200 and did_something(checkpoint["parts"]["agent"])
    ended = run_process(killed, tmp_path / "mine.py", "--resume runs/x --total-timesteps 300")
    assert ended.code == 0, ended.output
    assert outcome(killed / "runs/x") == outcome(whole / "runs/x")


def test_a_normaliser_is_part_of_the_model(script, tmp_path):
    """--evaluate reproduces the last evaluation: episodes of one start, and no other seed's."""
    (tmp_path / "mine.py").write_text(changed(script, NORMALISER))
    assert run_process(tmp_path, tmp_path / "mine.py", f"{FLAGS} --total-timesteps 200").code == 0
    mean = float((tmp_path / "runs/x/eval.csv").read_text().splitlines()[-1].split(",")[1])
    ended = run_process(tmp_path, tmp_path / "mine.py", "--evaluate runs/x")
    assert ended.output == f"Pendulum-v1 after 200 steps: {mean:.2f} ± 0.00 over 1 episode\n"


def test_the_flags_of_a_copy_are_kept(script, tmp_path):
    (tmp_path / "mine.py").write_text(changed(script, NEW_FLAGS))
    assert run_process(tmp_path, tmp_path / "mine.py", f"{FLAGS} {MY_FLAGS} --total-timesteps 200").code == 0
    args = json.loads((tmp_path / "runs/x/args.json").read_text())["args"]
    expected = dict(target_entropy=-3, device="mine", path="a/b", format=7, script="other", hidden=[3, 4])
    assert args.items() >= expected.items()
    ended = run_process(tmp_path, tmp_path / "mine.py", "--evaluate runs/x")
    assert ended.code == 0 and ended.output.startswith("Pendulum-v1 after 200 steps"), ended.output


# Attributes of an agent


class Pair(NamedTuple):
    one: torch.Tensor
    other: float


class Counter:
    def __init__(self, count):
        self.count = count

    def __eq__(self, other):
        return type(other) is Counter and other.count == self.count


ATTRIBUTES = {  # as made by __init__, and as training leaves it
    "tensor": (torch.zeros(2), torch.ones(2)),
    "array": (np.zeros(2), np.ones(2)),
    "array of another type": (np.zeros(2), np.ones(3, np.int16)),
    "number": (0, 3),
    "float that becomes NumPy's": (0.0, np.float64(0.1)),
    "float that becomes NumPy's float32": (0.0, np.float32(0.1)),
    "nothing at first": (None, np.ones(2)),
    "numbers in an array": (np.arange(2), np.arange(3)),
    "list that grows": ([], [np.ones(2), np.float64(2), (1, "a")]),
    "tuple": ((1, np.zeros(1)), (2, np.ones(1))),
    "named tuple": (Pair(torch.zeros(1), 0.0), Pair(torch.ones(1), 1.0)),
    "dict": ({"a": np.zeros(1)}, {"a": np.ones(1), 3: 4}),
    "dict that shrinks": ({"a": 1, "b": 2}, {"a": 3}),
    "object": (Counter(0), Counter(5)),
    "objects in a list": ([Counter(0)], [Counter(5)]),
}


def same(one, other) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor | np.ndarray):
        return one.dtype == other.dtype and one.tolist() == other.tolist()
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_comes_back_from_a_checkpoint_as_it_was(script, name):
    at_first, later = ATTRIBUTES[name]
    one, other, file = agent(script), agent(script), io.BytesIO()
    one.extra, other.extra = later, at_first
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same(other.extra, later)


UNHOLDABLE = {
    "a generator": lambda: (i for i in range(3)),
    "a deque": lambda: collections.deque(),
    "a set": lambda: {1, 2},
    "a defaultdict": lambda: collections.defaultdict(int),
    "an OrderedDict": lambda: collections.OrderedDict(a=1),
    "a counter": lambda: collections.Counter("ab"),
    "a list of a class of its own": lambda: type("Mine", (list,), {})([1]),
    "torch's random generator": torch.Generator,
    "NumPy's random generator": np.random.default_rng,
    "Python's random generator": random.Random,
    "an open file": lambda: open(__file__),
}


@pytest.mark.parametrize("script, name", [(script, name) for script in SCRIPTS for name in UNHOLDABLE])
def test_what_no_checkpoint_can_hold_fails_before_training(script, name, run, monkeypatch, tmp_path):
    class Mine(script.DDPG):
        def __init__(self, *args):
            super().__init__(*args)
            self.noise.mine = UNHOLDABLE[name]()

    monkeypatch.setattr(script, "DDPG", Mine)
    with pytest.raises(TypeError, match="no checkpoint can hold|cannot pickle"):
        run(script)
    assert not list(tmp_path.iterdir())
