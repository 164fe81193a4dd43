"""Small tokenizers. `tokenizer`: every character of ASCII is a token of its own. `tokenizers`: by
kind, with merges, and with the markers of all our templates."""

import json
from typing import Any

import pytest

KINDS = (
    "byte-level",
    "byte-level, own split, bos",
    "byte-level, NFC",
    "byte-level, trimmed offsets",
    "byte-level, prefix space",
    "byte-level, stripping",
    "metaspace first",
    "metaspace always",
    "sentencepiece, normaliser",
)

MERGES = [
    "some merges  some merges\n\n\n user\n assistant\n é 🙂 日本",
    "question answer question answer, the the an an in in er er\n\n",
] * 4


@pytest.fixture
def tokenizer() -> Any:
    from post_training.models.save import train_tokenizer

    markers = ("<|im_start|>", "<|im_end|>")
    return train_tokenizer([], 261, markers, chat_template="")


@pytest.fixture(params=KINDS, scope="session")
def kind(request: pytest.FixtureRequest) -> str:
    """Of each of `tokenizers`."""
    return request.param


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Any]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    from post_training.data.chat.templates import MARKERS

    special = ["<s>", "</s>", "<pad>", *(token for own in MARKERS.values() for token in own)]
    byte_level = pre.ByteLevel(add_prefix_space=False)
    words = pre.Split(Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    own_split = pre.Sequence([words, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_tokens = [f"<0x{number:02X}>" for number in range(256)]

    def made(
        pre_tokenizer: Any,
        *,
        model: Any = None,
        alphabet: list[str] | None = None,
        normalizer: Any = None,
        decoder: Any = None,
        post_processor: Any = None,
        stripping: bool = False,
    ) -> Any:
        backend = Tokenizer(model or models.BPE())
        if pre_tokenizer is not None:
            backend.pre_tokenizer = pre_tokenizer
        if normalizer is not None:
            backend.normalizer = normalizer
        backend.decoder = decoder or decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=special + (byte_tokens if alphabet is None else []),
            initial_alphabet=alphabet or [],
            show_progress=False,
        )
        backend.train_from_iterator(MERGES, trainer)
        if post_processor is not None:
            backend.post_processor = post_processor
        state = json.loads(backend.to_str())
        state["added_tokens"] = [
            token for token in state["added_tokens"] if token["content"] not in byte_tokens
        ]
        for token in state["added_tokens"]:
            token["lstrip"] = stripping and token["content"] == "</s>"
            token["rstrip"] = stripping and "assistant" in token["content"]
        backend = Tokenizer.from_str(json.dumps(state))
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        return PreTrainedTokenizerFast(tokenizer_object=backend, **names)

    def metaspace(scheme: str) -> Any:
        model = models.BPE(byte_fallback=True, fuse_unk=True)
        decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        return made(pre.Metaspace("▁", scheme, split=False), model=model, decoder=decoder)

    bytes_ = sorted(pre.ByteLevel.alphabet())
    begins = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    trimmed = processors.ByteLevel(trim_offsets=True)
    return {
        "byte-level": made(byte_level, alphabet=bytes_),
        "byte-level, own split, bos": made(own_split, alphabet=bytes_, post_processor=begins),
        "byte-level, NFC": made(own_split, alphabet=bytes_, normalizer=normalizers.NFC()),
        "byte-level, trimmed offsets": made(byte_level, alphabet=bytes_, post_processor=trimmed),
        "byte-level, prefix space": made(pre.ByteLevel(add_prefix_space=True), alphabet=bytes_),
        "byte-level, stripping": made(byte_level, alphabet=bytes_, stripping=True),
        "metaspace first": metaspace("first"),
        "metaspace always": metaspace("always"),
        "sentencepiece, normaliser": made(
            None,
            model=models.BPE(byte_fallback=True, fuse_unk=True),
            normalizer=normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            ),
            decoder=decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            ),
        ),
    }
