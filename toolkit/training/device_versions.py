"""What is installed for each kind of device, and which driver answers: name to version, as far as it can be asked."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

COMMAND_SECONDS = 20
"""A vendor's tool that takes longer to say its version hangs."""


def package_version(distribution: str) -> dict[str, str]:
    """The version of an installed package; empty without it."""
    try:
        return {distribution: importlib.metadata.version(distribution)}
    except importlib.metadata.PackageNotFoundError:
        return {}


def cuda_versions() -> dict[str, str]:
    """CUDA or, in builds for AMD's devices, ROCm; the driver."""
    if torch.version.hip:
        driver = Path("/sys/module/amdgpu/version")
        found = {"ROCm": torch.version.hip, "amdgpu": driver.read_text().strip() if driver.is_file() else ""}
    else:
        driver_words = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found = {"CUDA": torch.version.cuda or "", "driver": driver_words}
    return {name: version for name, version in found.items() if version}


def npu_versions() -> dict[str, str]:
    """Ascend's plugin, CANN and the driver."""
    found = package_version("torch_npu")
    try:
        ask = importlib.import_module("torch_npu.utils").get_cann_version
        found |= {"CANN": str(ask("CANN")), "driver": str(ask("DRIVER"))}
    except (ImportError, AttributeError, OSError, RuntimeError):
        pass  # a plugin from before that function
    return {name: version for name, version in found.items() if version}


def hpu_versions() -> dict[str, str]:
    """Gaudi's plugin and the driver."""
    found = {**package_version("habana-torch-plugin"), "driver": _said("hl-smi", "-Q", "driver_version", "-f", "csv")}
    return {name: version for name, version in found.items() if version}


def xpu_versions() -> dict[str, str]:
    """The driver of Intel's GPU."""
    try:
        return {"driver": str(torch.xpu.get_device_properties(0).driver_version)}
    except (AttributeError, AssertionError, RuntimeError):
        return {}


def mps_versions() -> dict[str, str]:
    """macOS, which brings the driver."""
    return {"macOS": platform.mac_ver()[0]} if platform.mac_ver()[0] else {}


def _said(*command: str) -> str:
    """The last line that a vendor's tool prints; empty where there is no such tool, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.strip().splitlines() or [""])[-1].strip()
