"""Tar shards where they lie: their indexes, checked reading, remote files and the cache."""
