"""Layers beside the head's inputs: stored as the teacher says them, found in any architecture, learnt from by name."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cached_batches import distilled, prepared, seen_outputs
from click.testing import CliRunner
from small_inputs import TAPS, build_model, extraction_threads, small_data
from student_runs import Run, differing, distiller_tensors, results, train_student
from torch import Tensor, nn
from ultralytics.utils.torch_utils import unwrap_model

from cache_kd.cli import main
from cache_kd.errors import MismatchError
from cache_kd.pipeline import live_teacher, verification
from cache_kd.pipeline.extraction import ExtractSettings, extract
from cache_kd.pipeline.opened import Cache
from cache_kd.structures import SampleTargets, View, ViewSample
from cache_kd.ultralytics_bridge.heads import describe_head
from cache_kd.ultralytics_bridge.layers import captured, find_layers
from cache_kd.ultralytics_bridge.teacher import Teacher, load_teacher
from cache_kd.ultralytics_bridge.trainer import DistillTrainer

VIEW, IMAGES = View("mixed", 0), (0, 1, 2, 3)
# The teacher is a YOLOv8s: its own layer of each name, its channels and stride.
LAYERS = {
    "C3": ("4", 128, 8),
    "C4": ("6", 256, 16),
    "6": ("6", 256, 16),
    "8": ("8", 512, 32),
    "12.cv1": ("12.cv1", 256, 16),
}


@pytest.fixture(scope="module")
def teacher_file(test_data: Path) -> Path:
    return test_data / "weights" / "yolov8s-bccd.pt"


@pytest.fixture(scope="module")
def live(full_cache: Path, teacher_file: Path) -> dict[str, np.ndarray]:
    """What the teacher's layers put out for the first batch of the extraction, (4, F, H, W) by name."""
    model = load_teacher(teacher_file).model.to(memory_format=torch.channels_last).eval()
    dataset = Cache(full_cache).dataset
    pixels = np.stack([dataset.sample(VIEW, index).pixels for index in IMAGES])
    images = (torch.from_numpy(pixels).float() / 255).contiguous(memory_format=torch.channels_last)
    found, _ = seen_outputs(model, *{path for path, _, _ in LAYERS.values()})
    with torch.inference_mode(), extraction_threads():
        model(images)
    return {name: found[path].numpy() for name, (path, _, _) in LAYERS.items()}


# -- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fidelity", ["full_cache", "exact_cache"])
def test_stored_layers_are_the_live_ones_within_the_declared_bound(
    request: pytest.FixtureRequest, live: dict[str, np.ndarray], fidelity: str
) -> None:
    cache = Cache(request.getfixturevalue(fidelity))
    assert tuple(live) == TAPS
    names = tuple(column.name for column in cache.codec.columns)
    for index in IMAGES:
        read = cache.read(view=VIEW.number, index=index).layers
        row = cache.reader.read(VIEW, index, names)
        steps = cache.codec.layer_step({name: torch.from_numpy(values)[None] for name, values in row.items()})
        assert list(read) == list(steps) == list(TAPS)
        for name, stored in read.items():
            true = live[name][index]
            assert stored.shape == true.shape and stored.dtype == np.float32
            declared = steps[name][0].numpy()
            exact, default = np.abs(true).max() * 2.0**-11, max(0.15 * true.std(), np.ptp(true) / 255)
            assert (declared <= (exact if fidelity == "exact_cache" else default) * 1.001).all()
            assert (np.abs(stored - true) <= declared).all(), name


