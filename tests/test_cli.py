"""A script from its command line: flags, what a run leaves behind, bad input, what it prints, determinism."""

import ast
import contextlib
import ctypes.util
import dataclasses
import functools
import hashlib
import importlib.machinery
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, TESTS, TINY, agent, command, environment, eval_rows, model, paper, scalars, tuned
from tensorboard.summary.writer import event_file_writer


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def record(run_dir: Path) -> dict:
    return json.loads((run_dir / "args.json").read_text())


def result(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def outcome(run_dir: Path) -> tuple:
    """What the same seed gives again."""
    log = scalars(run_dir)
    del log["charts/SPS"]
    return (run_dir / "eval.csv").read_bytes(), (run_dir / "model.pt").read_bytes(), log


@pytest.fixture
def processes():
    """What runs a script in a process of its own, forked from one that has imported what takes long."""
    if sys.platform == "win32":
        pytest.skip("Windows does not fork")
    return importlib.import_module("test_resume")


@pytest.fixture
def stdout(monkeypatch):
    """stdout(encoding) is what is printed from now on, in bytes."""

    def stdout(encoding) -> io.BytesIO:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding, newline="\n"))
        return sys.stdout.buffer

    return stdout


# Flags


def test_integers_as_people_type_them(script, refused, monkeypatch):
    """Whatever flag it is, --batch-size, too, whose default depends on another one; from a notebook, too."""
    numbers = {name: value for name, value in dataclasses.asdict(script.Args()).items() if type(value) is int}
    assert {"batch_size", "seed", "buffer_size", "policy_frequency"} <= numbers.keys()
    lines = [(f"--{name.replace('_', '-')} {value:e}", name, value) for name, value in numbers.items()]
    texts = {"1e6": 10**6, "25e3": 25_000, "1_000_000": 10**6, "70_001": 70_001, "70001.0": 70_001}
    lines += [(f"--total-timesteps {text}", "total_timesteps", number) for text, number in texts.items()]
    for flags, name, number in lines:
        monkeypatch.setattr(sys, "argv", [f"{script.SCRIPT}.py", *flags.split(), "--learning-starts", "1"])
        script.set_up(args := script.parse_args())
        value = getattr(args, name)
        assert type(value) is int and (value == number or name == "learning_starts"), flags
    assert paper.Args().batch_size == 64 and paper.Args(pixels=True).batch_size == 16
    script.set_up(args := script.Args(total_timesteps=1.2e5))
    assert repr(args.total_timesteps) == "120000"
    fraction = script.Args(total_timesteps=120.5)
    assert refused(script.set_up, fraction) == "error: --total-timesteps must be an integer, not 120.5"


CLEANRL = (
    dict(exp_name="try/it", seed=7, torch_deterministic=False, cuda=False, track=False)
    | dict(wandb_project_name="cleanRL", wandb_entity="me", capture_video=False, save_model=True)
    | dict(env_id="stubs:Point-v0", total_timesteps=80, learning_rate=1e-3, buffer_size=1000, gamma=0.98, tau=0.01)
    | dict(batch_size=32, exploration_noise=0.2, learning_starts=50, policy_frequency=2)
)


def test_a_command_line_for_cleanrl_works_unchanged(cli, tmp_path):
    """But for what the paper does otherwise. Its name has no slash, and as on Windows no colon."""
    cli(tuned, *command(tuned, **dict.fromkeys(TINY) | CLEANRL)[2:])
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"stubs-Point-v0__try-it__7__\d{10}", run_dir.name)
    assert record(run_dir)["args"].items() >= CLEANRL.items()
    of_the_paper = {field.name for field in dataclasses.fields(paper.Args)}
    assert CLEANRL.keys() - of_the_paper == {"learning_rate", "exploration_noise"}


def test_help_matches_its_snapshot(script, cli, stdout, monkeypatch):
    for name, value in dict(COLUMNS="120", NO_COLOR="1", TERM="dumb").items():
        monkeypatch.setenv(name, value)
    printed, snapshot = stdout("utf-8"), TESTS / f"help_{script.SCRIPT}.txt"
    with pytest.raises(SystemExit) as ended:
        cli(script, "--help")
    sys.stdout.flush()
    shown = printed.getvalue().decode()
    fix = f"COLUMNS=120 NO_COLOR=1 TERM=dumb python {script.SCRIPT}.py --help > {snapshot.relative_to(ROOT)}"
    assert ended.value.code == 0 and shown == snapshot.read_text(), f"if the change is meant: {fix}"
    assert all(f"--{field.name.replace('_', '-')}" in shown for field in dataclasses.fields(script.Args))


