"""The head's search for the step to restore: candidates, their manifests, and the honest answer when there is none."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from ktrain.base import contract
from ktrain.checkpoint import lineage, quarantine
from ktrain.checkpoint.agreement import RestoreAgreement
from ktrain.checkpoint.catalog import AttemptRecord, Listing, RunCatalog, commit_path
from ktrain.checkpoint.lineage import Candidate, Copy
from ktrain.errors import ConfigError, CorruptionError, KtrainError, NotFoundError, UnavailableError
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.record import CommitRecord, check_plan, parse_commit_name

ManifestTexts = Mapping[tuple[str, int, Identity], str]
CopyKey: TypeAlias = tuple[str, str, int, int, int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What to do: load a candidate, start fresh (neither candidate nor error), or stop with an error.

    `error` is its kind and message.
    """

    candidate: Candidate | None = None
    manifests: dict[int, str] = field(default_factory=dict)
    error: tuple[str, str] | None = None
    bad_copies: tuple[dict[str, Any], ...] = ()


class Recall:
    """One search. The bucket is listed once; manifests that lie in nodes' memory are asked for and awaited."""

    def __init__(self, catalog: RunCatalog, epoch: int | None = None, limit: int = 0) -> None:
        """A search for one attempt.

        Args:
            epoch: of the attempt that restores, whose start is in the run directory.
            limit: failures from a step after which it is set aside; 0 for never.
        """
        self._catalog = catalog
        self._epoch = epoch
        self._limit = limit
        self.review = quarantine.Review()  # what is set aside, once the search has begun
        self._listing: Listing | None = None
        self._attempts: list[AttemptRecord] = []
        self._wanted: dict[str, list[dict[str, Any]]] = {}
        self._plans: dict[int, str] = {}  # rank -> digest of its plan, of the candidate that is tried

    def wanted_from(self, node: str) -> list[dict[str, Any]]:
        """Manifests that the search still needs from a node's memory."""
        return self._wanted.get(node, [])

    def plan(
        self,
        volumes: lineage.Inventories,
        disks: lineage.Inventories,
        texts: ManifestTexts,
        agreement: RestoreAgreement,
    ) -> Outcome | None:
        """The next thing to try, or None while manifests are awaited from the nodes.

        Raises:
            UnavailableError, DeadlineError: the bucket cannot be asked now. Without it the line of the run is unknown,
                and so it is asked again rather than passed over.
        """
        listing = self._list_bucket()
        complete = lineage.candidates(self._own(volumes), self._own(disks), listing.commits, self._attempts)
        found = [candidate for candidate in complete if not self.review.quarantine.holds(candidate.identity)]
        if complete and not found:
            return Outcome(error=("config", self._all_set_aside(complete)))
        excluded = set(agreement.excluded)
        bad: list[dict[str, Any]] = []
        while True:
            candidate = lineage.choose(found, excluded)
            if newer := self._beyond(candidate, listing.newer):
                return Outcome(error=("config", self._too_new(newer, dict(listing.broken))))
            if candidate is None:
                return self._nothing(found, listing, agreement, bad)
            self._wanted, self._plans = {}, {}
            manifests: dict[int, str] = {}
            dropped = False
            for rank, copies in candidate.copies.items():
                text = self._manifest(copies, texts, listing, excluded, bad)
                if text is not None:
                    manifests[rank] = text
                elif not any(copy.key() not in excluded for copy in copies):
                    dropped = True  # no manifest of this rank is left: the next candidate
            if dropped:
                continue
            if self._wanted:
                return None
            wrong = list(_of_other_plans(listing.commits, candidate.identity, self._plans, excluded))
            if wrong:
                bad += wrong
                continue
            bad += _bad_records(listing, agreement)
            return Outcome(candidate=candidate.without(excluded), manifests=manifests, bad_copies=tuple(bad))

    def _own(self, inventories: lineage.Inventories) -> lineage.Inventories:
        """Without what belongs to another run."""
        run = self._catalog.run_id
        return {node: [entry for entry in held if entry[1].run == run] for node, held in inventories.items()}

    def _list_bucket(self) -> Listing:
        if self._listing is None:
            self._attempts = self._catalog.attempts()
            if self._epoch is not None and self._epoch not in {attempt.epoch for attempt in self._attempts}:
                raise UnavailableError(
                    f"run {self._catalog.tier.url}: the listing lacks attempt {self._epoch}, which has begun; it lags, "
                    "so that nothing can be told by what is absent"
                )
            said = self.review.fresh  # by a try that the store cut short
            found = quarantine.review(self._catalog, self._attempts, self._limit)
            self.review = replace(found, fresh=(*said, *found.fresh))
            self._listing = self._catalog.listing()
        return self._listing

    def _manifest(
        self,
        copies: Sequence[Copy],
        texts: ManifestTexts,
        listing: Listing,
        excluded: set[CopyKey],
        bad: list[dict[str, Any]],
    ) -> str | None:
        """Text of a proven manifest from the first copy that gives one; asks a node where it is not here yet."""
        unreachable: KtrainError | None = None
        for copy in copies:
            if copy.key() in excluded:
                continue
            try:
                if copy.tier == contract.TIER_BUCKET:
                    manifest = _from_bucket(self._catalog, listing.commits, copy)
                    self._plans[copy.rank] = manifest.plan_digest
                    return manifest.to_bytes().decode()
                text = texts.get((copy.place, copy.rank, copy.identity))
                if text is None:
                    wanted = {"rank": copy.rank, "identity": copy.identity.to_json()}
                    self._wanted.setdefault(copy.place, []).append(wanted)
                    return None
                manifest = Manifest.from_bytes(text.encode())
                _check(manifest, copy)
                self._plans[copy.rank] = manifest.plan_digest
                return text
            except (CorruptionError, ConfigError, NotFoundError) as error:
                bad.append(
                    {
                        "step": copy.identity.step,
                        "rank": copy.rank,
                        "tier": copy.tier,
                        "where": copy.place,
                        "reason": str(error),
                    }
                )
                excluded.add(copy.key())
            except KtrainError as error:
                unreachable = error
        if unreachable is not None:
            raise unreachable  # asked again: giving the step up would lose what is committed
        return None

    def _nothing(
        self, found: Sequence[Candidate], listing: Listing, agreement: RestoreAgreement, bad: list[dict[str, Any]]
    ) -> Outcome:
        durable = [attempt for attempt in self._attempts if attempt.durable is not None]
        where = f"run {self._catalog.tier.url}"
        said = (*bad, *_bad_records(listing, agreement))
        if agreement.excluded or found:
            steps = sorted({candidate.identity.step for candidate in found}, reverse=True)
            unreachable = agreement.excluded - agreement.corrupt
            kind = "unavailable" if unreachable and not bad and not agreement.corrupt else "corruption"
            named = {(entry["tier"], entry["where"], entry["rank"], entry["step"]) for entry in bad}
            bad_text = _copies_text("bad", named | {key[:4] for key in agreement.corrupt})
            text = (
                f"{where}: no good copy is left of any step (tried {steps}){bad_text}"
                f"{_copies_text('not readable now', {key[:4] for key in unreachable})}; nothing was deleted; see the "
                "bad_copy events and `ktrain ckpt verify`"
            )
            return Outcome(error=(kind, text), bad_copies=said)
        if listing.lost or durable:
            names = [name for name, _ in listing.broken] or [
                f"attempt {attempt.epoch} committed step {(attempt.durable or {}).get('step')}" for attempt in durable
            ]
            text = (
                f"{where}: it had durable checkpoints, but no commit record can be read ({', '.join(names[:5])}); "
                "nothing was deleted; see `ktrain ckpt verify`"
            )
            return Outcome(error=("corruption", text), bad_copies=said)
        return Outcome(bad_copies=said)

    def _beyond(self, candidate: Candidate | None, names: Sequence[str]) -> list[str]:
        """Records on the line that are, by their names, newer than the candidate."""
        newest = (-1, -1) if candidate is None else (candidate.identity.step, candidate.identity.epoch)
        found = []
        for name in names:
            named = parse_commit_name(name)
            if named is None or named[:2] <= newest:
                continue
            if lineage.on_line(Identity(self._catalog.run_id, named[0], named[1], 1), self._attempts):
                found.append(name)
        return found

    def _all_set_aside(self, complete: Sequence[Candidate]) -> str:
        steps = ", ".join(f"{found.identity.step} (epoch {found.identity.epoch})" for found in complete)
        return (
            f"run {self._catalog.tier.url}: every step that is left is set aside, because the job failed from it: "
            f"{steps}; nothing was deleted; mend the cause, then trust one again by `ktrain ckpt quarantine RUN "
            "--step N --off`, or name a new run"
        )

    def _too_new(self, names: Sequence[str], reasons: Mapping[str, str]) -> str:
        return (
            f"run {self._catalog.tier.url}: a newer ktrain committed {', '.join(names[:5])}, which this one cannot "
            f"read ({reasons[names[0]]}); upgrade ktrain, or move these checkpoints away to continue from an older step"
        )


