"""All that differs between kinds of device, one table row each; nothing else asks what it runs on.

A new kind of device is a new row of :data:`DEVICE_KINDS`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import platform
import resource
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from toolkit.errors import DeviceError
from toolkit.training import device_versions
from toolkit.training.options import RunOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PLUGIN_ERRORS = (ImportError, OSError, RuntimeError)
"""What importing a device's package raises where the package or its drivers are missing or broken."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_PRODUCT_ERROR = 3e-6
"""Largest relative error of a float32 product of 256 terms; inputs rounded to bfloat16 give about 2e-3."""


@dataclass(frozen=True)
class DeviceKind:
    """One row of the device table.

    Arguments
    ---------
    name : torch's device type.
    title : whose hardware that is.
    backend : the collectives library.
    install : what to do where it is missing; {torch} stands for torch's release.
    precisions : what autocast takes.
    scaled : the precisions whose loss needs a scaler.
    has_bf16 : asks the hardware.
    plugin : the package that brings the device to torch. It is loaded by ``import torch`` (entry points of the group
        ``torch.backends``; TORCH_DEVICE_BACKEND_AUTOLOAD=0 prevents it), or here by its name.
    variant : what else the device is called, in builds of torch for another vendor's.
    versions : name to version of what is installed for it, as far as it can be asked.
    rounding, rounding_switches : the format to which float32 products may be rounded, and the attributes of torch
        that switch it on; a run switches them off.
    pin_memory : whether batches are copied faster from page-locked memory of the host.
    step_mark : a ``module:function`` called after each backward pass and each update, ...
    step_mark_unless : ... unless the environment has this NAME=VALUE.
    static_shapes : whether every new shape costs a compilation, which a run is told.
    probed : whether a run first tries which operators the device has (`toolkit.training.device_probe`).
    host_operations : those expected to be missing, until it is tried.
    environment : advice on variables.
    """

    name: str
    title: str
    backend: str
    install: str
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")
    scaled: tuple[str, ...] = ("fp16",)
    has_bf16: Callable[[], bool] = lambda: True
    plugin: str | None = None
    variant: Callable[[], str] = lambda: ""
    versions: Callable[[], Mapping[str, str]] = lambda: {}
    rounding: str = ""
    rounding_switches: tuple[str, ...] = ()
    pin_memory: bool = False
    step_mark: str | None = None
    step_mark_unless: str = ""
    static_shapes: bool = False
    probed: bool = True
    host_operations: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()


