"""The device table and the settings of a process."""

from __future__ import annotations

import dataclasses
import json
import operator
import subprocess
import sys
import types

import pytest
import torch

from toolkit.errors import DeviceError
from toolkit.training import devices
from toolkit.training.devices import DEVICE_KINDS, Device, device_count, device_kind, resolve_device
from toolkit.training.options import RunOptions

ABSENT = [kind.name for kind in DEVICE_KINDS if not device_count(kind)[0]]


def in_fresh_process(code: str) -> dict:
    """Settings of a process cannot be taken back, so they are tried in another one; it prints JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_rows_are_complete():
    assert [kind.name for kind in DEVICE_KINDS] == ["cpu", "cuda", "npu", "hpu", "xpu", "mps"]
    for kind in DEVICE_KINDS:
        assert "fp32" in kind.precisions and set(kind.scaled) <= {"fp16"} and kind.install and kind.backend
        assert kind.title and all(isinstance(version, str) for version in kind.versions().values())
        assert all("=" in setting for setting in kind.environment)


def test_cpu_device():
    device = resolve_device("cpu", local_rank=3)
    assert (device.type, device.backend, device.torch_device) == ("cpu", "gloo", torch.device("cpu"))
    assert device.name.startswith("cpu (")
    device.synchronize()
    device.mark_step()


@pytest.mark.parametrize("name", ABSENT)
def test_absent_devices_say_what_is_here_and_what_to_install(name):
    with pytest.raises(DeviceError) as caught:
        resolve_device(name)
    words = str(caught.value)
    assert words.startswith(f"--device {name}: there is none here, because ")
    assert "here are: cpu" in words and f"{name} needs " in words and "\n" not in words


def test_npu_advice_names_the_version_that_fits():
    release = torch.__version__.split("+")[0]
    assert f'"torch-npu=={release}.*"' in devices.install_words(device_kind("npu"))


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("gpu", "--device 'gpu' is no device known here; choose auto or one of cpu, cuda, npu, hpu, xpu, mps."),
        ("cpu:x", "--device 'cpu:x' ends in no number; write cpu or cpu:0."),
        ("cpu:7", "--device cpu:7 does not exist: all cores are one device; write cpu, and see --threads."),
        ("cuda:\u00b2", "--device 'cuda:\u00b2' ends in no number; write cuda or cuda:0."),
    ],
)
def test_unknown_devices(wanted, words):
    with pytest.raises(DeviceError) as caught:
        resolve_device(wanted)
    assert str(caught.value) == words


def test_the_processor_has_the_number_0():
    assert str(resolve_device("cpu:0").torch_device) == "cpu"


def test_auto_takes_the_accelerator_or_the_cpu():
    expected = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    assert resolve_device("auto").type == expected


def test_auto_precision_follows_the_hardware(monkeypatch):
    device = resolve_device("cpu")
    for known, expected in (
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "avx512_f": True}, "fp32"),
        ({}, "fp32"),
    ):
        monkeypatch.setattr(devices, "cpu_capabilities", lambda known=known: known)
        assert device.resolve_precision("auto") == expected
        assert device.resolve_precision("bf16") == "bf16"


def test_precisions_that_are_not_to_be_had():
    with pytest.raises(DeviceError, match=r"--precision fp16 is not to be had on cpu .*; choose one of fp32, bf16\."):
        resolve_device("cpu").resolve_precision("fp16")
    with pytest.raises(DeviceError, match="--precision 'fp8' is unknown; choose auto, fp32, bf16, fp16"):
        resolve_device("cpu").resolve_precision("fp8")
    old = dataclasses.replace(device_kind("cuda"), has_bf16=lambda: False)
    device = devices.Device(old, torch.device("cuda", 0))
    assert device.resolve_precision("auto") == "fp32"
    assert device.resolve_precision("fp16") == "fp16" and device.needs_scaler("fp16")
    if not torch.cuda.is_available():
        return  # the sentence asks the driver for the device's name
    with pytest.raises(DeviceError, match="--precision bf16 is not supported by cuda:0"):
        device.resolve_precision("bf16")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_is_the_switch(precision, dtype):
    with resolve_device("cpu").autocast(precision):
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert not torch.is_autocast_enabled("cpu")


def test_peak_memory_sees_a_large_tensor():
    result = in_fresh_process(
        "import json, torch\n"
        "from toolkit.training.devices import resolve_device\n"
        "device = resolve_device('cpu'); before = device.peak_memory_bytes()\n"
        "x = torch.ones(64 * 2**20); peak = device.peak_memory_bytes(); del x\n"
        "device.reset_peak_memory()\n"
        "print(json.dumps([before, peak, device.peak_memory_bytes()]))"
    )
    before, peak, after = result
    assert peak - before > 200 * 2**20
    if sys.platform.startswith("linux"):
        assert after < peak


PREPARE = """
import json, resource, torch
from toolkit.training.devices import prepare_process, product_error, resolve_device
from toolkit.training.options import RunOptions
said = prepare_process(resolve_device("cpu"), RunOptions(**{options}))
torch.ones(16 * 2**20).mul(2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(16 * 2**20)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
switch = torch.backends.mkldnn.matmul.fp32_precision
print(json.dumps(dict(said=said, faults=faults, switch=switch, error=product_error(), threads=torch.get_num_threads())))
"""


def test_settings_of_the_process_are_made_and_told():
    result = in_fresh_process(PREPARE.replace("{options}", "dict(threads=1)"))
    assert result["threads"] == 1 and result["said"][0] == "Threads: 1 for products on the CPU, as asked."
    assert [words.split(":")[0] for words in result["said"]] == ["Threads", "Allocator", "Products"]
    assert all(words.endswith(".") for words in result["said"])
    assert result["error"] < devices.LARGEST_PRODUCT_ERROR
    if "glibc mallopt" in result["said"][1]:
        # Four tensors of 64 MiB, 16,384 pages each: kept memory is faulted in once at most.
        assert result["faults"] < 20_000
    if devices.cpu_capabilities().get("amx_tile") is False:
        assert result["switch"] == "bf16" and "checked against float64" in result["said"][2]


def test_settings_can_be_left_off():
    result = in_fresh_process(PREPARE.replace("{options}", "dict(fast_allocator=False, fast_products=False)"))
    assert result["said"] == ["Allocator: left as it is, as asked.", "Products: left as they are, as asked."]
    assert result["switch"] != "bf16"
    if devices.platform.libc_ver()[0] == "glibc":
        assert result["faults"] > 60_000


@pytest.mark.parametrize("known", [{}, {"amx_tile": True}])
def test_products_are_left_alone_where_they_would_round(monkeypatch, known):
    before = torch.backends.mkldnn.matmul.fp32_precision
    monkeypatch.setattr(devices, "cpu_capabilities", lambda: known)
    assert devices._exact_fast_products().startswith("Products: left to torch's own choice (oneDNN's switch would")
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_products_that_fail_the_check_are_taken_back(monkeypatch):
    before = torch.backends.mkldnn.matmul.fp32_precision
    monkeypatch.setattr(devices, "cpu_capabilities", lambda: {"amx_tile": False})
    monkeypatch.setattr(devices, "product_error", lambda: 2e-3)
    assert devices._exact_fast_products() == (
        "Products: left to torch's own choice (oneDNN's float32 product was off by 2.0e-03)."
    )
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_slow_bf16_is_told(monkeypatch):
    monkeypatch.setattr(devices, "cpu_capabilities", lambda: {})
    options = RunOptions(precision="bf16", fast_allocator=False, fast_products=False)
    assert "no bf16 products" in devices.prepare_process(resolve_device("cpu"), options)[-1]


@pytest.mark.parametrize("name", ["cuda", "xpu"])
def test_rounding_of_float32_products_is_switched_off(monkeypatch, name):
    """By the paths in the row; a torch without them is left alone."""
    kind = device_kind(name)
    for path in kind.rounding_switches:
        assert operator.attrgetter(path)(torch) in (None, True, False)
    switches = types.SimpleNamespace(first=True)
    monkeypatch.setattr(torch, "stand_in_switches", switches, raising=False)
    row = dataclasses.replace(kind, rounding_switches=("stand_in_switches.first", "stand_in_switches.deeper.second"))
    said = devices.prepare_process(Device(row, torch.device(name)), RunOptions())
    assert said == ["Products: float32 stays float32 (TF32 off); --precision bf16 is the fast path."]
    assert switches.first is False
    row = dataclasses.replace(kind, rounding_switches=("no_such_place.allow_tf32",))
    assert devices.prepare_process(Device(row, torch.device(name)), RunOptions()) == []


def test_rocm_says_so(monkeypatch):
    """A ROCm build calls its devices cuda; their name says what they are."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI300X")
    device = Device(device_kind("cuda"), torch.device("cuda", 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert device.name == "cuda:0 (AMD Instinct MI300X, ROCm)"
    monkeypatch.setattr(torch.version, "hip", None)
    assert device.name == "cuda:0 (AMD Instinct MI300X)"


MARKED = """
import json, os, sys, types
count = []
core = types.ModuleType("habana_frameworks.torch.core")
core.mark_step = lambda: count.append(1)
for name in ("habana_frameworks", "habana_frameworks.torch"):
    sys.modules[name] = types.ModuleType(name)
sys.modules[core.__name__] = core
import torch
from toolkit.training.devices import Device, device_kind
device = Device(device_kind("hpu"), torch.device("hpu"))
marks = []
for mode in (None, "0", "1", "2"):
    os.environ.pop("PT_HPU_LAZY_MODE", None)
    if mode is not None:
        os.environ["PT_HPU_LAZY_MODE"] = mode
    device.mark_step()
    marks.append(len(count))
print(json.dumps(marks))
"""


def test_a_device_that_compiles_each_shape_is_told_of_in_the_log():
    for name, compiles in (("hpu", True), ("mps", False)):
        said = devices.prepare_process(Device(device_kind(name), torch.device(name)), RunOptions())
        assert any(f"{name} compiles for each shape of a batch" in sentence for sentence in said) == compiles


def test_steps_are_marked_unless_gaudis_lazy_mode_is_off():
    assert in_fresh_process(MARKED) == [1, 1, 2, 3]


STAND_IN = """
import json, sys, types, torch
torch.utils.rename_privateuse1_backend("npu")
module = types.ModuleType("torch.npu")
calls = []
module.is_available = lambda: True
module.device_count = lambda: 2
module.set_device = lambda index: calls.append(["set", index])
module.get_device_name = lambda device: "stand-in"
module.is_bf16_supported = lambda: False
module.synchronize = lambda: calls.append(["wait"])
module.reset_peak_memory_stats = lambda: calls.append(["reset"])
module.max_memory_allocated = lambda: 123
module.matmul, module.conv = types.SimpleNamespace(allow_hf32=True), types.SimpleNamespace(allow_hf32=True)
module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
torch._register_device_module("npu", module)
from toolkit.errors import DeviceError
from toolkit.training.device_report import device_table
from toolkit.training.devices import prepare_process, resolve_device
from toolkit.training.options import RunOptions
device = resolve_device("npu", local_rank=1)
said = prepare_process(device, RunOptions())
device.synchronize(); device.reset_peak_memory()
with device.autocast("fp16"):
    inside = torch.is_autocast_enabled("npu")
errors = []
for act in (lambda: resolve_device("npu:7"), lambda: device.resolve_precision("bf16"),
            lambda: resolve_device("npu", local_rank=2), lambda: resolve_device("npu:0", local_rank=1),
            lambda: resolve_device("npu:1", several=True)):
    try:
        act()
    except DeviceError as error:
        errors.append(str(error))
print(json.dumps(dict(name=device.name, calls=calls[:3], auto=device.resolve_precision("auto"), inside=inside,
    peak=device.peak_memory_bytes(), scaler=device.needs_scaler("fp16"), errors=errors, said=said,
    hf32=module.conv.allow_hf32, backend=device.backend, table=device_table())))
"""


def test_an_npu_goes_through_the_same_table():
    """Names and calls only: torch's slot for other vendors' devices, renamed, with a stand-in module and no tensors."""
    result = in_fresh_process(STAND_IN)
    assert result["name"] == "npu:1 (stand-in)" and result["backend"] == "hccl"
    assert result["calls"] == [["set", 1], ["wait"], ["reset"]]
    assert result["auto"] == "fp32" and result["scaler"] and result["inside"] and result["peak"] == 123
    assert result["hf32"] is False and "HF32 off" in result["said"][0] and "HCCL_CONNECT_TIMEOUT" in result["said"][1]
    assert result["errors"] == [
        "--device npu:7 does not exist: this machine has 2 (npu:0 to npu:1).",
        "--precision bf16 is not supported by npu:1 (stand-in); choose one of fp32, fp16.",
        "--device npu:2 does not exist: this machine has 2 (npu:0 to npu:1); start as many processes as there are "
        "devices.",
        "--device npu:0 names one device for several processes; write --device npu.",
        "--device npu:1 names one device for several processes; write --device npu.",
    ]
    assert "auto means npu" in result["table"]
