"""From a run to a Hugging Face folder that needs no megamm, with stock views and a proof of parity."""

from megamm.export.export import export

__all__ = ["export"]