def cpu_capabilities() -> dict[str, Any]:
    """What the processor can do, by torch's names; empty where torch cannot say."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    return dict(ask()) if ask is not None else {}


def _cpu_has_bf16() -> bool:
    known = cpu_capabilities()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def _cuda_has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _npu_has_bf16() -> bool:
    return bool(getattr(_module("npu"), "is_bf16_supported", lambda: False)())


def _mps_has_bf16() -> bool:
    version = platform.mac_ver()[0].split(".")[0]
    return version.isdigit() and int(version) >= 14


def _rocm() -> str:
    return "ROCm" if torch.version.hip else ""


DEVICE_KINDS: tuple[DeviceKind, ...] = (
    DeviceKind(
        name="cpu",
        title="the processor",
        backend="gloo",
        install="nothing to install",
        precisions=("fp32", "bf16"),
        has_bf16=_cpu_has_bf16,
        probed=False,
    ),
    DeviceKind(
        name="cuda",
        title="NVIDIA GPUs, and AMD's with a ROCm build of torch",
        backend="nccl",
        install="an NVIDIA driver and a CUDA build of torch, or an AMD driver and a ROCm build: see pytorch.org",
        has_bf16=_cuda_has_bf16,
        variant=_rocm,
        versions=device_versions.cuda_versions,
        rounding="TF32",
        rounding_switches=("backends.cuda.matmul.allow_tf32", "backends.cudnn.allow_tf32"),
        pin_memory=True,
        probed=False,
    ),
    DeviceKind(
        name="npu",
        title="Huawei Ascend",
        backend="hccl",
        install='Ascend CANN, then pip install "torch-npu=={torch}.*"',
        has_bf16=_npu_has_bf16,
        plugin="torch_npu",
        versions=device_versions.npu_versions,
        rounding="HF32",
        rounding_switches=("npu.matmul.allow_hf32", "npu.conv.allow_hf32"),
        pin_memory=True,
        host_operations=("ctc_loss",),
        environment=("HCCL_CONNECT_TIMEOUT=1800", "TASK_QUEUE_ENABLE=1"),
    ),
    DeviceKind(
        name="hpu",
        title="Intel Gaudi",
        backend="hccl",
        install="Intel Gaudi's own installer or container (habana-torch-plugin is not on the package index)",
        plugin="habana_frameworks.torch",
        versions=device_versions.hpu_versions,
        step_mark="habana_frameworks.torch.core:mark_step",
        step_mark_unless="PT_HPU_LAZY_MODE=0",  # lazy by other values, and in older releases without one
        static_shapes=True,
        host_operations=("ctc_loss",),
        environment=("PT_HPU_LAZY_MODE=0",),
    ),
    DeviceKind(
        name="xpu",
        title="Intel GPUs",
        backend="xccl",
        install="Intel's GPU driver and an XPU build of torch: see pytorch.org",
        versions=device_versions.xpu_versions,
        rounding="TF32",
        rounding_switches=("backends.mkldnn.allow_tf32",),
        pin_memory=True,
        host_operations=("ctc_loss",),
    ),
    DeviceKind(
        name="mps",
        title="Apple silicon",
        backend="gloo",
        install="macOS 14 or newer on Apple silicon with torch's own Mac build",
        has_bf16=_mps_has_bf16,
        versions=device_versions.mps_versions,
        host_operations=("ctc_loss",),
        environment=("PYTORCH_ENABLE_MPS_FALLBACK=1",),
    ),
)


def device_kind(name: str) -> DeviceKind:
    """The row called ``name``; DeviceError when the table has none."""
    for kind in DEVICE_KINDS:
        if kind.name == name:
            return kind
    known = ", ".join(kind.name for kind in DEVICE_KINDS)
    raise DeviceError(f"--device {name!r} is no device known here; choose auto or one of {known}.")


def named_device(wanted: str) -> tuple[DeviceKind, int | None]:
    """The row and the number that ``wanted`` (``cuda``, ``cuda:1``) names, None without a number.

    Raises
    ------
    DeviceError : no such row; no number behind the colon; another number than 0 of the processor.
    """
    name, _, number = wanted.strip().lower().partition(":")
    kind = device_kind(name)
    if number and not number.isdecimal():
        raise DeviceError(f"--device {wanted!r} ends in no number; write {name} or {name}:0.")
    if kind.name == "cpu" and number and int(number):
        raise DeviceError(f"--device {wanted} does not exist: all cores are one device; write cpu, and see --threads.")
    return kind, int(number) if number else None


@dataclass(frozen=True)
class Device:
    """A device that is there: its row and its torch device.

    ``host_operations`` are the operators that it leaves to the host: the row's, until they were tried.

    Example
    -------
    >>> device = resolve_device("cpu")
    >>> device.type, device.resolve_precision("fp32")
    ('cpu', 'fp32')
    """

    kind: DeviceKind
    torch_device: torch.device
    host_operations: tuple[str, ...] = ()

    def on_host(self, operation: str) -> bool:
        """Whether ``operation`` (``ctc_loss``, ...) is to be computed on the host on purpose."""
        return operation in self.host_operations

    @property
    def type(self) -> str:
        """Torch's device type."""
        return self.torch_device.type

    @property
    def backend(self) -> str:
        """The collectives library for processes on this kind of device."""
        return self.kind.backend

    @property
    def pin_memory(self) -> bool:
        """Whether batches are better copied from page-locked host memory."""
        return self.kind.pin_memory

    @property
    def name(self) -> str:
        """The device in words, such as ``cuda:0 (NVIDIA H100)``."""
        if self.type == "cpu":
            model = cpu_capabilities().get("cpu_name") or platform.processor() or platform.machine()
            return f"cpu ({model})"
        ask = getattr(_module(self.type), "get_device_name", None)
        words = [ask(self.torch_device) if ask is not None else "", self.kind.variant()]
        known = ", ".join(word for word in words if word)
        return f"{self.torch_device}" + (f" ({known})" if known else "")

    def resolve_precision(self, precision: str) -> str:
        """``fp32``, ``bf16`` or ``fp16`` for what was asked; ``auto`` takes bf16 where the hardware has it.

        Raises
        ------
        DeviceError : the device does not have it.
        """
        if precision == "auto":
            return "bf16" if "bf16" in self.kind.precisions and self.kind.has_bf16() else "fp32"
        if precision not in DTYPES:
            raise DeviceError(f"--precision {precision!r} is unknown; choose auto, {', '.join(DTYPES)}.")
        if precision not in self.kind.precisions:
            raise DeviceError(
                f"--precision {precision} is not to be had on {self.name}; choose one of "
                f"{', '.join(self.kind.precisions)}."
            )
        # A CPU without bf16 products computes them all the same, only slowly: prepare_process says so.
        if precision == "bf16" and self.type != "cpu" and not self.kind.has_bf16():
            others = ", ".join(name for name in self.kind.precisions if name != "bf16")
            raise DeviceError(f"--precision bf16 is not supported by {self.name}; choose one of {others}.")
        return precision

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """The context in which a step runs; it does nothing for fp32."""
        resolved = self.resolve_precision(precision)
        if resolved == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(device_type=self.type, dtype=DTYPES[resolved])

    def needs_scaler(self, precision: str) -> bool:
        """Whether the loss must be scaled up so that small gradients are not lost."""
        return self.resolve_precision(precision) in self.kind.scaled

    def synchronize(self) -> None:
        """Wait for all work given to the device."""
        ask = getattr(_module(self.type), "synchronize", None)
        if ask is not None:
            ask()

    def mark_step(self) -> None:
        """Tell a device that collects operations that these are all of a backward pass, or of an update."""
        variable, _, value = self.kind.step_mark_unless.partition("=")
        if self.kind.step_mark is not None and os.environ.get(variable) != value:
            module, function = self.kind.step_mark.split(":")
            getattr(importlib.import_module(module), function)()

    def reset_peak_memory(self) -> None:
        """Begin a new measurement of `peak_memory_bytes`."""
        if self.type == "cpu":
            with contextlib.suppress(OSError):  # Linux only, and not in every container
                Path("/proc/self/clear_refs").write_text("5")
        reset = getattr(_module(self.type), "reset_peak_memory_stats", None)
        if reset is not None:
            reset()

    def peak_memory_bytes(self) -> int:
        """Largest memory in use: tensors on an accelerator, the whole process on the CPU."""
        ask = getattr(_module(self.type), "max_memory_allocated", None)
        if self.type != "cpu" and ask is not None:
            return int(ask())
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        # macOS counts in bytes, Linux in KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _module(type_name: str) -> ModuleType | None:
    """Torch's module for a device type (torch.npu, ...), None without one."""
    return getattr(torch, type_name, None)


