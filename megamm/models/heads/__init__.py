"""Heads: small modules on the backbone's states that answer in place of tokens."""