# Every flag has an effect


def actor_weights(run_dir):
    return {name: value.tolist() for name, value in model(run_dir)["actor"].items()}


def files(pattern):
    return lambda run_dir: len(list(run_dir.glob(pattern)))


def column(name):
    return lambda run_dir: [row[name] for row in eval_rows(run_dir)]


USUAL = TINY | dict(total_timesteps=60, eval_interval=30, checkpoint_interval=20, keep_checkpoint=True)
USUAL_OF = {  # with what other flags are about
    tuned: USUAL | dict(noise="ou", noise_anneal_steps=60, target_noise=0.2),
    paper: USUAL,
}
EFFECTS = {  # flag: another value, and what the run then shows otherwise
    "save_model": (False, files("model.pt")),
    "checkpoint_interval": (0, files("checkpoint.pt")),
    "keep_checkpoint": (False, files("checkpoint.pt")),
    "eval_interval": (20, column("global_step")),
    "eval_episodes": (3, column("episodes")),
    "final_eval_episodes": (3, lambda run_dir: result(run_dir)["final_eval"]["episodes"]),
    "max_eval_steps": (5, column("mean")),
    "capture_video": (True, files("videos/*.mp4")),
    "env_id": ("stubs:Scripted-v0", lambda run_dir: len(model(run_dir)["actor"]["action_low"])),
    "total_timesteps": (50, column("global_step")),
}
WEIGHTS = dict(seed=3, buffer_size=50, gamma=0.9, tau=0.1, batch_size=20, learning_starts=50, policy_frequency=2)
WEIGHTS_OF = {  # those that change the trained actor's weights
    tuned: dict(learning_rate=1e-2, exploration_noise=0.5, noise="parameter", ou_theta=0.9, ou_dt=0.1, n_step=3)
    | dict(noise_anneal_steps=30, exploration_noise_final=0.5, layer_norm="actor")
    | dict(target_noise=0.4, target_noise_clip=0.01),
    paper: dict(actor_lr=1e-2, critic_lr=1e-2, critic_weight_decay=1.0, ou_theta=0.9, ou_sigma=0.7, ou_dt=0.1)
    | dict(weights_init="kaiming", batch_norm="actor", batch_norm_momentum=0.5, pixels=True),
}
EFFECTS_OF = {
    script: EFFECTS | {name: (value, actor_weights) for name, value in (WEIGHTS | WEIGHTS_OF[script]).items()}
    for script in SCRIPTS
}
ELSEWHERE = """exp_name run_name num_threads torch_deterministic cuda track wandb_project_name wandb_entity evaluate
    matmul compile cudagraphs warm_start env_kwargs resume""".split()


def test_every_flag_has_a_test_of_its_effect(script):
    assert {field.name for field in dataclasses.fields(script.Args)} == {*EFFECTS_OF[script], *ELSEWHERE}


@pytest.fixture(scope="module")
def usual_run(tmp_path_factory):
    @functools.cache
    def usual_run(script) -> Path:
        folder = tmp_path_factory.mktemp("usual")
        with contextlib.chdir(folder):
            script.main(script.Args(**USUAL_OF[script]))
        return folder / "runs/tiny"

    return usual_run


@pytest.mark.parametrize("script, name", [(script, name) for script in SCRIPTS for name in EFFECTS_OF[script]])
def test_flag_has_an_effect(script, name, run, usual_run):
    value, observe = EFFECTS_OF[script][name]
    assert observe(run(script, **USUAL_OF[script] | {name: value})) != observe(usual_run(script))


def test_switches_of_torch(script):
    for threads, deterministic in (2, False), (1, True):
        script.set_up(script.Args(num_threads=threads, torch_deterministic=deterministic))
        assert (torch.get_num_threads(), torch.backends.cudnn.deterministic) == (threads, deterministic)