def test_what_a_cache_says_of_its_layers(full_cache: Path) -> None:
    cache = Cache(full_cache)
    rows = [[name, channels, stride] for name, (_, channels, stride) in LAYERS.items()]
    assert [[tap.name, tap.channels, tap.stride] for tap in cache.manifest.head.layers] == rows
    facts = json.loads(CliRunner().invoke(main, ["inspect", str(full_cache), "--json"]).stdout)
    assert facts["head"]["layers"] == rows
    assert facts["fidelity"]["layers"] == list(TAPS)
    assert {"C4.features", "12.cv1.features"} <= {name.removesuffix("_length") for name in facts["bytes_by_column"]}
    text = CliRunner().invoke(main, ["inspect", str(full_cache)]).stdout
    assert "P5 512 channels, stride 32, C3 128 channels, stride 8, C4 256 channels, stride 16" in text
    shapes = {name: (channels, 64 // stride, 64 // stride) for name, (_, channels, stride) in LAYERS.items()}
    for view, plain in ((0, False), (1, False), (0, True)):
        assert {name: values.shape for name, values in cache.read(view, 11, plain=plain).layers.items()} == shapes


def test_verify_looks_at_the_layers(full_cache: Path, teacher_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> verification.Verification:
        return verification.verify(full_cache, teacher=teacher_file, sample=6, say=lambda line: None)

    whole = check()
    assert whole.ok and whole.targets_checked == 6 and 0 < whole.worst <= 1

    class OtherLayer(Teacher):
        def __call__(self, views: list[ViewSample], *, batch: int) -> list[SampleTargets]:
            said = super().__call__(views, batch=batch)
            for sample in said:
                sample.layers[1][...] *= -1
            return said

    monkeypatch.setattr(live_teacher, "Teacher", OtherLayer)
    found = check()
    assert not found.ok and len(found.target_faults) == 6
    assert all(": features C4 is off by " in fault for fault in found.target_faults)


def test_the_layers_are_part_of_what_a_cache_is(
    test_data: Path, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CACHE_KD_CACHE", raising=False)
    data = small_data(test_data / "data" / "bccd", tmp_path / "set", train=1)
    options: dict[str, Any] = {"views": 1, "plain_views": 0, "imgsz": 64, "batch": 1, "device": "cpu"}

    def made(place: str, *taps: str) -> Cache:
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        return Cache(extract(ExtractSettings(teacher_file, data, taps=taps, **options)).path.resolve())

    without, with_c4, again = made("here"), made("here", "C4"), made("there", "C4")
    assert without.path.parent == with_c4.path.parent and without.path != with_c4.path
    assert without.manifest.identity_digest != with_c4.manifest.identity_digest
    assert again.path.name == with_c4.path.name
    assert again.manifest.identity_digest == with_c4.manifest.identity_digest
    assert again.manifest.digest == with_c4.manifest.digest


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("yolov8n", (4, 6, 9)),
        ("yolov8m", (4, 6, 9)),
        ("yolo11n", (4, 6, 10)),
        ("yolo12n", (4, 6, 8)),
        ("yolo26n", (4, 6, 10)),
    ],
)
def test_stages_are_the_backbones_last_layers_of_their_stride(name: str, numbers: tuple[int, ...]) -> None:
    model = build_model(f"{name}.yaml")
    found = find_layers(model, ("C3", "C4", "C5"), "a model")
    sequence: Any = model.model
    assert [list(sequence).index(layer) for layer in found.values()] == list(numbers)
    outputs, hooks = seen_outputs(model, *map(str, numbers))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 96, 160))
    for hook in hooks:
        hook.remove()
    assert [outputs[str(number)].shape[2:] for number in numbers] == [(12, 20), (6, 10), (3, 5)]
    taps = describe_head(model, "a model", layers=("C3", "C4", "C5")).layers
    assert [tap.channels for tap in taps] == [outputs[str(number)].shape[1] for number in numbers]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("22", "has no layer '22'; allowed: C3, C4, C5 for the backbone's stages, a number from 0 to 21 for a layer"),
        ("22.cv2.0", "has no layer '22.cv2.0'"),
        ("C9", "has no layer 'C9'; allowed: C1, C2, C3, C4, C5 for"),
        ("²", "has no layer '²'"),
        ("6.m", "layer '6.m' of a model does not put out one map"),
        ("6.cv1.act", "layer '6.cv1.act' runs several times in one pass"),
        ("9.m", "layer '9.m' runs several times in one pass"),
    ],
)
def test_what_is_no_layer_with_one_map_is_refused(name: str, says: str) -> None:
    with pytest.raises(MismatchError, match=re.escape(says)):
        describe_head(build_model("yolov8n.yaml"), "a model", layers=(name,))


@pytest.mark.parametrize("name", ["6.cv1.bn", "6.cv1.conv", "9.cv2"])
def test_a_part_of_a_layer_is_kept_as_it_was_put_out(name: str) -> None:
    """Activations work in place: what a normalisation said would be gone after them."""
    model = build_model("yolov8n.yaml").eval()
    student = distilled_on(model, name)
    images = torch.rand(2, 3, 64, 64)
    outputs: dict[str, Tensor] = {}
    sequence: Any = model.model
    sequence.get_submodule(name).register_forward_hook(lambda *values: outputs.update(kept=values[2].detach().clone()))
    with torch.no_grad():
        model(images)
    assert torch.equal(student(images), outputs["kept"])


