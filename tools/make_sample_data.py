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
from functools import partial
from pathlib import Path
from types import SimpleNamespace as Person  # looks, and the joints by name

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter

from utils.cli import map_files, run_main
from utils.errors import UserError
from utils.files import read_json, write_json, write_whole
from utils.ids import write_ids

REPO = Path(__file__).resolve().parents[1]
CLASSES = ("bg", "low_hand", "torso", "low_leg", "head", "up_leg", "up_hand")  # position = label id
BACKGROUND, LOW_HAND, TORSO, LOW_LEG, HEAD, UP_LEG, UP_HAND = range(len(CLASSES))
SUPERSAMPLING = 3  # odd, so that a pixel's centre is the centre of a sub-pixel

# Outlines: (position along the axis, half width), both in lengths of the axis; between them straight lines.
Outline = Sequence[tuple[float, float]]
UPPER_ARM = ((-0.17, 0), (-0.14, 0.1), (-0.04, 0.17), (0.4, 0.17), (1.0, 0.14), (1.1, 0.09), (1.13, 0))
LOWER_ARM = ((-0.13, 0), (-0.1, 0.09), (0, 0.14), (0.3, 0.155), (0.95, 0.09), (1.06, 0.08), (1.08, 0))
HAND = ((-0.15, 0), (-0.1, 0.2), (0.3, 0.42), (0.7, 0.4), (1.0, 0.25), (1.1, 0))
UPPER_LEG = ((-0.16, 0), (-0.13, 0.1), (0, 0.2), (0.3, 0.2), (1.0, 0.13), (1.08, 0.09), (1.12, 0))
LOWER_LEG = ((-0.11, 0), (-0.08, 0.09), (0, 0.13), (0.3, 0.15), (0.8, 0.085), (1.0, 0.08), (1.04, 0))
FOOT = ((-0.35, 0), (-0.3, 0.2), (0, 0.3), (0.6, 0.22), (1.0, 0.18), (1.12, 0))
TRUNK = ((-0.06, 0), (-0.04, 0.16), (0.03, 0.3), (0.12, 0.37), (0.4, 0.33), (0.65, 0.28), (1.0, 0.32), (1.08, 0))
NECK = ((-0.3, 0), (-0.28, 0.4), (0.5, 0.32), (1.2, 0.3), (1.3, 0))
FACE = ((0, 0), (0.04, 0.16), (0.2, 0.29), (0.5, 0.37), (0.75, 0.36), (0.92, 0.22), (1, 0))
SHORT_HAIR = ((0.6, 0), (0.64, 0.4), (0.75, 0.42), (0.92, 0.32), (1.05, 0.14), (1.07, 0))
LONG_HAIR = ((-0.4, 0), (-0.35, 0.4), (0.3, 0.48), (0.75, 0.46), (0.95, 0.3), (1.07, 0))
ROUND = tuple((0.5 - 0.5 * np.cos(a), 0.5 * np.sin(a)) for a in np.linspace(0, np.pi, 15))

SKINS = ((255, 219, 190), (240, 195, 155), (212, 160, 115), (165, 110, 75), (115, 75, 50), (80, 52, 38))
HAIRS = ((25, 20, 18), (60, 38, 22), (105, 65, 35), (190, 150, 85), (150, 145, 140), (140, 55, 30))
SHOES = ((30, 28, 28), (90, 60, 40), (225, 225, 225), (170, 40, 40))
LIGHT = np.array([-0.45, -0.55, 0.7])  # from the upper left, towards the viewer


@dataclass(frozen=True)
class Settings:
    """All that decides what the files hold."""

    train: int = 240
    val: int = 60
    size: int = 128
    seed: int = 0
    drawing_version: int = 3  # raise it when the same seed gives other pictures


