"""Files that look as if they held secrets: code is read by everybody who may read the job or the run."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

_NAMES = (
    ".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc", ".htpasswd",
    ".git-credentials", ".dockercfg", "kubeconfig", "kubeconfig.*", "*.kubeconfig", "*.pem", "*.key", "*.p12", "*.pfx",
    "*.jks", "*.keystore", "*.kdbx", "*.ppk", "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519",
    "credentials", "credentials.json", "credentials.toml",
    "client_secret*.json", "*service-account*.json", "*service_account*.json", "secrets.*", "*.tfstate", "*.tfvars",
)  # fmt: skip
_FOLDERS = (".aws", ".ssh", ".kube", ".gnupg", ".docker", ".azure", "gcloud")
_EXAMPLES = ("*.example", "*.sample", "*.template", "*.dist", "*.pub")
_KEY_BEGINS = b"-----BEGIN "
_KEY_SAYS = b"PRIVATE KEY"
_HEAD = 100  # bytes that are looked at


def is_private_name(name: str) -> bool:
    """Whether a file of this name usually holds a secret."""
    *folders, last = name.lower().split("/")
    if any(fnmatch.fnmatchcase(last, pattern) for pattern in _EXAMPLES):
        return False
    return any(folder in _FOLDERS for folder in folders) or any(fnmatch.fnmatchcase(last, text) for text in _NAMES)


def is_private_key(data: bytes) -> bool:
    """Whether a file begins as private keys do, whatever its name is."""
    head = data[:_HEAD]
    return head.startswith(_KEY_BEGINS) and _KEY_SAYS in head


def private_warnings(where: str, names: Iterable[str], ignore_file: str) -> list[str]:
    """What to say of files that look private; nothing where there is none."""
    return [
        f"{where}: {name} looks as if it held a secret, and is sent; leave it out with a line /{name} in {ignore_file},"
        " and give secrets by reference: --secret NAME=SECRET:KEY"
        for name in names
    ]
