"""Losses that a cache, a student or their own options do not allow: one line, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import refusals
from refusals import QUICK, SMALL, Refused, run
from small_inputs import build_model, save_model

from cache_kd import losses

work, refused = refusals.work, refusals.refused


@pytest.fixture(scope="module")
def teacher(test_data: Path) -> Path:
    return test_data / "weights" / "yolov8s-bccd.pt"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("perceptual", "no loss 'perceptual'"),
        ("cdw", "did you mean 'cwd'?"),
        ("cwd:temprature=2", "did you mean 'temperature'?"),
        ("cwd:temperature=-1", "temperature=-1.0 is not allowed; allowed: "),
        ("cwd:temperature=warm", "temperature=warm is not allowed; allowed: "),
        ("cwd:temperature", "is not key=value"),
        ("cwd:weight=-1", "weight=-1.0 is not allowed; allowed: "),
        ("cwd:weight=nan", "weight=nan is not allowed"),
        ("cwd:weight=1,weight=2", "weight is given twice"),
        ("cwd:warmup=-1", "warmup=-1.0 is not allowed; allowed: finite numbers from 0"),
        ("cwd:cosine=1.5", "cosine=1.5 is not allowed; allowed: finite numbers from 0 to 1"),
        ("cwd:until=1.5", "until=1.5 is not allowed; allowed: whole numbers from 0"),
        ("cwd:balance=1", "balance=1.0 is not allowed; allowed: finite numbers from 0 to 0.9"),
        ("cwd:layers=P3,P3", "layers=P3,P3 is not allowed; allowed: P3, P4, P5, and layers that were extracted"),
        ("cwd:layers=P3,,P4", "layers=P3,,P4 is not allowed; allowed: P3, P4, P5"),
        ("cwd:layers=P3:", "layers=P3: is not allowed; allowed: P3, P4, P5"),
        ("cwd:layers=P4:99", "student yolov8n.yaml has no layer '99'; allowed: C3, C4, C5"),
        ("cwd:layers=P4:4", "the student's 4 has stride 8, the teacher's P4 has 16; allowed: layers of equal stride"),
        ("cwd:layers=C4", "loss cwd needs the layer C4, and the cache was extracted with --store features,logits; "),
        ("fsp:layers=P3", "allowed: two layers or more, for example fsp:layers=P3,P4"),
        ("crosskd:position=9", "position=9 is not allowed; allowed: whole numbers from 0 to 2"),
        ("crosskd:position=1.5", "position=1.5 is not allowed; allowed: whole numbers from 0 to 2"),
        ("ld:region=foo", "region=foo is not allowed; allowed: teacher, assigned"),
        ("ld:vlr=0.25", "loss ld needs vlr, and the cache was extracted with --store features,logits; "),
        ("pa:scale=0", "scale=0.0 is not allowed; allowed: finite numbers from 0.05 to 0.95"),
        ("mgd:lambda_=1", "lambda_=1.0 is not allowed; allowed: finite numbers from 0 to below 1"),
        ("kd:protocol=sofmax", "protocol=sofmax is not allowed; allowed: sigmoid, softmax"),
        ("ifvd:background=yes", "background=yes is not allowed; allowed: true, false"),
    ],
)
def test_a_loss_that_does_not_exist_or_is_badly_parametrised_is_refused(
    refused: Refused, few_cache: Path, spec: str, says: str
) -> None:
    assert says in refused("train", "--student", "yolov8n.yaml", "--cache", few_cache, "--loss", spec, *QUICK)


@pytest.mark.parametrize("share", ["2", "-0.1", "nan"])
def test_a_balance_out_of_range_is_refused(refused: Refused, few_cache: Path, share: str) -> None:
    words = ["train", "--student", "yolov8n.yaml", "--cache", few_cache, "--loss", "cwd", "--balance", share, *QUICK]
    assert f"--balance {share}; allowed: finite numbers from 0 to 0.9" in refused(*words)


TOY = """
from cache_kd.losses import LOSSES, DistillLoss

class Toy(DistillLoss):
    name = "toy"
    title = "the size of the first map"
    paper = "none"
    needs = frozenset({"features"})
    default_weight = 0.5
    cost = "nothing"

    def term(self, student, targets):
        return (student.features[0].mean() - targets.features[0].mean()).square()

LOSSES["toy"] = Toy
"""


def test_a_loss_of_the_users_own_file_is_trained_and_resumed(
    few_cache: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))  # the file adds to this copy
    (work / "my_loss.py").write_text(TOY)
    train = ["train", "--student", "yolov8n.yaml", "--cache", few_cache]
    unknown = run(*train, "--loss", "toy", *QUICK)
    assert unknown.exit_code == 1 and "no loss 'toy'" in unknown.stderr
    done = run(*train, "--import", "my_loss.py", "--loss", "toy", *QUICK)
    assert done.exit_code == 0, done.stderr
    assert "losses: toy:weight=0.5" in done.stdout
    folder = work / "runs" / "detect" / "train"
    header, row = (folder / "results.csv").read_text().splitlines()
    values = dict(zip(header.split(","), row.split(","), strict=True))
    assert float(values["train/toy_loss"]) > 0
    # Known at once, the run is refused for what it is: finished.
    last = folder / "weights" / "last.pt"
    losses.LOSSES.pop("toy")
    again = run("train", "--import", "my_loss.py", "--loss", "toy", f"resume={last}")
    assert again.exit_code == 1 and "is finished" in again.stderr, again.stderr


def test_a_loss_given_twice_is_refused(refused: Refused, few_cache: Path) -> None:
    line = refused(
        "train", "--student", "yolov8n.yaml", "--cache", few_cache, "--loss", "cwd", "--loss", "cwd:weight=2"
    )
    assert "loss cwd is given 2 times" in line


@pytest.mark.parametrize(("store", "loss", "need"), [("logits", "cwd", "features"), ("features", "ld", "logits")])
def test_a_loss_whose_targets_the_cache_lacks_is_refused(
    refused: Refused, teacher: Path, few_images: Path, store: str, loss: str, need: str
) -> None:
    done = run("extract", "--teacher", teacher, "--data", few_images, *SMALL, "--store", store, "--cache", "cache")
    assert done.exit_code == 0, done.output
    line = refused("train", "--student", "yolov8n.yaml", "--cache", "cache", "--loss", loss, *QUICK)
    assert f"loss {loss} needs {need}, and the cache was extracted with --store {store}; " in line
    assert "cache-kd extract --teacher yolov8s-bccd.pt " in line and line.endswith(" --store features,logits")


def test_ld_is_refused_where_boxes_are_no_distributions(
    refused: Refused, few_images: Path, few_cache: Path, tmp_path: Path
) -> None:
    file = save_model(build_model("yolo26n.yaml"), tmp_path / "yolo26n-mine.pt")
    done = run("extract", "--teacher", file, "--data", few_images, *SMALL, "--cache", "cache")
    assert done.exit_code == 0, done.output
    line = refused("train", "--student", "yolo26n.yaml", "--cache", "cache", "--loss", "ld", *QUICK)
    assert "the teacher's reg_max is 1, the student's 1; allowed: equal and at least 2; use --loss bckd" in line
    line = refused("train", "--student", "yolov8n.yaml", "--cache", "cache", "--loss", "ld", *QUICK)
    assert "the teacher's reg_max is 1, the student's 16" in line
    line = refused("train", "--student", "yolo26n.yaml", "--cache", few_cache, "--loss", "ld", *QUICK)
    assert "the teacher's reg_max is 16, the student's 1" in line
