"""A packed cache holds what it is trained on: the pixels that the teacher saw and their labels; no image is needed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from small_inputs import extraction_threads
from student_runs import ENDED, Interrupt, Run, differing, interrupt_at, resume, train_student

from cache_kd.cache.manifest import read_root
from cache_kd.cli import main
from cache_kd.config import read_yaml
from cache_kd.errors import DamagedCacheError, MismatchError
from cache_kd.pipeline import preparation, verification
from cache_kd.pipeline.extraction import ExtractSettings, extract
from cache_kd.pipeline.inspection import describe, lines
from cache_kd.pipeline.opened import Cache
from cache_kd.pipeline.verification import verify
from cache_kd.structures import View
from cache_kd.ultralytics_bridge.packed import PackedImages, PackedViews
from cache_kd.ultralytics_bridge.teacher import Teacher
from cache_kd.views import packing
from cache_kd.views.packing import PngPixels, encode_labels
from cache_kd.views.seeding import pixel_hash

VIEWS = (View("mixed", 0), View("mixed", 1), View("plain", 0))


def pack(teacher: Path, data: Path, cache: Path, spec: str, *, views: int = 2, workers: int = 0) -> Path:
    """Extract a packed cache like `few_cache`, which keeps no pixels."""
    settings = ExtractSettings(
        teacher, data, cache, views=views, plain_views=1, imgsz=64, batch=4, workers=workers, pack=spec
    )
    return extract(settings).path


@pytest.fixture(scope="module")
def moved(few_images: Path, bccd_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cache packed as JPEG and a data file as on another machine: validation images only, other folders."""
    there, here = tmp_path_factory.mktemp("there"), tmp_path_factory.mktemp("here")
    shutil.copytree(few_images.parent, there / "set", ignore=shutil.ignore_patterns("*.cache"))
    pack(bccd_teacher, there / "set" / few_images.name, there / "cache", "jpeg")
    shutil.move(there / "cache", here / "cache")
    for kind in ("images", "labels"):
        shutil.move(there / "set" / kind / "val", here / kind / "val")
    shutil.move(there / "set" / few_images.name, here / "other.yaml")
    shutil.rmtree(there)
    return here / "cache", here / "other.yaml"


