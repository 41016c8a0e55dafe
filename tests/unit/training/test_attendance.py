"""Who is missing, by the notes that the ranks left; real processes are stopped in tests/distributed."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch.distributed as dist

from toolkit.training import attendance
from toolkit.training.attendance import Attendance


@pytest.fixture
def ranks():
    store = dist.HashStore()
    return [Attendance(store, rank, 12) for rank in range(12)]


def note(ranks, *, where: str, action: str) -> None:
    for rank in ranks:
        rank.where = where
        rank.note(action)


def test_nobody_is_missing_where_all_came_as_far(ranks):
    note(ranks, where="update 1", action="sum gradients")
    assert ranks[3].describe_missing() == ""


def test_those_that_came_less_far_are_named(ranks):
    note(ranks, where="update 1", action="gather objects")
    note(ranks[:10], where="update 2", action="sum gradients")
    assert ranks[0].describe_missing() == (
        "processes 10, 11, whose last sign of life came from update 1 (gather objects)"
    )
    note(ranks[:9], where="update 3", action="sum gradients")
    said = ranks[0].describe_missing()
    assert said.startswith("processes 9 (last seen in update 2 (sum gradients)), 10 (last seen in update 1 (gather ")
    # for one that is behind itself, the others are not missing
    assert ranks[11].describe_missing() == ""


def test_of_many_some_are_named(ranks):
    note(ranks[:1], where="", action="send an object")
    expected = "processes 1, 2, 3, 4, 5, 6, 7, 8 and 3 more, which have given no sign of life"
    assert ranks[0].describe_missing() == expected


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch):
    class Silent:
        def set(self, key: str, value: str) -> None: ...

        def check(self, keys: list[str]) -> bool:
            return threading.Event().wait(30)

    monkeypatch.setattr(attendance, "ANSWER_SECONDS", 0.05)
    assert "perhaps process 0" in Attendance(Silent(), 1, 2).describe_missing()
    assert Attendance(Silent(), 0, 2).describe_missing() == ""


def test_a_store_that_has_gone_hides_no_error():
    class Gone:
        def set(self, key: str, value: str) -> None:
            raise dist.DistNetworkError("Broken pipe")

        def check(self, keys: list[str]) -> bool:
            raise dist.DistNetworkError("Broken pipe")

    lost = Attendance(Gone(), 1, 2)
    with pytest.warns(UserWarning, match=r"^Process 1 of 2 cannot reach the store .* ended \(Broken pipe\); it goes"):
        lost.note("sum gradients")
    assert "perhaps process 0" in lost.describe_missing()


def test_a_store_that_has_gone_is_told_once_and_asked_no_more(capfd):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    lost = Attendance(dist.PrefixStore("a", dist.TCPStore("127.0.0.1", server.port, is_master=False)), 1, 2)
    lost.note("sum gradients")
    del server  # it ends with its last name
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(1000):  # the first after the end may still be taken by the system
            lost.note("sum gradients")
            if said:
                break
        capfd.readouterr()
        for _ in range(10):
            lost.note("sum gradients")
        lost.describe_missing()
    assert capfd.readouterr().err == "", "torch prints its stack whenever it is asked"
    assert len(said) == 1
