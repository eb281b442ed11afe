"""Copies of the scripts, changed by a few lines as their users would: what is added is checkpointed by existing."""

import collections
import copy
import io
import json
import random
import signal
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, SCRIPTS, agent
from test_resume import ANY_STEP, KILL, before, outcome
from test_resume import run as run_process

FLAGS = "--env-id Pendulum-v1 --total-timesteps 300 --learning-starts 80 --batch-size 16 --buffer-size 250"
FLAGS += " --checkpoint-interval 200 --eval-interval 200 --eval-episodes 1 --final-eval-episodes 1"
FLAGS += " --num-threads 1 --no-cuda --run-name x"
IN_THE_MIDDLE = before(ANY_STEP, 450, KILL)  # at step 250: an evaluation took 200

# Changes: pairs of the script's text and the user's

SECOND_CRITIC = {
    "        self.target_actor = copy": """\
        self.qf2 = copy.deepcopy(self.qf)
        nn.init.normal_(self.qf2.fc3.weight, std=0.01)
        self.target_qf2 = copy.deepcopy(self.qf2).requires_grad_(False)
        self.qf2_optimizer = torch.optim.Adam(self.qf2.parameters(), 1e-3)
        self.target_actor = copy""",
    "        self.qf_optimizer.step()\n": """\
        self.qf_optimizer.step()
        self.qf2_optimizer.step()
        self.qf2_optimizer.zero_grad()
""",
    "            y = batch.reward + batch.discount * next_q": """\
            next_q2 = self.target_qf2(batch.next_obs, self.target_actor(batch.next_obs))
            y = batch.reward + batch.discount * torch.minimum(next_q, next_q2)""",
    "return F.mse_loss(q, y), q\n": "return F.mse_loss(q, y) + F.mse_loss(self.qf2(batch.obs, batch.action), y), q\n",
    "*self.target_qf.parameters()]": "*self.target_qf.parameters(), *self.target_qf2.parameters()]",
    "*self.qf.parameters()]\n": "*self.qf.parameters(), *self.qf2.parameters()]\n",
}
SELF_ARGS = "        self.args, self.device = args, device\n"
MODULE_NOISE = {
    SELF_ARGS: f"{SELF_ARGS}        self.noise = MyNoise(self.actor.action_scale)\n",
    "class DDPG:": """\
class MyNoise(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("walk", torch.zeros_like(scale))

    def reset(self):
        pass

    def sample(self):
        self.walk.mul_(0.99).add_(0.1 * torch.randn_like(self.walk))
        return self.scale * self.walk


class DDPG:""",
}
NUMPY_NOISE = {
    SELF_ARGS: MODULE_NOISE[SELF_ARGS],
    "class DDPG:": """\
class MyNoise:
    def __init__(self, scale):
        self.scale, self.walk, self.rng = scale, np.zeros(len(scale)), np.random.default_rng(0)

    def reset(self):
        pass

    def sample(self):
        self.walk = 0.99 * self.walk + 0.1 * self.rng.normal(size=len(self.walk))
        return self.scale * torch.as_tensor(self.walk, dtype=torch.float32)

    def state_dict(self):
        return {"walk": self.walk.tolist(), "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        self.walk, self.rng.bit_generator.state = np.array(state["walk"]), state["rng"]


class DDPG:""",
}
NORMALISER = {
    SELF_ARGS: f"""{SELF_ARGS}\
        self.obs_norm = RunningNorm(*obs_space.shape).to(device)
        for network in self.actor, self.qf, self.target_actor, self.target_qf:
            network.obs_norm = self.obs_norm
""",
    "    def forward(self, obs, action):\n": "    def forward(self, obs, action):\n        obs = self.obs_norm(obs)\n",
    "    def forward(self, obs):\n": "    def forward(self, obs):\n        obs = self.obs_norm(obs)\n",
    "        self.action = self.explore()\n": """\
        self.obs_norm.update(self.obs[0])
        self.action = self.explore()
""",
    "class DDPG:": """\
class RunningNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))

    def update(self, obs):
        self.count += 1
        delta = obs - self.mean
        self.mean += delta / self.count
        self.var += (delta * (obs - self.mean) - self.var) / self.count

    def forward(self, obs):
        return (obs - self.mean) / (self.var.sqrt() + 1e-3)


class DDPG:""",
}
PRIORITIES = {
    "        self.added = 0\n": """\
        self.added, self.batches = 0, 0
        self.priorities = torch.zeros(capacity, device=device)
""",
    "        self.added += 1\n": """\
        self.priorities[self.added % len(self.rows)] = self.priorities.max().clamp(min=1)
        self.added += 1
""",
    "        indices = (uniform * self.size).long()\n": """\
        indices = self.indices = torch.multinomial(self.priorities, batch_size, replacement=True)
        self.batches += 1
""",
    "return F.mse_loss(q, y), q\n": """\
self.surprise = (y - q).detach().abs() + 0.01
        return F.mse_loss(q, y), q
""",
    "        return agent.update(batch, update_actor), batch\n": """\
        losses = agent.update(batch, update_actor)
        buffer.priorities[buffer.indices] = agent.surprise
        return losses, batch
""",
}
NEW_FLAGS = {  # one for a penalty, and some with names that a run's files use
    "    policy_frequency: int = 1  #": """\
    pre_tanh_l2: float = 0.0
    device: str = "here"
    path: str = "there"
    format: int = 1
    script: str = "none"
    hidden: tuple[int, ...] = (256, 256)
    policy_frequency: int = 1  #""",
    "        return torch.tanh(self.fc_mu(x)) *": """\
        self.before_tanh = self.fc_mu(x)
        return torch.tanh(self.before_tanh) *""",
    "        return -self.qf(obs, self.actor(obs)).mean()\n": """\
        loss = -self.qf(obs, self.actor(obs)).mean()
        self.penalty = self.args.pre_tanh_l2 * self.actor.before_tanh.square().mean()
        return loss + self.penalty
""",
}
MY_FLAGS = "--pre-tanh-l2 0.1 --device mine --path a/b --format 7 --script other --hidden 3 4"


