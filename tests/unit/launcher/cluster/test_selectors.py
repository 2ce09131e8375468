"""Selectors choose as an API server does, and are refused in its words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.errors import ConfigError
from ktrain.launcher.cluster.selectors import field_terms, fields_match, labels_match

POD = {"metadata": {"name": "p", "labels": {"app": "demo", "i": "1"}}, "spec": {"nodeName": "n1"}, "status": {}}


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        ("", True),
        (None, True),
        ("app=demo", True),
        ("app==demo,i=1", True),
        ("app=other", False),
        ("app!=other", True),
        ("missing!=x", True),
        ("app", True),
        ("!app", False),
        ("!missing", True),
        ("i in (1,2)", True),
        ("i in (2, 3)", False),
        ("i notin (1,2)", False),
        ("missing notin (1)", True),
        ("missing=", False),
        ({"app": "demo"}, True),
        ({"app": "demo", "missing": ""}, False),
    ],
)
def test_label_selector_matches(selector: str | dict[str, str] | None, matches: bool) -> None:
    assert labels_match(selector)(POD) is matches


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("a=b=c", "found '=', expected: ',' or 'end of string'"),
        ("=b", "found '=', expected: identifier"),
        ("a of (b)", "found 'of', expected: in, notin"),
        ("a in b", r"expected: '\('"),
        ("a in (b", "'end of string', expected: ',' or"),
        ("!", "found 'end of string', expected: identifier"),
    ],
)
def test_what_is_no_label_selector_is_refused(selector: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        labels_match(selector)


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        ("metadata.name=p", True),
        ("metadata.name==p,spec.nodeName!=n2", True),
        ("spec.nodeName=", False),
        ("status.phase=", True),
        ({"spec.nodeName": "n1"}, True),
    ],
)
def test_field_selector_matches(selector: str | dict[str, str], matches: bool) -> None:
    assert fields_match(selector)(POD) is matches


def test_what_is_no_field_selector_is_refused() -> None:
    with pytest.raises(ConfigError, match="can't understand 'name'"):
        field_terms("name")


@given(st.text(alphabet="ab=!,() in", max_size=12))
def test_any_text_is_a_selector_or_is_refused(text: str) -> None:
    try:
        assert labels_match(text)(POD) in (True, False)
    except ConfigError as error:
        assert str(error)
