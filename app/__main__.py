"""`python -m dit_sparse.app`: the same as `dit-sparse demo`."""

import sys

from dit_sparse.cli import build_app

build_app()(["demo", *sys.argv[1:]])
