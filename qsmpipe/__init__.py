"""Quantitative susceptibility mapping as a BIDS App and as Nipype workflows."""

__version__ = "0.1.0"

__all__ = ["__version__", "interfaces", "numerics", "workflows"]
