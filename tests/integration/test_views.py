"""A view is a pure function of (seed, kind, number, index), whoever asks for it, when, and in which order."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from small_inputs import small_data
from torch.utils.data import DataLoader

from cache_kd.errors import AlarmError, MismatchError
from cache_kd.structures import View, ViewSample
from cache_kd.student.loader import ViewLoader, ViewSampler
from cache_kd.student.schedule import ViewSchedule
from cache_kd.ultralytics_bridge.data import load_data
from cache_kd.ultralytics_bridge.dataset import ViewDataset
from cache_kd.ultralytics_bridge.settings import default_settings
from cache_kd.ultralytics_bridge.training_data import TrainingDataset
from cache_kd.views.recipe import MIXING, Recipe

IMAGES, IMGSZ = 16, 96
OUTLINES = 4  # polygons an image: warping them is most of an item's time
EVERYTHING: dict[str, Any] = {
    "mosaic": 0.7,
    "mixup": 0.5,
    "cutmix": 0.3,
    "copy_paste": 0.6,
    "copy_paste_mode": "mixup",
    "degrees": 10.0,
    "translate": 0.1,
    "scale": 0.5,
    "shear": 5.0,
    "perspective": 0.0005,
    "hsv_h": 0.02,
    "hsv_s": 0.7,
    "hsv_v": 0.4,
    "flipud": 0.4,
    "fliplr": 0.5,
    "bgr": 0.3,
}
VIEWS = (View("mixed", 0), View("mixed", 1), View("plain", 0))
KEYS = [(view, index) for view in VIEWS for index in range(IMAGES)]


def make_recipe(**overrides: Any) -> Recipe:
    return Recipe.from_settings({**default_settings(), **EVERYTHING, **overrides})


def make_dataset(data_file: Path, *, seed: int = 7, **overrides: Any) -> ViewDataset:
    return ViewDataset(load_data(data_file), recipe=make_recipe(**overrides), imgsz=IMGSZ, seed=seed)


def digest(sample: ViewSample) -> str:
    """Return one hash over pixels and labels, shapes and types included."""
    found = hashlib.sha1()
    for array in (sample.pixels, sample.cls, sample.boxes):
        found.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def first(samples: list[ViewSample]) -> list[ViewSample]:
    return samples


@pytest.fixture(scope="module")
def data_file(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(test_data / "data" / "bccd", tmp_path_factory.mktemp("bccd"), train=IMAGES, polygons=OUTLINES)


@pytest.fixture(scope="module")
def reference(data_file: Path) -> dict[tuple[View, int], str]:
    """The hash of every item, asked for one after the other in this process."""
    dataset = make_dataset(data_file)
    return {key: digest(dataset[key]) for key in KEYS}


def orders() -> dict[str, list[tuple[View, int]]]:
    shuffled = random.Random(1).sample(KEYS, len(KEYS))
    return {"sequential": KEYS, "shuffled": shuffled, "mid-start": shuffled[19:]}


@pytest.mark.parametrize("order", orders())
@pytest.mark.parametrize("batch", [3, 8])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_items_do_not_depend_on_how_they_are_asked_for(
    data_file: Path, reference: dict[tuple[View, int], str], workers: int, batch: int, order: str
) -> None:
    keys = orders()[order]
    batches = [keys[start : start + batch] for start in range(0, len(keys), batch)]
    loader: DataLoader[Any] = DataLoader(
        make_dataset(data_file), batch_sampler=batches, num_workers=workers, collate_fn=first
    )
    found = [digest(sample) for samples in loader for sample in samples]
    assert len(found) == len(keys)
    differing = [key for key, value in zip(keys, found, strict=True) if value != reference[key]]
    assert differing == []


def test_every_item_is_another_one(reference: dict[tuple[View, int], str]) -> None:
    assert len(set(reference.values())) == len(KEYS)


FRESH_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_views
dataset = test_views.make_dataset(Path(sys.argv[2]))
keys = test_views.orders()["shuffled"]
print(json.dumps([hash("salt"), [test_views.digest(dataset[key]) for key in keys]]))
"""


