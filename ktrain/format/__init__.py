"""Bytes to meaning and back: payloads, manifests, commit records and tagged JSON.

Invariant: the same value gives the same bytes, and bytes are taken for a value only after their digest and
every field were checked. Imports neither torch nor ray nor fsspec. `docs/format.md` says the same to those
who write another reader.
"""
