"""A profile of a real run, and how events become costs."""

import json
import re
import signal
from types import SimpleNamespace

import torch
from torch.autograd import DeviceType

from tests.faults.real_runs import PRETRAINING, Stop, pretraining_words, run_forked, run_here
from toolkit.training.profiling import UpdateProfiler, profile_updates, read_events


def test_a_recipe_writes_table_and_trace_and_says_where(tmp_path):
    ended = run_here(PRETRAINING, pretraining_words(tmp_path / "run", max_updates=5, profile="True"))
    assert ended.code == 0, ended.stderr
    table = (tmp_path / "run" / "profile.txt").read_text()
    shares = [float(share) for share in re.findall(r"^ *([\d.]+)% +[\d.]+ +[\d.]+  \S", table, re.MULTILINE)]
    assert table.startswith("2 updates of ") and len(shares) > 10
    assert shares == sorted(shares, reverse=True) and 5 < sum(shares) < 150
    assert "aten::" in table and "waits of the host" not in table
    trace = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert any(event.get("name") == "aten::addmm" or event.get("name") == "aten::mm" for event in trace["traceEvents"])
    said = ended.stderr + ended.stdout
    assert "profile of 2 updates (" in said and f"table in {tmp_path / 'run' / 'profile.txt'}" in said


def test_a_stop_within_the_profiled_updates_ends_as_any_other(tmp_path):
    """Left open, torch's profiler brings the process down as it ends."""
    words = pretraining_words(tmp_path / "run", max_updates=9, profile="True")
    (ended,) = run_forked(PRETRAINING, words, stop=Stop(2, 1, signal.SIGTERM))
    assert ended.code == 75 and "told to stop: saved at update 3" in ended.stderr, ended.stderr[-2000:]
    assert (tmp_path / "run" / "profile.txt").read_text().startswith("1 updates of ")


def test_a_run_too_short_for_a_profile_says_so(tmp_path):
    said = []
    profiler = UpdateProfiler(tmp_path, say=said.append)
    profiler.step()
    profiler.close()
    profiler.close()
    assert len(said) == 1 and "this session made 1" in said[0] and not list(tmp_path.iterdir())


def test_a_run_that_ends_early_writes_what_it_has(tmp_path):
    said = []
    profiler = UpdateProfiler(tmp_path, say=said.append, skip=1, count=10)
    for _ in range(3):
        torch.ones(64, 64) @ torch.ones(64, 64)
        profiler.step()
    profiler.close()
    assert len(said) == 1 and said[0].startswith("profile of 2 updates")
    assert (tmp_path / "profile.txt").read_text().startswith("2 updates")


def test_off_it_does_nothing(tmp_path):
    profiler = UpdateProfiler(None)
    for _ in range(9):
        profiler.step()
    profiler.close()


def test_the_largest_costs_come_first():
    left = torch.randn(300, 300)
    profile, _ = profile_updates(
        lambda: (left @ left, left + 1), updates=2, synchronize=lambda: None, on_device=False
    )
    first = profile.largest(3)[0]
    assert first["name"] == "aten::mm" and first["calls"] == 1 and 0 < first["share"] <= 1
    assert profile.waits == {} and profile.updates == 2


def event(key, *, kind=DeviceType.CUDA, count=2, device=0.0, host=0.0):
    """What torch's profiler gives for one name."""
    return SimpleNamespace(
        key=key, device_type=kind, count=count, self_device_time_total=device, self_cpu_time_total=host
    )


def test_on_a_device_kernels_are_counted_and_waits_of_the_host():
    events = [
        event("gemm", device=6000.0),
        event("gelu", device=1000.0, count=4),
        event("Memcpy DtoH (Device -> Pinned)", device=10.0),
        event("aten::mm", kind=DeviceType.CPU, host=500.0, device=6000.0),
        event("cudaStreamSynchronize", kind=DeviceType.CPU, host=100.0),
        event("aten::item", kind=DeviceType.CPU, host=1.0),
        event("aten::item_like_but_not", kind=DeviceType.CPU, host=1.0),
    ]
    profile = read_events(events, updates=2, seconds=0.010, on_device=True)
    assert [cost.name for cost in profile.costs] == ["gemm", "gelu", "Memcpy DtoH (Device -> Pinned)"]
    assert profile.milliseconds == 5.0 and profile.costs[0].milliseconds == 3.0 and profile.costs[0].share == 0.6
    assert profile.costs[1].calls == 2 and profile.busy == (6 + 1 + 0.01) / 10
    assert profile.waits == {"Memcpy DtoH (Device -> Pinned)": 1, "cudaStreamSynchronize": 1, "aten::item": 1}
    assert "waits of the host" in profile.table()
