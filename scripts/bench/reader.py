"""In: a cache. Out: samples a second of its reader and of other stores of the same rows, side by side in one run.

Two payloads: the features and their tables (what a student of feature losses reads), and rows of 1 KB, where hardly
anything is left but the overhead of a sample. Samples are read in random order. Each measurement has a process of its
own: it opens the store, its files leave the page cache, all samples are read (cold), and read again (warm). "1 process"
is the bare reader; "2 workers" is a torch DataLoader with batches of 16. Rounds go through all stores, starting
with another one each time, and what is compared is the ratio within a round.

python scripts/bench/reader.py --cache kd_cache/…
"""

from __future__ import annotations

import gc
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import record
import torch
from page_cache import evict, num_bytes, resident
from reader_peers import OURS, PEERS, Payload, Read, describe
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cache_kd.cache.reader import CacheReader
from cache_kd.cache.writer import CacheWriter
from cache_kd.structures import Column, HeadSpec, Tap, View

BATCH = 16
SMALL = "row"
SMALL_BYTES = 1024
DISTRIBUTIONS = ("safetensors", "blosc2", "tensorstore", "litdata", "mosaicml-streaming")
_OPEN_ONLY = -1


class _Order(Sampler[list[int]]):
    """Batches of sample numbers; what it gives can change between epochs while workers live on."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Samples(Dataset[dict[str, Tensor]]):
    """Opens its store in the worker that reads."""

    def __init__(self, peer: str, payload: Payload, folder: Path) -> None:
        self._peer, self._payload, self._folder = peer, payload, folder
        self._read: Read | None = None

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        if self._read is None:
            self._read = PEERS[self._peer].open(self._payload, self._folder)
        if sample == _OPEN_ONLY:
            return {}
        return {name: torch.from_numpy(row) for name, row in self._read(sample).items()}


def _in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `function` returns in a forked process, so that threads and files of a library stay there."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def _write_and_compare(peer: str, payload: Payload, folder: Path) -> None:
    """Fill the store of `peer` and check every byte of every sample that it returns."""
    if write := PEERS[peer].write:
        folder.mkdir()
        write(payload, folder)
    read = PEERS[peer].open(payload, folder)
    for sample, expected in enumerate(payload.rows()):
        rows = read(sample)
        for name, row in expected.items():
            if rows[name].dtype != row.dtype or not np.array_equal(rows[name], row):
                raise click.ClickException(f"{peer} returns other bytes for {name} of sample {sample}")


def _measure(peer: str, payload: Payload, folder: Path, workers: int, seed: int) -> dict[str, float]:
    """Return the seconds of all samples cold and warm, and the share of pages that stayed in the page cache."""
    order = np.random.default_rng(seed).permutation(len(payload)).tolist()
    files = folder if PEERS[peer].write else payload.cache
    read_all = _with_workers(peer, payload, folder, workers, order) if workers else _alone(peer, payload, folder, order)
    gc.collect()
    evict(files)
    kept = resident(files)
    return {"cold": _seconds(read_all), "warm": _seconds(read_all), "resident": kept}


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _alone(peer: str, payload: Payload, folder: Path, order: list[int]) -> Callable[[], None]:
    read = PEERS[peer].open(payload, folder)

    def read_all() -> None:
        for sample in order:
            read(sample)

    return read_all


def _with_workers(peer: str, payload: Payload, folder: Path, workers: int, order: list[int]) -> Callable[[], None]:
    batches = _Order([[_OPEN_ONLY]] * workers)
    loader = DataLoader(
        _Samples(peer, payload, folder), batch_sampler=batches, num_workers=workers, persistent_workers=True,
        multiprocessing_context="fork",
    )  # fmt: skip

    def read_all() -> None:
        for _ in loader:
            pass

    read_all()
    batches.batches = [order[begin : begin + BATCH] for begin in range(0, len(order), BATCH)]
    return read_all


def _small_rows(payload: Payload, folder: Path, count: int) -> Payload:
    """Return a cache of real bytes in rows of 1 KB: pieces of the features of the first samples."""
    reader = CacheReader(payload.cache)
    pieces: list[np.ndarray] = []
    for sample in range(len(payload)):
        view, index = payload.item(sample)
        whole = reader.read_row(view, payload.columns[0], index)
        pieces += list(whole[: len(whole) // SMALL_BYTES * SMALL_BYTES].reshape(-1, SMALL_BYTES))
        if len(pieces) >= count:
            break
    view = View("mixed", 0)
    column = Column(SMALL, "u1", (SMALL_BYTES,))
    given = {
        "teacher": {}, "head": HeadSpec((Tap("P3", 4, 8),), 16, ("thing",)), "codec": {}, "imgsz": 320, "seed": 0,
        "recipe": {}, "environment": {},
    }  # fmt: skip
    with CacheWriter.open_or_create(
        folder, identity={}, data={}, columns=(column,), num_images=count, teacher_arrays={}
    ) as writer:
        for shard in writer.units(view):
            writer.write_unit(view, shard, {SMALL: [pieces[sample] for sample in writer.samples(shard)]}, {})
        writer.finish([view], given)
    return Payload.of(folder, (SMALL,), (view,))


def _rounds(
    payload: Payload, names: list[str], folders: dict[str, Path], modes: dict[str, int], rounds: int
) -> dict[str, Any]:
    """Return the figures of every store in `names`."""
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in [*names[start:], *names[:start]]:
            for mode, workers in modes.items():
                result = _in_own_process(_measure, name, payload, folders[name], workers, number)
                kept = taken[name].setdefault("resident", [])
                kept.append(result.pop("resident"))
                for state, seconds in result.items():
                    taken[name].setdefault(f"{state}, {mode}", []).append(seconds / len(payload))
        click.echo(f"round {number + 1} of {rounds}")
    return {name: _figures(name, taken, payload, folders) for name in names}


def _figures(
    name: str, taken: dict[str, dict[str, list[float]]], payload: Payload, folders: dict[str, Path]
) -> dict[str, Any]:
    peer = PEERS[name]
    figures: dict[str, Any] = {
        "compression": peer.compression,
        "checksum": peer.checksum,
        "bytes_per_sample": _stored_bytes(name, payload, folders[name]) / len(payload),
        "resident_before_cold": max(taken[name]["resident"]),
    }
    for state in taken[name]:
        if state == "resident":
            continue
        seconds, ours = taken[name][state], taken.get(OURS, {}).get(state)
        figures[state] = {
            "samples_per_second": record.spread([1 / second for second in seconds]),
            "microseconds": record.spread([second * 1e6 for second in seconds]),
        }
        if ours:
            figures[state]["time_over_ours"] = record.spread([a / b for a, b in zip(seconds, ours, strict=True)])
    return figures


def _stored_bytes(name: str, payload: Payload, folder: Path) -> int:
    if PEERS[name].write:
        return num_bytes(folder)
    return sum(
        num_bytes(payload.cache / layout.folder(view)) for view in payload.views for layout in payload.layouts.values()
    )


def _show(title: str, figures: dict[str, Any]) -> None:
    click.echo(f"\n{title}")
    for name, values in figures.items():
        click.echo(f"{name:18} {values['bytes_per_sample'] / 1e3:8.1f} kB  compression: {values['compression']}")
        for state, value in values.items():
            if not isinstance(value, dict):
                continue
            rate, took, ratio = (value.get(key) for key in ("samples_per_second", "microseconds", "time_over_ours"))
            over = f"{ratio['median']:.2f} of our time [{ratio['min']:.2f}, {ratio['max']:.2f}]" if ratio else ""
            click.echo(
                f"  {state:16} {rate['median']:8.0f} samples/s [{rate['min']:.0f}, {rate['max']:.0f}]"
                f" {took['median']:8.1f} us  {over}"
            )


def _chosen(only: tuple[str, ...]) -> list[str]:
    """Return the stores to measure; one line that says what to install when a package of theirs is missing."""
    names = list(only) or list(PEERS)
    for name in names:
        if missing := PEERS[name].missing():
            there = " ".join(f"--only {known!r}" for known in PEERS if not PEERS[known].missing())
            raise click.ClickException(
                f"{name} needs {', '.join(missing)}: {PEERS[name].extra}; or measure without it: {there}"
            )
    return names


def _peer_versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            continue
    return found


@click.command()
@click.option("--cache", type=click.Path(path_type=Path, exists=True), required=True, help="with at least 1 mixed view")
@click.option("--views", default=2, help="mixed views to read from")
@click.option("--rounds", default=5)
@click.option("--small-rows", default=2048, help="samples of the 1 KB payload")
@click.option("--only", multiple=True, type=click.Choice(list(PEERS)), help="measure these stores; default: all")
@click.option("--folder", type=click.Path(path_type=Path), help="where stores are written; default: a temporary one")
@click.option("--name", default="reader")
def main(
    cache: Path, views: int, rounds: int, small_rows: int, only: tuple[str, ...], folder: Path | None, name: str
) -> None:
    """Measure the reader of a cache beside other stores of the same rows."""
    names = _chosen(only)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes into rows here
    mixed = [view for view in CacheReader(cache).manifest.views if view.kind == "mixed"][:views]
    payload = Payload.of(cache, ("features", "feature_tables"), tuple(mixed))
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        small = _in_own_process(_small_rows, payload, Path(temporary, "small-cache"), small_rows)
        figures: dict[str, Any] = {}
        for title, rows, modes in (
            ("features and tables", payload, {"1 process": 0, "2 workers": 2}),
            ("1 KB rows", small, {"1 process": 0}),
        ):
            parent = Path(temporary, title)
            parent.mkdir()
            folders = {peer: parent / str(number) for number, peer in enumerate(names)}
            for peer in names:
                _in_own_process(_write_and_compare, peer, rows, folders[peer])
                click.echo(f"{title}: {peer} returns the same bytes")
            figures[title] = {
                "payload": describe(rows), "stores": _rounds(rows, names, folders, modes, rounds)
            }  # fmt: skip
            _show(title, figures[title]["stores"])
    settings = {
        "rounds": rounds, "order": "random", "batch": BATCH, "peers": _peer_versions(),
        "cold": "files fsynced and dropped by posix_fadvise after the store was opened; resident_before_cold is the "
        "largest share of pages that mincore still found; the host of a virtual machine may keep its own copy",
    }  # fmt: skip
    click.echo(str(record.write(name, settings, figures)))


if __name__ == "__main__":
    main()
