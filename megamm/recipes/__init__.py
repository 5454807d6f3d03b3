"""Recipes as package data, one documented TOML file a run."""
