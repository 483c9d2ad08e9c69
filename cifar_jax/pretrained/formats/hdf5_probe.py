"""Opens all that an HDF5 file holds, in a process of its own that may hang or crash in the caller's place.

The HDF5 library has no bound on the time that a damaged file may cost it: a changed byte can make it walk in circles
inside a call that no signal interrupts. So a file of unknown origin is first read here. Run as a script, it imports
nothing of this project, whose own imports take longer than all the rest.

    python -I hdf5_probe.py FILE SECONDS BYTES     the file, or - for one on standard input; how much it may take
"""

import contextlib
import io
import sys

import h5py


def visit(root: h5py.Group, left: int) -> None:
    """Reads attributes and arrays of a group and those below it, at most `left` bytes of them, each object once."""
    seen, todo = set(), [root]
    while todo:
        item = todo.pop()
        with contextlib.suppress(Exception):  # what merely fails here will fail there, with a sentence
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
    """From here on this process may take that much time of a processor and that much more memory."""
    try:
        import resource
    except ImportError:  # not on Windows, where the caller's clock is the only bound
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
    """Probes a file."""
    content = io.BytesIO(sys.stdin.buffer.read()) if path == "-" else path
    with contextlib.suppress(OSError):
        limit(int(seconds), int(memory))
    with contextlib.suppress(Exception), h5py.File(content, "r") as file:
        visit(file, int(memory))


if __name__ == "__main__":
    main(*sys.argv[1:])
