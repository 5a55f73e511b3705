"""What a run leaves opens in plain Ultralytics, where cache-kd is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from student_runs import Run, flat, train_student

PLAIN_ULTRALYTICS = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "cache_kd":
            raise ModuleNotFoundError(f"blocked: {name}")

sys.meta_path.insert(0, Blocker())
try:
    import cache_kd
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("cache_kd could be imported")
from ultralytics import YOLO
from ultralytics.nn import tasks

found = {"safe": bool(tasks.SAFE_LOAD)}
for file in sys.argv[2:]:
    model = YOLO(file)
    (result,) = model.predict(sys.argv[1], imgsz=64, device="cpu", verbose=False)
    found[file] = {
        "class": f"{type(model.model).__module__}.{type(model.model).__name__}",
        "tensors": len(model.model.state_dict()),
        "foreign": [name for name, _ in model.model.named_modules() if "kd" in name.split(".")],
        "attributes": [name for name in vars(model.model) if "kd" in name],
        "names": list(model.names.values()),
        "shape": list(result.orig_shape),
    }
assert not [name for name in sys.modules if name.partition(".")[0] == "cache_kd"]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def run(few_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_student(few_cache, tmp_path_factory.mktemp("checkpoints"), "cwd", "mimic", "ld", save_period=1)


@pytest.mark.parametrize("safe", ["0", "1"])
def test_checkpoints_load_and_predict_without_cache_kd(run: Run, few_images: Path, tmp_path: Path, safe: str) -> None:
    image = next((few_images.parent / "images" / "val").iterdir())
    # epoch0.pt is as the trainer left it, with optimizer; best.pt and last.pt are stripped.
    files = [str(run.folder / "weights" / name) for name in ("best.pt", "last.pt", "epoch0.pt")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN_ULTRALYTICS, str(image), *files],
        cwd=tmp_path,
        env={**os.environ, "ULTRALYTICS_SAFE_LOAD": safe},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("safe") is (safe == "1")
    assert set(found) == set(files)
    for facts in found.values():
        assert facts["class"] == "ultralytics.nn.tasks.DetectionModel"
        assert facts["tensors"] == 355
        assert facts["foreign"] == facts["attributes"] == []
        assert facts["names"] == ["RBC", "WBC", "Platelets"]
        assert facts["shape"] == [480, 640]


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "epoch0.pt"])
def test_the_pickle_names_nothing_of_cache_kd(run: Run, name: str) -> None:
    content = (run.folder / "weights" / name).read_bytes()
    assert b"cache_kd." not in content
    assert b"DistilledDetectionModel" not in content


def test_the_adapters_are_in_a_file_of_their_own(run: Run) -> None:
    held = torch.load(run.folder / "weights" / "kd_last.pt", weights_only=True)
    assert held["epoch"] == 1
    assert set(flat(held["state"])) == set(run.adapters)
    assert {path.name for path in (run.folder / "weights").iterdir()} == {
        "best.pt", "last.pt", "epoch0.pt", "epoch1.pt", "kd_last.pt",
    }  # fmt: skip
