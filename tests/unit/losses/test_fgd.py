"""FGD: masks by hand, the four terms against their formula, context blocks, and the module's boxes and training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from function_suite import FunctionSuite, draw
from reference_math import RTOL, numbers, softmax, tensors
from torch import Tensor, nn

from cache_kd.errors import MismatchError, SettingError
from cache_kd.losses import fgd
from cache_kd.losses.fgd import FGD, FGDTerms, GcBlock, fgd_loss

Cases = Callable[..., Any]
BOXES = [draw(2, 4, seed=5).abs().cumsum(-1), torch.zeros(0, 4)]


def bend(maps: Tensor) -> Tensor:
    return maps + maps.mean((2, 3), keepdim=True).sin()


def total(student: Tensor, teacher: Tensor) -> Tensor:
    # Weights that let every term be seen.
    options = {"alpha": 0.2, "beta": 0.3, "gamma": 0.5, "lambda_": 0.1}
    terms = fgd_loss(student, teacher, BOXES, relation_student=bend, relation_teacher=bend, **options)
    return torch.stack(terms).sum()


class TestFgd(FunctionSuite):
    call = staticmethod(total)
    student, teacher = draw(2, 3, 3, 5), draw(2, 3, 3, 5, seed=1)


# Masks, read off the terms: maps of ones have attention 1 everywhere, and the difference is 1.


def identity_terms(student: Tensor, teacher: Tensor, boxes: list[Tensor], **options: float) -> FGDTerms:
    return fgd_loss(student, teacher, boxes, relation_student=nn.Identity(), relation_teacher=nn.Identity(), **options)


def masks_of(boxes: list[Tensor], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return M_fg and M_bg, (N, H, W) each, as the slopes of the terms."""
    student = torch.zeros(len(boxes), 1, height, width, dtype=torch.float64, requires_grad=True)
    terms = identity_terms(student, torch.ones_like(student), boxes, alpha=1.0, beta=1.0)
    foreground, background = (
        torch.autograd.grad(term, student, retain_graph=True)[0][:, 0].numpy() * -len(boxes) / 2 for term in terms[:2]
    )
    return foreground, background


