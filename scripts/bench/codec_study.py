"""In: teachers and their data sets. Out: bytes, speed and fidelity of every way of coding features that was tried.

Fidelity is the cosine between the gradients that a loss sends through exact and through stored maps: into the student's
maps (the worst level) and into its adapters, from one view and averaged over all. Two students: `early`, random weights
and adapters; `late`, trained weights and adapters fitted on other views.

python scripts/bench/codec_study.py --case best.pt bccd.yaml 320 student.pt
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import record
import torch
from codec_schemes import (
    Scheme,
    View,
    by_score,
    bytes_of_codes,
    dithered,
    packaged,
    per_channel,
    rate_aware,
    stored_as_images,
    stored_with,
)
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel

from cache_kd.codecs.features import ChannelFeatures, HalfFeatures
from cache_kd.codecs.pair_features import PairFeatures
from cache_kd.losses import LOSSES
from cache_kd.pipeline.extract_settings import ExtractSettings
from cache_kd.pipeline.preparation import prepare
from cache_kd.pipeline.versions import cpu_threads
from cache_kd.structures import DetectorOutput, HeadSpec, Labels, TargetBatch
from cache_kd.structures import View as ViewName
from cache_kd.ultralytics_bridge.heads import describe_head

PATH = click.Path(path_type=Path)
JUDGES = ("mimic", "cwd", "sl2", "fgd")
STEPS = (0.1, 0.15, 0.2, 0.3, 0.5, 0.8)


def schemes() -> dict[str, Scheme]:
    """Return what is compared, by name; those of the package first."""
    zstd = stored_with("zstd")
    found: dict[str, Scheme] = {"half": packaged(HalfFeatures()), "channel": packaged(ChannelFeatures())}
    found |= {f"pair {step}": packaged(PairFeatures(step)) for step in STEPS}
    found |= {f"u8 {step}": bytes_of_codes(step, store=zstd) for step in STEPS}
    for step in (0.15, 0.5):
        found |= {
            f"u8 by mean {step}": bytes_of_codes(step, store=zstd, by_mean=True),
            f"u8 lz4 bitshuffle {step}": bytes_of_codes(step, store=stored_with("lz4", 2)),
            f"u8 JPEG-LS {step}": bytes_of_codes(step, store=stored_as_images),
            f"u8 rate-aware rounding {step}": bytes_of_codes(step, store=zstd, round_codes=rate_aware(0.06)),
        }
    for step in (0.3, 0.5, 0.8):
        found |= {
            f"u8 dither {step}": dithered(step),
            f"u8 score steps {step}": by_score(step, finer=0.5, coarser=1.2, threshold=0.05),
            f"u8 steps by channel, level's error {step}": per_channel(step, "level"),
            f"u8 steps by channel, channel's error {step}": per_channel(step, "channel"),
        }
    return found


@dataclass
class Student:
    """Maps of a student and the losses, with their adapters, that compare them with the teacher's."""

    maps: tuple[Tensor, ...]
    losses: Mapping[str, nn.Module]
    outputs: tuple[int, int, int]

    def gradients(self, loss: str, targets: TargetBatch, chosen: slice) -> tuple[list[Tensor], Tensor]:
        """Return the gradients of a term on the student's maps and, flat, on its adapters."""
        maps = tuple(level[chosen].clone().requires_grad_() for level in self.maps)
        anchors, classes, width = self.outputs
        said = DetectorOutput(
            maps, torch.zeros(len(maps[0]), anchors, classes), torch.zeros(len(maps[0]), anchors, width)
        )
        module = self.losses[loss]
        module.zero_grad()
        module(said, _chosen(targets, chosen)).backward()
        own = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        return [level.grad for level in maps], torch.cat(own) if own else torch.zeros(0)  # type: ignore[misc]  # set by backward

    def fit(self, targets: TargetBatch, chosen: slice, steps: int) -> None:
        """Train the adapters alone on some views."""
        for loss, module in self.losses.items():
            members = [p for p in module.parameters() if p.requires_grad]
            if not members:
                continue
            optimizer = torch.optim.Adam(members, lr=3e-3)
            for _ in range(steps):
                self.gradients(loss, targets, chosen)
                optimizer.step()


