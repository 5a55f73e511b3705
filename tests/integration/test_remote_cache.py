"""A cache in a bucket is the one in a folder: made, read and trained from, whatever happens to the server meanwhile."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from object_servers import BUCKET, ObjectServer
from small_inputs import build_model, save_model, small_data
from student_runs import train_student

import cache_kd.teacher.extract as loop
from cache_kd.cache import layout
from cache_kd.cache.reader import CacheReader
from cache_kd.cache.store import Url
from cache_kd.cli import main
from cache_kd.config import read_yaml
from cache_kd.errors import CacheKDError, DamagedCacheError, MismatchError, SettingError
from cache_kd.pipeline import preparation
from cache_kd.pipeline.extraction import Extracted, ExtractSettings, extract
from cache_kd.structures import View
from cache_kd.student.loader import ViewSampler
from cache_kd.student.order import ShuffleWindow, epoch_order, shard_groups
from cache_kd.student.schedule import ViewSchedule

IMAGES, SHARD = 12, 4
VIEWS, SHARDS = 3, 3
LOSSES = ("cwd", "ld")


@pytest.fixture(scope="module", params=["moto", pytest.param("localbucket", marks=pytest.mark.slow)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    running = ObjectServer(request.param, tmp_path_factory.mktemp("objects"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def module_patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", autouse=True)
def reached(server: ObjectServer, module_patch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The environment in which the server is reached; several shards a view, one thread."""
    for name, value in {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "CACHE_KD_RETRY_SECONDS": "30",
        "CACHE_KD_FETCH_FOLDER": str(tmp_path_factory.mktemp("fetched")),
    }.items():
        module_patch.setenv(name, value)
    module_patch.setattr(layout, "MAX_SAMPLES", SHARD)
    module_patch.setattr(preparation, "cpu_threads", lambda: 1)


