import pytest

from megamm.config import Tokenizer
from megamm.tokenizers import text


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "tokenizer"
    text.train(["What digit is this? The word seven. 数字七 🙂\n"] * 4, Tokenizer(text_size=320, location_bins=1000), folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(folder):
    return text.TextTokenizer.load(folder)
