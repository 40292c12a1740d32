"""Deep networks for QSM: one file per architecture. They know no unit, no sign and no file."""
