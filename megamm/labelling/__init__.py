"""Unlabelled samples that a trained model labels: it is asked through `inference`, and `prepare` writes what it is sure of as shards.

A room of its own, because the two are neighbours that do not know each other.
"""

from megamm.labelling.pseudo_label import pseudo_label

__all__ = ["pseudo_label"]
