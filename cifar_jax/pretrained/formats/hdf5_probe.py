"""Reads a whole HDF5 file in a separate process, which may hang or crash without harm to the caller.

The HDF5 library does not bound the time that it spends on a corrupt file: a single changed byte can make it loop
forever inside a call that no signal interrupts. So files of unknown origin are read here first. This script imports
nothing from the project, because those imports would take longer than everything else.

    python -I hdf5_probe.py FILE SECONDS BYTES     FILE may be - for stdin; the others limit CPU time and memory
"""

import contextlib
import io
import sys

import h5py


def visit(root: h5py.Group, left: int) -> None:
    """Reads the attributes and arrays of a group recursively, each object once, at most `left` bytes of arrays."""
    seen, todo = set(), [root]
    while todo:
        item = todo.pop()
        with contextlib.suppress(Exception):  # ordinary errors occur again in the caller, which reports them
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:
                continue
            seen.add(address)
            for name in item.attrs:
                with contextlib.suppress(Exception):
                    item.attrs[name]
            if isinstance(item, h5py.Dataset):
                left -= item.nbytes
                if left >= 0:
                    item[()]
                continue
            for name in item:
                with contextlib.suppress(Exception):
                    if isinstance(item.get(name, getlink=True), h5py.HardLink):
                        todo.append(item[name])


def limit(seconds: int, memory: int) -> None:
    """Limits the CPU time and the additional memory of this process from now on."""
    try:
        import resource
    except ImportError:  # not available on Windows, where the caller's timeout is the only limit
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    with open("/proc/self/statm", "rb") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(path: str, seconds: str, memory: str) -> None:
    """Reads a file under limits."""
    content = io.BytesIO(sys.stdin.buffer.read()) if path == "-" else path
    with contextlib.suppress(OSError):
        limit(int(seconds), int(memory))
    with contextlib.suppress(Exception), h5py.File(content, "r") as file:
        visit(file, int(memory))


if __name__ == "__main__":
    main(*sys.argv[1:])
