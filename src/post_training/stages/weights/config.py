"""Settings of the stages that keep weights in another form, or make one model of several."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from post_training.config.latest import newest_checkpoint, newest_model
from post_training.config.model import Config, Role, not_default
from post_training.stages.config import StageConfig


class MegatronConfig(Config):
    """How a checkpoint for Megatron-LM is written."""

    format: Literal["torch_dist", "torch"] = Field(
        "torch_dist",
        description="torch_dist: one folder that Megatron loads with any number of ranks. torch: a "
        "file for each rank.",
    )
    tensor_parallel_size: PositiveInt = Field(
        1, description="Tensor-parallel ranks of the format torch."
    )
    pipeline_parallel_size: PositiveInt = Field(
        1, description="Pipeline stages of the format torch. Each has as many layers."
    )
    expert_parallel_size: PositiveInt = Field(
        1, description="Expert-parallel ranks of the format torch."
    )
    transformer_impl: Literal["transformer_engine", "local"] = Field(
        "transformer_engine",
        description="The layers that will load the checkpoint: they decide the names of the norms. "
        "In torch_dist it counts for mixtures alone.",
    )
    make_vocab_size_divisible_by: PositiveInt = Field(
        128,
        description="The embeddings get rows of zeros up to a multiple of this times "
        "tensor_parallel_size, as Megatron's argument of this name does.",
    )

    @model_validator(mode="after")
    def _ranks_of_torch_alone(self) -> "MegatronConfig":
        names = ("pipeline_parallel_size", "expert_parallel_size")
        if self.format == "torch_dist" and (given := not_default(self, names)):
            raise ValueError(f"{given[0]}: only with format: torch; torch_dist is for any ranks")
        return self


class ConvertConfig(StageConfig):
    """`entrypoint convert`: the weights of a checkpoint of Megatron-LM or GPT-NeoX into a Hugging
    Face model, or of a Hugging Face model into a checkpoint of Megatron-LM."""

    ranks_count: ClassVar[bool] = False

    checkpoint: Annotated[Path, Role.INPUT, AfterValidator(newest_checkpoint)] = Field(
        description="Folder of one checkpoint (iter_0001000, global_step1000, or a model of "
        "Hugging Face), or the one above, whose `latest` or latest_checkpointed_iteration.txt "
        "names it."
    )
    average_with: Annotated[
        list[Annotated[Path, AfterValidator(newest_checkpoint)]], Role.INPUT
    ] = Field(
        default_factory=list,
        description="Further checkpoints of the same model. Each weight becomes the mean over all "
        "of them, computed in float64.",
    )
    to: Literal["huggingface", "megatron"] = Field(
        "huggingface",
        description="What is written: a model folder, or a checkpoint of Megatron-LM.",
    )
    tokenizer: Annotated[Path | None, Role.INPUT] = Field(
        None,
        description="Folder of the tokenizer, which becomes part of the model. Needed for "
        "to: huggingface, as these checkpoints hold none.",
    )
    config: Annotated[Path | None, Role.INPUT] = Field(
        None,
        description="A config.json of Hugging Face's whose settings replace those that are found "
        "in the checkpoint, e.g. rope_parameters. Sizes must be those of the weights.",
    )
    neox_configs: Annotated[list[Path], Role.INPUT] = Field(
        default_factory=list,
        description="YAML files of a GPT-NeoX training, later ones win. By default those in the "
        "checkpoint (configs/*.yml).",
    )
    vocab_size: Literal["tokenizer", "padded"] | PositiveInt = Field(
        "tokenizer",
        description="Rows of the embeddings that are kept. tokenizer: as many as it has tokens, "
        "without the padding; padded: all; or a number.",
    )
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = Field(
        "keep", description="dtype of the weights that are written. keep: that of the checkpoint."
    )
    differing_copies: Literal["refuse", "average"] = Field(
        "refuse",
        description="What to do if model-parallel ranks have different copies of one weight, which "
        "happens to norms of GPT-NeoX. refuse: stop. average: take their mean.",
    )
    max_file_size_gb: Annotated[float, Field(gt=0)] = Field(
        5.0, description="Largest weight file of the model folder, in 10⁹ bytes."
    )
    megatron: MegatronConfig = Field(
        MegatronConfig(), description="How to: megatron writes the checkpoint."
    )

    @model_validator(mode="after")
    def _only_what_counts(self) -> "ConvertConfig":
        if self.to == "huggingface":
            if self.tokenizer is None:
                raise ValueError("tokenizer: set it to a folder; the checkpoint has none")
            if given := not_default(self, ["megatron"]):
                raise ValueError(f"{given[0]}: only with to: megatron")
            return self
        names = ("tokenizer", "config", "neox_configs", "vocab_size", "differing_copies")
        if given := not_default(self, (*names, "max_file_size_gb")):
            raise ValueError(f"{given[0]}: only with to: huggingface")
        return self


class MergedModelConfig(Config):
    """A model that is merged, and how much of it."""

    path: Annotated[Path, Role.INPUT, AfterValidator(newest_model)] = Field(
        description="Model folder, or the folder of a LoRA adapter of the base."
    )
    weight: float = Field(1.0, description="Weight of the model, or of its difference to the base.")
    density: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Share of the values of its difference to the base that are kept. ties: the "
        "largest ones; dare: at random.",
    )


class MergeConfig(StageConfig):
    """`entrypoint merge`: several models of one architecture, or a model and LoRA adapters, made
    into one model."""

    ranks_count: ClassVar[bool] = False

    method: Literal["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"] = (
        Field(description="How the weights are computed; the formulas are in the guide on merging.")
    )
    models: list[MergedModelConfig] = Field(
        min_length=1, description="The models, in the order of their indices."
    )
    base: Annotated[Path | None, Role.INPUT, AfterValidator(newest_model)] = Field(
        None,
        description="The model from which the others were trained. Needed for adapters, and by all "
        "methods but linear and slerp.",
    )
    t: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="For slerp: 0 is the first model, 1 the second."
    )
    scale: float = Field(
        1.0, description="What the sum of the differences to the base is multiplied by."
    )
    tokenizer: Annotated[Path | None, Role.INPUT] = Field(
        None,
        description="Folder of the tokenizer and chat template of the result. By default those of "
        "the base, or of the first model; then all must have the same template.",
    )
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = Field(
        "keep",
        description="dtype of the weights that are written; the computation is in float64. keep: "
        "that of the models, which must all have the same.",
    )
    max_file_size_gb: Annotated[float, Field(gt=0)] = Field(
        5.0, description="Largest weight file of the model folder, in 10⁹ bytes."
    )

    @model_validator(mode="after")
    def _only_what_counts(self) -> "MergeConfig":
        with_base = self.method not in ("linear", "slerp")
        if with_base and self.base is None:
            raise ValueError(f"base: {self.method} needs the model that the others started from")
        if self.method == "slerp":
            if len(self.models) != 2:
                raise ValueError(f"models: slerp is between 2 models (got {len(self.models)})")
            if any(not_default(model, ["weight"]) for model in self.models):
                raise ValueError("models: slerp has no weights; set t")
        elif not_default(self, ["t"]):
            raise ValueError("t: only with method: slerp")
        if not with_base and not_default(self, ["scale"]):
            raise ValueError("scale: only with a method that has a base")
        if self.method in ("linear", "slerp", "task_arithmetic") and any(
            not_default(model, ["density"]) for model in self.models
        ):
            raise ValueError("models: density is for ties and dare")
        if self.method == "linear" and sum(model.weight for model in self.models) == 0:
            raise ValueError("models: the weights add up to 0, by which linear divides")
        return self
