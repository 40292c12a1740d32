"""The BIDS validator, where it is installed."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Invalid:
    """An error that bids-validator finds."""

    code: str
    location: str
    """Path below the dataset's root; empty if the error is of no file."""
    message: str

    @property
    def of_subject(self) -> bool:
        """Whether it lies in a folder of the dataset, as all files of subjects do."""
        return "/" in self.location

    def __str__(self) -> str:
        return ": ".join(part for part in (self.code, self.location, self.message) if part)


def validate(root: str | Path) -> list[Invalid] | None:
    """Errors that bids-validator finds in a dataset; None where it is not installed.

    Raises
    ------
    ValueError
        If the validator itself fails.
    """
    beside = str(Path(sys.executable).parent)
    program = shutil.which("bids-validator-deno") or shutil.which(
        "bids-validator-deno", path=beside
    )
    if program is None:
        return None
    with tempfile.TemporaryDirectory() as cache:
        command = [program, str(Path(root).absolute()), "--format", "json", "--ignoreWarnings"]
        quiet = {"DENO_DIR": cache, "DENO_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | quiet
        )
    try:
        issues = json.loads(done.stdout)["issues"]
    except (ValueError, KeyError) as error:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        msg = f"bids-validator-deno ended with {done.returncode}: {''.join(last)}"
        raise ValueError(msg) from error
    meaning = issues.get("codeMessages", {})
    return [
        Invalid(
            issue["code"],
            issue.get("location", "").lstrip("/"),
            ": ".join(
                str(part).strip()
                for part in (
                    issue.get("subCode"),
                    issue.get("issueMessage") or meaning.get(issue["code"], ""),
                )
                if part
            ),
        )
        for issue in issues["issues"]
        if issue.get("severity") == "error"
    ]
