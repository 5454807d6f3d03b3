import numpy as np
import pytest

from megamm.config import Tokenizer
from megamm.tokenizers import text
from megamm.tokenizers.items import ItemTable


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "tokenizer"
    text.train(["What digit is this? The word seven. 数字七 🙂\n"] * 4, Tokenizer(text_size=320, location_bins=1000), folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(folder):
    return text.TextTokenizer.load(folder)


@pytest.fixture(scope="session")
def with_items(tmp_path_factory):
    """A tokenizer of two items: `cup` with the codes (1, 0), `lamp` with (1, 2)."""
    items = ItemTable(("cup", "lamp"), ("", "A lamp"), np.array([[1, 0], [1, 2]], dtype=np.int32), 3)
    config = Tokenizer(text_size=320, item_levels=2, item_codes=3)
    return text.train(["A lamp and a cup.\n"] * 4, config, tmp_path_factory.mktemp("items") / "tokenizer", items=items)
