"""In: a plan of an extraction, sent to where units are made. Out: the worker that makes them there."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch

from cache_kd.cache.store import Place
from cache_kd.cache.writer import CacheWriter
from cache_kd.codecs import ViewCodec
from cache_kd.engines.board import Advanced, Done, Failed, GivenUp, Tell
from cache_kd.errors import CacheKDError, MismatchError
from cache_kd.fingerprint import differences, listed
from cache_kd.pipeline.extract_settings import DEFAULT_FIDELITY, ExtractSettings, device_of
from cache_kd.pipeline.identity import teacher_identity
from cache_kd.pipeline.versions import PIXEL_PACKAGES, environment, package_versions
from cache_kd.teacher.extract import Unit, extract_units
from cache_kd.ultralytics_bridge.dataset import ViewDataset
from cache_kd.ultralytics_bridge.gate import import_user_modules
from cache_kd.ultralytics_bridge.teacher import Teacher, load_teacher


@final
@dataclass(frozen=True)
class ExtractionWorker:
    """Makes units of one cache with one teacher; what it is made of lives as long as its process."""

    dataset: ViewDataset
    teacher: Teacher
    codec: ViewCodec
    writer: CacheWriter
    batch: int
    loaders: int
    environment: dict[str, Any]

    def do(self, units: Iterator[Unit], tell: Tell) -> None:
        """Make units as they come; every one is counted as an attempt before it is begun.

        Raises:
            CacheKDError: what no unit is to blame for, such as a full disk.
        """

        def failed(unit: Unit, error: CacheKDError) -> None:
            self.writer.fail_unit(unit.view, unit.shard, str(error))
            tell(Failed(unit, str(error)))

        try:
            extract_units(
                self._begun(units, tell),
                dataset=self.dataset,
                teacher=self.teacher,
                codec=self.codec,
                writer=self.writer,
                batch=self.batch,
                workers=self.loaders,
                environment={**self.environment, "threads": torch.get_num_threads()},
                progress=lambda unit, views: tell(Advanced(unit, views)),
                done=lambda unit: tell(Done(unit)),
                failed=failed,
            )
        except (KeyboardInterrupt, CacheKDError, OSError, EOFError):  # no unit is to blame, nor for a lost driver
            with contextlib.suppress(CacheKDError):
                self.writer.withdraw_units()
            raise
        except Exception as error:
            self._blame(error)
            raise

    def _begun(self, units: Iterator[Unit], tell: Tell) -> Iterator[Unit]:
        for unit in units:
            if self.writer.done(unit.view, unit.shard):  # another worker was quicker
                tell(Done(unit))
            elif self.writer.begin_unit(unit.view, unit.shard):
                yield unit
            else:
                tell(GivenUp(unit, self.writer.attempts.reason(unit.view, unit.shard)))

    def _blame(self, error: Exception) -> None:
        """Write down the error against the unit in work; those that were only asked for ahead go free."""
        with contextlib.suppress(CacheKDError):
            for view, shard in self.writer.under_way[:1]:
                self.writer.fail_unit(view, shard, f"{type(error).__name__}: {' '.join(str(error).split())}")
            self.writer.withdraw_units()


@final
@dataclass(frozen=True)
class WorkerMaker:
    """Makes the worker in another process, there or on another machine.

    Attributes:
        settings: of the extraction, with the device of this worker. identity: of the cache.
        dataset: scanned already; only the images are read where the worker is.
        threads: of torch. loaders: processes that make views. teacher: its file.
    """

    settings: ExtractSettings
    identity: Mapping[str, Any]
    place: Place
    imgsz: int
    dataset: ViewDataset
    threads: int
    loaders: int
    teacher: Path

    def __call__(self) -> ExtractionWorker:
        settings = self.settings
        self._check_versions()
        torch.set_num_threads(self.threads)
        import_user_modules(settings.imports)
        checkpoint = load_teacher(self.teacher, trusted=settings.trust_teacher)
        if changed := differences(dict(self.identity["teacher"]), teacher_identity(checkpoint)):
            raise MismatchError(
                f"teacher {self.teacher} is not the one that the extraction began with: {listed(changed)}"
            )
        device = device_of(settings.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
        teacher = Teacher(
            checkpoint,
            imgsz=self.imgsz,
            device=device,
            precision=settings.precision,
            store=settings.store,
            taps=settings.taps,
        )
        codec = ViewCodec.create(settings.fidelity or DEFAULT_FIDELITY, teacher.head, self.imgsz, settings.store)
        env = environment(device=device, batch=settings.batch, precision=settings.precision)
        writer = CacheWriter.open_begun(self.place)
        return ExtractionWorker(self.dataset, teacher, codec, writer, settings.batch, self.loaders, env)

    def _check_versions(self) -> None:
        """Raise `MismatchError` if views would have other pixels here."""
        here = package_versions(PIXEL_PACKAGES)
        if changed := differences(dict(self.identity["versions"]), here):
            raise MismatchError(
                f"a worker has other libraries than the extraction began with: {listed(changed)}; install the same ones"
            )


@final
@dataclass(frozen=True)
class ShippedMaker:
    """Makes the worker on another machine, which has the images and the cache, and nothing else of this one's files.

    Attributes:
        files: name and content of the teacher's file, then of the user's modules.
    """

    maker: WorkerMaker
    files: tuple[tuple[str, bytes], ...]

    def __call__(self, threads: int) -> ExtractionWorker:
        """Return the worker; `threads`: the CPU threads that it may use."""
        with tempfile.TemporaryDirectory(prefix="cache-kd-") as folder:
            paths = []
            for number, (name, content) in enumerate(self.files):
                path = Path(folder, str(number), name)
                path.parent.mkdir()
                path.write_bytes(content)
                paths.append(path)
            chosen = self.maker.settings.workers
            loaders = chosen if chosen is not None else min(8, threads) if torch.cuda.is_available() else 0
            settings = replace(self.maker.settings, imports=tuple(paths[1:]))
            return replace(self.maker, settings=settings, teacher=paths[0], threads=threads, loaders=loaders)()
