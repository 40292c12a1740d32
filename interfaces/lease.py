"""A GPU of its own for each node: a lock per device, which all processes of a host respect."""

import ctypes
import fcntl
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger("nipype.interface")

VISIBLE = "CUDA_VISIBLE_DEVICES"

POLL = 0.2
"""Time between two looks at devices that are all taken (s)."""

_NOT_INITIALIZED = 3
"""What every function of CUDA's driver returns before ``cuInit``."""


def visible_devices() -> list[str]:
    """List the devices that CUDA would see, without starting it.

    Returns
    -------
    list of str
        What ``CUDA_VISIBLE_DEVICES`` takes: as the user wrote it there, otherwise the UUIDs by
        ``nvidia-smi``. Empty where there is neither.
    """
    return list(_locks())


@contextmanager
def lease() -> Iterator[str | None]:
    """Hold a device that no other lease on this host holds, and let CUDA see that one alone.

    It waits while all visible devices are taken. The kernel frees the device when the process
    dies, however it dies. Leases do not nest: the inner one would wait for the outer.

    Yields
    ------
    str or None
        The device, as in :func:`visible_devices`; None where there is none.
    """
    locks = _locks()
    if not locks:
        yield None
        return
    # CUDA reads the variable once. Later it keeps its devices, and torch computes on the first.
    before = _cuda_started()
    device, lock = _first_free(dict([*locks.items()][:1]) if before else locks)
    visible = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = device
    try:
        yield device
    finally:
        # Where CUDA started meanwhile this is all that it will see: the next lease must know.
        if before or not _cuda_started():
            os.environ.pop(VISIBLE)
            if visible is not None:
                os.environ[VISIBLE] = visible
        fcntl.flock(lock, fcntl.LOCK_UN)  # a child process may have its own hold on the file
        os.close(lock)


def _locks() -> dict[str, str]:
    """Map each visible device to the name of its lock, the UUID where it is known.

    Slurm may number the one device of each job 0: an index is no name for a lock.
    """
    visible = os.environ.get(VISIBLE)
    if visible == "":
        return {}
    uuids = _uuids()
    if visible is None:
        return {uuid: uuid for uuid in uuids.values()}
    job = os.environ.get("SLURM_JOB_ID")
    locks: dict[str, str] = {}
    for token in map(str.strip, visible.split(",")):
        uuid = uuids.get(token) or next((u for u in uuids.values() if u.startswith(token)), None)
        is_index = token.isdecimal()
        # As in CUDA: the list ends at the first that is no device; a device twice makes it void.
        if not re.fullmatch(r"\d+|(GPU|MIG)-\S+", token) or (is_index and uuids and not uuid):
            break
        if token in locks:
            return {}
        locks[token] = uuid or (f"{token}-job{job}" if is_index and job else token)
    return locks


def _uuids() -> dict[str, str]:
    """Map index to UUID of all devices of this host, by ``nvidia-smi``."""
    command = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(re.findall(r"^(\d+), (GPU-\S+)$", done.stdout, re.MULTILINE))


def _cuda_started() -> bool:
    """Whether CUDA has read its variable: ``torch.cuda.is_available()`` alone makes it do so."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return True
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _NOT_INITIALIZED


def _first_free(locks: Mapping[str, str]) -> tuple[str, int]:
    """Wait for a device; give it and the open file that holds its lock."""
    waits = False
    while True:
        for device, name in locks.items():
            lock = _open(name)
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.utime(lock)  # what clears old files from the folder must not take it for one
                return device, lock
            os.close(lock)
        if not waits:
            logger.info("waiting for a GPU: other nodes or runs hold %s", ", ".join(locks))
            waits = True
        time.sleep(POLL)


def _open(name: str) -> int:
    folder = Path(tempfile.gettempdir(), "qsmpipe-gpu")
    path = folder / (re.sub(r"[^\w.-]", "_", name) + ".lock")
    with suppress(FileNotFoundError):
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    umask = os.umask(0)  # all users may lock, from the moment it exists
    try:
        with suppress(FileExistsError):
            folder.mkdir(0o1777)
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
    finally:
        os.umask(umask)
    # Without O_CREAT: Linux may refuse that on another user's file in a sticky folder.
    return os.open(path, os.O_RDWR | os.O_NOFOLLOW)
