"""Draws photos of people with exact part masks, in the layout of Pascal-Person-Part.

    python tools/make_sample_data.py
    python tools/make_sample_data.py --out data/sample --train 240 --val 60 --size 128 --seed 0

Writes JPEGImages/<id>.jpg, gt_masks/<id>.png, classes.txt, train_id.txt, val_id.txt and dataset.json (the settings).
The same settings give the same files, whatever the number of cores.
"""

import argparse
import colorsys
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter

from utils.cli import map_files, run_main
from utils.files import read_json, whole_folder, write_json, write_whole
from utils.ids import write_ids

REPO = Path(__file__).resolve().parents[1]
CLASSES = ("bg", "low_hand", "torso", "low_leg", "head", "up_leg", "up_hand")  # position = label id
BACKGROUND, LOW_HAND, TORSO, LOW_LEG, HEAD, UP_LEG, UP_HAND = range(len(CLASSES))
RECORD = "dataset.json"
SUPERSAMPLING = 3  # odd, so that a pixel's centre is the centre of a sub-pixel
LIGHT = np.array([-0.45, -0.55, 0.7])  # from the upper left, towards the viewer
SKINS = ((255, 219, 190), (240, 195, 155), (212, 160, 115), (165, 110, 75), (115, 75, 50), (80, 52, 38))
HAIRS = ((25, 20, 18), (60, 38, 22), (105, 65, 35), (190, 150, 85), (150, 145, 140), (140, 55, 30))
Colour = Sequence[float] | np.ndarray  # red, green, blue


@dataclass(frozen=True)
class Settings:
    """All that decides what the files hold."""

    train: int = 240
    val: int = 60
    size: int = 128
    seed: int = 0
    drawing_version: int = 5  # raise it when the same seed gives other pictures


class Canvas:
    """A picture in the making, at `SUPERSAMPLING` times its size: colours (H, W, 3) and labels (H, W)."""

    def __init__(self, height: int, width: int) -> None:
        self.rgb, self.labels = np.zeros((height, width, 3), np.float32), np.zeros((height, width), np.uint8)
        self.size = np.array([width, height])

    def limb(self, start: np.ndarray, end: np.ndarray, radii: tuple, colour: Colour, label: int = BACKGROUND) -> None:
        """Paints a limb, round at its ends and as thick there as `radii` say, lit from the upper left."""
        low = (np.minimum(start, end) - max(radii)).astype(int).clip(0)
        high = np.minimum((np.maximum(start, end) + max(radii)).astype(int) + 1, self.size)
        if (high <= low).any():
            return
        box, bone = np.s_[low[1] : high[1], low[0] : high[0]], end - start
        y, x = np.mgrid[box] + 0.5
        along = (((x - start[0]) * bone[0] + (y - start[1]) * bone[1]) / max(bone @ bone, 1e-6)).clip(0, 1)
        radius = radii[0] + along * (radii[1] - radii[0])
        right, down = (x - start[0] - along * bone[0]) / radius, (y - start[1] - along * bone[1]) / radius
        inside = right**2 + down**2 < 1
        right, down = right[inside], down[inside]
        light = LIGHT @ np.stack([right, down, np.sqrt(1 - right**2 - down**2)])  # (number of pixels inside,)
        self.rgb[box][inside] = np.array(colour) * (0.45 + 0.55 * light.clip(0))[:, None]
        self.labels[box][inside] = label


def direction(degrees: float) -> np.ndarray:
    """Unit vector; 0 points down, 90 to the right."""
    return np.array([np.sin(np.radians(degrees)), np.cos(np.radians(degrees))])


def near(rng: Generator, colour: Colour) -> Colour:
    return np.clip(np.array(colour) * rng.uniform(0.85, 1.1) + rng.normal(0, 5, 3), 5, 255)


def vivid(rng: Generator) -> Colour:
    """From green over blue to red, the hues that skin has not."""
    return 255 * np.array(colorsys.hsv_to_rgb(rng.uniform(0.38, 0.98), rng.uniform(0.5, 0.95), rng.uniform(0.5, 1)))


def muted(rng: Generator) -> Colour:
    """A colour of walls, floors and things: a grey with a tint."""
    return rng.uniform(100, 220) + rng.normal(0, 14, 3)


