"""The untrusted half of the sandbox: runs a program, then calls its functions for a judge in another process.

A script of its own (standard library only, never imported by the rest of the project), started by `jail.py`. Requests
come on standard input, replies leave on standard output, a line of JSON each; the program itself finds an empty
standard input, and what it prints goes to standard error. Nothing here is to be believed: a program may send whatever
it likes. But all it can send are plain values, and those are what its functions are judged by.
"""

import io
import json
import os
import resource
import sys
import types
from typing import Any

WHOLE = 2**53  # integers below it travel as JSON numbers
SHOWN = 2_000  # characters of an exception's text


def encode(value: object) -> object:
    """A plain value (also one of a subclass) as JSON: None, bool, number, text, bytes, list, tuple, set, dict.

    Raises:
        TypeError: anything else.
    """
    match value:
        case None | bool() | str():
            return value
        case int():
            return int(value) if abs(value) < WHOLE else ["int", hex(value)]
        case float():
            return ["float", float(value).hex()]
        case complex():
            return ["complex", value.real.hex(), value.imag.hex()]
        case bytes() | bytearray():
            return ["bytes", value.hex()]
        case list() | tuple() | set() | frozenset():
            kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
            return [kind.__name__, [encode(each) for each in value]]
        case dict():
            return ["dict", [[encode(key), encode(each)] for key, each in value.items()]]
    raise TypeError(f"{type(value).__name__} is no plain value, and nothing else passes between program and tests")


def decode(value: object) -> object:
    """Inverse of `encode`."""
    match value:
        case ["int", str() as digits]:
            return int(digits, 16)
        case ["float", str() as digits]:
            return float.fromhex(digits)
        case ["complex", str() as real, str() as imaginary]:
            return complex(float.fromhex(real), float.fromhex(imaginary))
        case ["bytes", str() as digits]:
            return bytes.fromhex(digits)
        case ["list" | "tuple" | "set" | "frozenset" as kind, list() as items]:
            kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
            return kinds[kind](map(decode, items))
        case ["dict", list() as pairs]:
            return {decode(key): decode(each) for key, each in pairs}
        case None | bool() | str() | int():
            return value
    raise TypeError("not an encoded value")


def serve(requests: io.TextIOBase, replies: io.TextIOBase) -> None:
    """Run the program of the first request, answer with what it defines; then answer calls until there are no more."""
    module = types.ModuleType("program")  # a real module: dataclasses and pickle look their classes up in it
    sys.modules["program"] = module
    for line in requests:
        request = json.loads(line)
        try:
            if "program" in request:
                exec(compile(request["program"], "<program>", "exec"), vars(module))
                reply = _defined(vars(module))
            else:
                function = getattr(module, request["call"])
                arguments = [decode(each) for each in request["arguments"]]
                named = {name: decode(each) for name, each in request["named"].items()}
                reply = {"value": encode(function(*arguments, **named))}
        except BaseException as error:
            builtin = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
            reply = {"raised": builtin, "kind": type(error).__name__, "text": _text(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _defined(names: dict[str, object]) -> dict[str, object]:
    """The program's public functions by name, and its public plain values."""
    functions, values = [], {}
    for name, value in names.items():
        if name.startswith("_") or isinstance(value, types.ModuleType):
            continue
        if callable(value):
            functions.append(name)
            continue
        try:
            values[name] = encode(value)
        except TypeError:
            continue
    return {"functions": functions, "values": values}


def _text(error: BaseException) -> str:
    try:
        return str(error)[:SHOWN]
    except Exception:
        return ""


def forbid(readable: tuple[str, ...], writable: str) -> None:
    """Refuse, by an audit hook (PEP 578), network, processes, foreign code, and files outside the given folders.

    The weaker isolation, for machines that allow no namespaces. A hook cannot be taken away again, but it guards the
    interpreter's own doors only: whoever finds an error of the interpreter gets past it.

    Args:
        readable: folders that may be read.
        writable: the one that may be written, too.
    """
    closed: tuple[str, ...] = ("socket.", "subprocess.", "ctypes.", "pty.", "syslog.", "fcntl.", "gc.get_", "os.exec")
    closed += ("os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "os.ch", "os.setxattr", "os.link")
    closed += ("os.symlink", "signal.pthread_kill", "cpython.run_", "resource.setrlimit", "sqlite3.", "webbrowser.")
    changing = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime", "shutil.")
    reading = ("os.listdir", "os.scandir")
    imports = {"_posixsubprocess", "_ctypes", "_testcapi", "_xxsubinterpreters", "_interpreters"}
    write_flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    real, fspath, sep = os.path.realpath, os.fsdecode, os.sep
    tops = tuple(real(folder).rstrip(sep) + sep for folder in (*readable, writable))
    own = tops[-1:]

    def within(path: object, folders: tuple[str, ...]) -> bool:
        return isinstance(path, int) or (real(fspath(path)) + sep).startswith(folders)  # type: ignore[arg-type]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(closed) or (event == "import" and arguments[0] in imports):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open" and arguments[0] is not None:
            path, mode, flags = arguments
            writes = (flags or 0) & write_flags or (mode and mode[0] in "wax") or (mode and "+" in mode)
            if path != "/dev/null" and not within(path, own if writes else tops):
                raise PermissionError(f"{path!r} is out of bounds")
        elif event.startswith(changing):
            for path in (each for each in arguments if isinstance(each, str | bytes)):
                if not within(path, own):
                    raise PermissionError(f"{path!r} is out of bounds")
        elif event in reading and arguments[0] is not None and not within(arguments[0], tops):
            raise PermissionError(f"{arguments[0]!r} is out of bounds")

    for name in imports:
        sys.modules.pop(name, None)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # no process and no thread more, unless this is root
    sys.addaudithook(hook)


def main(folders: list[str]) -> None:
    """Serve the judge; where `folders` are given, within them alone."""
    requests, replies = os.fdopen(os.dup(0), "r", encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    if folders:
        *readable, writable = folders
        forbid(tuple(readable), writable)
    serve(requests, replies)


if __name__ == "__main__":
    main(sys.argv[1:])
