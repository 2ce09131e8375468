"""Runs in a directory or in fsspec's memory, for the verbs of `ktrain ckpt`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from ktrain.abc.tier import Tier
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.cli.main import main
from ktrain.tier.location import open_tier
from tests.unit.checkpoint.builders import RUN, catalog, deadline


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run at a URL, and the command line on it."""

    url: str
    tier: Tier
    capsys: pytest.CaptureFixture[str]

    @classmethod
    def make(cls, url: str, capsys: pytest.CaptureFixture[str]) -> StoredRun:
        tier = open_tier(url)
        tier.write("run.json", json.dumps({"format": 1, "id": RUN, "created": 0}).encode(), deadline=deadline())
        return cls(url, tier, capsys)

    @property
    def catalog(self) -> RunCatalog:
        return catalog(self.tier)

    def ckpt(self, verb: str, *arguments: str) -> Answer:
        """`ktrain ckpt VERB RUN ...`."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["ckpt", verb, self.url, *arguments])
        said = self.capsys.readouterr()
        return Answer(int(caught.value.code or 0), said.out, said.err)

    def names(self, prefix: str = "") -> list[str]:
        return [stored.name for stored in self.tier.list(prefix, deadline=deadline())]

    def read(self, name: str) -> bytes:
        return self.tier.read(name, deadline=deadline())

    def write(self, name: str, data: bytes) -> None:
        self.tier.write(name, data, deadline=deadline())

    def steps(self) -> list[int]:
        return [commit.identity.step for commit in self.catalog.listing().commits]
