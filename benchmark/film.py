"""A film of a trained policy, small enough for a page: a looping GIF, or an animated PNG if the name ends in .png.

    python benchmark/film.py runs/NAME film.gif

Acts as an evaluation does, without exploration noise, from the start that --seed names, and renders what happens with
Gymnasium. Prints the returns of the episodes filmed and the size of the file.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ddpg_continuous_action import exit_unless


@dataclass
class Args:
    model: tyro.conf.Positional[Path]
    """folder with the model.pt of a run"""
    out: tyro.conf.Positional[Path]
    """film to write, .gif or .png"""
    seed: int = 1
    """seed of the first episode's start"""
    frames: int = 100
    """frames of the film; where an episode ends sooner, the next one follows. HalfCheetah-v5's floor ends after 40 m"""
    fps: int = 20
    """frames per second: 20 is real time on HalfCheetah-v5, whose steps are of 0.05 s"""
    skip: int = 0
    """steps before the film starts"""
    width: int = 240
    """width in pixels"""
    height: int = 200
    """height in pixels; what is too high of the rendered picture is cut off above and below"""
    colors: int = 64
    """colors of the whole film: fewer make a smaller file"""
    max_mb: float = 2.0
    """fail if the film is larger than this"""


def load_agent(folder: Path):
    """The agent of a model.pt, its environment, and the step it was saved at."""
    script = importlib.import_module(torch.load(folder / "model.pt", map_location="cpu", weights_only=True)["script"])
    args = script.args_of(folder, evaluate=True)
    env = script.make_env(args, render=True)
    agent = script.DDPG(args, env.observation_space, env.action_space, torch.device("cpu"))
    return agent, env, script.load_model(agent, folder)["global_step"]


@torch.no_grad()
def film(agent, env, args: Args) -> tuple[list[Image.Image], list[str]]:
    """The pictures, and a line about each episode."""
    obs, _ = env.reset(seed=args.seed)
    pictures, episodes, episode_return, length = [], [], 0.0, 0
    for step in range(args.skip + args.frames):
        if step >= args.skip:
            pictures.append(fitted(Image.fromarray(env.render()), args.width, args.height))
        batch = torch.as_tensor(obs, dtype=torch.float32)[None]
        obs, reward, terminated, truncated, _ = env.step(agent.actor.clip(agent.actor(batch))[0].numpy())
        episode_return, length = episode_return + float(reward), length + 1
        if terminated or truncated or step == args.skip + args.frames - 1:
            ending = "" if terminated or truncated else ", not yet over"
            episodes.append(f"return {episode_return:.1f} in {length} steps{ending}")
            obs, _ = env.reset()
            episode_return, length = 0.0, 0
    return pictures, episodes


def fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Shrunk to the width, and cut to the height around the middle."""
    picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    top = max(0, (picture.height - height) // 2)
    return picture.crop((0, top, width, min(top + height, picture.height)))


def with_one_palette(pictures: list[Image.Image], colors: int) -> list[Image.Image]:
    """Colors that serve all pictures, and no dithering: what stands still stays the same bytes, and costs nothing."""
    sample = pictures[:: max(1, len(pictures) // 16)]
    strip = Image.new("RGB", (sample[0].width, sample[0].height * len(sample)))
    for i, picture in enumerate(sample):
        strip.paste(picture, (0, i * picture.height))
    palette = strip.quantize(colors, Image.Quantize.MEDIANCUT)
    return [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]


def main(args: Args):
    exit_unless((args.model / "model.pt").exists(), f"{args.model} holds no model.pt")
    exit_unless(args.out.suffix in (".gif", ".png"), f"a film is a .gif or a .png, not {args.out}")
    agent, env, global_step = load_agent(args.model)
    pictures, episodes = film(agent, env, args)
    first, *rest = with_one_palette(pictures, args.colors)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    first.save(args.out, save_all=True, append_images=rest, duration=round(1000 / args.fps), loop=0, optimize=True)
    size = args.out.stat().st_size / 1e6
    print(f"{env.spec.id} after {global_step:,} steps, {len(pictures)} frames: {'; '.join(episodes)}")
    print(f"{args.out}: {size:.2f} MB")
    remedy = "fewer --frames, --colors or a smaller --width help"
    exit_unless(size <= args.max_mb, f"the film is larger than {args.max_mb} MB: {remedy}")


if __name__ == "__main__":
    main(tyro.cli(Args))
