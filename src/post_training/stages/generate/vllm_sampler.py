"""Sampling with vLLM.

On GPUs all prompts of a call are in the engine at once, and it is the batch-invariant kernels that
keep a sample's bits from its neighbours (https://docs.vllm.ai/en/latest/features/batch_invariance).
On CPUs there are none: one prompt is given at a time, with its samples, and the engine runs in this
process, where nothing depends on how fast requests arrive. A prefix cache would make the bits of a
prompt depend on the prompts before it, so it is off wherever samples have to be the same.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.tokenize import Encoder
from post_training.models.load import read_model_settings
from post_training.stages.context import StageContext
from post_training.stages.generate.config import GenerateConfig
from post_training.stages.generate.endings import Endings
from post_training.stages.generate.sampling import Completion, Prompt, Sampler

_MOST_CHARACTERS = 300  # of what vLLM says when it can't start


class VllmSampler(Sampler):
    def __init__(self, config: GenerateConfig, encoder: Encoder, context: StageContext):
        self.config = config
        self.context = context
        self.has_gpu = torch.cuda.is_available()
        if find_spec("vllm") is None:
            raise UsageError("vllm is not in this image", where="backend")
        if not self.has_gpu and context.ranks.world_size > 1:
            raise UsageError(
                "without a GPU a vLLM worker is one process",
                where="num_processes",
                hint="set num_processes: 1, and start further workers with workers.index",
            )
        if self.has_gpu and not config.vllm.batch_invariant:
            context.log("warning: vllm.batch_invariant is off: other runs draw other samples")
        self.endings = Endings.of(config.model.path, encoder, config.sampling.stop)
        settings = read_model_settings(config.model.path)
        longest = config.vllm.max_model_len or settings.get("max_position_embeddings")
        if longest is None:
            raise UsageError(
                "config.json does not say how long a text the model reads",
                where=str(config.model.path),
                hint="set vllm.max_model_len",
            )
        self.longest: int = longest
        self.num_restarts = 0
        _set_environment(config, context, self.has_gpu)
        self.engine = self._start()

    def max_length(self) -> int:
        return self.longest

    def sample(self, prompts: list[Prompt]) -> list[list[Completion]]:
        if self.has_gpu:
            return self._sample(prompts) if prompts else []
        return [samples for prompt in prompts for samples in self._sample([prompt])]

    def restart(self) -> None:
        self.num_restarts += 1
        limit = self.config.vllm.max_restarts
        if self.num_restarts > limit:
            raise PostTrainingError(
                f"the engine died more than {limit} times",
                where="vllm.max_restarts",
                hint="the log of the chunk says why",
            )
        from vllm.distributed import cleanup_dist_env_and_memory

        self.context.log(f"restarting the engine ({self.num_restarts} of {limit})")
        del self.engine
        gc.collect()
        cleanup_dist_env_and_memory()
        self.engine = self._start()

    def _start(self) -> Any:
        from vllm import LLM

        config, n = self.config, self.config.sampling.n
        varying = self.has_gpu and not config.vllm.batch_invariant
        with _explained(config):
            return LLM(
                model=str(config.model.path),
                dtype=config.model.dtype,
                tensor_parallel_size=config.vllm.tensor_parallel_size,
                gpu_memory_utilization=config.vllm.gpu_memory_utilization,
                max_model_len=self.longest,
                enable_prefix_caching=varying,
                enforce_eager=not self.has_gpu,
                generation_config="vllm",  # the recipe says how to sample, not the model's folder
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=0,
                **({} if self.has_gpu else {"max_num_seqs": n}),
            )

    def _sample(self, prompts: list[Prompt]) -> list[list[Completion]]:
        from vllm.inputs import TokensPrompt

        outputs = self.engine.generate(
            [TokensPrompt(prompt_token_ids=prompt.ids) for prompt in prompts],
            [self._parameters(prompt) for prompt in prompts],
            use_tqdm=False,
        )
        return [
            [self._completion(one) for one in sorted(output.outputs, key=lambda one: one.index)]
            for output in outputs
        ]

    def _parameters(self, prompt: Prompt) -> Any:
        from vllm import SamplingParams

        sampling = self.config.sampling
        return SamplingParams(
            n=sampling.n,
            seed=prompt.seed,  # vLLM gives sample j the seed + j
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=min(sampling.max_tokens, self.longest - len(prompt.ids)),
            stop=list(sampling.stop),
            stop_token_ids=sorted(self.endings.ids),
            ignore_eos=True,  # it is among the stop_token_ids
            logprobs=0,  # of the drawn token alone
        )

    def _completion(self, output: Any) -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"the engine gave up a sample: {output.finish_reason}")
        ids = list(output.token_ids)
        steps = zip(ids, output.logprobs, strict=True)
        return Completion(
            self.endings.text(ids),
            ids,
            [step[token].logprob for token, step in steps],
            output.finish_reason,
        )


@contextmanager
def _explained(config: GenerateConfig) -> Iterator[None]:
    """vLLM fails to start with whatever exception its parts raise; none is a row's fault."""
    try:
        yield
    except Exception as error:
        words = " ".join(str(error).split())[:_MOST_CHARACTERS] or type(error).__name__
        raise PostTrainingError(
            f"vLLM can't start with this model: {words}",
            where=str(config.model.path),
            hint="VLLM_LOGGING_LEVEL=INFO says more; backend: transformers does without it",
        ) from error


def _set_environment(config: GenerateConfig, context: StageContext, has_gpu: bool) -> None:
    """What vLLM reads when it is imported, and its engine's processes when they start."""
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
        os.environ["VLLM_BATCH_INVARIANT"] = str(int(config.vllm.batch_invariant))
        if context.ranks.local_world_size > 1:
            # The engine is a process of its own, which takes the first GPU that it sees.
            devices = [str(number) for number in range(torch.cuda.device_count())]
            if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
                devices = visible.split(",")
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[context.ranks.local_rank % len(devices)]
