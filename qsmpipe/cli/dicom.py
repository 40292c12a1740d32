"""``qsmpipe dicom``: gradient echoes from DICOM into a BIDS dataset."""

from collections.abc import Sequence
from pathlib import Path

from qsmpipe.cli.errors import Exit, RunError
from qsmpipe.cli.words import Parser


def main(words: Sequence[str]) -> Exit:
    """Convert one acquisition and say what was found."""
    given = _parser().parse(words)
    if not given.dicom_dir.is_dir():
        raise RunError(Exit.NO_INPUT, f"{given.dicom_dir}: no such folder")
    from qsmpipe import dicom

    try:
        scan = dicom.read(given.dicom_dir, series=given.series)
        dicom.write(
            scan,
            given.bids_dir,
            subject=given.participant_label,
            session=given.session_label,
            acquisition=given.acquisition_label,
        )
    except ValueError as error:
        raise RunError(Exit.BAD_DATA, str(error)) from error
    except OSError as error:
        raise RunError(Exit.CANNOT_CREATE, str(error)) from error
    times = ", ".join(f"{1000 * time:g}" for time in scan.echo_times)
    grid = " x ".join(map(str, scan.volumes[0].stored.shape))
    print(f"{grid} voxels, echo times {times} ms, {' and '.join(scan.parts)}: in {given.bids_dir}")
    return Exit.OK


def _parser() -> Parser:
    parser = Parser(
        prog="qsmpipe dicom",
        description="Convert one multi-echo gradient-echo acquisition from DICOM to BIDS. "
        "For whole studies use dcm2niix with heudiconv or bidscoin.",
    )
    parser.add_argument("dicom_dir", type=Path, help="its files, sub-folders included")
    parser.add_argument("bids_dir", type=Path, help="a dataset, made where there is none")
    parser.add_argument("--participant-label", required=True, metavar="LABEL")
    parser.add_argument("--session-label", metavar="LABEL")
    parser.add_argument("--acquisition-label", metavar="LABEL")
    parser.add_argument(
        "--series", type=int, nargs="+", default=(), metavar="N", help="series numbers to read"
    )
    return parser