def differ(one: dict, other: dict) -> bool:
    return not all(torch.equal(one[name], other[name]) for name in one)


CHANGES = {  # the new lines, the new flags, and what shows in a checkpoint that they did something
    "a second critic": (SECOND_CRITIC, "", lambda agent, _: differ(agent["qf2"], agent["target_qf2"])),
    "a noise": (MODULE_NOISE, "", lambda agent, _: agent["noise"]["walk"] != 0),
    "a noise in NumPy": (NUMPY_NOISE, "", lambda agent, _: agent["noise"]["walk"] != [0]),
    "a normaliser": (NORMALISER, "", lambda agent, _: agent["obs_norm"]["count"] == 120),
    "prioritised sampling": (PRIORITIES, "", lambda _, buffer: len(set(buffer["priorities"].tolist())) > 50),
    "new flags": (NEW_FLAGS, MY_FLAGS, lambda agent, _: agent["penalty"] > 0),
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
    assert checkpoint["global_step"] == 200 and did_something(checkpoint["agent"], checkpoint["buffer"])
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
    expected = dict(pre_tanh_l2=0.1, device="mine", path="a/b", format=7, script="other", hidden=[3, 4])
    assert repr({name: args[name] for name in expected}) == repr(expected)
    ended = run_process(tmp_path, tmp_path / "mine.py", "--evaluate runs/x")
    assert ended.code == 0 and ended.output.startswith("Pendulum-v1 after 200 steps"), ended.output


# Attributes of an agent and of a buffer

ATTRIBUTES = {  # as made by __init__, and as training leaves it
    "tensor": (torch.zeros(2), torch.ones(2)),
    "tensor of another shape and type": (torch.zeros(2), torch.ones(3, dtype=torch.int16)),
    "tensor of another type": (torch.zeros(2), torch.ones(2, dtype=torch.int16)),
    "parameter": (torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.ones(2))),
    "tensor with a gradient": (torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)),
    "number": (0, 3),
    "nothing at first": (None, torch.ones(2)),
    "list that grows": ([], [torch.ones(2), 2.5, (1, "a", None, True)]),
    "tuple": ((1, torch.zeros(1)), (2, torch.ones(1))),
    "set": (set(), {1, 2}),
    "dict": ({"a": torch.zeros(1)}, {"a": torch.ones(1), 3: 4}),
    "dict that shrinks": ({"a": 1, "b": 2}, {"a": 3}),
}


