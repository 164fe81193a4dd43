"""Log-probabilities of completions against a full float64 log-softmax, one forward each."""

import copy
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from post_training.models.logit_scaling import find_state_scale
from post_training.models.score import Asked, LogprobScorer

VOCABULARY = 60


@pytest.fixture(scope="module", params=["llama", "apertus", "mistral"])
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The same weights in float32 and in float64; mistral with a sliding window."""
    torch.manual_seed(0)
    window = {"sliding_window": 6} if request.param == "mistral" else {}
    config = CONFIG_MAPPING[request.param](
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        **window,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    exact = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return model, exact


def prompts(num_prompts: int = 4) -> list[Any]:
    """Of 1, 6, 11, … tokens, with completions of different lengths; some tokens are not asked."""
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()

    made = []
    for number in range(num_prompts):
        completions = [ids(1 + (5 * number + 7 * index) % 17) for index in range(2 + number)]
        asked = [[t % 4 != 1 for t in range(len(each))] for each in completions]
        made.append(Asked(ids(1 + 5 * number), completions, asked if number % 2 else ()))
    return made


def naive(model: Any, prompt: Any) -> list[tuple[float, int]]:
    """(sum over the asked tokens, their number): full logits, one forward a completion."""
    found = []
    for index, completion in enumerate(prompt.completions):
        ids = torch.tensor([[*prompt.ids, *completion]])
        with torch.no_grad():
            logprobs = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0]
        first = len(prompt.ids) - 1
        asked = prompt.asked[index] if prompt.asked else [True] * len(completion)
        terms = [
            float(logprobs[first + t, token]) for t, token in enumerate(completion) if asked[t]
        ]
        found.append((sum(terms), len(terms)))
    return found


def score(model: Any, asked: list[Any], **limits: int) -> list[list[tuple[float, int]]]:
    limits = {"max_batch_tokens": 100, "prompts_per_batch": 1, **limits}
    found = LogprobScorer(model, **limits).score(asked)
    return [[(each.logprob, each.num_tokens) for each in of_prompt] for of_prompt in found]


@pytest.mark.parametrize("prompts_per_batch", [1, 3])
@pytest.mark.parametrize("max_batch_tokens", [1, 60, 10_000])
def test_logprobs_equal_float64_log_softmax_to_1e_5_a_token(
    models, prompts_per_batch, max_batch_tokens
):
    model, exact = models
    asked = prompts()
    found = score(
        model, asked, prompts_per_batch=prompts_per_batch, max_batch_tokens=max_batch_tokens
    )
    for prompt, own in zip(asked, found, strict=True):
        for (logprob, count), (expected, number) in zip(own, naive(exact, prompt), strict=True):
            assert count == number
            assert abs(logprob - expected) <= 1e-5 * max(1, number)


def test_logprobs_of_a_prompt_have_the_same_bits_whatever_is_beside_it(models):
    model, _ = models
    asked = prompts()
    together = score(model, asked)
    assert [score(model, [prompt])[0] for prompt in asked] == together
    assert score(model, asked[::-1])[::-1] == together


def test_logprobs_of_bfloat16_weights_are_summed_in_higher_precision(models):
    model, exact = models
    half = copy.deepcopy(model).to(torch.bfloat16)
    rounded = copy.deepcopy(exact)
    rounded.load_state_dict({name: value.double() for name, value in half.state_dict().items()})
    asked = prompts()
    for prompt, own in zip(asked, score(half, asked), strict=True):
        for (logprob, count), (expected, _) in zip(own, naive(rounded, prompt), strict=True):
            # bfloat16 logits are off by 2^-9 of their size, in both directions.
            assert abs(logprob - expected) <= 0.02 * max(1, count)


def test_logprobs_of_a_completion_are_summed_in_float64(models):
    model, _ = models
    totals = [logprob for of_prompt in score(model, prompts()) for logprob, _ in of_prompt]
    exact = torch.tensor(totals, dtype=torch.float64)
    assert not exact.float().double().equal(exact)


OTHERS = {
    "llama4_text": {"intermediate_size": 32, "intermediate_size_mlp": 32, "num_local_experts": 2,
                    "head_dim": 8},
    "mamba": {"state_size": 4},
    "falcon_h1": {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_n_groups": 1,
                  "mamba_d_state": 4, "intermediate_size": 32, "lm_head_multiplier": 0.5},
    # It divides its states before the output layer.
    "minicpm3": {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                 "v_head_dim": 8, "intermediate_size": 32, "dim_model_base": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "intermediate_size": 32},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        **{f"linear_num_{kind}_heads": 2 for kind in ("key", "value")},
        **{f"linear_{kind}_head_dim": 8 for kind in ("key", "value")},
    },
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_logprobs_of_a_model_with_other_caches_are_those_of_each_row_alone(family: str):
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    config = CONFIG_MAPPING[family](**shape, **OTHERS[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    asked = prompts()
    together = score(model, asked)
    for prompt, own in zip(asked, together, strict=True):
        for (logprob, count), (expected, number) in zip(own, naive(model, prompt), strict=True):
            assert count == number
            assert abs(logprob - expected) <= 1e-5 * max(1, number)
    assert [score(model, [prompt])[0] for prompt in asked] == together


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_that_are_turned_to_the_weights_dtype_have_no_scale(dtype: torch.dtype):
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1}
    config = CONFIG_MAPPING["mamba"](**shape, **OTHERS["mamba"])
    assert find_state_scale(AutoModelForCausalLM.from_config(config, dtype=dtype)) == 1