def _chosen(targets: TargetBatch, chosen: slice) -> TargetBatch:
    assert targets.features is not None and targets.score_map is not None and targets.labels is not None
    first, last, _ = chosen.indices(len(targets.score_map))
    mine = (targets.labels.image >= first) & (targets.labels.image < last)
    labels = Labels(targets.labels.image[mine] - first, targets.labels.cls[mine], targets.labels.boxes[mine])
    maps = tuple(level[chosen] for level in targets.features)
    return replace(targets, features=maps, score_map=targets.score_map[chosen], labels=labels)


def make_student(model: nn.Module, pixels: Tensor, teacher: HeadSpec, imgsz: int) -> Student:
    seen: list[Tensor] = []
    hook = model.model[-1].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    with torch.no_grad():
        model.float().eval()(pixels)
    hook.remove()
    head = describe_head(model, "student")
    torch.manual_seed(0)
    losses = {name: LOSSES[name](teacher, head) for name in JUDGES}
    outputs = (head.num_anchors(imgsz), head.num_classes, 4 * head.reg_max)
    return Student(tuple(level.clone() for level in seen[:3]), losses, outputs)


@dataclass(frozen=True)
class Case:
    """The teacher's maps of some views as targets, and the students."""

    views: list[View]
    exact: TargetBatch
    students: dict[str, Student]
    judged: slice


