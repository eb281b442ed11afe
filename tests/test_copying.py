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
from conftest import CPU, ROOT, agent
from test_resume import ANY_STEP, KILL, before, outcome
from test_resume import run as run_process

FLAGS = "--env-id Pendulum-v1 --total-timesteps 120 --learning-starts 40 --batch-size 16 --buffer-size 90"
FLAGS += " --checkpoint-interval 80 --eval-interval 80 --eval-episodes 1 --final-eval-episodes 1"
FLAGS += ' --num-threads 1 --no-cuda --run-name x --env-kwargs {"max_episode_steps":20}'
FLAGS += " --pre-tanh-l2 0.1 --device mine --path a/b --format 7 --script other --hidden 3 4"
IN_THE_MIDDLE = before(ANY_STEP, 120, KILL)  # at step 100: an evaluation took 20

# Changes: pairs of the script's text and the user's

SELF_ARGS = "        self.args, self.device = args, device\n"
NOISE = {
    SELF_ARGS: f"{SELF_ARGS}        self.noise = MyNoise(self.actor.action_scale)\n",
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


def changed(script, changes: dict[str, str]) -> str:
    source = (ROOT / f"{script.SCRIPT}.py").read_text()
    for old, new in changes.items():
        assert source.count(old) == 1, f"{source.count(old)} times in {script.SCRIPT}.py: {old}"
        source = source.replace(old, new)
    return source


def test_a_changed_copy_resumes_to_the_same_bytes(script, tmp_path):
    """Its flags are kept, and --evaluate reproduces the last evaluation: episodes of one start, and no other seed's.
    The changes of the pages, a second critic among them, are in test_readme.py.
    """
    mine, whole, killed = (tmp_path / name for name in ("mine.py", "whole", "killed"))
    mine.write_text(changed(script, NOISE | PRIORITIES | NEW_FLAGS))
    whole.mkdir(), killed.mkdir()
    ended = run_process(whole, mine, FLAGS)
    assert ended.code == 0, ended.output
    ended = run_process(killed, mine, f"{FLAGS} --total-timesteps 110", IN_THE_MIDDLE)
    assert ended.code == -signal.SIGKILL, ended.output
    checkpoint = torch.load(killed / "runs/x/checkpoint.pt", weights_only=True)
    assert checkpoint["global_step"] == 80 and checkpoint["agent"]["penalty"] > 0
    assert checkpoint["agent"]["noise"]["walk"] != [0] and len(set(checkpoint["buffer"]["priorities"].tolist())) > 50
    ended = run_process(killed, mine, "--resume runs/x --total-timesteps 120")
    assert ended.code == 0, ended.output
    assert outcome(killed / "runs/x") == outcome(whole / "runs/x")

    args = json.loads((killed / "runs/x/args.json").read_text())["args"]
    expected = dict(pre_tanh_l2=0.1, device="mine", path="a/b", format=7, script="other", hidden=[3, 4])
    assert repr({name: args[name] for name in expected}) == repr(expected)
    mean = float((killed / "runs/x/eval.csv").read_text().splitlines()[-1].split(",")[1])
    ended = run_process(killed, mine, "--evaluate runs/x")
    assert ended.output == f"Pendulum-v1 after 120 steps: {mean:.2f} ± 0.00 over 1 episode\n"


# Attributes of an agent and of a buffer

ATTRIBUTES = [  # as made by __init__, and as training leaves it
    (torch.zeros(2), torch.ones(3, dtype=torch.int16)),
    (torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.ones(2))),
    (torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)),
    (0, 3),
    (None, torch.ones(2)),
    ([], [torch.ones(2), 2.5, (1, "a", None, True)]),
    ((1, torch.zeros(1)), (2, torch.ones(1))),
    (set(), {1, 2}),
    ({"a": torch.zeros(1)}, {"a": torch.ones(1), 3: 4}),
    ({"a": 1, "b": 2}, {"a": 3}),
]


@pytest.mark.parametrize("at_first, later", ATTRIBUTES)
def test_an_attribute_comes_back_from_a_checkpoint_as_it_was(script, at_first, later):
    """Named as one likes: a buffer may have an `obs`, too."""
    buffers = [script.ReplayBuffer(10, 3, 1, CPU) for _ in range(2)]
    for one, other in [agent(script), agent(script)], buffers:
        name = "obs" if isinstance(one, script.ReplayBuffer) else "extra"
        setattr(one, name, copy.deepcopy(later)), setattr(other, name, copy.deepcopy(at_first))
        torch.save(one.state_dict(), file := io.BytesIO())
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert repr(getattr(other, name)) == repr(later)


class Pair(NamedTuple):
    one: int
    other: int


class Plain:
    pass


UNHOLDABLE = [  # one of each way to be none of the above
    np.float64(0.1),
    {"a": [np.zeros(2)]},
    Plain(),
    Pair(1, 2),
    [torch.nn.Linear(1, 1)],
    (i for i in range(3)),
    collections.defaultdict(int),
    type("Mine", (list,), {})([1]),
    torch.Generator(),
    random.Random(),
]


def unholdable(part: str, value) -> str:
    what = f"extra of {part}, a {type(value).__name__}"
    remedy = "make it a tensor or plain values, or give it state_dict and load_state_dict"
    return f"error: no checkpoint can hold {what}: {remedy}"


@pytest.mark.parametrize("part", ["DDPG", "ReplayBuffer"])
def test_what_no_checkpoint_can_hold_is_refused_before_training(script, part, run, refused, monkeypatch, tmp_path):
    made = getattr(script, part).__init__
    for value in UNHOLDABLE:

        def make(self, *args, value=value):
            made(self, *args)
            self.extra = value

        monkeypatch.setattr(getattr(script, part), "__init__", make)
        assert refused(run, script) == unholdable(part, value)
    assert not list(tmp_path.iterdir())


def test_what_no_checkpoint_can_hold_is_refused_when_an_update_brings_it(script, run, made, monkeypatch, capsys):
    """And not at the first checkpoint, hours later."""
    runs, update = made(script, "Run"), script.DDPG.update
    monkeypatch.setattr(
        script.DDPG, "update", lambda self, *args: vars(self).update(extra=Plain()) or update(self, *args)
    )
    with pytest.raises(SystemExit) as ended:
        run(script, checkpoint_interval=0)
    assert ended.value.code == 2 and capsys.readouterr().err == unholdable("DDPG", Plain()) + "\n"
    assert runs[0].global_step == 41  # learning starts after 40
