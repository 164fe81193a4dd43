"""The model of an annotation stage: how it reads rows, and a vLLM engine of one worker.

On GPUs all prompts of a call are in the engine at once, and it is the batch-invariant kernels that
keep a prompt's bits from its neighbours (https://docs.vllm.ai/en/latest/features/batch_invariance).
On CPUs there are none: one prompt is given at a time, and the engine runs in this process, where
nothing depends on how fast requests arrive. A prefix cache would make the bits of a prompt depend
on the prompts before it, so it is off wherever rows have to be the same.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.annotate.config import VllmConfig
from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.chat.templates import choose_template, with_special_tokens
from post_training.data.config import TemplatedDataConfig
from post_training.data.tokenize import Encoder
from post_training.models.attention import check_positions, most_positions
from post_training.models.config import ModelConfig
from post_training.models.load import load_tokenizer, read_config
from post_training.stages.context import StageContext

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

_LEAST_BATCHED_TOKENS = 4096  # of one step: vLLM's own choice for CPUs
_MOST_CHARACTERS = 300  # of what vLLM says when it can't start


def load_own_tokenizer(path: Path, data: TemplatedDataConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder, with the special tokens that the settings ask for.

    Errors: PostTrainingError when there is none.
    """
    return with_special_tokens(load_tokenizer(path), data.special_tokens)


def load_encoder(path: Path, data: TemplatedDataConfig) -> Encoder:
    """How the model of a folder reads rows: its tokenizer, with a chat template.

    Errors: PostTrainingError when there is none, or the template doesn't go with it.
    """
    tokenizer = load_own_tokenizer(path, data)
    template = choose_template(
        data.chat_template,
        tokenizer,
        today=data.template_date,
        history=data.history_thoughts,
    )
    return Encoder.create(tokenizer, template, control_tokens=data.control_tokens)


class VllmEngine:
    """A vLLM engine: started, asked, and started again when it died.

    longest: of a prompt with what is drawn after it, in tokens.
    sequences_per_prompt: that are drawn from a prompt at once.
    Errors: UsageError where vLLM is missing or can't be had with these settings; PostTrainingError
    where it doesn't start.
    """

    def __init__(
        self,
        model: ModelConfig,
        settings: VllmConfig,
        context: StageContext,
        *,
        sequences_per_prompt: int,
    ):
        self._model = model
        self._settings = settings
        self._context = context
        self._sequences_per_prompt = sequences_per_prompt
        self._has_gpu = torch.cuda.is_available()
        if find_spec("vllm") is None:
            raise UsageError("vllm is not in this image", where="backend")
        if not self._has_gpu and context.ranks.world_size > 1:
            raise UsageError(
                "without a GPU a vLLM worker is one process",
                where="num_processes",
                hint="set num_processes: 1, and start further workers with workers.index",
            )
        refuse_batch_invariant_on_rocm(settings)
        if self._has_gpu and not settings.batch_invariant:
            context.log("warning: vllm.batch_invariant is off: other runs make other rows")
        config = read_config(model.path)
        if settings.max_model_len is not None:
            check_positions(config, settings.max_model_len, where="vllm.max_model_len")
        longest = settings.max_model_len or most_positions(config)
        if longest is None:
            raise UsageError(
                "config.json does not say how long a text the model reads",
                where=str(model.path),
                hint="set vllm.max_model_len",
            )
        self.longest: int = longest
        self._num_restarts = 0
        _set_environment(settings, context, self._has_gpu)
        self._engine = self._start()

    def generate(
        self, prompts: Sequence[list[int]], parameters: Sequence["SamplingParams"]
    ) -> list["RequestOutput"]:
        """vLLM's output of each prompt, a list of token ids."""
        if self._has_gpu:
            return self._generate(prompts, parameters) if prompts else []
        pairs = zip(prompts, parameters, strict=True)
        return [self._generate([prompt], [own])[0] for prompt, own in pairs]

    def restart(self) -> None:
        """After an exception. Errors: PostTrainingError when it died too often, and did nothing
        between."""
        self._num_restarts += 1
        limit = self._settings.max_restarts
        if self._num_restarts > limit:
            raise PostTrainingError(
                f"the engine died more than {limit} times, one after another",
                where="vllm.max_restarts",
                hint="the log of the chunk says why",
            )
        from vllm.distributed import cleanup_dist_env_and_memory

        self._context.log(f"restarting the engine ({self._num_restarts} of {limit})")
        del self._engine
        gc.collect()
        cleanup_dist_env_and_memory()
        self._engine = self._start()

    def _start(self) -> "LLM":
        from vllm import LLM

        settings = self._settings
        varying = self._has_gpu and not settings.batch_invariant
        with _explain_failed_start(self._model.path):
            return LLM(
                model=str(self._model.path),
                dtype=self._model.dtype,
                tensor_parallel_size=settings.tensor_parallel_size,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                max_model_len=self.longest,
                enable_prefix_caching=varying,
                enforce_eager=not self._has_gpu,
                generation_config="vllm",  # the recipe says how to sample, not the model's folder
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=0,
                trust_remote_code=False,
                **({} if self._has_gpu else self._on_cpu()),
            )

    def _on_cpu(self) -> dict[str, Any]:
        """A prefill that is cut in two gives back the random number it drew at the cut, which
        torch's generators on CPUs can't do: whole ones only. Then a step has to hold the longest.
        """
        return {
            "max_num_seqs": self._sequences_per_prompt,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(
                self.longest, self._sequences_per_prompt, _LEAST_BATCHED_TOKENS
            ),
        }

    def _generate(
        self, prompts: Sequence[list[int]], parameters: Sequence["SamplingParams"]
    ) -> list["RequestOutput"]:
        from vllm.inputs import TokensPrompt

        outputs = self._engine.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            list(parameters),
            use_tqdm=False,
        )
        self._num_restarts = 0
        return outputs