@dataclass(frozen=True)
class Material:
    """A colour and a pattern that follows the limb it is wrapped around; lengths in sub-pixels."""

    colour: np.ndarray
    accent: np.ndarray
    pattern: str = "plain"
    period: float = 12.0

    def paint(self, along: np.ndarray, across: np.ndarray) -> np.ndarray:
        """Shape: two (pixels,) -> (pixels, 3)."""
        accented = np.zeros(along.shape, bool)
        if self.pattern in ("rings", "checks"):
            accented ^= np.sin(along * 2 * np.pi / self.period) > 0.2
        if self.pattern in ("stripes", "checks"):
            accented ^= np.sin(across * 2 * np.pi / self.period) > 0.2
        if self.pattern == "dots":
            accented = np.sin(along * 6 / self.period) * np.sin(across * 6 / self.period) > 0.55
        return np.where(accented[..., None], self.accent, self.colour)


class Canvas:
    """A picture in the making, at `SUPERSAMPLING` times its size: colours (H, W, 3) and labels (H, W)."""

    def __init__(self, height: int, width: int) -> None:
        self.rgb, self.labels = np.zeros((height, width, 3), np.float32), np.zeros((height, width), np.uint8)
        self.size = np.array([width, height])

    def draw(self, start, end, outline: Outline, material: Material, label=BACKGROUND, width=1.0, shading=0.6) -> None:
        """Paints a shape of revolution around the axis from start to end, lit from the upper left."""
        length = float(np.hypot(*(end - start)))
        if length < 1e-3:
            return
        positions, half_widths = np.array(outline).T
        axis = (end - start) / length
        tips = start + np.outer(positions[[0, -1]], end - start)
        low = np.floor(tips.min(0) - length * width * half_widths.max()).astype(int).clip(0)
        high = np.minimum(np.ceil(tips.max(0) + length * width * half_widths.max()).astype(int), self.size)
        if (high <= low).any():
            return
        box = (slice(low[1], high[1]), slice(low[0], high[0]))

        dx = np.arange(low[0], high[0])[None, :] + 0.5 - start[0]
        dy = np.arange(low[1], high[1])[:, None] + 0.5 - start[1]
        along, across = dx * axis[0] + dy * axis[1], dy * axis[0] - dx * axis[1]
        radius = np.interp(along / length, positions, half_widths, left=0, right=0) * length * width
        inside = (np.abs(across) < radius) & (radius > 0)

        along, across = along[inside], across[inside]  # (number of pixels inside,)
        side = across / radius[inside]  # -1 and 1 at the outline, 0 on the axis
        normal = (-axis[1] * side, axis[0] * side, np.sqrt(1 - side**2))
        light = sum(n * part for n, part in zip(normal, LIGHT, strict=True)).clip(0)
        self.rgb[box][inside] = material.paint(along, across) * (1 - shading + shading * light)[..., None]
        self.labels[box][inside] = label


# ---- people ------------------------------------------------------------------------------------------------


def _direction(degrees: float) -> np.ndarray:
    """Unit vector; 0 points down, 90 to the right."""
    return np.array([np.sin(np.radians(degrees)), np.cos(np.radians(degrees))])


def _cloth(rng: Generator, height: float, dark: bool = False) -> Material:
    """Trousers are dark, often jeans; all else is vivid, from green over blue to red, the hues that skin has not."""
    hue, saturation, value = rng.uniform(0.38, 0.98), rng.uniform(0.55, 0.95), rng.uniform(0.55, 1.0)
    colour = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))
    if dark:
        jeans = rng.random() < 0.6
        colour = (np.array([40, 55, 95]) if jeans else rng.uniform(30, 60, 3)) * rng.uniform(0.6, 1.3)
    accent = np.clip(colour + rng.choice([-1, 1]) * rng.uniform(40, 110), 10, 250)
    pattern = "plain" if dark else str(rng.choice(["plain", "plain", "rings", "stripes", "checks", "dots"]))
    return Material(colour, accent, pattern, period=height * rng.uniform(0.025, 0.06))


def _plain(rng: Generator, colour: Sequence[float]) -> Material:
    colour = np.clip(np.array(colour) * rng.uniform(0.88, 1.08) + rng.normal(0, 4, 3), 5, 255)
    return Material(colour, colour)