def first_line(error: Exception) -> str:
    """What an error of torch or of a plugin says first."""
    return (str(error).strip().splitlines() or [repr(error)])[0]


def device_count(kind: DeviceKind) -> tuple[int, str]:
    """How many devices of this kind there are, and why none (a half sentence) when there is none."""
    if kind.name == "cpu":
        return 1, ""
    if kind.plugin is not None and _module(kind.name) is None:
        try:
            importlib.import_module(kind.plugin)
        except PLUGIN_ERRORS as error:
            return 0, f"{kind.plugin} cannot be imported ({first_line(error)})"
    module = _module(kind.name)
    if module is None:
        return 0, f"this build of torch has no torch.{kind.name}"
    try:
        available = torch.backends.mps.is_available() if kind.name == "mps" else module.is_available()
        count = int(module.device_count()) if available else 0
    except PLUGIN_ERRORS as error:
        return 0, f"its driver refuses ({first_line(error)})"
    return count, "" if count else f"torch {torch.__version__} finds no such device"


def install_words(kind: DeviceKind) -> str:
    """What to install to get this kind of device."""
    release = ".".join(torch.__version__.split("+")[0].split(".")[:3])
    return kind.install.format(torch=release)


def resolve_device(wanted: str = "auto", *, local_rank: int = 0, several: bool = False) -> Device:
    """The device that ``wanted`` means for this process.

    Arguments
    ---------
    wanted : ``auto`` (the accelerator if there is one, else the CPU), a kind (``cuda``), or one device (``cuda:1``).
    local_rank : number of this process on its machine; it takes the device of that number.
    several : whether this machine has other processes of the run.

    Raises
    ------
    DeviceError : no such device here; says what there is and what to install.
    """
    wanted = str(wanted).strip().lower()
    if wanted == "auto":
        wanted = _accelerator_type()
    kind, number = named_device(wanted)
    name = kind.name
    count, reason = device_count(kind)
    if not count:
        there = [other.name for other in DEVICE_KINDS if device_count(other)[0]]
        raise DeviceError(
            f"--device {wanted}: there is none here, because {reason}; here are: {', '.join(there)}; "
            f"{name} needs {install_words(kind)}."
        )
    if kind.name == "cpu":
        return Device(kind, torch.device("cpu"), kind.host_operations)
    if number is not None and number != local_rank and (several or local_rank):
        raise DeviceError(f"--device {wanted} names one device for several processes; write --device {name}.")
    index = local_rank if number is None else number
    if index >= count:
        raise DeviceError(
            f"--device {name}:{index} does not exist: this machine has {count} ({name}:0 to {name}:{count - 1})"
            + ("; start as many processes as there are devices." if number is None else ".")
        )
    module = _module(kind.name)
    if hasattr(module, "set_device"):
        module.set_device(index)
    return Device(kind, torch.device(kind.name, index), kind.host_operations)


