"""Add log-probabilities to rows: RUN/dataset/rows.jsonl, and reference.json, which says whose.

    a branch          completion_ref_logprob, completion_length
    a preference row  ref_chosen_logprob, chosen_length, ref_rejected_logprob, rejected_length

Sums over the tokens of the answer, in nats, and their number.
"""

from post_training.models.quiet import quiet_libraries
from post_training.stages.annotation.annotate import annotate
from post_training.stages.context import Result, StageContext
from post_training.stages.logprobs.config import LogprobsConfig


def run(config: LogprobsConfig, context: StageContext) -> Result:
    quiet_libraries(context.run_dir / "cache")
    from post_training.models.completion_logprobs import LogprobScorer
    from post_training.models.device import on_device
    from post_training.models.left_out import told
    from post_training.models.load import check_vocabulary, load_model
    from post_training.models.positions import most_positions
    from post_training.models.reference import reference_of
    from post_training.stages.annotation.reading_model import load_encoder, load_own_tokenizer
    from post_training.stages.logprobs.annotator import LogprobAnnotator

    path = config.model.path
    tokenizer = load_own_tokenizer(path, config.data)
    encoder = load_encoder(path, config.data)

    def with_transformers() -> LogprobAnnotator:
        model = load_model(
            path,
            dtype=config.model.dtype,
            attn_implementation=config.model.attn_implementation,
            tensor_parallel_size=config.tensor_parallel_size,
        )
        if (left_out := told(model, path)) is not None:
            context.log(f"warning: {left_out}")
        check_vocabulary(model, tokenizer)
        scorer = LogprobScorer(
            on_device(model, context.ranks.local_rank),
            max_batch_tokens=config.max_batch_tokens,
            prompts_per_batch=config.prompts_per_batch,
        )
        return LogprobAnnotator(encoder, scorer, most_positions(model.config))

    def with_vllm() -> LogprobAnnotator:
        from post_training.stages.annotation.vllm_engine import VllmEngine
        from post_training.stages.logprobs.vllm_scorer import VllmScorer

        engine = VllmEngine(config.model, config.vllm, context, sequences_per_prompt=1)
        return LogprobAnnotator(encoder, VllmScorer(engine), engine.longest, engine.restart)

    return annotate(
        config,
        context,
        with_vllm if config.backend == "vllm" else with_transformers,
        reference=lambda: reference_of(
            path, tokenizer, encoder.template.text, config.model.dtype, config.backend
        ),
    )
