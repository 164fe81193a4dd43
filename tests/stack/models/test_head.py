"""The chunked output layer against full logits in float64: values, gradients."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from post_training.models import head as chunked_head
from post_training.models import logits
from post_training.models.head import ChunkedHead
from post_training.models.logit_scaling import LogitScaling
from post_training.models.logits import multiplies_into_float32, slower_float32_logits

VOCABULARY, HIDDEN, LENGTH = 50, 16, 40


@pytest.fixture(params=[(16 * VOCABULARY, 16), (2**25, 8192)], ids=["many chunks", "one chunk"])
def chunk_numbers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, tile = request.param
    monkeypatch.setitem(chunked_head._CHUNK_NUMBERS, "cpu", numbers)
    monkeypatch.setitem(logits._TILE, "cpu", tile)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The same weights in float32 and in float64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        tie_word_embeddings=request.param,
    )
    model = LlamaForCausalLM(config)
    exact = LlamaForCausalLM(config).double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return model, exact


@pytest.fixture
def batch() -> tuple[Any, Any, Any]:
    """(ids, targets with some ignored, coefficients with some zero)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (3, LENGTH), generator=generator)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    targets[1, 20:] = -100
    coefficients = torch.rand(3, LENGTH, generator=generator)
    coefficients[:, :7] = 0
    return ids, targets, coefficients


def exact_scores(model: Any, ids: Any, targets: Any) -> tuple[Any, Any]:
    """(log p of the targets, log Σ exp) from full logits, zero where there is no target."""
    logits = model(input_ids=ids).logits
    values = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1) - values
    there = targets != -100
    return torch.where(there, logprobs, 0.0), torch.where(there, values, 0.0)


def assert_same_gradients(model: Any, exact: Any) -> None:
    for (name, one), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert one.grad is not None, name
        limit = 2e-6 * max(1.0, float(other.grad.abs().max()))
        assert (one.grad.double() - other.grad).abs().max() <= limit, name


def test_weighted_loss_and_gradient_are_those_of_full_logits(
    chunk_numbers: None, models: Any, batch: Any
):
    (model, exact), (ids, targets, coefficients) = models, batch
    head = ChunkedHead.install(model)
    with head.scoring(targets, coefficients, with_top=True):
        loss, logprobs, tops = model(input_ids=ids, use_cache=False).logits
    (3 * loss).backward()
    expected_logprobs, _ = exact_scores(exact, ids, targets)
    expected = -(coefficients.double() * expected_logprobs).sum()
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(model, exact)
    looked_at = coefficients != 0
    assert (logprobs - expected_logprobs)[looked_at].abs().max() < 1e-5
    assert (logprobs[~looked_at] == 0).all()
    best = exact(input_ids=ids).logits.argmax(-1)
    assert tops.bool().equal((best == targets) & looked_at)


def test_scores_can_be_differentiated_in_any_way(chunk_numbers: None, models: Any, batch: Any):
    (model, exact), (ids, targets, _) = models, batch
    head = ChunkedHead.install(model)
    with head.scoring(targets, with_top=True):
        logprobs, values, tops = model(input_ids=ids, use_cache=False).logits
    expected_logprobs, expected_values = exact_scores(exact, ids, targets)
    best = exact(input_ids=ids).logits.argmax(-1)
    assert tops.bool().equal(best == targets)
    ((logprobs + 0.5 * values) ** 2).mean().backward()
    ((expected_logprobs + 0.5 * expected_values) ** 2).mean().backward()
    assert (logprobs - expected_logprobs).abs().max() < 1e-5
    assert (values - expected_values).abs().max() < 1e-5
    assert_same_gradients(model, exact)


def test_a_batch_with_nothing_to_score_has_loss_and_gradient_zero(models: Any, batch: Any):
    (model, _), (ids, targets, coefficients) = models, batch
    head = ChunkedHead.install(model)
    with head.scoring(targets, torch.zeros_like(coefficients)):
        loss, _, _ = model(input_ids=ids, use_cache=False).logits
    loss.backward()
    assert loss.item() == 0
    assert all(float(weights.grad.abs().max()) == 0 for weights in model.parameters())


