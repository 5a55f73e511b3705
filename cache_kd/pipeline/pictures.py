"""In: a cache, an image, a view, on request a teacher and a student. Out: pictures of what students learn from."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from cache_kd.cache.files import make_folder
from cache_kd.cache.store import Place
from cache_kd.errors import SettingError, choices
from cache_kd.fingerprint import SourceImage
from cache_kd.pipeline.coded_targets import codec_in_words, coded_levels, coded_logits
from cache_kd.pipeline.live_teacher import live_teacher
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.stored_boxes import stored_boxes
from cache_kd.report.box_pictures import MOST_CELLS, Cell, box_picture, sheet
from cache_kd.report.canvas import BoxLayer
from cache_kd.report.coding_pictures import declared_picture, difference_picture
from cache_kd.report.heat_maps import HeatMap, heat_picture
from cache_kd.structures import SampleTargets, TargetBatch, View, ViewSample
from cache_kd.student.detections import THRESHOLD, Detections, count_found, detections
from cache_kd.ultralytics_bridge.gate import import_user_modules
from cache_kd.ultralytics_bridge.heads import check_levels
from cache_kd.ultralytics_bridge.teacher import Teacher, load_teacher
from cache_kd.views.seeding import pixel_hash

SHEET_IMAGES, SHEET_VIEWS = 4, 6
ONE_VIEW_IMAGES = 9
NEAREST = 3


@dataclass(frozen=True)
class PictureSettings:
    """What to draw of a cache.

    Attributes:
        out: folder of the pictures. image: number or name; None takes a few. view: as `View.parse` reads it; None: all.
        teacher: the checkpoint that the cache was extracted with, for what the codec changed.
        student: a checkpoint whose boxes are drawn, too. data: data file, as `Cache` takes it.
    """

    out: Path
    image: str | None = None
    view: str | None = None
    teacher: Path | None = None
    student: Path | None = None
    data: Path | None = None
    trust_teacher: bool = False
    trust_student: bool = False
    imports: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """The files that were written, and one line each about what could not be drawn or looks wrong."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def draw(path: Place, settings: PictureSettings) -> Drawn:
    """Draw one view of one image, or a sheet of views where either is not given.

    Raises:
        CacheKDError: One line: no such cache, image or view; data set, teacher or student that do not fit.
    """
    import_user_modules(settings.imports)
    cache = Cache(path, data=settings.data)
    if isinstance(cache.path, Path) and settings.out.resolve().is_relative_to(cache.path.resolve()):
        raise SettingError(f"--out {settings.out} lies in the cache; give a folder outside it: --out pictures")
    view = None if settings.view is None else known_view(cache, settings.view)
    index = None if settings.image is None else image_index(cache.images, settings.image)
    one = view is not None and index is not None
    if settings.teacher is not None and not one:
        raise SettingError("--teacher shows what the codec changed in one view; name it: --image 0 --view 0")
    student = None if settings.student is None else load_student(cache, settings.student, settings.trust_student)
    if view is not None and index is not None:
        looked = Look(cache, view, index, student)
        return Drawn(*_draw_one(looked, settings))
    return _draw_sheet(cache, settings.out, view, index, student)


def known_view(cache: Cache, text: str) -> View:
    """Return the view of these words; raises `SettingError` for one that the cache does not hold."""
    view = View.parse(text)
    if view not in cache.views:
        raise SettingError(f"{cache.path} has no view {view.name}; {choices(view.name, [v.name for v in cache.views])}")
    return view


def image_index(images: Sequence[SourceImage], text: str) -> int:
    """Return the place of the image that is called so: its number as 5, its path, file name, or name without ending.

    Digits that begin with a zero are a name, as 000000000009 of COCO.

    Raises:
        SettingError: There is none, or several; the nearest names are told.
    """
    if text.isascii() and text.isdigit() and str(int(text)) == text:
        if int(text) < len(images):
            return int(text)
        raise SettingError(f"--image {text}: no such image; allowed: 0 to {len(images) - 1}, or a name")
    paths = [image.path for image in images]
    for name in (lambda path: path, lambda path: Path(path).name, lambda path: Path(path).stem):
        found = [number for number, path in enumerate(paths) if name(path) == text]
        if len(found) == 1:
            return found[0]
        if found:
            several = ", ".join(f"{number} ({paths[number]})" for number in found[:NEAREST])
            raise SettingError(f"--image {text}: {len(found)} images are called so: {several}; give a number")
    known = [spelling for path in paths for spelling in (Path(path).name, path)]
    near = difflib.get_close_matches(text, dict.fromkeys(known), n=NEAREST, cutoff=0.4) or paths[:NEAREST]
    raise SettingError(
        f"--image {text}: no such image; nearest: {', '.join(near)}; or a number, 0 to {len(images) - 1}"
    )


