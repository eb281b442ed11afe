"""What README.md says, held to what it says it of: links to lines, code to copy, metrics, figures.

python tests/test_readme.py brings the line numbers and the table of speeds up to date.
"""

import ast
import importlib.util
import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, agent, eval_rows, model, paper, random_batch, scalars, tuned
from PIL import Image
from test_copying import changed

sys.path.insert(0, str(ROOT / "benchmark"))
import film

README = ROOT / "README.md"
LINK = re.compile(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)")
SPEED = re.compile(r"\| steps a second \|.*\n(?:\|.*\n)+")
REFRESH = "run: python tests/test_readme.py"


def line_of(script: str, name: str) -> int:
    """Where a definition, or a method of a class, starts."""
    body = ast.parse((ROOT / script).read_text()).body
    for part in name.split("."):
        definition = next(node for node in body if getattr(node, "name", None) == part)
        body = definition.body
    return definition.lineno


def refreshed(text: str) -> str:
    text = LINK.sub(lambda link: f"[`{link[1]}`]({link[2]}#L{line_of(link[2], link[1])})", text)
    measured = SPEED.search((ROOT / "benchmark/results/throughput_zen4.md").read_text())
    of_today = re.sub(r"\| \S+ at .*\n", "", measured[0])  # not what an earlier commit did
    return SPEED.sub(lambda _: of_today, text)


def blocks(language: str, page=README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_links_to_lines_and_speeds_are_up_to_date():
    text = README.read_text()
    assert len(LINK.findall(text)) > 10 and len(SPEED.findall(text)) == 1
    assert refreshed(text) == text, REFRESH


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.SCRIPT)
def test_algorithm_1_is_mapped_as_in_the_docstring(script):
    """The same ten lines of the paper, and the same functions; the noise is each script's own."""
    table = re.findall(r"^\| (.*?) +\| (.*?) +\|$", script.__doc__.partition("| Algorithm 1 ")[2], re.MULTILINE)
    page = README.read_text().partition("| Algorithm 1 ")[2].split("\n\n")[0]
    linked = [re.findall(r"\[`([\w.]+)`\]", line) for line in page.splitlines()[2:]]
    assert len(linked) == len(table) == 10
    for names, (line, functions) in zip(linked, table, strict=True):
        named = [name for name in functions.split("; ") if not name.lower().endswith("noise")]
        assert names == named or ("random process" in line and set(named) <= set(names)), line


@pytest.fixture
def copy_of_tuned(tmp_path, monkeypatch):
    """copy_of_tuned(diff) is a copy of the script, changed by a diff whose hunks name a place, as a module."""

    def copied(diff):
        changes = {}
        for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
            lines = [line or " " for line in hunk.splitlines()]
            before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in signs) for signs in (" -", " +"))
            changes[before] = after
        path = tmp_path / "ddpg_changed.py"
        path.write_text(changed(tuned, changes))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)  # dataclasses look there
        spec.loader.exec_module(module)
        return module

    return copied


SECOND_CRITIC, PENALTY, RUNNING_NORM = *blocks("diff"), *blocks("diff", ROOT / "benchmark/ENVIRONMENTS.md")
EXACT = dict(total_timesteps=100, checkpoint_interval=50, keep_checkpoint=True, final_eval_episodes=0)


@pytest.mark.parametrize("change", [SECOND_CRITIC, PENALTY, RUNNING_NORM], ids=["critic", "penalty", "norm"])
def test_changes_train_are_checkpointed_and_resume_exactly(change, run, copy_of_tuned):
    script = copy_of_tuned(change)
    whole = model(run(script, **EXACT | dict(total_timesteps=150, run_name="whole")))
    part = run(script, **EXACT | dict(run_name="part"))
    script.main(script.args_of(str(part), total_timesteps=150))
    resumed = model(part)
    assert whole.keys() == resumed.keys()
    assert (change == SECOND_CRITIC, change == RUNNING_NORM) == ("qf2" in whole, "obs_norm" in whole)
    for name in whole.keys() & {"actor", "qf", "qf2", "obs_norm"}:
        for key, weights in whole[name].items():
            assert torch.equal(weights, resumed[name][key]), (name, key)


def test_running_normalisation_follows_the_batches_and_evaluates_alike(run, copy_of_tuned, capsys):
    """Episodes of one start: what --evaluate says of the model is what the run said."""
    script = copy_of_tuned(RUNNING_NORM)
    run_dir = run(script, eval_episodes=1)
    obs_norm = model(run_dir)["obs_norm"]
    assert obs_norm["num_batches_tracked"] == 80
    assert obs_norm["running_var"].max() < 1 and obs_norm["running_mean"].any()
    capsys.readouterr()
    script.main(script.args_of(str(run_dir), evaluate=True))
    assert f": {eval_rows(run_dir)[-1]['mean']:.2f} ±" in capsys.readouterr().out