def test_numbers_below_1e_38_are_zero_in_every_thread(script, processes, tmp_path):
    """Where nothing has started torch's threads yet: in a process of its own."""
    code = f"import sys; sys.path.append({str(ROOT)!r})\nimport torch, {script.SCRIPT} as script\n"
    code += "script.set_up(script.Args(num_threads=2))\nprint((torch.full((10**6,), 2e-38) / 10).count_nonzero())"
    (tmp_path / "code.py").write_text(code)
    assert processes.run(tmp_path, tmp_path / "code.py", "") == (0, "tensor(0)\n")


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="such a torch looks for the GPU that is feigned")
def test_no_cuda_stays_off_the_gpu(script, run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    with pytest.raises((AssertionError, RuntimeError)):
        run(script, run_name="gpu")
    assert result(run(script, cuda=False))["global_step"] == 120


def test_track(run, monkeypatch):
    """It tells runs of one name apart, say of two sweeps, and knows a resumed one again."""
    wandb, calls, ends = types.ModuleType("wandb"), [], []
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init, wandb.finish = lambda **options: calls.append(options), lambda exit_code: ends.append(exit_code)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    flags = USUAL | dict(track=True, wandb_project_name="mine", wandb_entity="us")
    one, other = (run(tuned, **flags | dict(run_name=f"{sweep}/x")) for sweep in "ab")
    tuned.main(tuned.args_of(str(one), total_timesteps=70))
    ids = [record(run_dir)["id"] for run_dir in (one, other, one)]
    assert ids[0] != ids[1] and [call["id"] for call in calls] == ids
    for call in calls:
        assert (call["project"], call["entity"], call["name"], call["resume"]) == ("mine", "us", "x", "allow")
        assert call["sync_tensorboard"] and call["config"]["batch_size"] == TINY["batch_size"]
    with pytest.raises(SystemExit):
        run(tuned, track=True, env_id="stubs:NanReward-v0", run_name="failed", total_timesteps=170)
    assert ends == [0, 0, 0, 1]


# What a run leaves behind


def test_files_of_a_run(script, run):
    run_dir = run(script)
    names = {re.sub(r"^events.*", "events", path.name) for path in run_dir.iterdir()}
    assert names == {".lock", "args.json", "eval.csv", "model.pt", "result.json", "events"}

    found, args = record(run_dir), script.Args(**TINY)
    script.set_up(args)  # which resolves --matmul auto
    assert found["args"] == dataclasses.asdict(args) and found["args"]["matmul"] in ("mkl", "onednn")
    assert found["defaults"] == dataclasses.asdict(script.Args())
    assert found["script"] == script.SCRIPT and re.fullmatch("[0-9a-f]{40}(-dirty)?", found["commit"])
    assert found["sha256"] == hashlib.sha256(Path(script.__file__).read_bytes()).hexdigest()
    assert re.fullmatch("[0-9a-f]{8}", found["id"])
    assert found["versions"]["torch"] in (torch.__version__, torch.__version__.split("+")[0])
    assert set(found["versions"]) == {"python", "torch", "gymnasium", "mujoco", "numpy"}
    assert found["hardware"]["threads"] == 1 and found["hardware"]["cpus"] == os.cpu_count()

    assert (run_dir / "eval.csv").read_text().startswith("global_step,mean,std,min,max,episodes\n60,")
    rows = eval_rows(run_dir)
    assert [(row["global_step"], row["episodes"]) for row in rows] == [(60, 2), (120, 2)]
    written = result(run_dir)
    assert (written["global_step"], written["evaluations"]) == (120, 2)
    assert written["final_return"] == pytest.approx((rows[0]["mean"] + rows[1]["mean"]) / 2)
    assert set(written["final_eval"]) == {"mean", "std", "min", "max", "episodes"}


@pytest.mark.parametrize(
    "learning_starts, score", [(8, "7.5, the mean of 10"), (40, "10.0, the mean of 5"), (60, "12.0, the mean of 1")]
)
def test_the_final_return_is_the_mean_of_the_last_ten_evaluations_since_learning_started(
    learning_starts, score, run, capsys, monkeypatch
):
    """The first evaluations' mean is 0, the next one's 1, and so on; the last step is evaluated, too."""
    means = iter(range(20))
    monkeypatch.setattr(tuned, "evaluate", lambda *args: (next(means) + np.array([-2.0, -1.0, 3.0]),) * 3)
    flags = dict(total_timesteps=62, eval_interval=5, final_eval_episodes=0)
    run_dir = run(tuned, learning_starts=learning_starts, **flags)
    rows = eval_rows(run_dir)
    assert [row["global_step"] for row in rows] == [*range(5, 61, 5), 62]
    assert [row["mean"] for row in rows] == [*range(13)]
    assert rows[2] == dict(global_step=15, mean=2, std=pytest.approx((14 / 3) ** 0.5), min=0, max=5, episodes=3)
    assert result(run_dir)["final_return"] == float(score.split(",")[0])
    evaluations = "evaluation" if learning_starts == 60 else "evaluations"
    assert capsys.readouterr().out.endswith(f"; final return {score} {evaluations}\n")


def test_tensorboard(script, run):
    """Scripted: the episodes' returns and lengths are known."""
    run_dir = run(script, env_id="stubs:Scripted-v0", total_timesteps=210, learning_starts=150)
    log = scalars(run_dir)
    assert set(log) == {
        *("charts/episodic_return", "charts/episodic_length", "charts/SPS"),
        *("charts/saturated_actions", "charts/exploration_difference"),
        *("losses/qf1_loss", "losses/qf1_values", "losses/actor_loss"),
        *("eval/episodic_return", "eval/discounted_return", "eval/q_estimate"),
    }
    # episodes of 3, 2, 4, 1, 1 steps, paying 10 x episode + step
    assert log["charts/episodic_length"][:6] == [(3, 3), (5, 2), (9, 4), (10, 1), (11, 1), (14, 3)]
    returns = [(3, 0 + 1 + 2), (5, 10 + 11), (9, 20 + 21 + 22 + 23), (10, 30), (11, 40), (14, 50 + 51 + 52)]
    assert log["charts/episodic_return"][:6] == returns
    # the first 6 evaluation episodes, in 2 environments: (3, 21), (86, 30), (40, 153)
    assert log["eval/episodic_return"] == [(60, 3), (120, 21), (180, 86), (210, 30)]
    assert log["eval/episodic_return"] == [(row["global_step"], row["mean"]) for row in eval_rows(run_dir)]
    assert [step for step, _ in log["losses/qf1_loss"]] == [180, 200, 210]  # every 200 steps, and to evaluations
    text = next(path for path in run_dir.glob("events*")).read_bytes()
    assert b"|batch_size|16|" in text and b"|gamma|0.99|" in text


def test_saturated_actions(script):
    """Of two dimensions one."""
    halfway = agent(script, low=(-1.0, -1.0), high=(1.0, 1.0))
    halfway.actor.fc_mu.weight.data.zero_(), halfway.actor.fc_mu.bias.data.copy_(torch.tensor([9.0, 0.0]))
    halfway.act(np.zeros(3))
    batch = types.SimpleNamespace(obs=torch.randn(4, 3))
    assert halfway.diagnostics(batch)["charts/saturated_actions"] == 0.5


def test_evaluate_reproduces_the_last_evaluation(script, run, cli, capsys, stdout, monkeypatch, tmp_path):
    """To the last bit, and from model.pt alone, somebody else's, say; from a notebook, too."""
    run_dir, alone = run(script, eval_episodes=3), tmp_path / "alone"
    last, before = eval_rows(run_dir)[-1], contents(run_dir)
    alone.mkdir()
    shutil.copy(run_dir / "model.pt", alone)
    scores, evaluate = [], script.evaluate
    monkeypatch.setattr(script, "evaluate", lambda *args: scores.append(evaluate(*args)) or scores[-1])
    capsys.readouterr()
    cli(script, "--evaluate", run_dir)
    cli(script, "--evaluate", alone)
    script.main(script.args_of(str(alone), evaluate=True))
    line = f"{TINY['env_id']} after 120 steps: {last['mean']:.2f} ± {last['std']:.2f} over 3 episodes\n"
    assert capsys.readouterr().out == 3 * line
    assert [(returns.mean(), returns.std()) for returns, *_ in scores] == 3 * [(last["mean"], last["std"])]
    assert contents(run_dir) == before and [path.name for path in alone.iterdir()] == ["model.pt"]
    printed = stdout("ascii")  # which has no plus-minus
    cli(script, "--evaluate", alone, "--eval-episodes", 1)
    assert printed.getvalue().endswith(b" ? 0.00 over 1 episode\n")


def test_evaluate_films_every_episode_if_asked_to(run, cli):
    """And not because training did, perhaps on a machine that could render."""
    run_dir = run(tuned, total_timesteps=41, capture_video=True)
    films = {*(run_dir / "videos").iterdir()}
    cli(tuned, "--evaluate", run_dir)
    tuned.main(tuned.args_of(str(run_dir), evaluate=True))
    assert films and {*(run_dir / "videos").iterdir()} == films
    cli(tuned, "--evaluate", run_dir, "--eval-episodes", 3, "--capture-video")
    films = {*(run_dir / "videos").glob("*.mp4")} - films
    assert len(films) == 3 and all(film.stat().st_size > 500 for film in films)


@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="EGL is not installed")
def test_films_mujoco_without_a_screen(tmp_path):
    """In a process of its own: the way to render is chosen when MuJoCo is imported."""
    line = command(tuned, env_id="InvertedPendulum-v5", capture_video=True, total_timesteps=50, eval_interval=45)
    env = environment()
    env.pop("DISPLAY", None), env.pop("MUJOCO_GL", None)
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    videos = sorted((tmp_path / "runs/tiny/videos").glob("*.mp4"))
    assert [video.name.split("-episode")[0] for video in videos] == ["step-45", "step-50"]
    assert all(video.stat().st_size > 1000 for video in videos)


