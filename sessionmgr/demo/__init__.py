"""The main job: a pool of workers writes to several databases, and the rows are counted."""