def _accelerator_type() -> str:
    """Type of torch's accelerator if the table has it and it is there, else ``cpu``."""
    for kind in DEVICE_KINDS:
        if kind.plugin is not None and importlib.util.find_spec(kind.plugin.split(".")[0]) is not None:
            device_count(kind)  # its import announces the accelerator to torch
    if not torch.accelerator.is_available():
        return "cpu"
    found = torch.accelerator.current_accelerator()
    known = [kind.name for kind in DEVICE_KINDS]
    return found.type if found is not None and found.type in known else "cpu"


def prepare_process(device: Device, options: RunOptions) -> list[str]:
    """Make the settings that a run on ``device`` wants of its process, before the first large tensor.

    Returns
    -------
    One sentence for each setting made, for the log. ``options.fast_allocator``, ``options.fast_products`` and
    ``options.threads`` switch them.
    """
    said: list[str] = []
    if options.threads is not None:
        torch.set_num_threads(options.threads)
        said.append(f"Threads: {options.threads} for products on the CPU, as asked.")
    if device.type == "cpu":
        said.append(_keep_memory() if options.fast_allocator else "Allocator: left as it is, as asked.")
        said.append(_exact_fast_products() if options.fast_products else "Products: left as they are, as asked.")
        if options.precision == "bf16" and not device.kind.has_bf16():
            said.append("Precision: this CPU has no bf16 products and emulates them slowly; fp32 may be faster.")
    if device.kind.rounding:
        said += _exact_products(device.kind)
    if device.kind.static_shapes:
        said.append(f"Shapes: {device.type} compiles for each shape of a batch; a lower num_buckets makes fewer.")
    return said + advised_environment(device.kind)


def advised_environment(kind: DeviceKind) -> list[str]:
    """A sentence on the variables that are advised for this kind of device and not set; none where all are."""
    missing = [setting for setting in kind.environment if setting.split("=")[0] not in os.environ]
    return [f"Environment: {' '.join(missing)} is advised for {kind.name}."] if missing else []


def _exact_products(kind: DeviceKind) -> list[str]:
    """Switch off that float32 products are rounded; says so where this torch has a switch."""
    switched = False
    for path in kind.rounding_switches:
        *parts, name = path.split(".")
        place: Any = torch
        for part in parts:
            place = getattr(place, part, None)
        if hasattr(place, name):
            setattr(place, name, False)
            switched = True
    off = f"Products: float32 stays float32 ({kind.rounding} off); --precision bf16 is the fast path."
    return [off] if switched else []


def _keep_memory() -> str:
    """glibc hands large freed blocks back to the kernel, and every new activation is page-faulted in again."""
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return "Allocator: left as it is (the setting is for glibc)."
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return "Allocator: left as MALLOC_MMAP_THRESHOLD_ in the environment sets it."
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(M_MMAP_THRESHOLD, 1 << 30) and mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)):
        return "Allocator: glibc refused to keep freed memory; activations will be slower."
    return "Allocator: freed memory stays in the process (glibc mallopt; --fast_allocator False leaves it)."


def product_error(size: int = 256) -> float:
    """Relative error of one float32 product against float64 (largest error over largest entry)."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    return float(((left @ right).double() - exact).abs().max() / exact.abs().max())


def _exact_fast_products() -> str:
    """Send float32 products to oneDNN, which on CPUs without AMX is about twice MKL's AVX2 path, and as exact."""
    # The switch allows bf16 inside float32 products; only a CPU with AMX has such kernels and would round.
    # It must be known, not only likely, that there is none.
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if cpu_capabilities().get("amx_tile") is not False:
        return "Products: left to torch's own choice (oneDNN's switch would round float32 on this CPU)."
    if not torch.backends.mkldnn.is_available() or not hasattr(settings, "fp32_precision"):
        return "Products: left to torch's own choice (this torch has no oneDNN switch)."
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    error = product_error()
    if not error < LARGEST_PRODUCT_ERROR:
        settings.fp32_precision = before
        return f"Products: left to torch's own choice (oneDNN's float32 product was off by {error:.1e})."
    return f"Products: float32 by oneDNN, checked against float64 (error {error:.1e}; --fast_products False leaves it)."