def make_person(rng: Generator, height: float) -> Person:
    """Draws lots for the looks of a person, in a fixed order, and lets them strike a pose."""
    shirt = _cloth(rng, height)
    overall = rng.random() < 0.03  # shirt and trousers of one cloth
    person = Person(
        height=height,
        build=rng.uniform(0.85, 1.25),
        skin=_plain(rng, rng.choice(SKINS)),
        hair=_plain(rng, rng.choice(HAIRS)),
        shirt=shirt,
        trousers=shirt if overall else _cloth(rng, height, dark=rng.random() < 0.93),
        shoes=_plain(rng, rng.choice(SHOES)),
        sleeve=str(rng.choice(["none", "short", "long"], p=[0.15, 0.5, 0.35])),
        legwear=str(rng.choice(["shorts", "long"], p=[0.4, 0.6])),
        hair_style=str(rng.choice(["short", "long", "bald"], p=[0.55, 0.35, 0.1])),
        turn=float(rng.choice([0.0, 0.3, 0.9])),  # 0 seen from the front, 1 from the side
        facing=int(rng.choice([-1, 1])),  # the side they turn to: -1 left, 1 right
        seen_from_behind=bool(rng.random() < 0.12),
    )
    person.joints = _pose(person, rng)
    return person


def _pose(person: Person, rng: Generator) -> dict[str, np.ndarray]:
    """The joints around the hips at (0, 0); y points down."""
    h, turn, facing = person.height, person.turn, person.facing
    kind = rng.choice(["stand", "walk", "sit", "cheer"], p=[0.4, 0.3, 0.15, 0.15])
    lean = rng.normal(0, 7) + (turn * facing * rng.uniform(0, 12) if kind == "walk" else 0)
    up = _direction(180 - lean)
    sideways = np.array([-up[1], up[0]])  # to the right for an upright person
    joints = {"hips": np.zeros(2), "neck": up * 0.29 * h}
    joints["chin"] = joints["neck"] + up * 0.035 * h
    joints["crown"] = joints["chin"] + _direction(180 - lean + rng.normal(0, 10)) * 0.135 * h

    for name, side in (("left", -1), ("right", 1)):
        swing = side * turn * (1 if kind == "walk" else 0.4)  # seen from the side, limbs swing fore and aft
        # Lots are drawn for every kind of pose, and one is taken: the numbers that follow do not depend on it.
        arm, elbow = {
            "cheer": (side * rng.uniform(110, 170), side * rng.uniform(0, 40)),
            "walk": (side * rng.uniform(5, 20) * (1 - turn) + swing * 35, rng.uniform(5, 60)),
        }.get(kind, (side * rng.uniform(5, 55) * (1 - 0.5 * turn), side * rng.uniform(-110, 30)))
        if kind == "walk":
            elbow *= facing if turn > 0.5 else side
        leg, knee = {
            "walk": (-swing * rng.uniform(12, 35) + side * 6, -facing * turn * rng.uniform(5, 50)),
            "sit": (facing * turn * rng.uniform(70, 95) + side * (1 - turn) * rng.uniform(15, 60), -facing * turn * 85),
        }.get(kind, (side * rng.uniform(2, 14), -side * rng.uniform(0, 8)))
        thigh = 0.24 * h
        if kind == "sit" and turn < 0.5:
            knee = -leg * rng.uniform(0.7, 1.2)
            thigh *= rng.uniform(0.5, 0.8)  # foreshortened
        shoulder = joints["neck"] - up * 0.045 * h + sideways * side * (1 - 0.75 * turn) * 0.085 * h * person.build
        hip = sideways * side * (1 - 0.7 * turn) * 0.05 * h * person.build
        outwards = facing * 75 if turn > 0.2 else side * rng.uniform(15, 60)
        arms = (lean + arm, 0.165 * h), (lean + arm + elbow, 0.145 * h), (lean + arm + elbow * 1.1, 0.06 * h)
        joints[f"{name}_arm"] = _chain(shoulder, *arms)
        joints[f"{name}_leg"] = _chain(hip, (leg, thigh), (leg + knee, 0.23 * h), (leg + knee + outwards, 0.07 * h))
    return joints