def same(one, other) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.tolist() == other.tolist() and one.requires_grad == other.requires_grad
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def parts(script):
    """An agent and a buffer."""
    return [agent(script), script.ReplayBuffer(10, 3, 1, CPU)]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_comes_back_from_a_checkpoint_as_it_was(script, name):
    at_first, later = ATTRIBUTES[name]
    for one, other in zip(parts(script), parts(script), strict=True):
        file, one.extra, other.extra = io.BytesIO(), copy.deepcopy(later), copy.deepcopy(at_first)
        torch.save(one.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert same(other.extra, later)


@pytest.mark.parametrize("name", ["obs", "action", "noise"])
def test_a_buffer_names_its_attributes_as_it_likes(script, name):
    (_, one), (_, other) = parts(script), parts(script)
    setattr(one, name, torch.ones(2)), setattr(other, name, torch.zeros(2))
    other.load_state_dict(one.state_dict())
    assert same(getattr(other, name), torch.ones(2))


class Pair(NamedTuple):
    one: int
    other: int


class Plain:
    pass


UNHOLDABLE = {
    "an array": lambda: np.zeros(2),
    "a NumPy number": lambda: np.float64(0.1),
    "an array in a dict": lambda: {"a": [np.zeros(2)]},
    "a plain object": Plain,
    "a named tuple": lambda: Pair(1, 2),
    "a list of networks": lambda: [torch.nn.Linear(1, 1)],
    "a generator": lambda: (i for i in range(3)),
    "a deque": lambda: collections.deque(),
    "a defaultdict": lambda: collections.defaultdict(int),
    "a list of a class of its own": lambda: type("Mine", (list,), {})([1]),
    "torch's random generator": torch.Generator,
    "NumPy's random generator": np.random.default_rng,
    "Python's random generator": random.Random,
    "an open file": lambda: open(__file__),
}


def assert_refused(run, script, capsys, part: str, value):
    with pytest.raises(SystemExit) as exit:
        run(script)
    assert exit.value.code == 2
    what = f"extra of {part}, a {type(value).__name__}"
    remedy = "make it a tensor or plain values, or give it state_dict and load_state_dict"
    assert capsys.readouterr().err == f"error: no checkpoint can hold {what}: {remedy}\n"


@pytest.mark.parametrize("part", ["DDPG", "ReplayBuffer"])
@pytest.mark.parametrize("script, name", [(script, name) for script in SCRIPTS for name in UNHOLDABLE])
def test_what_no_checkpoint_can_hold_is_refused_before_training(script, name, part, run, monkeypatch, capsys, tmp_path):
    value, made = UNHOLDABLE[name](), getattr(script, part).__init__
    monkeypatch.setattr(
        getattr(script, part), "__init__", lambda self, *args: made(self, *args) or setattr(self, "extra", value)
    )
    assert_refused(run, script, capsys, part, value)
    assert not list(tmp_path.iterdir())


def test_what_no_checkpoint_can_hold_is_refused_when_an_update_brings_it(script, run, made, monkeypatch, capsys):
    """And not at the first checkpoint, hours later."""
    update, runs = script.DDPG.update, made(script, "Run")
    monkeypatch.setattr(
        script.DDPG, "update", lambda self, *args: setattr(self, "extra", Plain()) or update(self, *args)
    )
    assert_refused(run, script, capsys, "DDPG", Plain())
    assert runs[0].global_step == 41  # learning starts after 40
