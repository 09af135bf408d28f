"""Pages about posts."""

from flask import Blueprint, current_app, request, url_for

from .extensions import db
from .models import PageView, Post, Tag, User

bp = Blueprint("posts", __name__)


@bp.after_request
def count_view(response):
    """Count who was looked at, in the other database."""
    if response.status_code == 200:
        view = db.session.scalar(db.select(PageView).filter_by(path=request.path))
        if view is None:
            view = PageView(path=request.path, count=0)
            db.session.add(view)
        view.count += 1
        db.session.commit()
    return response


def paged(pagination, endpoint, **values):
    """Give a page for JSON."""
    return {
        "posts": [post.as_dict() for post in pagination],
        "page": pagination.page,
        "pages": pagination.pages,
        "total": pagination.total,
        "numbers": list(pagination.iter_pages(left_edge=1, right_edge=1)),
        "next": url_for(endpoint, page=pagination.next_num, **values)
        if pagination.has_next
        else None,
    }


@bp.get("/")
def index():
    """List posts, page by page."""
    posts = db.select(Post).where(Post.published).order_by(Post.id.desc())
    pagination = db.paginate(posts, per_page=current_app.config["POSTS_PER_PAGE"])
    return paged(pagination, "posts.index")


@bp.get("/tags/<name>")
def tagged(name):
    """List the posts with a tag, page by page, in the older way."""
    tag = Tag.query.filter_by(name=name).one_or_404(description=f"Nothing is about {name}.")
    pagination = tag.posts.order_by(Post.id).paginate(max_per_page=3)
    return paged(pagination, "posts.tagged", name=name)


@bp.get("/posts/<int:post_id>")
def show(post_id):
    """Show a post, in the older way."""
    return Post.query.get_or_404(post_id).as_dict()


@bp.post("/posts")
def create():
    """Add a post, with its tags."""
    sent = request.json
    author = db.first_or_404(db.select(User).filter_by(username=sent["author"]))
    names = set(sent.get("tags", ()))
    known = db.session.scalars(db.select(Tag).where(Tag.name.in_(names))).all()
    new = [Tag(name=name) for name in sorted(names - {tag.name for tag in known})]
    post = Post(title=sent["title"], author=author, tags=[*known, *new]).save()
    return post.as_dict(), 201


@bp.get("/search")
def search():
    """Find posts by a word of the title, in the older way."""
    word = request.args.get("q", "", str)
    found = db.session.query(Post).filter(Post.shouted.contains(word.upper())).order_by(Post.title)
    return {"posts": [post.as_dict() for post in found], "count": found.count()}


@bp.get("/stats")
def stats():
    """Tell what was looked at most."""
    most = db.select(PageView.path, PageView.count).order_by(PageView.count.desc()).limit(3)
    return {"views": [[path, count] for path, count in db.session.execute(most)]}