def test_items_do_not_depend_on_the_process(data_file: Path, reference: dict[tuple[View, int], str]) -> None:
    salt = "4242" if os.environ.get("PYTHONHASHSEED") != "4242" else "1"
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(Path(__file__).parent), str(data_file)],
        env={**os.environ, "PYTHONHASHSEED": salt},
        capture_output=True,
        text=True,
        check=True,
    )
    salted, found = json.loads(done.stdout.splitlines()[-1])
    assert salted != hash("salt"), "both processes salt their hashes alike"
    assert found == [reference[key] for key in orders()["shuffled"]]


def test_the_same_item_twice_in_a_row(data_file: Path, reference: dict[tuple[View, int], str]) -> None:
    dataset = make_dataset(data_file)
    for key in KEYS[::6]:
        assert [digest(dataset[key]) for _ in range(3)] == [reference[key]] * 3


def test_what_a_caller_does_to_an_item_stays_with_the_caller(
    data_file: Path, reference: dict[tuple[View, int], str]
) -> None:
    dataset = make_dataset(data_file)
    for key in KEYS[::6]:
        sample = dataset[key]
        sample.pixels[:] = 0
        sample.boxes[:] = 0
        dataset.load_image(key[1])[0][:] = 0  # colour augmentation writes into what it is given
        assert digest(dataset[key]) == reference[key]


def test_seed_view_number_and_index_each_choose_another_item(data_file: Path) -> None:
    one, other = make_dataset(data_file, seed=7), make_dataset(data_file, seed=8)
    base = digest(one[View("mixed", 0), 3])
    others = [other[View("mixed", 0), 3], one[View("mixed", 1), 3], one[View("plain", 0), 3], one[View("mixed", 0), 4]]
    assert base not in [digest(sample) for sample in others]


@pytest.mark.parametrize("key", [key for key in EVERYTHING if key != "copy_paste_mode"])
def test_every_augmentation_is_at_work(data_file: Path, reference: dict[tuple[View, int], str], key: str) -> None:
    """Without this the tests above could pass with an augmentation that never ran."""
    dataset = make_dataset(data_file, **{key: 0.0})
    changed = dict.fromkeys(("mixed", "plain"), 0)
    for view, index in KEYS[::2]:
        changed[view.kind] += digest(dataset[view, index]) != reference[view, index]
    assert changed["mixed"] > 0
    assert (changed["plain"] == 0) == (key in MIXING), "plain views are the same pipeline without mixing of images"


