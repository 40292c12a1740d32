"""The BIDS validator, where it is installed."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def validate(root: str | Path) -> list[str] | None:
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
        ": ".join(
            str(part).strip()
            for part in (
                issue["code"],
                issue.get("location", "").lstrip("/"),
                issue.get("subCode"),
                issue.get("issueMessage") or meaning.get(issue["code"], ""),
            )
            if part
        )
        for issue in issues["issues"]
        if issue.get("severity") == "error"
    ]
