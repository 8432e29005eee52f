"""How much of this machine's own memory new allocations may take, the limits of a container included."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that the machine, or the container that this process is in, has left."""
    return min([psutil.virtual_memory().available, *cgroup_rooms()])


def cgroup_rooms(root: Path = CGROUP, membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes that each control group above this process has left; files it has read and may drop count as free."""
    rooms = []
    for folder in _groups(root, membership):
        try:
            limit = int((folder / "memory.max").read_text(encoding="ascii"))  # "max" where there is none
            current = int((folder / "memory.current").read_text(encoding="ascii"))
            stat = (folder / "memory.stat").read_text(encoding="ascii")
        except (OSError, ValueError):
            continue
        droppable = [int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file ")]
        rooms.append(max(0, limit - current + sum(droppable)))
    return rooms


def _groups(root: Path, membership: Path) -> list[Path]:
    """This process's control group (version 2) and those above it."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    own = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    folder = root / own
    return [folder, *(above for above in folder.parents if above == root or root in above.parents)] if own else [root]