def draw_person(canvas: Canvas, rng: Generator, hips: np.ndarray, h: float) -> None:
    """Paints somebody `h` high from back to front: an arm, the legs, trunk and head, the other arm."""
    skin, hair, shirt = near(rng, rng.choice(SKINS)), near(rng, rng.choice(HAIRS)), vivid(rng)
    trousers, shoes = near(rng, rng.choice([(40, 55, 95), (45, 42, 40)])), near(rng, (90, 80, 75))
    has_shorts, has_sleeves, sits = rng.random(3) < (0.4, 0.4, 0.2)
    build, turn, lean = rng.uniform(0.85, 1.25), rng.random(), rng.normal(0, 8)  # turn: 0 from the front, 1 the side
    up = direction(180 - lean)
    across = np.array([-up[1], up[0]]) * (1 - 0.7 * turn) * build * h  # to the right
    neck = hips + 0.29 * h * up

    def draw_leg(side: int) -> None:
        swing = rng.uniform(50, 80) if sits else rng.uniform(2, 14 + 20 * turn)
        bend = rng.uniform(0.8, 1.1) * swing if sits else rng.uniform(0, 10 + 30 * turn)
        hip = hips + 0.05 * across * side
        knee = hip + 0.24 * h * direction(side * swing)
        ankle = knee + 0.23 * h * direction(side * (swing - bend))
        toes = ankle + 0.06 * h * direction(side * rng.uniform(20, 80))
        canvas.limb(ankle, toes, (0.026 * h, 0.02 * h), shoes, LOW_LEG)
        canvas.limb(knee, ankle, (0.036 * build * h, 0.022 * h), skin if has_shorts else trousers, LOW_LEG)
        canvas.limb(hip, knee, (0.056 * build * h, 0.038 * build * h), trousers, UP_LEG)

    def draw_arm(side: int) -> None:
        raised = rng.uniform(100, 170) if rng.random() < 0.2 else rng.uniform(5, 60)
        shoulder = neck - 0.035 * h * up + 0.085 * across * side
        elbow = shoulder + 0.165 * h * direction(lean + side * raised)
        forearm = direction(lean + side * (raised + rng.uniform(-100, 40)))
        wrist, fingers = elbow + 0.14 * h * forearm, elbow + 0.18 * h * forearm
        canvas.limb(shoulder, elbow, (0.032 * build * h, 0.024 * h), shirt, UP_HAND)
        canvas.limb(wrist, fingers, (0.02 * h, 0.023 * h), skin, LOW_HAND)
        canvas.limb(elbow, wrist, (0.026 * build * h, 0.017 * h), shirt if has_sleeves else skin, LOW_HAND)

    front = rng.choice([-1, 1])
    draw_arm(-front)
    draw_leg(-front)
    draw_leg(front)
    chin, crown = neck + 0.05 * h * up, neck + 0.13 * h * direction(180 - lean + rng.normal(0, 10))
    waist = (0.075 + 0.03 * (1 - turn)) * build * h
    canvas.limb(neck - 0.05 * h * up, hips, (waist, 0.8 * waist), shirt, TORSO)
    canvas.limb(neck - 0.02 * h * up, chin, (0.03 * h, 0.03 * h), skin, HEAD)
    canvas.limb(crown + 0.012 * h * up, crown - 0.012 * h * up, (0.055 * h, 0.05 * h), hair, HEAD)
    canvas.limb(chin + 0.012 * h * up, crown - 0.015 * h * up, (0.032 * h, 0.045 * h), skin, HEAD)
    draw_arm(front)


def draw_background(canvas: Canvas, rng: Generator) -> None:
    """Paints wall and ground, stains on both, and posts and balls."""
    width, height = canvas.size
    is_wall = np.arange(height)[:, None, None] < height * rng.uniform(0.35, 0.75)
    canvas.rgb[:] = np.where(is_wall, muted(rng), muted(rng))
    for cells, strength in ((4, 14), (14, 8), (50, 4)):  # smooth noise with so many bumps across
        coarse = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
        canvas.rgb += strength * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))[..., None]
    for _ in range(rng.integers(3, 9)):
        centre, size = rng.uniform(0, canvas.size), rng.uniform(0.05, 0.2) * min(canvas.size)
        reach = rng.choice([0.1, 1.0, 2.5]) * size * direction(rng.uniform(0, 180))
        thick = size * rng.uniform(0.15, 0.5)
        colours = [near(rng, rng.choice(SKINS)), vivid(rng), muted(rng)]  # so that colour alone does not tell people
        canvas.limb(centre - reach, centre + reach, (thick, thick), colours[rng.choice(3, p=[0.05, 0.1, 0.85])])


