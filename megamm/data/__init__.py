"""The streaming data layer: shards, order, mixture, packing, dealing, reading, decoding, the loader and its ledger."""
