"""A GPU of its own for each node: a lock per device, which all processes of a host respect."""

import ctypes
import fcntl
import logging
import os
import re
import stat
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
    """Open the lock of a device, which all users of the host share.

    Raises
    ------
    RuntimeError
        If somebody has put a link, or whatever else, where the folder or the lock should be.
    """
    file = re.sub(r"[^\w.-]", "_", name) + ".lock"
    path = _folder() / file
    folder = _open_folder()
    try:
        with suppress(FileExistsError), _no_umask():  # all users may lock, from the first moment
            os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder))
        # Without O_CREAT: Linux may refuse that on another user's file in a sticky folder.
        lock = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        raise _refused(path, error.strerror or "") from error
    finally:
        os.close(folder)
    status = os.fstat(lock)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(lock)
        raise _refused(path, "no file of its own")
    return lock


def _open_folder() -> int:
    path = _folder()
    with suppress(FileExistsError), _no_umask():
        path.mkdir(0o1777)
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise _refused(path, error.strerror or "") from error
    mode = os.fstat(folder).st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        os.close(folder)
        raise _refused(path, "all may remove each other's files in it")
    return folder


def _folder() -> Path:
    return Path(tempfile.gettempdir(), "qsmpipe-gpu")


@contextmanager
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


def _refused(path: Path, why: str) -> RuntimeError:
    found = path if os.path.lexists(path) else path.parent
    status = found.lstat()
    why = "it is a link" if stat.S_ISLNK(status.st_mode) else why
    return RuntimeError(
        f"GPUs are locked in {_folder()}, which all users of this host share, but {found} (of "
        f"user {status.st_uid}) cannot be used: {why}. Remove it, or set TMPDIR to another "
        "folder, the same for all who share the GPUs"
    )
