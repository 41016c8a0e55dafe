"""A stand-in for Ascend's plugin: the same names and the same way of loading, over `npu_standin.cpp`.

torch calls `_autoload` on ``import torch`` (entry point ``torch.backends``), or somebody imports this package. The
built library is named by ``NPU_STANDIN_LIBRARY``; ``NPU_STANDIN_BROKEN`` makes it as unusable as a plugin without its
driver, ``NPU_STANDIN_DEVICES`` says how many devices there are, ``NPU_STANDIN_NO_BF16`` takes a format away.
"""

import os
import types

import torch

if os.environ.get("NPU_STANDIN_BROKEN"):
    raise ImportError("libascendcl.so: cannot open shared object file: No such file or directory")


def _make_module() -> types.ModuleType:
    """What becomes torch.npu."""
    module = types.ModuleType("torch.npu")
    module.is_available = lambda: module.device_count() > 0
    module.device_count = lambda: int(os.environ.get("NPU_STANDIN_DEVICES", "1"))
    module.current_device = torch._C._accelerator_getDeviceIndex
    module.set_device = lambda device: torch._C._accelerator_setDeviceIndex(torch.device("npu", device).index)
    module.get_device_name = lambda device=None: "stand-in"
    module.is_bf16_supported = lambda: not os.environ.get("NPU_STANDIN_NO_BF16")
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.synchronize = lambda device=None: None
    # Without a generator the stand-in draws with the host's, which torch.manual_seed has set already.
    module.manual_seed_all = lambda seed: None
    module._is_in_bad_fork = lambda: False
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.matmul = types.SimpleNamespace(allow_hf32=False)
    module.conv = types.SimpleNamespace(allow_hf32=True)
    return module


def _autoload() -> None:
    """What the entry point calls; the work is done by the import."""


torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", _make_module())
torch.utils.generate_methods_for_privateuse1_backend()
torch.ops.load_library(os.environ["NPU_STANDIN_LIBRARY"])
