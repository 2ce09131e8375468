"""The tests of `ktrain doctor --active`, in a namespace of their own that is removed whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ktrain.base.clock import Deadline
from ktrain.errors import KtrainError
from ktrain.launcher.backends.kubernetes.client import path_of
from ktrain.launcher.doctor.finding import Check, Finding, Outcome, run_checks
from ktrain.launcher.doctor.gang_trial import Terms, try_gang
from ktrain.launcher.doctor.isolation_trial import try_isolation
from ktrain.launcher.doctor.looks import Looks
from ktrain.launcher.doctor.rights import lacking_for_tests
from ktrain.launcher.doctor.scratch import MARKS, Left, Scratch, stoppable, uninterrupted
from ktrain.launcher.spec import JobSpec


def run_tests(looks: Looks, job: JobSpec | None, terms: Terms, say: Callable[[str], None]) -> tuple[Finding, ...]:
    """Both tests; `say` is told the namespace, and what could not be removed of it.

    A signal to end stops the tests, and KeyboardInterrupt goes on when everything is removed, or `clear_s` is over.
    """
    earlier = run_checks([Check("left by an earlier test", lambda: _earlier(looks))])
    lacking = lacking_for_tests(looks)
    if lacking:
        said = f"the tests need a namespace of their own, and this user may not {', '.join(map(str, lacking))}"
        return (*earlier, Finding("tests", Outcome.UNKNOWN, said, remedy="run it as an administrator"))
    scratch = Scratch(looks.client)
    say(f"tests run in namespace {scratch.name}, which is removed at their end")
    with stoppable():
        try:
            found = run_checks(
                [
                    Check("tests", lambda: _open(scratch)),
                    Check("gang test", lambda: try_gang(looks, scratch, job, terms)),
                    Check("isolation test", lambda: try_isolation(looks, scratch, terms)),
                ]
            )
        finally:
            with uninterrupted():
                left = scratch.clear(Deadline.after(terms.clear_s, looks.client.clock))
            for item in left:
                say(f"could not be removed: {item}")
    return (*earlier, *found, *(_leftover(item) for item in left))


def _open(scratch: Scratch) -> Iterator[Finding]:
    scratch.open()
    yield from ()


def _leftover(item: Left) -> Finding:
    said, cost = f"could not be removed: {item}", "it stays until somebody removes it"
    return Finding("tests", Outcome.WARNING, said, cost, item.command)


def _earlier(looks: Looks) -> Iterator[Finding]:
    """Namespaces of a test that was ended by force. They may be those of one that runs: they are named, not touched."""
    labels = ",".join(f"{key}={value}" for key, value in MARKS.items())
    try:
        found = looks.client.list(path_of("v1", "namespaces"), labels=labels).items
    except KtrainError:
        return  # who may not list namespaces is not bothered with it
    for space in found:
        name = str(space["metadata"]["name"])
        made = space["metadata"].get("creationTimestamp", "")
        said = f"namespace {name}, made {made}, is another test's, or was left by one that was ended by force"
        remedy = f"if nobody tests now: kubectl delete namespace/{name}"
        yield Finding("left by an earlier test", Outcome.WARNING, said, "its pods sleep for 10 minutes at most", remedy)
