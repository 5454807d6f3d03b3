"""From a run to a Hugging Face folder that needs no megamm, with stock views and a proof of parity."""

from megamm.export.export import export, export_peft

__all__ = ["export", "export_peft"]