def distilled_on(model: nn.Module, name: str) -> Any:
    """Return a function of images to the output that is kept of one layer in a pass with gradient."""
    layers = find_layers(model, (name,), "a model")

    def run(images: Tensor) -> Tensor:
        with captured(layers) as found:
            model(images)
        return found[name]

    return run


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "loss", "last"),
    [
        ("yolov8n.yaml", "cwd:layers=C4", 6),
        ("yolo11n.yaml", "cwd:layers=8:10", 10),
        ("yolo26n.yaml", "mimic:layers=C3", 4),
    ],
)
def test_a_term_on_the_backbone_teaches_what_lies_below_and_is_measured_there(
    full_cache: Path, student: str, loss: str, last: int
) -> None:
    cache = Cache(full_cache)
    model = distilled(build_model(student, imgsz=64), cache, loss)
    batch = prepared(cache, loss)
    outputs, hooks = seen_outputs(model, str(last))
    model.kd_measure = True  # type: ignore[assignment]  # what the trainer sets once an epoch
    total, items = model.loss(batch)  # type: ignore[operator]  # of a DetectionModel
    for hook in hooks:
        hook.remove()
    term, detection = total[-1], total[:-1].sum()
    name = loss.partition(":")[0]
    assert float(items[f"{name}_loss"]) > 0

    below = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("kd.")}
    slopes = torch.autograd.grad(term, list(below.values()), allow_unused=True, retain_graph=True)
    reached = {
        int(n.split(".")[1]) for n, slope in zip(below, slopes, strict=True) if slope is not None and slope.any()
    }
    with_weights = {int(n.split(".")[1]) for n in below}
    assert reached == {number for number in with_weights if number <= last}

    place = outputs[str(last)]
    ours, theirs = (torch.autograd.grad(value, place, retain_graph=True)[0].norm() for value in (term, detection))
    assert float(ours) > 0
    shares: Any = model.kd_shares
    assert shares[name] == pytest.approx(float(ours / (ours + theirs)), rel=1e-4)


# -- training ---------------------------------------------------------------------------------------------------------


def hooked(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]


@pytest.mark.parametrize(
    ("student", "loss", "adapters"),
    [
        ("yolov8n.yaml", "cwd:layers=P3,C4,6", [(64, 128), (128, 256), (128, 256)]),
        ("yolo11n.yaml", "cwd:layers=C4,8:10,12.cv1:13", [(128, 256), (256, 512), (128, 256)]),
    ],
)
def test_a_student_learns_from_layers_and_keeps_no_trace_of_them(
    full_cache: Path, tmp_path: Path, student: str, loss: str, adapters: list[tuple[int, int]]
) -> None:
    begun: list[dict[str, Tensor]] = []

    def keep_first(trainer: DistillTrainer, batch: dict[str, Any]) -> None:
        if not begun:
            begun.append(distiller_tensors(trainer))

    run = train_student(
        full_cache, tmp_path, loss, student=student, epochs=4, close_mosaic=0, before_batch=keep_first, optimizer="SGD"
    )
    values = [float(row["train/cwd_loss"]) for row in results(run.folder)]
    assert all(value > 0 for value in values) and values[-1] < values[0]
    weights = [value for value in run.adapters.values() if value.ndim == 4]
    assert [(value.shape[1], value.shape[0]) for value in weights] == adapters
    assert set(differing(run.adapters, begun[0])) >= {n for n in begun[0] if n.startswith("terms.")}
    with (run.folder / "kd_gradients.csv").open(encoding="utf-8") as file:
        assert all(0 < float(row["share"]) < 1 for row in csv.DictReader(file))
    no_trace(run)


def no_trace(run: Run) -> None:
    """Neither the model nor its copies know of the layers that were looked at."""
    assert hooked(unwrap_model(run.trainer.model)) == []
    ema = run.trainer.ema.ema
    assert hooked(ema) == [] and type(ema).__name__ == "DetectionModel"
    assert [name for name in vars(ema) if name.startswith("kd")] == []
    for name in ("last.pt", "best.pt"):
        content = torch.load(run.folder / "weights" / name, weights_only=False)
        models = [content[key] for key in ("model", "ema") if content.get(key) is not None]
        assert models
        for model in models:
            assert hooked(model) == [] and type(model).__name__ == "DetectionModel"
            assert [key for key in vars(model) if key.startswith("kd")] == []
            assert [key for key in model.state_dict() if key.startswith("kd")] == []