@pytest.fixture(scope="module")
def png_cache(few_images: Path, bccd_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(bccd_teacher, few_images, tmp_path_factory.mktemp("png") / "cache", "png")


@pytest.fixture(scope="module")
def jpeg_run(moved: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs from the moved cache."""
    cache, data = moved
    return train_student(cache, tmp_path_factory.mktemp("runs"), "cwd", "ld", data=data)


def test_training_needs_no_training_images(jpeg_run: Run) -> None:
    assert [view.name for _, view in jpeg_run.shown] == ["mixed-0000"] * 3 + ["plain-0000"] * 3
    assert jpeg_run.trainer.train_loader.proven == (24, 24)
    record = read_yaml(jpeg_run.folder / "cache_kd.yaml")
    assert (record["pack"], record["decoder_difference"]) == ("jpeg:95", 0)


@pytest.mark.slow
def test_the_stock_pictures_are_drawn(moved: tuple[Path, Path], tmp_path: Path) -> None:
    cache, data = moved
    run = train_student(cache, tmp_path, "cwd", data=data, epochs=1, plots=True, val=True)
    assert {"labels.jpg", "train_batch0.jpg", "val_batch0_pred.jpg"} <= {file.name for file in run.folder.glob("*.jpg")}


def test_workers_give_the_same(jpeg_run: Run, moved: tuple[Path, Path], tmp_path: Path) -> None:
    cache, data = moved
    run = train_student(cache, tmp_path, "cwd", "ld", data=data, workers=2)
    assert differing(run.student, jpeg_run.student) == []
    assert differing(run.adapters, jpeg_run.adapters) == []


@pytest.mark.slow
def test_an_interrupted_run_goes_on(jpeg_run: Run, moved: tuple[Path, Path], tmp_path: Path) -> None:
    cache, data = moved
    with pytest.raises(Interrupt, match=ENDED):
        train_student(cache, tmp_path, "cwd", "ld", data=data, before_batch=interrupt_at(1, 1))
    run = resume(next(tmp_path.glob("*")), data=data)
    assert run.shown == jpeg_run.shown[3:]


def test_png_training_equals_replay(png_cache: Path, few_cache: Path, tmp_path: Path) -> None:
    packed, replay = (
        train_student(cache, tmp_path / name, "cwd", "ld") for cache, name in ((png_cache, "p"), (few_cache, "r"))
    )
    assert differing(packed.student, replay.student) == []
    assert differing(packed.adapters, replay.adapters) == []


def test_png_items_are_those_of_replay(png_cache: Path, few_cache: Path) -> None:
    packed, replay = Cache(png_cache), Cache(few_cache)
    for view in VIEWS:
        for index in range(len(packed.reader)):
            mine, theirs = packed.dataset.item(view, index), replay.dataset.item(view, index)
            assert set(theirs) - set(mine) == {"ratio_pad"} and set(mine) <= set(theirs)
            assert Path(theirs["im_file"]).name == mine["im_file"]
            assert (mine["ori_shape"], mine["resized_shape"]) == (theirs["ori_shape"], theirs["resized_shape"])
            for name in ("img", "cls", "bboxes", "batch_idx"):
                assert mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]), name
    for mine, theirs in zip(packed.dataset.labels, replay.dataset.labels, strict=True):
        assert mine["shape"] == theirs["shape"]
        for name in ("cls", "bboxes"):
            assert mine[name].dtype == theirs[name].dtype and np.array_equal(mine[name], theirs[name])


def test_png_targets_are_those_of_replay(png_cache: Path, few_cache: Path) -> None:
    packed, replay = Cache(png_cache).reader, Cache(few_cache).reader
    names = [column.name for column in replay.manifest.columns]
    for view in VIEWS:
        rows = [reader.read(view, 5, names) for reader in (packed, replay)]
        assert all(np.array_equal(rows[0][name], rows[1][name]) for name in names)


def test_targets_belong_to_the_decoded_pixels(
    moved: tuple[Path, Path], few_cache: Path, bccd_checkpoint: Any, bccd_teacher: Path
) -> None:
    cache, source = Cache(moved[0]), Cache(few_cache)
    row = cache.reader.read(View("mixed", 1), 3, ("pixels", "pixel_hash"))
    decoded = np.ascontiguousarray(cv2.imdecode(row["pixels"], cv2.IMREAD_COLOR)[..., ::-1].transpose(2, 0, 1))
    pixels = cache.pixels(1, 3)
    assert np.array_equal(pixels, decoded) and pixel_hash(decoded) == row["pixel_hash"].tobytes()
    before = source.pixels(1, 3)
    assert 0 < np.abs(pixels.astype(int) - before).mean() < 4  # JPEG of what replay shows, and not that itself
    found = verify(moved[0], pixels=True, teacher=bccd_teacher, sample=36, say=print)
    assert found.ok and (found.pixels_checked, found.targets_checked) == (36, 36)
    assert found.worst <= 1 and (found.decoder_difference, found.room) == (0, 0)
    assert "pixels: 36 packed views decoded, 0 differ" in found.lines()
    # The same bound tells the decoded pixels from those before the encoder.
    with extraction_threads():
        teacher = Teacher(bccd_checkpoint, imgsz=64, device="cpu", precision="fp32", store=("features", "logits"))
        said = teacher([source.dataset.sample(View("mixed", 1), 3)], batch=4)[0]
    off = np.abs(cache.read(1, 3).features[0] - said.features[0]).max()
    columns = cache.reader.read(View("mixed", 1), 3, [column.name for column in cache.codec.columns])
    step = cache.codec.feature_step({name: torch.from_numpy(np.array(value))[None] for name, value in columns.items()})
    assert off > float(step[0].max())


def test_no_losses_train_plainly_on_the_packed_views(moved: tuple[Path, Path], tmp_path: Path) -> None:
    cache, data = moved
    seen: list[np.ndarray] = []
    run = train_student(
        cache,
        tmp_path,
        "none",
        data=data,
        epochs=1,
        close_mosaic=0,
        before_batch=lambda trainer, batch: seen.extend((batch["img"] * 255).round().byte().numpy()),
    )
    assert {view.name for _, view in run.shown} == {"mixed-0000"}
    stored = {Cache(cache).pixels(0, index).tobytes() for index in range(12)}
    assert {pixels.tobytes() for pixels in seen} == stored


@pytest.mark.slow
def test_topping_up_gives_the_same_cache(
    few_images: Path, moved: tuple[Path, Path], bccd_teacher: Path, tmp_path: Path
) -> None:
    cache = pack(bccd_teacher, few_images, tmp_path / "cache", "jpeg:95", views=1)
    stamps = {file: file.stat().st_mtime_ns for file in cache.glob("views/mixed-0000/**/*") if file.is_file()}
    pack(bccd_teacher, few_images, tmp_path / "cache", "jpeg:95", workers=2)
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    assert Cache(cache).manifest.digest == Cache(moved[0]).manifest.digest


def test_a_flipped_bit_is_reported(moved: tuple[Path, Path], tmp_path: Path) -> None:
    cache = Path(shutil.copytree(moved[0], tmp_path / "cache"))
    shard = cache / "views" / "plain-0000" / "pixels" / "c" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 4
    shard.write_bytes(content)
    with pytest.raises(DamagedCacheError, match=r"plain-0000/pixels/c/0/0: crc32c does not match \(view plain-0000"):
        train_student(cache, tmp_path / "runs", "none", data=moved[1], epochs=1)
    found = verify(cache, say=lambda line: None)
    assert [fault.file for fault in found.report.faults] == ["views/plain-0000/pixels/c/0/0"]


def other_decoder(monkeypatch: pytest.MonkeyPatch, levels: int, *, spare: bytes = b"") -> None:
    """Have OpenCV decode some pixels of packed views so many levels off, but those whose bytes are `spare`."""
    stock = cv2.imdecode

    def decode(row: np.ndarray, flags: int) -> np.ndarray:
        image = stock(row, flags)
        if row.tobytes() != spare:
            image[::3] = np.where(image[::3] > 128, image[::3] - levels, image[::3] + levels)
        return image

    monkeypatch.setattr(packing.cv2, "imdecode", decode)


def test_a_decoder_two_levels_off_is_warned_of_and_recorded(
    moved: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache, data = moved
    other_decoder(monkeypatch, 2)
    says = "decodes the packed pixels (jpeg:95, by JPEG library"
    with caplog.at_level(logging.WARNING):
        run = train_student(cache, tmp_path, "cwd", data=data, epochs=1)
    assert says in caplog.text and "up to 2 of 255 levels off" in caplog.text
    assert read_yaml(run.folder / "cache_kd.yaml")["decoder_difference"] == 2
    assert run.trainer.train_loader.proven == (0, 12)
    caplog.clear()
    found = verify(cache, pixels=True, say=print)
    assert found.ok and says in caplog.text


def test_targets_from_a_decoder_two_levels_off_are_no_faults(
    moved: tuple[Path, Path], bccd_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is shown other pixels than it saw: what those may change is measured, allowed for and told."""
    other_decoder(monkeypatch, 2)
    found = verify(moved[0], teacher=bccd_teacher, pixels=True, sample=12, say=print)
    assert found.ok and 0 < found.worst <= 1 and 0 < found.room < 1
    facts = found.to_json()
    assert (facts["packed"], facts["decoder_difference"], facts["room_for_decoder"]) == (True, 2, found.room)
    assert found.lines()[1:] == [
        "pixels: 36 packed views decoded, their hashes not compared: this machine decodes them up to 2 of 255 levels "
        "off",
        f"targets: 12 views through the teacher, 0 out of bounds, largest error {found.worst:.2f} of the declared "
        "bound and of what pixels that are as far off may change (tried with the teacher: at most "
        f"{100 * found.room:.2g} % of a target's largest value)",
    ]
    monkeypatch.setattr(verification, "pixel_room", lambda *args, **named: [{}] * named["batch"])
    strict = verify(moved[0], teacher=bccd_teacher, sample=12, say=print)
    assert strict.worst > 1, "without room these pixels are faults"


def test_other_targets_are_faults_whatever_the_decoder(
    moved: tuple[Path, Path], bccd_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_decoder(monkeypatch, 2)
    stock = verification.Teacher.__call__
    turned = lambda self, views, *, batch: stock(self, views[::-1], batch=batch)  # noqa: E731
    monkeypatch.setattr(verification.Teacher, "__call__", turned)
    found = verify(moved[0], teacher=bccd_teacher, sample=12, say=print)
    named = {fault.split(":")[0] for fault in found.target_faults}
    assert not found.ok and len(named) == 12


def test_a_decoder_further_off_is_refused(
    moved: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_decoder(monkeypatch, 3)
    says = r"up to 3 of 255 levels off; allowed: 2; install the extraction's: pip install opencv-python=="
    with pytest.raises(MismatchError, match=says):
        train_student(moved[0], tmp_path, "cwd", data=moved[1], epochs=1)
    with pytest.raises(MismatchError, match=says):
        verify(moved[0], pixels=True, say=print)


@pytest.mark.parametrize("workers", [0, 2])
def test_other_pixels_from_a_sound_decoder_are_refused(
    moved: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    cache, data = moved
    other_decoder(monkeypatch, 1, spare=Cache(cache).reader.read_teacher("packed.probe").tobytes())
    with pytest.raises(MismatchError, match=r"view plain-0000 of item \d+ \(\w+.jpg\) has other pixels"):
        train_student(cache, tmp_path, "cwd", data=data, epochs=1, workers=workers)
    if not workers:
        assert len(verify(cache, pixels=True, say=print).pixel_faults) == 35  # the probe is one of the 36


def test_labels_of_other_classes_are_refused(moved: tuple[Path, Path], tmp_path: Path) -> None:
    cache, data = moved
    content = yaml.safe_load(data.read_text())
    names = list(content["names"].values() if isinstance(content["names"], dict) else content["names"])
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**content, "path": str(data.parent), "names": names[::-1]}))
    with pytest.raises(
        MismatchError, match=r"`names:` are Platelets; WBC; RBC; the labels .* with RBC; WBC; Platelets"
    ):
        train_student(cache, tmp_path / "runs", "cwd", data=other, epochs=1)


@pytest.mark.usefixtures("loaded_once")
def test_packing_is_part_of_the_identity(few_images: Path, png_cache: Path, bccd_teacher: Path, tmp_path: Path) -> None:
    for spec in ("none", "jpeg:90"):
        says = rf"codec.pack.spec: \"png\" there, \"{spec}\" wanted.*--pack png"
        with pytest.raises(MismatchError, match=says):
            pack(bccd_teacher, few_images, png_cache, spec)
    settings = [ExtractSettings(bccd_teacher, few_images, imgsz=64, pack=spec) for spec in ("jpeg", "jpeg:95", "png")]
    identities = []
    for number, one in enumerate(settings):
        job = preparation.prepare(ExtractSettings(**{**vars(one), "cache": tmp_path / str(number)}), print)
        job.writer.close()
        identities.append(read_root(job.path)["identity"])
    assert identities[0] == identities[1] != identities[2]


def test_what_is_packed_is_told(moved: tuple[Path, Path]) -> None:
    facts = describe(moved[0])
    assert {"pixels", "pixels_length", "labels", "labels_length"} <= set(facts["bytes_by_column"])
    assert any("packed as jpeg:95 (JPEG library" in line for line in lines(facts))
    assert "--pack jpeg:95" in _again(Cache(moved[0]))


def _again(cache: Cache) -> str:
    from cache_kd.pipeline.opened import extract_command

    return extract_command(cache.manifest)


@pytest.mark.parametrize("spec", ["jpg", "jpeg:0", "jpeg:101", "jpeg:", "webp", ""])
def test_a_bad_packing_gets_one_line(spec: str) -> None:
    done = CliRunner().invoke(main, ["extract", "--teacher", "none.pt", "--pack", spec])
    assert done.exit_code == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "--pack" in done.stderr
    assert done.stderr.endswith("; allowed: none, jpeg, jpeg:QUALITY from 1 to 100, png\n")


class OneRow:
    """Stands for a reader whose every view is the same image without labels."""

    pixels = np.arange(3 * 32 * 32, dtype=np.uint32).astype(np.uint8).reshape(3, 32, 32)

    def read(self, view: View, index: int, columns: tuple[str, ...]) -> Mapping[str, np.ndarray]:
        labels = encode_labels(np.zeros((0, 1), np.float32), np.zeros((0, 4), np.float32))
        return {"pixels": PngPixels().encode(self.pixels), "labels": labels}


def test_a_view_without_labels_is_the_stock_item_of_one() -> None:
    images = PackedImages(["a.jpg"], np.array([[48, 64]]), np.array([0]), np.zeros((1, 5), np.float32))
    views = PackedViews(OneRow(), PngPixels(), 32, images)  # type: ignore[arg-type]  # Mapping does for dict
    item = views.item(VIEWS[0], 0)
    assert (item["cls"].shape, item["bboxes"].shape, item["batch_idx"].shape) == ((0, 1), (0, 4), (0,))
    assert item["cls"].dtype == item["bboxes"].dtype == torch.float32
    assert item["ori_shape"] == (48, 64)
    assert len(views.labels[0]["cls"]) == 0
    batch = views.collate_fn([item, views.item(VIEWS[0], 0)])
    assert batch["img"].shape == (2, 3, 32, 32) and batch["bboxes"].shape == (0, 4)
    assert np.array_equal(views.sample(VIEWS[0], 0).pixels, OneRow.pixels)