# Bad input: one line on stderr, exit code 2, nothing left behind

WRONG = {  # what is said of a flag, and where
    "must be an integer, not": "total-timesteps 1.5, batch-size 1.5, buffer-size 1e-3, seed nan, eval-interval inf",
    "must be positive, not": "total-timesteps 0, total-timesteps -5, buffer-size 0, batch-size -1, policy-frequency 0, "
    "eval-episodes 0, max-eval-steps 0, tau 0, tau nan, learning-rate 0, learning-rate -1e-3, learning-rate nan, "
    "learning-rate inf, n-step 0, actor-lr 0, critic-lr -1",
    "must be at least 0, not": "eval-interval -1, final-eval-episodes -1, checkpoint-interval -1, learning-starts -1, "
    "num-threads -1, seed -1, ou-theta -0.1, ou-dt -1, exploration-noise -0.1, exploration-noise nan, "
    "exploration-noise inf, exploration-noise-final -1, noise-anneal-steps -1, target-noise -0.1, "
    "target-noise-clip nan, critic-weight-decay -1, ou-sigma nan",
    "must be below 2**32, not": "seed 5_000_000_000",
    "must be in [0, 1], not": "gamma 1.01, gamma -0.1, gamma nan, tau 1.1, batch-norm-momentum 2",
}
ENVS = {  # what is said of an environment, and of which
    "Did you mean: `HalfCheetah`": "HalfCheeta-v5",
    "HalfCheetah": "HalfCheetah-v55",
    "no_such_module": "no_such_module:Env-v0",
    "cannot make": "stubs:Nothing-v0 two:colons:Env-v0 (",
    "continuous action space, a flat Box of floats": "CartPole-v1 stubs:DiscreteAction-v0 stubs:DictAction-v0 "
    "stubs:IntegerAction-v0 stubs:MatrixAction-v0 stubs:NumberAction-v0",
    "finite bounds": "stubs:UnboundedAction-v0 stubs:HalfBoundedAction-v0 stubs:HugeAction-v0 stubs:PointAction-v0",
    "cannot make the observations flat": "stubs:SequenceObs-v0",
    "observes images: ddpg_paper_faithful.py --pixels": "stubs:ImageObs-v0 stubs:FloatImageObs-v0",
}
BOTH = {
    "--learning-starts 120": "--learning-starts 120 must be below --total-timesteps 120",
    "--learning-starts 1e3": "--learning-starts 1,000 must be below --total-timesteps 120",
    "--buffer-size 1e12": "lower --buffer-size",
    "--no-cuda --cudagraphs": "--cudagraphs needs a CUDA device",
    "--env-id stubs:RenderModeless-v0 --capture-video": "render_mode",
    "--env-id stubs:Unrendered-v0 --capture-video": "apt-get install",
    '--env-id stubs:Point-v0 --env-kwargs {"gravity":3}': "unexpected keyword argument 'gravity'",
    "--evaluate nowhere": "cannot read nowhere/model.pt",
    "--evaluate .": "cannot read model.pt",
    "--evaluate . --resume .": "--resume and --evaluate cannot be combined",
    "--resume nowhere": "nowhere holds no run of",
    "--track": "pip install wandb",
}
BOTH |= {f"--env-id {env_id}": said for said, env_ids in ENVS.items() for env_id in env_ids.split()}
BAD_INPUT = {
    tuned: BOTH | {"--n-step 42": "--learning-starts must be at least --n-step - 1"},
    paper: BOTH
    | {
        "--batch-size 1": "batch normalisation",
        "--pixels --env-id stubs:Unrendered-v0": "apt-get install",
        "--pixels --env-id stubs:RenderModeless-v0": "render_mode",
        "--pixels --buffer-size 1e7": "lower --buffer-size",
        "--learning-rate 1e-3": "two learning rates: --actor-lr and --critic-lr",
        "--learning-rate=1e-3": "two learning rates: --actor-lr and --critic-lr",
        "--learning_rate 1e-3": "two learning rates: --actor-lr and --critic-lr",
    },
}


