"""Every engine does every unit once, survives its workers, gives up what kills them, and ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from dummy_workers import Numbers

from cache_kd.engines import processes
from cache_kd.engines.board import Advanced, Board, Done, Engine, Event, Failed, GivenUp, Lost
from cache_kd.engines.local import LocalEngine
from cache_kd.engines.processes import ProcessesEngine
from cache_kd.errors import DiskSpaceError

UNITS = tuple(range(6))


def engine(kind: str, worker: Numbers, count: int = 2) -> Engine:
    return LocalEngine(worker()) if kind == "local" else ProcessesEngine([worker] * count)


def run(made: Engine, board: Board) -> list[Event]:
    events: list[Event] = []
    made.run(board, events.append)
    return events


def done(folder: Path) -> set[int]:
    return {int(file.name.split("-")[1]) for file in folder.glob("done-*")}


# -- the board ------------------------------------------------------------------------------------------------------


def test_a_unit_is_held_by_one_worker_at_a_time() -> None:
    board = Board(UNITS)
    taken = [board.take(number % 3) for number in range(8)]
    assert taken == [0, 1, 2, 3, 4, 5, None, None]
    assert not board.finished
    for unit in UNITS:
        board.tell(unit % 3, Done(unit))
    assert board.finished and board.take(0) is None


def test_what_failed_comes_last_and_alone() -> None:
    board = Board((0, 1, 2, 3))
    assert [board.take(0), board.take(0)] == [0, 1]
    board.tell(0, Done(0))
    board.tell(0, Failed(1, "no"))
    assert [board.take(0), board.take(0), board.take(0)] == [2, 3, None], "not beside others"
    board.tell(0, Done(2))
    board.tell(0, Done(3))
    assert [board.take(0), board.take(0)] == [1, None]
    board.tell(0, GivenUp(1, "no"))
    assert board.finished and board.given_up == {1: "no"} and board.faults == {1: "no"}


def test_what_a_dead_worker_held_is_tried_by_another_one_at_a_time() -> None:
    board = Board((0, 1, 2))
    board.take(0), board.take(0)
    assert board.lose(0, "killed") == [Lost(0, "killed"), Lost(1, "killed")]
    assert board.take(1) == 2
    board.tell(1, Done(2))
    assert [board.take(1), board.take(1)] == [0, None]
    board.tell(1, Done(0))
    assert board.take(1) == 1 and not board.finished
    board.tell(1, Done(1))
    assert board.finished and not board.faults


def test_progress_counts_what_is_done_and_in_work_and_never_twice() -> None:
    board = Board((0, 1), {0: 10, 1: 4})
    board.take(0), board.take(1)
    board.tell(0, Advanced(0, 6))
    board.tell(1, Advanced(1, 4))
    assert board.items_done == 10
    board.lose(0, "killed")
    assert board.items_done == 4
    board.tell(1, Done(1))
    board.take(1)
    board.tell(1, Advanced(0, 10))
    board.tell(1, Done(0))
    board.tell(0, Done(0))
    assert board.items_done == 14


def test_a_board_on_which_everything_fails_is_hopeless() -> None:
    board = Board(UNITS)
    for unit in range(3):
        assert not board.hopeless
        board.take(0)
        board.tell(0, Failed(unit, "no"))
    assert board.hopeless == "the first 3 units failed" and board.take(0) is None


def test_one_success_is_hope() -> None:
    board = Board(UNITS)
    for unit in range(5):
        board.take(0)
        board.tell(0, Done(unit) if unit == 0 else Failed(unit, "no"))
    assert not board.hopeless


# -- both engines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["local", "processes"])
@pytest.mark.parametrize("ahead", [1, 3])
def test_all_units_are_done_and_told(kind: str, ahead: int, tmp_path: Path) -> None:
    board = Board(UNITS, dict.fromkeys(UNITS, 2))
    events = run(engine(kind, Numbers(tmp_path, {}, ahead)), board)
    assert done(tmp_path) == {*UNITS} and board.finished and board.items_done == 12
    assert sorted(event.unit for event in events if isinstance(event, Done)) == list(UNITS)


@pytest.mark.parametrize("kind", ["local", "processes"])
def test_a_unit_that_fails_is_given_up_after_three_attempts_and_the_rest_is_done(kind: str, tmp_path: Path) -> None:
    board = Board(UNITS)
    run(engine(kind, Numbers(tmp_path, {2: "fail", 4: "once"}, ahead=2)), board)
    assert done(tmp_path) == {0, 1, 3, 4, 5}
    assert len(list(tmp_path.glob("attempt-2-*"))) == 3 and len(list(tmp_path.glob("attempt-4-*"))) == 2
    assert board.given_up == {2: "tried three times"}


@pytest.mark.parametrize("kind", ["local", "processes"])
def test_what_would_end_every_worker_ends_the_run(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DiskSpaceError, match=r"^the disk is full$"):
        run(engine(kind, Numbers(tmp_path, {3: "full"})), Board(UNITS))
    assert multiprocessing.active_children() == []


# -- processes ------------------------------------------------------------------------------------------------------


def test_processes_share_the_units(tmp_path: Path) -> None:
    run(ProcessesEngine([Numbers(tmp_path, {}, wait=0.3)] * 2), Board(UNITS))
    assert len({file.read_text() for file in tmp_path.glob("done-*")}) == 2
    assert not (tmp_path / f"made-{os.getpid()}").exists()


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_unit_that_kills_its_process_is_given_up_and_the_rest_is_done(ahead: int, tmp_path: Path) -> None:
    board = Board(UNITS)
    events = run(ProcessesEngine([Numbers(tmp_path, {1: "kill"}, ahead)] * 2), board)
    assert done(tmp_path) == {0, 2, 3, 4, 5} and board.given_up == {1: "tried three times"}
    lost = [event for event in events if isinstance(event, Lost) and event.unit == 1]
    assert [event.reason for event in lost] == ["its process was killed by SIGKILL"] * 3
    assert len(list(tmp_path.glob("made-*"))) >= 4


def test_the_words_of_a_process_that_crashes_are_kept(tmp_path: Path) -> None:
    board = Board(UNITS)
    events = run(ProcessesEngine([Numbers(tmp_path, {5: "crash"})]), board)
    assert {event.reason for event in events if isinstance(event, Lost)} == {"RuntimeError: out of memory"}
    assert done(tmp_path) == {0, 1, 2, 3, 4}


def test_workers_that_cannot_begin_are_not_started_for_ever(tmp_path: Path) -> None:
    board = Board(UNITS)
    run(ProcessesEngine([Numbers(tmp_path, {-1: "die"})]), board)
    assert board.hopeless == "every worker ended before it began a unit: its process ended with code 7"


def test_an_interrupt_ends_every_process_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 20.0)
    board, began = Board(tuple(range(100))), time.monotonic()

    def interrupt() -> None:
        while len(list(tmp_path.glob("attempt-*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background jobs ignore interrupts
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            run(ProcessesEngine([Numbers(tmp_path, {}, wait=30.0)] * 2), board)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert time.monotonic() - began < 15
    assert multiprocessing.active_children() == []


def test_no_more_processes_than_units(tmp_path: Path) -> None:
    run(ProcessesEngine([Numbers(tmp_path, {})] * 4), Board((0,)))
    assert len(list(tmp_path.glob("made-*"))) == 1
    assert [
        event for event in run(ProcessesEngine([Numbers(tmp_path, {})]), Board(())) if not isinstance(event, GivenUp)
    ] == []
