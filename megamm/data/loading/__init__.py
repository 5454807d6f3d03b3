"""How a step comes into memory: decoders, collating, the loader, its budget."""