def streams() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def same_streams(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    numpy_same = all(np.array_equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    return one[0] == other[0] and numpy_same and torch.equal(one[2], other[2])


def test_the_callers_random_streams_are_neither_used_nor_moved(
    data_file: Path, reference: dict[tuple[View, int], str]
) -> None:
    dataset = make_dataset(data_file)
    for number, key in enumerate(KEYS[::6]):
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        before = streams()
        assert digest(dataset[key]) == reference[key]
        assert same_streams(before, streams())


# -- other transforms with a random stream of their own -------------------------------------------------------------


class FakeCompose:
    """What Ultralytics sees of Albumentations from 1.4.21 on: a stream of its own, moved by every call."""

    def __init__(self, transforms: list[Any], **_settings: Any) -> None:
        self.seed: int | None = None
        self.stream = np.random.default_rng()

    def set_random_seed(self, seed: int) -> None:
        self.seed, self.stream = seed, np.random.default_rng(seed)

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": self.stream.integers(0, 256, image.shape, dtype=np.uint8)}


def fake_albumentations() -> types.ModuleType:
    module: Any = types.ModuleType("albumentations")
    module.__version__ = "2.0.8"
    module.Compose = FakeCompose
    module.BaseCompose = module.DualTransform = type("Unused", (), {})
    for name in (
        "Blur",
        "MedianBlur",
        "ToGray",
        "CLAHE",
        "RandomBrightnessContrast",
        "RandomGamma",
        "ImageCompression",
    ):
        setattr(module, name, lambda p, **_settings: types.SimpleNamespace(p=p))
    found: types.ModuleType = module
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_albumentations_own_stream_starts_anew_with_every_item(
    data_file: Path, monkeypatch: pytest.MonkeyPatch, workers: int, reference: dict[tuple[View, int], str]
) -> None:
    monkeypatch.setitem(sys.modules, "albumentations", fake_albumentations())
    dataset = make_dataset(data_file)
    expected = {key: digest(dataset[key]) for key in KEYS[::4]}
    assert all(expected[key] != reference[key] for key in expected), "the fake transform did not run"
    # three times in a row: a shuffled pass alone does not show a stream that was not started anew
    keys = [key for key in random.Random(2).sample(sorted(expected), len(expected)) for _ in range(3)]
    loader: DataLoader[Any] = DataLoader(
        make_dataset(data_file), batch_sampler=[[key] for key in keys], num_workers=workers, collate_fn=first
    )
    assert [digest(samples[0]) for samples in loader] == [expected[key] for key in keys]


# -- files beside the images ----------------------------------------------------------------------------------------


class Poison:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_arrays_and_label_caches_beside_the_images_are_never_read(
    test_data: Path, tmp_path: Path, reference: dict[tuple[View, int], str]
) -> None:
    data_file = small_data(test_data / "data" / "bccd", tmp_path / "set", train=IMAGES, polygons=OUTLINES)
    for image in (tmp_path / "set" / "images" / "train").glob("*.jpg"):
        np.save(image.with_suffix(".npy"), np.zeros_like(cv2.imread(str(image))))
    mark = tmp_path / "poisoned"
    poison = np.array({"labels": Poison(mark)}, dtype=object)
    cache_file = tmp_path / "set" / "labels" / "train.cache"
    with cache_file.open("wb") as file:
        np.save(file, poison)
    content = cache_file.read_bytes()
    before = sorted(tmp_path.rglob("*"))
    dataset = make_dataset(data_file)
    assert {key: digest(dataset[key]) for key in KEYS} == reference
    assert not mark.exists(), "the foreign pickle ran"
    assert cache_file.read_bytes() == content and sorted(tmp_path.rglob("*")) == before
    with pytest.raises(TypeError, match="NoneType"):
        dict(pickle.loads(pickle.dumps(Poison(mark))))
    assert mark.exists(), "the poison would have shown"


# -- which view an epoch gets ---------------------------------------------------------------------------------------


def names(schedule: ViewSchedule) -> str:
    """Return the views of a run as m0 m1 … p0 …."""
    return " ".join(f"{view.kind[0]}{view.number}" for view in map(schedule.view, range(schedule.epochs)))


@pytest.mark.parametrize(
    ("mixed", "plain", "epochs", "close", "expected"),
    [
        (3, 2, 10, 4, "m0 m1 m2 m0 m1 m2 p0 p1 p0 p1"),
        (8, 1, 5, 2, "m0 m1 m2 p0 p0"),
        (2, 0, 5, 3, "m0 m1 m0 m1 m0"),
        (2, 1, 3, 10, "p0 p0 p0"),
        (2, 2, 2, 3, "p0 p1"),
        (0, 2, 5, 2, "p1 p0 p1 p0 p1"),
        (2, 2, 4, 0, "m0 m1 m0 m1"),
    ],
)
def test_epoch_to_view(mixed: int, plain: int, epochs: int, close: int, expected: str) -> None:
    assert names(ViewSchedule(mixed, plain, epochs, close)) == expected


@pytest.mark.parametrize("epochs", [1, 3, 10])
@pytest.mark.parametrize("close", [0, 1, 3, 12])
def test_the_last_epochs_are_plain_by_the_stock_rule(epochs: int, close: int) -> None:
    schedule = ViewSchedule(4, 3, epochs, close)
    for epoch in range(epochs):
        closed = bool(close) and epoch >= epochs - close
        assert (schedule.view(epoch).kind == "plain") == closed


def test_a_cache_without_views_has_no_schedule() -> None:
    with pytest.raises(MismatchError, match="holds no views; extract some"):
        ViewSchedule.for_cache([], epochs=3, close=1)


# -- the student's loader -------------------------------------------------------------------------------------------

SCHEDULE = ViewSchedule(mixed=2, plain=1, epochs=5, close=2)


def training_loader(data_file: Path, workers: int, loader: type[DataLoader[Any]] = ViewLoader) -> DataLoader[Any]:
    dataset = TrainingDataset(load_data(data_file), targets=None, recipe=make_recipe(), imgsz=IMGSZ, seed=7)
    return loader(
        dataset,
        batch_size=5,
        sampler=ViewSampler(len(dataset), SCHEDULE, seed=3),
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=dataset.collate_fn,
    )


def train_digests(batch: dict[str, Any]) -> list[str]:
    return [hashlib.sha1(image.numpy().tobytes()).hexdigest() for image in batch["img"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_batch_of_another_epoch_is_ever_served(data_file: Path, workers: int) -> None:
    loader = training_loader(data_file, workers)
    plain = make_dataset(data_file)
    pixels: dict[View, set[str]] = {}
    for view in VIEWS:
        samples = [plain[view, index].pixels for index in range(IMAGES)]
        pixels[view] = {hashlib.sha1(sample.tobytes()).hexdigest() for sample in samples}
    for epoch in (0, 1, 1, 2, 3, 4):  # epoch 1 comes again, as after a recovery from NaN
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # a ViewSampler
        iter(loader)  # the trainer makes two iterators an epoch and uses the second
        found: list[str] = []
        for number, batch in enumerate(loader):
            assert (batch["kd_epoch"], batch["kd_view"]) == (epoch, SCHEDULE.view(epoch))
            found += train_digests(batch)
            if epoch == 2 and number == 1:
                break
        expected = pixels[SCHEDULE.view(epoch)]
        assert set(found) <= expected
        assert epoch == 2 or (len(found) == IMAGES and set(found) == expected)
    loader.close()  # type: ignore[attr-defined]  # a ViewLoader


class LateSampler(ViewSampler):
    """Serves the epoch before the one that was asked for, as a prefetching sampler does."""

    def __iter__(self) -> Any:
        for epoch, view, index in super().__iter__():
            yield epoch - 1, view, index


def test_a_stale_batch_is_refused(data_file: Path) -> None:
    loader = training_loader(data_file, 0)
    sampler = LateSampler(IMAGES, SCHEDULE)
    late = ViewLoader(loader.dataset, batch_size=5, sampler=sampler, collate_fn=loader.collate_fn)
    sampler.set_epoch(2)
    with pytest.raises(AlarmError, match="stale batch: it holds epoch 1, the trainer is in epoch 2"):
        next(iter(late))


@pytest.mark.parametrize("world", [1, 2, 5])
def test_ranks_share_one_order_and_cover_every_image(world: int) -> None:
    samplers = [ViewSampler(IMAGES, SCHEDULE, seed=3, rank=rank, world=world) for rank in range(world)]
    orders_seen = set()
    for epoch in range(3):
        parts: list[Iterable[tuple[int, View, int]]] = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            parts.append(list(sampler))
        assert len({len(list(part)) for part in parts}) == 1
        assert {index for part in parts for _, _, index in part} == set(range(IMAGES))
        orders_seen.add(tuple(index for _, _, index in parts[0]))
    assert len(orders_seen) == 3, "another order every epoch"
