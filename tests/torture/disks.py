"""Small disks of a test's own: one that can be filled, one that can be cut off."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import missing


def need_mounts() -> None:
    """Mounting needs root and util-linux, a block image a loop device."""
    if os.geteuid() != 0:
        missing("only root may mount a small disk")
    for program in ("mount", "umount", "mkfs.ext4"):
        if shutil.which(program) is None:
            missing(f"{program} is not installed (Debian: mount, e2fsprogs)")


def _run(*words: str | Path) -> None:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"


@contextlib.contextmanager
def tmpfs(folder: Path, megabytes: int, mode: str = "0755") -> Iterator[Path]:
    """A disk in memory at ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode={mode}", "none", folder)
    try:
        yield folder
    finally:
        _run("umount", "--lazy", folder)


def fill(folder: Path) -> Path:
    """Fills the disk that holds ``folder`` and returns the file to delete for room."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    return filler


class Disk:
    """An ext4 file system in an image file, mounted at ``folder`` over a loop device."""

    def __init__(self, folder: Path, image: Path, megabytes: int) -> None:
        self.folder, self.image = folder, image
        image.touch(mode=0o600)
        os.truncate(image, megabytes * 1024**2)
        _run("mkfs.ext4", "-q", "-F", image)
        folder.mkdir(parents=True, exist_ok=True)

    def mount(self) -> None:
        _run("mount", "-o", "loop", self.image, self.folder)

    def unmount(self) -> None:
        _run("umount", self.folder)

    def snapshot(self) -> Path:
        """The image as it is now, as a power cut leaves it: what the kernel has not written is not in it."""
        copy = self.image.with_suffix(".cut")
        _run("cp", "--sparse=always", self.image, copy)
        return copy

    def restore(self, copy: Path) -> None:
        """The image as it was when the power was cut."""
        self.unmount()
        copy.rename(self.image)
        self.mount()
