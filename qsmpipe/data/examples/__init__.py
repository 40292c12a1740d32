"""Scans and heads of the example datasets, a TOML file each."""
