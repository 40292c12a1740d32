"""Turn the Apptainer recipe's own sections into a Dockerfile, to try them without Apptainer."""

import re
import sys
from pathlib import Path


def sections(text: str) -> dict[str, str]:
    """Text of each %section, dedented of its four spaces."""
    parts = re.split(r"^%(\w+)[^\n]*\n", text, flags=re.MULTILINE)
    return {
        name: re.sub(r"^ {4}", "", body, flags=re.MULTILINE).strip()
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def dockerfile(recipe: str) -> str:
    """Write a Dockerfile of %files, %post, %environment and %runscript."""
    part = sections(recipe)
    arguments = dict(line.split("=", 1) for line in part["arguments"].splitlines())
    post = part["post"]
    for name, value in arguments.items():
        post = post.replace("{{ " + name + " }}", value)
    start = f"#!/bin/sh\n{part['environment']}\n{part['runscript']}\n"
    copies = "\n".join(f"COPY {line}" for line in part["files"].splitlines())
    return "\n".join([
        "ARG BASE",
        "FROM ${BASE}",
        "ARG PIP_FIND_LINKS=",
        copies,
        f"RUN {_script(post, '/post.sh')} && sh /post.sh && rm /post.sh",
        f"RUN {_script(start, '/start')} && chmod 755 /start",
        "WORKDIR /tmp",
        'ENTRYPOINT ["/start"]',
        "",
    ])  # fmt: skip


def _script(text: str, path: str) -> str:
    lines = " ".join("'" + line.replace("'", "'\\''") + "'" for line in text.split("\n"))
    return f"printf '%s\\n' {lines} > {path}"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(dockerfile(Path(sys.argv[1]).read_text()))
