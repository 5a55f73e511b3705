"""HO's critic and MGD's masks in real trainings: trained apart, kept beside the checkpoint, gone on with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from student_runs import ENDED, Interrupt, Run, differing, distiller_tensors, flat, interrupt_at, resume, train_student
from torch import Tensor
from ultralytics.utils.torch_utils import unwrap_model

from cache_kd.losses import mgd
from cache_kd.ultralytics_bridge.trainer import DistillTrainer

BATCHES, LEVELS, EPOCHS = 3, 3, 3
STEPS = 2 * BATCHES
CRITICS = "terms.ho.critics."
MOMENTS = "terms.ho._extra_state.optimizer."


@dataclass(frozen=True)
class Interrupted:
    """A run of three epochs with `ho` and `mgd` that ended within its last.

    Attributes:
        begun: the distiller before the first step. held: what the sidecar file holds. masks: of every level and step.
    """

    folder: Path
    begun: dict[str, Tensor]
    held: dict[str, Tensor]
    masks: list[Tensor]
    in_optimizer: set[int]
    critics: set[int]


def kept_masks(patch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list to which MGD's masks are added as they are used."""
    found: list[Tensor] = []
    original = mgd.mgd_loss

    def keep(*maps: Tensor, mask: Tensor, **options: Any) -> Tensor:
        found.append(mask.clone())
        return original(*maps, mask=mask, **options)

    patch.setattr(mgd, "mgd_loss", keep)
    return found


@pytest.fixture(scope="module")
def interrupted(few_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    project = tmp_path_factory.mktemp("ho")
    begun: list[dict[str, Tensor]] = []
    ids: list[set[int]] = []
    end = interrupt_at(2, 1)

    def look(trainer: DistillTrainer, batch: dict[str, Any]) -> None:
        if not begun:
            begun.append(distiller_tensors(trainer))
            ids.append({id(p) for group in trainer.optimizer.param_groups for p in group["params"]})
            ids.append({id(p) for p in unwrap_model(trainer.model).kd.losses["ho"].critics.parameters()})
        end(trainer, batch)

    with pytest.MonkeyPatch.context() as patch:
        masks = kept_masks(patch)
        with pytest.raises(Interrupt, match=ENDED):
            train_student(few_cache, project, "ho", "mgd", epochs=EPOCHS, before_batch=look)
    held = torch.load(project / "train" / "weights" / "kd_last.pt", weights_only=True)
    return Interrupted(project / "train", begun[0], flat(held["state"]), masks, *ids)


@dataclass(frozen=True)
class Resumed:
    """That run, resumed to its end: the distiller before the first step, and MGD's masks."""

    run: Run
    first: dict[str, Tensor]
    masks: list[Tensor]


def resumed(interrupted: Interrupted, folder: Path) -> Resumed:
    """Resume a copy of the run."""
    first: list[dict[str, Tensor]] = []

    def keep(trainer: DistillTrainer, _: dict[str, Any]) -> None:
        if not first:
            first.append(distiller_tensors(trainer))

    with pytest.MonkeyPatch.context() as patch:
        masks = kept_masks(patch)
        run = resume(Path(shutil.copytree(interrupted.folder, folder / "train")), before_batch=keep)
    return Resumed(run, first[0], masks)


@pytest.fixture(scope="module")
def gone_on(interrupted: Interrupted, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    return resumed(interrupted, tmp_path_factory.mktemp("gone_on"))


def test_critics_are_trained_by_their_own_optimizer(interrupted: Interrupted) -> None:
    assert interrupted.critics and not interrupted.critics & interrupted.in_optimizer
    critics = {name for name in interrupted.held if name.startswith(CRITICS)}
    parameters = {name for name in critics if not name.endswith(("._u", "._v"))}
    still = {name for name in parameters if torch.equal(interrupted.held[name], interrupted.begun[name])}
    # On maps of so few cells a critic's attention sees one, of which query and key can tell nothing.
    assert parameters and still == {name for name in parameters if ".query." in name or ".key." in name}


def test_the_sidecar_holds_critics_and_their_moments(interrupted: Interrupted) -> None:
    moments = {name for name in interrupted.held if name.startswith(MOMENTS)}
    assert {name.rpartition(".")[2] for name in moments} == {"step", "exp_avg", "exp_avg_sq"}
    trained = [name for name in moments if name.endswith(".step")]
    assert len(trained) > 10 and {float(interrupted.held[name]) for name in trained} == {STEPS}
    assert int(interrupted.held["terms.ho.step"]) == int(interrupted.held["terms.mgd.step"]) == STEPS
    for name in ("terms.ho.seed", "terms.mgd.seed"):
        assert torch.equal(interrupted.held[name], interrupted.begun[name])


def test_a_resumed_run_goes_on_with_critics_moments_and_masks(interrupted: Interrupted, gone_on: Resumed) -> None:
    assert differing(gone_on.first, interrupted.held) == []
    after = gone_on.run.adapters
    moments = [name for name in interrupted.held if name.startswith(MOMENTS) and interrupted.held[name].any()]
    assert moments and all(not torch.equal(after[name], interrupted.held[name]) for name in moments)
    steps = {int(value) for name, value in after.items() if name.startswith(MOMENTS) and name.endswith(".step")}
    assert steps == {EPOCHS * BATCHES}

    assert len(gone_on.masks) == BATCHES * LEVELS
    # The interrupted run had done one step more than it could save: the resumed one draws that step's masks again.
    again = interrupted.masks[STEPS * LEVELS :]
    assert len(again) == LEVELS
    assert all(torch.equal(*pair) for pair in zip(again, gone_on.masks[:LEVELS], strict=True))
    assert not torch.equal(interrupted.masks[0], gone_on.masks[0])


def test_two_resumes_of_one_checkpoint_go_on_alike(interrupted: Interrupted, gone_on: Resumed, tmp_path: Path) -> None:
    torch.manual_seed(1234)  # neither critic nor mask follows the program's own stream
    other = resumed(interrupted, tmp_path)
    assert differing(other.run.adapters, gone_on.run.adapters) == []
    assert differing(other.run.student, gone_on.run.student) == []
    assert all(torch.equal(*pair) for pair in zip(other.masks, gone_on.masks, strict=True))


@pytest.mark.slow
def test_without_their_moments_critics_go_elsewhere(interrupted: Interrupted, gone_on: Resumed, tmp_path: Path) -> None:
    """What is compared above does depend on what the sidecar file holds."""
    folder = Path(shutil.copytree(interrupted.folder, tmp_path / "train"))
    sidecar = folder / "weights" / "kd_last.pt"
    held = torch.load(sidecar, weights_only=True)
    held["state"]["terms.ho._extra_state"] = {"optimizer": {}}
    torch.save(held, sidecar)
    changed, expected = resume(folder).adapters, gone_on.run.adapters
    critics = [name for name in expected if name.startswith(CRITICS) and name.endswith(".bias")]
    assert critics and not all(torch.equal(changed[name], expected[name]) for name in critics)
