"""In: a folder, sizes and a seed. Out: a drawn detection data set with its `demo.yaml`, the same bytes each time."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from cache_kd.errors import CacheKDError, SettingError

Image = NDArray[np.uint8]
Points = NDArray[np.float64]
Canvas = NDArray[np.float32]
Box = tuple[float, float, float, float]

SUBPIXEL_BITS = 4
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Placed:
    """One drawn object: its class number and its box, xyxy in pixels of the image."""

    number: int
    xyxy: Box


def draw_dataset(folder: Path, *, images: int, val_images: int, imgsz: int, seed: int) -> Path:
    """Return the path of `demo.yaml`, after drawing its images and labels in YOLO's layout.

    Every image has random numbers of its own, from (seed, split, index) alone: a larger set begins with the smaller
    one, and two calls with the same arguments write the same bytes.

    Args:
        folder: Where images/, labels/ and demo.yaml go; created when missing, files of the same name are replaced.
        images: Training images, at least 1.
        val_images: Validation images, at least 1.
        imgsz: Side of the square images in pixels, at least 32.
        seed: Any integer from 0.

    Raises:
        SettingError: A number is below its least value.
        CacheKDError: An image cannot be written.
    """
    for name, value, least in (("images", images, 1), ("val_images", val_images, 1), ("imgsz", imgsz, 32)):
        if value < least:
            raise SettingError(f"demo: {name}={value} is too small; allowed: {least} or more")
    if seed < 0:
        raise SettingError(f"demo: seed={seed} is negative; allowed: 0 or more")
    for split, (name, count) in enumerate(zip(SPLITS, (images, val_images), strict=True)):
        for kind in ("images", "labels"):
            (folder / kind / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, placed = draw_scene(np.random.default_rng((seed, split, index)), imgsz)
            file = folder / "images" / name / f"{index:05d}.png"
            _write_png(file, image)
            (folder / "labels" / name / f"{index:05d}.txt").write_text(_label_lines(placed, imgsz), encoding="ascii")
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(CLASSES))
    data_file = folder / "demo.yaml"
    data_file.write_text(f"train: images/train\nval: images/val\nnames:\n{names}", encoding="ascii")
    return data_file


def draw_scene(rng: np.random.Generator, imgsz: int) -> tuple[Image, list[Placed]]:
    """Return one (imgsz, imgsz, 3) BGR image and its objects, farthest first."""
    canvas = _background(rng, imgsz)
    for _ in range(rng.integers(2, 5)):
        _distractor(rng, canvas)
    placed: list[Placed] = []
    for _ in range(rng.integers(5, 10)):
        _place_object(rng, canvas, placed)
    for _ in range(rng.integers(0, 3)):
        _stroke(rng, canvas)
    canvas += rng.normal(0.0, rng.uniform(2.0, 12.0), canvas.shape)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), placed


def _background(rng: np.random.Generator, imgsz: int) -> Canvas:
    """Return a mottled, nearly grey ground."""
    canvas = np.empty((imgsz, imgsz, 3), np.float32)
    canvas[:] = rng.uniform(70, 180) + rng.normal(0.0, 8.0, 3)
    for cells, strength in ((3, 22.0), (10, 9.0)):
        coarse = rng.normal(0.0, strength, (cells, cells, 1)) + rng.normal(0.0, strength / 3, (cells, cells, 3))
        canvas += cv2.resize(coarse.astype(np.float32), (imgsz, imgsz), interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(canvas, 0, 255), np.float32)


def _place_object(rng: np.random.Generator, canvas: Canvas, placed: list[Placed]) -> None:
    """Draw one object where it hides no more than a part of the earlier ones; give up after some tries."""
    imgsz = canvas.shape[0]
    number = int(rng.integers(len(SHAPES)))
    outline, hole = SHAPES[CLASSES[number]]()
    radius = imgsz * np.exp(rng.uniform(np.log(0.08), np.log(0.17)))
    turn = _transform(rng, radius)
    reach = outline @ turn.T
    low, high = reach.min(axis=0), reach.max(axis=0)
    for _ in range(12):
        centre = rng.uniform(-low - 0.1 * radius, imgsz - high + 0.1 * radius)
        corners = np.clip(np.concatenate((low + centre, high + centre)), 0, imgsz)
        box: Box = (float(corners[0]), float(corners[1]), float(corners[2]), float(corners[3]))
        if all(_covered(box, other.xyxy) < 0.25 for other in placed):
            break
    else:
        return
    mask = _mask(reach + centre, imgsz)
    if hole is not None:
        mask = np.asarray(mask * (1 - _mask(hole @ turn.T + centre, imgsz)), np.float32)
    _paint(canvas, mask, _texture(rng, _class_colour(rng, number), imgsz))
    placed.append(Placed(number, box))


def _class_colour(rng: np.random.Generator, number: int) -> Canvas:
    """Return a BGR colour near the class's own hue, in one of seven cases of any hue.

    Colour says much of the class and shape the rest: a student learns the one within seconds, a teacher also the other.
    """
    hue = rng.random() if rng.random() < 0.15 else number / len(SHAPES) + rng.normal(0.0, 0.035)
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(0.5, 1.0), rng.uniform(0.55, 1.0))
    return np.array([blue, green, red], np.float32) * np.float32(255)


def _transform(rng: np.random.Generator, radius: float) -> Points:
    angle = rng.uniform(0, 2 * np.pi)
    stretch = np.exp(rng.uniform(-0.2, 0.2))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.asarray(radius * rotation @ np.diag([stretch, 1 / stretch]))


def _texture(rng: np.random.Generator, colour: NDArray[np.float32], imgsz: int) -> Canvas:
    """Return a canvas of `colour`, flat, shaded or striped."""
    rows, columns = np.mgrid[0:imgsz, 0:imgsz] / imgsz
    angle, style = rng.uniform(0, 2 * np.pi), rng.random()
    along = rows * np.sin(angle) + columns * np.cos(angle)
    if style < 0.4:
        wave = np.zeros_like(along)
    elif style < 0.7:
        wave = rng.uniform(40, 120) * (along - along.mean())
    else:
        wave = rng.uniform(10, 28) * np.sign(np.sin(along * rng.uniform(60, 140) + angle))
    return np.asarray((colour + wave[:, :, None]).clip(0, 255), np.float32)


def _distractor(rng: np.random.Generator, canvas: Canvas) -> None:
    """Draw something that is no object: an irregular blob, a bent bar, a stroke or a frame of corners."""
    imgsz = canvas.shape[0]
    if rng.random() < 0.4:
        _stroke(rng, canvas)
        return
    count = int(rng.integers(5, 9))
    angles = np.sort(rng.uniform(0, 2 * np.pi, count))
    lengths = rng.uniform(0.35, 1.3, count) * imgsz * rng.uniform(0.06, 0.2)
    points = np.stack((np.cos(angles), np.sin(angles)), axis=1) * lengths[:, None] + rng.uniform(0, imgsz, 2)
    mask = _mask(points, imgsz)
    _paint(canvas, mask, _texture(rng, rng.uniform(0, 255, 3).astype(np.float32), imgsz))


def _stroke(rng: np.random.Generator, canvas: Canvas) -> None:
    imgsz = canvas.shape[0]
    steps = rng.normal(0, imgsz * 0.14, (5, 2)) + rng.normal(0, imgsz * 0.1, 2)
    points = rng.uniform(0, imgsz, 2) + np.cumsum(steps, axis=0)
    mask = np.zeros((imgsz, imgsz), np.uint8)
    width = max(1, round(imgsz * rng.uniform(0.006, 0.025)))
    cv2.polylines(mask, [_fixed(points)], False, 255, width, cv2.LINE_AA, SUBPIXEL_BITS)
    _paint(canvas, mask.astype(np.float32) / np.float32(255), rng.uniform(0, 255, 3).astype(np.float32))


def _paint(canvas: Canvas, mask: Canvas, colour: NDArray[np.float32]) -> None:
    canvas += mask[:, :, None] * (colour - canvas)


def _mask(points: Points, imgsz: int) -> Canvas:
    mask = np.zeros((imgsz, imgsz), np.uint8)
    cv2.fillPoly(mask, [_fixed(points)], 255, cv2.LINE_AA, SUBPIXEL_BITS)
    return mask.astype(np.float32) / np.float32(255)


def _fixed(points: Points) -> NDArray[np.int32]:
    # OpenCV puts whole numbers at pixel centres, boxes count from the pixel's edge.
    scaled: NDArray[np.int32] = np.rint((points - 0.5) * 2**SUBPIXEL_BITS).astype(np.int32)
    return scaled


def _covered(first: Box, second: Box) -> float:
    """Return the overlap as a share of the smaller of two xyxy boxes."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return max(width, 0.0) * max(height, 0.0) / max(min(areas), 1e-9)