def load_student(cache: Cache, path: Path, trusted: bool) -> Teacher:
    """Return a student ready to be run on views of the cache; raises `CacheKDError` where it cannot be."""
    checkpoint = load_teacher(path, trusted=trusted, role="student")
    student = Teacher(checkpoint, imgsz=cache.manifest.imgsz, device="cpu", precision="fp32", store=("logits",))
    check_levels(cache.manifest.head, student.head)
    return student


class Look:
    """One view of one image: pixels, labels, what the cache holds of it, what a student says of it."""

    def __init__(self, cache: Cache, view: View, index: int, student: Teacher | None = None) -> None:
        self.cache, self.view, self.index, self._student = cache, view, index, student

    @property
    def title(self) -> str:
        manifest = self.cache.manifest
        image, teacher = Path(self.cache.images[self.index].path).name, manifest.teacher["file"]
        return f"image {self.index} ({image}), view {self.view.name}, {manifest.imgsz} px, teacher {teacher}"

    @cached_property
    def sample(self) -> ViewSample:
        return self.cache.dataset.sample(self.view, self.index)

    @cached_property
    def row(self) -> dict[str, np.ndarray]:
        return self.cache.reader.read(self.view, self.index, tuple(c.name for c in self.cache.codec.columns))

    @cached_property
    def targets(self) -> TargetBatch:
        return self.cache.codec.decode_one(self.row)

    @cached_property
    def layers(self) -> dict[str, tuple[Detections, tuple[str, ...]]]:
        """Boxes and the names of their classes, by source."""
        manifest = self.cache.manifest
        found = {"labels": (_as_detections(self.sample), self.label_names)}
        if (decoded := stored_boxes(self.cache)) is not None:
            found["teacher"] = (decoded(self.view, self.index), manifest.head.names)
        if self._student is not None:
            said, head = self._student([self.sample], batch=1)[0], self._student.head
            assert said.scores is not None and said.boxes is not None
            scores, boxes = torch.from_numpy(said.scores), torch.from_numpy(said.boxes)
            found["student"] = (detections(scores, boxes, head, manifest.imgsz), head.names)
        return found

    @property
    def label_names(self) -> tuple[str, ...]:
        """The data set's class names, as far as the cache recorded them."""
        names = self.cache.manifest.teacher.get("data_names")
        return tuple(map(str, names)) if isinstance(names, list) else ()

    def box_layers(self, *, texts: bool) -> list[BoxLayer]:
        """Return the boxes of every source, with class and score where `texts` are wanted."""
        return [
            BoxLayer(source, said.boxes.numpy(), _texts(said, names, scores=source != "labels") if texts else ())
            for source, (said, names) in self.layers.items()
        ]

    def captions(self) -> list[str]:
        """Return a line about every source: how many boxes, and how many labelled objects they find."""
        labels, names = self.layers["labels"]
        lines = [f"labels: {len(labels)} boxes"]
        for source, (said, known) in list(self.layers.items())[1:]:
            ours = torch.tensor([_place(known, _name(names, cls)) for cls in labels.cls.tolist()], dtype=torch.int64)
            found = count_found(Detections(labels.boxes, labels.scores, ours), said)
            lines.append(
                f"{source}: {len(said)} boxes of score > {THRESHOLD}; {found} of {len(labels)} labels found (IoU ≥ 0.5)"
            )
        return lines

    def notes(self) -> list[str]:
        """Return what cannot be shown, and whether these are the pixels that the teacher saw."""
        found = []
        stored = self.cache.reader.read_row(self.view, "pixel_hash", self.index).tobytes()
        if stored != pixel_hash(self.sample.pixels):
            found.append(
                f"view {self.view.name} of image {self.index} has other pixels than the teacher saw; check all: "
                f"cache-kd verify {self.cache.path} --pixels"
            )
        return found


def _draw_one(looked: Look, settings: PictureSettings) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    out, cache, live = settings.out, looked.cache, None
    if settings.teacher is not None:
        with live_teacher(cache, settings.teacher, trusted=settings.trust_teacher) as teacher:
            live = teacher([looked.sample], batch=1)[0]
    stem = f"image-{looked.index:04d}-{looked.view.name}"
    files, notes = [], looked.notes()
    layers = looked.box_layers(texts=True)
    rows = _heat_rows(looked)
    make_folder(out)  # everything that may be refused was done
    files.append(box_picture(out / f"{stem}-boxes.png", looked.title, looked.sample.pixels, layers, looked.captions()))
    for store, what in (("logits", "boxes and confidence"), ("features", "maps")):
        if store not in cache.codec.store:
            notes.append(f"the cache keeps no {store}: the teacher's {what} are not drawn")
    files.append(heat_picture(out / f"{stem}-features.png", looked.title, looked.sample.pixels, rows))
    files.append(_draw_codec(looked, live, out / f"{stem}-codec.png"))
    return tuple(files), tuple(notes)


