"""Real data beside the checkout, in ../shared/data; what needs it is skipped elsewhere."""

from pathlib import Path

import pytest

_DATA = Path(__file__).parents[3] / "shared/data"
GSM8K = _DATA / "gsm8k"
TOKENIZERS = _DATA / "tokenizers"

needs_gsm8k = pytest.mark.skipif(not GSM8K.exists(), reason="no GSM8K in ../shared/data")
needs_tokenizers = pytest.mark.skipif(
    not TOKENIZERS.exists(), reason="no tokenizers in ../shared/data"
)
