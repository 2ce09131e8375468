"""Stores that only fsspec stands before, as Google's, Azure's and others do: ktrain has no way of its own to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class Folder(LocalFileSystem):  # type: ignore[misc]
    """fsspec's own local files, under a scheme that ktrain does not know."""

    protocol = "folder"
    cachable = False
    local_file = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(LocalFileSystem._strip_protocol(path.removeprefix("folder://")))

    @classmethod
    def _get_kwargs_from_urls(cls, path: str) -> dict[str, Any]:
        return {}


class Blocks(AbstractFileSystem):  # type: ignore[misc]
    """Objects that are sent block by block and are there once their file is closed, as gcsfs and adlfs send them."""

    protocol = "blocks"
    cachable = False
    objects: dict[str, bytes] = {}
    num_blocks: dict[str, int] = {}  # by object, of its newest upload

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        found: dict[str, dict[str, Any]] = {}
        for name, data in list(self.objects.items()):
            if name.startswith(f"{path}/"):
                head, _, rest = name.removeprefix(f"{path}/").partition("/")
                entry = {"type": "directory", "size": None} if rest else {"type": "file", "size": len(data)}
                found[head] = {"name": f"{path}/{head}", **entry}
        return list(found.values()) if detail else [entry["name"] for entry in found.values()]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path][start:end]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self.objects[path] = bytes(value)

    def rm_file(self, path: str) -> None:
        if self.objects.pop(path, None) is None:
            raise FileNotFoundError(path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There are no folders."""

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> _BlockFile:
        return _BlockFile(self, path, mode, **kwargs)


class _BlockFile(AbstractBufferedFile):  # type: ignore[misc]
    def _initiate_upload(self) -> None:
        self.sent: list[bytes] = []

    def _upload_chunk(self, final: bool = False) -> bool:
        self.sent.append(self.buffer.getvalue())
        if final:
            self.fs.objects[self.path] = b"".join(self.sent)
            self.fs.num_blocks[self.path] = len(self.sent)
        return True


def folder_url(path: Path) -> str:
    """A run in a folder, through fsspec."""
    fsspec.register_implementation("folder", Folder, clobber=True)
    return f"folder://{path}"


def blocks_url(name: str) -> str:
    """A run among the objects of this process."""
    fsspec.register_implementation("blocks", Blocks, clobber=True)
    return f"blocks://{name}/run"
