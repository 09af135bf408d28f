"""What the blog does."""

import pytest
import sqlalchemy as sa
from blog import create_app
from blog.extensions import db
from blog.models import PageView, Post, Record, Tag, User, post_tags


def test_users(client, ada):
    """Users are added, shown, and deleted."""
    assert ada == {"id": 1, "username": "ada", "posts": 0}
    assert client.get("/users/1").json == ada
    assert client.get("/users/by-name/ada").json == ada
    assert client.get("/users/legacy/ada").json == ada
    assert client.get("/users/").json == {"users": [ada]}
    assert client.delete("/users/1").status_code == 204
    assert client.get("/users/").json == {"users": []}


def test_taken_name(client, ada):
    """A name that is taken is a conflict, and the application goes on."""
    again = client.post("/users/", json={"username": "ada", "email": "a@example.com"})
    assert again.status_code == 409
    assert client.get("/users/1").json == ada


def test_not_found(client, ada):
    """What is not there is not found, in the words that were given."""
    for path in ("/users/2", "/users/legacy/eve", "/users/1/latest", "/posts/1"):
        response = client.get(path)
        assert response.status_code == 404
        assert "was not found" in response.json["error"]
    assert client.delete("/users/2").json == {"error": "There is no user 2."}
    assert client.get("/users/by-name/eve").json == {"error": "There is no eve."}
    assert client.get("/tags/odd").json == {"error": "Nothing is about odd."}


def test_pages(client, posts):
    """The list has pages, and none before the first or after the last."""
    first = client.get("/").json
    assert [post["title"] for post in first["posts"]] == [f"Post {n}" for n in range(12, 7, -1)]
    assert (first["page"], first["pages"], first["total"]) == (1, 3, 12)
    assert first["numbers"] == [1, 2, 3]
    assert first["next"] == "/?page=2"
    last = client.get("/?page=3").json
    assert [post["title"] for post in last["posts"]] == ["Post 2", "Post 1"]
    assert last["next"] is None
    for page in ("4", "0", "-1", "x"):
        assert client.get(f"/?page={page}").status_code == 404


def test_first_page_of_nothing(client):
    """An empty list has a first page."""
    empty = client.get("/").json
    assert empty == {
        "posts": [], "page": 1, "pages": 0, "total": 0, "numbers": [], "next": None
    }  # fmt: skip


def test_older_pages(client, posts):
    """A query has pages too, of as many rows as the request wants, up to a limit."""
    page = client.get("/tags/even?per_page=2&page=2").json
    assert [post["title"] for post in page["posts"]] == ["Post 6", "Post 8"]
    assert (page["pages"], page["total"]) == (3, 6)
    assert client.get("/tags/all?per_page=50").json["pages"] == 4
    assert client.get("/tags/even?page=9").status_code == 404


def test_posts(client, posts):
    """Posts have authors and tags, and are found."""
    assert client.get("/posts/2").json["tags"] == ["all", "even"]
    assert client.get("/users/1").json["posts"] == 12
    assert client.get("/users/1/latest").json["title"] == "Post 12"
    found = client.get("/search?q=post 1").json
    assert found["count"] == 4
    assert [post["title"] for post in found["posts"]] == [f"Post {n}" for n in (1, 10, 11, 12)]


def test_views_are_counted_elsewhere(app, client, posts):
    """What was looked at is in the other database, committed together with the rest."""
    for path in ("/posts/1", "/posts/1", "/posts/2"):
        client.get(path)
    assert client.get("/stats").json["views"][:2] == [["/posts/1", 2], ["/posts/2", 1]]
    with app.app_context():
        tables = {key: sa.inspect(engine).get_table_names() for key, engine in db.engines.items()}
        assert sorted(tables[None]) == ["post", "post_tags", "tag", "users"]
        assert tables["stats"] == ["page_view"]
        with db.engines["stats"].connect() as connection:
            assert connection.scalar(sa.text("SELECT sum(count) FROM page_view")) >= 3