def looped_masks(boxes: list[np.ndarray], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    foreground, background = (np.zeros((len(boxes), height, width)) for _ in range(2))
    for n, rows in enumerate(boxes):
        for x0, y0, x1, y1 in rows:
            left, right = (min(max(side, 0), width) for side in (np.floor(x0), np.ceil(x1)))
            top, bottom = (min(max(side, 0), height) for side in (np.floor(y0), np.ceil(y1)))
            value = 1 / ((bottom - top + 1) * (right - left + 1))
            for y, x in np.ndindex(height, width):
                if np.floor(x0) <= x <= np.ceil(x1) and np.floor(y0) <= y <= np.ceil(y1):
                    foreground[n, y, x] = max(foreground[n, y, x], value)
        cells = (foreground[n] == 0).sum()
        for y, x in np.ndindex(height, width):
            background[n, y, x] = 1 / cells if foreground[n, y, x] == 0 else 0
    return foreground, background


def test_mask_by_hand() -> None:
    # Columns 1..3 and rows 0..1, six cells; the second box, one column and two rows, is smaller and wins.
    boxes = torch.tensor([[1.4, 0.2, 2.6, 0.9], [2.0, 1.1, 2.0, 1.5]])
    foreground, background = masks_of([boxes], 3, 5)
    a, b = 1 / 6, 1 / 2
    np.testing.assert_allclose(foreground[0], [[0, a, a, a, 0], [0, a, b, a, 0], [0, 0, b, 0, 0]])
    np.testing.assert_allclose(background[0], (foreground[0] == 0) / 8)


@pytest.mark.parametrize(
    ("box", "cells", "value"),
    [
        ((2.0, 1.0, 2.0, 1.0), [(1, 2)], 1.0),
        ((2.3, 1.0, 2.3, 1.0), [(1, 2), (1, 3)], 1 / 2),
        # To the map's edges: one row and column more than there are cells, as the authors count.
        ((4.0, 2.0, 5.0, 3.0), [(2, 4)], 1 / 4),
        ((4.5, 2.5, 9.0, 7.0), [(2, 4)], 1 / 4),
        ((-3.0, -2.0, 0.0, 0.5), [(0, 0), (1, 0)], 1 / 2),
        ((-1.0, -1.0, 7.0, 9.0), [(y, x) for y in range(3) for x in range(5)], 1 / 24),
        ((6.0, 0.0, 8.0, 2.0), [], 0.0),
        ((-4.0, 0.0, -1.5, 2.0), [], 0.0),
    ],
)
def test_cells_of_one_box(box: tuple[float, ...], cells: list[tuple[int, int]], value: float) -> None:
    foreground, background = masks_of([torch.tensor([box])], 3, 5)
    assert [tuple(cell) for cell in np.argwhere(foreground[0]).tolist()] == cells
    np.testing.assert_allclose(foreground[foreground > 0], value)
    np.testing.assert_allclose(background[0], (foreground[0] == 0) / max(15 - len(cells), 1))


def test_images_without_boxes_are_background() -> None:
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    foreground, background = masks_of([torch.zeros(0, 4), box, torch.zeros(0, 4)], 2, 3)
    assert not foreground[[0, 2]].any() and foreground[1].any()
    np.testing.assert_allclose(background[[0, 2]], 1 / 6)
    foreground, background = masks_of([torch.zeros(0, 4)] * 2, 2, 3)
    assert not foreground.any()
    np.testing.assert_allclose(background, 1 / 6)


def random_boxes(seed: int) -> list[np.ndarray]:
    """Return boxes of three images, the middle one with none; many reach over a map of 7 x 9 cells, some are points."""
    rng = np.random.default_rng(seed)
    centre, side = rng.uniform(-2, 11, (12, 2)), rng.exponential(3, (12, 2))
    side[2], centre[3] = 0, centre[3].round()
    rows = np.concatenate((centre - side / 2, centre + side / 2), 1)
    return [rows[:8], rows[:0], rows[8:]]


@pytest.mark.parametrize("seed", range(8))
def test_masks_equal_loops(seed: int) -> None:
    boxes = random_boxes(seed)
    for found, expected in zip(masks_of(tensors(*boxes), 7, 9), looped_masks(boxes, 7, 9), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("limit", [1, 3 * 7 * 9 * 3])
def test_chunks_change_nothing(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = tensors(*random_boxes(0))
    whole = masks_of(boxes, 7, 9)
    monkeypatch.setattr(fgd, "MAX_CELLS", limit)
    np.testing.assert_array_equal(masks_of(boxes, 7, 9), whole)


# The terms.


def attention(maps: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Of one image (F, H, W): over cells and over channels."""
    channels, height, width = maps.shape
    cells = np.array([np.mean([abs(maps[c, y, x]) for c in range(channels)]) for y, x in np.ndindex(height, width)])
    sizes = np.array([np.mean([abs(value) for value in maps[c].ravel()]) for c in range(channels)])
    spread = height * width * softmax(cells / temperature)
    return spread.reshape(height, width), channels * softmax(sizes / temperature)


def four_terms(
    student: np.ndarray,
    teacher: np.ndarray,
    boxes: list[np.ndarray],
    related: tuple[np.ndarray, np.ndarray],
    temperature: float = 0.5,
    alpha: float = 2e-3,
    beta: float = 1e-3,
    gamma: float = 1e-3,
    lambda_: float = 1e-5,
) -> list[float]:
    images = len(student)
    foreground, background = looped_masks(boxes, *student.shape[2:])
    terms = [0.0] * 4
    for n in range(images):
        our_cells, our_channels = attention(student[n], temperature)
        cells, channels = attention(teacher[n], temperature)
        for c, y, x in np.ndindex(*student.shape[1:]):
            gap = cells[y, x] * channels[c] * (student[n, c, y, x] - teacher[n, c, y, x]) ** 2
            terms[0] += alpha / images * foreground[n, y, x] * gap
            terms[1] += beta / images * background[n, y, x] * gap
        terms[2] += gamma / images * (np.abs(our_cells - cells).sum() + np.abs(our_channels - channels).sum())
    terms[3] = lambda_ / images * ((related[0] - related[1]) ** 2).sum()
    return terms


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "alpha": 1.0, "beta": 0.5, "gamma": 3.0, "lambda_": 0.1}])
def test_equals_the_formula(options: dict[str, float]) -> None:
    student, teacher = numbers(3, 4, 7, 9, seed=0), numbers(3, 4, 7, 9, seed=1)
    boxes = random_boxes(1)
    expected = four_terms(student, teacher, boxes, (student + 1, 2 * teacher), **options)
    found = fgd_loss(
        *tensors(student, teacher),
        tensors(*boxes),
        relation_student=lambda maps: maps + 1,
        relation_teacher=lambda maps: 2 * maps,
        **options,
    )
    assert isinstance(found, tuple) and len(found) == 4
    assert [term.item() for term in found] == pytest.approx(expected, rel=RTOL)
    assert [found.foreground, found.background, found.attention, found.relation] == list(found)


def test_attention_slopes_only_in_its_own_term() -> None:
    """The gaps are weighted by the teacher's attention, a constant: their slope is that of the squares alone."""
    student, teacher = draw(1, 3, 2, 4).requires_grad_(), draw(1, 3, 2, 4, seed=1)
    terms = identity_terms(student, teacher, [torch.zeros(0, 4)], beta=1.0)
    (slope,) = torch.autograd.grad(terms.background, student, retain_graph=True)
    cells, channels = (torch.from_numpy(values) for values in attention(teacher[0].numpy(), 0.5))
    expected = 2 * (student - teacher)[0] * cells * channels[:, None, None] / 8
    torch.testing.assert_close(slope[0], expected.detach())
    assert torch.autograd.grad(terms.attention, student)[0].abs().sum() > 1e-3


def test_boxes_get_no_gradient() -> None:
    boxes = [torch.tensor([[0.2, 0.3, 2.2, 1.7]], requires_grad=True)]
    student = draw(1, 3, 2, 4).requires_grad_()
    sum(identity_terms(student, draw(1, 3, 2, 4, seed=1), boxes)).backward()
    assert boxes[0].grad is None


def test_boxes_of_other_images_are_refused() -> None:
    with pytest.raises(MismatchError, match="boxes are of 1 images; allowed: one tensor an image, 2"):
        identity_terms(TestFgd.student, TestFgd.teacher, BOXES[:1])


def test_no_images_give_differentiable_zeros() -> None:
    student = torch.zeros(0, 3, 2, 4, requires_grad=True)
    terms = identity_terms(student, student.detach(), [])
    sum(terms).backward()
    assert [term.item() for term in terms] == [0] * 4 and student.grad is not None


# Context blocks.


def shaken(block: GcBlock, seed: int) -> GcBlock:
    """Give every parameter a random value; a new block is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in block.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
    return block


def context(maps: np.ndarray, block: GcBlock) -> np.ndarray:
    """One image (F, H, W) through a block."""
    state = {key: value.detach().double().numpy().squeeze() for key, value in block.state_dict().items()}
    channels = len(maps)
    cells = maps.reshape(channels, -1)
    share = softmax(np.array([sum(state["attention.weight"] * cells[:, j]) for j in range(cells.shape[1])]))
    vector = sum(share[j] * cells[:, j] for j in range(cells.shape[1]))
    hidden = state["transform.0.weight"] @ vector + state["transform.0.bias"]
    hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5)
    hidden = np.maximum(hidden * state["transform.1.weight"] + state["transform.1.bias"], 0)
    added = state["transform.3.weight"] @ hidden + state["transform.3.bias"]
    return maps + added[:, None, None]


def test_context_block_equals_its_formula() -> None:
    block = shaken(GcBlock(6), 0).double()
    maps = numbers(2, 6, 3, 5, seed=0)
    assert block.transform[0].out_channels == 3
    expected = np.stack([context(image, block) for image in maps])
    np.testing.assert_allclose(block(torch.from_numpy(maps)).detach().numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("channels", [1, 2, 7])
def test_context_block_starts_as_the_identity(channels: int) -> None:
    maps = draw(2, channels, 3, 5).float()
    assert torch.equal(GcBlock(channels)(maps), maps)


# The module.


def module_terms(case: Any, loss: FGD, **options: float) -> np.ndarray:
    """Return the four terms summed over the levels."""
    labels = case.targets.labels
    rows = [labels.boxes.detach()[labels.image == n].numpy() for n in range(2)]
    sums = np.zeros(4)
    for level, adapter in enumerate(loss.adapters):
        ours = adapter(case.output.features[level]).detach().numpy()
        theirs = case.targets.features[level].detach().numpy()
        blocks = ((ours, loss.relations_student[level]), (theirs, loss.relations_teacher[level]))
        related = tuple(np.stack([context(image, block) for image in maps]) for maps, block in blocks)
        sums += four_terms(ours, theirs, [boxes / (8 << level) for boxes in rows], related, **options)
    return sums


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "alpha": 0.3, "beta": 0.2, "gamma": 0.0, "lambda_": 1.0}])
def test_module(options: dict[str, float], make_case: Cases) -> None:
    case = make_case(dtype=torch.float64)
    loss = FGD(case.teacher, case.student, **options).double()
    assert [type(adapter) for adapter in loss.adapters] == [nn.Conv2d, nn.Identity, nn.Conv2d]
    blocks = [block for block in loss.modules() if isinstance(block, GcBlock)]
    assert len({id(block) for block in blocks}) == 6
    for seed, block in enumerate(blocks):
        shaken(block, seed)
    expected = module_terms(case, loss, **options).sum()
    assert loss(case.output, case.targets).item() == pytest.approx(expected, rel=RTOL)


def test_both_context_blocks_are_trained(make_case: Cases) -> None:
    case = make_case()
    torch.manual_seed(0)
    loss = FGD(case.teacher, case.student, lambda_=1.0)
    for _ in range(2):
        loss.zero_grad()
        loss(case.output, case.targets).backward()
        last = {key for key, value in loss.named_parameters() if value.grad.abs().max() > 0}
        with torch.no_grad():
            for value in loss.parameters():
                value -= 1e-3 * value.grad
    assert all(features.grad is None for features in case.targets.features)
    assert last == {key for key, _ in loss.named_parameters()}
    first_of_each = {key.split(".")[0] for key in last}
    assert first_of_each == {"adapters", "relations_student", "relations_teacher"}


def test_a_batch_without_objects_is_all_background(make_case: Cases) -> None:
    case = make_case(dtype=torch.float64)
    labels = case.targets.labels
    none = replace(labels, image=labels.image[:0], cls=labels.cls[:0], boxes=labels.boxes[:0])
    empty = replace(case, targets=replace(case.targets, labels=none))
    loss = FGD(case.teacher, case.student, gamma=0.0, lambda_=0.0).double()
    expected = module_terms(empty, loss, gamma=0.0, lambda_=0.0)
    assert expected[0] == 0 and expected[1] > 0
    assert loss(empty.output, empty.targets).item() == pytest.approx(expected.sum(), rel=RTOL)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("temperature", 0.0, "above 0"),
        ("alpha", -1.0, "from 0"),
        ("beta", -1.0, "from 0"),
        ("gamma", float("inf"), "from 0"),
        ("lambda_", -1e-9, "from 0"),
    ],
)
def test_options_out_of_range(option: str, value: float, allowed: str, make_case: Cases) -> None:
    case = make_case()
    with pytest.raises(SettingError, match=rf"loss fgd: {option}=.* allowed: finite numbers {allowed}"):
        FGD(case.teacher, case.student, **{option: value})
