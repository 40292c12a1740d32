"""A BIDS dataset: its acquisitions, their names and metadata, and the masks of its user."""

from qsmpipe.bids.acquisition import Acquisition, echo_of, together
from qsmpipe.bids.dataset import find
from qsmpipe.bids.masks import find_mask
from qsmpipe.bids.sidecars import as_number
from qsmpipe.bids.survey import Found, Refusal
from qsmpipe.bids.validator import Invalid, validate

__all__ = [
    "BIDS_VERSION", "Acquisition", "Found", "Invalid", "Refusal", "as_number", "echo_of", "find",
    "find_mask", "together", "validate",
]  # fmt: skip

BIDS_VERSION = "1.11.1"
"""Version of the standard that written datasets follow."""