def _heat_rows(looked: Look) -> list[list[HeatMap]]:
    """Return the rows of heat maps: activations of levels, of other layers, the teacher's confidence."""
    head, targets = looked.cache.manifest.head, looked.targets
    rows = []
    if targets.features is not None:
        named = zip(head.taps, targets.features, strict=True)
        rows.append([_activation(tap.name, level[0].numpy()) for tap, level in named])
    layers = [_activation(name, level[0].numpy()) for name, level in targets.layers.items()]
    rows += [layers[start : start + len(head.taps)] for start in range(0, len(layers), len(head.taps))]
    if targets.scores is not None and targets.sent is not None:
        best = targets.scores[0].sigmoid().amax(dim=1).numpy()
        best = np.where(targets.sent[0].numpy(), best, np.nan)
        grids = head.grids(looked.cache.manifest.imgsz)
        parts = np.split(best, np.cumsum([height * width for height, width in grids])[:-1])
        title = "{}: confidence; grey: not stored"
        rows.append(
            [
                HeatMap(title.format(tap.name), "largest class probability", part.reshape(grid), (0.0, 1.0))
                for tap, part, grid in zip(head.taps, parts, grids, strict=True)
            ]
        )
    return rows


def _activation(name: str, maps: np.ndarray) -> HeatMap:
    """Return the mean magnitude over the channels of (F, H, W)."""
    return HeatMap(
        f"{name}: {len(maps)} channels of {maps.shape[1]} × {maps.shape[2]}",
        "mean |activation|",
        np.abs(maps).mean(axis=0),
    )


def _draw_codec(looked: Look, live: SampleTargets | None, path: Path) -> Path:
    cache = looked.cache
    levels = coded_levels(cache, looked.row, looked.targets, live)
    logits = coded_logits(cache, looked.targets, live)
    says = codec_in_words(cache)
    if live is None:
        says += ["", "What it changed in this view,", "value by value: --teacher best.pt"]
        return declared_picture(path, f"What the codec keeps: {looked.title}", levels, logits, says)
    size = (looked.sample.pixels.shape[1], looked.sample.pixels.shape[2])
    return difference_picture(path, f"What the codec changed: {looked.title}", levels, logits, says, size)


def _draw_sheet(cache: Cache, out: Path, view: View | None, index: int | None, student: Teacher | None) -> Drawn:
    count = cache.manifest.num_images
    if index is not None:
        views: Sequence[View] = cache.views[:MOST_CELLS]
        images, name, columns = [index], f"image-{index:04d}-views.png", None
    elif view is not None:
        views, images, name, columns = [view], _spread(count, ONE_VIEW_IMAGES), f"{view.name}.png", None
    else:
        views = [cache.views[place] for place in _spread(len(cache.views), SHEET_VIEWS)]
        images, name, columns = _spread(count, SHEET_IMAGES), "views.png", len(views)
    looks = [Look(cache, one, image, student) for image in images for one in views]
    cells = [
        Cell(
            f"image {look.index} ({Path(cache.images[look.index].path).stem}) {look.view.name}",
            look.sample.pixels,
            tuple(look.box_layers(texts=False)),
        )
        for look in looks
    ]
    title = f"{len(views)} of {len(cache.views)} views of {len(images)} of {count} images, {cache.manifest.imgsz} px"
    notes = [note for look in looks for note in look.notes()][:NEAREST]
    if "logits" not in cache.codec.store:
        notes.append("the cache keeps no logits: the teacher's boxes are not drawn")
    make_folder(out)
    return Drawn((sheet(out / name, title, cells, columns=columns),), tuple(notes))


def _spread(count: int, most: int) -> list[int]:
    """Return at most `most` places of 0 … count − 1, evenly spread, both ends included."""
    return sorted(set(np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()))


def _as_detections(sample: ViewSample) -> Detections:
    """Return the labels of a view as boxes of score 1."""
    boxes = torch.from_numpy(sample.boxes).float().reshape(-1, 4)
    return Detections(boxes, torch.ones(len(boxes)), torch.from_numpy(sample.cls).long())


def _texts(said: Detections, names: Sequence[str], *, scores: bool) -> tuple[str, ...]:
    return tuple(
        f"{_name(names, cls)} {score:.2f}" if scores else _name(names, cls)
        for cls, score in zip(said.cls.tolist(), said.scores.tolist(), strict=True)
    )


def _name(names: Sequence[str], cls: int) -> str:
    return names[cls] if 0 <= cls < len(names) else str(cls)


def _place(names: Sequence[str], name: str) -> int:
    return list(names).index(name) if name in names else -1
