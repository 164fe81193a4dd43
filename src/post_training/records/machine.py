"""The machine and environment of a run, as far as they may matter to its bits.

The environment is recorded by an allow-list: what is not named here never reaches a record, nor
does a secret under a name that is.
"""

import importlib.metadata
import os
import platform
import socket
from collections import Counter
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from post_training.core.secrets import is_redacted, redacted, variable_secret

_NAMES = {
    "CUBLAS_WORKSPACE_CONFIG", "CUDA_CACHE_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_LAUNCH_BLOCKING",
    "HF_HUB_OFFLINE", "LANG", "LC_ALL", "PYTHONHASHSEED", "TOKENIZERS_PARALLELISM",
    "HSA_FORCE_FINE_GRAIN_PCIE", "MPICH_GPU_SUPPORT_ENABLED",
    "POST_TRAINING_ONE_PROCESS_GROUP",
    "POST_TRAINING_SITE", "POST_TRAINING_NETWORK_PROFILE", "POST_TRAINING_ALLOW_LL128",
    # How precisely matrices are multiplied, and by which instructions.
    "ATEN_CPU_CAPABILITY", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA",
    "FLASH_ATTENTION_DETERMINISTIC", "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "VLLM_BATCH_INVARIANT",
    # Where it ran; never used to run it again.
    "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES",
    "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_PARTITION",
    "SLURM_RESTART_COUNT",
}  # fmt: skip
_PREFIXES = (
    "NCCL_",
    "RCCL_",
    "FI_",
    "OMP_",
    "MKL_",
    "MIOPEN_",
    "TORCH_NCCL_",
    "VLLM_",
    "TORCHDYNAMO_",
    "TORCHINDUCTOR_",
    "OPENBLAS_",
    "GOMP_",
    "KMP_",
)
# By these accelerate sets precision, accumulation, compilation and sharding over the configuration.
_OVERRULING = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
# As the kernel names them: of x86, and of arm64.
_VECTOR_INSTRUCTIONS = {
    "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16",
    "asimd", "sve", "sve2", "bf16", "i8mm",
}  # fmt: skip
_PLACE = ("CUDA_VISIBLE", "ROCR_VISIBLE", "HIP_VISIBLE", "SLURM_")


def remove_overruling(environment: MutableMapping[str, str]) -> list[str]:
    """Take out the variables by which a library would compute something else than the configuration
    says; their names, sorted."""
    names = sorted(name for name in environment if name.startswith(_OVERRULING))
    for name in names:
        del environment[name]
    return names


def recorded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The allow-listed variables, sorted; a secret's value is redacted."""
    return {
        name: redacted(kind) if (kind := variable_secret(name, value)) else value
        for name, value in sorted(environment.items())
        if name in _NAMES or name.startswith(_PREFIXES)
    }


def portable_environment(recorded: Mapping[str, str]) -> dict[str, str]:
    """Of a recorded environment, what a reproduction sets again: not where the run took place, nor
    what was redacted."""
    return {
        name: value
        for name, value in recorded.items()
        if not name.startswith(_PLACE) and not is_redacted(value)
    }


def describe_machine() -> dict[str, Any]:
    """Host, kernel, architecture, processor, its vector instructions, and accelerators."""
    return {
        "host": socket.gethostname(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "instructions": _instructions(),
        "cpus": len(os.sched_getaffinity(0)),
        **find_accelerators(),
    }


def find_accelerators(root: Path = Path("/")) -> dict[str, Any]:
    """{"accelerators": {model: how many}, "driver": its version or None}, as the kernel tells it:
    /proc/driver/nvidia, or /sys/class/kfd (AMD, by its graphics target such as gfx90a)."""
    models: list[str] = []
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        models += [
            line.split(":", 1)[1].strip()
            for line in path.read_text().splitlines()
            if line.startswith("Model:")
        ]
    for path in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")):
        properties = dict(line.split(None, 1) for line in path.read_text().splitlines())
        if version := int(properties.get("gfx_target_version", "0")):
            models.append(f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}")
    found: str | None = None
    for path in ("sys/module/nvidia/version", "sys/module/amdgpu/version"):
        if (root / path).exists():
            found = (root / path).read_text().strip()
    return {"accelerators": dict(sorted(Counter(models).items())), "driver": found}


def installed_packages() -> dict[str, str]:
    """{name: version} of every installed Python distribution."""
    found = importlib.metadata.distributions()
    return dict(sorted({(d.name or "?").lower(): d.version for d in found}.items()))


def scheduler_job(environment: Mapping[str, str]) -> str | None:
    """`JOB.STEP` when Slurm started this process."""
    if "SLURM_JOB_ID" not in environment:
        return None
    return f"{environment['SLURM_JOB_ID']}.{environment.get('SLURM_STEP_ID', 'batch')}"


def _processor() -> str:
    """The model name on x86, implementer and part on arm64."""
    fields = _cpuinfo()
    return fields.get("model name") or (
        f"implementer {fields.get('CPU implementer')} part {fields.get('CPU part')}"
    )


def _instructions() -> list[str]:
    """Those by which libraries choose how to multiply matrices: with others, sums round otherwise.
    A virtual machine may hide some of its processor's, under the same model name."""
    fields = _cpuinfo()
    flags = fields.get("flags") or fields.get("Features") or ""
    return sorted(_VECTOR_INSTRUCTIONS & set(flags.split()))


def _cpuinfo() -> dict[str, str]:
    """What the kernel tells of the last processor; all are alike."""
    return dict(
        (word.strip() for word in line.split(":", 1))
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if ":" in line
    )
