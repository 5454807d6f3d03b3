import pytest

from megamm.config import Tokenizer
from megamm.tokenizers import text

SENTENCES = [
    "The word seven names the digit 7, and 12 + 30 = 42.",
    "Find every cell in the picture; answer with boxes.",
    "  def add(a, b):\n        return a + b\t# tabs\r\n",
    "数字七的名字是七。请写出图中的数字。",
    "Ça va très bien, merci. Überall größere Straßen.",
    "Семь плюс восемь будет пятнадцать.",
    "السلام عليكم",
    "🙂👩‍🚀🏳️‍🌈 emoji with joiners ✈️",
]


@pytest.fixture(scope="session")
def sentences():
    return SENTENCES


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    text.train(SENTENCES * 4, Tokenizer(text_size=480, location_bins=20, audio_levels=2, audio_codes=4, spare=3), folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(trained_folder):
    return text.TextTokenizer.load(trained_folder)
