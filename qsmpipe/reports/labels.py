"""Labels by which the reports find numbers and pictures again."""

BRAIN_VOLUME = "Brain mask"
QSM_VOLUME = "QSM mask"
LOST = "Brain mask lost by erosion"
ECHOES = "Echoes"
CHI_SD = "Susceptibility, SD"
CHI_MEAN = "Susceptibility, mean"
REFERENCE = "Reference value subtracted"
EDGE = "Local field, size at the edge over centre"
LEFT = "Background left in the local field"
JUMPS = "Phase jumps left in the total field"
EXTREME = "Voxels beyond 1 ppm"
R2STAR = "R2*, median"

HEADLINES = (ECHOES, BRAIN_VOLUME, LOST, CHI_SD, REFERENCE, LEFT, JUMPS, R2STAR)
"""Labels of the numbers that head a report."""

INDEXED = (BRAIN_VOLUME, LOST, CHI_SD, LEFT, JUMPS)
"""Labels of the numbers that the index compares."""

COMPARED = ("Total field", "Local field")
"""Titles of pictures of the same slices, to be looked at in turn."""