def make_case(teacher: Path, data: Path, imgsz: int, trained: Path, items: int, fit_steps: int) -> Case:
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(ExtractSettings(teacher, data, Path(folder) / "c", imgsz=imgsz), click.echo)
        job.writer.close()
        torch.set_num_threads(cpu_threads())
        keys = [
            (ViewName("mixed", n % 4) if n % 8 else ViewName("plain", 0), n * 3 % len(job.dataset))
            for n in range(items)
        ]
        samples = [job.dataset.sample(view, index) for view, index in keys]
        said = [target for n in range(0, items, 8) for target in job.teacher(samples[n : n + 8], batch=8)]
        head = job.teacher.head
    levels = range(len(head.taps))
    sizes = [imgsz // tap.stride for tap in head.taps]
    views = []
    for number, target in enumerate(said):
        parts = np.split(target.score_map, np.cumsum([size * size for size in sizes])[:-1])
        views.append(View(target.features, [p.reshape(s, s) for p, s in zip(parts, sizes, strict=True)], number))
    exact = TargetBatch(
        features=tuple(torch.from_numpy(np.stack([t.features[level] for t in said])) for level in levels),
        score_map=torch.from_numpy(np.stack([t.score_map for t in said])),
        labels=Labels(
            torch.cat([torch.full((len(s.boxes),), number) for number, s in enumerate(samples)]),
            torch.cat([torch.from_numpy(np.asarray(s.cls)).long() for s in samples]),
            torch.cat([torch.from_numpy(np.asarray(s.boxes)).float().view(-1, 4) for s in samples]),
        ),
    )
    pixels = torch.from_numpy(np.stack([s.pixels for s in samples])).float() / 255
    torch.manual_seed(0)
    fresh = DetectionModel("yolov8n.yaml", nc=head.num_classes, verbose=False)
    students = {
        "early": make_student(fresh, pixels, head, imgsz),
        "late": make_student(YOLO(trained).model, pixels, head, imgsz),
    }
    half = items // 2
    students["late"].fit(exact, slice(0, half), fit_steps)
    return Case(views, exact, students, slice(half, items))


def judge(case: Case, read: Sequence[Sequence[np.ndarray]], truth: dict[str, Any]) -> dict[str, Any]:
    """Return error and cosines of what was read back, against `truth`, the gradients through exact maps."""
    assert case.exact.features is not None
    maps = tuple(torch.from_numpy(np.stack(level)) for level in zip(*read, strict=True))
    stored = replace(case.exact, features=maps)
    errors = [
        float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
        for a, b in zip(maps, case.exact.features, strict=True)
    ]
    found: dict[str, Any] = {"relative_error": max(errors), "cosines": {}}
    for name, student in case.students.items():
        for loss in JUDGES:
            exact_maps, exact_own, exact_single = truth[name, loss]
            got_maps, got_own = student.gradients(loss, stored, case.judged)
            single = [
                _cosine(student.gradients(loss, stored, slice(n, n + 1))[1], own) for n, own in exact_single.items()
            ]
            found["cosines"][f"{name} {loss}"] = {
                "maps": min(_cosine(a, b) for a, b in zip(got_maps, exact_maps, strict=True)),
                "adapters": _cosine(got_own, exact_own),
                "adapters_one_view": float(np.mean(single)),
            }
    return found


def gradients_of_exact(case: Case) -> dict[str, Any]:
    found = {}
    for name, student in case.students.items():
        for loss in JUDGES:
            maps, own = student.gradients(loss, case.exact, case.judged)
            first = case.judged.start
            single = {n: student.gradients(loss, case.exact, slice(n, n + 1))[1] for n in range(first, first + 3)}
            found[name, loss] = (maps, own, single)
    return found


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten().double(), b.flatten().double()
    return float((a @ b) / (a.norm() * b.norm())) if len(a) else float("nan")


def measure(case: Case, scheme: Scheme, truth: dict[str, Any], repeats: int) -> dict[str, Any]:
    values = sum(level.size for level in case.views[0].maps)
    coded = [scheme(view) for view in case.views]
    again = [scheme(view) for _ in range(repeats - 1) for view in case.views] + coded
    size = float(np.mean([one.size for one in coded]))
    rate = {
        part: values / 1e6 / float(np.median([getattr(one, part) for one in again]))
        for part in ("made", "undone", "restored")
        if all(getattr(one, part) for one in again)
    }
    return {
        "bytes_per_view": size,
        "bits_per_value": 8 * size / values,
        "times_smaller_than_float32": 4 * values / size,
        "million_values_per_second_and_core": rate,
        **judge(case, [one.maps for one in coded], truth),
    }


def _line(one: Mapping[str, Any]) -> str:
    rate, cosines = one["million_values_per_second_and_core"], one["cosines"]
    worst = {part: min(each[part] for each in cosines.values()) for part in ("maps", "adapters")}
    return (
        f"{one['bits_per_value']:5.2f} b {one['times_smaller_than_float32']:5.1f}x error {one['relative_error']:.4f}  "
        f"made {rate['made']:5.0f} undone {rate['undone']:5.0f} restored {rate.get('restored', 0):5.0f} M/s  "
        f"worst maps {worst['maps']:.4f} adapters {worst['adapters']:.4f}  "
        + "  ".join(f"{key} {each['maps']:.4f}/{each['adapters']:.4f}" for key, each in cosines.items())
    )


@click.command()
@click.option("--case", "cases", type=(PATH, PATH, int, PATH), multiple=True, required=True,
              help="Teacher, data, image size, a trained student.")  # fmt: skip
@click.option("--items", default=16)
@click.option("--fit-steps", default=60)
@click.option("--repeats", default=3)
@click.option("--only", default="", help="Schemes whose names hold this.")
@click.option("--name", default="codec-study")
def main(
    cases: tuple[tuple[Path, Path, int, Path], ...], items: int, fit_steps: int, repeats: int, only: str, name: str
) -> None:
    figures: dict[str, dict[str, Any]] = {}
    for teacher, data, imgsz, trained in cases:
        case = make_case(teacher, data, imgsz, trained, items, fit_steps)
        truth = gradients_of_exact(case)
        label = f"{data.stem} {imgsz}"
        figures[label] = {}
        for scheme_name, scheme in schemes().items():
            if only not in scheme_name:
                continue
            figures[label][scheme_name] = one = measure(case, scheme, truth, repeats)
            click.echo(f"{label:12} {scheme_name:44} {_line(one)}")
    settings = {
        "cases": [[teacher.name, data.name, imgsz, trained.name] for teacher, data, imgsz, trained in cases],
        "items": items, "fit_steps": fit_steps, "repeats": repeats,
    }  # fmt: skip
    click.echo(str(record.write(name, settings, figures)))


if __name__ == "__main__":
    main()