def _chain(start: np.ndarray, *bones: tuple[float, float]) -> np.ndarray:
    """The joints of a limb, each bone given by its direction and length. Shape: (2,) -> (bones + 1, 2)."""
    return np.cumsum([start, *(_direction(degrees) * length for degrees, length in bones)], axis=0)


def draw_person(canvas: Canvas, person: Person, rng: Generator) -> None:
    """Paints a posed person from back to front."""
    far, near = ("right", "left") if person.facing > 0 else ("left", "right")
    far_arm_behind = person.turn > 0.5 or rng.random() < 0.5
    if person.hair_style == "long" and not person.seen_from_behind:
        _draw_hair(canvas, person, LONG_HAIR)
    if far_arm_behind:
        _draw_arm(canvas, person, far)
    _draw_leg(canvas, person, far)
    _draw_leg(canvas, person, near)
    trunk_width = person.build * (1 - 0.35 * person.turn)
    canvas.draw(person.joints["neck"], person.joints["hips"], TRUNK, person.shirt, TORSO, trunk_width)
    _draw_head(canvas, person)
    if not far_arm_behind:
        _draw_arm(canvas, person, far)
    _draw_arm(canvas, person, near)


def _draw_arm(canvas: Canvas, person: Person, side: str) -> None:
    shoulder, elbow, wrist, fingers = person.joints[f"{side}_arm"]
    upper = person.skin if person.sleeve == "none" else person.shirt
    lower = person.shirt if person.sleeve == "long" else person.skin
    canvas.draw(shoulder, elbow, UPPER_ARM, upper, UP_HAND, person.build)
    canvas.draw(wrist, fingers, HAND, person.skin, LOW_HAND)
    canvas.draw(elbow, wrist, LOWER_ARM, lower, LOW_HAND, person.build)


def _draw_leg(canvas: Canvas, person: Person, side: str) -> None:
    hip, knee, ankle, toes = person.joints[f"{side}_leg"]
    thigh_width = person.build * 0.24 * person.height / max(np.hypot(*(knee - hip)), 1)
    shin = person.trousers if person.legwear == "long" else person.skin
    canvas.draw(ankle, toes, FOOT, person.shoes, LOW_LEG)
    limbs = [
        (knee, ankle, LOWER_LEG, shin, LOW_LEG, person.build),
        (hip, knee, UPPER_LEG, person.trousers, UP_LEG, thigh_width),
    ]
    for limb in limbs if person.turn < 0.5 else reversed(limbs):  # from the front the thigh lies over the shin
        canvas.draw(*limb)


def _draw_head(canvas: Canvas, person: Person) -> None:
    neck, chin, crown = person.joints["neck"], person.joints["chin"], person.joints["crown"]
    canvas.draw(neck, chin, NECK, person.skin, HEAD, 2.2 * person.build, shading=0.75)
    canvas.draw(chin, crown, FACE, person.skin, HEAD)
    if person.seen_from_behind and person.hair_style != "bald":
        _draw_hair(canvas, person, LONG_HAIR if person.hair_style == "long" else FACE)
        return
    up = crown - chin
    sideways = np.array([-up[1], up[0]])
    gaze = 0.2 * person.turn * person.facing * sideways
    if person.hair_style != "bald":
        _draw_hair(canvas, person, SHORT_HAIR)
    dark, lips = (Material(np.array(colour), np.array(colour)) for colour in ((35, 25, 25), (150, 60, 60)))
    for side in (-1, 1):
        eye = chin + 0.44 * up + gaze + side * 0.15 * sideways * (1 - 0.6 * person.turn)
        canvas.draw(eye, eye + 0.09 * up, ROUND, dark, HEAD, shading=0.2)
    mouth = chin + 0.2 * up + gaze
    canvas.draw(mouth - 0.11 * sideways, mouth + 0.11 * sideways, ROUND, lips, HEAD, 0.3, 0.2)