def test_bad_input_out_of_its_range(script, refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    own = {field.name.replace("_", "-") for field in dataclasses.fields(script.Args)}
    for said, flags in WRONG.items():
        for name, value in map(str.split, flags.split(", ")):
            if name in own:
                monkeypatch.setattr(sys, "argv", [script.SCRIPT, f"--{name}", value])
                line = refused(lambda: script.main(script.parse_args()))
                assert line.startswith(f"error: --{name} {said} "), (name, value)
    assert not list(tmp_path.iterdir())


def test_a_choice_that_is_none_is_refused_with_the_choices(script, refused):
    name, choices = ("noise", "gaussian ou") if script is tuned else ("batch_norm", "both actor critic none")
    line = refused(script.set_up, script.Args(**{name: "OU"}))  # as from a notebook
    assert line.startswith(f"error: --{name.replace('_', '-')} must be one of ") and line.endswith(", not OU")
    assert all(f"'{choice}'" in line for choice in choices.split())


@pytest.mark.parametrize("script, flags", [(script, flags) for script in SCRIPTS for flags in BAD_INPUT[script]])
def test_bad_input(script, flags, cli, refused, tmp_path, recwarn):
    line = command(script)[2:] + flags.split()  # the last value of a flag counts
    line = refused(cli, script, *(flags.split() if flags.startswith(("--evaluate", "--resume")) else line))
    assert BAD_INPUT[script][flags] in line
    assert not flags.startswith("--env-id") or flags.split()[1] in line
    assert not [w for w in recwarn if issubclass(w.category, UserWarning) and "are equal" not in str(w.message)]
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_is_refused(cli, capfd, tmp_path):
    for flags in "--gamma much", "--no-such-flag 1", "--total-timesteps ten", "--seed":
        with pytest.raises(SystemExit) as end:
            cli(tuned, *flags.split())
        assert end.value.code == 2 and flags.split()[0] in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_advice_names_flags_that_exist(script):
    """Every --flag that a message or docstring names is git's or one of this script's; shared code may name both's."""
    own, both = ({field.name for each in of for field in dataclasses.fields(each.Args)} for of in ([script], SCRIPTS))
    algorithm, plumbing = (ROOT / f"{script.SCRIPT}.py").read_text().split("class Args")[1].split("\n# From here on")
    for code, flags in (algorithm, own), (plumbing, both | {"always", "dirty", "abbrev", "exclude"}):
        named = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]+)", code.replace("[-_]", "-"))}
        assert named <= flags, named - flags


