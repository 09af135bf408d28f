"""An application on empty databases: in memory, unless the environment names others."""

import os

import pytest
from blog import create_app
from blog.extensions import db


@pytest.fixture
def app():
    """Make the application, with its tables."""
    app = create_app(
        {
            "TESTING": True,
            "SQLALCHEMY_DATABASE_URI": os.environ.get("BLOG_TEST_URI", "sqlite://"),
            "SQLALCHEMY_BINDS": {"stats": os.environ.get("BLOG_TEST_STATS_URI", "sqlite://")},
        }
    )
    with app.app_context():
        db.create_all()
    yield app
    with app.app_context():
        db.session.remove()
        db.drop_all()
        for engine in db.engines.values():
            engine.dispose()


@pytest.fixture
def client(app):
    """Return who asks."""
    return app.test_client()


@pytest.fixture
def ada(client):
    """Add a user."""
    return client.post("/users/", json={"username": "ada", "email": "ada@example.com"}).json


@pytest.fixture
def posts(client, ada):
    """Add twelve posts."""
    for number in range(1, 13):
        tags = ["all"] + ["even"] * (number % 2 == 0)
        post = {"title": f"Post {number}", "author": "ada", "tags": tags}
        assert client.post("/posts", json=post).status_code == 201