def _draw_hair(canvas: Canvas, person: Person, outline: Outline) -> None:
    canvas.draw(person.joints["chin"], person.joints["crown"], outline, person.hair, HEAD, 1.05, shading=0.45)


# ---- surroundings ------------------------------------------------------------------------------------------


def draw_background(canvas: Canvas, rng: Generator) -> None:
    """Paints wall or sky, ground and clutter."""
    width, height = canvas.size
    horizon = height * rng.uniform(0.35, 0.75)
    above, below = (_muted(rng) for _ in range(2))
    rows = np.arange(height)[:, None, None]
    canvas.rgb[:] = np.where(rows < horizon, above, below) * (1 - 0.25 * np.abs(rows - horizon) / height)
    for cells, strength in ((4, 12), (14, 7), (50, 4)):  # smooth noise with so many bumps across
        coarse = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
        canvas.rgb += strength * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))[..., None]
    for _ in range(rng.integers(2, 7)):
        _draw_clutter(canvas, rng, np.array([rng.uniform(0, width), rng.uniform(0, height)]), rng.uniform(0.05, 0.22))


def _muted(rng: Generator) -> np.ndarray:
    """A colour of walls, skies and floors: a grey with a tint."""
    return np.clip(rng.uniform(125, 225) + rng.normal(0, 10, 3), 20, 250)


def _draw_clutter(canvas: Canvas, rng: Generator, centre: np.ndarray, scale: float) -> None:
    """Paints a box, post, ball or bush; now and then in skin or cloth, so that colour alone does not tell people."""
    size = scale * canvas.size.min()
    lot = rng.random()
    if lot < 0.03:
        material = _plain(rng, rng.choice(SKINS))
    else:
        material = _cloth(rng, size * 4) if lot < 0.12 else _plain(rng, _muted(rng))
    kind = rng.choice(["box", "post", "bush", "ball"])
    if kind == "box":
        half, tilt = size * rng.uniform(0.4, 1.0, 2), rng.normal(0, 0.15)
        axis = half[1] * np.array([np.sin(tilt), np.cos(tilt)])
        square = ((0, half[0] / half[1] / 2), (1, half[0] / half[1] / 2))
        canvas.draw(centre - axis, centre + axis, square, material, shading=0.35)
    elif kind == "post":
        end = centre + _direction(rng.normal(0, 25)) * size * 3
        canvas.draw(centre - (end - centre), end, ((0, 0.05), (1, 0.05)), material)
    elif kind == "ball":
        canvas.draw(centre, centre + _direction(rng.uniform(0, 360)) * size, ROUND, material)
    else:
        green = np.array([rng.uniform(30, 90), rng.uniform(80, 150), rng.uniform(20, 70)])
        for _ in range(7):
            leaf = centre + rng.normal(0, 0.3, 2) * size
            tip = leaf + _direction(rng.uniform(0, 360)) * size * 0.7
            canvas.draw(leaf, tip, ROUND, _plain(rng, green), width=rng.uniform(0.4, 1.0))


