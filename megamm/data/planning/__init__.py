"""What a step is: pure functions of the indexes, the seed and a position."""
