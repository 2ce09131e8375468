"""How an archive gets to the pods, by its size and by what is there (ADR 0043). Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ktrain.base.urls import local_path
from ktrain.errors import ConfigError
from ktrain.launcher.code.archive import CodeArchive
from ktrain.launcher.quantity import KIB, show_bytes
from ktrain.launcher.spec import Bytes, Code, Way

MOST_CARRIED = 700 * KIB  # bytes of code in one ConfigMap, which ends at 1 MiB with its base64
MOST_PARTS = 16


@dataclass(frozen=True, slots=True)
class Chosen:
    """The way of an archive, and why."""

    code: Code
    reason: str


def choose_way(archive: CodeArchive, run: str, wanted: Code) -> Chosen:
    """How this archive goes; `wanted` may name the way, and what its container gets besides.

    Raises:
        ConfigError: no way can carry it; the message says what each could.
    """
    size = len(archive.data)
    num_parts = -(-size // MOST_CARRIED)
    has_bucket = local_path(run) is None
    if wanted.way is Way.BUCKET or (wanted.way is None and num_parts > 1 and has_bucket):
        _expect_bucket(run)
        why = "as it was asked for" if wanted.way else f"{show_bytes(size)} are too much for one ConfigMap"
        return Chosen(_of(archive, wanted, Way.BUCKET, 1), f"by the run's bucket: {why}")
    if num_parts > MOST_PARTS:
        raise ConfigError(_too_large(archive, size, has_bucket))
    maps = "one ConfigMap" if num_parts == 1 else f"{num_parts} ConfigMaps"
    why = f"{show_bytes(size)} fit"
    if wanted.way is None and num_parts > 1:
        why = f"{show_bytes(size)} are too much for one, and the run lies in no bucket that this machine could write"
    return Chosen(_of(archive, wanted, Way.CONFIG_MAP, num_parts), f"by {maps}: {why}")


def _of(archive: CodeArchive, wanted: Code, way: Way, parts: int) -> Code:
    return Code(archive=archive.sha256, way=way, size=Bytes(len(archive.data)), parts=parts, env=wanted.env)


def _expect_bucket(run: str) -> None:
    if local_path(run) is not None:
        raise ConfigError(
            f"code.way 'bucket': the run {run} is a path on a volume, which this machine does not write; leave it out"
        )


def _too_large(archive: CodeArchive, size: int, has_bucket: bool) -> str:
    instead = "leave code.way out" if has_bucket else "have the run in a bucket (--run s3://bucket/name)"
    return (
        f"code: the archive of {len(archive.names)} files has {show_bytes(size)}, and {MOST_PARTS} ConfigMaps hold "
        f"{show_bytes(MOST_PARTS * MOST_CARRIED)}; {instead}, leave files out with .ktrainignore, or bring the code "
        "in an image (--code image:REF) or by a commit (--code git+https://HOST/REPO@COMMIT)"
    )