def draw_people(canvas: Canvas, rng: Generator) -> None:
    """Paints one to three people, the nearest last, and now and then an object in front of them."""
    width, height = canvas.size
    close_up = rng.random() < 0.35
    count = 1 if close_up else int(rng.choice([1, 2, 3], p=[0.65, 0.25, 0.1]))
    heights = height * (rng.uniform(1.2, 1.9, 1) if close_up else np.sort(rng.uniform(0.75, 0.98, count)))
    for slot, tall in zip(rng.permutation(count), heights, strict=True):
        person = make_person(rng, tall)
        ys = np.vstack(list(person.joints.values()))[:, 1]
        x = width * ((slot + 0.5) / count + rng.normal(0, 0.09))
        top = height * rng.uniform(0.02, 0.2) if close_up else height * rng.uniform(0.9, 0.99) - np.ptp(ys)
        hips = np.array([x, top - ys.min()])
        person.joints = {name: joint + hips for name, joint in person.joints.items()}
        rows, columns = np.ogrid[:height, :width]  # a shadow under the feet
        distance = ((columns - x) / (0.22 * tall)) ** 2 + ((rows - (top + np.ptp(ys))) / (0.25 * (0.22 * tall))) ** 2
        canvas.rgb *= (1 - 0.45 * np.exp(-distance))[..., None]
        draw_person(canvas, person, rng)
        if rng.random() < 0.25:
            at = hips + tall * np.array([rng.normal(0, 0.12), rng.uniform(-0.1, 0.35)])
            _draw_clutter(canvas, rng, at, 0.2 * tall / height * rng.uniform(0.5, 1.0))


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
    draw_people(canvas, rng)

    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    tilt = rng.normal(0, 0.12, 2)
    light = rng.uniform(0.88, 1.08) * (1 + tilt[0] * x + tilt[1] * y)
    rgb = canvas.rgb.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING, 3).mean((1, 3))
    rgb = rgb * light[..., None] * rng.uniform(0.93, 1.07, 3)
    rgb += rng.normal(0, rng.uniform(1, 6), rgb.shape)
    photo = Image.fromarray(rgb.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        photo = photo.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    centre = SUPERSAMPLING // 2
    return photo, Image.fromarray(np.ascontiguousarray(canvas.labels[centre::SUPERSAMPLING, centre::SUPERSAMPLING]))


# ---- files -------------------------------------------------------------------------------------------------


def sample_id(index: int) -> str:
    """The id of photo `index`."""
    return f"drawn_{index:05d}"


def _write_sample(index: int, settings: Settings, out: Path) -> None:
    photo, mask = draw_sample(settings, index)
    photo.save(out / "JPEGImages" / f"{sample_id(index)}.jpg", quality=92)
    mask.save(out / "gt_masks" / f"{sample_id(index)}.png")


def make_data_set(settings: Settings, out: Path) -> bool:
    """Writes the set; False where the same set is there already.

    Raises: UserError where `out` holds anything else, or cannot be written.
    """
    if _is_complete(settings, out):
        return False
    record = {"made_by": "make_sample_data", "complete": False, "settings": asdict(settings)}
    ids = [sample_id(index) for index in range(settings.train + settings.val)]
    try:
        for folder in ("JPEGImages", "gt_masks"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        write_json(record, out / "dataset.json")
        map_files(partial(_write_sample, settings=settings, out=out), range(len(ids)), "drawing")
        write_ids(ids[: settings.train], out / "train_id.txt")
        write_ids(ids[settings.train :], out / "val_id.txt")
        write_whole("".join(f"{label}: {name}\n" for label, name in enumerate(CLASSES)), out / "classes.txt")
        write_json(record | {"complete": True}, out / "dataset.json")
    except OSError as error:
        raise UserError(f"cannot write the sample data to {out}: {error.strerror or error}") from error
    return True


def _is_complete(settings: Settings, out: Path) -> bool:
    """Whether `out` holds this very set. Raises: UserError where it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        record = read_json(out / "dataset.json")
        made, complete = record["settings"], record["complete"]
    except (UserError, KeyError, TypeError):
        raise UserError(f"{out} holds something that this tool did not make; choose another folder by --out") from None
    if made != asdict(settings):
        raise UserError(
            f"{out} holds sample data of other settings ({made}); delete it or choose another folder by --out"
        )
    return complete


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
    if make_data_set(Settings(args.train, args.val, args.size, args.seed), args.out):
        print(f"drew {args.train} photos to train on and {args.val} to score on in {args.out}")
    else:
        print(f"{args.out} holds this sample data already; nothing to do")


if __name__ == "__main__":
    run_main(main)