def test_the_second_critic_learns_and_lowers_the_target(run, copy_of_tuned, made):
    script = copy_of_tuned(SECOND_CRITIC)
    agents = made(script, "DDPG")
    run(script, policy_frequency=2, target_noise=0.2)
    one, two, target = (getattr(agents[0], name).fc3.weight for name in ("qf", "qf2", "target_qf2"))
    assert not torch.equal(one, two) and not torch.equal(two, target)
    start, batch = agent(script), random_batch(script)
    for name, value in dict(target_qf=5.0, target_qf2=2.0, qf=0.0, qf2=0.0).items():
        torch.nn.init.zeros_(getattr(start, name).fc3.weight)
        torch.nn.init.constant_(getattr(start, name).fc3.bias, value)
    loss, q = start.critic_loss(batch)
    y = batch.reward + batch.discount * 2.0
    assert torch.allclose(loss, 2 * y.square().mean()) and torch.equal(q, torch.zeros(32))


def test_the_penalty_is_on_the_action_before_tanh(copy_of_tuned):
    start, obs = agent(copy_of_tuned(PENALTY)), random_batch(tuned).obs
    unscaled = (start.actor(obs) - start.actor.action_bias) / start.actor.action_scale
    start.actor(10 * obs)  # what it was at another observation does not count
    penalty = start.actor_loss(obs) + start.qf(obs, start.actor(obs)).mean()
    assert torch.allclose(penalty, 1e-3 * torch.atanh(unscaled).square().mean(), rtol=1e-3) and penalty > 0


def test_a_model_acts_in_four_lines(run, made):
    agents = made(tuned, "DDPG")
    run_dir = run(tuned)
    code = blocks("python")[0]
    assert len([line for line in code.splitlines() if line and "import" not in line]) == 4
    names = dict(obs=np.array([1.0, 0.5], dtype=np.float32))
    exec(code.replace("runs/NAME", str(run_dir)), names)
    greedy = agents[0].actor(torch.as_tensor(names["obs"])[None])[0].detach().numpy()
    assert np.array_equal(names["action"], greedy) and names["action"].shape == (1,)


def test_every_metric_is_explained(run):
    logged = set(scalars(run(tuned, noise="parameter", layer_norm="both", run_name="a")))
    logged |= set(scalars(run(paper, run_name="b")))
    assert set(re.findall(r"`((?:eval|charts|losses)/\w+)`(?=[,| ])", README.read_text())) == logged


def test_the_commands_set_everything_up_themselves():
    set_up = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    train, test = (line for block in blocks("bash") for line in block.splitlines() if line.startswith(set_up))
    flags = train.removeprefix(f"{set_up}python ddpg_continuous_action.py ")
    assert flags == "--total-timesteps 300e3" and test == f"{set_up}python -m pytest -q"
    ci = (ROOT / ".ci/run").read_text()
    assert "python3 -m venv" in ci and "sed -n 's/.*&& \\(python -m pytest.*\\)$/\\1/p' README.md" in ci


def test_flags_exist():
    """Those of the scripts, wherever the page names one."""
    own = {f"--{name.replace('_', '-')}" for script in SCRIPTS for name in script.Args.__dataclass_fields__}
    others = """help no-cuda slurm export pages logdir upload-model hf-entity noise-clip
        show pool up-to env-ids recommended""".split()
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README.read_text())) <= own | {f"--{name}" for name in others}


def test_time_and_return_to_expect():
    """Of the training command, within a sixth of what the committed runs took and reached."""
    minutes, expected = re.search(r"about (\d+) minutes .* a return of about ([\d,]+)", README.read_text()).groups()
    paths = ROOT.glob("benchmark/results/ddpg_continuous_action/HalfCheetah-v5*/result.json")
    results = [json.loads(path.read_text()) for path in paths]
    mean = {name: np.mean([result[name] for result in results]) for name in ("final_return", "seconds")}
    assert float(expected.replace(",", "")) == pytest.approx(mean["final_return"], rel=1 / 6)
    assert float(minutes) == pytest.approx(mean["seconds"] / 60, rel=1 / 6)


def test_film(run, tmp_path, capsys):
    """Of either ending: as long as asked for, small, and refused when it is not."""
    flags = dict(model=run(tuned, env_id="Pendulum-v1"), frames=12, width=60, height=40)
    for ending in "gif", "png":
        out = tmp_path / f"film.{ending}"
        film.main(film.Args(out=out, **flags))
        with Image.open(out) as picture:
            assert picture.size == (60, 40) and picture.n_frames == 12
        assert "after 120 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        film.main(film.Args(out=out, max_mb=0.001, **flags))
    assert end.value.code == 2 and "larger than 0.001 MB" in capsys.readouterr().err


if __name__ == "__main__":
    README.write_text(refreshed(README.read_text()))