def test_a_threads_error_shows_unless_it_is_the_logs():
    """What the log cannot write comes back in a later step: test_resume.py has its disk full."""
    shown, logs = [], event_file_writer._AsyncWriterThread(None, None, 1)
    errors = [types.SimpleNamespace(thread=thread) for thread in (logs, threading.Thread())]
    for error in errors:
        tuned.Run.report_thread(None, shown.append, error)
    assert shown == errors[1:]


# From a notebook


def handlers():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), threading.excepthook, sys.excepthook


def test_a_notebook_resumes_under_the_runs_own_flags(script, run, refused, monkeypatch):
    """Which cannot be changed. After main, whether it fails or not, signals and threads' errors go where they did."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    before, flags = handlers(), USUAL | dict(gamma=0.9, learning_starts=25)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(script.DDPG, "update", lambda *_: 1 / 0)
        run(script, **flags | dict(run_name="failed"))
    assert handlers() == before
    run_dir = run(script, **flags)
    saved = contents(run_dir)
    for changes, said in (dict(gamma=0.8), "its gamma is 0.9"), (dict(total_timesteps=59), "can only be raised"):
        assert said in refused(script.main, script.args_of("runs/tiny", **changes))
    del flags["run_name"]  # without args_of, what is not given is the default
    assert "its run_name is tiny" in refused(script.main, script.Args(resume="runs/tiny", **flags))
    assert contents(run_dir) == saved
    script.main(script.args_of("runs/tiny", gamma=0.9, total_timesteps=70))
    assert handlers() == before and result(run_dir)["global_step"] == 70


# What it prints, and determinism

PENDULUM = dict(env_id="Pendulum-v1", env_kwargs='{"max_episode_steps":20}', buffer_size=3_000_000)


def test_a_pipe_gets_a_few_plain_lines_and_the_same_seed_the_same_bytes(script, run, processes, tmp_path):
    """Here and in another process; another seed gives others."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    flags = " ".join(command(script, **PENDULUM)[2:])
    code, output = processes.run(elsewhere, ROOT / f"{script.SCRIPT}.py", flags)
    lines = output.splitlines()
    assert code == 0 and len(lines) == 5 and "\r" not in output
    assert re.fullmatch("Pendulum-v1 on cpu with 1 CPU threads?; results in runs/tiny", lines[0])
    assert lines[1] == "the replay buffer takes 0.10 GiB when it is full"  # of rows of 9 float32
    for step, line in zip((60, 120), lines[2:4], strict=True):
        assert re.fullmatch(rf"step {step}: evaluation -[\d.,]+, \d+ steps/s, \d\d:\d\d left", line)
    complete = r"complete after 120 steps in \d\d:\d\d; final return -[\d.,]+, the mean of 2 evaluations"
    assert re.fullmatch(complete, lines[4])

    here, other = outcome(run(script, **PENDULUM)), outcome(run(script, **PENDULUM, seed=2, run_name="other"))
    assert here == outcome(elsewhere / "runs/tiny")
    assert all(mine != others for mine, others in zip(here, other, strict=True))