def draw_sample(settings: Settings, index: int) -> tuple[Image.Image, Image.Image]:
    """Photo `index` of the set and its mask; it depends on nothing but the settings and the index.

    Colours are averaged over sub-pixels, labels taken at the centre of each pixel.
    """
    rng = np.random.default_rng([settings.seed, index])
    long_side = round(settings.size * 1.25)
    shapes = [(settings.size, settings.size), (settings.size, long_side), (long_side, settings.size)]
    height, width = shapes[rng.choice(3, p=[0.5, 0.25, 0.25])]
    canvas = Canvas(height * SUPERSAMPLING, width * SUPERSAMPLING)
    draw_background(canvas, rng)
    is_near = rng.random() < 0.35
    count = 1 if is_near else rng.choice([1, 2, 3], p=[0.65, 0.25, 0.1])
    for slot, scale in enumerate(sorted(rng.uniform(*((1.2, 1.9) if is_near else (0.7, 0.95)), count))):
        x = (slot + 0.5) / count + rng.normal(0, 0.09)
        y = rng.uniform(0.05, 0.2) + 0.45 * scale if is_near else rng.uniform(0.9, 0.98) - 0.49 * scale
        draw_person(canvas, rng, canvas.size * (x, y), scale * canvas.size[1])

    rgb = canvas.rgb.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING, 3).mean((1, 3))
    rgb = rgb * rng.uniform(0.8, 1.1) * rng.uniform(0.93, 1.07, 3) + rng.normal(0, rng.uniform(1, 6), rgb.shape)
    photo = Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.6)))
    middle = np.s_[SUPERSAMPLING // 2 :: SUPERSAMPLING]
    return photo, Image.fromarray(np.ascontiguousarray(canvas.labels[middle, middle]))


def make_data_set(settings: Settings, out: Path) -> None:
    """Writes the set, all of it or nothing, where it is not there already.

    Raises: UserError where `out` holds anything else, or cannot be written.
    """
    if (out / RECORD).is_file() and read_json(out / RECORD) == asdict(settings):
        return
    ids = [f"drawn_{index:05d}" for index in range(settings.train + settings.val)]
    with whole_folder(out) as folder:
        for name in ("JPEGImages", "gt_masks"):
            (folder / name).mkdir()

        def draw(index: int) -> None:
            photo, mask = draw_sample(settings, index)
            photo.save(folder / "JPEGImages" / f"{ids[index]}.jpg", quality=92)
            mask.save(folder / "gt_masks" / f"{ids[index]}.png")

        map_files(draw, range(len(ids)), "drawing")
        write_ids(ids[: settings.train], folder / "train_id.txt")
        write_ids(ids[settings.train :], folder / "val_id.txt")
        write_whole("".join(f"{label}: {name}\n" for label, name in enumerate(CLASSES)), folder / "classes.txt")
        write_json(asdict(settings), folder / RECORD)


def main() -> None:
    """Reads the command line and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPO / "data" / "sample", help="default: data/sample")
    parser.add_argument("--train", type=int, default=Settings.train, help="photos to train on (%(default)s)")
    parser.add_argument("--val", type=int, default=Settings.val, help="photos to score on (%(default)s)")
    parser.add_argument("--size", type=int, default=Settings.size, help="short side in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="another seed, other people (%(default)s)")
    args = parser.parse_args()
    if min(args.train, args.val) < 1 or args.size < 32 or args.seed < 0:
        parser.error("--train and --val must be at least 1, --size at least 32, --seed at least 0")
    make_data_set(Settings(args.train, args.val, args.size, args.seed), args.out)
    print(f"{args.out}: {args.train} photos to train on and {args.val} to score on")


if __name__ == "__main__":
    run_main(main)
