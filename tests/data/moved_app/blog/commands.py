"""Commands for ``flask``."""

import click
from flask.cli import AppGroup

from .extensions import db
from .models import User

blog = AppGroup("blog", help="Look after the blog.")


@blog.command("init-db")
@click.option("--drop", is_flag=True, help="Remove what there is.")
def init_db(drop):
    """Make the tables."""
    if drop:
        db.drop_all()
    db.create_all()
    click.echo("The tables are made.")


@blog.command("add-user")
@click.argument("username")
@click.argument("email")
def add_user(username, email):
    """Add a user."""
    user = User(username=username, email=email).save()
    click.echo(f"{user.username} has the id {user.id}.")


def init_app(app):
    """Add the commands."""
    app.cli.add_command(blog)
