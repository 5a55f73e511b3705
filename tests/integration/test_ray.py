"""A real Ray cluster of two nodes: the digest of a plain extraction, with actors killed, a node gone, units twice."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from poison import KILL, heal, healed, poison, tried

from cache_kd.cache.verify import verify_cache
from cache_kd.engines.board import Board
from cache_kd.errors import SettingError, UnitsError
from cache_kd.pipeline import unit_engines
from cache_kd.pipeline.extraction import Extracted, ExtractSettings, extract

VIEWS = 6
__all__ = ["healed"]


@pytest.fixture(scope="module")
def few(few_images: Path) -> Path:
    """Twelve images instead of four: work enough for a cluster."""
    return few_images


@pytest.fixture(scope="module")
def digest(teacher: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    done = run(teacher, few, tmp_path_factory.mktemp("whole") / "cache")
    assert done.manifest is not None
    return done.manifest.digest


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that has no CPU to give and a node of one; tests add what they need."""
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patched.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.add_node(num_cpus=1)
        try:
            yield made
        finally:
            made.shutdown()


def run(teacher: Path, data: Path, path: Path, cluster: Any = None, **options: Any) -> Extracted:
    settings: dict[str, Any] = {"imgsz": 64, "batch": 2, "device": "cpu", "workers": 0, "threads": 1, **options}
    watch = settings.pop("progress", None)
    if cluster is not None:
        settings |= {"engine": "ray", "address": cluster.address}
    return extract(ExtractSettings(teacher, data, path, views=VIEWS - 1, plain_views=1, **settings), progress=watch)


def actors() -> list[psutil.Process]:
    """Return the processes of the actors that make units."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ray::_Actor" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_without_ray_one_line_says_how_to_get_it(
    teacher: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingError, match=r"--engine ray needs Ray; run: pip install 'cache-kd\[ray\]'"):
        run(teacher, few, tmp_path / "cache", engine="ray")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", r"--engine ray: no cluster at 127.0.0.1:1: .*refused; start one with `ray start --head`, or"),
        ("ray://head:10001", r"--address 'ray://head:10001'; allowed: auto, local, or HOST:PORT of the cluster's head"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(
    teacher: Path, few: Path, tmp_path: Path, address: str, says: str
) -> None:
    pytest.importorskip("ray")
    with pytest.raises(SettingError, match=says):
        run(teacher, few, tmp_path / "cache", engine="ray", address=address)


@pytest.mark.slow
def test_the_cluster_makes_the_same_cache(cluster: Any, digest: str, teacher: Path, few: Path, tmp_path: Path) -> None:
    done = run(teacher, few, tmp_path / "cache", cluster)
    assert done.manifest is not None and done.manifest.digest == digest
    assert done.manifest.environment["threads"] == 1 and verify_cache(tmp_path / "cache").notes == ()


@pytest.mark.slow
def test_a_killed_actor_loses_nothing(cluster: Any, digest: str, teacher: Path, few: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(done: int, items: int) -> None:
        if not killed:
            victim = actors()[0]
            killed.append(victim.pid)
            victim.kill()

    module = poison(tmp_path, "none", "time.sleep(0.1)")
    done = run(teacher, few, tmp_path / "cache", cluster, progress=kill, imports=(module,))
    assert killed and done.manifest is not None and done.manifest.digest == digest
    assert verify_cache(tmp_path / "cache").ok and not (tmp_path / "cache" / "attempts").exists()


@pytest.mark.slow
def test_a_node_that_goes_loses_nothing(cluster: Any, digest: str, teacher: Path, few: Path, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=1)
    gone: list[Any] = []

    def remove(done: int, items: int) -> None:
        if not gone and len(tried(tmp_path)) >= 3:
            gone.append(node)
            cluster.remove_node(node, allow_graceful=False)

    module = poison(tmp_path, "none", "pass")
    done = run(teacher, few, tmp_path / "cache", cluster, progress=remove, imports=(module,))
    assert gone and done.manifest is not None and done.manifest.digest == digest
    assert verify_cache(tmp_path / "cache").ok


@pytest.mark.slow
def test_units_given_twice_are_made_once_or_alike(
    cluster: Any, digest: str, teacher: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(units: Any, sizes: Any) -> Board:
        return Board([unit for unit in units for _ in range(2)], sizes)

    monkeypatch.setattr(unit_engines, "Board", doubled)
    module = poison(tmp_path, "none", "pass")
    done = run(teacher, few, tmp_path / "cache", cluster, imports=(module,))
    assert done.manifest is not None and done.manifest.digest == digest
    assert sum(tried(tmp_path).values()) > VIEWS * 6, "some were made by two at once"
    assert verify_cache(tmp_path / "cache").ok and not (tmp_path / "cache" / "attempts").exists()


@pytest.mark.slow
def test_a_unit_that_kills_actors_is_left_out(
    cluster: Any, digest: str, teacher: Path, few: Path, tmp_path: Path
) -> None:
    module = poison(tmp_path, "mixed-0002", KILL)
    with pytest.raises(
        UnitsError, match=r"quarantined after 3 attempts: mixed-0002 shard 0 \(its actor died \(process"
    ):
        run(teacher, few, tmp_path / "cache", cluster, imports=(module,))
    assert tried(tmp_path)["mixed-0002"] == 3 and len(tried(tmp_path)) == VIEWS
    heal()
    done = run(teacher, few, tmp_path / "cache", cluster, retry=True)
    assert done.items == 12 and done.manifest is not None and done.manifest.digest == digest


@pytest.mark.slow
def test_an_interrupt_ends_the_actors_and_counts_against_no_unit(
    cluster: Any, teacher: Path, few: Path, tmp_path: Path
) -> None:
    at_work: list[int] = []

    def interrupt(done: int, items: int) -> None:
        at_work.extend(actor.pid for actor in actors())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run(teacher, few, tmp_path / "cache", cluster, progress=interrupt)
    assert at_work
    assert not list((tmp_path / "cache").glob("attempts/*"))
    psutil.wait_procs(actors(), timeout=20)
    assert actors() == []


@pytest.mark.slow
def test_more_threads_than_a_node_has_is_one_line(cluster: Any, teacher: Path, few: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"--threads 64: the largest node of the cluster has 1 CPUs"):
        run(teacher, few, tmp_path / "cache", cluster, threads=64)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
