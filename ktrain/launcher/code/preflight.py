"""What of a function cannot be shipped, found before anything is pickled: each thing with its way from the function.

The walk follows what cloudpickle follows: functions and classes that another process cannot import are taken apart
(closure, defaults, the globals that their code names, members), everything else as its own reduction says. Where an
object refuses to be reduced, the refusal is kept with its path.
"""

from __future__ import annotations

import dis
import io
import re
import socket
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktrain.base.settings import reads_like_secret
from ktrain.launcher.quantity import MIB, show_bytes

MOST_DATA_BYTES = 16 * MIB  # of arrays and the like, all together
_SHOWN_FROM = 1 * MIB  # one that is smaller is not named
_MOST_OBJECTS = 200_000  # looked at; what has more is data, and is measured when it is pickled
_MOST_PATH = 240  # characters
_ATOMS = (type(None), bool, int, float, complex, type(Ellipsis), type(NotImplemented), range)
_SECRET_VALUE = re.compile(r"[\w.+/=~-]{16,}")  # of a name that ends in "token": "<|endoftext|>" is none
_NOTEBOOK = ("IPython", "ipykernel", "ipywidgets", "zmq")
_OF_EVERY_CLASS = ("__dict__", "__weakref__", "__doc__", "__module__")
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_MAIN = "__main__"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that cannot go along, and why."""

    path: str  # from the function: "train -> closure 'log'"
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


def find_problems(roots: Mapping[str, object], *, code: Path | None = None) -> list[Problem]:
    """Everything below the named `roots` that another process could not make again; modules of `code` go along."""
    walk = _Walk(code)
    for name, root in roots.items():
        walk.visit(root, name)
    return [*walk.problems, *walk.data_problems()]


class _Walk:
    """One walk over an object and all that it holds. Use once."""

    def __init__(self, code: Path | None) -> None:
        self.problems: list[Problem] = []
        self._code = None if code is None else code.resolve()
        self._data: list[tuple[int, str]] = []  # bytes, path
        self._seen: dict[int, object] = {}  # kept alive, so that no id is used twice
        self._modules: set[str] = set()
        self._stack: list[tuple[object, str]] = []

    def visit(self, root: object, path: str) -> None:
        """Without recursion: a list of lists is as deep as its owner likes."""
        self._stack.append((root, path))
        while self._stack and len(self._seen) < _MOST_OBJECTS:
            obj, path = self._stack.pop()
            if id(obj) not in self._seen and not _is_atom(obj):
                self._seen[id(obj)] = obj
                self._stack += reversed(list(self._below(obj, _elided(path))))

    def data_problems(self) -> list[Problem]:
        """The large ones, where all together are too much."""
        total = sum(size for size, _ in self._data)
        if total <= MOST_DATA_BYTES:
            return []
        large = sorted(((size, path) for size, path in self._data if size >= _SHOWN_FROM), reverse=True)
        why = (
            f"of {show_bytes(total)} of data that would be shipped, {show_bytes(MOST_DATA_BYTES)} at most; load it in "
            "the function, from a path or URL that the job can read"
        )
        return [Problem(path, f"{show_bytes(size)} {why}") for size, path in large] or [Problem("the function", why)]

    def _below(self, obj: object, path: str) -> Iterator[tuple[object, str]]:
        """What the object holds, each with its path; what is wrong with the object itself is noted."""
        why = _unshippable(obj)
        if why is not None:
            self.problems.append(Problem(path, why))
        elif (nbytes := _data_nbytes(obj)) is not None:
            self._data.append((nbytes, path))
        elif isinstance(obj, types.ModuleType):
            self._note_module(obj.__name__, path)
        elif isinstance(obj, types.FunctionType | type) and _is_importable(obj):
            self._note_module(str(obj.__module__), path)
        elif isinstance(obj, types.FunctionType):
            yield from self._in_function(obj, path)
        elif isinstance(obj, type):
            yield from self._in_class(obj, path)
        else:
            yield from self._in_object(obj, path)

    def _note_module(self, name: str, path: str) -> None:
        if name in self._modules:
            return
        self._modules.add(name)
        why = self._module_problem(name)
        if why is not None:
            self.problems.append(Problem(path, why))

    def _module_problem(self, name: str) -> str | None:
        """Why another process could not import it; None where it is installed, or goes along."""
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in (_MAIN, "ktrain"):
            return None
        module = sys.modules.get(top)
        places = _places(module)
        if module is None or not places:
            return f"module {name} was made in this process; define its contents where the function is, or install it"
        if any(_is_installed(place) or self._goes_along(place) for place in places):
            return None
        from importlib.metadata import packages_distributions  # slow to import, and to call: the last question

        if top in packages_distributions():  # in place, as an editable install is
            return None
        return (
            f"module {name} is not installed, it is only here ({places[0]}); install it where the job runs, or send "
            "its folder along with code="
        )

    def _goes_along(self, place: Path) -> bool:
        """Whether `import` finds it from the root of the folder that is sent."""
        return self._code is not None and place.parent == self._code

    def _in_function(self, function: types.FunctionType, path: str) -> Iterator[tuple[object, str]]:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                yield from self._named(name, cell.cell_contents, f"{path} -> closure {name!r}")
            except ValueError:
                continue  # not bound yet: a function that names itself while it is made
        for name in sorted(_global_names(function.__code__)):
            if name in function.__globals__:
                yield from self._named(name, function.__globals__[name], f"{path} -> global {name!r}")
        for name, value in _defaults(function):
            yield from self._named(name, value, f"{path} -> default {name!r}")
        for name, value in (*function.__annotations__.items(), *vars(function).items()):
            yield value, f"{path} -> {name!r}"

    def _in_class(self, cls: type, path: str) -> Iterator[tuple[object, str]]:
        """Of a class that is sent by value: its members and bases."""
        for base in cls.__bases__:
            yield base, f"{path} -> base {base.__name__}"
        for name, value in list(vars(cls).items()):
            if name not in _OF_EVERY_CLASS and not isinstance(value, _SLOTS):
                yield from self._named(name, value, f"{path}.{name}")

    def _named(self, name: str, value: object, path: str) -> Iterator[tuple[object, str]]:
        """A variable, unless it is one that must not lie in plain where code does."""
        if isinstance(value, str) and _is_secret(name, value):
            why = "its name reads like a secret, and it would be stored in plain; read it from the environment"
            self.problems.append(Problem(path, why))
        else:
            yield value, path

    def _in_object(self, obj: object, path: str) -> Iterator[tuple[object, str]]:
        if isinstance(obj, types.MethodType):
            yield obj.__self__, f"{path} -> its object"
            yield obj.__func__, path
        elif isinstance(obj, types.BuiltinFunctionType):
            yield obj.__self__, f"{path} -> its object"
        elif type(obj) is dict:
            for key, value in list(obj.items()):
                yield key, f"{path}, key {_short(key)}"
                yield value, f"{path}[{_short(key)}]"
        elif isinstance(obj, list | tuple | set | frozenset) and type(obj).__module__ == "builtins":
            for at, value in enumerate(list(obj)):
                yield value, f"{path}[{at}]"
        elif isinstance(obj, staticmethod | classmethod):
            yield obj.__func__, path
        elif isinstance(obj, property):
            yield from ((part, path) for part in (obj.fget, obj.fset, obj.fdel) if part is not None)
        else:
            yield from self._in_reduced(obj, path)

    def _in_reduced(self, obj: object, path: str) -> Iterator[tuple[object, str]]:
        """An object of any class, as it says itself of what it is made."""
        try:
            made = obj.__reduce_ex__(4)
        except Exception as error:  # noqa: BLE001 -- code of any class; whatever it raises is why it cannot be shipped
            self.problems.append(Problem(path, f"{_kind(obj)} cannot be pickled: {error}"))
            return
        if isinstance(made, str):  # a global of its module
            self._note_module(str(getattr(obj, "__module__", _MAIN)), path)
            return
        yield made[0], path
        yield from ((value, path) for value in made[1])
        state = made[2] if len(made) > 2 else None
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            if isinstance(part, dict):
                yield from ((value, f"{path}.{name}") for name, value in part.items())
            else:
                yield part, path
        for at, value in enumerate(made[3] or () if len(made) > 3 else ()):
            yield value, f"{path}[{at}]"
        for key, value in made[4] or () if len(made) > 4 else ():
            yield value, f"{path}[{_short(key)}]"


def _unshippable(obj: object) -> str | None:
    """What is a thing of this process alone, said better than its own refusal."""
    if isinstance(obj, io.IOBase) and not isinstance(obj, io.BytesIO | io.StringIO):
        return f"an open file ({getattr(obj, 'name', '?')}); open it in the function"
    if isinstance(obj, socket.socket):
        return "a socket; connect in the function"
    if type(obj).__module__.partition(".")[0] in _NOTEBOOK:
        return f"{_kind(obj)} belongs to the notebook; leave it out of the function"
    if type(obj).__module__ in ("_thread", "threading", "multiprocessing.synchronize"):
        return f"{_kind(obj)} belongs to this process; make it in the function"
    if isinstance(obj, types.GeneratorType | types.CoroutineType | types.AsyncGeneratorType):
        return f"{_kind(obj)} is half run; make it in the function"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(obj, torch.Tensor) and obj.device.type not in ("cpu", "meta"):
        return f"a tensor on {obj.device}, {show_bytes(obj.nbytes)}; make it in the function, or move it to the CPU"
    return None


def _data_nbytes(obj: object) -> int | None:
    """Bytes of what is data alone, so that the walk ends there; None of anything else."""
    if isinstance(obj, str | bytes | bytearray):
        return len(obj)
    if isinstance(obj, io.BytesIO):
        return obj.getbuffer().nbytes
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(obj, torch.Tensor):
        if obj.is_meta:
            return 0
        # A view takes all of its storage along.
        return int(obj.untyped_storage().nbytes() if obj.layout is torch.strided else obj.nbytes)
    if numpy is not None and isinstance(obj, numpy.ndarray) and not obj.dtype.hasobject:
        return int(obj.nbytes)
    return None


def _defaults(function: types.FunctionType) -> list[tuple[str, object]]:
    """Of its parameters, by name."""
    code, values = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
    return [*zip(names, values, strict=True), *(function.__kwdefaults__ or {}).items()]


def _is_secret(name: str, value: str) -> bool:
    if not value or not reads_like_secret(name):
        return False
    return not name.lower().endswith("token") or _SECRET_VALUE.fullmatch(value) is not None


def _is_atom(obj: object) -> bool:
    if isinstance(obj, types.BuiltinFunctionType):
        return isinstance(obj.__self__, types.ModuleType | None)
    return type(obj) in _ATOMS or isinstance(obj, types.CodeType | types.WrapperDescriptorType)


def _is_importable(obj: Any) -> bool:
    """Whether another process finds it by its module and name, as pickle does."""
    module = getattr(obj, "__module__", None)
    if module is None or module == _MAIN:
        return False
    found: Any = sys.modules.get(module)
    for name in obj.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is obj


def _global_names(code: types.CodeType) -> set[str]:
    """Globals that the code, or code inside of it, names."""
    found = {str(item.argval) for item in dis.get_instructions(code) if item.opname.endswith("_GLOBAL")}
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            found |= _global_names(const)
    return found


def _places(module: types.ModuleType | None) -> list[Path]:
    """Files or folders of a top-level module; of a namespace package all its folders."""
    if module is None:
        return []
    file = getattr(module, "__file__", None)
    paths = getattr(module, "__path__", None)
    if paths is not None:
        return [Path(path).resolve() for path in paths]
    return [Path(file).resolve()] if file is not None else []


def _is_installed(place: Path) -> bool:
    roots = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib", "platstdlib")}
    return (
        any(place.is_relative_to(root) for root in roots)
        or {"site-packages", "dist-packages"} & set(place.parts) != set()
    )


def _kind(obj: object) -> str:
    return f"a {type(obj).__module__.removeprefix('_')}.{type(obj).__qualname__}".replace("a builtins.", "a ")


def _elided(path: str) -> str:
    """A path that can be read, however deep it leads."""
    return path if len(path) <= _MOST_PATH else f"{path[: _MOST_PATH // 2]}...{path[-_MOST_PATH // 4 :]}"


def _short(key: object) -> str:
    text = repr(key)
    return text if len(text) <= 40 else f"{text[:37]}..."