def test_many_small_log_probabilities_in_bfloat16_are_summed_in_float32(models: Any):
    """A bfloat16 log-softmax summed over hundreds of tokens was off by up to 2.3 nats."""
    model = models[0].bfloat16()
    ids = torch.randint(0, VOCABULARY, (1, 512), generator=torch.Generator().manual_seed(2))
    targets = ids.roll(-1, 1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()  # as the model gives them, rounded there
        expected = logits.log_softmax(-1).gather(-1, targets[..., None]).sum().item()
        rounded = model(input_ids=ids).logits.log_softmax(-1).gather(-1, targets[..., None])
        head = ChunkedHead.install(model)
        with head.scoring(targets, torch.ones(1, 512)):
            loss, logprobs, _ = model(input_ids=ids, use_cache=False).logits
    assert loss.dtype == logprobs.dtype == torch.float32
    assert -loss.item() == pytest.approx(expected, abs=1e-3)
    assert abs(rounded.sum().item() - expected) > 0.05


@pytest.mark.parametrize("models", [False], ids=["untied"], indirect=True)
def test_gradient_of_bfloat16_weights_is_summed_over_the_chunks_in_float32(
    monkeypatch: pytest.MonkeyPatch, models: Any, batch: Any
):
    """Of eight equal rows, each a chunk: eight times its own, whose bits all fit; 3 g and 5 g, the
    sums on the way, don't fit into bfloat16."""
    import torch

    from post_training.models import head as chunked_head
    from post_training.models.head import ChunkedHead

    model, ids = models[0].bfloat16(), batch[0][:1, :17].repeat(8, 1)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    head = ChunkedHead.install(model)
    gradients = []
    for numbers in (2**25, 16 * VOCABULARY):
        monkeypatch.setitem(chunked_head._CHUNK_NUMBERS, "cpu", numbers)
        model.zero_grad()
        with head.scoring(targets, torch.ones(8, 17)):
            model(input_ids=ids, use_cache=False).logits[0].backward()
        gradients.append(model.get_output_embeddings().weight.grad)
    one, many = gradients
    assert (one == many).double().mean() > 0.98


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
def test_logits_in_float32_are_as_exact_as_the_numbers_that_are_multiplied(
    chunk_numbers: None, models: Any, batch: Any, autocast: bool
):
    """Of the same bfloat16 numbers in float64: 1e-5 nats apart, where rounded logits are 1e-3."""
    layer = models[0].get_output_embeddings()
    generator = torch.Generator().manual_seed(3)
    hidden = (3 * torch.randn(3, LENGTH, HIDDEN, generator=generator)).bfloat16()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(VOCABULARY, HIDDEN, generator=generator).bfloat16())
    exact = hidden.double() @ layer.weight.detach().double().T
    (_, targets, coefficients), apart = batch, {}
    there = (targets != -100) & (coefficients != 0)
    expected = exact.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    layer = layer.float() if autocast else layer.bfloat16()
    for in_float32 in (True, False):
        head = ChunkedHead(layer, LogitScaling(), float32_logits=in_float32)
        states = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with head.scoring(targets):
                scored, _, _ = layer(states)
            with head.scoring(targets, coefficients):
                loss, logprobs, _ = layer(states)
        loss.backward()
        found = [(values.detach().double() - expected)[there] for values in (scored, logprobs)]
        apart[in_float32] = max(float(each.abs().max()) for each in found)
        assert torch.isfinite(states.grad).all()
    assert apart[True] < 1e-5
    assert apart[False] > 1e-3


def test_logits_in_float32_on_a_device_without_such_a_product_are_told_as_slower():
    assert not multiplies_into_float32("cpu")
    assert "torch has no product of bfloat16 matrices into float32 on cpu" in (
        slower_float32_logits("cpu") or ""
    )


def test_outside_of_scoring_the_model_is_as_before(models: Any, batch: Any):
    (model, _), (ids, targets, _) = models, batch
    before = model(input_ids=ids).logits
    head = ChunkedHead.install(model)
    with head.scoring(targets):
        model(input_ids=ids, use_cache=False)
    assert model(input_ids=ids).logits.equal(before)


def test_full_logits_are_never_held(monkeypatch: pytest.MonkeyPatch, models: Any, batch: Any):
    monkeypatch.setitem(chunked_head._CHUNK_NUMBERS, "cpu", 16 * VOCABULARY)
    (model, _), (ids, targets, coefficients) = models, batch
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (VOCABULARY,):
                largest = max(largest, result.numel())
            return result

    head = ChunkedHead.install(model)
    with Watch(), head.scoring(targets, coefficients):
        model(input_ids=ids, use_cache=False).logits[0].backward()
    assert 0 < largest <= 16 * VOCABULARY
