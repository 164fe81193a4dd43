"""The libraries of the training stack, kept from the network, from HOME and from talking.

Called before the first of them is imported: they read their environment at import.
"""

import logging
import os
import warnings
from pathlib import Path

_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    # The tokenizers' threads and a later fork don't go together; we never fork after using them.
    "TOKENIZERS_PARALLELISM": "true",
}


_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")


def quiet_libraries(cache_dir: Path) -> None:
    """Caches go below `cache_dir` (made only when something is written there)."""
    os.environ.update(_SETTINGS)
    if not any(map(os.path.exists, _GPU_DEVICES)):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found none
    os.environ.setdefault("HF_HOME", str(cache_dir / "huggingface"))
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|accelerate|trl)\b")
    for name in ("transformers", "accelerate", "trl", "datasets", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
