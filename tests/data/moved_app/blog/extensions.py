"""The extensions, without an application yet."""

from flask_sqlalchemy import SQLAlchemy

db = SQLAlchemy()