@contextmanager
def _explain_failed_start(model: Path) -> Iterator[None]:
    """Raise PostTrainingError for whatever exception vLLM's parts raise when it starts: none is a
    row's fault."""
    try:
        yield
    except Exception as error:
        words = " ".join(str(error).split())[:_MOST_CHARACTERS] or type(error).__name__
        raise PostTrainingError(
            f"vLLM can't start with this model: {words}",
            where=str(model),
            hint="VLLM_LOGGING_LEVEL=INFO says more; backend: transformers does without it",
        ) from error


def refuse_batch_invariant_on_rocm(settings: VllmConfig) -> None:
    """Errors: UsageError where vLLM would promise what it does not keep, or not start.

    It was accepted and not invariant, or found no attention backend:
    https://github.com/vllm-project/vllm/issues/55958 and https://github.com/vllm-project/vllm/issues/53943
    """
    if torch.version.hip and settings.batch_invariant:
        raise UsageError(
            "not known to hold on ROCm",
            where="vllm.batch_invariant",
            hint="set vllm.batch_invariant: false; the record then says that other runs may make "
            "other rows",
        )


def _set_environment(settings: VllmConfig, context: StageContext, has_gpu: bool) -> None:
    """Set what vLLM reads when it is imported, and its engine's processes when they start."""
    cache = context.run_dir / "cache" / "vllm"
    for name, value in {
        "VLLM_CACHE_ROOT": cache,
        "VLLM_CONFIG_ROOT": cache,
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": 4,  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # num_threads says how many, not the machine
    }.items():
        os.environ.setdefault(name, str(value))
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(has_gpu))
    if has_gpu:
        os.environ["VLLM_BATCH_INVARIANT"] = str(int(settings.batch_invariant))
        if context.ranks.local_world_size > 1:
            # The engine is a process of its own, which takes the first GPU that it sees.
            devices = [str(number) for number in range(torch.cuda.device_count())]
            if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
                devices = visible.split(",")
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[context.ranks.local_rank % len(devices)]
