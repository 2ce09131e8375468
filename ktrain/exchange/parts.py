"""What the manifests of a stored checkpoint say of its parts, over all ranks."""

from __future__ import annotations

from ktrain.checkpoint.stored import StoredCheckpoint


def kinds_of(stored: StoredCheckpoint) -> dict[str, str]:
    """Part -> kind, over all ranks (stages of a pipeline have parts of their own)."""
    return {
        name: about["kind"]
        for manifest in stored.manifests.values()
        for name, about in manifest.objects.items()
        if isinstance(about, dict) and isinstance(about.get("kind"), str)
    }


def module_names(stored: StoredCheckpoint, part: str) -> tuple[set[str], dict[str, str], set[str]]:
    """A module's names on all ranks: all of them, alias -> name, and those of its extra state."""
    keys: set[str] = set()
    aliases: dict[str, str] = {}
    extra: set[str] = set()
    for manifest in stored.manifests.values():
        about = manifest.objects.get(part, {})
        keys.update(about.get("keys", ()))
        aliases.update(about.get("aliases", {}))
        extra.update(about.get("extra", {}))
    return keys, aliases, extra