def _label_lines(placed: list[Placed], imgsz: int) -> str:
    lines = []
    for item in placed:
        left, top, right, bottom = (value / imgsz for value in item.xyxy)
        values = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
        lines.append(" ".join([str(item.number), *(f"{value:.6f}" for value in values)]) + "\n")
    return "".join(lines)


def _write_png(file: Path, image: Image) -> None:
    done, encoded = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not done:
        raise CacheKDError(f"demo: cannot encode {file} as PNG; check the OpenCV installation: pip show opencv-python")
    file.write_bytes(encoded.tobytes())


def _around(count: int, radii: tuple[float, ...] = (1.0,)) -> Points:
    """Return `count` points round the origin, their distances taken from `radii` in turn."""
    angles = np.arange(count) * (2 * np.pi / count)
    lengths = np.resize(np.asarray(radii), count)
    return np.asarray(np.stack((np.cos(angles), np.sin(angles)), axis=1) * lengths[:, None])


def _cross() -> Points:
    arm = 0.32
    quarter = np.array([[1, -arm], [1, arm], [arm, arm]])
    turns = [np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in np.arange(4) * np.pi / 2]
    return np.concatenate([quarter @ turn.T for turn in turns])


def _arrow() -> Points:
    return np.array([[1, 0], [0.1, 0.75], [0.1, 0.28], [-1, 0.28], [-1, -0.28], [0.1, -0.28], [0.1, -0.75]])


def _moon() -> Points:
    outer = np.linspace(0.3 * np.pi, 1.7 * np.pi, 24)
    inner = outer[::-1]
    far = np.stack((np.cos(outer), np.sin(outer)), axis=1)
    near = np.stack((0.35 * np.cos(inner) + 0.38, np.sin(inner)), axis=1)
    return np.concatenate((far, near))


# Name of a class → its outline and hole, corners in units of the radius.
SHAPES: dict[str, Callable[[], tuple[Points, Points | None]]] = {
    "disc": lambda: (_around(40), None),
    "ring": lambda: (_around(40), 0.55 * _around(40)),
    "square": lambda: (_around(4), None),
    "triangle": lambda: (_around(3), None),
    "star": lambda: (_around(10, (1.0, 0.42)), None),
    "cross": lambda: (_cross(), None),
    "arrow": lambda: (_arrow(), None),
    "moon": lambda: (_moon(), None),
}
CLASSES = tuple(SHAPES)
