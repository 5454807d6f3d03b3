"""Training lays the items of a basket out in another order each time; the same tokens, as long as planned."""

import numpy as np

from megamm.config import Augment, Tokenizer
from megamm.core.types import Message, Part, Sample
from megamm.data.media.augment import Changes
from megamm.data.media.features import MediaRules
from megamm.data.samples.encode import SampleEncoder
from megamm.tokenizers import text
from megamm.tokenizers.items import ItemTable

IDS = tuple("abcdefgh")


def test_items_are_laid_out_in_another_order_and_as_long_as_planned(tmp_path):
    codes = np.array([[number // 3, number % 3] for number in range(len(IDS))], dtype=np.int32)
    config = Tokenizer(text_size=300, location_bins=0, item_levels=2, item_codes=3)
    encoder = SampleEncoder(
        text.train(["what comes next?"] * 20, config, tmp_path, items=ItemTable(IDS, ("",) * len(IDS), codes, 3)), MediaRules(None, None)
    )
    basket, line = [Part("item", data={"id": name}) for name in IDS], Part("text", text="\nwhat comes next?")
    answer = Message("assistant", tuple(basket[:3]))
    sample = Sample("s", "recommendation", (Message("user", (*basket, line)), answer), {}, {})
    plain, size = encoder.encode("shop", sample)
    orders = set()
    for position in range(10):
        changes = Changes.at(Augment(item_shuffle=True), 1, position)
        found, found_size = encoder.encode("shop", sample, changes)
        assert found_size == size and sorted(found.input_ids) == sorted(plain.input_ids)
        assert (found.labels >= 0).tolist() == (plain.labels >= 0).tolist()
        orders.add(tuple(found.input_ids))
    assert len(orders) == 10 and encoder.measure(sample, {})[0] == size
