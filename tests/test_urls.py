"""URLs: one spelling for each database, and a form without secrets."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from sqlalchemy import URL, make_url

from sessionmgr import DatabaseURLError
from sessionmgr.urls import DatabaseKey, is_secret, list_names, masked, parse_url

PLAIN = "postgresql+psycopg://user:pw@host:5432/db?sslmode=require"


@pytest.mark.parametrize(
    ("dburi", "expected"),
    [
        (PLAIN, PLAIN),
        (make_url(PLAIN), PLAIN),
        ("postgres://host/db", "postgresql://host/db"),
        ("postgres+psycopg2://host/db", "postgresql+psycopg2://host/db"),
        ("db+postgres://host/db", "postgresql://host/db"),
        ("db+mysql+pymysql://host/db", "mysql+pymysql://host/db"),
        (URL.create("db+postgres+psycopg"), "postgresql+psycopg://"),
        (" sqlite:///one.db\n", "sqlite:///one.db"),
        ("db+sqlite:////tmp/one.db", "sqlite:////tmp/one.db"),
        ("postgresqlx://host/db", "postgresqlx://host/db"),
    ],
)
def test_spellings_are_read(dburi: str | URL, expected: str) -> None:
    """Every spelling of a URL gives the same one."""
    assert parse_url(dburi).render_as_string(hide_password=False) == expected


@pytest.mark.parametrize(
    ("dburi", "match"),
    [
        ("nonsense", r"begins with '\.\.\.': no URL"),
        ("", "of 0 characters"),
        ("postgresql://host:port/db", "begins with 'postgresql://': its port is not a number"),
        ("://host/db", r"begins with '\.\.\.'"),
        (None, "not by NoneType"),
        (b"sqlite://", "not by bytes"),
        (7, "not by int"),
    ],
)
def test_what_is_no_url_raises(dburi: Any, match: str) -> None:
    """What cannot be read raises, with its beginning, the reason and the way to write it."""
    with pytest.raises(DatabaseURLError, match=match):
        parse_url(dburi)


def test_reading_an_unreadable_url_hides_the_original_error() -> None:
    """SQLAlchemy's own error, whose text may hold the URL, does not travel with ours."""
    with pytest.raises(DatabaseURLError) as caught:
        parse_url("nonsense")
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite://", "sqlite://"),
        ("mysql://user@host/db", "mysql://user@host/db"),
        ("mysql://user:pw@host:3306/db", "mysql://user:***@host:3306/db"),
        ("mysql://host/db?password=pw", "mysql://host/db?password=***"),
        ("mysql://host/db?a=1&passwd=pw&b=2", "mysql://host/db?a=1&b=2&passwd=***"),
        ("mysql://host/db?password=one&password=two", "mysql://host/db?password=***"),
        ("pg://u:pw@host/db?sslpassword=pw&x=y", "pg://u:***@host/db?sslpassword=***&x=y"),
        ("mssql://?odbc_connect=Driver%3DX%3BPWD%3Dpw", "mssql://?odbc_connect=***"),
        ("pg://host/db?options=-c%20work_mem%3D1", "pg://host/db?options=-c+work_mem%3D1"),
    ],
)
def test_masked_url_shows_all_but_the_secrets(url: str, expected: str) -> None:
    """The password and secret parameters are masked, the rest is as it was."""
    assert masked(make_url(url)) == expected
    assert repr(parse_url(url)) == str(parse_url(url)) == expected


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "PASSWORD",
        "passwd",
        "pwd",
        "PWD",
        "sslpassword",
        "ssl_password",
        "passphrase",
        "passcode",
        "password2",
        "passwords",
        "user_pwd",
        "private_key",
        "jwt",
        "token",
        "auth_token",
        "access_token",
        "accessToken",
        "client_secret",
        "secret_key",
        "api_key",
        "apikey",
        "credentials",
        "credentials_base64",
        "dsn",
    ],
)
def test_names_of_secrets(name: str) -> None:
    """Parameters with such names are secrets."""
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "user",
        "host",
        "passfile",
        "password_encryption",
        "sslmode",
        "sslcert",
        "charset",
        "application_name",
        "pool_size",
        "compass_heading",
    ],
)
def test_names_of_no_secrets(name: str) -> None:
    """Other parameters are shown."""
    assert not is_secret(name)


def test_key_is_found_by_strings_and_shows_no_password() -> None:
    """A key equals its full URL, and prints as the masked one."""
    key = DatabaseKey(parse_url(PLAIN))
    shown = PLAIN.replace("pw", "***")
    assert {key: 1}[PLAIN] == 1
    assert key == PLAIN
    assert hash(key) == hash(PLAIN)
    assert (str(key), f"{key}", f"{key!s}", repr(key)) == (shown, shown, shown, repr(shown))
    assert f"{key:>100}" == shown.rjust(100)
    assert "%s %r" % (key, key) == f"{shown} {shown!r}"  # noqa: UP031 - what logging does
    assert key.describe() == shown
    assert repr([key]) == f"[{shown!r}]"


def test_keys_of_binds_are_their_names() -> None:
    """A bind's key equals its name, differs from its URL, and is described by both."""
    key = DatabaseKey(parse_url(PLAIN), "users")
    assert key == "users"
    assert key != DatabaseKey(parse_url(PLAIN))
    assert (str(key), repr(key)) == ("users", "'users'")
    assert key.describe() == f"'users' ({PLAIN.replace('pw', '***')})"


@pytest.mark.parametrize("bind_key", [None, "users"])
def test_keys_pickle(bind_key: str | None) -> None:
    """A key arrives in another process as it was, password and all."""
    key = DatabaseKey(parse_url(PLAIN), bind_key)
    copy = pickle.loads(pickle.dumps(key))  # noqa: S301 - our own
    assert copy == key
    assert (type(copy), copy.url, copy.name) == (DatabaseKey, key.url, key.name)


def test_urls_that_differ_in_the_password_have_different_keys() -> None:
    """The password is part of the identity, though not of what is shown."""
    first, second = (DatabaseKey(make_url(f"mysql://u:{pw}@host/db")) for pw in ("one", "two"))
    assert first != second
    assert str(first) == str(second)


def test_names_are_listed_in_order() -> None:
    """Names in error texts stand in alphabetical order; none is told as such."""
    assert list_names(["users", "logs"]) == "'logs', 'users'"
    assert list_names([]) == "none"
