"""Families whose logits are more than hidden · weightᵀ, against their own code in float64."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from post_training.core.errors import PostTrainingError, UsageError
from post_training.models import logits
from post_training.models.head import ChunkedHead
from post_training.models.logit_scaling import LogitScaling, find_logit_scaling

VOCABULARY, LENGTH = 50, 24
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Caps low enough to be felt.
FAMILIES: dict[str, tuple[dict[str, Any], LogitScaling]] = {
    "granite": ({"logits_scaling": 3.0}, LogitScaling(1 / 3)),
    "cohere": ({"logit_scale": 0.0625}, LogitScaling(0.0625)),
    "cohere2": ({"logit_scale": 0.25}, LogitScaling(0.25)),
    "gemma2": ({"final_logit_softcapping": 1.5}, LogitScaling(1, 1.5)),
    "gemma4_text": (
        # Its table of a vector for each token and layer has 262,144 × 256 values by default.
        {
            "final_logit_softcapping": 2.0,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8,
        },
        LogitScaling(1, 2),
    ),
    "nanochat": ({"final_logit_softcapping": 0.7}, LogitScaling(1, 0.7)),
    "phi": ({}, LogitScaling()),  # with a bias
    "llama": ({}, LogitScaling()),
}


def make(family: str) -> tuple[Any, Any]:
    """The same weights in float32 and in float64; spread out, so that logits are large."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family][0]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.3 * torch.randn_like(weights))
    exact = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return model.eval(), exact.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_bend_is_found_whatever_the_setting_is_called(family: str):
    found, expected = find_logit_scaling(make(family)[0]), FAMILIES[family][1]
    assert found.scale == pytest.approx(expected.scale, rel=1e-8)
    assert found.cap == expected.cap


@pytest.mark.parametrize("numbers", [16 * VOCABULARY, 2**25], ids=["many chunks", "one chunk"])
@pytest.mark.parametrize("weighted", [True, False], ids=["loss", "scores"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_the_familys_own_code(
    family: str, weighted: bool, numbers: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(logits._TILE, "cpu", 16)
    model, exact = make(family)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, LENGTH), generator=generator)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    coefficients = torch.rand(3, LENGTH, generator=generator)
    z = exact(input_ids=ids, use_cache=False).logits
    values = z.logsumexp(-1)
    logprobs = z.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1) - values
    asked = targets != -100
    head = ChunkedHead.install(model)
    if weighted:
        expected = -(coefficients.double() * logprobs * asked).sum()
        with head.scoring(targets, coefficients, chunk_numbers=numbers):
            loss, found, _ = model(input_ids=ids, use_cache=False).logits
    else:
        expected = ((logprobs + 0.5 * values) ** 2)[asked].mean()
        with head.scoring(targets, chunk_numbers=numbers):
            found, sums, _ = model(input_ids=ids, use_cache=False).logits
        loss = ((found + 0.5 * sums) ** 2)[asked].mean()
        assert (sums - values)[asked].abs().max() < 1e-4
    assert (found - logprobs)[asked].abs().max() < 1e-4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    for (name, one), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        if other.grad is not None:
            limit = 5e-5 * max(1.0, float(other.grad.abs().max()))
            assert (one.grad.double() - other.grad).abs().max() <= limit, name


def test_model_that_does_something_else_to_its_logits_is_refused():
    model, _ = make("llama")
    plain = model.forward
    model.forward = lambda **inputs: _squared(plain(**inputs))
    with pytest.raises(UsageError, match="does not know what models of the type llama do to their"):
        ChunkedHead.install(model)


def test_answer_with_an_id_that_the_output_layer_lacks_is_refused():
    model, _ = make("llama")
    model.lm_head = torch.nn.Linear(16, 40, bias=False)
    head = ChunkedHead.install(model)
    ids = torch.arange(12)[None]
    with head.scoring(ids.roll(-1, 1)):
        found, _, _ = model(input_ids=ids, use_cache=False).logits
    expected = model(input_ids=ids).logits.log_softmax(-1)[0, range(12), ids.roll(-1, 1)[0]]
    assert (found[0] - expected).abs().max() < 1e-5
    with (
        pytest.raises(PostTrainingError, match=r"holds the id 45, .* its output layer has 40 ids"),
        head.scoring(torch.full((1, 12), 45)),
    ):
        model(input_ids=ids, use_cache=False)


def _squared(outputs: Any) -> Any:
    outputs.logits = outputs.logits**2
    return outputs
