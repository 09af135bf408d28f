"""A blog."""

from flask import Flask, jsonify

from .extensions import db


def create_app(config=None, instance_path=None):
    """Make the application."""
    app = Flask(__name__, instance_path=instance_path)
    app.config.from_mapping(
        SECRET_KEY="dev",
        SQLALCHEMY_DATABASE_URI="sqlite:///blog.db",
        SQLALCHEMY_BINDS={"stats": {"url": "sqlite:///stats.db", "echo": False}},
        SQLALCHEMY_TRACK_MODIFICATIONS=False,
        POSTS_PER_PAGE=5,
    )
    if config:
        app.config.from_mapping(config)

    db.init_app(app)

    from . import commands, posts, users

    app.register_blueprint(users.bp)
    app.register_blueprint(posts.bp)
    commands.init_app(app)

    @app.errorhandler(404)
    def not_found(error):
        return jsonify(error=error.description), 404

    return app