def _copies_text(what: str, copies: Collection[tuple[str, str, int, int]]) -> str:
    """Names copies, given by tier, place, rank and step: newest steps first, and not more than a line holds."""
    if not copies:
        return ""
    ordered = sorted(copies, key=lambda copy: (-copy[3], copy[2], copy[0], copy[1]))
    words = [f"step {step} rank {rank} in {tier} {place}" for tier, place, rank, step in ordered]
    return f"; {what}: {', '.join(words[:6])}{f' and {len(words) - 6} more' if words[6:] else ''}"


def _bad_records(listing: Listing, agreement: RestoreAgreement) -> list[dict[str, Any]]:
    """Commit records that cannot be used; said in the first round of a restore."""
    if agreement.round:
        return []
    return [
        {"step": named[0], "rank": None, "tier": contract.TIER_BUCKET, "where": name, "reason": reason}
        for name, reason in listing.broken
        if (named := parse_commit_name(name)) is not None
    ]


def _check(manifest: Manifest, copy: Copy) -> None:
    if manifest.identity != copy.identity or manifest.rank != copy.rank:
        raise CorruptionError(
            f"manifest of rank {copy.rank}, {copy.identity}: found one of rank {manifest.rank}, {manifest.identity}"
        )


def _of_other_plans(
    commits: Sequence[CommitRecord], identity: Identity, plans: Mapping[int, str], excluded: set[CopyKey]
) -> Iterator[dict[str, Any]]:
    """Leaves out the copies of each record of the step that contradicts the manifests, and says so."""
    for commit in commits:
        keys = {Copy(contract.TIER_BUCKET, commit.write_id, files.rank, identity).key() for files in commit.ranks}
        if commit.identity != identity or keys <= excluded:
            continue
        try:
            check_plan(commit, [plans[files.rank] for files in commit.ranks])
        except CorruptionError as error:
            excluded |= keys
            about = {"step": identity.step, "rank": None, "tier": contract.TIER_BUCKET, "where": commit_path(commit)}
            yield {**about, "reason": str(error)}


def _from_bucket(catalog: RunCatalog, commits: Sequence[CommitRecord], copy: Copy) -> Manifest:
    for commit in commits:
        if commit.write_id == copy.place and commit.identity == copy.identity:
            files = next(files for files in commit.ranks if files.rank == copy.rank)
            return catalog.read_manifest(commit, files)
    raise NotFoundError(f"commit {copy.place} of step {copy.identity.step}: it is gone from the listing")
