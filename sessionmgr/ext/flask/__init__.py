"""Flask: ``db = SQLAlchemy()``, with a session for each application context and bind keys.

::

    db = SQLAlchemy()

    class User(db.Model):
        id: Mapped[int] = mapped_column(primary_key=True)

    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = "postgresql+psycopg://app@db/main"
    db.init_app(app)

    @app.get("/users/<int:user_id>")
    def user(user_id: int) -> str:
        return db.get_or_404(User, user_id).name

The names are those of Flask-SQLAlchemy 3.1, also of its modules: an application moves by its import
lines. The engines are a :class:`sessionmgr.SessionManager`'s, so it may be forked at any time.
"""

from .extension import SQLAlchemy
from .model import Model
from .pagination import Pagination
from .query import Query
from .session import Session

__all__ = ("Model", "Pagination", "Query", "SQLAlchemy", "Session")
