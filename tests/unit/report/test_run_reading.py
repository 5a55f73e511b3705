"""Runs are found wherever they lie; what a folder of `cache-kd train` tells becomes a record; faults are one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache_kd.errors import InputDataError, MissingFileError
from cache_kd.report.comparison import compare
from cache_kd.report.reading import Runs, read_runs
from cache_kd.report.record import FILE, STATE, CacheRecord
from tests.unit.report.run_cases import CACHE, run

HEAD = "epoch,time,train/box_loss,train/cwd_loss,metrics/mAP50(B),metrics/mAP50-95(B),val/box_loss"
ROWS = ("1,7.5,6.4,2.0,0,0,0", "2,14.0,5.0,nan,0.6,0.36,1.5")


def facts(path: Path) -> CacheRecord:
    if path != Path(CACHE.path):
        raise MissingFileError(f"no such cache: {path}")
    return CACHE


def read(*paths: Path) -> Runs:
    return read_runs(paths, facts)


def train_folder(folder: Path, *, losses: str = "[cwd:weight=2.7]", seed: int = 0, **changes: str) -> Path:
    """Write what `cache-kd train` leaves; `changes` replaces whole files by the name without its ending."""
    files = {
        "results": "\n".join((HEAD, *ROWS)) + "\n",
        "args": f"model: yolov8n.yaml\ndata: /data/bccd.yaml\nseed: {seed}\nimgsz: 160\nepochs: 2\n",
        "cache_kd": f"cache: {CACHE.path}\ndigest: {CACHE.digest}\nidentity: i\nlosses: {losses}\n"
        "teacher: {file: best.pt}\nviews: [mixed-0000, plain-0000]\nstudent: yolov8n.yaml\npack: none\n",
        "kd_gradients": "epoch,term,share,weight\n1,cwd,0.25,2.7\n2,cwd,0.30,2.7\n",
        **changes,
    }
    folder.mkdir(parents=True)
    for name, ending in (("results", "csv"), ("args", "yaml"), ("cache_kd", "yaml"), ("kd_gradients", "csv")):
        if files[name]:
            (folder / f"{name}.{ending}").write_text(files[name])
    return folder


def test_folder_of_train_becomes_a_record(tmp_path: Path) -> None:
    (found,) = read(train_folder(tmp_path / "train")).runs
    record = found.record
    assert (record.arm, record.mode, record.seed, record.recipe) == ("cwd:weight=2.7", "cached", 0, None)
    assert (record.student, record.data, record.teacher) == ("yolov8n.yaml", "bccd.yaml", "best.pt")
    assert record.cache == CACHE
    assert record.judged is None
    assert [epoch.epoch for epoch in record.epochs] == [1, 2]
    assert [epoch.seconds for epoch in record.epochs] == [7.5, 14.0]
    assert record.epochs[1].metrics["metrics/mAP50-95(B)"] == 0.36
    assert record.epochs[1].metrics["train/cwd_loss"] is None
    assert record.epochs[0].shares == {"cwd": 0.25}
    assert record.cost.seconds == 14.0
    assert record.settings["imgsz"] == 160
    assert record.warnings == ()
    assert compare(read(tmp_path).runs)[0][0].arms[0].points == {0: 36.0}


def test_plain_runs_and_runs_of_ultralytics_are_told_apart(tmp_path: Path) -> None:
    train_folder(tmp_path / "a", losses="[none]")
    train_folder(tmp_path / "b", cache_kd="", kd_gradients="")
    train_folder(
        tmp_path / "c", cache_kd="", kd_gradients="", args="model: a.yaml\ndata: d.yaml\ndistill_model: t.pt\n"
    )
    found = {run.path.name: run.record for run in read(tmp_path).runs}
    assert {name: record.mode for name, record in found.items()} == {"a": "plain", "b": "plain", "c": "online"}
    assert found["a"].cache is None
    assert found["c"].teacher == "t.pt"
    assert "not recorded" in found["c"].warnings[0]


@pytest.mark.parametrize("changed", [("cache: kd", "cache: other/kd"), ("digest: 9c", "digest: 8c")])
def test_cache_that_is_gone_or_another_leaves_what_the_run_wrote(tmp_path: Path, changed: tuple[str, str]) -> None:
    folder = train_folder(tmp_path / "train")
    own = folder / "cache_kd.yaml"
    own.write_text(own.read_text().replace(*changed))
    (found,) = read(folder).runs
    assert found.record.cache is not None
    assert (found.record.cache.views, found.record.cache.plain_views, found.record.cache.bytes) == (1, 1, None)
    assert "so its size and the extraction's seconds are unknown" in found.record.warnings[0]


def test_arms_differ_where_caches_and_settings_do(tmp_path: Path) -> None:
    train_folder(tmp_path / "a")
    train_folder(tmp_path / "b", seed=1)
    other = train_folder(tmp_path / "c") / "cache_kd.yaml"
    other.write_text(other.read_text().replace(CACHE.path, "kd_cache/tiny").replace(CACHE.digest, "another"))
    names = {run.path.name: run.record.arm for run in read(tmp_path).runs}
    assert names == {
        "a": "cwd:weight=2.7 (bccd-best-1a2b3c4d)",
        "b": "cwd:weight=2.7 (bccd-best-1a2b3c4d)",
        "c": "cwd:weight=2.7 (tiny)",
    }
    longer = train_folder(tmp_path / "more" / "d") / "args.yaml"
    longer.write_text(longer.read_text().replace("epochs: 2", "epochs: 60"))
    names = {run.path.name: run.record.arm for run in read(tmp_path / "a", tmp_path / "more").runs}
    assert names == {"a": "cwd:weight=2.7 (epochs=2)", "d": "cwd:weight=2.7 (epochs=60)"}


def test_runs_are_found_recursively_and_once(tmp_path: Path) -> None:
    for at, place in enumerate(("deep/er/a", "deep/b", "c")):
        (tmp_path / place).mkdir(parents=True)
        run("cached", at, 0.4).write(tmp_path / place / FILE)
    train_folder(tmp_path / "d")
    train_folder(tmp_path / "c" / "inside a run")
    found = read(tmp_path, tmp_path / "deep", tmp_path / "c" / FILE, tmp_path / "c").runs
    assert [run.path.relative_to(tmp_path).as_posix() for run in found] == [
        "c/record.json",
        "d",
        "deep/b/record.json",
        "deep/er/a/record.json",
    ]


def test_record_goes_before_the_tables_beside_it(tmp_path: Path) -> None:
    folder = train_folder(tmp_path / "a")
    run("judged", 0, 0.4).write(folder / FILE)
    assert [run.record.arm for run in read(folder).runs] == ["judged"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"results": HEAD + "\n"}, r"results\.csv holds no epoch; train on: cache-kd train resume="),
        ({"results": "epoch,box\n1,2\n"}, r"results\.csv has no column time"),
        ({"results": HEAD + "\n1,x,0,0,0,0,0\n"}, r"results\.csv: time is 'x'; allowed: a number"),
        ({"args": "seed: many\n"}, r"args\.yaml: seed is 'many'; allowed: a whole number"),
        ({"args": "- a\n"}, r"args\.yaml must hold `key: value` lines"),
        ({"cache_kd": "losses: cwd\n"}, r"cache_kd\.yaml: losses is not a list of texts"),
        ({"kd_gradients": "a,b\n1,2\n"}, r"kd_gradients\.csv has the columns a, b; allowed: epoch, term, share"),
    ],
)
def test_folder_that_cannot_be_read_is_one_line(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    bad = train_folder(tmp_path / "bad", **changes)
    with pytest.raises(InputDataError, match=said) as caught:
        read(bad)
    assert "\n" not in str(caught.value)
    train_folder(tmp_path / "good")
    found = read(tmp_path)
    assert [run.path.name for run in found.runs] == ["good"]
    assert len(found.faults) == 1
    with pytest.raises(InputDataError, match=said):
        read(tmp_path / "good", bad)


def test_unfinished_run_of_a_recipe_is_left_out(tmp_path: Path) -> None:
    train_folder(tmp_path / "done")
    (train_folder(tmp_path / "going") / STATE).write_text("{}")
    found = read(tmp_path)
    assert [run.path.name for run in found.runs] == ["done"]
    assert found.faults == (
        f"{tmp_path / 'going'}: a recipe's run that is not finished; go on with it: cache-kd run RECIPE",
    )


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no such file or folder: .*nowhere; allowed: a record\.json"):
        read(tmp_path / "nowhere")
    with pytest.raises(InputDataError, match=r"no run in .*, no record\.json and no results\.csv beside"):
        read(tmp_path)