def test_older_queries(app, posts):
    """Models have queries, sessions make them, and rows print."""
    with app.app_context():
        assert User.query.get(1) is db.session.get(User, 1)
        assert User.query.count() == db.session.query(User).count() == 1
        assert Tag.query.order_by(Tag.name).all() == list(
            db.session.scalars(db.select(Tag).order_by(Tag.name))
        )
        assert db.session.query(Post).join(Post.tags).filter(Tag.name == "even").count() == 6
        assert Post.query.filter(Post.title.like("%11")).one().author.username == "ada"
        even = db.session.scalar(db.select(Tag).filter_by(name="even"))
        assert even.posts.count() == 6
        assert repr(even) == f"<Tag {even.id}>"
        assert repr(Tag()).startswith("<Tag (transient ")


def test_bulk(app, posts):
    """Statements that change many rows reach the databases of their tables."""
    with app.app_context():
        db.session.execute(db.update(Post).where(Post.id <= 2).values(published=False))
        db.session.execute(db.insert(PageView), [{"path": "/a", "count": 3}, {"path": "/b"}])
        db.session.commit()
        assert Post.query.filter_by(published=False).count() == 2
        db.session.execute(db.delete(PageView).where(PageView.path == "/b"))
        assert db.session.scalars(db.select(PageView.path)).all()[-1] == "/a"
        assert db.session.execute(db.select(db.func.count()).select_from(post_tags)).scalar() == 18


def test_session_ends_with_its_context(app, ada):
    """What was not committed is gone, and each context has a session of its own."""
    with app.app_context():
        session = db.session()
        db.session.add(User(username="eve", email="eve@example.com"))
        db.session.flush()
        with app.app_context():
            assert db.session() is not session
        assert db.session() is session
    with app.app_context():
        assert db.session.scalars(db.select(User.username)).all() == ["ada"]


def test_errors_roll_back(app, client):
    """A view that raises writes nothing, and the next request goes on."""
    app.testing = False
    app.config["PROPAGATE_EXCEPTIONS"] = False
    bad = client.post("/users/", json={"username": "eve", "email": "nowhere"})
    assert bad.status_code == 500
    assert client.get("/users/").json == {"users": []}


def test_needs_a_context(app):
    """Outside of an application the session says so."""
    with pytest.raises(RuntimeError, match="application context"):
        db.session.execute(db.select(User))


def test_needs_an_application(app):
    """An application that the extension was not told of cannot be used."""
    from flask import Flask

    with Flask("other").app_context(), pytest.raises(RuntimeError, match="init_app"):
        db.session.execute(db.select(User))
    with pytest.raises(RuntimeError, match="SQLAlchemy"):
        db.init_app(app)


def test_names():
    """Tables have the names of their models, unless they have their own."""
    assert Record.__abstract__
    assert (Post.__tablename__, PageView.__tablename__) == ("post", "page_view")
    assert User.__table__.name == "users"
    assert set(db.metadatas) == {None, "stats"}
    assert db.metadata.tables["post_tags"] is post_tags
    assert PageView.metadata is db.metadatas["stats"]


def test_commands(tmp_path):
    """The commands make the tables, in files of the instance folder, and add users."""
    app = create_app(instance_path=str(tmp_path))
    runner = app.test_cli_runner()
    assert runner.invoke(args=["blog", "init-db", "--drop"]).output == "The tables are made.\n"
    added = runner.invoke(args=["blog", "add-user", "ada", "ada@example.com"])
    assert added.output == "ada has the id 1.\n"
    assert sorted(path.name for path in tmp_path.glob("*.db")) == ["blog.db", "stats.db"]
    with app.app_context():
        for engine in db.engines.values():
            engine.dispose()


def test_shell(app):
    """The shell knows the extension and the models."""
    with app.app_context():
        context = app.make_shell_context()
    assert context["db"] is db
    assert {"User", "Post", "Tag", "PageView"} <= set(context)