def test_a_terminal_shows_a_progress_bar_too(processes, tmp_path):
    pty, termios = map(importlib.import_module, ("pty", "termios"))  # Windows has neither
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (24, 120))
    shown = bytearray()

    def read():
        with contextlib.suppress(OSError):  # how Linux tells the end of a pseudo-terminal
            while chunk := os.read(here, 4096):
                shown.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    flags = " ".join(command(tuned, **PENDULUM)[2:])
    code, _ = processes.run(tmp_path, ROOT / f"{tuned.SCRIPT}.py", flags, "", Path(os.ttyname(there)))
    os.close(there)
    reader.join()
    assert code == 0, shown
    assert re.search(rb"\r100%\|.+\| 120/120 \[\d\d:\d\d<00:00, +[\d.]+ steps/s, return=-[\d.]+\]", shown)
    assert re.search(rb"\revaluating: .+return=-", shown)
    assert all(line in shown for line in (b"step 60: ", b"step 120: ", b"complete after 120 steps"))


def test_two_threads_on_a_busy_machine_give_the_same_bytes_twice(processes, tmp_path):
    flags = dict(env_id="Hopper-v5", batch_size=256, buffer_size=1000, num_threads=2, total_timesteps=80)
    folders, line = [tmp_path / "one", tmp_path / "other"], " ".join(command(tuned, **flags)[2:])
    for folder in folders:
        folder.mkdir()
    # side by side, each in the other's way
    both = [processes.Run(folder, ROOT / f"{tuned.SCRIPT}.py", line) for folder in folders]
    for each in both:
        ended = each.wait()
        assert ended.code == 0 and "with 2 CPU threads" in ended.output, ended.output
    assert outcome(folders[0] / "runs/tiny") == outcome(folders[1] / "runs/tiny")


# What the scripts are made of


def inline_metadata(script) -> dict:
    source = (ROOT / f"{script.SCRIPT}.py").read_text()
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", source)[1]
    return tomllib.loads(re.sub(r"(?m)^# ?", "", block))


def test_inline_metadata_is_in_step_with_requirements(script):
    metadata = inline_metadata(script)
    pins = {line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert set(metadata["dependencies"]) <= pins and all("==" in pin for pin in metadata["dependencies"])
    assert metadata == inline_metadata(tuned)


def test_a_script_imports_its_dependencies_and_nothing_else(script):
    names = {re.match(r"[\w-]+", pin)[0] for pin in inline_metadata(script)["dependencies"]}
    tree = ast.parse((ROOT / f"{script.SCRIPT}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    third_party = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert third_party <= names | {"wandb"}
    assert names - third_party == {"tensorboard", "moviepy"}  # used through torch and gymnasium