@pytest.fixture(scope="module")
def data_file(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(test_data / "data" / "bccd", tmp_path_factory.mktemp("set"), train=IMAGES)


def run(teacher: Path, data: Path, place: Path | Url) -> Extracted:
    settings: dict[str, Any] = {"imgsz": 64, "batch": 2, "device": "cpu", "workers": 0}
    return extract(ExtractSettings(teacher, data=data, cache=place, views=2, plain_views=1, **settings))


@pytest.fixture(scope="module")
def local(teacher: Path, data_file: Path, reached: None, tmp_path_factory: pytest.TempPathFactory) -> Extracted:
    return run(teacher, data_file, tmp_path_factory.mktemp("local") / "cache")


@pytest.fixture(scope="module")
def remote(teacher: Path, data_file: Path, reached: None) -> Extracted:
    return run(teacher, data_file, Url(f"s3://{BUCKET}/caches/one"))


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of local copies."""
    monkeypatch.setenv("CACHE_KD_FETCH_FOLDER", str(tmp_path / "fetched"))
    return tmp_path / "fetched"


def shards_asked(server: ObjectServer, since: int) -> list[str]:
    """Return the paths of the shard objects that were asked for since then."""
    return [
        path for method, path in server.wire.requests[since:] if method == "GET" and "/c/" in path and "views" in path
    ]


def learnt(cache: Any, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    return train_student(cache, folder, *LOSSES, **settings).student


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_bucket_holds_what_the_folder_does(local: Extracted, remote: Extracted, fetched: Path) -> None:
    assert remote.manifest.digest == local.manifest.digest
    here, there = CacheReader(local.path), CacheReader(remote.path)
    for view in here.manifest.views:
        for name in here.layouts:
            for index in range(IMAGES):
                np.testing.assert_array_equal(here.read_row(view, name, index), there.read_row(view, name, index))


def test_commands_say_the_same_of_both(local: Extracted, remote: Extracted, fetched: Path) -> None:
    for words in (["inspect", "--json"], ["verify", "--json"]):
        said = []
        for made in (local, remote):
            done = CliRunner().invoke(main, [words[0], str(made.path), *words[1:]])
            assert done.exit_code == 0, done.output
            answer = json.loads(done.stdout)
            said.append({key: value for key, value in answer.items() if key not in ("path", "costs", "environment")})
        assert said[0] == said[1]
    listed = CliRunner().invoke(main, ["list", f"s3://{BUCKET}/caches"])
    assert "one" in listed.output and "complete" in listed.output


def test_the_newest_cache_of_a_bucket_is_found(remote: Extracted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_KD_CACHE", f"s3://{BUCKET}/caches")
    from cache_kd.pipeline.locations import newest_cache

    assert newest_cache()[0] == remote.path


@pytest.mark.slow
def test_an_extraction_goes_on_when_the_connection_is_back(
    teacher: Path, data_file: Path, local: Extracted, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _disturb(loop, "encode_views", monkeypatch, at=4, act=server.wire.cut, later=(1.5, server.wire.mend))
    made = run(teacher, data_file, Url(f"s3://{BUCKET}/caches/cut"))
    assert made.manifest.digest == local.manifest.digest


@pytest.mark.slow
@pytest.mark.parametrize("server", ["localbucket"], indirect=True)  # moto forgets its objects
def test_an_extraction_goes_on_with_a_new_server(
    teacher: Path, data_file: Path, local: Extracted, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _disturb(loop, "encode_views", monkeypatch, at=4, act=server.stop, later=(1.0, server.start))
    made = run(teacher, data_file, Url(f"s3://{BUCKET}/caches/killed"))
    assert made.manifest.digest == local.manifest.digest


@pytest.mark.slow
def test_an_extraction_that_gives_up_is_gone_on_with(
    teacher: Path, data_file: Path, local: Extracted, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Url(f"s3://{BUCKET}/caches/late")
    with monkeypatch.context() as patch:
        patch.setenv("CACHE_KD_RETRY_SECONDS", "1")
        _disturb(loop, "encode_views", patch, at=4, act=server.wire.cut)
        with pytest.raises(
            CacheKDError, match=r"the object store cannot be used, after trying for 1 s .* it goes on where"
        ):
            run(teacher, data_file, place)
    server.wire.mend()
    made = run(teacher, data_file, place)
    assert made.manifest.digest == local.manifest.digest
    assert made.items < IMAGES * VIEWS


def _disturb(
    owner: Any,
    name: str,
    patch: pytest.MonkeyPatch,
    *,
    at: int,
    act: Any,
    later: tuple[float, Any] | None = None,
) -> None:
    """Have the call number `at` of `owner.name` act first, and have something done so many seconds later."""
    calls, inner = [0], getattr(owner, name)

    def disturbed(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            act()
            if later is not None:
                threading.Timer(*later).start()
        return inner(*arguments, **options)

    patch.setattr(owner, name, disturbed)


@pytest.mark.slow
def test_two_extractions_at_once_record_each_unit_once(
    teacher: Path, data_file: Path, local: Extracted, server: ObjectServer
) -> None:
    place = Url(f"s3://{BUCKET}/caches/two")
    made: list[Extracted] = []
    threads = [threading.Thread(target=lambda: made.append(run(teacher, data_file, place))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done.manifest.digest for done in made] == [local.manifest.digest] * 2
    records = [name for name, _ in CacheReader(place).store.files("units")]
    assert len(records) == VIEWS * SHARDS
    assert CliRunner().invoke(main, ["verify", str(place)]).exit_code == 0


def test_training_from_the_bucket_is_training_from_the_folder(
    local: Extracted, remote: Extracted, server: ObjectServer, data_file: Path, tmp_path: Path, fetched: Path
) -> None:
    here = learnt(local.path, tmp_path / "here", data=data_file)
    before = len(server.wire.requests)
    there = learnt(remote.path, tmp_path / "there", data=data_file, workers=2)
    assert equal(here, there)
    asked = shards_asked(server, before)
    assert len(asked) == len(set(asked)) > 0
    again = len(server.wire.requests)
    learnt(remote.path, tmp_path / "again", data=data_file)
    assert shards_asked(server, again) == []


def test_only_what_the_losses_need_is_fetched(
    remote: Extracted, server: ObjectServer, data_file: Path, tmp_path: Path, fetched: Path
) -> None:
    before = len(server.wire.requests)
    train_student(remote.path, tmp_path, "ld", data=data_file)
    columns = {path.split("/views/")[1].split("/")[1] for path in shards_asked(server, before)}
    assert "features" not in columns
    assert {"logits", "logits_length", "pixel_hash"} <= columns


def cut_at_a_shard(server: ObjectServer, number: int, *, mended_after: float | None) -> list[str]:
    """Have the wire cut in the middle of the request for the shard of this number; returns those asked for so far."""
    asked: list[str] = []

    def before(method: str, path: str) -> None:
        if method == "GET" and "/c/" in path and "views" in path:
            asked.append(path)
            if len(asked) == number:
                server.wire.cut()
                if mended_after is not None:
                    threading.Timer(mended_after, server.wire.mend).start()

    server.wire.before = before
    return asked


@pytest.fixture
def watched(server: ObjectServer) -> Iterator[None]:
    """Leave the wire as it was."""
    yield
    server.wire.before = lambda method, path: None


@pytest.mark.slow
@pytest.mark.usefixtures("watched", "fetched")
def test_training_goes_on_when_the_connection_is_back(
    local: Extracted, remote: Extracted, server: ObjectServer, data_file: Path, tmp_path: Path
) -> None:
    here = learnt(local.path, tmp_path / "here", data=data_file)
    asked = cut_at_a_shard(server, 3, mended_after=1.5)
    assert equal(here, learnt(remote.path, tmp_path / "there", data=data_file))
    assert len(asked) > len(set(asked)) > 3


@pytest.mark.usefixtures("watched", "fetched")
def test_training_ends_in_one_line_when_the_connection_stays_away(
    remote: Extracted, server: ObjectServer, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE_KD_RETRY_SECONDS", "1")
    cut_at_a_shard(server, 3, mended_after=None)
    try:
        with pytest.raises(CacheKDError, match=r"^s3://\S+: the object store cannot be used, after trying for 1 s"):
            train_student(remote.path, tmp_path, "ld", data=data_file, workers=1)
    finally:
        server.wire.mend()


@pytest.mark.parametrize("harm", ["changed", "torn", "missing"])
def test_training_refuses_a_shard_that_is_not_the_listed_one(
    remote: Extracted, data_file: Path, tmp_path: Path, fetched: Path, harm: str
) -> None:
    reader = CacheReader(remote.path)
    path, store = reader.layouts["logits"].shard_path(View("mixed", 0), 1), reader.store
    whole = store.read(path, 1 << 20)
    try:
        if harm == "missing":
            store.delete(path)
        else:
            store.write(path, whole[:-1] if harm == "torn" else whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(
            DamagedCacheError, match=rf"{path}: the object.*(missing|sha256|bytes, shards.json says).*verify"
        ):
            train_student(remote.path, tmp_path, "ld", data=data_file)
        done = CliRunner().invoke(main, ["verify", str(remote.path)])
        assert done.exit_code == 1 and path in done.output
    finally:
        store.write(path, whole)


def test_a_view_that_does_not_fit_is_shuffled_in_windows_alike_everywhere(
    local: Extracted, remote: Extracted, data_file: Path, tmp_path: Path, fetched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = CacheReader(remote.path)
    names = {"logits", "logits_length", "pixel_hash"}
    shard = max(
        sum(entry.bytes for path, entry in reader.files(view).items() if path.split("/")[2] in names)
        for view in reader.manifest.views
    )
    monkeypatch.setenv("CACHE_KD_FETCH_LIMIT", f"{int(shard * 0.95)}B")
    there = train_student(remote.path, tmp_path / "there", "ld", data=data_file)
    assert read_yaml(there.folder / "cache_kd.yaml")["shuffle_window"] == 1
    assert sum(path.stat().st_size for path in fetched.glob("??/*")) <= shard * 0.95
    monkeypatch.delenv("CACHE_KD_FETCH_LIMIT")
    from cache_kd.pipeline import training
    from cache_kd.pipeline.train_settings import TrainSettings

    settings = TrainSettings("yolov8n.yaml", cache=local.path, shuffle_window=1)
    plan = training.distill_plan(training.Cache(local.path, data=data_file), training.parse_losses(["ld"]), settings)
    assert plan.window == ShuffleWindow(SHARD, 1) == there.trainer.plan.window
    sampler = there.trainer.train_loader.sampler
    other = ViewSampler(IMAGES, sampler.schedule, seed=sampler.seed, window=plan.window)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        other.set_epoch(epoch)
        assert list(sampler) == list(other)


def test_a_limit_that_holds_no_window_is_refused(
    remote: Extracted, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE_KD_FETCH_LIMIT", "100B")
    with pytest.raises(SettingError, match=r"--fetch-limit 100 B is too little for 1 of 3 shards .* or more, for all"):
        train_student(remote.path, tmp_path, "ld", data=data_file)


def test_repair_of_a_bucket_says_what_to_do(remote: Extracted) -> None:
    done = CliRunner().invoke(main, ["verify", str(remote.path), "--repair"])
    assert done.exit_code == 1
    assert "--repair mends folders; delete the damaged objects and run the same `cache-kd extract` again" in done.output


@pytest.mark.slow
def test_a_shard_that_was_deleted_is_made_again(teacher: Path, data_file: Path) -> None:
    place = Url(f"s3://{BUCKET}/caches/again")
    made = run(teacher, data_file, place)
    reader = CacheReader(place)
    reader.store.delete(reader.layouts["logits"].shard_path(View("plain", 0), 2))
    again = run(teacher, data_file, place)
    assert again.items == SHARD
    assert again.manifest.digest == made.manifest.digest
    assert CliRunner().invoke(main, ["verify", str(place)]).exit_code == 0


def test_a_cache_of_another_teacher_is_refused(remote: Extracted, data_file: Path, tmp_path: Path) -> None:
    other = save_model(build_model("yolov8n.yaml", seed=4), tmp_path / "other.pt")
    with pytest.raises(MismatchError, match=r"s3://bucket/caches/one is a cache of something else \(teacher"):
        run(other, data_file, remote.path)


@pytest.mark.slow
def test_a_bucket_s_cache_is_removed(teacher: Path, data_file: Path) -> None:
    place = Url(f"s3://{BUCKET}/caches/gone")
    run(teacher, data_file, place)
    done = CliRunner().invoke(main, ["rm", str(place), "--yes"])
    assert done.exit_code == 0, done.output
    assert CliRunner().invoke(main, ["inspect", str(place)]).exit_code == 1


def test_windows_show_every_image_once_and_need_their_shards_alone() -> None:
    size, window = 50, ShuffleWindow(samples=8, shards=2)
    for epoch in range(3):
        order = epoch_order(size, seed=1, epoch=epoch, window=window)
        assert sorted(order) == list(range(size))
        groups = shard_groups(size, 8, seed=1, epoch=epoch, window=window)
        place = 0
        for group in groups:
            count = sum(min(8, size - 8 * shard) for shard in group)
            assert {index // 8 for index in order[place : place + count]} == set(group)
            assert len(group) <= 2
            place += count
        assert order != epoch_order(size, seed=1, epoch=epoch + 1, window=window)
        assert order != sorted(order)


def test_without_a_window_the_order_is_that_of_one_permutation() -> None:
    schedule = ViewSchedule(1, 0, 1, 0)
    sampler = ViewSampler(20, schedule, seed=3)
    generator = torch.Generator().manual_seed(3 * 1_000_003)
    assert [index for _, _, index in sampler] == torch.randperm(20, generator=generator).tolist()
    assert shard_groups(20, 4, seed=3, epoch=0, window=None)[0][0] == next(iter(sampler))[2] // 4
