"""The engine room: everything that touches DeepSpeed. Other rooms see `World`, `Engine` and plain tensors."""
