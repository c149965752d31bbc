"""The evaluation of the pocket model.

`motion` looks at one clip; `runs` makes videos under the `conditions`, `claims` judges the paper's
claims, `demo` and `report` show everything on one page.
"""
