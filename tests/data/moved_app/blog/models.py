"""What the blog keeps."""

from datetime import datetime, timezone

from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import Mapped, mapped_column, validates

from .extensions import db


def now():
    """Tell the time as the databases keep it."""
    return datetime.now(timezone.utc).replace(tzinfo=None)


class TimestampMixin:
    """When a row was made, and when it was changed."""

    created = db.Column(db.DateTime, default=now, nullable=False)
    updated = db.Column(db.DateTime, default=now, onupdate=now, nullable=False)


class Record(db.Model):
    """What all rows with an id have."""

    __abstract__ = True

    id = db.Column(db.Integer, primary_key=True)

    def save(self):
        """Add it, and commit."""
        db.session.add(self)
        db.session.commit()
        return self


post_tags = db.Table(
    "post_tags",
    db.Column("post_id", db.ForeignKey("post.id"), primary_key=True),
    db.Column("tag_id", db.ForeignKey("tag.id"), primary_key=True),
)


class User(TimestampMixin, Record):
    """Who writes."""

    __tablename__ = "users"

    username = db.Column(db.String(80), unique=True, nullable=False)
    email = db.Column(db.String(120), nullable=False)
    posts = db.relationship("Post", back_populates="author", cascade="all, delete-orphan")

    @validates("email")
    def check_email(self, key, email):
        """Refuse what is no address."""
        if "@" not in email:
            raise ValueError(f"{email!r} is no e-mail address")
        return email

    def as_dict(self):
        """Give it for JSON."""
        return {"id": self.id, "username": self.username, "posts": len(self.posts)}


class Post(TimestampMixin, Record):
    """What was written."""

    title = db.Column(db.String(200), nullable=False)
    body = db.Column(db.Text, nullable=False, default="")
    published = db.Column(db.Boolean, nullable=False, default=True)
    author_id = db.Column(db.Integer, db.ForeignKey("users.id"), nullable=False)
    author = db.relationship("User", back_populates="posts", lazy="joined")
    tags = db.relationship("Tag", secondary=post_tags, backref=db.backref("posts", lazy="dynamic"))

    @hybrid_property
    def shouted(self):
        """Give the title in capitals."""
        return self.title.upper()

    @shouted.inplace.expression
    @classmethod
    def _shouted(cls):
        return db.func.upper(cls.title)

    def as_dict(self):
        """Give it for JSON."""
        return {
            "id": self.id,
            "title": self.title,
            "author": self.author.username,
            "tags": sorted(tag.name for tag in self.tags),
        }


class Tag(db.Model):
    """What posts are about."""

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(db.String(30), unique=True)


class PageView(db.Model):
    """How often a page was looked at; in a database of its own."""

    __bind_key__ = "stats"
    __table_args__ = (db.UniqueConstraint("path"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(db.String(200))
    count: Mapped[int] = mapped_column(default=0)
