"""Pages about users."""

from flask import Blueprint, abort, request
from sqlalchemy.exc import IntegrityError

from .extensions import db
from .models import Post, User

bp = Blueprint("users", __name__, url_prefix="/users")


@bp.get("/")
def index():
    """List the users."""
    users = db.session.execute(db.select(User).order_by(User.username)).scalars()
    return {"users": [user.as_dict() for user in users]}


@bp.post("/")
def create():
    """Add a user."""
    user = User(username=request.json["username"], email=request.json["email"])
    db.session.add(user)
    try:
        db.session.commit()
    except IntegrityError:
        db.session.rollback()
        abort(409)
    return user.as_dict(), 201


@bp.get("/<int:user_id>")
def show(user_id):
    """Show a user."""
    return db.get_or_404(User, user_id).as_dict()


@bp.delete("/<int:user_id>")
def delete(user_id):
    """Delete a user, and what the user has written."""
    db.session.delete(db.get_or_404(User, user_id, description=f"There is no user {user_id}."))
    db.session.commit()
    return "", 204


@bp.get("/by-name/<username>")
def by_name(username):
    """Show a user by name."""
    found = db.one_or_404(
        db.select(User).filter_by(username=username), description=f"There is no {username}."
    )
    return found.as_dict()


@bp.get("/<int:user_id>/latest")
def latest(user_id):
    """Show what a user has written last."""
    posts = db.select(Post).filter_by(author_id=user_id).order_by(Post.id.desc())
    return db.first_or_404(posts).as_dict()


@bp.get("/legacy/<username>")
def legacy(username):
    """Show a user by name, in the older way."""
    return User.query.filter_by(username=username).first_or_404().as_dict()
