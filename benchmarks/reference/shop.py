"""Recommendation as the data's README measures it: which items, of those that a customer never had, are in the last basket?

Wanted are the items of the last basket that the customer had in none before; customers without any are left out. Ranked are all items that
the customer did not have. Recall at 10 is what is found among ten, over as many as could be. What is counted, popularity and co-occurrence
included, stands in baskets before the last.

Legend: N items.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.reference.made_of import figures_digest
from megamm.core.errors import DataError
from megamm.core.files import read_json, write_json
from megamm.core.types import Sample
from megamm.metrics.bootstrap import interval, mean_of
from megamm.metrics.ranking import ranking_scores

CUTOFF = 10
_BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Customer:
    """One customer's baskets as rows of the item table, in the order of time.

    Attributes:
        name: As samples name the customer.
        before: Baskets before the last, each without repeats.
        last: The last.
    """

    name: str
    before: tuple[NDArray[np.int64], ...]
    last: frozenset[int]

    @property
    def had(self) -> frozenset[int]:
        """All items of earlier baskets."""
        return frozenset(int(item) for basket in self.before for item in basket)

    @property
    def wanted(self) -> frozenset[int]:
        """What is to be found."""
        return self.last - self.had


@dataclass(frozen=True)
class Shop:
    """All customers and items.

    Attributes:
        items: Their ids; an item's row is its place here.
        customers: Those with two baskets or more.
    """

    items: tuple[str, ...]
    customers: tuple[Customer, ...]

    @classmethod
    def read(cls, folder: Path) -> Shop:
        """Read `baskets.jsonl.gz` and `items.tsv.gz`."""
        lines = gzip.decompress((folder / "items.tsv.gz").read_bytes()).decode().splitlines()
        items = tuple(line.split("\t")[0] for line in lines)
        rows = {item: row for row, item in enumerate(items)}
        users = [json.loads(line) for line in gzip.decompress((folder / "baskets.jsonl.gz").read_bytes()).decode().splitlines()]
        customers = []
        for user in users:
            *before, last = [np.unique([rows[str(item)] for item in basket]) for _, basket in user["baskets"]]
            if before:
                customers.append(Customer(str(user["user"]), tuple(before), frozenset(last.tolist())))
        return cls(items, tuple(customers))

    @property
    def asked(self) -> list[Customer]:
        """Customers whose last basket holds something new."""
        return [customer for customer in self.customers if customer.wanted]

    @cached_property
    def popularity(self) -> NDArray[np.float64]:
        """float64[N]: baskets that hold an item."""
        counts = np.zeros(len(self.items))
        for customer in self.customers:
            for basket in customer.before:
                counts[basket] += 1
        return counts

    @cached_property
    def co_occurrence(self) -> NDArray[np.float64]:
        """float64[N, N]: how often two items meet, over how often either is there (Jaccard's index).

        An item of a basket meets the others of the basket, and what is new in the next one.
        """
        met = np.zeros((len(self.items),) * 2)
        left, right = self.popularity.copy(), self.popularity.copy()
        for customer in self.customers:
            for basket in customer.before:
                met[np.ix_(basket, basket)] += 1
        np.fill_diagonal(met, 0)
        for customer in self.customers:
            had = np.zeros(0, dtype=np.int64)
            for basket, following in zip(customer.before, customer.before[1:], strict=False):
                had = np.union1d(had, basket)
                new = np.setdiff1d(following, had)
                met[np.ix_(basket, new)] += 1
                left[basket] += 1
                right[new] += 1
        either = left[:, None] + right[None, :] - met
        return np.divide(met, either, out=np.zeros_like(met), where=either > 0)

    def ranked(self, scores: Callable[[Customer], NDArray[np.float64]], customers: Sequence[Customer]) -> list[list[int]]:
        """The best items of each customer that it never had, by descending score."""
        rankings = []
        for customer in customers:
            of_customer = scores(customer).copy()
            of_customer[list(customer.had)] = -np.inf
            rankings.append(np.argsort(-of_customer, kind="stable")[:CUTOFF].tolist())
        return rankings


def figures(rankings: Sequence[Sequence[int]], customers: Sequence[Customer]) -> dict[str, float]:
    """`recall`, `hit_rate` and `ndcg` at 10."""
    return {name: float(values.mean()) for name, values in of_customers(rankings, customers).items()}


def of_customers(rankings: Sequence[Sequence[int]], customers: Sequence[Customer]) -> dict[str, NDArray[np.float64]]:
    """The same of each customer, float64[N]."""
    wanted = [customer.wanted for customer in customers]
    scores = ranking_scores(rankings, wanted, (CUTOFF,))[CUTOFF]
    sizes = np.array([len(one) for one in wanted])
    return {"recall": scores.recalls * sizes / np.minimum(sizes, CUTOFF), "hit_rate": scores.hits, "ndcg": scores.gains}


def baselines(shop: Shop) -> dict[str, dict[str, float]]:
    """Popularity, and co-occurrence with the basket before: the figures of each."""
    asked = shop.asked
    ways = {
        "popularity": lambda customer: shop.popularity,
        "co-occurrence": lambda customer: shop.co_occurrence[customer.before[-1]].sum(axis=0),
    }
    return {name: figures(shop.ranked(scores, asked), asked) for name, scores in ways.items()}


def model_figures(run: Path, shards: Path, shop: Shop, output: Path, *, share: bool = False) -> dict[str, Any]:
    """The figures of a trained run, from an exact ranking of all items for each test customer; made once for its weights and shards.

    Args:
        run: The run.
        shards: The set's shards.
        shop: The raw baskets, which say what a customer had before what a sample shows.
        output: JSON that keeps the result.
        share: The shards hold a share of the customers only.

    Returns:
        As `figures`, with `intervals` (95 %, over customers), `customers` and `made_of`.

    Raises:
        DataError: Customers are missing among the shards, and no `share` of them was asked for.
        MegaMMError: The run or the shards cannot be read.
    """
    digest = figures_digest(run)
    if not output.is_file() or read_json(output)["made_of"] != digest:
        output.unlink(missing_ok=True)
        print("\nranking all items for each customer", flush=True)
        rankings = _rankings(run, shards, {customer.name: customer for customer in shop.asked}, shop.items)
        customers = [customer for customer in shop.asked if customer.name in rankings]
        if not share and len(customers) < len(shop.asked):
            raise DataError(
                f"{shards}: {len(shop.asked) - len(customers)} of {len(shop.asked)} customers are missing; prepare the set anew"
            )
        rows = {item: row for row, item in enumerate(shop.items)}
        found = [[rows[item] for item in rankings[customer.name]] for customer in customers]
        values = of_customers(found, customers)
        ends = {name: interval(mean_of(each), len(customers)) for name, each in values.items()}
        kept = {name: float(each.mean()) for name, each in values.items()}
        intervals = {name: [one.low, one.high] for name, one in ends.items()}
        write_json(output, {**kept, "intervals": intervals, "customers": len(customers), "made_of": digest})
    return read_json(output)


def _rankings(run: Path, shards: Path, customers: Mapping[str, Customer], items: Sequence[str]) -> dict[str, list[str]]:
    from megamm.evaluation.held_out import list_places, read_samples
    from megamm.inference.item_trie import ItemTrie
    from megamm.inference.load import load_model
    from megamm.inference.prompt import make_prompt
    from megamm.inference.ranking import rank_items
    from megamm.tasks.template import split_answer

    loaded = load_model(run)
    trie = ItemTrie.of(loaded)
    samples = [sample for _, sample in read_samples(list_places({"shop": str(shards / "test-*.tar")})) if isinstance(sample, Sample)]
    asked = [
        (customers[sample.metadata["user"]], make_prompt(loaded, split_answer(sample.messages)[0], sample.media))
        for sample in samples
        if sample.metadata["user"] in customers
    ]
    # Rows are as long as the longest of their batch.
    asked.sort(key=lambda one: len(one[1].input_ids))
    found = {}
    for start in range(0, len(asked), _BATCH_SIZE):
        batch = asked[start : start + _BATCH_SIZE]
        had = [[items[row] for row in customer.had if items[row] in trie.table] for customer, _ in batch]
        ranked = rank_items(loaded, trie, [prompt for _, prompt in batch], excluded=had, max_items=CUTOFF)
        found |= {customer.name: [item.id for item in ranking] for (customer, _), ranking in zip(batch, ranked, strict=True)}
    return found
